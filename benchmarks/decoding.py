"""Decoding beside transformers and llama.cpp: same weights, sides in turn in one run.

    python benchmarks/decoding.py [--shapes M demo] [--model RUN] [--batches 1 8] [--contexts 128 1024 4096]
                                  [--rounds 3] [--steps 16] [--sides …] [--memory-roofline] [--apart] [--json FILE]
    python benchmarks/decoding.py --mtp RUN [--rounds 5]

Sides: ``abyssal.Engine`` in BF16, int8 and int4; transformers in BF16 with its fastest experts and cache; llama.cpp
through llama-cpp-python in BF16 and q8_0, with flash attention or without, whichever is faster (benchmarks/llama.py).
The weights are random ones of the shape, or those of ``--model``, exported once by abyssal.export; every side reads
that folder or a GGUF file made from it. Which setting of a side is its fastest is tried out before, at each batch size.

Each side lives in a process of its own, with the same number of threads, and only one of them works at a time. A round
asks every side for one timing of each cell, one side after the other; what is told is the median of the rounds with
quartiles, ratios are of timings in one round. A timing at context C: caches that hold C tokens a sequence (different
ones, computed once before), a step that warms up, and the median of ``--steps`` greedy steps. The engine does all that
a step does there (scheduling, drawing, text); the loops of the others are a forward call and an argmax. Prefill is a
prompt of 1024 tokens up to its next token. Bytes of cache a token are those of the tensors that hold it.

Before anything is timed, every side continues a prompt of 48 tokens greedily; its tokens are judged by the plain BF16
forward pass of abyssal's model over the same text: how often the token is the likeliest, and by how many standard
deviations of the logits a chosen one is behind the likeliest at worst. A side that computes another model is not timed.

``--memory-roofline`` measures how fast this machine's memory is read in the same rounds (the best of several ways), and
tells which share of it a side reaches: the bytes that abyssal reads in such a step with weights of that many bits
(active weights, experts counted as they are hit, and the caches) over the time. ``--apart`` ends each process after its
turn, so that only one side is in memory at a time; it takes as much longer as loading and computing caches takes.
``--mtp`` decodes a trained run at batch 1 with and without drafts of its own MTP modules, greedily and at
temperature 1. Contexts may go beyond max_position_embeddings: time does not depend on it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

import tokenizers
import torch
from machine import Spread, as_json, describe_machine, markdown, paired_ratio, spread
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

from abyssal import Engine, RoutingRecorder, Sampling, Transformer, export, load
from abyssal.data.corpus import documents
from abyssal.data.tokenizer import BOS, CHARACTER_OF, EOS, Tokenizer
from abyssal.errors import UserError
from abyssal.kernels import decode
from abyssal.training.hardware import limit_threads
from training import SHAPES, shape

CPU = torch.device("cpu")
PREFILL, CHECK, CONTINUED = 1024, 48, 24
ALIKE = {  # the side of ours whose weights have as many bits
    "transformers": "abyssal BF16",
    "llama.cpp BF16": "abyssal BF16",
    "llama.cpp q8_0": "abyssal int8",
}
FILES = {"llama.cpp BF16": "bf16", "llama.cpp q8_0": "q8_0"}
NEEDS = {"transformers": ("transformers",), **dict.fromkeys(FILES, ("llama_cpp_python", "gguf"))}


@dataclass(frozen=True)
class Job:
    """What all sides are given."""

    folder: Path
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    steps: int
    threads: int
    repack: frozenset[str] = field(default_factory=frozenset)
    """Sides of llama.cpp that may lay weights out anew."""

    @property
    def room(self) -> int:
        """Tokens that a sequence may come to."""
        return max(*self.contexts, PREFILL, CHECK + CONTINUED) + self.steps + 8

    def prompts(self) -> list[list[int]]:
        out: list[list[int]] = json.loads((self.folder / "prompts.json").read_text())
        return out


class Side(Protocol):
    """One way to decode. ``option`` is one of ``options`` (of ``prefills`` for prefill)."""

    options: Sequence[str]
    prefills: Sequence[str]

    def greedy(self, prompt: list[int], count: int) -> list[int]: ...
    def prefill(self, option: str) -> float: ...
    def decode(self, batch: int, context: int, steps: int, option: str) -> list[float]: ...
    def cache_bytes(self) -> float: ...


class Ours:
    """abyssal.Engine; ``weights`` as abyssal.load takes them."""

    options = prefills = ("",)

    def __init__(self, job: Job, weights: str) -> None:
        model, tokenizer = load(job.folder / "model", dtype=torch.bfloat16, weights=weights)  # type: ignore[arg-type]
        assert tokenizer is not None
        self.job, self.model, self.prompts = job, model, job.prompts()
        page = 64
        pages = max(job.batches) * (-(-job.room // page) + 1)
        self.engine = Engine(model, tokenizer, pages=pages, page=page, chunk=2048, drafts=0)
        self.fresh = Engine(
            model, tokenizer, pages=-(-job.room // page) + 1, page=page, chunk=2048, drafts=0, prefix_cache=False
        )
        self.engine.ends = self.fresh.ends = frozenset()  # a step is a step, whatever the text says
        self.filled = False

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        sequence = self.fresh.add(prompt, Sampling(temperature=0, max_new_tokens=count))
        while self.fresh.busy:
            self.fresh.step()
        return sequence.new

    def prefill(self, option: str) -> float:
        self.fresh.add(self.prompts[0][:PREFILL], Sampling(temperature=0, max_new_tokens=1))
        start = time.perf_counter()
        while self.fresh.busy:
            self.fresh.step()
        return time.perf_counter() - start

    def decode(self, batch: int, context: int, steps: int, option: str, recorder: Any = None) -> list[float]:
        if not self.filled:  # what is computed here is found again below
            for prompt in self.prompts:
                self.engine.add(prompt[: max(self.job.contexts)], Sampling(temperature=0, max_new_tokens=2))
                while self.engine.busy:
                    self.engine.step()
            self.filled = True
        sampling = Sampling(temperature=0, max_new_tokens=steps + 4)
        sequences = [self.engine.add(prompt[:context], sampling) for prompt in self.prompts[:batch]]
        while any(s.computed < context for s in sequences):
            self.engine.step()
        self.engine.step()
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            self.engine.step()
            times.append(time.perf_counter() - start)
        if recorder is not None:
            self.engine.step(recorder)
        assert all(s.finished is None for s in sequences)
        for s in sequences:
            self.engine.cancel(s)
        return times

    def cache_bytes(self) -> float:
        return self.engine.metrics.bytes_a_token

    def judge(self, prompt: list[int], tokens: list[int]) -> tuple[float, float]:
        """Of ``tokens`` behind ``prompt``: share that are the likeliest, and how far one is behind it at worst, in
        standard deviations of the logits; by the plain forward pass."""
        with torch.inference_mode():
            logits = self.model(torch.tensor([prompt + tokens]))[0, len(prompt) - 1 : -1].float()
        best, chosen = logits.amax(-1), logits.gather(-1, torch.tensor(tokens).unsqueeze(-1)).squeeze(-1)
        return (chosen == best).float().mean().item(), ((best - chosen) / logits.std(-1)).max().item()

    def bytes_read(self, batch: int, context: int) -> float:
        """Bytes of weights and caches that a step reads."""
        recorder = RoutingRecorder()
        self.decode(batch, context, 1, "", recorder)
        head = self.model.lm_head
        total = float(sum(x.nbytes for x in (*head.parameters(), *head.buffers())))
        for number, block in enumerate(self.model.blocks):
            for name, x in (*block.named_parameters(), *block.named_buffers()):
                share = 1.0
                if name.startswith("mlp.experts."):
                    (routing,) = recorder.routings[number]
                    share = len(routing.indices.unique()) / routing.scores.shape[-1]
                total += share * x.nbytes
        return total + batch * (context + 2) * self.cache_bytes()


class Theirs:
    """transformers. An option is how it multiplies experts, and what cache it keeps."""

    def __init__(self, job: Job) -> None:
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.caches = {"dynamic": transformers.DynamicCache, "static": transformers.StaticCache}
        self.model = transformers.AutoModelForCausalLM.from_pretrained(job.folder / "model", dtype=torch.bfloat16)
        self.model.eval()
        self.job, self.prompts = job, job.prompts()
        # batched_mm copies each token's experts: the fewest bytes for one token, 13 GB for a prompt of shape M.
        self.prefills = ["grouped_mm", "eager"]
        self.options = [f"{e}, {c}" for e, c in product(("grouped_mm", "batched_mm", "eager"), self.caches)]
        self.past: list[tuple[Tensor, Tensor]] = []

    def _forward(self, tokens: list[list[int]], cache: Any) -> Tensor:
        out = self.model(torch.tensor(tokens), past_key_values=cache, use_cache=True, logits_to_keep=1)
        chosen: Tensor = out.logits[:, -1].argmax(-1)
        return chosen

    def _cache(self, kind: str, length: int) -> Any:
        settings = {"max_cache_len": length} if kind == "static" else {}
        return self.caches[kind](config=self.model.config, **settings)

    @torch.inference_mode()
    def greedy(self, prompt: list[int], count: int) -> list[int]:
        self.model.set_experts_implementation("grouped_mm")
        cache, tokens = self._cache("dynamic", 0), prompt
        out: list[int] = []
        for _ in range(count):
            tokens = self._forward([tokens], cache).tolist()
            out += tokens
        return out

    @torch.inference_mode()
    def prefill(self, option: str) -> float:
        self.model.set_experts_implementation(option)
        start = time.perf_counter()
        self._forward([self.prompts[0][:PREFILL]], self._cache("dynamic", 0)).tolist()
        return time.perf_counter() - start

    @torch.inference_mode()
    def decode(self, batch: int, context: int, steps: int, option: str) -> list[float]:
        if not self.past:
            self.past = self._fill()
        experts, kind = option.split(", ")
        self.model.set_experts_implementation(experts)
        cache = self._cache(kind, context + steps + 1)
        for layer, (k, v) in enumerate(self.past):
            cache.update(k[:batch, :, :context].clone(), v[:batch, :, :context].clone(), layer)
        tokens = [[prompt[context]] for prompt in self.prompts[:batch]]
        times = []
        for _ in range(steps + 1):
            start = time.perf_counter()
            tokens = self._forward(tokens, cache).unsqueeze(1).tolist()
            times.append(time.perf_counter() - start)
        return times[1:]

    def _fill(self) -> list[tuple[Tensor, Tensor]]:
        """Every layer's two tensors, [prompts, ., tokens, .]."""
        self.model.set_experts_implementation("grouped_mm")
        filled = []
        for prompt in self.prompts:
            cache = self._cache("dynamic", 0)
            self._forward([prompt[: max(self.job.contexts)]], cache)
            filled.append([(layer.keys, layer.values) for layer in cache.layers])
        return [
            (torch.cat([k for k, _ in sequences]), torch.cat([v for _, v in sequences]))
            for sequences in zip(*filled, strict=True)
        ]

    @torch.inference_mode()
    def cache_bytes(self) -> float:
        cache = self._cache("dynamic", 0)
        self._forward([self.prompts[0][:CHECK]], cache)
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) / CHECK


