"""Everything that only a GPU can tell, checked and timed in one call.

    python benchmarks/gpu.py [--json FILE] [--sections kernels steps …] [--minutes 9] [--steps 200] [--dry-run]

Sections, in this order; one that fails says so in a line, and the others go on:

- machine: what it is; the rate of BF16 products (8192³) and of copying memory, which the shares below refer to
- kernels: each Triton kernel against plain PyTorch in float64, its time, bytes and share of the copying rate
- steps: the training step beside transformers' at its best (BF16, grouped_mm, SDPA, fused AdamW), same weights, same
  batches, in turn; once with FP32 weights under autocast (what ours is as precise as) and once all in BF16; on shape S
  and on L, which fills the card; tokens/s, FLOP/s as a share of the card's (MFU), peak memory of each side
- sync: whether our step waits for the device, and where; what its kernels take, by torch's profiler
- fp8: the step in FP8 beside BF16 on shape L
- curves: the loss in FP8 and in BF16 over --steps steps of Tiny Shakespeare, byte by byte
- compiled: as steps, transformers compiled (takes minutes to compile, so it comes last)

--dry-run runs all of it tiny on a CPU, kernels in Triton's interpreter: its figures mean nothing.
"""

from __future__ import annotations

import argparse
import collections
import functools
import gc
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from machine import as_json, bandwidth, describe_machine, gemm_rate, markdown, paired_ratio, spread, timed
from torch import Tensor

from abyssal.analysis.parameters import count_parameters
from abyssal.config import ModelConfig, to_published
from abyssal.data.corpus import documents
from abyssal.data.loader import Batch
from abyssal.kernels import gpu
from abyssal.kernels.grouped import plan_on_device
from abyssal.model import Transformer
from abyssal.training.optimizer import learning_rate
from abyssal.training.recipe import BalanceConfig, OptimizerConfig, ScheduleConfig
from abyssal.training.step import TrainingStep
from training import shape, step_flops

DRY = "--dry-run" in sys.argv
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # read when the GPU is first used
DEVICE = torch.device("cpu" if DRY else "cuda")
BF16, FP32 = torch.bfloat16, torch.float32
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense BF16 FLOP/s by the vendor's datasheet

# 3.15B parameters, 0.53B active without the embedding; attention's heads are V3's.
LARGE = {
    "vocab_size": 32768,
    "hidden_size": 1536,
    "num_hidden_layers": 16,
    "intermediate_size": 4096,
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
        "moe_intermediate_size": 640,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
}


def shape_of(name: str) -> tuple[ModelConfig, int, int]:
    """Config, batch size, sequence length. Shape S is given 64 sequences here: 8, as on a CPU, leave a GPU idle."""
    if name == "L":
        config, batch, length = ModelConfig.model_validate(LARGE), 8, 4096
    else:
        config, _, length = shape(name)
        batch = 64
    if DRY:
        settings = config.model_dump()
        settings["moe"] |= {"n_routed_experts": 8, "moe_intermediate_size": 32}
        settings |= {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 64}
        config, batch, length = ModelConfig.model_validate(settings), 2, 32
    return config, batch, length


@functools.cache
def rates() -> dict[str, float]:
    """FLOP/s of BF16 products and bytes/s of copying, measured once."""
    if DRY:
        return {"gemm": gemm_rate(BF16, 128, DEVICE, 0.01), "copy": bandwidth(DEVICE, 2**20, 0.01)["copy"]}
    return {"gemm": gemm_rate(BF16, 8192, DEVICE, 1.0), "copy": bandwidth(DEVICE, 2**33, 0.5)["copy"]}


def peak_rate() -> float | None:
    name = "" if DRY else torch.cuda.get_device_name()
    return next((rate for card, rate in PEAK.items() if card in name), None)


