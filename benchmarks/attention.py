"""MLA beside MHA of the same width: cached bytes a token, decoding at long context, peak memory.

Both models have V2-Lite's shape (hidden 2048, 16 heads, dense MLP of 10944; MLA: kv_lora_rank 512, nope/rope/v
128/64/128, MHA: 16 heads of 128) with fewer layers, a dense MLP in each and a small vocabulary, since experts and head
are the same on both sides. Times are taken in turn in one process; peak memory in a process for each side.

    python benchmarks/attention.py [--layers 4] [--context 4096] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from abyssal.config import ModelConfig, preset
from abyssal.model import Cache, Transformer
from abyssal.training.hardware import describe


def config(kind: str, layers: int, context: int) -> ModelConfig:
    lite = preset("deepseek-v2-lite")
    common = {"num_hidden_layers": layers, "vocab_size": 8192, "max_position_embeddings": context + 64}
    native = lite.model_dump() | common | {"moe": None, "published": {}, "bos_token_id": None, "eos_token_id": None}
    if kind == "mha":
        native["attention"] = {"kind": "mha", "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 128}
        native["rope"] = {"layout": "halves"}
    return ModelConfig.model_validate(native)


class Side:
    """One model with a cache filled up to the context, ready to decode."""

    def __init__(self, kind: str, layers: int, context: int, batch: int) -> None:
        self.config = config(kind, layers, context)
        generator = torch.Generator().manual_seed(0)
        with torch.device("meta"):  # so that no FP32 copy of the weights counts as peak memory
            self.model = Transformer(self.config).to(torch.bfloat16).eval()
        self.model.to_empty(device="cpu").initialize(generator)
        self.cache = Cache(self.config, batch, context + 64, dtype=torch.bfloat16)
        for layer in self.cache.layers:
            for tensor in layer.tensors:
                tensor.normal_(generator=generator)
        self.cache.length = self.context = context
        self.token = torch.zeros(batch, 1, dtype=torch.long)

    @torch.inference_mode()
    def decode(self) -> float:
        """Seconds that one new token for each sequence takes."""
        self.cache.length = self.context
        start = time.perf_counter()
        self.model(self.token, cache=self.cache)
        return time.perf_counter() - start


def measure(layers: int, context: int, batch: int, rounds: int) -> dict[str, object]:
    sides = {kind: Side(kind, layers, context, batch) for kind in ("mla", "mha")}
    times: dict[str, list[float]] = {kind: [] for kind in sides}
    for i in range(rounds + 2):
        for kind, side in sides.items():
            seconds = side.decode()
            if i >= 2:  # the first two warm up
                times[kind].append(seconds)
    ratios = [mha / mla for mla, mha in zip(times["mla"], times["mha"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    slots = batch * (context + 64)
    return {
        "batch": batch,
        "cached_bytes_a_token": {kind: side.cache.nbytes / slots for kind, side in sides.items()},
        "milliseconds": {kind: 1e3 * statistics.median(values) for kind, values in times.items()},
        "ratio": middle,
        "ratio_quartiles": [low, high],
    }


def peak_memory(kind: str, layers: int, context: int, batch: int) -> int:
    """Peak resident bytes of a process that builds one side and decodes one step."""
    arguments = [sys.executable, __file__, "--child", kind, "--layers", str(layers), "--context", str(context)]
    done = subprocess.run([*arguments, "--batch", str(batch)], check=True, capture_output=True, text=True)
    return int(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", choices=["mla", "mha"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        Side(args.child, args.layers, args.context, args.batch[0]).decode()
        # Not getrusage: its maximum survives exec, so a child would report its parent's.
        status = Path("/proc/self/status").read_text(encoding="ascii")
        print(next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")))
        return
    machine = describe(torch.device("cpu"), torch.bfloat16)
    print(" ".join(f"{key}={value}" for key, value in machine.items()))
    rows = []
    for batch in args.batch:
        row = measure(args.layers, args.context, batch, args.rounds)
        row["peak_bytes"] = {k: peak_memory(k, args.layers, args.context, batch) for k in ("mla", "mha")}
        rows.append(row)
        cached, ms, peak = row["cached_bytes_a_token"], row["milliseconds"], row["peak_bytes"]
        print(
            f"\nbatch {batch}, context {args.context}, {args.layers} layers, BF16          MLA        MHA   MHA / MLA"
        )
        for name, values, scale, digits in (
            ("cached bytes a token (storage)", cached, 1, 0),
            ("decoding, ms a step (median)", ms, 1, 1),
            ("peak memory, MB", peak, 1e-6, 0),
        ):
            mla, mha = values["mla"] * scale, values["mha"] * scale
            ratio = row["ratio"] if values is ms else mha / mla
            print(f"{name:<46}{mla:>11,.{digits}f}{mha:>11,.{digits}f}{ratio:>11.2f}")
        low, high = row["ratio_quartiles"]
        print(f"{'quartiles of the paired decoding ratios':<46}{low:>22.2f}{high:>11.2f}")
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