class LlamaCpp:
    """llama.cpp on a GGUF file. Contexts are filled once, their state kept, and put back before each timing."""

    options = prefills = ("plain attention", "flash attention")

    def __init__(self, job: Job, name: str) -> None:
        from llama import Context, Llama

        self.job, self.prompts = job, job.prompts()
        self.llama = Llama(job.folder / f"{FILES[name]}.gguf", job.threads, repack=name in job.repack)
        self.open: tuple[str, Context] | None = None
        self.states: dict[tuple[str, int], dict[int, bytes]] = {}  # by context; flash attention wants its own

    def _context(self, option: str) -> Any:
        """An empty one, with a stream for every sequence: a state goes only where there are as many. One at a time."""
        if self.open is None or self.open[0] != option:
            if self.open is not None:
                self.open[1].close()
            made = self.llama.context(max(self.job.batches), self.job.room, flash=option == "flash attention")
            self.open = option, made
        self.open[1].clear()
        return self.open[1]

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        context, tokens = self._context(self.options[0]), prompt
        out: list[int] = []
        for _ in range(count):
            tokens = [int(context.fill(tokens, 0, len(prompt) + len(out) - len(tokens)).argmax())]
            out += tokens
        return out

    def prefill(self, option: str) -> float:
        context = self._context(option)
        start = time.perf_counter()
        context.fill(self.prompts[0][:PREFILL], 0).argmax()
        return time.perf_counter() - start

    def decode(self, batch: int, context: int, steps: int, option: str) -> list[float]:
        on = self._context(option)
        states = [self._state(on, option, number, context) for number in range(batch)]
        on.clear()
        for sequence, state in enumerate(states):
            on.restore(state, sequence)
        tokens = [prompt[context] for prompt in self.prompts[:batch]]
        times = []
        for step in range(steps + 1):
            start = time.perf_counter()
            rows = on.run([(token, context + step, s) for s, token in enumerate(tokens)], range(batch))
            tokens = rows.argmax(-1).tolist()
            times.append(time.perf_counter() - start)
        return times[1:]

    def _state(self, on: Any, option: str, number: int, context: int) -> bytes:
        """What ``on`` holds behind so many tokens of a prompt; computed the first time, from the longest before it."""
        known = self.states.setdefault((option, number), {})
        if context not in known:
            on.clear()
            start = max((c for c in known if c < context), default=0)
            if start:
                on.restore(known[start], 0)
            on.fill(self.prompts[number][start:context], 0, start)
            known[context] = on.save(0)
        return known[context]

    def cache_bytes(self) -> float:
        return self._context(self.options[0]).cache_bytes


