"""Adapters on disk, in PEFT's format: what ``PeftModel.from_pretrained`` reads over an exported model, and what PEFT
wrote for one.

adapter_config.json          which modules, rank, α, and the base: a path or a name on the hub
adapter_model.safetensors    base_model.model.X.lora_A.weight [r, I] and .lora_B.weight [O, r] for each module X
abyssal.json                 what the base was, so that another one is refused; PEFT does not look at it

How experts lie there, E to a layer (found by having PEFT 0.21 write one):

- Where transformers stacks them (deepseek_v2, deepseek_v3), they are PEFT's ``target_parameters``. A is [E·r, I], the
  experts one below the other; B is [O, r·E], whose column j·E + e is column j of expert e. Both parameters of a module
  give nested wrappers: the inner one is called ``experts.base_layer``, the outer one ``experts``, and which is which
  only shapes say.
- Where each is a module (model_type deepseek), ``experts.3.gate_proj`` and so on have two matrices each. Our A of
  gate_up is written under both; read back, it is one again.

Trap: for models with stacked experts PEFT takes ``target_modules`` that end in gate_proj, up_proj or down_proj to mean
the experts (as they were named in transformers 4), and leaves dense MLPs and shared experts out without a word. So
theirs are written as ``target_parameters`` too (``mlp.down_proj.weight``), with the same names in the file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from abyssal.checkpoint.export import write_json
from abyssal.checkpoint.folder import read_tensors, write_tensors
from abyssal.checkpoint.names import layer_of
from abyssal.config import ModelConfig, published_model_type, read_config
from abyssal.errors import UserError
from abyssal.model import Transformer
from abyssal.model.adapting import Adapted, add_change, attach, kind, low_ranks, matrices
from abyssal.model.lora import LowRank

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
BASE = "abyssal.json"
_PREFIX = "base_model.model."
_KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight$")
_EXPERT = re.compile(r"(.+\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj$")
_MLP = re.compile(r"\.(gate|up|down)_proj$")
# Keys of PEFT's that change what an adapter computes, and how they must stand for it to be low-rank products alone.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    **dict.fromkeys(("use_dora", "lora_bias", "fan_in_fan_out", "use_qalora", "use_bdlora"), (False, None)),
    **dict.fromkeys(
        ("modules_to_save", "trainable_token_indices", "layer_replication", "arrow_config"), (None, [], {})
    ),
    **dict.fromkeys(("alora_invocation_tokens", "kasa_config", "velora_config", "monteclora_config"), (None, [], {})),
}
_MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# What of a config may differ without making it another base.
_ELSEWHERE = {"published", "mtp", "initializer_range", "max_position_embeddings", "bos_token_id", "eos_token_id"}


@dataclass(frozen=True)
class Adapter:
    """What an adapter's folder holds."""

    folder: Path
    settings: dict[str, Any]
    """adapter_config.json."""
    tensors: dict[str, tuple[Tensor, Tensor]]
    """A and B by module, as stored; the inner of two wrappers has ``.base_layer`` in its name."""
    made_for: dict[str, Any] | None
    """abyssal.json; None where PEFT made it."""

    @property
    def base(self) -> str | None:
        """Where the base is: a path or a name on the hub."""
        found = self.settings.get("base_model_name_or_path")
        return found if isinstance(found, str) and found else None

    def changes(self, known: Mapping[str, tuple[int, ...]]) -> dict[str, LowRank]:
        """What is added to which matrix. ``known`` are the base's (:func:`abyssal.model.adapting.matrices`); a router's
        weight, which PEFT's all-linear adapts, is called ``….mlp.gate``. Raises UserError for what does not fit."""
        out, single = dict[str, LowRank](), dict[str, dict[tuple[int, str], LowRank]]()
        for name, (a, b) in self.tensors.items():
            if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
                raise UserError(f"{self._file}: {name}: A {list(a.shape)} and B {list(b.shape)} do not go together")
            if match := _EXPERT.match(name):
                single.setdefault(match[1], {})[int(match[2]), match[3]] = self._change(name, a, b)
            elif name.removesuffix(".base_layer").endswith(".mlp.experts"):
                full, change = self._stacked(name.removesuffix(".base_layer"), a, b, known)
                out[full] = change
            else:
                out[name] = self._change(name, a, b)
        for name, parts in single.items():
            out |= self._joined(name, parts, known)
        for name, change in out.items():
            if name not in known and not name.endswith(".mlp.gate"):
                raise UserError(f"{self._file}: {name}: not a matrix of the base that can be adapted")
            if name in known and change.shape != known[name]:
                raise UserError(
                    f"{self._file}: {name}: made for {list(change.shape)}, the base has {list(known[name])}"
                )
        return {name: out[name] for name in (*known, *sorted(out.keys() - known.keys())) if name in out}

    def of_layers(self, model: Transformer) -> Adapter:
        """What of this is for the layers that were loaded."""
        absent = {i for i, layer in enumerate(model.model.layers) if isinstance(layer, nn.Identity)}
        kept = {name: pair for name, pair in self.tensors.items() if layer_of(name) not in absent}
        return replace(self, tensors=kept)

    def check_base(self, config: ModelConfig) -> None:
        """Raises UserError where this was made for another base than ``config``'s, as far as it says."""
        if self.made_for is None or self.made_for.get("identity") == config_identity(config):
            return
        there = self.made_for.get("config")
        ours, theirs = _flat(_described(config)), _flat(there if isinstance(there, dict) else {})
        differing = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
        told = "; ".join(f"{key} {theirs.get(key)}, the base has {ours.get(key)}" for key in differing[:3])
        raise UserError(f"{self.folder}: an adapter for another base: {told or 'its identity differs'}")

    @property
    def _file(self) -> Path:
        return self.folder / TENSORS

    def _change(self, name: str, a: Tensor, b: Tensor) -> LowRank:
        alpha, parameter = self.settings["lora_alpha"], f"{name}.weight"
        if any(f".{parameter}".endswith(f".{target}") for target in self.settings.get("target_parameters") or ()):
            name = parameter  # PEFT's name for a module's weight that is adapted as a parameter
        for pattern, value in self.settings["alpha_pattern"].items():
            if re.match(rf"(.*\.)?({pattern})$", name):  # the first that fits, as PEFT has it
                alpha = value
                break
        return LowRank(a, b, alpha, self.settings["use_rslora"])

    def _stacked(self, name: str, a: Tensor, b: Tensor, known: Mapping[str, tuple[int, ...]]) -> tuple[str, LowRank]:
        for which in ("gate_up_proj", "down_proj"):
            full = f"{name}.{which}"
            experts, outputs, inputs = known.get(full, (0, 0, 0))
            if experts and (outputs, inputs) == (b.shape[0], a.shape[1]) and a.shape[0] % experts == 0:
                stacked_a = a.unflatten(0, (experts, -1))
                stacked_b = b.unflatten(1, (-1, experts)).permute(2, 0, 1).contiguous()
                return full, self._change(full, stacked_a, stacked_b)
        shapes = [list(known[full]) for end in ("gate_up", "down") if (full := f"{name}.{end}_proj") in known]
        raise UserError(
            f"{self._file}: {name}: A {list(a.shape)} and B {list(b.shape)} fit none of the base's experts {shapes}"
        )

    def _joined(
        self, name: str, parts: Mapping[tuple[int, str], LowRank], known: Mapping[str, tuple[int, ...]]
    ) -> dict[str, LowRank]:
        """Experts that are modules of their own, stacked; those that are not adapted get zeros."""
        out = {}
        for which, halves in (("gate_up", ("gate", "up")), ("down", ("down",))):
            full = f"{name}.{which}_proj"
            found = {key: part for key, part in parts.items() if key[1] in halves}
            if not found:
                continue
            if full not in known:
                raise UserError(f"{self._file}: {name}: the base has no routed experts there")
            experts, outputs, inputs = known[full]
            height = outputs // len(halves)
            for (expert, half), part in found.items():
                if expert >= experts or part.shape != (height, inputs):
                    raise UserError(
                        f"{self._file}: {name}.{expert}.{half}_proj: made for {list(part.shape)}, the base has "
                        f"{experts} experts of {[height, inputs]}"
                    )
            # The scale goes into B where matrices have different ones; else it stays beside.
            first = next(iter(found.values()))
            same = all((p.scale, p.rank) == (first.scale, first.rank) for p in found.values())
            shared = same and all(
                (expert, half) in found and torch.equal(found[expert, half].a, found[expert, halves[0]].a)
                for expert in range(experts)
                for half in halves
            )
            rank = max(part.rank for part in found.values())
            count = 1 if shared else len(halves)
            a, b = torch.zeros(experts, count * rank, inputs), torch.zeros(experts, outputs, count * rank)
            for (expert, half), part in found.items():
                row = halves.index(half) * height
                start = 0 if shared else halves.index(half) * rank
                a[expert, start : start + part.rank] = part.a
                b[expert, row : row + height, start : start + part.rank] = part.b if same else part.scale * part.b
            if not same:
                out[full] = LowRank(a, b, count * rank)
            elif shared:
                out[full] = LowRank(a, b, first.alpha, first.rslora)
            else:
                out[full] = LowRank(a, b, first.scale * count * rank)
        return out


