"""What the benchmarks share: how fast the machine is, what it is, and how noisy figures are told.

    python benchmarks/machine.py

prints what the machine reaches: matrix products in BF16 and FP32, memory read and copied, with torch's threads.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from abyssal.training.hardware import describe, has_bfloat16, resolve_device

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of some figures."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g}–{self.high:.3g})"


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of ``values``; of one value, that three times."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else list(values) * 3
    return Spread(middle, low, high)


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """How many times as long ``theirs`` took, round by round: on a noisy machine what ran side by side is compared."""
    return spread([t / o for o, t in zip(ours, theirs, strict=True)])


def synchronize(device: torch.device) -> None:
    """Waits until ``device`` has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], object], device: torch.device = CPU) -> float:
    """Seconds that ``call`` takes, until the device has finished."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def _best(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """The shortest of the times that ``call`` takes within ``seconds``; the first two warm up."""
    for _ in range(2):
        timed(call, device)
    best, until = timed(call, device), time.perf_counter() + seconds
    while time.perf_counter() < until:
        best = min(best, timed(call, device))
    return best


def gemm_rate(dtype: torch.dtype, size: int = 2048, device: torch.device = CPU, seconds: float = 1.0) -> float:
    """FLOP/s of a product of ``size`` × ``size`` matrices, the best of a second's."""
    a, b, out = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
    return 2 * size**3 / _best(lambda: torch.mm(a, b, out=out), device, seconds)


def bandwidth(device: torch.device = CPU, nbytes: int = 2**28, seconds: float = 1.0) -> dict[str, float]:
    """Bytes/s of memory, the best of a second's: ``read`` by a sum, ``copy`` counting what is read and what is written.

    ``nbytes`` must be several times what the caches hold.
    """
    x = torch.ones(nbytes // 4, device=device)
    y = torch.empty_like(x)
    read = nbytes / _best(lambda: x.sum(), device, seconds)
    return {"read": read, "copy": 2 * nbytes / _best(lambda: y.copy_(x), device, seconds)}


def describe_machine(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The machine, versions, threads, dtype, and the commit ("+" where files differ from it)."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    changed = "+" if git("status", "--porcelain", "--untracked-files=no") else ""
    return {**describe(device, dtype), "commit": git("rev-parse", "--short", "HEAD") + changed}


def measure_machine(device: torch.device = CPU, size: int = 2048) -> dict[str, float]:
    """GFLOP/s of BF16 and FP32 products and GB/s of memory, measured now."""
    rates = {f"gemm_{name}_gflops": gemm_rate(getattr(torch, name), size, device) for name in ("bfloat16", "float32")}
    moved = {f"memory_{name}_gb": value for name, value in bandwidth(device).items()}
    return {name: value / 1e9 for name, value in (rates | moved).items()}


def peak_memory(function: Callable[..., object], *arguments: object) -> dict[str, float]:
    """What ``function(*arguments)`` takes in a process of its own: ``host``, bytes of unique set size (what would be
    freed if the process ended) at the peak, sampled, less what the process had before the call; ``device``, bytes of
    GPU memory that tensors held at most; ``seconds``.

    ``function`` is one of a module's own, found there by name; importing that module counts as before.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak, torch.get_num_threads(), function, arguments).result()


def _peak(threads: int, function: Callable[..., object], arguments: tuple[object, ...]) -> dict[str, float]:
    import psutil

    torch.set_num_threads(threads)
    process, ended = psutil.Process(), threading.Event()
    before = peak = process.memory_full_info().uss

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.02):
            peak = max(peak, process.memory_full_info().uss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    start = time.perf_counter()
    result = function(*arguments)  # held until the last look
    seconds = time.perf_counter() - start
    ended.set()
    watcher.join()
    peak = max(peak, process.memory_full_info().uss)
    del result
    device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {"host": peak - before, "device": device, "seconds": seconds}


def markdown(rows: Sequence[Sequence[object]], *columns: str) -> str:
    """A table, the first column to the left, the others to the right."""
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def as_json(value: object) -> object:
    """For json.dumps(default=…): a Spread as a mapping."""
    if isinstance(value, Spread):
        return asdict(value)
    raise TypeError(f"{value!r} has no JSON form")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    device = resolve_device(options.device, "--device")
    dtype = torch.bfloat16 if has_bfloat16(device) else torch.float32
    for name, value in describe_machine(device, dtype).items():
        print(f"{name}: {value}")
    for name, value in measure_machine(device, options.size).items():
        print(f"{name}: {value:,.1f}")


if __name__ == "__main__":
    main()
