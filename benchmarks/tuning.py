"""A LoRA step beside PEFT + transformers: same weights, same rows of GSM8K, same rank, in turn in one process.

    python benchmarks/tuning.py [--data gsm8k_train.jsonl.gz] [--targets attention all] [--rank 8] [--rounds 7]
        [--memory] [--json FILE]

The model is shape S of benchmarks/training.py (V3's architecture, 106M parameters), its tokenizer a byte-level BPE of
the data. Rows are packed; ours keeps attention within each example, theirs sees the row as one text, as people pack
with PEFT. Both learn the answers only, and begin with the same adapter. Frozen weights are BF16. PEFT runs in two ways:
as its defaults have it (FP32 adapters under BF16 autocast), and with adapters in BF16 and no autocast. transformers
runs grouped_mm experts and SDPA. ``--memory`` takes the peak of some steps of each side, in processes of their own,
less what the process held before.
"""

from __future__ import annotations

import argparse
import gzip
import json
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from machine import as_json, describe_machine, markdown, paired_ratio, peak_memory, spread

from abyssal.checkpoint.adapter import write_adapter
from abyssal.config import ModelConfig, to_published
from abyssal.data.examples import ExampleConfig, read_examples
from abyssal.data.loader import Batch
from abyssal.data.packing import PackedLoader
from abyssal.data.tokenizer import train_bpe
from abyssal.model import Transformer
from abyssal.model.adapting import add_lora
from abyssal.training.hardware import limit_threads
from abyssal.training.recipe import BalanceConfig, OptimizerConfig
from abyssal.training.step import TrainingStep
from training import SHAPES

CPU = torch.device("cpu")
ATTENTION = ["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
BATCH, LENGTH = 8, 256
DATA = Path("../shared/data/gsm8k_train.jsonl.gz")


def config() -> ModelConfig:
    return ModelConfig.model_validate(SHAPES["S"][0])


def model(dtype: torch.dtype = torch.bfloat16) -> Transformer:
    return Transformer(config(), generator=torch.Generator().manual_seed(0)).to(dtype)


@cache
def rows(data: Path, count: int) -> list[Batch]:
    """Batches of packed examples."""
    fields = {"prompt": "question", "completion": "answer"}
    settings = ExampleConfig(source=str(data), format="completion", fields=fields, validation_fraction=0.0)
    with gzip.open(data, "rt", encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    texts = (record[key] for record in records[:3000] for key in ("question", "answer"))
    tokenizer = train_bpe(texts, config().vocab_size)
    train, _, _ = read_examples(settings, tokenizer, LENGTH)
    loader = PackedLoader(train, batch_size=BATCH, sequence_length=LENGTH, lookahead=1, seed=0)
    return [loader.next() for _ in range(count)]


def adapted(targets: str, rank: int) -> Transformer:
    """The model with adapters, the same for both sides."""
    network, generator = model(), torch.Generator().manual_seed(1)
    add_lora(network, ATTENTION if targets == "attention" else ["all"], rank, 2.0 * rank, generator=generator)
    return network


class Ours:
    """The trainer's own step."""

    def __init__(self, targets: str, rank: int) -> None:
        self.step = TrainingStep(
            adapted(targets, rank).train(),
            optimizer=OptimizerConfig(lr=1e-4, weight_decay=0.0),
            balance=BalanceConfig(),
            clip=1.0,
            mtp_weight=0.0,
            dtype=torch.bfloat16,
            device=CPU,
        )

    def __call__(self, batch: Batch) -> float:
        return self.step([batch], LENGTH, 1e-4, 0.0).loss


class Theirs:
    """PEFT on transformers' V3 with the same weights."""

    def __init__(self, targets: str, rank: int, pure: bool = False) -> None:
        import transformers
        from peft import PeftModel

        transformers.logging.set_verbosity_error()
        theirs = transformers.DeepseekV3Config.from_dict(to_published(config()))
        theirs._experts_implementation = "grouped_mm"
        network = transformers.DeepseekV3ForCausalLM(theirs).to(torch.bfloat16)
        network.load_state_dict(model().state_dict(), strict=False)
        # Our adapter says which tensors are adapted: by modules' names PEFT leaves V3's dense and shared MLPs out.
        with tempfile.TemporaryDirectory() as folder:
            write_adapter(Path(folder), adapted(targets, rank), base="base")
            self.model = PeftModel.from_pretrained(
                network, folder, is_trainable=True, autocast_adapter_dtype=not pure
            ).train()
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, weight_decay=0.0, fused=True)
        self.pure = pure

    def __call__(self, batch: Batch) -> float:
        assert batch.learned is not None
        labels = batch.tokens.masked_fill(~batch.learned, -100)[:, : LENGTH + 1]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not self.pure):
            out = self.model(input_ids=batch.tokens[:, : LENGTH + 1], labels=labels, use_cache=False)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return out.loss.item()