def is_adapter(folder: Path) -> bool:
    """Whether ``folder`` holds an adapter and no model."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def base_identity(folder: Path) -> str:
    """What tells the model in ``folder`` from those that an adapter for it does not fit: a hash of its config, which
    names and shapes of all tensors follow from. Raises UserError where it is an adapter itself."""
    if is_adapter(folder):
        raise UserError(f"{folder}: an adapter; merge it first: abyssal export {folder} NEW-FOLDER")
    return config_identity(read_config(folder))


def config_identity(config: ModelConfig) -> str:
    """:func:`base_identity` of a model with this config."""
    text = json.dumps(_described(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def write_adapter(folder: Path, model: Transformer, *, base: str | Path, identity: str | None = None) -> None:
    """Writes what ``model`` was adapted by into ``folder``, which exists. ``base`` says where the base is: a path (seen
    from ``folder``, or absolute) or a name on the hub; ``identity`` is its :func:`base_identity`, by default that of
    the model's config. A folder of this name seen from where we are is written as an absolute path. Raises UserError
    where the model has no adapter."""
    changes = low_ranks(model)
    if not changes:
        raise UserError("the model has no adapter; expected one made by add_lora")
    separate = _layout(model.config) == "deepseek"
    tensors = dict[str, Tensor]()
    for name, a, b in _pairs(changes, separate=separate):
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = a
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = b
    where = str(Path(base).resolve()) if Path(base).is_dir() else str(base)
    write_json(folder / CONFIG, _settings(model, changes, where, separate=separate))
    described = _described(model.config)
    write_json(folder / BASE, {"identity": identity or config_identity(model.config), "config": described})
    write_tensors(tensors, folder / TENSORS)


def read_adapter(folder: Path) -> Adapter:
    """The adapter in ``folder``, ours or PEFT's. Raises UserError for one that is damaged or does more than add
    low-rank products."""
    settings = read_adapter_settings(folder)
    for key, right in _NEUTRAL.items():
        found = settings.get(key, right[0] if key != "peft_type" else None)
        if found not in right:
            raise UserError(f"{folder / CONFIG}: {key}: {found!r} is not supported, only {right[0]!r}")
    start = settings.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_MOVES_BASE):
        raise UserError(f"{folder / CONFIG}: init_lora_weights: {start!r} changes the base; save it as plain LoRA")
    settings = {"use_rslora": False, **settings}
    settings["alpha_pattern"] = settings.get("alpha_pattern") or {}
    alphas = (settings.get("lora_alpha"), *settings["alpha_pattern"].values())
    if not all(isinstance(alpha, int | float) and not isinstance(alpha, bool) for alpha in alphas):
        raise UserError(f"{folder / CONFIG}: lora_alpha: {alphas[0]!r}; expected a number")
    try:
        for pattern in settings["alpha_pattern"]:
            re.compile(pattern)
    except (re.error, TypeError) as error:
        raise UserError(f"{folder / CONFIG}: alpha_pattern: {pattern!r}: no regular expression ({error})") from None
    if not (folder / TENSORS).is_file():
        pickles = [path.name for path in (folder / "adapter_model.bin",) if path.exists()]
        why = f"holds {pickles[0]}, pickled weights, which are never loaded" if pickles else "no such file"
        raise UserError(f"{folder / TENSORS}: {why}; expected safetensors")
    found_for = _read_json(folder / BASE) if (folder / BASE).is_file() else None
    return Adapter(folder, settings, _paired(read_tensors(folder / TENSORS), folder / TENSORS), found_for)


def read_adapter_settings(folder: Path) -> dict[str, Any]:
    """adapter_config.json as it is. Raises UserError where it cannot be read."""
    return _read_json(folder / CONFIG)


def apply_adapter(adapter: Adapter, model: Transformer, *, trainable: bool = True) -> Adapted:
    """Puts ``adapter`` around the matrices of ``model``, which it then trains alone. What PEFT adapted of routers is
    added to their weights; with ``trainable`` that is an error. Raises UserError where it does not fit."""
    adapter.check_base(model.config)
    changes = adapter.of_layers(model).changes(matrices(model))
    routers = {name: changes.pop(name) for name in list(changes) if name.endswith(".mlp.gate")}
    if routers and trainable:
        raise UserError(
            f"{adapter.folder}: adapts routers ({next(iter(routers))}), which are not trained here by an adapter; "
            "merge it first: abyssal export"
        )
    for name, change in routers.items():
        weight = _router_weight(name, model)
        if tuple(weight.shape) != change.shape:
            raise UserError(f"{adapter.folder}: {name} is for {list(change.shape)}, the base has {list(weight.shape)}")
        add_change(weight, change)
    device = model.model.embed_tokens.weight.device
    return attach(
        model,
        {
            name: LowRank(change.a.float().to(device), change.b.float().to(device), change.alpha, change.rslora)
            for name, change in changes.items()
        },
    )


@torch.no_grad()
def copy_adapter(adapter: Adapter, model: Transformer) -> None:
    """Puts the numbers of ``adapter`` in the place of those that ``model``, adapted already, has. Raises UserError
    where the two do not adapt the same matrices by the same ranks and scales."""
    adapter.check_base(model.config)
    stored, held = adapter.changes(matrices(model)), low_ranks(model)
    for name in stored.keys() ^ held.keys():
        where = "the file adapts it, the model does not" if name in stored else "missing"
        raise UserError(f"{adapter.folder / TENSORS}: {name}: {where}")
    for name, change in stored.items():
        mine = held[name]
        if (change.rank, change.scale) != (mine.rank, mine.scale):
            raise UserError(
                f"{adapter.folder}: {name}: rank {change.rank} and scale {change.scale:.4g}, "
                f"the model has {mine.rank} and {mine.scale:.4g}"
            )
    for name, change in stored.items():
        held[name].a.copy_(change.a)
        held[name].b.copy_(change.b)


def _router_weight(name: str, model: Transformer) -> Tensor:
    try:
        return model.get_submodule(name).weight  # type: ignore[return-value]
    except AttributeError:
        raise UserError(f"adapter: {name}: the model has no such router") from None


def _layout(config: ModelConfig) -> str:
    """The model_type that the base is exported as; a study variant has none, and none's rules."""
    try:
        return published_model_type(config)
    except UserError:
        return ""


