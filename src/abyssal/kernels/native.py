"""The hot operations on a CPU, compiled from ``native*.cpp`` at first use (some seconds, then cached).

Nothing depends on it: without a C++ compiler, or with ABYSSAL_NATIVE=0, every operation runs as plain PyTorch. These
functions take and return tensors and know no gradients; the files beside this one join them to autograd, and
:func:`supports` tells them when they may. The library uses the OpenMP threads that PyTorch has, as many as
``torch.get_num_threads()`` says.

Shapes: P rows in expert order, N tokens, K experts a token, D hidden, F expert width, B batch, T time, H heads.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import struct
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from abyssal.kernels.tape import NotOnTape, Tape, recording

_NAMES = ("native.cpp", "native_amx.cpp", "native_decode.cpp", "native_pack.cpp", "native_step.cpp")
_SOURCES = [Path(__file__).with_name(name) for name in _NAMES]
_HEADERS = [Path(__file__).with_name("native_tape.h")]
# Sums may be reordered where the source says so (omp simd); NaN and infinity keep their meaning everywhere.
_FLAGS = "-O3 -march=native -std=c++17 -shared -fPIC -fopenmp -fno-math-errno -fno-trapping-math".split()
_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "n": ctypes.c_int, "f": ctypes.c_float}
_SIGNATURES = {
    "expert_counts": "pip",
    "expert_places": "pippp",
    "grouped_product": "npppp" + "iiin",
    "swiglu": "pppiin",
    "swiglu_backward": "pppppiin",
    "gather_rows": "ppipiin",
    "sum_rows": "ppipiin",
    "cross_entropy": "ppipiin",
    "causal_softmax": "pfippiiin",
    "causal_softmax_backward": "ppfippiiin",
    "turn_heads": "pppppn",
    "keys_values": "ppppp",
    "keys_values_backward": "ppppp",
    "sum_of_squares": "pipn",
    "rms_norm": "ppfppiin",
    "rms_norm_backward": "ppppppiin",
    "adamw": "pppppipn",
    "linear": "pppin",
    "experts": "pppppiin",
    "pack": "piippn",
    "unpack": "ppiipn",
    "absorb": "pppiiiiiin",
    "expand": "pppiiiiin",
    "latent_attention": "pppppp" + "iiiiiiii" + "fn",
    "paged_attention": "pppppp" + "iiiiiiii" + "fn",
    "add": "pppii",
    "join": "pppii",
    "norm": "ppfpii",
    "route": "pppppppin",
    "write_latents": "ppfppppiiiinn",
    "write_rows": "pppiii",
}
# These return 1 for a number that is out of bounds.
_REFUSES = ("experts", "latent_attention", "paged_attention", "write_latents", "write_rows")
_SUFFIX = {torch.float32: "f", torch.bfloat16: "b"}


def supports(*tensors: Tensor) -> bool:
    """Whether the functions here take these tensors: on a CPU, FP32 or BF16, and the library could be made."""
    return (
        not torch.compiler.is_compiling()
        and all(
            type(x) in (Tensor, torch.nn.Parameter) and x.device.type == "cpu" and x.dtype in _SUFFIX for x in tensors
        )
        and library() is not None
    )


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled library; None where it is switched off or cannot be made."""
    compiler = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    wanted = os.environ.get("ABYSSAL_NATIVE") != "0" and sys.platform == "linux"
    if wanted and compiler is None:
        logging.getLogger(__name__).warning(
            "no C++ compiler found (c++, g++ or clang++): going on in plain PyTorch, slower; "
            "ABYSSAL_NATIVE=0 stops this line"
        )
    if not wanted or compiler is None or not all(path.is_file() for path in (*_SOURCES, *_HEADERS)):
        return None
    try:
        with tempfile.TemporaryDirectory(prefix="abyssal-") as spare:
            return ctypes.CDLL(str(_build(compiler, Path(spare))))
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        warnings.warn(
            f"abyssal's CPU kernels could not be compiled with {compiler} ({reason[-1] if reason else error}); "
            "going on in plain PyTorch, slower; ABYSSAL_NATIVE=0 stops this warning",
            stacklevel=2,
        )
        return None