def machine(options: argparse.Namespace) -> dict[str, Any]:
    import transformers

    found = describe_machine(DEVICE, BF16) | {"transformers": transformers.__version__}
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = None
    found |= {"bf16_tflops": rates()["gemm"] / 1e12, "copy_gb_s": rates()["copy"] / 1e9}
    for key, value in found.items():
        print(f"{key}: {value}")
    return found


# Kernels --------------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """``ours`` and ``plain`` take the same tensors and give the same ones; ``plain`` in any dtype, ours in ``inputs``'.

    ``moved``: bytes that must be read and written.
    """

    name: str
    ours: Callable[..., tuple[Tensor, ...]]
    plain: Callable[..., tuple[Tensor, ...]]
    inputs: tuple[Tensor, ...]
    moved: int


def nbytes(*tensors: Tensor | None) -> int:
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


def plan_tensors(indices: Tensor, experts: int, multiple: int) -> tuple[Tensor, Tensor, Tensor]:
    """assignment, slot, ends."""
    where = plan_on_device(indices, experts, multiple)
    return where.assignment, where.slot, where.ends


def cases() -> list[Case]:
    """Sizes of shape L, as many tokens as a quarter of its batch has; nothing is zero."""
    tokens, k, experts, hidden, width, vocabulary = (64, 2, 4, 64, 32, 300) if DRY else (8192, 6, 64, 1536, 640, 32768)
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*size: int, dtype: torch.dtype = BF16) -> Tensor:
        return torch.randn(*size, generator=generator, device=DEVICE).to(dtype)

    indices = torch.rand(tokens, experts, generator=generator, device=DEVICE).topk(k).indices
    assignment, slot, _ = plan_tensors(indices, experts, 8)
    rows = assignment.shape[0]
    x, gate_up, grad = normal(tokens, hidden), normal(rows, 2 * width), normal(rows, width)
    row_weight, norm = normal(rows, dtype=FP32), normal(hidden, dtype=FP32)
    buffer = normal(rows, hidden)
    out = [
        Case("swiglu", lambda *a: (gpu.swiglu(*a),), plain_swiglu, (gate_up, row_weight), nbytes(gate_up, grad)),
        Case(
            "swiglu_backward", gpu.swiglu_backward, plain_swiglu_backward, (grad, gate_up, row_weight),
            nbytes(grad, gate_up, gate_up),
        ),
        Case(
            "gather_rows", lambda x: (gpu.gather_rows(x, assignment, k),),
            lambda x: (x.index_select(0, assignment.clamp_min(0) // k) * (assignment >= 0).unsqueeze(1),),
            (x,), nbytes(x, buffer),
        ),
        Case(
            "sum_rows", lambda rows: (gpu.sum_rows(rows, slot, k),),
            lambda rows: (rows.index_select(0, slot).view(tokens, k, hidden).sum(1),),
            (buffer,), nbytes(x) * (k + 1),
        ),
    ]  # fmt: skip
    for dtype, name in ((BF16, "BF16"), (FP32, "FP32 in, BF16 out")):
        residual, grad_y = normal(tokens, hidden, dtype=dtype), normal(tokens, hidden)
        rstd = residual.double().square().mean(1).add(1e-6).rsqrt().float()
        out += [
            Case(
                f"rms_norm, {name}", lambda x, w: (gpu.rms_norm(x, w, 1e-6, BF16)[0],),
                lambda x, w: (F.rms_norm(x, (x.shape[1],), w.to(x.dtype), 1e-6),),
                (residual, norm), nbytes(residual, grad_y),
            ),
            Case(
                f"rms_norm_backward, {name}", gpu.rms_norm_backward, plain_rms_norm_backward,
                (grad_y, residual, norm, rstd), nbytes(grad_y, residual, residual),
            ),
        ]  # fmt: skip
    for dtype, name in ((BF16, "BF16"), (FP32, "FP32")):
        logits = normal(max(tokens // 8, 4), vocabulary, dtype=dtype) * 3
        targets = torch.randint(0, vocabulary, (logits.shape[0],), generator=generator, device=DEVICE)
        targets[::3] = -100

        def ours(logits: Tensor, targets: Tensor = targets) -> tuple[Tensor, ...]:
            return gpu.cross_entropy_(logits, targets, -100), logits

        def plain(logits: Tensor, targets: Tensor = targets) -> tuple[Tensor, ...]:
            return plain_cross_entropy(logits, targets)

        out.append(Case(f"cross_entropy_, {name}", ours, plain, (logits,), 2 * nbytes(logits)))
    return [*out, *adamw_cases(normal)]


def adamw_cases(normal: Callable[..., Tensor]) -> list[Case]:
    count = 5000 if DRY else 64 * 1280 * 1536
    numbers = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
    bias = {"bias1": 1 - 0.9**3, "bias2": 1 - 0.95**3}
    scale = torch.full((), 0.5, device=DEVICE)

    def ours(weight: Tensor, grad: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        gpu.adamw_(weight, None, grad, m, v, **numbers, **bias, scale=scale)
        return weight, m, v

    def in_parts(weight: Tensor, low: Tensor, grad: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        gpu.adamw_(weight, low, grad, m, v, **numbers, **bias, scale=scale)
        master = (weight.view(torch.int16).int() << 16) + low.int() if timing.checks else weight
        return master.view(FP32) if timing.checks else weight, m, v

    def plain(weight: Tensor, grad: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        g = grad.to(weight.dtype) * 0.5
        m, v = 0.9 * m.to(weight.dtype) + 0.1 * g, 0.95 * v.to(weight.dtype) + 0.05 * g * g
        step = m / bias["bias1"] / ((v / bias["bias2"]).sqrt() + 1e-8)
        return weight * (1 - 1e-4) - 1e-3 * step, m, v

    def plain_in_parts(weight: Tensor, low: Tensor, grad: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        if weight.dtype == torch.float64:  # what was given as BF16 and int16, exactly, since both fit in float64
            whole = weight.to(BF16).view(torch.int16).int() << 16
            weight = (whole + low.int()).view(FP32).double()
        return plain(weight, grad, m, v)

    master, m, v = normal(count, dtype=FP32), normal(count, dtype=FP32), normal(count, dtype=FP32).square()
    weight = master.to(BF16)
    low = (torch.rand(count, device=DEVICE) * 60000 - 30000).to(torch.int16)
    grad = normal(count)
    small = (m.to(BF16), v.to(BF16))
    return [
        Case("adamw_, FP32", ours, plain, (master, grad.float(), m, v), 7 * nbytes(m)),
        Case("adamw_, BF16 + low", in_parts, plain_in_parts, (weight, low, grad, m, v), 26 * count),
        Case("adamw_, BF16 + low, BF16 moments", in_parts, plain_in_parts, (weight, low, grad, *small), 18 * count),
    ]


class timing:
    checks = True  # off while a kernel is timed: what only the comparison needs is left out


def plain_swiglu(gate_up: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    gate, up = gate_up.chunk(2, dim=-1)
    return (F.silu(gate) * up * weight.to(up.dtype).unsqueeze(1),)


def plain_swiglu_backward(grad: Tensor, gate_up: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    gate, up = gate_up.chunk(2, dim=-1)
    s = gate.sigmoid()
    silu = gate * s
    g = grad * weight.to(grad.dtype).unsqueeze(1)
    return torch.cat((g * up * s * (1 + gate * (1 - s)), g * silu), 1), (grad * silu * up).sum(1)


def plain_rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, ...]:
    dtype = x.dtype
    hat, g = x * rstd.to(dtype).unsqueeze(1), grad.to(dtype) * weight.to(dtype)
    along = (g * hat).mean(1, keepdim=True)
    return (g - hat * along) * rstd.to(dtype).unsqueeze(1), (grad.to(dtype) * hat).sum(0)


def plain_cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    precise = logits.to(torch.promote_types(logits.dtype, FP32))
    counted = (targets != -100).unsqueeze(1)
    index = targets.clamp_min(0).unsqueeze(1)
    log_p = precise.log_softmax(-1)
    nats = -(log_p.gather(1, index) * counted).sum()
    grad = (log_p.exp().scatter_add(1, index, -torch.ones_like(log_p[:, :1]))) * counted
    return nats, grad.to(logits.dtype)


def kernel_seconds(call: Callable[[], Any]) -> float:
    if DRY:
        return timed(call, DEVICE)
    from triton.testing import do_bench

    return float(do_bench(call, warmup=10, rep=60, return_mode="median")) / 1e3  # empties the L2 in between


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def check(case: Case) -> dict[str, Any]:
    exact = case.plain(*(x.double() if x.is_floating_point() else x for x in case.inputs))
    plain = case.plain(*case.inputs)
    timing.checks = True
    got = case.ours(*(x.clone() for x in case.inputs))
    errors = [distance(x, right) for x, right in zip(got, exact, strict=True)]
    usual = [distance(x, right) for x, right in zip(plain, exact, strict=True)]
    # BF16 results are rounded once: 2^-9 at most, a little less in the mean. The interpreter cuts off instead.
    step = 2.0**-8 if DRY else 2.0**-9
    limits = [max(2 * u, step) if x.dtype == BF16 else 1e-5 for x, u in zip(got, usual, strict=True)]
    right = all(error <= limit for error, limit in zip(errors, limits, strict=True))  # False for NaN
    del exact, plain, got
    timing.checks = False
    work = [x.clone() for x in case.inputs]
    seconds, plain_seconds = kernel_seconds(lambda: case.ours(*work)), kernel_seconds(lambda: case.plain(*case.inputs))
    return {
        "kernel": case.name,
        "right": right,
        "errors": errors,
        "plain_errors": usual,
        "seconds": seconds,
        "plain_seconds": plain_seconds,
        "bytes": case.moved,
        "share": case.moved / seconds / rates()["copy"],
    }


def kernels(options: argparse.Namespace) -> dict[str, Any]:
    if not gpu.supports(torch.zeros(1, device=DEVICE)):
        raise RuntimeError("no Triton kernels here")
    found, rows = [], []
    for case in cases():
        try:
            r = check(case)
        except Exception as error:
            rows.append([case.name, one_line(error)] + [""] * 5)
            found.append({"kernel": case.name, "right": False, "error": traceback.format_exc()})
            continue
        found.append(r)
        worst = max(r["errors"])
        rows.append([
            r["kernel"], "right" if r["right"] else "WRONG", f"{worst:.1e}", f"{r['seconds'] * 1e6:,.0f}",
            f"{r['plain_seconds'] * 1e6:,.0f}", f"{r['bytes'] / 1e6:,.0f}", f"{r['share']:.0%}",
        ])  # fmt: skip
    print(markdown(rows, "kernel", "result", "error", "µs", "plain, µs", "MB", "of copying"))
    weight = torch.nn.Parameter(torch.randn(5000 if DRY else 64 * 1280 * 1536, device=DEVICE))
    weight.grad = torch.randn_like(weight)
    fused = kernel_seconds(torch.optim.AdamW([weight], fused=True).step)
    print(f"\ntorch's fused AdamW, FP32: {fused * 1e6:,.0f} µs")
    del weight
    experts, tokens = (4, 64) if DRY else (64, 32768)
    indices = torch.rand(tokens, experts, device=DEVICE).topk(2 if DRY else 6).indices
    same = all(
        torch.equal(a.cpu(), b)
        for a, b in zip(plan_tensors(indices, experts, 128), plan_tensors(indices.cpu(), experts, 128), strict=True)
    )
    seconds = kernel_seconds(lambda: plan_tensors(indices, experts, 128))
    print(f"plan_on_device, {tokens} tokens: {'as on the CPU' if same else 'WRONG'}, {seconds * 1e6:,.0f} µs")
    return {"kernels": found, "fused_adamw": fused, "plan": {"right": same, "seconds": seconds}}


# Steps ----------------------------------------------------------------------------------------------------------------


class Ours:
    """The trainer's own step."""

    def __init__(self, config: ModelConfig, fp8: bool = False) -> None:
        self.name = "abyssal, FP8" if fp8 else "abyssal"
        with torch.device(DEVICE):
            model = Transformer(config, generator=torch.Generator(DEVICE).manual_seed(0))
        if fp8:
            from abyssal.model.fp8_training import train_in_fp8

            train_in_fp8(model)
        self.step = TrainingStep(
            model,
            optimizer=OptimizerConfig(lr=1e-4),
            balance=BalanceConfig.model_validate("bias_sign"),
            clip=1.0,
            mtp_weight=0.3,
            dtype=BF16,
            device=DEVICE,
        )

    def __call__(self, batch: Batch, lr: float = 1e-4) -> Callable[[], float]:
        result = self.step([batch], batch.tokens.shape[1] - 1, lr, 0.0)
        return lambda: float(result.loss)  # read later: reading waits for the device