def _pairs(changes: Mapping[str, LowRank], *, separate: bool) -> Iterator[tuple[str, Tensor, Tensor]]:
    """A and B under the names that PEFT has for them."""
    for name, change in changes.items():
        a, b = change.a.detach().cpu(), change.b.detach().cpu()
        prefix, experts, which = name.rpartition(".experts.")
        if not experts:
            yield name, a, b
        elif separate:
            halves = ("down",) if which == "down_proj" else ("gate", "up")
            for expert in range(len(a)):
                for half, part in zip(halves, b[expert].chunk(len(halves)), strict=True):
                    # Copies: a file of safetensors has no two names for the same memory.
                    yield f"{prefix}.experts.{expert}.{half}_proj", a[expert].clone(), part.clone()
        else:
            inner = which == "gate_up_proj" and f"{prefix}.experts.down_proj" in changes
            stacked_b = b.permute(1, 2, 0).flatten(1)
            yield f"{prefix}.experts{'.base_layer' if inner else ''}", a.flatten(0, 1), stacked_b


def _settings(model: Transformer, changes: Mapping[str, LowRank], base: str, *, separate: bool) -> dict[str, Any]:
    """adapter_config.json for ``changes``, those of MTP modules left out: other code has no place for them."""
    layers = model.config.num_hidden_layers
    main = [name for name in changes if int(name.split(".")[2]) < layers]
    known = [name for name in matrices(model) if int(name.split(".")[2]) < layers]
    layout = _layout(model.config)
    modules, parameters = list[str](), list[str]()
    for what in dict.fromkeys(map(kind, main)):
        whole = [name for name in known if kind(name) == what]
        ours = [name for name in main if kind(name) == what]
        stacked = ".experts." in what
        end = ".weight" if layout not in ("deepseek", "llama") and _MLP.search(what) and not stacked else ""
        names = [f"{name}{end}" for name in ([what] if ours == whole else ours)]
        if stacked and separate:
            halves = "(gate|up)_proj" if what.endswith("gate_up_proj") else "down_proj"
            modules += [re.escape(name.rpartition(".")[0]) + rf"\.\d+\.{halves}" for name in names]
        elif stacked or end:
            parameters += names
        else:
            modules += [re.escape(name) if separate else name for name in names]
    first = next(iter(changes.values()))
    odd = {name: c for name, c in changes.items() if (c.rank, c.alpha) != (first.rank, first.alpha)}
    pattern = {name: _pattern(name, separate) for name in odd}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "use_rslora": first.rslora,
        "rank_pattern": {pattern[name]: change.rank for name, change in odd.items()},
        "alpha_pattern": {pattern[name]: change.alpha for name, change in odd.items()},
        # A regular expression where experts are modules, else there would be one name for each.
        "target_modules": rf"(.*\.)?({'|'.join(modules)})" if separate else modules,
        "target_parameters": parameters or None,
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "inference_mode": True,
        "revision": None,
    }


