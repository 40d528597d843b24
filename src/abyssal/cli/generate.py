"""``abyssal generate``: text from a run or a model folder."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from abyssal.cli.decoding import DraftsOption
from abyssal.cli.loaded import AllowMissingOption, DeviceOption, DtypeOption, ModelArgument, WeightsOption
from abyssal.cli.processes import ExpertOption, TensorOption, gather, loaded

if TYPE_CHECKING:
    from abyssal.data.tokenizer import Tokenizer
    from abyssal.generation.engine import Engine, Event
    from abyssal.generation.passes import Others
    from abyssal.generation.sampling import Sampling
    from abyssal.generation.sequence import Sequence
    from abyssal.model import Transformer

TOKENS = 200


def generate_command(
    model: ModelArgument,
    prompts: Annotated[list[str] | None, typer.Argument(help="One or more prompts.")] = None,
    file: Annotated[
        str | None,
        typer.Option("--prompts", metavar="FILE", help='More prompts, one a line; in a .jsonl file {"prompt": "…"}.'),
    ] = None,
    tokens: Annotated[int | None, typer.Option(help=f"At most so many new tokens; default {TOKENS}.")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Only the k likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Only the likeliest tokens that hold this share.")] = 0.95,
    min_p: Annotated[float, typer.Option(help="Only tokens at least this likely against the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 makes what was said less likely.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text; may be given again.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    schema: Annotated[
        str | None, typer.Option(metavar="FILE", help="Hold the text to the JSON schema in this file.")
    ] = None,
    logprobs: Annotated[
        int | None, typer.Option(help="Show the log-probability of each token and of the N likeliest there.")
    ] = None,
    drafts: DraftsOption = None,
    stats: Annotated[bool, typer.Option("--stats", help="Say on stderr what was done, and how fast.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    dtype: DtypeOption = "auto",
    weights: WeightsOption = "auto",
    device: DeviceOption = "auto",
    allow_missing: AllowMissingOption = None,
    tensor: TensorOption = 1,
    expert: ExpertOption = 1,
) -> None:
    """Continue prompts, many at once; one prompt streams as it is written."""
    from abyssal.generation import Sampling

    sampling = Sampling(
        max_new_tokens=TOKENS if tokens is None else tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=tuple(stop or ()),
        logprobs=logprobs,
    )
    texts = [*(prompts or ()), *(_read_prompts(Path(file)) if file is not None else ())] or [""]
    held = None if schema is None else _read_json(Path(schema), "--schema")
    together = gather(tensor, expert, device)
    options: dict[str, Any] = {"dtype": dtype, "weights": weights, "device": device, "allow_missing": allow_missing}
    with loaded(together, model, **options) as (network, tokenizer, others):
        show = _Show(texts, logprobs, stats, as_json)
        _generate(network, tokenizer, others, sampling, tokens, held, drafts, show)


@dataclasses.dataclass(frozen=True)
class _Show:
    """The prompts, and what is shown beside their texts."""

    texts: list[str]
    logprobs: int | None
    stats: bool
    as_json: bool


def _generate(
    network: Transformer,
    tokenizer: Tokenizer,
    others: Others | None,
    sampling: Sampling,
    tokens: int | None,
    held: Any,
    drafts: int | None,
    show: _Show,
) -> None:
    from abyssal.errors import UserError
    from abyssal.generation.generate import prepare
    from abyssal.generation.prompts import prompt_ids

    texts = show.texts
    ids = prompt_ids(network, tokenizer, texts, len(texts) > 1, True)
    context, longest = network.config.max_position_embeddings, max(map(len, ids))
    if tokens is not None and longest + tokens > context:
        raise UserError(
            f"--tokens: {tokens} do not fit behind a prompt of {longest} tokens in the model's context of {context}; "
            f"expected at most {context - longest}"
        )
    engine, sequences = prepare(network, tokenizer, ids, sampling, schema=held, drafts=drafts, others=others)

    said = dict.fromkeys(sequences, "")
    shown = 0
    clock = _Clock()
    streaming = len(texts) == 1 and not show.as_json
    if streaming:
        print(texts[0], end="", flush=True)
    while engine.busy:
        events = engine.step()
        clock.note(events)
        for event in events:
            said[event.sequence] += event.text
            if streaming:
                print(event.text, end="", flush=True)
        while shown < len(sequences) and (sequence := sequences[shown]).finished is not None and not show.as_json:
            if not streaming:
                print(("\n" if shown else "") + f"--- {shown + 1}\n{texts[shown]}{said[sequence]}", end="")
            print(flush=True)
            if show.logprobs is not None:
                _show_logprobs(sequence, tokenizer)
            shown += 1
    if show.as_json:
        results = [_as_data(prompt, s, said[s], tokenizer) for prompt, s in zip(texts, sequences, strict=True)]
        print(json.dumps({"results": results, "stats": clock.data(engine)}, indent=2))
    if show.stats:
        print(clock.table(engine), file=sys.stderr)
    failed = [number for number, sequence in enumerate(sequences) if sequence.error is not None]
    if failed:
        name = f"prompts[{failed[0]}]: " if len(texts) > 1 else ""
        more = f" ({len(failed)} of {len(texts)} prompts failed)" if len(failed) > 1 else ""
        raise UserError(f"{name}{sequences[failed[0]].error}{more}")


def _read_json(path: Path, option: str) -> Any:
    from abyssal.errors import UserError

    text = _read_text(path, option)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{option}: {path}: not JSON: {error}") from None


def _read_prompts(path: Path) -> list[str]:
    from abyssal.errors import UserError

    lines = [(n, line) for n, line in enumerate(_read_text(path, "--prompts").split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"--prompts: {path}: no prompt in it; expected one a line")
    if path.suffix != ".jsonl":
        return [line.removesuffix("\r") for _, line in lines]
    out = []
    for number, line in lines:
        try:
            data = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"--prompts: {path}, line {number}: not JSON: {error}") from None
        if not isinstance(data, dict) or not isinstance(data.get("prompt"), str):
            raise UserError(f'--prompts: {path}, line {number}: expected {{"prompt": "…"}}')
        out.append(data["prompt"])
    return out


def _read_text(path: Path, option: str) -> str:
    from abyssal.errors import UserError

    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{option}: {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{option}: {path}: not UTF-8 at byte {error.start}") from None


class _Clock:
    """When tokens came."""

    def __init__(self) -> None:
        self.began = self.last = time.perf_counter()
        self.first: dict[Sequence, float] = {}
        self.later = 0  # tokens behind those of the first step that brought any

    def note(self, events: list[Event]) -> None:
        self.last = time.perf_counter()
        self.later += sum(len(event.tokens) for event in events) if self.first else 0
        for event in events:
            if event.tokens:
                self.first.setdefault(event.sequence, self.last)

    def data(self, engine: Engine) -> dict[str, Any]:
        """The figures by name."""
        waits = [moment - self.began for moment in self.first.values()]
        between = self.last - self.began - min(waits, default=0)
        times = {
            "seconds_to_first_token": sum(waits) / len(waits) if waits else None,
            "tokens_per_second": self.later / between if between > 0 else None,
        }
        metrics = engine.metrics
        return times | {"acceptance": metrics.acceptance} | dataclasses.asdict(metrics)

    def table(self, engine: Engine) -> str:
        from abyssal.cli.decoding import align, count_lines

        data = self.data(engine)
        lines = count_lines(engine.metrics)
        if data["seconds_to_first_token"] is not None:
            mean = " on average" if len(self.first) > 1 else ""
            lines.append(("first token", f"after {data['seconds_to_first_token']:.3f} s{mean}"))
        if data["tokens_per_second"] is not None:
            lines.append(("tokens/s", f"{data['tokens_per_second']:,.1f} from then on"))
        return align(lines)


def _as_data(prompt: str, sequence: Sequence, text: str, tokenizer: Tokenizer) -> dict[str, Any]:
    data: dict[str, Any] = {
        "prompt": prompt,
        "text": text,
        "finished": sequence.finished,
        "prompt_tokens": sequence.prompt,
        "new_tokens": len(sequence.new),
    }
    if sequence.error is not None:
        data["error"] = sequence.error
    if sequence.sampling.logprobs is not None:

        def one(token: int, value: float) -> dict[str, Any]:
            text = tokenizer.token_bytes(token).decode("utf-8", "replace")
            return {"token": token, "text": text, "logprob": value if math.isfinite(value) else None}

        data["logprobs"] = [
            one(token, told.own) | {"likeliest": [one(*pair) for pair in told.likeliest]}
            for token, told in zip(sequence.new, sequence.logprobs, strict=True)
        ]
    return data


def _show_logprobs(sequence: Sequence, tokenizer: Tokenizer) -> None:
    from rich.text import Text

    from abyssal.cli.show import show_table, table

    def named(token: int) -> Text:
        return Text(repr(tokenizer.token_bytes(token).decode("utf-8", "replace")))

    out = table("token", "logprob", *(["the likeliest"] if sequence.sampling.logprobs else []))
    out.columns[-1].justify = "left"
    for token, told in zip(sequence.new, sequence.logprobs, strict=True):
        others = Text("  ").join(Text.assemble(named(t), f" {value:.2f}") for t, value in told.likeliest)
        out.add_row(named(token), f"{told.own:.3f}", *([others] if sequence.sampling.logprobs else []))
    show_table(out)
