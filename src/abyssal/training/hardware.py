"""Where to compute and in which precision: resolved once, at the start of a run, and recorded in it."""

from __future__ import annotations

import importlib.util
import math
import os
import platform
import shutil
from itertools import accumulate
from pathlib import Path

import torch

from abyssal.errors import UserError

_AMD = "AuthenticAMD"
_NARROW = 32  # hidden_size below which FP32 is faster on a CPU (benchmarks/precision.py)


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
    """Whether the hardware is faster in BF16: a CPU with AMX, AMD's with AVX512-BF16, a GPU from Ampere on.

    Intel's AVX512-BF16 alone is not enough: steps then take 1.1 to 1.4 times as long as in FP32. On AMD's Zen 4 they
    take 0.4 to 0.7 of it (docs/performance.md).
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    return _probe("_is_amx_tile_supported") or (_probe("_is_avx512_bf16_supported") and _cpu("vendor_id") == _AMD)


def _probe(name: str) -> bool:
    """What torch found about the processor. Its probes have no public names yet, and move between releases: a missing
    one means "no"."""
    return bool(getattr(torch.cpu, name, lambda: False)())


def resolve_dtype(name: str, device: torch.device, hidden_size: int | None = None) -> torch.dtype:
    """``auto``, ``float32`` or ``bfloat16`` as the dtype matrix products run in. ``auto`` is BF16 where the hardware
    multiplies in it and, on a CPU, the model's width is worth it."""
    if name != "auto":
        return torch.bfloat16 if name == "bfloat16" else torch.float32
    narrow = device.type == "cpu" and hidden_size is not None and hidden_size < _NARROW
    return torch.bfloat16 if has_bfloat16(device) and not narrow else torch.float32


def check_compiler(device: torch.device, field: str = "training.compile") -> None:
    """Raises UserError, naming ``field``, where torch.compile has nothing to compile with."""
    if device.type == "cpu":
        there, needed = any(map(shutil.which, ("c++", "g++", "clang++"))), "a C++ compiler"
    else:
        there, needed = importlib.util.find_spec("triton") is not None, "triton"
    if not there:
        raise UserError(f"{field}: true needs {needed}, and none is installed here; leave it false or install it")


def describe(device: torch.device, dtype: torch.dtype) -> dict[str, object]:
    """What a run's figures depend on: device, dtype, threads, versions."""
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else _cpu("model name") or platform.processor() or platform.machine()
    )
    return {
        "device": str(device),
        "device_name": name,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "cores": _cores(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def _cpu(field: str) -> str | None:
    """What Linux says of the first processor."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith(field))
    except (OSError, StopIteration):
        return None


def suitable_threads(root: Path = Path("/")) -> int:
    """Threads that this process can run at once: the cores it may use, or the container's CPU quota where that is less
    (rounded up). OMP_NUM_THREADS, where set, has the last word.

    torch counts the machine's cores. In a container with a quota its threads then use up in a moment what is meant for
    the whole period, and stand still for the rest of it. ``root`` is where /proc and /sys are looked for.
    """
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if wanted.isdecimal() and int(wanted) > 0:
        return int(wanted)
    quotas = [math.ceil(quota) for group in _cgroups(root) if (quota := _quota(group)) is not None]
    return min([_cores(), *quotas])


def limit_threads() -> None:
    """Gives torch no more threads than are suitable here; fewer stay fewer."""
    torch.set_num_threads(min(torch.get_num_threads(), suitable_threads()))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cgroups(root: Path) -> list[Path]:
    """Folders of this process's CPU control groups, v2 and v1, the groups above them included: each may set a quota.

    In a container /proc may name the group as the host sees it, while the container sees it as the root of what is
    mounted; a folder that is not there has no quota.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found: list[Path] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mounted = root / "sys/fs/cgroup" / ("cpu" if controllers else "")  # v2 names no controllers here
        found += accumulate(Path(path.lstrip("/")).parts, lambda folder, part: folder / part, initial=mounted)
    return found


def _quota(group: Path) -> float | None:
    """CPUs that a control group may use; None: as many as there are."""
    try:
        if (group / "cpu.max").is_file():
            quota, period = (group / "cpu.max").read_text(encoding="ascii").split()  # v2: "max 100000" is no quota
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text(encoding="ascii") for name in ("quota", "period"))
        cpus = int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None
    return cpus if cpus > 0 else None  # v1: -1 is no quota


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
