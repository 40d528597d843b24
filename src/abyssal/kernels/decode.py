"""What a decoding step computes: a few rows times every active weight, and attention over pages of the cache.

At batch 1 the time of a step is that of reading the weights once, and plain PyTorch reads them at a third of the speed
that memory has (docs/notebook.md). Where the tensors allow it, each operation here is one call of compiled code
(kernels/native_decode.cpp): on a CPU, contiguous, FP32 or BF16, no gradients wanted, few rows. On a GPU experts
and attention are Triton's (kernels/decode_gpu.py). Otherwise it is plain PyTorch; what it computes stands in the
``_reference`` beside it. All of a step's calls together can be recorded and run again as one
(:mod:`abyssal.kernels.tape`); so nothing here copies or converts where compiled code runs.

:class:`Linear`, :class:`MLP` and :class:`Experts` get their weights ready once: when weights have just gone through the
cache, Python's own code comes from memory too, and each line that a call runs counts. They keep the weights they were
given, not a copy; a weight whose memory is replaced (``weight.data = …``) needs a new one.

A matrix is a tensor or :class:`~abyssal.kernels.packed.Packed`. Results have the dtype of ``x``. With packed weights
the compiled code rounds activations to int8 too, in groups of 32 (as llama.cpp does), or, where there is AMX and there
are more than four rows, weights and activations to BF16; plain PyTorch does not.

Shapes: N rows (tokens), I inputs, O outputs, D hidden, F expert width, E experts, K experts a token, H heads, C latent,
R rotary dims, V value dims, P pages in the pool. A page holds ``page`` tokens of one layer; token t of sequence n lies
in page ``block_table[n, t // page]`` at t % page.
"""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from abyssal.kernels import fused, grouped, native
from abyssal.kernels.attention import attention
from abyssal.kernels.heads import Tables, rotate
from abyssal.kernels.packed import Packed, dequantize
from abyssal.kernels.tape import recording

Matrix = Tensor | Packed

# With more rows the library's products are as fast (docs/notebook.md).
_ROWS = 32
_ASSIGNMENTS = 256


def few(x: Tensor, assignments: int = 0) -> bool:
    """Whether what stands here is the way to multiply ``x`` [..., I]: few rows, as in decoding, and no gradient."""
    return (
        not torch.is_grad_enabled()
        and x.device.type in ("cpu", "cuda")
        and 0 < x.numel() <= _ROWS * x.shape[-1]
        and assignments <= _ASSIGNMENTS
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled(x.device.type)
    )


class _Compiled:
    """Matrices where compiled code finds them, and its functions by the dtype of x; none where it cannot take them."""

    def __init__(self, name: str, *matrices: Matrix | None) -> None:
        self.kept = matrices  # their memory must live as long as the addresses
        self.trained = any(isinstance(x, Tensor) and x.requires_grad for x in matrices)
        kinds = {_kind(x) for x in matrices if x is not None}
        self.functions: dict[torch.dtype, Any] = {}
        if len(kinds) == 1 and (kind := kinds.pop()) is not None and native.library() is not None:
            self.functions = {dtype: native.decoding(name, dtype, kind) for dtype in (torch.float32, torch.bfloat16)}
            self.matrices = (native.Matrix * len(matrices))(*map(_matrix, matrices))
            self.address = native.address(self.matrices)

    def function(self, x: Tensor) -> Any:
        """What takes ``x``; None: plain PyTorch."""
        if torch.is_grad_enabled() and (self.trained or x.requires_grad):
            return None
        if not x.is_cpu or not x.is_contiguous() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
            return None
        if (tape := recording()) is not None:
            tape.keep(self)
        return self.functions.get(x.dtype)


def _kind(weight: Matrix) -> str | None:
    if isinstance(weight, Packed):
        fits = weight.data.is_cpu and weight.data.is_contiguous() and weight.scales.is_contiguous()
        return {"int8": "8", "int4": "4"}[weight.kind] if fits else None
    return (
        {torch.float32: "f", torch.bfloat16: "b"}[weight.dtype] if _takes(weight) and weight.is_contiguous() else None
    )


def _takes(*tensors: Tensor) -> bool:
    return native.supports(*tensors) and not torch.is_autocast_enabled("cpu")


def _matrix(weight: Matrix | None) -> native.Matrix:
    if weight is None:
        return native.Matrix()
    rows, columns = weight.shape[:-1].numel(), weight.shape[-1]
    if isinstance(weight, Packed):
        return native.Matrix(weight.data.data_ptr(), weight.scales.data_ptr(), rows, columns)
    return native.Matrix(weight.data_ptr(), None, rows, columns)


