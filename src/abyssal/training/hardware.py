"""Where to compute and in which precision: resolved once, at the start of a run, and recorded in it."""

from __future__ import annotations

import os
import platform

import torch

from abyssal.errors import UserError


def resolve_device(name: str, field: str = "training.device") -> torch.device:
    """``auto`` (a GPU where there is one), or any device that torch knows. Raises UserError, naming ``field``, where
    it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # the meta device takes tensors, but has no numbers in them
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{field}: {name!r} cannot be used here ({reason})") from None
    return device


def has_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies in BF16: a CPU with AMX or AVX512-BF16, a GPU from Ampere on."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    # torch.cpu's own probes have no public name yet and moved between releases; a missing one means "no".
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto``, ``float32`` or ``bfloat16`` as the dtype matrix products run in."""
    if name == "auto":
        return torch.bfloat16 if has_bfloat16(device) else torch.float32
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def describe(device: torch.device, dtype: torch.dtype) -> dict[str, object]:
    """What a run's figures depend on: device, dtype, threads, versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "device": str(device),
        "device_name": name,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Matrix products in ``dtype`` inside this context; nothing changes for FP32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def process_memory() -> int:
    """Bytes of memory that this process holds now (Linux), or has held at most (elsewhere)."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import resource  # not on every system, and only needed where /proc is missing

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def device_memory(device: torch.device) -> int | None:
    """Bytes of GPU memory that tensors have held at most so far; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
