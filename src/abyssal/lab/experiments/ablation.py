"""Experts taken away from a trained model, one at a time and all of a kind: which tokens suffer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor

from abyssal.config import Config
from abyssal.errors import UserError
from abyssal.lab.charts import heat, points
from abyssal.lab.experiment import Figures, Finding, Job, Lab, Results, Table
from abyssal.lab.measure import CLASSES, held_out, token_classes, token_losses, windows
from abyssal.lab.recipe import LabRecipe
from abyssal.lab.statistics import against, change, difference, mean, spread, verdict
from abyssal.loading import load
from abyssal.model import Transformer
from abyssal.model.moe import MoE

ROUTED, SHARED = "all routed experts", "the shared experts"
KINDS = ("routed", "shared")


class Settings(Config):
    """``tokens``: how many held-out tokens are looked at."""

    tokens: PositiveInt


class Ablation(Lab):
    settings = Settings

    def check(self, recipe: LabRecipe) -> None:
        super().check(recipe)
        config = recipe.recipe(None, 1).model_config_resolved()
        if config.moe is None or not config.moe.n_shared_experts:
            raise UserError(
                f"lab {recipe.name}: model.moe.n_shared_experts: 0 or no experts at all; expected both kinds"
            )

    def run(self, job: Job) -> Figures:
        recipe = job.recipe()
        model, tokenizer = load(job.train(recipe))
        assert tokenizer is not None
        rows = windows(held_out(recipe, tokenizer), recipe.training.sequence_length, job.lab.settings["tokens"])
        classes = torch.from_numpy(token_classes(tokenizer)[rows[:, 1:].numpy()])

        present = [kind for kind in range(len(CLASSES)) if bool((classes == kind).any())]

        def losses() -> list[float]:
            found = token_losses(model, rows)
            by_class = [float(found[classes == kind].mean()) for kind in present]
            return [round(x, 5) for x in (float(found.mean()), *by_class)]

        out: Figures = {
            "classes": [CLASSES[kind] for kind in present],
            "shares": [round(float((classes == kind).float().mean()), 4) for kind in present],
            "whole": losses(),
        }
        layers = _layers(model)
        routed, shared = (
            [moe.experts.down_proj for moe in layers.values()],
            [_shared_of(moe) for moe in layers.values()],
        )
        for name, tensors in ((ROUTED, routed), (SHARED, shared)):
            with _without(tensors):
                out[name] = losses()
        out["single"] = {}
        for layer, moe in layers.items():
            out["single"][str(layer)] = {"shared": [], "routed": []}
            with _without([_shared_of(moe)]):
                out["single"][str(layer)]["shared"] = losses()
            for expert in range(len(moe.experts.down_proj)):
                with _without([moe.experts.down_proj[expert]]):
                    out["single"][str(layer)]["routed"].append(losses())
        return out

    def conclude(self, results: Results) -> Finding:
        (arm,) = results.figures
        classes = results.of(arm, "classes")[0]
        whole = results.of(arm, "whole")
        worse = {
            name: [
                [b - a for a, b in zip(w, found, strict=True)]
                for w, found in zip(whole, results.of(arm, name), strict=True)
            ]
            for name in (ROUTED, SHARED)
        }
        overall = {name: [one[0] for one in worse[name]] for name in worse}
        answer = [
            against(
                "Loss added where they are taken away",
                (SHARED, overall[SHARED]),
                (ROUTED, overall[ROUTED]),
            )
        ]
        for name in (SHARED, ROUTED):
            by_class = {kind: [one[i + 1] for one in worse[name]] for i, kind in enumerate(classes)}
            most = max(by_class, key=lambda kind: mean(by_class[kind]))
            least = min(by_class, key=lambda kind: mean(by_class[kind]))
            apart = difference(by_class[least], by_class[most])
            answer.append(
                f"Without {name} tokens of the class “{most}” suffer most ({change(by_class[most], 2)} nats), those "
                f"of “{least}” least ({change(by_class[least], 2)})"
                + ("." if apart.clear else "; the seeds do not show them apart.")
            )
        singles = results.of(arm, "single")
        shared, routed, largest = [], [], []
        for w, found in zip(whole, singles, strict=True):
            shared.append(mean([layer["shared"][0] - w[0] for layer in found.values()]))
            each = [one[0] - w[0] for layer in found.values() for one in layer["routed"]]
            routed.append(mean(each))
            largest.append(max(each))
        answer.append(
            against(
                "Loss added by taking away one expert of one layer",
                ("a routed one", routed),
                ("the shared one", shared),
                digits=4,
            )
            + f" The routed expert that is missed most adds {spread(largest, 3)} nats."
        )
        shares = results.of(arm, "shares")
        common = [mean(column) for column in zip(*shares, strict=True)]
        falls = {
            kind: [_shares_of_loss(w, f, common, kind) for w, f in zip(whole, singles, strict=True)] for kind in KINDS
        }
        largest_class = max(common)
        answer.append(
            f"Of the loss that taking away one expert adds, {spread(falls['routed'], 2)} falls on a single class of "
            f"tokens with a routed expert, and {spread(falls['shared'], 2)} with a shared one (evenly spread over "
            f"tokens it would be {largest_class:.2f}, the share of the commonest class). "
            + against(
                "The share that falls on one class",
                ("a shared expert", falls["shared"]),
                ("a routed one", falls["routed"]),
            )
        )
        together = verdict(
            overall[SHARED],
            overall[ROUTED],
            "more on its routed experts together than on its shared ones",
            "more on its shared experts than on all routed ones",
            "on both kinds alike, as far as these seeds show",
        )
        alone = verdict(routed, shared, "more than", "less than", "no more than")
        short = f"The model rests {together}; a single shared expert is missed {alone} a single routed one."
        rows = []
        for i, kind in enumerate(("all tokens", *classes)):
            rows.append(
                [
                    kind,
                    "1" if i == 0 else f"{mean([one[i - 1] for one in shares]):.2f}",
                    spread([one[i] for one in whole], 3),
                    change([one[i] for one in worse[SHARED]], 3),
                    change([one[i] for one in worse[ROUTED]], 3),
                ]
            )
        table = Table(
            "Loss by class of the token to be predicted, and what is added",
            ["class", "share of tokens", "nats, whole model", f"without {SHARED}", f"without {ROUTED}"],
            rows,
        )
        charts = [
            points(
                f"Added without {name}",
                "nats a token",
                {kind: [one[i] for one in worse[name]] for i, kind in enumerate(("all tokens", *classes))},
            )
            for name in (SHARED, ROUTED)
        ]
        first = results.figures[arm][min(results.figures[arm])]
        for layer, found in first["single"].items():
            cells = [
                [one[i + 1] - first["whole"][i + 1] for i in range(len(classes))]
                for one in [*found["routed"], found["shared"]]
            ]
            names = [*(f"expert {e}" for e in range(len(found["routed"]))), "shared"]
            charts.append(
                heat(f"Layer {layer}, seed 1: nats added where one expert is taken away", names, classes, cells)
            )
        limits = [
            "An expert is taken away by making its output 0, without training on: what is measured is what the model "
            "rests on, not what it could not learn without. The routers go on choosing it.",
            "A shared expert works on every token, a routed one on a part of them, so that one of it has less to add.",
        ]
        return Finding(short, answer, [table], charts, limits)


def _shares_of_loss(whole: list[float], singles: dict[str, Any], common: list[float], kind: str) -> float:
    """Of the loss that taking away one expert adds to the tokens of the classes that it adds to, the share of the class
    with the most of it; the mean over experts of a ``kind``, weighted by what they add."""
    most, all_of_it = [], []
    for layer in singles.values():
        for found in layer["routed"] if kind == "routed" else [layer["shared"]]:
            added = [max(b - a, 0.0) * c for a, b, c in zip(whole[1:], found[1:], common, strict=True)]
            most.append(max(added))
            all_of_it.append(sum(added))
    return sum(most) / sum(all_of_it) if sum(all_of_it) > 0 else 0.0


def _layers(model: Transformer) -> dict[int, MoE]:
    return {i: block.mlp for i, block in enumerate(model.blocks) if isinstance(block.mlp, MoE)}


def _shared_of(moe: MoE) -> Tensor:
    assert moe.shared_experts is not None
    return moe.shared_experts.down_proj.weight


@contextmanager
def _without(tensors: Sequence[Tensor]) -> Iterator[None]:
    """With these tensors 0."""
    with torch.no_grad():
        kept = [tensor.clone() for tensor in tensors]
        try:
            for tensor in tensors:
                tensor.zero_()
            yield
        finally:
            for tensor, before in zip(tensors, kept, strict=True):
                tensor.copy_(before)


LAB = Ablation()