class Linear:
    """``x`` [..., I] times ``weight`` [O, I]: [..., O]."""

    def __init__(self, weight: Matrix) -> None:
        self.weight = weight
        self.outputs, self.inputs = weight.shape
        self.compiled = _Compiled("linear", weight)

    def __call__(self, x: Tensor) -> Tensor:
        *leading, inputs = x.shape
        rows, compiled = x.numel() // self.inputs, self.compiled
        if inputs != self.inputs or not 0 < rows <= _ROWS or (function := compiled.function(x)) is None:
            return F.linear(x, dense(self.weight, x.dtype))
        out = x.new_empty((*leading, self.outputs))
        function(compiled.address, x.data_ptr(), out.data_ptr(), rows, torch.get_num_threads())
        return out


def dense(weight: Matrix, dtype: torch.dtype) -> Tensor:
    """The matrix in ``dtype``; a packed one is unpacked."""
    return dequantize(weight, dtype) if isinstance(weight, Packed) else weight.to(dtype)


class MLP:
    """A SwiGLU MLP: ``x`` [N, D], ``gate`` and ``up`` [F, D], ``down`` [D, F] -> [N, D]."""

    def __init__(self, gate: Matrix, up: Matrix, down: Matrix) -> None:
        self.matrices = (gate, up, down)
        self.hidden, width = down.shape
        if {tuple(gate.shape), tuple(up.shape)} != {(width, self.hidden)}:
            raise ValueError(f"MLP: gate {gate.shape} and up {up.shape} do not go with down {down.shape}")
        self.compiled = _Compiled("experts", None, None, *self.matrices)

    def __call__(self, x: Tensor) -> Tensor:
        rows, hidden = x.shape
        _same("MLP: columns of x", hidden, self.hidden)
        if not 0 < rows <= _ROWS or (function := self.compiled.function(x)) is None:
            gate, up, down = (dense(weight, x.dtype) for weight in self.matrices)
            return F.linear(fused.swiglu(torch.cat((F.linear(x, gate), F.linear(x, up)), dim=-1)), down)
        out = torch.empty_like(x)
        function(self.compiled.address, x.data_ptr(), None, None, out.data_ptr(), rows, 0, torch.get_num_threads())
        return out