SIDES: dict[str, Callable[[Job], Any]] = {
    "abyssal BF16": lambda job: Ours(job, "dense"),
    "abyssal int8": lambda job: Ours(job, "int8"),
    "abyssal int4": lambda job: Ours(job, "int4"),
    "transformers": Theirs,
    "llama.cpp BF16": lambda job: LlamaCpp(job, "llama.cpp BF16"),
    "llama.cpp q8_0": lambda job: LlamaCpp(job, "llama.cpp q8_0"),
}

_here: Any = None  # the side that this process is


def _begin(name: str, job: Job) -> None:
    global _here
    torch.set_num_threads(job.threads)
    _here = SIDES[name](job)


def _ask(method: str, arguments: tuple[Any, ...]) -> Any:
    value = getattr(_here, method)
    return value(*arguments) if callable(value) else value


def _mute() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


class Process:
    """A side in a process of its own, made when it is first asked; ``leave`` ends it. ``mute``: without stderr."""

    def __init__(self, name: str, job: Job, *, mute: bool = False) -> None:
        self.name, self.job, self.mute = name, job, mute
        self.pool: ProcessPoolExecutor | None = None

    def ask(self, method: str, *arguments: Any) -> Any:
        if self.pool is None:
            self.pool = ProcessPoolExecutor(
                1, mp_context=get_context("spawn"), initializer=_mute if self.mute else None
            )
            self.pool.submit(_begin, self.name, self.job).result()
        return self.pool.submit(_ask, method, arguments).result()

    def leave(self) -> None:
        if self.pool is not None:
            self.pool.shutdown()
            self.pool = None