class Theirs:
    """transformers' V3 with the weights of ``Ours``; ``whole``: all in BF16, moments too, instead of autocast."""

    def __init__(self, config: ModelConfig, whole: bool = False, compiled: bool = False) -> None:
        import transformers

        transformers.logging.set_verbosity_error()
        kind = "all BF16" if whole else "autocast"
        self.name = f"transformers, {kind}" + (", compiled" if compiled else "")
        published = transformers.DeepseekV3Config.from_dict(to_published(config))
        published._experts_implementation = "grouped_mm"
        with torch.device(DEVICE):
            ours = Transformer(config, generator=torch.Generator(DEVICE).manual_seed(0))
            self.model = transformers.DeepseekV3ForCausalLM(published).train()
        missing, unexpected = self.model.load_state_dict(ours.state_dict(), strict=False)
        assert not [*missing, *unexpected], (missing[:3], unexpected[:3])
        if whole:
            self.model.to(BF16)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.forward = torch.compile(self.model, backend="eager" if DRY else "inductor") if compiled else self.model
        self.autocast = not whole

    def __call__(self, batch: Batch) -> Callable[[], float]:
        tokens = batch.tokens.to(DEVICE)
        with torch.autocast(DEVICE.type, dtype=BF16, enabled=self.autocast):
            # shift_labels: else it would leave out the last token of each sequence, which ours predicts
            ahead = tokens[:, 1:].contiguous()
            loss = self.forward(tokens[:, :-1], labels=ahead, shift_labels=ahead, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        value = loss.detach()
        return lambda: float(value)


Side = Ours | Theirs


def random_batch(config: ModelConfig, batch: int, length: int, seed: int) -> Batch:
    tokens = torch.randint(config.vocab_size, (batch, length + 1), generator=torch.Generator().manual_seed(seed))
    return Batch(tokens, torch.zeros_like(tokens))


def free() -> None:
    gc.collect()
    if not DRY:
        torch.cuda.empty_cache()


def allocated() -> int:
    return 0 if DRY else torch.cuda.memory_allocated()


def in_turn(
    config: ModelConfig, batch: int, length: int, build: list[Callable[[], Side]], rounds: int
) -> list[dict[str, Any]]:
    """A step of each side in each round; the first two rounds warm up."""
    sides: list[Side] = []
    resident: list[int] = []
    losses: list[list[Callable[[], float]]] = []
    for make in build:
        before = allocated()
        sides.append(make())
        losses.append([sides[-1](random_batch(config, batch, length, 0))])  # allocates the optimizer's state
        free()
        resident.append(allocated() - before)
    times: list[list[float]] = [[] for _ in sides]
    peaks = [0] * len(sides)
    for i in range(1, rounds + 2):
        data = random_batch(config, batch, length, seed=i)
        for j, side in enumerate(sides):
            if not DRY:
                torch.cuda.reset_peak_memory_stats()
            seconds = timed(lambda side=side, data=data, j=j: losses[j].append(side(data)), DEVICE)
            if not DRY:  # less what the other sides keep
                peak = torch.cuda.max_memory_allocated() - sum(resident) + resident[j]
                peaks[j] = max(peaks[j], peak)
            if i >= 2:
                times[j].append(seconds)
    flops, tokens = step_flops(config, batch, length), batch * length
    found = []
    for j, side in enumerate(sides):
        seconds = spread(times[j]).median
        found.append({
            "side": side.name,
            "tokens": tokens,
            "seconds": spread(times[j]),
            "tokens_per_s": tokens / seconds,
            "ratio": paired_ratio(times[0], times[j]),
            "tflops": flops / seconds / 1e12,
            "mfu": flops / seconds / peak_rate() if peak_rate() else None,
            "of_gemm": flops / seconds / rates()["gemm"],
            "peak_gb": peaks[j] / 1e9,
            "losses": [loss() for loss in losses[j]],
        })  # fmt: skip
    return found


def fitting(name: str, build: list[Callable[[], Side]], rounds: int) -> list[dict[str, Any]]:
    """As :func:`in_turn`; where memory does not suffice, half the batch for all sides, and so on."""
    config, batch, length = shape_of(name)
    while True:
        try:
            return in_turn(config, batch, length, build, rounds)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        batch //= 2  # outside of the except clause, whose traceback holds on to every tensor
        print(f"shape {name}: out of memory, so {batch} sequences", flush=True)
        free()


def show(name: str, found: list[dict[str, Any]]) -> None:
    rows = []
    for r in found:
        rows.append([
            r["side"], f"{r['tokens']:,}", f"{r['seconds'].median * 1e3:,.1f}", f"{r['tokens_per_s']:,.0f}",
            str(r["ratio"]), f"{r['tflops']:.0f}", f"{r['mfu']:.1%}" if r["mfu"] else "–", f"{r['of_gemm']:.1%}",
            f"{r['peak_gb']:.1f}", f"{r['losses'][0]:.4f}", f"{r['losses'][-1]:.4f}",
        ])  # fmt: skip
    config = shape_of(name)[0]
    count = count_parameters(config)
    print(f"\nshape {name}: {count.total / 1e9:.3f}B parameters, {count.active / 1e9:.3f}B active")
    columns = ("tokens", "ms", "tokens/s", "times as long", "TFLOP/s", "MFU", "of GEMM", "peak GB", "loss 1", "loss n")
    print(markdown(rows, "side", *columns), flush=True)


def steps(options: argparse.Namespace) -> dict[str, Any]:
    out = {}
    for name in ("S", "L"):
        config = shape_of(name)[0]
        for whole in (False, True):
            build = [lambda c=config: Ours(c), lambda c=config, w=whole: Theirs(c, w)]
            key = f"{name}, {'all BF16' if whole else 'autocast'}"
            out[key] = guarded(key, lambda n=name, b=build: fitting(n, b, options.rounds))
            if isinstance(out[key], list):
                show(name, out[key])
    return out


def compiled(options: argparse.Namespace) -> dict[str, Any]:
    out = {}
    for name in ("S", "L"):
        config = shape_of(name)[0]
        if options.left() < 120:
            print(f"shape {name}: no time left")
            continue
        build = [lambda c=config: Ours(c), lambda c=config: Theirs(c, compiled=True)]
        out[name] = guarded(name, lambda n=name, b=build: fitting(n, b, options.rounds))
        if isinstance(out[name], list):
            show(name, out[name])
    return out


# Waiting --------------------------------------------------------------------------------------------------------------


def sync(options: argparse.Namespace) -> dict[str, Any]:
    config, batch, length = shape_of("S")
    side = Ours(config)
    batches = [random_batch(config, batch, length, seed) for seed in range(8)]
    for data in batches[:3]:
        side(data)
    places: collections.Counter[str] = collections.Counter()
    passed: str | None = None
    if not DRY:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                side(batches[3])
            finally:
                torch.cuda.set_sync_debug_mode("default")
        for warning in caught:
            if "synchroniz" in str(warning.message):
                places[f"{Path(warning.filename).name}:{warning.lineno}"] += 1
        try:
            torch.cuda.set_sync_debug_mode("error")
            side(batches[4])
            passed = "passes"
        except RuntimeError as error:
            passed = one_line(error)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] if DRY else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    side.step.optimizer.zero_grad(set_to_none=True)  # the step above may have been cut short
    side(batches[5])
    count = 2
    start = time.perf_counter()
    with profile(activities=activities) as profiler:
        for data in batches[6:]:
            side(data)
        issued = time.perf_counter() - start  # the host is done; the device need not be
        if not DRY:
            torch.cuda.synchronize()
        whole = time.perf_counter() - start
    averages = profiler.key_averages()
    waits = {
        e.key: e.count / count
        for e in averages
        if "Synchronize" in e.key or "Memcpy DtoH" in e.key or e.key in ("aten::item", "aten::_local_scalar_dense")
    }
    time_of = "self_cpu_time_total" if DRY else "self_device_time_total"
    ran = averages  # operators are given their kernels' time too: only the kernels themselves count
    if not DRY:
        ran = [e for e in averages if e.device_type == DeviceType.CUDA and not getattr(e, "is_user_annotation", False)]
    slowest = sorted(ran, key=lambda e: -getattr(e, time_of))
    busy = sum(getattr(e, time_of) for e in ran) / 1e6
    slowest_rows = [
        [e.key[:70], f"{e.count / count:g}", f"{getattr(e, time_of) / count / 1e3:.2f}"] for e in slowest[:20]
    ]
    print(f"set_sync_debug_mode('error'): {passed}; waits at: {dict(places) or 'none'}")
    print(f"profiler, a step: {waits or 'nothing that waits'} (one cudaDeviceSynchronize is the measurement's own)")
    print(f"with the profiler, host done after {issued / whole:.0%} of the time, device busy for {busy / whole:.0%}\n")
    print(markdown(slowest_rows, "kernel", "a step", "ms a step"))
    return {
        "error_mode": passed,
        "places": dict(places),
        "waits": waits,
        "host_share": issued / whole,
        "busy": busy / whole,
        "kernels": [[e.key, e.count / count, getattr(e, time_of) / count / 1e3] for e in slowest[:60]],
    }


