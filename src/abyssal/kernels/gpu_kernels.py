"""The Triton programs behind :mod:`abyssal.kernels.gpu`, which alone imports this file: it needs triton.

Each is one pass over rows (or, for the optimizer, over numbers): load, compute in FP32, store. A program takes a tile
of ROWS × COLUMNS and walks along the rows; what lies outside is masked. Rows are counted in int64 where they are
multiplied by a width, since an expert buffer can pass 2^31 numbers. Widths are known when a kernel is compiled, once
for each that a model has; counts of rows are not, so that they may change from call to call.
"""
# mypy: ignore-errors

import triton
import triton.language as tl

INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1 before triton is imported: everything runs on the CPU

LOWEST = tl.constexpr(-3.0e38)  # finite, so that a block of −∞ does not make −∞ − (−∞)


@triton.jit
def swiglu(gate_up, row_weight, out, rows, stride, width: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    if row_weight is not None:
        weight = tl.load(row_weight + row, mask=inside, other=0.0).to(tl.float32)[:, None]
    far = row.to(tl.int64)[:, None]
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        mask = inside[:, None] & (column < width)
        gate = tl.load(gate_up + far * stride + column, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(gate_up + far * stride + width + column, mask=mask, other=0.0).to(tl.float32)
        y = gate * tl.sigmoid(gate) * up
        if row_weight is not None:
            y = y * weight
        tl.store(out + far * width + column, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_backward(
    grad, gate_up, row_weight, grad_gate_up, grad_row_weight, rows, grad_stride, stride,
    width: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    total = tl.zeros((ROWS,), tl.float32)
    if row_weight is not None:
        weight = tl.load(row_weight + row, mask=inside, other=0.0).to(tl.float32)[:, None]
    far = row.to(tl.int64)[:, None]
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        mask = inside[:, None] & (column < width)
        g = tl.load(grad + far * grad_stride + column, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(gate_up + far * stride + column, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(gate_up + far * stride + width + column, mask=mask, other=0.0).to(tl.float32)
        s = tl.sigmoid(gate)
        silu = gate * s
        if row_weight is not None:
            total += tl.sum(g * silu * up, axis=1)
            g = g * weight
        grad_gate = g * up * s * (1.0 + gate * (1.0 - s))
        at = grad_gate_up + far * (2 * width) + column
        tl.store(at, grad_gate.to(grad_gate_up.dtype.element_ty), mask=mask)
        tl.store(at + width, (g * silu).to(grad_gate_up.dtype.element_ty), mask=mask)
    if row_weight is not None:
        tl.store(grad_row_weight + row, total, mask=inside)


@triton.jit
def gather_rows(x, assignment, out, rows, stride, k, width: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    source = tl.load(assignment + row, mask=inside, other=-1)
    token = (source // k).to(tl.int64)[:, None]
    far = row.to(tl.int64)[:, None]
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        fits = column < width
        values = tl.load(x + token * stride + column, mask=(source >= 0)[:, None] & fits, other=0.0)
        tl.store(out + far * width + column, values, mask=inside[:, None] & fits)


@triton.jit
def sum_rows(
    rows, slot, out, tokens, stride, K: tl.constexpr, width: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = token < tokens
    far = token.to(tl.int64)[:, None]
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        mask = inside[:, None] & (column < width)
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for choice in tl.static_range(K):  # unrolled, so that all K loads are under way together
            row = tl.load(slot + token.to(tl.int64) * K + choice, mask=inside, other=0).to(tl.int64)[:, None]
            total += tl.load(rows + row * stride + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + far * width + column, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def rms_norm(x, weight, y, rstd, rows, stride, eps, width: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    column = tl.arange(0, COLUMNS)[None, :]
    mask = inside[:, None] & (column < width)
    far = row.to(tl.int64)[:, None]
    values = tl.load(x + far * stride + column, mask=mask, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(values * values, axis=1) / width + eps)
    tl.store(rstd + row, r, mask=inside)
    w = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(y + far * width + column, (values * r[:, None] * w).to(y.dtype.element_ty), mask=mask)


@triton.jit
def rms_norm_backward(
    grad, x, weight, rstd, grad_x, partial, rows, grad_stride, stride,
    width: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column = tl.arange(0, COLUMNS)[None, :]
    fits = column < width
    w = tl.load(weight + column, mask=fits, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(STEPS):
        row = (program * STEPS + step) * ROWS + tl.arange(0, ROWS)
        inside = row < rows
        mask = inside[:, None] & fits
        far = row.to(tl.int64)[:, None]
        g = tl.load(grad + far * grad_stride + column, mask=mask, other=0.0).to(tl.float32)
        values = tl.load(x + far * stride + column, mask=mask, other=0.0).to(tl.float32)
        r = tl.load(rstd + row, mask=inside, other=0.0)[:, None]
        hat = values * r
        total += g * hat
        g = g * w
        along = tl.sum(g * hat, axis=1)[:, None] / width
        tl.store(grad_x + far * width + column, ((g - hat * along) * r).to(grad_x.dtype.element_ty), mask=mask)
    at = partial + program * width + tl.arange(0, COLUMNS)
    tl.store(at, tl.sum(total, axis=0), mask=tl.arange(0, COLUMNS) < width)


@triton.jit
def cross_entropy(logits, targets, nats, ignored, vocabulary: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    target = tl.load(targets + row)
    counted = target != ignored
    real = counted & (target >= 0) & (target < vocabulary)
    line = logits + row.to(tl.int64) * vocabulary
    # Read before anything is overwritten; a target that no token has makes the loss NaN.
    chosen = tl.load(line + target, mask=real, other=float("nan")).to(tl.float32)
    top = LOWEST
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = (column < vocabulary) & counted  # nothing is read for a row that does not count
        values = tl.load(line + column, mask=mask, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(values, axis=0))
        total = total * tl.exp(top - higher) + tl.exp(values - higher)
        top = higher
    # Differences to the largest logit are kept apart from log Σ: beside a logit of 300 its last digits would be lost.
    whole = tl.sum(total, axis=0)
    tl.store(nats + row, tl.where(counted, tl.log(whole) + (top - chosen), 0.0))
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < vocabulary
        values = tl.load(line + column, mask=mask & counted, other=float("-inf")).to(tl.float32)
        grad = tl.exp(values - top) / whole - tl.where(column == target, 1.0, 0.0)
        tl.store(line + column, tl.where(counted, grad, 0.0).to(logits.dtype.element_ty), mask=mask)


@triton.jit
def adamw(
    weight, low, grad, m, v, scale_at, scale, count, keep, rate, beta1, rest1, beta2, rest2, root, eps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    if scale_at is not None:
        scale = tl.load(scale_at)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < tl.where(scale >= 0.0, count, 0)  # nothing is read or written where it is negative or NaN
    g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32) * scale
    first = beta1 * tl.load(m + at, mask=mask, other=0.0).to(tl.float32) + rest1 * g
    second = beta2 * tl.load(v + at, mask=mask, other=0.0).to(tl.float32) + rest2 * g * g
    tl.store(m + at, first.to(m.dtype.element_ty), mask=mask)
    tl.store(v + at, second.to(v.dtype.element_ty), mask=mask)
    step = rate * first / (tl.sqrt(second) * root + eps)
    w = tl.load(weight + at, mask=mask, other=0.0)
    if low is None:
        tl.store(weight + at, w.to(tl.float32) * keep - step, mask=mask)
    else:
        high = w.to(tl.int16, bitcast=True).to(tl.int32)
        bits = (high << 16) + tl.load(low + at, mask=mask, other=0).to(tl.int32)
        master = bits.to(tl.float32, bitcast=True) * keep - step
        bits = master.to(tl.int32, bitcast=True)
        # Half a step away is rounded up, not to even: else ``low`` would have to be +32768, which int16 does not hold.
        high = (bits + 0x8000) >> 16
        tl.store(weight + at, high.to(tl.int16).to(tl.bfloat16, bitcast=True), mask=mask)
        tl.store(low + at, (bits - (high << 16)).to(tl.int16), mask=mask)
