"""Decoding on a GPU: each kernel checked and timed, then the engine at batch 1 on the V2-Lite shape.

    python benchmarks/gpu_decoding.py [--json FILE] [--sections kernels engine …] [--minutes 9] [--steps 64] [--dry-run]

Sections, in this order; one that fails says so in a line, and the others go on:

- machine: what it is; how fast its memory is read and copied
- kernels: those of kernels/decode_gpu.py at V2-Lite's sizes in BF16, beside float64 and beside PyTorch; times are of a
  CUDA graph that holds one call, between CUDA events, after the L2 cache was overwritten; bytes are those that must be
  read, each once. Block tables are as wide as needed ("fit") or as wide as a captured step has them ("wide").
- engine: `abyssal.Engine` at batch 1 with random BF16 weights: median of --steps greedy steps, by the host's clock, at
  each context; which share that is of what the memory allows (weights that a token uses and its cache, read once), by
  the read rate measured here and by the vendor's figure
- transformers: the same weights, a forward call and an argmax a step, with its fastest experts (not compiled)

--dry-run runs all of it tiny on a CPU, kernels in Triton's interpreter: its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu import BF16, DEVICE, DRY, distance, failures, free, guarded, nbytes, one_line
from machine import as_json, bandwidth, describe_machine, markdown, spread, synchronize, timed
from torch import Tensor

from abyssal import Engine, ModelConfig, Sampling, Transformer, preset
from abyssal.analysis.parameters import count_parameters
from abyssal.config import to_published
from abyssal.data.tokenizer import byte_tokenizer
from abyssal.kernels import decode, decode_gpu, gpu
from abyssal.model.cache import cached_shapes

VENDOR = {"H200": 4.8e12, "H100": 3.35e12, "A100": 2.04e12}  # bytes/s of memory by the vendor's datasheet
PAGE = 16 if DRY else 64
CONTEXTS = (20, 40) if DRY else (128, 1024, 4096)


def machine(options: argparse.Namespace) -> dict[str, Any]:
    found = describe_machine(DEVICE, BF16)
    rates = bandwidth(DEVICE, 2**20 if DRY else 2**33, 0.01 if DRY else 0.5)
    found |= {f"{name}_gb_s": rate / 1e9 for name, rate in rates.items()}
    found["vendor_gb_s"] = None if DRY else next((r / 1e9 for card, r in VENDOR.items() if card in str(found)), None)
    for key, value in found.items():
        print(f"{key}: {value}")
    options.read = rates["read"]
    options.vendor = found["vendor_gb_s"]
    return found


# Kernels --------------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """``ours``; ``exact``, the same in float64; ``plain``, PyTorch's own way.

    ``moved``: bytes that must be read and written.
    """

    name: str
    ours: Callable[[], Tensor]
    exact: Callable[[], Tensor]
    plain: Callable[[], Tensor]
    moved: int


def normal(*size: int) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(sum(size))
    return torch.randn(*size, generator=generator, device=DEVICE, dtype=torch.float32).to(BF16)


def attention_cases() -> list[Case]:
    heads, latent, rope = (4, 32, 8) if DRY else (16, 512, 64)
    out = []
    cells = (
        ((1, 20), (2, 40)) if DRY else ((1, 128), (1, 1024), (1, 4096), (8, 1024), (8, 4096), (32, 1024), (1, 65536))
    )
    for n, context in cells:
        each = -(-context // PAGE)
        order = torch.randperm(n * each, generator=torch.Generator().manual_seed(0)).int().view(n, each).to(DEVICE)
        lengths = torch.full((n,), context, dtype=torch.int32, device=DEVICE)
        pool, q = normal(n * each, PAGE, latent + rope), normal(n, heads, latent + rope)
        keys = pool[order.long()].flatten(1, 2)[:, :context]  # [n, context, C + R]

        def exact(q: Tensor = q, keys: Tensor = keys) -> Tensor:
            keys = keys.double()
            return (q.double() @ keys.transpose(1, 2) * 0.05).softmax(-1) @ keys[..., :latent]

        def plain(q: Tensor = q, keys: Tensor = keys) -> Tensor:  # keys lie side by side already
            return F.scaled_dot_product_attention(
                q.unsqueeze(2).transpose(1, 2), keys.unsqueeze(1), keys.unsqueeze(1), scale=0.05
            )[..., 0, :, :latent]

        for width in (each, max(each, 12 if DRY else 2560)):
            table = torch.zeros(n, width, dtype=torch.int32, device=DEVICE)
            table[:, :each] = order

            def ours(q: Tensor = q, pool: Tensor = pool, table: Tensor = table, lengths: Tensor = lengths) -> Tensor:
                return decode_gpu.latent_attention(q, pool, table, lengths, 0.05, latent)

            kind = "fit" if width == each else "wide"
            moved = n * context * (latent + rope) * 2 + 2 * nbytes(q)
            out.append(Case(f"latent attention, {n} × {context}, {kind}", ours, exact, plain, moved))
    return out


def multi_head_cases() -> list[Case]:
    heads, size, context = (2, 16, 40) if DRY else (16, 128, 4096)
    pages = -(-context // PAGE)
    keys, values, q = normal(pages, PAGE, heads, size), normal(pages, PAGE, heads, size) + 1, normal(1, heads, size)
    table = torch.arange(pages, dtype=torch.int32, device=DEVICE).view(1, pages)
    lengths = torch.full((1,), context, dtype=torch.int32, device=DEVICE)
    k, v = (x.flatten(0, 1)[:context].transpose(0, 1).unsqueeze(0) for x in (keys, values))
    return [
        Case(
            f"paged attention, 1 × {context}",
            lambda: decode_gpu.paged_attention(q, keys, values, table, lengths, 0.1),
            lambda: ((q.double().unsqueeze(2) @ k.double().mT * 0.1).softmax(-1) @ v.double()).squeeze(2),
            lambda: F.scaled_dot_product_attention(q.unsqueeze(2), k, v, scale=0.1).squeeze(2),
            nbytes(k, v, q, q),
        )
    ]


def expert_cases() -> list[Case]:
    hidden, width, experts, k = (32, 16, 4, 2) if DRY else (2048, 1408, 64, 6)
    gate_up, down = normal(experts, 2 * width, hidden) / hidden**0.5, normal(experts, hidden, width) / width**0.5
    out = []
    for n in (1, 3) if DRY else (1, 2, 4, 8, 16, 32):
        generator = torch.Generator().manual_seed(n)
        indices = torch.rand(n, experts, generator=generator).topk(k).indices.to(DEVICE)
        weights, x = torch.rand(n, k, generator=generator).to(DEVICE), normal(n, hidden)
        plainly = decode.Experts(gate_up, down)._routed

        def ours(x: Tensor = x, indices: Tensor = indices, weights: Tensor = weights) -> Tensor:
            return decode_gpu.experts(x, indices, weights, gate_up, down)

        def exact(x: Tensor = x, indices: Tensor = indices, weights: Tensor = weights) -> Tensor:
            total = torch.zeros_like(x, dtype=torch.float64)
            for row in range(len(x)):
                for choice, expert in enumerate(indices[row].tolist()):
                    gate, up = (gate_up[expert].double() @ x[row].double()).chunk(2)
                    total[row] += weights[row, choice] * (down[expert].double() @ (F.silu(gate) * up))
            return total

        def plain(
            x: Tensor = x, indices: Tensor = indices, weights: Tensor = weights, way: Callable[..., Tensor] = plainly
        ) -> Tensor:
            return way(x, indices, weights)

        moved = len(indices.unique()) * 3 * width * hidden * 2 + 2 * nbytes(x)
        out.append(Case(f"experts, {n} rows", ours, exact, plain, moved))
    return out


def linear_cases() -> list[Case]:
    out = []
    for outputs, inputs in ((24, 32),) if DRY else ((576, 2048), (3072, 2048), (2048, 2816), (102400, 2048)):
        weight = normal(outputs, inputs) / inputs**0.5
        for n in (1, 3) if DRY else (1, 2, 4, 8):
            x = normal(n, inputs)
            out.append(
                Case(
                    f"linear, {n} × {inputs} → {outputs}",
                    lambda x=x, weight=weight: decode_gpu.linear(x, weight),
                    lambda x=x, weight=weight: x.double() @ weight.double().t(),
                    lambda x=x, weight=weight: F.linear(x, weight),
                    nbytes(weight, x) + n * outputs * 2,
                )
            )
    return out


def seconds_of(call: Callable[[], Any], rounds: int = 30) -> float:
    """Median of a captured call that finds nothing in the cache; of the call as it is where it waits for the device,
    which a graph cannot."""
    if DRY:
        return timed(call, DEVICE)
    again: Callable[[], Any] = call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    if not waits(call):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        again = graph.replay
    spoil = torch.empty(2**29, dtype=torch.uint8, device=DEVICE)  # writing it takes longer than the host needs
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for start, end in events:
        spoil.zero_()
        start.record()
        again()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


def waits(call: Callable[[], Any]) -> bool:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def kernels(options: argparse.Namespace) -> dict[str, Any]:
    if not gpu.supports(torch.zeros(1, device=DEVICE)):
        raise RuntimeError("no Triton kernels here")
    found: list[dict[str, Any]] = []
    rows = []
    for make in (attention_cases, multi_head_cases, expert_cases, linear_cases):
        for case in make():
            try:
                r = check(case, options)
            except Exception as error:
                found.append({"kernel": case.name, "right": False, "error": one_line(error)})
                rows.append([case.name, one_line(error), *[""] * 5])
                continue
            found.append(r)
            rows.append([
                case.name, "right" if r["right"] else "WRONG", f"{r['error_norm']:.1e}", f"{r['seconds'] * 1e6:,.1f}",
                f"{r['plain_seconds'] * 1e6:,.1f}", f"{r['bytes'] / 1e6:,.1f}",
                f"{r['rate'] / 1e9:,.0f} ({r['share']:.0%})",
            ])  # fmt: skip
        free()
    print(markdown(rows, "kernel", "numbers", "error", "µs", "PyTorch's µs", "MB", "GB/s (of the read rate)"))
    return {"kernels": found}


def check(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    exact = case.exact()
    error = distance(case.ours(), exact)
    # The result is rounded to BF16, and so are attention's weights and what PyTorch has between two products.
    right = error <= (2.0**-7 if DRY else 2.0**-8)
    seconds = seconds_of(case.ours)
    usual = distance(case.plain(), exact)
    assert usual <= 0.02, f"PyTorch's own result is off by {usual:.1e}"
    plain = seconds_of(case.plain)
    rate = case.moved / seconds
    return {
        "kernel": case.name,
        "right": right,
        "error_norm": error,
        "seconds": seconds,
        "plain_seconds": plain,
        "bytes": case.moved,
        "rate": rate,
        "share": rate / options.read,
    }


# The engine -----------------------------------------------------------------------------------------------------------


def lite() -> ModelConfig:
    config = preset("deepseek-v2-lite")
    if not DRY:
        return config
    settings = config.model_dump()
    settings |= {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 1}
    settings |= {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 64}
    settings["attention"] |= {"num_attention_heads": 2, "kv_lora_rank": 32, "qk_nope_head_dim": 16}
    settings["attention"] |= {"qk_rope_head_dim": 8, "v_head_dim": 16}
    settings["moe"] |= {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return ModelConfig.model_validate(settings)


def build(options: argparse.Namespace) -> Transformer:
    """Once; what comes after shares it."""
    if options.model is None:
        with torch.device(DEVICE):
            made = Transformer(lite(), generator=torch.Generator(DEVICE).manual_seed(0))
        options.model = made.to(BF16).eval().requires_grad_(False)
        free()
    return options.model


def prompt_of(context: int, vocabulary: int) -> list[int]:
    return torch.randint(2, vocabulary, (context,), generator=torch.Generator().manual_seed(context)).tolist()


def told(name: str, context: int, times: list[float], prefill: float, options: argparse.Namespace) -> dict[str, Any]:
    config = options.model.config
    weights = 2 * count_parameters(config).active_without_embedding
    values = sum(int(torch.tensor(shape).prod()) for shape in cached_shapes(config))
    moved = weights + 2 * values * config.num_hidden_layers * (context + len(times) // 2)
    median = statistics.median(times)
    return {
        "side": name,
        "context": context,
        "step": spread(times),
        "tokens_s": 1 / median,
        "prefill": prefill,
        "bytes": moved,
        "share_read": moved / median / options.read,
        "share_vendor": None if options.vendor is None else moved / median / (options.vendor * 1e9),
    }


def show(found: list[dict[str, Any]]) -> dict[str, Any]:
    rows = []
    for r in found:
        step = r["step"]
        vendor = "–" if r["share_vendor"] is None else f"{r['share_vendor']:.0%}"
        rows.append([
            r["context"], f"{step.median * 1e3:.2f} ({step.low * 1e3:.2f}–{step.high * 1e3:.2f})",
            f"{r['tokens_s']:.0f}", f"{r['bytes'] / 1e9:.2f}", f"{r['share_read']:.0%}", vendor,
            f"{r['prefill'] * 1e3:.0f}",
        ])  # fmt: skip
    columns = ("context", "ms a step (quartiles)", "tokens/s", "GB a step", "of the read rate", "of the vendor's")
    print(markdown(rows, *columns, "prompt, ms"))
    return {str(r["context"]): r for r in found}


def engine(options: argparse.Namespace) -> dict[str, Any]:
    model, rows = build(options), []
    for context in CONTEXTS:
        pages = -(-(context + options.steps + 16) // PAGE)
        engine = Engine(
            model, byte_tokenizer(), pages=pages, page=PAGE, chunk=max(context, 2), prefix_cache=False, drafts=0
        )
        engine.ends = frozenset()  # random weights would end a text anywhere
        engine.add(prompt_of(context, 258), Sampling(max_new_tokens=options.steps + 8, temperature=0))

        def step(engine: Engine = engine) -> float:
            """Until the step's tokens are there."""
            start = time.perf_counter()
            while not any(event.tokens for event in engine.step()):
                assert engine.busy, "the sequence ended"
            return time.perf_counter() - start

        synchronize(DEVICE)
        prefill = step()
        for _ in range(4):  # compiles, and captures what is captured
            step()
        rows.append(told("abyssal", context, [step() for _ in range(options.steps)], prefill, options))
        del engine
        free()
    return show(rows)