def _pattern(name: str, separate: bool) -> str:
    prefix, experts, which = name.rpartition(".experts.")
    if not experts or not separate:
        return re.escape(name) + ("" if experts else r"(\.weight)?")
    return re.escape(f"{prefix}.experts.") + r"\d+\." + ("down_proj" if which == "down_proj" else "(gate|up)_proj")


def _paired(tensors: Mapping[str, Tensor], path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.match(key)
        if not match:
            raise UserError(f"{path}: {key}: not a tensor of LoRA (….lora_A.weight, ….lora_B.weight); not supported")
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise UserError(f"{path}: {key}: {tensor.dtype} or not finite; expected finite floating-point numbers")
        found.setdefault(match[1], {})[match[2]] = tensor
    if not found:
        raise UserError(f"{path}: holds no tensors")
    for name, pair in found.items():
        if len(pair) < 2:
            raise UserError(f"{path}: {name}: lora_{'A' if 'B' in pair else 'B'} is missing")
    return {name: (pair["A"], pair["B"]) for name, pair in found.items()}


def _described(config: ModelConfig) -> dict[str, Any]:
    """What of ``config`` says what is computed."""
    dumped: dict[str, Any] = config.model_dump(mode="json", exclude=_ELSEWHERE)
    return dumped


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in data.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable JSON file ({' '.join(str(error).split())})") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a mapping")
    return data