def mlp_reference(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """What :class:`MLP` computes."""
    return (F.silu(x @ gate.t()) * (x @ up.t())) @ down.t()


class Experts:
    """Routed experts and, in the same call, the shared one (gate, up and down as in :class:`MLP`).

    ``x`` [N, D], ``indices`` and ``weights`` [N, K], ``gate_up`` [E, 2F, D] (gate above up), ``down`` [E, D, F] ->
    [N, D]. Compiled code adds experts up in their order in FP32, the shared one last. Raises IndexError for an index
    that is no expert's.
    """

    def __init__(self, gate_up: Matrix, down: Matrix, shared: tuple[Matrix, Matrix, Matrix] | None = None) -> None:
        self.gate_up, self.down = gate_up, down
        experts, self.hidden, width = down.shape
        if gate_up.shape != (experts, 2 * width, self.hidden):
            raise ValueError(f"experts: gate_up {gate_up.shape} does not go with down {down.shape}")
        if shared is not None:
            _same("experts: rows of the shared one's down", shared[2].shape[0], self.hidden)
        together = shared is None or len({_kind(x) for x in (gate_up, down, *shared)}) == 1
        self.compiled = _Compiled("experts", gate_up, down, *((shared if together else None) or (None,) * 3))
        self.together, self.shared = together, None if shared is None else MLP(*shared)

    def __call__(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        rows, choices = indices.shape
        if x.shape != (rows, self.hidden) or weights.shape != indices.shape:
            raise ValueError(
                f"experts: x {x.shape}, indices {indices.shape}, weights {weights.shape}; "
                f"wanted [N, {self.hidden}], [N, K], [N, K]"
            )
        if not 0 < rows <= _ROWS or rows * choices > _ASSIGNMENTS or (function := self.compiled.function(x)) is None:
            gpu = None if isinstance(self.gate_up, Packed) else _gpu(x, self.gate_up, self.down)
            out = (
                self._routed(x, indices, weights)
                if gpu is None
                else gpu.experts(x, indices, weights, self.gate_up, self.down)
            )
            return out if self.shared is None else out + self.shared(x)
        if indices.dtype != torch.int64 or not indices.is_contiguous():
            indices = indices.long().contiguous()
        if weights.dtype != torch.float32 or not weights.is_contiguous():
            weights = weights.float().contiguous()
        out = torch.empty_like(x)
        arguments = (x.data_ptr(), indices.data_ptr(), weights.data_ptr(), out.data_ptr(), rows, choices)
        if function(self.compiled.address, *arguments, torch.get_num_threads()):
            raise IndexError(f"expert outside 0 to {self.down.shape[0] - 1}")
        return out if self.together or self.shared is None else out.add_(self.shared(x))

    def _routed(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        gate_up, down = self.gate_up, self.down
        if isinstance(gate_up, Packed) or isinstance(down, Packed):
            return _one_by_one(x, indices, weights, gate_up, down)
        where = grouped.plan(indices, gate_up.shape[0], x.dtype)
        rows = grouped.grouped_linear(grouped.gather(x, where), gate_up.to(x.dtype), where)
        hidden = fused.swiglu(rows, grouped.row_weights(weights, where))
        return grouped.combine(grouped.grouped_linear(hidden, down.to(x.dtype), where), where)


experts_reference = grouped.experts_reference


def _one_by_one(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Matrix, down: Matrix) -> Tensor:
    """Only one expert at a time is ever unpacked."""
    if indices.numel() and not 0 <= indices.min() <= indices.max() < gate_up.shape[0]:
        raise IndexError(f"expert outside 0 to {gate_up.shape[0] - 1}")
    out = torch.zeros_like(x, dtype=torch.float32)
    for expert in indices.unique().tolist():
        token, choice = torch.where(indices == expert)
        hidden = fused.swiglu(F.linear(x[token], _one(gate_up, expert, x.dtype)), weights[token, choice].float())
        out.index_add_(0, token, F.linear(hidden, _one(down, expert, x.dtype)).float())
    return out.to(x.dtype)


def _one(weight: Matrix, expert: int, dtype: torch.dtype) -> Tensor:
    if isinstance(weight, Packed):
        return dequantize(Packed(weight.data[expert], weight.scales[expert], weight.kind, weight.shape[1:]), dtype)
    return weight[expert].to(dtype)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """:func:`~abyssal.kernels.fused.rms_norm` of a few rows ``x`` [..., D], in their dtype."""
    _same("norm: numbers of weight", weight.shape, x.shape[-1:])
    return native.norm(x, weight, eps) if _runs(x, weight) else fused.rms_norm(x, weight, eps, x.dtype)


def add(a: Tensor, b: Tensor) -> Tensor:
    """``a`` [..., W] + ``b``, of the same shape or [W]."""
    fits = b.shape in (a.shape, a.shape[-1:]) and a.dtype == b.dtype
    return native.add(a, b) if fits and few(a) and _runs(a, b) else a + b


def join(a: Tensor, b: Tensor) -> Tensor:
    """``a`` and ``b``, of one shape [..., W], side by side: [..., 2W]."""
    _same("join: shape of b", b.shape, a.shape)
    return native.join(a, b) if few(a) and a.dtype == b.dtype and _runs(a, b) else torch.cat((a, b), dim=-1)


def routes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether :func:`route` takes these."""
    return few(x) and _runs(x, weight) and (bias is None or (bias.dtype == torch.float32 and bias.is_contiguous()))


def route(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    choices: int,
    groups: int,
    kept: int,
    best_two: bool,
    sigmoid: bool,
    normalized: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """A router in one call (:meth:`abyssal.model.router.Router.forward` is its account in PyTorch): ``x`` [..., D],
    ``weight`` [E, D], ``bias`` [E] FP32 -> indices [..., K] int64, weights [..., K] FP32, scores [..., E] FP32.

    ``kept`` of ``groups`` groups may be chosen from; one counts by its best, or by the sum of its ``best_two``.
    """
    _same("route: columns of weight", weight.shape[1], x.shape[-1])
    rules = native.Router(x.shape[-1], weight.shape[0], choices, groups, kept, sigmoid, best_two, normalized, scale)
    out = native.route(x.view(-1, x.shape[-1]), weight, bias, rules)
    indices, weights, scores = (y.view(*x.shape[:-1], y.shape[-1]) for y in out)
    return indices, weights, scores


def write_latents(
    kv: Tensor, weight: Tensor, eps: float, tables: Tables, interleaved: bool, slots: Tensor, pool: Tensor
) -> None:
    """Puts new tokens' latents and rotary keys into the cache (V3 paper eq. 1 and 3): ``kv`` [N, C + R] as
    kv_a_proj_with_mqa gives it, ``weight`` [C] of the latents' norm, ``tables`` [1, N, 1, R/2] of their positions,
    ``slots`` [N] int64 places in ``pool`` [P, page, C + R]."""
    (cos, sin), rows, (_, _, width) = tables, kv.shape[0], pool.shape
    half = (kv.shape[1] - weight.shape[0]) // 2
    _same("latents: numbers of a token", kv.shape[1], width)
    _same("latents: tables", (cos.shape, sin.shape), ((1, rows, 1, half),) * 2)
    _same("latents: slots", slots.shape, (rows,))
    places, slots = pool.flatten(0, 1), _int64(slots)
    if cos.dtype == sin.dtype == torch.float32 and pool.dtype == kv.dtype and _runs(kv, weight, pool, cos, sin):
        return native.write_latents(kv, weight, eps, cos, sin, slots, places, interleaved)
    latent, rotary = kv.split((weight.shape[0], kv.shape[1] - weight.shape[0]), dim=-1)
    latent = fused.rms_norm(latent, weight, eps, kv.dtype)
    rotary = rotate(rotary[None, :, None], tables, interleaved)[0, :, 0]
    places.index_copy_(0, slots, torch.cat((latent, rotary), dim=-1).to(pool.dtype))
    return None


def write_rows(x: Tensor, slots: Tensor, pool: Tensor) -> None:
    """Puts ``x`` [N, ...] at ``slots`` [N] int64 of ``pool`` [P, page, ...]."""
    _same("rows: numbers of a token", x.shape[1:], pool.shape[2:])
    _same("rows: slots", slots.shape, x.shape[:1])
    slots = _int64(slots)
    if x.dtype == pool.dtype and _runs(x, pool):
        return native.write_rows(x.flatten(1), slots, pool.flatten(0, 1).flatten(1))
    pool.flatten(0, 1).index_copy_(0, slots, x.to(pool.dtype))
    return None


def absorb(q: Tensor, kv_b: Tensor, nope: int, value: int) -> Tensor:
    """Queries carried into the latent space: ``q`` [N, H, nope + R], ``kv_b`` [H·(nope + value), C] as kv_b_proj has it
    -> [N, H, C + R], where the first C are (W^UK)ᵀ q and the rotary part is copied."""
    _same("absorb: rows of kv_b", kv_b.shape[0], q.shape[1] * (nope + value))
    _same("absorb: numbers of q without position", q[..., :nope].shape[-1], nope)
    if 0 < q.shape[0] <= _ROWS and _runs(q, kv_b):
        return native.absorb(q, kv_b, nope, value)
    return absorb_reference(q, kv_b.to(q.dtype), nope, value)


def absorb_reference(q: Tensor, kv_b: Tensor, nope: int, value: int) -> Tensor:
    """What :func:`absorb` computes."""
    w_uk = kv_b.view(q.shape[1], nope + value, -1)[:, :nope]
    return torch.cat((torch.einsum("nhj,hjc->nhc", q[..., :nope], w_uk), q[..., nope:]), dim=-1)


def expand(o: Tensor, kv_b: Tensor, nope: int, value: int) -> Tensor:
    """Attention's result carried back: ``o`` [N, H, C], ``kv_b`` as above -> W^UV o, [N, H, value]."""
    _same("expand: rows of kv_b", kv_b.shape[0], o.shape[1] * (nope + value))
    _same("expand: columns of kv_b", kv_b.shape[1], o.shape[2])
    if 0 < o.shape[0] <= _ROWS and _runs(o, kv_b):
        return native.expand(o, kv_b, nope, value)
    return expand_reference(o, kv_b.to(o.dtype), nope, value)


def expand_reference(o: Tensor, kv_b: Tensor, nope: int, value: int) -> Tensor:
    """What :func:`expand` computes."""
    w_uv = kv_b.view(o.shape[1], nope + value, -1)[:, nope:]
    return torch.einsum("nhc,hvc->nhv", o, w_uv)


def latent_attention(
    q: Tensor, pages: Tensor, block_table: Tensor, lengths: Tensor, scale: float, latent: int
) -> Tensor:
    """Attention of one new token a sequence over cached latents; the new token's is among them.

    ``q`` [N, H, C + R] (:func:`absorb`), ``pages`` [P, page, C + R], ``block_table`` [N, most] and ``lengths`` [N]
    integers -> softmax(q · k · scale) over the sequence's first ``lengths`` latents times their first ``latent`` = C
    numbers, [N, H, C]; zeros for a sequence of length 0. Raises IndexError for a page that is not in the pool.
    """
    _same("attention: numbers of q", q.shape[2], pages.shape[2])
    _same("attention: rows of block_table and lengths", (len(block_table), len(lengths)), (len(q), len(q)))
    if _pages(q, pages) and latent <= q.shape[2]:
        return native.paged_attention(q, pages, None, _int32(block_table), _int32(lengths), scale, latent)
    if (gpu := _gpu(q, pages)) is not None:
        out: Tensor = gpu.latent_attention(q, pages, block_table, lengths, scale, latent)
        return out
    values = pages[..., :latent]
    return paged_attention_plain(q, pages.unsqueeze(2), values.unsqueeze(2), block_table, lengths, scale)


def paged_attention(
    q: Tensor, keys: Tensor, values: Tensor, block_table: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    """The same where heads have keys and values of their own: ``q`` [N, H, d], ``keys`` [P, page, H', d], ``values``
    [P, page, H', V], H' divides H -> [N, H, V]."""
    _same("attention: numbers of q", q.shape[2], keys.shape[3])
    _same("attention: values' pages", values.shape[:3], keys.shape[:3])
    _same("attention: heads beyond whole groups", q.shape[1] % keys.shape[2], 0)
    _same("attention: rows of block_table and lengths", (len(block_table), len(lengths)), (len(q), len(q)))
    if _pages(q, keys, values):
        width = values.shape[3]
        return native.paged_attention(q, keys, values, _int32(block_table), _int32(lengths), scale, width)
    if (gpu := _gpu(q, keys, values)) is not None:
        out: Tensor = gpu.paged_attention(q, keys, values, block_table, lengths, scale)
        return out
    return paged_attention_plain(q, keys, values, block_table, lengths, scale)


def paged_attention_plain(
    q: Tensor, keys: Tensor, values: Tensor, block_table: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    """The same in PyTorch, sequence by sequence, in the dtype of ``q``."""
    out = q.new_zeros(*q.shape[:2], values.shape[-1])
    page = keys.shape[1]
    for n, length in enumerate(lengths.tolist()):
        used = block_table[n, : -(-length // page)].long()
        if length < 0 or len(used) * page < length or ((used < 0) | (used >= keys.shape[0])).any():
            raise IndexError(
                f"a length beyond {block_table.shape[1]} pages of {page} tokens, or a page outside 0 to "
                f"{keys.shape[0] - 1}"
            )
        if length:
            k, v = (x[used].flatten(0, 1)[:length].transpose(0, 1)[None].to(q.dtype) for x in (keys, values))
            out[n] = attention(q[n][None, :, None], k, v, scale, None, causal=False)[0, :, 0]
    return out


def paged_attention_reference(
    q: Tensor, keys: Tensor, values: Tensor, block_table: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    """What :func:`paged_attention` computes, token by token."""
    out = q.new_zeros(*q.shape[:2], values.shape[-1])
    page, shared = keys.shape[1], q.shape[1] // keys.shape[2]
    for n in range(q.shape[0]):
        places = [(int(block_table[n, t // page]), t % page) for t in range(int(lengths[n]))]
        for head in range(q.shape[1] if places else 0):
            k = torch.stack([keys[p, i, head // shared] for p, i in places])
            v = torch.stack([values[p, i, head // shared] for p, i in places])
            out[n, head] = (k @ q[n, head] * scale).softmax(0) @ v
    return out


def _same(what: str, found: object, wanted: object) -> None:
    # Compiled code would read beyond the end.
    if found != wanted:
        raise ValueError(f"{what}: {found}, not {wanted}")


def _runs(*tensors: Tensor) -> bool:
    """Whether compiled code may take ``tensors``."""
    for x in tensors:
        if not x.is_contiguous() or (x.requires_grad and torch.is_grad_enabled()):
            return False
    return _takes(*tensors)


def _gpu(*tensors: Tensor | Packed) -> ModuleType | None:
    """The Triton kernels, where they take ``tensors``. They can be captured in a CUDA graph, so a number that is out of
    bounds cannot raise there: it makes a NaN."""
    dense = [x for x in tensors if isinstance(x, Tensor)]
    if len(dense) < len(tensors) or not (dense[0].is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        return None
    from abyssal.kernels import decode_gpu, gpu  # Triton takes a second to import, and is not everywhere

    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in dense)
    return decode_gpu if not wanted and gpu.supports(*dense) else None


def _pages(q: Tensor, *pools: Tensor) -> bool:
    return q.shape[0] > 0 and all(x.dtype == q.dtype for x in pools) and _runs(q, *pools)


def _int64(x: Tensor) -> Tensor:
    return x if x.dtype == torch.int64 and x.is_contiguous() else x.long().contiguous()


def _int32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.int32 and x.is_contiguous() else x.to(torch.int32).contiguous()