def _build(compiler: str, spare: Path) -> Path:
    """The library's file, compiled unless one of the same source, flags, compiler and processor is there. ``spare`` is
    where it goes when there is no place to keep it."""
    import fcntl

    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    sources = [path.read_text(encoding="utf-8") for path in (*_SOURCES, *_HEADERS)]
    identity = "\n".join((*sources, *_FLAGS, version, platform.machine(), _processor()))
    name = f"native-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "abyssal"
        if (folder / name).is_file():
            return folder / name
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "native.lock").open("w")
    except (OSError, RuntimeError):  # no home, or not ours to write to
        folder, lock = spare, (spare / "native.lock").open("w")
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process compiles, others wait for it
        target = folder / name
        if not target.exists():
            partial = folder / f"{name}.{os.getpid()}"
            command = [compiler, *_FLAGS, *map(str, _SOURCES), "-o", str(partial)]
            try:
                subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
                partial.rename(target)
            finally:
                partial.unlink(missing_ok=True)
        return target


def _processor() -> str:
    """What -march=native depends on."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        return "\n".join(sorted({line for line in text.splitlines() if line.startswith(("flags", "Features"))}))
    except OSError:
        return platform.processor()


# Whatever torch's default dtype and device are: what C writes to is FP32 (or what is said), on the CPU.
_CPU = torch.device("cpu")


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=_CPU)


class _Function:
    """A function of the library. While a tape is recorded, its calls go there too."""

    def __init__(self, name: str, suffix: str) -> None:
        full = f"{name}_{suffix}" if suffix else name
        self.name, self.call, self.letters = full, getattr(library(), full), _SIGNATURES[name]
        self.call.argtypes = [_TYPES[letter] for letter in self.letters]
        self.call.restype = ctypes.c_int if name in _REFUSES else None

    def __call__(self, *arguments: Any) -> Any:
        if (tape := recording()) is not None:
            self._record(tape, arguments)
        return self.call(*arguments)

    def _record(self, tape: Tape, arguments: tuple[Any, ...]) -> None:
        entry = getattr(library(), f"{self.name}_cells", None)
        if entry is None:
            raise NotOnTape(self.name)
        tape.add(ctypes.cast(entry, ctypes.c_void_p).value or 0, list(map(_cell, self.letters, arguments)))
        tape.keep(*arguments)


def _cell(letter: str, argument: Any) -> int:
    """An argument as 8 bytes."""
    if letter == "f":
        return int.from_bytes(struct.pack("<f4x", argument), "little")
    if argument is None:
        return 0
    return argument if isinstance(argument, int) else ctypes.addressof(argument._obj)  # what byref() made


def play(tape: Tape) -> None:
    """Runs a tape of the library's calls again."""
    function = library().play  # type: ignore[union-attr]
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_int64], ctypes.c_int64
    tape.play(function)


@functools.cache
def _function(name: str, suffix: str) -> _Function:
    return _Function(name, suffix)


def _call(name: str, types: tuple[torch.dtype, ...], *arguments: Any) -> None:
    function = _function(name, "".join(_SUFFIX[dtype] for dtype in types))
    function(*(x.data_ptr() if isinstance(x, Tensor) else x for x in arguments))


def expert_counts(experts: Tensor, n_experts: int) -> Tensor:
    """[E] int64: how often each expert stands in ``experts`` (int64, contiguous). Raises IndexError for one that is not
    0 to ``n_experts`` - 1."""
    if experts.numel() and not 0 <= experts.min() <= experts.max() < n_experts:
        raise IndexError(f"expert outside 0 to {n_experts - 1}")
    counts = torch.zeros(n_experts, dtype=torch.int64, device=_CPU)
    _call("expert_counts", (), experts, experts.numel(), counts)
    return counts