SIDES: dict[str, Callable[[str, int], Callable[[Batch], float]]] = {
    "abyssal": Ours,
    "PEFT": Theirs,
    "PEFT, BF16 adapters": lambda targets, rank: Theirs(targets, rank, pure=True),
}


def some_steps(side: str, targets: str, rank: int, data: Path) -> Callable[[Batch], float]:
    """For ``--memory``: what it returns is what must stay alive."""
    step = SIDES[side](targets, rank)
    for batch in rows(data, 3):
        step(batch)
    return step


def nothing(data: Path) -> list[Batch]:
    """What each side's process holds before the model: libraries and data."""
    import peft  # noqa: F401
    import transformers  # noqa: F401

    return rows(data, 3)


def compare(targets: str, rank: int, rounds: int, data: Path, memory: bool) -> dict[str, Any]:
    """Steps of all sides in turn."""
    steps = {side: build(targets, rank) for side, build in SIDES.items()}
    times: dict[str, list[float]] = {side: [] for side in steps}
    losses: dict[str, float] = {}
    for i, batch in enumerate(rows(data, rounds + 2)):
        for side, step in steps.items():
            start = time.perf_counter()
            loss = step(batch)
            seconds = time.perf_counter() - start
            losses.setdefault(side, loss)
            if i >= 2:  # the first two warm up
                times[side].append(seconds)
    del steps
    peaks = {}
    if memory:
        before = peak_memory(nothing, data)["host"]
        peaks = {side: peak_memory(some_steps, side, targets, rank, data)["host"] - before for side in SIDES}
    return {
        "targets": targets,
        "rank": rank,
        "seconds": {side: spread(values) for side, values in times.items()},
        "ratio": {side: paired_ratio(times["abyssal"], values) for side, values in times.items() if side != "abyssal"},
        "first_loss": losses,
        "peak_bytes": peaks,
        "times": times,
    }


def table(results: list[dict[str, Any]]) -> str:
    lines = []
    for result in results:
        for side, seconds in result["seconds"].items():
            ratio, peaks = result["ratio"].get(side), result["peak_bytes"]
            lines.append(
                [
                    f"{result['targets']}, {side}",
                    f"{seconds.median:.2f} ({seconds.low:.2f}–{seconds.high:.2f})",
                    "" if ratio is None else f"{ratio.median:.2f} ({ratio.low:.2f}–{ratio.high:.2f})",
                    f"{peaks[side] / 1e9:.2f}" if peaks else "",
                    f"{peaks['abyssal'] / peaks[side]:.2f}" if peaks and side != "abyssal" else "",
                ]
            )
    head = "targets, side", "s a step (quartiles)", "abyssal is … times as fast", "peak, GB", "abyssal's share of it"
    return markdown(lines, *head)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--targets", nargs="+", default=["attention", "all"], choices=["attention", "all"])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    limit_threads()
    import peft
    import transformers

    versions = {"transformers": transformers.__version__, "peft": peft.__version__}
    machine = describe_machine(CPU, torch.bfloat16) | versions
    print(", ".join(f"{key} {value}" for key, value in machine.items()) + "\n", flush=True)
    results = []
    for targets in options.targets:
        result = compare(targets, options.rank, options.rounds, options.data, options.memory)
        results.append(result)
        losses = ", ".join(f"{side} {loss:.4f}" for side, loss in result["first_loss"].items())
        print(f"{targets}, rank {options.rank}: first losses {losses}", flush=True)
    print("\n" + table(results))
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "results": results}, indent=2, default=as_json))


if __name__ == "__main__":
    main()