def theirs(options: argparse.Namespace) -> dict[str, Any]:
    import transformers

    transformers.logging.set_verbosity_error()
    ours = build(options)
    config = transformers.DeepseekV2Config.from_dict(to_published(ours.config))
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        model = transformers.DeepseekV2ForCausalLM(config)
    missing, unexpected = model.load_state_dict(ours.state_dict(), strict=False, assign=True)  # no second copy
    assert not [*missing, *unexpected], (missing[:3], unexpected[:3])
    with torch.device(DEVICE):  # its one buffer that is in no file
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.eval()
    rows = []
    with torch.inference_mode():
        for context in CONTEXTS:
            ids = torch.tensor([prompt_of(context, 258)], device=DEVICE)
            cache: Any = transformers.DynamicCache(config=config)
            token, times = ids, []
            for _ in range(options.steps + 5):
                synchronize(DEVICE)
                start = time.perf_counter()
                out = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
                token = out.logits[:, -1:].argmax(-1)
                token.item()
                times.append(time.perf_counter() - start)
            rows.append(told("transformers", context, times[5:], times[0], options))
            del cache
            free()
    return show(rows)


# All of it ------------------------------------------------------------------------------------------------------------

# Seconds that each takes at least on an H200, so that one is left out rather than cut short.
SECTIONS: dict[str, tuple[Callable[[argparse.Namespace], Any], float]] = {
    "machine": (machine, 0),
    "kernels": (kernels, 60),
    "engine": (engine, 60),
    "transformers": (theirs, 30),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--minutes", type=float, default=9.0, help="No section is begun that would take longer in all.")
    parser.add_argument("--steps", type=int, default=64, help="Of decoding, at each context.")
    parser.add_argument("--dry-run", action="store_true", help="Tiny, on a CPU.")
    options = parser.parse_args()
    if DRY and os.environ.get("TRITON_INTERPRET") != "1":  # must be there before anything imports triton: start anew
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"TRITON_INTERPRET": "1"})
    if DRY:
        options.steps = min(options.steps, 3)
    elif not torch.cuda.is_available():
        parser.error("no GPU here; --dry-run runs it tiny on a CPU")
    start = time.perf_counter()
    options.model = None
    results: dict[str, Any] = {}
    for name, (run, least) in SECTIONS.items():
        if name not in options.sections and name != "machine":  # the shares refer to its rates
            continue
        began = time.perf_counter()
        left = options.minutes * 60 - (began - start)
        print(f"\n## {name}\n", flush=True)
        if not DRY and left < least:
            print(f"{name}: left out, {left:.0f} s are too few")
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
