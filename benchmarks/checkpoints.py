"""Loading, converting and exporting a checkpoint of many shards: memory at its peak, and time beside transformers.

python benchmarks/checkpoints.py [--size 4e9] [--rounds 5] [--folder DIR]

A checkpoint of V3's architecture with random weights is written first (BF16, shards of a tenth of its size). Every
measurement is a process of its own. Memory is the peak of the unique set size (what would be freed if the process
ended, mapped pages of files that only it uses included), sampled, less what the process had before the call. Times are
medians over rounds, both sides in turn, files in the page cache, memory not sampled.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODEL = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "max_position_embeddings": 4096,
    "attention": {
        "kind": "mla",
        "num_attention_heads": 16,
        "q_lora_rank": 768,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
    },
    "moe": {
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 704,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
    },
}


def write_checkpoint(folder: Path, size: float) -> tuple[int, int]:
    """Random weights, a tensor at a time; bytes in all and of the largest shard."""
    import torch

    from abyssal.checkpoint.folder import config_to_json
    from abyssal.checkpoint.names import disk_tensors
    from abyssal.checkpoint.writer import Entry, file_names, split, write_index, write_shard
    from abyssal.config import resolve_model
    from abyssal.model import Transformer

    layers = max(2, round((size - 0.35e9) / 0.6e9))
    config = resolve_model({**MODEL, "num_hidden_layers": layers})
    with torch.device("meta"):
        model = Transformer(config).to(torch.bfloat16)
    entries = [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in disk_tensors(model)]
    total = sum(entry.nbytes for entry in entries)
    shards = split([[entry] for entry in entries], total // 10)
    noise = torch.empty(2**20).normal_(std=0.02, generator=torch.Generator().manual_seed(0))

    def tensor(entry: Entry) -> torch.Tensor:
        count = torch.Size(entry.shape).numel()
        return noise.to(entry.dtype).repeat(-(-count // len(noise)))[:count].view(entry.shape)

    files = dict(zip(file_names(len(shards)), shards, strict=True))
    for file, shard in files.items():
        write_shard(folder / file, shard, ((entry.name, tensor(entry)) for entry in shard))
    write_index(folder, files)
    (folder / "config.json").write_text(config_to_json(config, torch.bfloat16))
    return total, max(sum(entry.nbytes for entry in shard) for shard in shards)


CALLS = {
    "load": "from abyssal import load as f; call = lambda: f(SRC)",
    "load, 2 threads": "from abyssal import load as f; call = lambda: f(SRC, threads=2)",
    "load as FP32": "from abyssal import load as f; call = lambda: f(SRC, dtype=torch.float32)",
    "transformers": (
        "from transformers import AutoModelForCausalLM as M; "
        "call = lambda: M.from_pretrained(SRC, dtype=torch.bfloat16)"
    ),
    "convert to FP8": "from abyssal.checkpoint.convert import convert as f; call = lambda: f(SRC, DST, FP8)",
    "convert to BF16": "from abyssal.checkpoint.convert import convert as f; call = lambda: f(SRC, DST, BF16)",
    "load, FP8 to BF16": "from abyssal import load as f; call = lambda: f(SRC)",
    "load, FP8 kept": "from abyssal import load as f; call = lambda: f(SRC, weights='fp8')",
    "export": "from abyssal import export as f; call = lambda: f(SRC, DST, shard_size=SHARD)",
}
PROGRAM = """
import json, os, sys, threading, time, psutil, torch
from pathlib import Path
SRC, DST, SHARD, sample = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "sample"
FP8, BF16 = torch.float8_e4m3fn, torch.bfloat16
{call}
process, peak, ended = psutil.Process(), [0], threading.Event()
def watch():
    while not ended.wait(0.02):
        peak[0] = max(peak[0], process.memory_full_info().uss)
before = process.memory_full_info().uss
if sample: threading.Thread(target=watch, daemon=True).start()
start = time.perf_counter()
result = call()
seconds = time.perf_counter() - start
ended.set()
print(json.dumps(dict(seconds=seconds, peak=max(peak[0], process.memory_full_info().uss) - before)))
"""


def measure(name: str, source: Path, target: Path, shard: int, *, sample: bool) -> dict[str, float]:
    """One call in a process of its own."""
    shutil.rmtree(target, ignore_errors=True)
    program = PROGRAM.format(call=CALLS[name])
    command = [sys.executable, "-W", "ignore", "-c", program, str(source), str(target), str(shard)]
    out = subprocess.run([*command, "sample" if sample else "time"], capture_output=True, text=True)
    if out.returncode:
        raise SystemExit(f"{name}: {out.stderr[-2000:]}")
    return json.loads(out.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=float, default=4e9)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; by default a temporary folder")
    options = parser.parse_args()
    import torch
    import transformers

    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder, target, fp8 = Path(name) / "bf16", Path(name) / "out", Path(name) / "fp8"
        folder.mkdir()
        total, shard = write_checkpoint(folder, options.size)
        print(
            f"{total / 1e9:.2f} GB in {len(list(folder.glob('*.safetensors')))} shards, at most {shard / 1e6:.0f} MB; "
            f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, "
            f"transformers {transformers.__version__}"
        )
        print("\n| call | peak, MB | model, MB | above it, MB | in shards |\n| --- | ---: | ---: | ---: | ---: |")
        on_disk = {"bf16": total}
        for call, source, model in (
            ("load", folder, total),
            ("load, 2 threads", folder, total),
            ("load as FP32", folder, 2 * total),
            ("transformers", folder, total),
            ("convert to FP8", folder, 0),
            ("load, FP8 to BF16", fp8, total),
            ("load, FP8 kept", fp8, None),
            ("convert to BF16", fp8, 0),
            ("export", folder, 0),
        ):
            peak = measure(call, source, target, shard, sample=True)["peak"]
            if call == "convert to FP8":
                os.rename(target, fp8)
                on_disk["fp8"] = sum(p.stat().st_size for p in fp8.glob("*.safetensors"))
            model = on_disk["fp8"] if model is None else model
            above = peak - model
            print(
                f"| {call} | {peak / 1e6:.0f} | {model / 1e6:.0f} | {above / 1e6:.0f} | {above / shard:.2f} |",
                flush=True,
            )
        times: dict[str, list[float]] = {"load": [], "load, 2 threads": [], "transformers": []}
        for _ in range(options.rounds):
            for call, seconds in times.items():
                seconds.append(measure(call, folder, target, shard, sample=False)["seconds"])
        print("\n| loading, BF16 | seconds (median) | quartiles | transformers / this |\n| --- | ---: | ---: | ---: |")
        for call, seconds in times.items():
            low, middle, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
            ratio = statistics.median(t / s for t, s in zip(times["transformers"], seconds, strict=True))
            print(f"| {call} | {middle:.2f} | {low:.2f}–{high:.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    start = time.perf_counter()
    main()
    print(f"\n{time.perf_counter() - start:.0f} s in all")
