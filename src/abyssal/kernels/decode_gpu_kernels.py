"""The Triton programs behind :mod:`abyssal.kernels.decode_gpu`, which alone imports this file: it needs triton.

Widths, heads and the size of a page are known when a kernel is compiled, once for each that a model has. What changes
from step to step (sequences, width of the block table, splits) is not, so that no step waits for the compiler, and a
number that happens to be 1 or a multiple of 16 is no reason to compile anew. Places are counted in int64: a pool or a
layer's experts can pass 2^31 numbers.

A length, a page or an expert that is not there is never followed into memory: what would have come of it is NaN, since
raising would have to wait for the device.
"""
# mypy: ignore-errors

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOWEST = tl.constexpr(-3.0e38)  # finite, so that a block of −∞ does not make −∞ − (−∞)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _dot(a, b):
    if INTERPRETED:  # whose product takes the bits of BF16 for whole numbers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit(do_not_specialize=["pages", "width"])
def attend(
    q, keys, values, table, lengths, out, sums, scale, pages, width,
    PAGE: tl.constexpr, SHARED: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, CUT: tl.constexpr,
    VALUE: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr, COLUMNS: tl.constexpr,
    TILE: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A tile of heads of one group over one split of one sequence: softmax-weighted values, and log2 Σ exp.

    Keys are SIZE wide, taken in two parts, CUT and what is left, so that neither is padded far. Without ``values``
    the first part is the values too, loaded once.
    """
    tiles: tl.constexpr = (GROUP + TILE - 1) // TILE
    group = tl.program_id(0) // tiles
    within = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    n = tl.program_id(1).to(tl.int64)
    split, splits = tl.program_id(2), tl.num_programs(2)
    # One token more than the table has room for is enough to show that the length is wrong.
    length = tl.minimum(tl.load(lengths + n).to(tl.int64), width.to(tl.int64) * PAGE + 1).to(tl.int32)
    blocks = (tl.maximum(length, 0) + KEYS - 1) // KEYS
    share = (blocks + splits - 1) // splits
    begin = split * share
    end = tl.minimum(begin + share, blocks)

    row = n * (SHARED * GROUP) + group * GROUP + within
    mine = (within < GROUP) & (begin < end)
    first = tl.arange(0, FIRST)
    q_first = tl.load(q + row[:, None] * SIZE + first[None, :], mask=mine[:, None] & (first < CUT)[None, :], other=0.0)
    if REST > 0:
        rest = tl.arange(0, REST)
        in_rest = (rest < SIZE - CUT)[None, :]
        q_rest = tl.load(q + row[:, None] * SIZE + CUT + rest[None, :], mask=mine[:, None] & in_rest, other=0.0)
    column = tl.arange(0, COLUMNS)
    top = tl.full((TILE,), LOWEST, tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    sum_of_values = tl.zeros((TILE, COLUMNS), tl.float32)
    if INTERPRETED:  # whose range() takes no tensor where numpy is 2.4
        begin, end = begin.handle.data.item(), end.handle.data.item()
    for block in range(begin, end):
        token = block * KEYS + tl.arange(0, KEYS)
        inside = token < length
        entry = token // PAGE
        page = tl.load(table + n * width + entry, mask=inside & (entry < width), other=-1).to(tl.int64)
        there = (page >= 0) & (page < pages)
        place = ((page * PAGE + token % PAGE) * SHARED + group)[:, None]
        k = tl.load(keys + place * SIZE + first[None, :], mask=there[:, None] & (first < CUT)[None, :], other=0.0)
        k = k.to(q.dtype.element_ty)
        scores = _dot(q_first, tl.trans(k))
        if REST > 0:
            k_rest = tl.load(keys + place * SIZE + CUT + rest[None, :], mask=there[:, None] & in_rest, other=0.0)
            scores += _dot(q_rest, tl.trans(k_rest.to(q.dtype.element_ty)))
        scores = tl.where(there[None, :], scores * (scale * LOG2_E), float("nan"))
        scores = tl.where(inside[None, :], scores, float("-inf"))
        if values is None:
            v = k
        else:
            v = tl.load(
                values + place * VALUE + column[None, :], mask=there[:, None] & (column < VALUE)[None, :], other=0.0
            ).to(q.dtype.element_ty)
        higher = tl.maximum(top, tl.max(scores, axis=1))
        p = tl.exp2(scores - higher[:, None])
        shrunk = tl.exp2(top - higher)
        total = total * shrunk + tl.sum(p, axis=1)
        sum_of_values = sum_of_values * shrunk[:, None] + _dot(p.to(v.dtype), v)
        top = higher

    at = row * splits + split
    # A split without keys writes nothing but that it has none; where it is the only one, zeros.
    writes = (within < GROUP) & ((begin < end) | (splits == 1))
    result = sum_of_values / tl.where(total == 0.0, 1.0, total)[:, None]
    mask = writes[:, None] & (column < VALUE)[None, :]
    tl.store(out + at[:, None] * VALUE + column[None, :], result.to(out.dtype.element_ty), mask=mask)
    if sums is not None:
        tl.store(sums + at, tl.where(total == 0.0, float("-inf"), top + tl.log2(total)), mask=within < GROUP)


@triton.jit
def join(parts, sums, out, VALUE: tl.constexpr, SPLITS: tl.constexpr, STEP: tl.constexpr, COLUMNS: tl.constexpr):
    """What :func:`attend` would give over all splits at once, for one head of one sequence and some columns."""
    first = tl.program_id(0).to(tl.int64) * SPLITS
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    whole = tl.load(sums + first + tl.arange(0, SPLITS))
    top = tl.maximum(tl.max(whole, axis=0), LOWEST)
    total = tl.sum(tl.exp2(whole - top), axis=0)
    y = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, SPLITS, STEP):
        at = first + start + tl.arange(0, STEP)
        size = tl.load(sums + at)
        mask = (size != float("-inf"))[:, None] & (column < VALUE)[None, :]
        part = tl.load(parts + at[:, None] * VALUE + column[None, :], mask=mask, other=0.0)
        y += tl.sum(part * tl.exp2(size - top)[:, None], axis=0)
    y = y / tl.where(total == 0.0, 1.0, total)
    tl.store(out + tl.program_id(0).to(tl.int64) * VALUE + column, y.to(out.dtype.element_ty), mask=column < VALUE)


@triton.jit(do_not_specialize=["experts"])
def experts_up(
    x, indices, weights, gate_up, hidden, experts,
    K: tl.constexpr, INPUTS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # Assignments run fastest: where tokens share an expert, its rows are read at about the same time, once from memory.
    assignment = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    expert = tl.load(indices + assignment).to(tl.int64)
    there = (expert >= 0) & (expert < experts)
    fits = (there & (row < WIDTH))[:, None]
    at = gate_up + (expert * (2 * WIDTH) + row[:, None]) * INPUTS
    gate = tl.zeros((ROWS, COLUMNS), tl.float32)
    up = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, INPUTS, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        inside = column < INPUTS
        token = tl.load(x + assignment // K * INPUTS + column, mask=inside, other=0.0).to(tl.float32)
        gate += tl.load(at + column, mask=fits & inside, other=0.0).to(tl.float32) * token
        up += tl.load(at + WIDTH * INPUTS + column, mask=fits & inside, other=0.0).to(tl.float32) * token
    gate = tl.sum(gate, axis=1)
    y = gate * tl.sigmoid(gate) * tl.sum(up, axis=1) * tl.load(weights + assignment).to(tl.float32)
    tl.store(hidden + assignment * WIDTH + row, tl.where(there, y, float("nan")), mask=row < WIDTH)


@triton.jit(do_not_specialize=["experts"])
def experts_down(
    hidden, indices, down, out, experts,
    K: tl.constexpr, OUTPUTS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for choice in tl.static_range(K):  # unrolled, so that the reads of several experts are under way together
        assignment = n * K + choice
        expert = tl.load(indices + assignment).to(tl.int64)
        fits = ((expert >= 0) & (expert < experts) & (row < OUTPUTS))[:, None]
        at = down + (expert * OUTPUTS + row[:, None]) * WIDTH
        for start in range(0, WIDTH, COLUMNS):
            column = start + tl.arange(0, COLUMNS)[None, :]
            inside = column < WIDTH
            h = tl.load(hidden + assignment * WIDTH + column, mask=inside, other=0.0)
            total += tl.load(at + column, mask=fits & inside, other=0.0).to(tl.float32) * h
    tl.store(out + n * OUTPUTS + row, tl.sum(total, axis=1).to(out.dtype.element_ty), mask=row < OUTPUTS)


@triton.jit(do_not_specialize=["rows"])
def linear(
    x, weight, out, rows, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, MOST: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    output = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, MOST)
    total = tl.zeros((MOST, ROWS, COLUMNS), tl.float32)
    for start in range(0, INPUTS, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        inside = column < INPUTS
        mask = (output < OUTPUTS)[:, None] & inside
        w = tl.load(weight + output.to(tl.int64)[:, None] * INPUTS + column, mask=mask, other=0.0).to(tl.float32)
        token = tl.load(x + n[:, None] * INPUTS + column, mask=(n < rows)[:, None] & inside, other=0.0).to(tl.float32)
        total += w[None, :, :] * token[:, None, :]
    mask = (n < rows)[:, None] & (output < OUTPUTS)[None, :]
    y = tl.sum(total, axis=2).to(out.dtype.element_ty)
    tl.store(out + n[:, None] * OUTPUTS + output[None, :], y, mask=mask)