def filler_tokenizer(size: int) -> Tokenizer:
    """A token a byte, and words that no text is made of up to ``size``: random weights have all ids, so that no side
    may leave any out."""
    names = [BOS, EOS, *(CHARACTER_OF[byte] for byte in range(256))]
    names += ["".join(word) for word in product("abcdefghijklmnopqrstuvwxyzABCDEF", repeat=3)]
    backend = tokenizers.Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names[:size])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, BOS, EOS)


def corpus_ids(tokenizer: Tokenizer) -> list[int]:
    """The demo's corpus."""
    return tokenizer.encode("\n".join(documents("tinyshakespeare")))


def write_files(job: Job, name: str, run: Path | None, kinds: Sequence[str]) -> dict[str, Any]:
    """Everything that sides read, in ``job.folder``: the exported model, GGUF files, prompts. A model
    that is there stays."""
    if run is None:
        config, _, _ = shape(name)
        tokenizer = filler_tokenizer(config.vocab_size)
    else:
        found, own = load(run, dtype=torch.bfloat16)
        config, model = found.config, found
        if own is None:
            raise UserError(f"{run}: has no tokenizer")
        tokenizer = own
    count, length = max(job.batches), job.room
    if run is None:
        generator = torch.Generator().manual_seed(1)
        prompts = torch.randint(2, config.vocab_size, (count, length), generator=generator).tolist()
    else:
        ids = corpus_ids(tokenizer)
        prompts = [ids[i * (len(ids) - length) // count :][:length] for i in range(count)]
    (job.folder / "prompts.json").write_text(json.dumps(prompts))
    if not (job.folder / "model").is_dir():
        if run is None:
            model = Transformer(config, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
        positions = max(config.max_position_embeddings, 2**17)
        model.config = config.model_copy(update={"max_position_embeddings": positions})
        export(model, job.folder / "model", tokenizer=tokenizer)
    else:
        model, _ = load(job.folder / "model", dtype=torch.bfloat16)
    for kind in kinds:
        if not (file := job.folder / f"{kind}.gguf").is_file():
            from llama import write_gguf

            write_gguf(model, file, kind)
    parameters = sum(x.numel() for x in model.parameters())
    return {"shape": name, "parameters": parameters}


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(*arguments)`` in a process of its own, whose memory is free again behind it."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def try_repacking(name: str, job: Job) -> str | None:
    """Why llama.cpp's own layouts of weights cannot be used for a side; None: they can."""
    process = Process(name, replace(job, repack=frozenset([name])), mute=True)
    try:
        process.ask("greedy", job.prompts()[0][:CHECK], 4)
    except BrokenProcessPool:
        return "crashes"
    except (UserError, RuntimeError) as error:
        return str(error)
    finally:
        process.leave()
    return None


# how fast memory is read


class Memory:
    """Reads a buffer that no cache holds, in several ways."""

    def __init__(self, nbytes: int = 2**29) -> None:
        self.x = torch.ones(nbytes // 2**13, 2**12, dtype=torch.bfloat16)
        self.row = torch.ones(1, 2**12, dtype=torch.bfloat16)
        self.linear = decode.Linear(self.x)
        self.threads = torch.get_num_threads()
        self.pool = ThreadPoolExecutor(self.threads)
        self.find = ctypes.CDLL(None).memchr
        self.find.argtypes, self.find.restype = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t), ctypes.c_void_p

    def _search(self) -> None:
        """For a byte that is not there: one load a cache line and nothing to compute. ctypes lets other threads run."""
        part = self.x.nbytes // self.threads
        first = self.x.data_ptr()
        list(self.pool.map(lambda i: self.find(first + i * part, 0xEE, part), range(self.threads)))

    def rate(self, seconds: float = 0.3) -> float:
        """Bytes/s, the best of all ways."""
        best = float("inf")
        with torch.inference_mode():
            for call in (self._search, lambda: self.x.view(torch.float32).sum(), lambda: self.linear(self.row)):
                until = time.perf_counter() + seconds
                while time.perf_counter() < until:
                    start = time.perf_counter()
                    call()
                    best = min(best, time.perf_counter() - start)
        return self.x.nbytes / best


# the comparison


def check(texts: dict[str, list[int]], judge: Process, prompt: list[int]) -> dict[str, tuple[float, float]]:
    """How each side's greedy text is judged. Ends the run where one computes another model."""
    out = {name: judge.ask("judge", prompt, tokens) for name, tokens in texts.items()}
    for name, (same, behind) in out.items():
        print(f"  {name}: {same:.0%} of its tokens are the likeliest, at worst {behind:.3f} behind", flush=True)
        if same < 0.3 and behind > 1:
            raise SystemExit(f"{name} does not compute the same model")
    return out


def fastest(process: Process, job: Job) -> dict[str, str]:
    """The best option for prefill, and at each batch size, found out once."""
    best = {}
    prefills, options = process.ask("prefills"), process.ask("options")
    if len(prefills) > 1:
        times = {option: min(process.ask("prefill", option) for _ in range(2)) for option in prefills}
        best["prefill"] = min(times, key=lambda option: times[option])
    context = sorted(job.contexts)[len(job.contexts) // 2]
    for batch in job.batches if len(options) > 1 else ():
        times = {option: statistics.median(process.ask("decode", batch, context, 4, option)) for option in options}
        best[f"batch {batch}"] = min(times, key=lambda option: times[option])
    return best


def compare(
    job: Job, names: list[str], about: dict[str, Any], rounds: int, memory: Memory | None, leave: bool
) -> dict[str, Any]:
    """All sides on one model. ``leave``: one side in memory at a time."""
    processes = {name: Process(name, job) for name in names}
    judge = processes.get("abyssal BF16") or Process("abyssal BF16", job)
    prompt, best, cache, texts = job.prompts()[0][:CHECK], {}, {}, {}
    for name, process in processes.items():
        texts[name] = process.ask("greedy", prompt, CONTINUED)
        best[name] = fastest(process, job)
        cache[name] = process.ask("cache_bytes")
        if leave:
            process.leave()
    print(f"{about['shape']}: {about['parameters'] / 1e6:.1f}M parameters")
    for name, found in best.items():
        if found:
            print(f"  {name} is fastest with " + "; ".join(f"{k}: {v}" for k, v in found.items()))
    checked = check(texts, judge, prompt)
    if leave or judge.name not in processes:
        judge.leave()
    cells = list(product(job.batches, job.contexts))
    bytes_read: dict[str, dict[str, float]] = {}
    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    rates: list[float] = []

    def measure(name: str, cell: tuple[int, int] | None) -> None:
        process = processes[name]
        if cell is None:
            seconds[name].setdefault("prefill", []).append(process.ask("prefill", best[name].get("prefill", "")))
            return
        option = best[name].get(f"batch {cell[0]}", "")
        step = statistics.median(process.ask("decode", *cell, job.steps, option))
        seconds[name].setdefault(_key(cell), []).append(step)
        if memory and name.startswith("abyssal") and _key(cell) not in bytes_read.setdefault(name, {}):
            bytes_read[name][_key(cell)] = process.ask("bytes_read", *cell)

    for name in names if not leave else ():
        processes[name].ask("prefill", best[name].get("prefill", ""))  # warms up
    for _ in range(rounds):
        if memory:
            rates.append(memory.rate())
        if leave:
            for name in names:
                processes[name].ask("prefill", best[name].get("prefill", ""))
                for cell in [None, *cells]:
                    measure(name, cell)
                processes[name].leave()
        else:
            for cell in [None, *cells]:
                for name in names:
                    measure(name, cell)
    for process in (*processes.values(), judge):
        process.leave()
    tokens = {"prefill": PREFILL, **{_key(cell): cell[0] for cell in cells}}
    shares = {}
    for name in names if memory else ():
        read = bytes_read.get(ALIKE.get(name, name), {})
        shares[name] = {
            key: spread([nbytes / t / rate for t, rate in zip(seconds[name][key], rates, strict=True)])
            for key, nbytes in read.items()
        }
    return {
        **about,
        "greedy_check": checked,
        "fastest": best,
        "cache_bytes": cache,
        "seconds": seconds,
        "tokens_per_s": {
            name: {key: spread([tokens[key] / t for t in values]) for key, values in times.items()}
            for name, times in seconds.items()
        },
        "memory_bytes_per_s": spread(rates) if rates else None,
        "bytes_read": bytes_read,
        "of_roofline": shares,
    }


def _key(cell: tuple[int, int]) -> str:
    return f"b{cell[0]}, {cell[1]}"


def tell(result: dict[str, Any]) -> None:
    rates: dict[str, dict[str, Spread]] = result["tokens_per_s"]
    keys = list(next(iter(rates.values())))

    def cell(value: Spread | None, form: str) -> str:
        if value is None:
            return ""
        return f"{value.median:{form}} ({value.low:{form}}–{value.high:{form}})"

    titles = [key if key == "prefill" else f"batch {key.removeprefix('b').replace(', ', ' at ')}" for key in keys]
    rows = [
        [f"{result['shape']}, {name}", *(cell(of[key], ",.1f") for key in keys), f"{result['cache_bytes'][name]:,.0f}"]
        for name, of in rates.items()
    ]
    print("\ntokens/s in total (quartiles)\n")
    print(markdown(rows, "side", *titles, "cache, B a token"))
    times = result["seconds"]
    rows = [
        [f"{ours} / {name}", *(cell(paired_ratio(times[ours][key], times[name][key]), ".2f") for key in keys)]
        for name, ours in ALIKE.items()
        if name in times and ours in times
    ]
    if rows:
        print("\nhow many times as fast, weights of as many bits\n\n" + markdown(rows, "sides", *titles))
    if result["memory_bytes_per_s"]:
        rows = [
            [name, *(cell(of.get(key), ".0%") for key in keys if key != "prefill")]
            for name, of in result["of_roofline"].items()
            if of
        ]
        for name, of in result["bytes_read"].items():
            rows.append([f"{name} reads, MB a step", *(f"{of[key] / 1e6:,.0f}" for key in keys if key != "prefill")])
        print(
            f"\nshare of the roofline; memory is read at {result['memory_bytes_per_s'].median / 1e9:.1f} GB/s "
            f"({result['memory_bytes_per_s'].low / 1e9:.1f}–{result['memory_bytes_per_s'].high / 1e9:.1f})\n"
        )
        print(markdown(rows, "side", *titles[1:]))
    print(flush=True)


# drafts


def mtp(run: Path, rounds: int, new: int = 64, prompts: int = 8) -> dict[str, Any]:
    """Decoding at batch 1 with and without drafts, in turn."""
    model, tokenizer = load(run, dtype=torch.bfloat16)
    if tokenizer is None or not len(model.mtp_modules):
        raise UserError(f"{run}: expected a run with a tokenizer and an MTP module")
    ids = corpus_ids(tokenizer)
    ids = ids[len(ids) * 9 // 10 :]
    texts = [ids[i * (len(ids) - CHECK) // prompts :][:CHECK] for i in range(prompts)]
    ways: dict[str, int | None] = {"0": 0, "1": 1, "2": 2, "3": 3, "as it pays": None}
    engines = {way: Engine(model, tokenizer, drafts=drafts, prefix_cache=False) for way, drafts in ways.items()}
    results: list[dict[str, Any]] = []
    for temperature in (0.0, 1.0):
        times: dict[str, list[float]] = {way: [] for way in ways}
        steps, tokens = dict.fromkeys(ways, 0), dict.fromkeys(ways, 0)
        depths: dict[str, list[list[int]]] = {way: [] for way in ways}
        for number in range(-1, rounds):  # the first warms up
            for way, engine in engines.items():
                spent, made = 0.0, 0
                for i, text in enumerate(texts):
                    sampling = Sampling(temperature=temperature, max_new_tokens=new, seed=1000 * number + i + 1000)
                    sequence = engine.add(text, sampling)
                    engine.step()  # the prompt, and the first token
                    start, before = time.perf_counter(), len(sequence.new)
                    while engine.busy:
                        engine.step()
                        steps[way] += number >= 0
                    spent += time.perf_counter() - start
                    made += len(sequence.new) - before
                    if number >= 0:
                        for depth, (d, a) in enumerate(zip(sequence.drafted, sequence.accepted, strict=True)):
                            depths[way] += [[0, 0]] * (depth + 1 - len(depths[way]))
                            depths[way][depth] = [depths[way][depth][0] + d, depths[way][depth][1] + a]
                if number >= 0:
                    times[way].append(spent / made)
                    tokens[way] += made
        results.append(
            {
                "temperature": temperature,
                "seconds_a_token": times,
                "accepted_by_depth": {way: [a / d for d, a in of] for way, of in depths.items()},
                "tokens_a_step": {way: tokens[way] / steps[way] for way in ways},
            }
        )
    rows = []
    for result in results:
        for way, values in result["seconds_a_token"].items():
            rate, ratio = spread([1 / t for t in values]), paired_ratio(values, result["seconds_a_token"]["0"])
            rows.append(
                [
                    f"temperature {result['temperature']:.0f}, drafts {way}",
                    ", ".join(f"{share:.0%}" for share in result["accepted_by_depth"][way]),
                    f"{result['tokens_a_step'][way]:.2f}",
                    f"{rate.median:,.1f} ({rate.low:,.1f}–{rate.high:,.1f})",
                    f"{ratio.median:.2f} ({ratio.low:.2f}–{ratio.high:.2f})",
                ]
            )
    print(f"{run.name}, batch 1, {prompts} prompts of {CHECK} tokens, {new} new ones each\n")
    print(markdown(rows, "way", "accepted, by depth", "tokens a step", "tokens/s", "to no drafts"))
    return {"run": run.name, "results": results}


def available(side: str) -> bool:
    for package in NEEDS.get(side, ()):
        try:
            version(package)
        except PackageNotFoundError:
            print(f"{side} is left out: {package.replace('_', '-')} is not installed")
            return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="*", default=["M", "demo"], choices=["demo", *SHAPES])
    parser.add_argument("--model", type=Path, help="a trained run or a model's folder in place of shapes")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--contexts", nargs="+", type=int, default=[128, 1024, 4096])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=list(SIDES))
    parser.add_argument("--memory-roofline", action="store_true", help="what share of memory's speed a side reaches")
    parser.add_argument("--mtp", type=Path, help="drafts of this trained run's MTP modules, instead of all else")
    parser.add_argument("--apart", action="store_true", help="one side in memory at a time")
    parser.add_argument("--folder", type=Path, help="where models are written, and found the next time")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    limit_threads()
    os.environ["GGML_NO_BACKTRACE"] = "1"
    names = [name for name in options.sides if available(name)]
    versions = {p: version(p) for name in names for p in NEEDS.get(name, ())}
    machine = describe_machine(CPU, torch.bfloat16) | versions
    print(", ".join(f"{key} {value}" for key, value in machine.items()) + "\n", flush=True)
    if options.mtp:
        results: Any = mtp(options.mtp, options.rounds)
    else:
        results = []
        with tempfile.TemporaryDirectory() as temporary:
            memory = Memory() if options.memory_roofline else None
            for name in [options.model.name] if options.model else options.shapes:
                folder = (options.folder or Path(temporary)) / name
                folder.mkdir(parents=True, exist_ok=True)
                job = Job(
                    folder,
                    tuple(options.batches),
                    tuple(options.contexts),
                    options.steps,
                    torch.get_num_threads(),
                )
                kinds = [FILES[side] for side in names if side in FILES]
                about = apart(write_files, job, name, options.model, kinds)
                usable = set()
                for side in (side for side in names if side in FILES):
                    if (reason := try_repacking(side, job)) is None:
                        usable.add(side)
                    else:
                        print(f"{side}: without llama.cpp's own layouts of weights: with them it {reason}")
                job = replace(job, repack=frozenset(usable))
                result = compare(job, names, about, options.rounds, memory, options.apart)
                tell(result)
                results.append(result)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "results": results}, indent=2, default=as_json))


if __name__ == "__main__":
    main()