# FP8 ------------------------------------------------------------------------------------------------------------------


def fp8(options: argparse.Namespace) -> dict[str, Any]:
    config = shape_of("L")[0]
    found = fitting("L", [lambda: Ours(config, fp8=True), lambda: Ours(config)], options.rounds)
    show("L", found)
    return {"L": found}


def curves(options: argparse.Namespace) -> dict[str, Any]:
    """Bytes of Tiny Shakespeare, the same batches for both sides."""
    config, batch, length = shape_of("S")
    if not DRY:
        config = ModelConfig.model_validate(config.model_dump() | {"vocab_size": 256})
    text = "\n".join(documents("tinyshakespeare")).encode()
    stream = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    schedule = ScheduleConfig(warmup=max(options.steps // 10, 1))
    sides = {"BF16": Ours(config), "FP8": Ours(config, fp8=True)}
    losses: dict[str, list[Callable[[], float]]] = {name: [] for name in sides}
    start, done = time.perf_counter(), 0
    for step in range(options.steps):
        at = torch.randint(len(stream) - length - 1, (batch, 1), generator=generator)
        tokens = stream[at + torch.arange(length + 1)].long()
        data = Batch(tokens, torch.zeros_like(tokens))
        for name, side in sides.items():
            losses[name].append(side(data, learning_rate(step, options.steps, 1e-3, schedule)))
        done += 1
        if step % 10 == 9:
            losses["BF16"][-1]()  # waits, so that the clock counts
            if options.left() < 20:
                break
    read = {name: torch.tensor([loss() for loss in values]) for name, values in losses.items()}
    window = max(done // 20, 1)
    means = {name: values.unfold(0, window, 1).mean(1) for name, values in read.items()}
    apart = (means["FP8"] / means["BF16"] - 1).abs()
    rows = []
    for i in range(0, len(apart), max(len(apart) // 8, 1)):
        rows.append(
            [i + window, *(f"{means[name][i]:.4f}" for name in sides), f"{means['FP8'][i] / means['BF16'][i] - 1:+.2%}"]
        )
    print(markdown(rows, f"after steps (means of {window})", *sides, "FP8 over BF16"))
    print(
        f"\n{done} steps, {time.perf_counter() - start:.0f} s; last means {apart[-1]:.2%} apart, most {apart.max():.2%}"
    )
    return {
        "steps": done,
        "window": window,
        "last_apart": float(apart[-1]),
        "most_apart": float(apart.max()),
        "losses": {name: values.tolist() for name, values in read.items()},
    }


# All of it ------------------------------------------------------------------------------------------------------------


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}"


def guarded(name: str, run: Callable[[], Any]) -> Any:
    """What ``run`` gives; where it fails, a line, and the traceback as the result."""
    try:
        return run()
    except Exception as error:
        print(f"{name}: failed: {one_line(error)}", flush=True)
        result = {"error": traceback.format_exc()}
    finally:
        free()
    return result


def failures(results: dict[str, Any], path: str = "") -> Iterator[str]:
    """Where in ``results`` an error stands, or a kernel's numbers are wrong."""
    for name, result in results.items():
        if isinstance(result, dict):
            if "error" in result or result.get("right") is False:
                yield f"{path}{name}"
            yield from failures(result, f"{path}{name}: ")
        elif isinstance(result, list):
            yield from failures({r["kernel"]: r for r in result if isinstance(r, dict) and "kernel" in r}, f"{path}")


# Seconds that each takes at least on an H200, so that one is left out rather than cut short.
SECTIONS: dict[str, tuple[Callable[[argparse.Namespace], Any], float]] = {
    "machine": (machine, 0),
    "kernels": (kernels, 20),
    "steps": (steps, 60),
    "sync": (sync, 20),
    "fp8": (fp8, 30),
    "curves": (curves, 40),
    "compiled": (compiled, 120),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--minutes", type=float, default=9.0, help="No section is begun that would take longer in all.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=200, help="Of the loss curves; 1000 for the full proof.")
    parser.add_argument("--dry-run", action="store_true", help="Tiny, on a CPU.")
    options = parser.parse_args()
    if DRY and os.environ.get("TRITON_INTERPRET") != "1":  # must be there before anything imports triton: start anew
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"TRITON_INTERPRET": "1"})
    if DRY:
        options.rounds, options.steps = 2, min(options.steps, 6)
    elif not torch.cuda.is_available():
        parser.error("no GPU here; --dry-run runs it tiny on a CPU")
    start = time.perf_counter()
    options.left = lambda: options.minutes * 60 - (time.perf_counter() - start)
    results: dict[str, Any] = {}
    for name, (run, least) in SECTIONS.items():
        if name not in options.sections:
            continue
        began = time.perf_counter()
        print(f"\n## {name}\n", flush=True)
        if not DRY and options.left() < least:
            print(f"{name}: left out, {options.left():.0f} s are too few")
            results[name] = {"error": "no time left"}
        else:
            results[name] = guarded(name, lambda run=run: run(options))
        print(f"\n({name}: {time.perf_counter() - began:.0f} s)", flush=True)
        if options.json:  # after each, so that what is there already survives
            options.json.write_text(json.dumps(results, indent=2, default=as_json))
    failed = list(failures(results))
    print(f"\nfailed or left out: {', '.join(failed) or 'none'}")


if __name__ == "__main__":
    main()