def expert_places(experts: Tensor, starts: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """slot [N·K] and assignment [``rows``], int32 (:class:`~abyssal.kernels.grouped.Plan` says what they are), for
    ``experts`` as above and each expert's first row ``starts`` [E] int64, which is overwritten."""
    slot = _empty(experts.numel(), dtype=torch.int32)
    assignment = torch.full((rows,), -1, dtype=torch.int32, device=_CPU)
    _call("expert_places", (), experts, experts.numel(), starts, slot, assignment)
    return slot, assignment


@functools.cache
def has_tiles() -> bool:
    """Whether the library multiplies matrices itself (``native_amx.cpp``): a processor with AMX, on Linux."""
    loaded = library()
    return loaded is not None and bool(loaded.amx_usable())


def multiplies(x: Tensor, weight: Tensor, bounds: list[int]) -> bool:
    """Whether :func:`grouped_product` takes ``x`` [P, I] and ``weight`` [E, O, I]: BF16, everything in multiples of
    32."""
    sizes = all(size % 32 == 0 for size in (*weight.shape[1:], *bounds))
    return x.dtype == weight.dtype == torch.bfloat16 and sizes and supports(x, weight) and has_tiles()


def _grouped(kind: int, left: Tensor, right: Tensor, out: Tensor, bounds: list[int], sizes: torch.Size) -> Tensor:
    left, right = left.contiguous(), right.contiguous()
    _call(
        "grouped_product",
        (),
        kind,
        left,
        right,
        out,
        torch.tensor(bounds, device=_CPU),
        *sizes,
        torch.get_num_threads(),
    )
    return out


def grouped_product(x: Tensor, weight: Tensor, bounds: list[int], onto: Tensor | None = None) -> Tensor:
    """Each expert's rows times its matrix: ``x`` [P, I], ``weight`` [E, O, I] -> [P, O]; expert e has the rows
    bounds[e] to bounds[e + 1]. Added to ``onto``, contiguous, where that is given."""
    if onto is not None:
        return _grouped(4, x, weight, onto, bounds, weight.shape)
    return _grouped(0, x, weight, x.new_empty(x.shape[0], weight.shape[1]), bounds, weight.shape)


def grouped_product_backward_x(grad: Tensor, weight: Tensor, bounds: list[int], onto: Tensor | None = None) -> Tensor:
    """``grad`` [P, O], ``weight`` [E, O, I] -> the gradient of x, [P, I]; ``onto`` as above."""
    if onto is not None:
        return _grouped(5, grad, weight, onto, bounds, weight.shape)
    return _grouped(1, grad, weight, grad.new_empty(grad.shape[0], weight.shape[2]), bounds, weight.shape)


def grouped_product_backward_weight(grad: Tensor, x: Tensor, bounds: list[int]) -> Tensor:
    """``grad`` [P, O], ``x`` [P, I] -> the gradient of the weight, [E, O, I]; zeros for experts without rows."""
    out = x.new_empty(len(bounds) - 1, grad.shape[1], x.shape[1])
    return _grouped(2, grad, x, out, bounds, out.shape)


def swiglu(gate_up: Tensor, row_weight: Tensor | None) -> Tensor:
    """silu(gate) · up · row_weight: [P, 2F], [P] FP32 -> [P, F]."""
    gate_up = gate_up.contiguous()
    row_weight = None if row_weight is None else row_weight.contiguous()
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    _call("swiglu", (out.dtype,), gate_up, row_weight, out, rows, width, torch.get_num_threads())
    return out


def swiglu_backward(grad: Tensor, gate_up: Tensor, row_weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Gradients of [P, 2F] and [P] for ``grad`` [P, F]."""
    grad, gate_up = grad.contiguous(), gate_up.contiguous()
    row_weight = None if row_weight is None else row_weight.contiguous()
    out = torch.empty_like(gate_up)
    grad_weight = torch.empty_like(row_weight) if row_weight is not None else None
    rows, width = grad.shape
    _call(
        "swiglu_backward",
        (out.dtype,),
        *(grad, gate_up, row_weight, out, grad_weight, rows, width, torch.get_num_threads()),
    )
    return out, grad_weight


def gather_rows(x: Tensor, assignment: Tensor, k: int) -> Tensor:
    """Row p is ``x``[assignment[p] // k], zeros where that is negative: [N, D], [P] int32 -> [P, D]."""
    x = x.contiguous()
    out = x.new_empty(assignment.shape[0], x.shape[1])
    _call("gather_rows", (x.dtype,), x, assignment, k, out, *out.shape, torch.get_num_threads())
    return out


def sum_rows(rows: Tensor, slot: Tensor, k: int) -> Tensor:
    """out[n] = Σ rows[slot[n·k …]], added in FP32: [P, D], [N·K] int32 -> [N, D]."""
    rows = rows.contiguous()
    out = rows.new_empty(slot.shape[0] // k, rows.shape[1])
    _call("sum_rows", (rows.dtype,), rows, slot, k, out, *out.shape, torch.get_num_threads())
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x / rms(x) · weight as ``dtype`` [N, D], and 1 / rms(x) [N] FP32; ``weight`` [D] FP32."""
    x, weight = x.contiguous(), weight.contiguous()
    out, rstd = _empty(*x.shape, dtype=dtype), _empty(x.shape[0])
    _call("rms_norm", (x.dtype, dtype), x, weight, eps, out, rstd, *x.shape, torch.get_num_threads())
    return out, rstd


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` and of ``weight`` [D] FP32."""
    grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
    threads = torch.get_num_threads()
    out = torch.empty_like(x)
    partial = torch.zeros(threads, x.shape[1], dtype=torch.float32, device=_CPU)
    _call("rms_norm_backward", (x.dtype, grad.dtype), grad, x, weight, rstd, out, partial, *x.shape, threads)
    return out, partial.sum(0)


def cross_entropy_(logits: Tensor, targets: Tensor, ignored: int) -> Tensor:
    """Σ −log softmax[target] in nats; ``logits`` [n, V] (contiguous) become its gradient. ``targets`` [n] int64.

    Raises IndexError for a target that is neither ``ignored`` nor below V.
    """
    targets = targets.to(torch.int64).contiguous()
    real = targets[targets != ignored]
    if real.numel() and not 0 <= real.min() <= real.max() < logits.shape[1]:
        raise IndexError(f"target outside 0 to {logits.shape[1] - 1}")
    nats = _empty(logits.shape[0])
    _call("cross_entropy", (logits.dtype,), logits, targets, ignored, nats, *logits.shape, torch.get_num_threads())
    return nats.sum()


def causal_softmax_(scores: Tensor, scale: float, first: int, lows: Tensor | None = None) -> Tensor:
    """``scores`` [M, t, S] (q · k, contiguous) become probabilities, where query i sees keys lows[i] … first + i;
    ``lows`` [t] int32, contiguous, 0 ≤ lows[i] ≤ first + i < S (None: from key 0 on).

    Returns the logarithm of each row's sum of exponentials, [M, t] FP32.
    """
    log_sums = _empty(*scores.shape[:2])
    sizes = (*scores.shape, torch.get_num_threads())
    _call("causal_softmax", (scores.dtype,), scores, scale, first, lows, log_sums, *sizes)
    return log_sums


def causal_softmax_backward_(
    scores: Tensor, grad: Tensor, scale: float, first: int, log_sums: Tensor, lows: Tensor | None = None
) -> None:
    """``scores`` become probabilities as above, ``grad`` (of the probabilities) becomes the gradient of q · k."""
    sizes = (*scores.shape, torch.get_num_threads())
    _call("causal_softmax_backward", (scores.dtype,), scores, grad, scale, first, lows, log_sums, *sizes)


_SMALL = 2**15  # numbers; up to here a second thread is not worth waking


class _Heads(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "length", "heads", "nope", "rope", "value", "tables")),
        *((name, ctypes.c_int32) for name in ("interleaved", "threads")),
    ]


def _heads(shape: torch.Size, nope: int, rope: int, value: int, tables: int = 1, interleaved: bool = False) -> Any:
    batch, length, heads = shape[:3]
    threads = torch.get_num_threads() if shape.numel() > _SMALL else 1
    return ctypes.byref(_Heads(batch, length, heads, nope, rope, value, tables, interleaved, threads))


def turn_heads(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, *, back: bool = False) -> Tensor:
    """[B, T, H, N + R] -> [B, H, T, N + R] with the last R turned by position; ``back``: its gradient, the other way.

    ``cos`` and ``sin`` [B or 1, T, 1, R/2] FP32.
    """
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    out = x.new_empty(x.transpose(1, 2).shape)
    rope = 2 * cos.shape[-1]
    heads = _heads((out if back else x).shape, x.shape[-1] - rope, rope, 0, cos.shape[0], interleaved)
    _call("turn_heads", (x.dtype,), x, cos, sin, out, heads, int(back))
    return out


def keys_values(kv: Tensor, rotary: Tensor, nope: int) -> tuple[Tensor, Tensor]:
    """``kv`` [B, T, H, N + V] and the rotary key of all heads [B, T, R] -> k [B, H, T, N + R], v [B, H, T, V]."""
    kv, rotary = kv.contiguous(), rotary.contiguous()
    batch, length, count, both = kv.shape
    rope, value = rotary.shape[-1], both - nope
    k = kv.new_empty(batch, count, length, nope + rope)
    v = kv.new_empty(batch, count, length, value)
    _call("keys_values", (kv.dtype,), kv, rotary, k, v, _heads(kv.shape, nope, rope, value))
    return k, v


def keys_values_backward(grad_k: Tensor, grad_v: Tensor, nope: int) -> tuple[Tensor, Tensor]:
    """Gradients of ``kv`` [B, T, H, N + V] and ``rotary`` [B, T, R]."""
    grad_k, grad_v = grad_k.contiguous(), grad_v.contiguous()
    batch, count, length, size = grad_k.shape
    value, rope = grad_v.shape[-1], size - nope
    grad_kv = grad_k.new_empty(batch, length, count, nope + value)
    grad_rotary = grad_k.new_empty(batch, length, rope)
    heads = _heads(grad_kv.shape, nope, rope, value)
    _call("keys_values_backward", (grad_k.dtype,), grad_k, grad_v, grad_kv, grad_rotary, heads)
    return grad_kv, grad_rotary


class _Adam(ctypes.Structure):
    _fields_ = [(name, ctypes.c_float) for name in "lr beta1 beta2 eps weight_decay bias1 bias2 scale".split()]


def adamw_(
    weight: Tensor,
    low: Tensor | None,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    bias1: float,
    bias2: float,
    scale: float | Tensor,
) -> None:
    """One AdamW update in place, in FP32 whatever is stored; ``scale`` multiplies the gradient (NaN or negative:
    nothing changes).

    ``weight`` FP32, or BF16 with the rest of its FP32 number in ``low`` (int16); ``m`` and ``v`` FP32 or BF16.
    """
    scale = float(scale)
    if not scale >= 0:
        return
    tensors = [x for x in (weight, low, grad, m, v) if x is not None]
    assert all(x.is_contiguous() and x.numel() == weight.numel() for x in tensors)
    assert (low is None) == (weight.dtype == torch.float32)
    assert m.dtype == v.dtype
    numbers = ctypes.byref(_Adam(lr, beta1, beta2, eps, weight_decay, bias1, bias2, scale))
    types = (weight.dtype, grad.dtype, m.dtype)
    _call("adamw", types, weight, low, grad, m, v, weight.numel(), numbers, torch.get_num_threads())


def sum_of_squares(x: Tensor) -> float:
    """Σ x², in FP64 over pieces of FP32."""
    x = x.contiguous()
    partial = _empty(torch.get_num_threads(), dtype=torch.float64)
    _call("sum_of_squares", (x.dtype,), x, x.numel(), partial, torch.get_num_threads())
    return partial.sum().item()


def pack(weight: Tensor, bits: int, data: Tensor, scales: Tensor) -> None:
    """Quantises ``weight`` [R, I], FP32 or BF16, into ``data`` and ``scales`` (:mod:`abyssal.kernels.packed`)."""
    weight = weight.contiguous()
    function = _function("pack", _SUFFIX[weight.dtype] + str(bits))
    function(weight.data_ptr(), *weight.shape, data.data_ptr(), scales.data_ptr(), torch.get_num_threads())


def unpack(data: Tensor, scales: Tensor, bits: int, out: Tensor) -> None:
    """The other way, into ``out`` [R, I], FP32 or BF16; all contiguous."""
    function = _function("unpack", _SUFFIX[out.dtype] + str(bits))
    function(data.data_ptr(), scales.data_ptr(), *out.shape, out.data_ptr(), torch.get_num_threads())


class Matrix(ctypes.Structure):
    """A matrix as ``native_decode.cpp`` has it: addresses of numbers and scales (None: it has none), rows, columns."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("data", "scales")),
        *((name, ctypes.c_int64) for name in ("rows", "columns")),
    ]


def address(structure: Any) -> int:
    """Where a structure lies, for a function that takes it."""
    return ctypes.addressof(structure)


def decoding(name: str, x: torch.dtype, kind: str) -> Any:
    """``linear`` or ``experts`` of ``native_decode.cpp`` for rows of ``x`` and matrices of ``kind``: "f" FP32, "b"
    BF16, "8" or "4" packed. A step calls them some 150 times, so kernels/decode.py does so with nothing in between:

    - linear(matrix, x, out, N, threads)
    - experts([gate_up, down, gate, up, down of the shared one], x, indices, weights, out, N, K, threads); 1: an index
      is out of bounds.
    """
    return _function(name, _SUFFIX[x] + kind)


def absorb(q: Tensor, kv_b: Tensor, nope: int, value: int) -> Tensor:
    """``q`` [N, H, nope + R], ``kv_b`` [H·(nope + value), C] -> [N, H, C + R]; contiguous, as everything below."""
    rows, heads, size = q.shape
    latent = kv_b.shape[1]
    out = q.new_empty(rows, heads, latent + size - nope)
    _function("absorb", _SUFFIX[q.dtype] + _SUFFIX[kv_b.dtype])(
        *(q.data_ptr(), kv_b.data_ptr(), out.data_ptr()),
        *(rows, heads, nope, size - nope, value, latent, torch.get_num_threads()),
    )
    return out


def expand(o: Tensor, kv_b: Tensor, nope: int, value: int) -> Tensor:
    """``o`` [N, H, C], ``kv_b`` [H·(nope + value), C] -> [N, H, value]."""
    rows, heads, latent = o.shape
    out = o.new_empty(rows, heads, value)
    _function("expand", _SUFFIX[o.dtype] + _SUFFIX[kv_b.dtype])(
        *(o.data_ptr(), kv_b.data_ptr(), out.data_ptr()),
        *(rows, heads, nope, value, latent, torch.get_num_threads()),
    )
    return out


def paged_attention(
    q: Tensor, keys: Tensor, values: Tensor | None, table: Tensor, lengths: Tensor, scale: float, width: int
) -> Tensor:
    """``q`` [N, H, d], ``keys`` [P, page, H', d], ``values`` [P, page, H', ``width``], ``table`` [N, most] and
    ``lengths`` [N] int32 -> [N, H, ``width``]. Without values, ``keys`` [P, page, d] are all heads' and their first
    ``width`` numbers the values.

    Raises IndexError for a page that is not in the pool.
    """
    sequences, heads, size = q.shape
    pages, page = keys.shape[:2]
    out = q.new_empty(sequences, heads, width)
    refused = _function("latent_attention" if values is None else "paged_attention", _SUFFIX[q.dtype])(
        *(q.data_ptr(), keys.data_ptr(), 0 if values is None else values.data_ptr()),
        *(table.data_ptr(), lengths.data_ptr(), out.data_ptr()),
        *(sequences, heads, 1 if values is None else keys.shape[2], table.shape[1], pages, page, size, width),
        *(scale, torch.get_num_threads()),
    )
    if refused:
        raise IndexError(f"a length beyond {table.shape[1]} pages of {page} tokens, or a page outside 0 to {pages - 1}")
    return out


class Router(ctypes.Structure):
    """How to choose, as ``native_step.cpp`` has it."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("hidden", "experts", "choices", "groups", "kept")),
        *((name, ctypes.c_int32) for name in ("sigmoid", "best_two", "normalized")),
        ("scale", ctypes.c_float),
    ]


def route(x: Tensor, weight: Tensor, bias: Tensor | None, router: Router) -> tuple[Tensor, Tensor, Tensor]:
    """``x`` [N, D], ``weight`` [E, D], ``bias`` [E] FP32 -> indices [N, K] int64, weights [N, K] and scores [N, E] FP32
    (:class:`abyssal.model.router.Routing` says what they are)."""
    rows = x.shape[0]
    indices = _empty(rows, router.choices, dtype=torch.int64)
    weights, scores = _empty(rows, router.choices), _empty(rows, router.experts)
    outs = (indices, weights, scores, ctypes.byref(router))
    _call("route", (x.dtype, weight.dtype), x, weight, bias, *outs, rows, torch.get_num_threads())
    return indices, weights, scores


def add(a: Tensor, b: Tensor) -> Tensor:
    """``a`` + ``b``, of one dtype; ``b`` is as long as ``a``, or as its last dimension."""
    out = torch.empty_like(a)
    _call("add", (a.dtype,), a, b, out, a.numel(), b.numel())
    return out


def join(a: Tensor, b: Tensor) -> Tensor:
    """Rows of ``a`` and ``b`` [..., W] side by side, [..., 2W]."""
    width = a.shape[-1]
    out = a.new_empty(*a.shape[:-1], 2 * width)
    _call("join", (a.dtype,), a, b, out, a.numel() // width, width)
    return out


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) · weight over the last dimension, in one thread."""
    out = torch.empty_like(x)
    width = weight.shape[0]
    _call("norm", (x.dtype, weight.dtype), x, weight, eps, out, x.numel() // width, width)
    return out


def write_latents(
    kv: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, slots: Tensor, pool: Tensor, interleaved: bool
) -> None:
    """``kv`` [N, C + R], ``weight`` [C], ``cos`` and ``sin`` [N, R/2] FP32, ``slots`` [N] int64, ``pool`` [places,
    C + R] of kv's dtype. Raises IndexError for a slot that is not there."""
    rows, latent = kv.shape[0], weight.shape[0]
    refused = _function("write_latents", _SUFFIX[kv.dtype] + _SUFFIX[weight.dtype])(
        *(kv.data_ptr(), weight.data_ptr(), eps, cos.data_ptr(), sin.data_ptr(), slots.data_ptr(), pool.data_ptr()),
        *(rows, latent, kv.shape[1] - latent, pool.shape[0], int(interleaved), torch.get_num_threads()),
    )
    _refuse_slots(refused, pool)


def write_rows(x: Tensor, slots: Tensor, pool: Tensor) -> None:
    """``x`` [N, W] into ``pool`` [places, W] of the same dtype, at ``slots`` [N] int64. Raises IndexError for a slot
    that is not there."""
    refused = _function("write_rows", _SUFFIX[x.dtype])(
        *(x.data_ptr(), slots.data_ptr(), pool.data_ptr(), *x.shape, pool.shape[0])
    )
    _refuse_slots(refused, pool)


def _refuse_slots(refused: int, pool: Tensor) -> None:
    if refused:
        raise IndexError(f"a slot outside 0 to {pool.shape[0] - 1}")
