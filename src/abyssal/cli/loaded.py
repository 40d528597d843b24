"""What commands that take a model share: the options that say how it is loaded, and the bar while it is."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

if TYPE_CHECKING:
    import torch

    from abyssal.config import ModelConfig
    from abyssal.data.tokenizer import Tokenizer
    from abyssal.distributed.together import Together
    from abyssal.model import Transformer

ModelArgument = Annotated[str, typer.Argument(help="A run, a model folder, or a name on the hub (owner/name).")]
DtypeOption = Annotated[str, typer.Option(help="bf16, fp32 or fp16 in memory; auto: the file's.")]
WeightsOption = Annotated[
    str,
    typer.Option(
        "--weights",
        "--quantize",
        help="In memory: dense, as --dtype says; int8 or int4, quantised as they are read; fp8, the file's FP8 blocks; "
        "nf4, 4 bits to train adapters on, slow to decode with; "
        "auto: packed where the file is, else dense.",
    ),
]
AllowMissingOption = Annotated[
    list[str] | None,
    typer.Option(help="A pattern of tensor names that may be missing or left over; may be given again."),
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, …")]


def load_model(
    model: str,
    *,
    dtype: str,
    weights: str,
    device: str,
    allow_missing: Sequence[str] | None,
    together: Together | None = None,
) -> tuple[Transformer, Tokenizer]:
    """Loads ``model`` with a bar in bytes on stderr; where several processes do it ``together``, this one's part.
    Raises UserError where there is no tokenizer, and for one of several processes that do not."""
    from abyssal.checkpoint.load import Weights
    from abyssal.distributed.launch import started_by_torchrun
    from abyssal.errors import UserError
    from abyssal.loading import base_of, find, find_tokenizer, load_weights
    from abyssal.training.hardware import resolve_device

    if weights not in get_args(Weights):
        raise UserError(f"--weights: {weights!r} is not one of {', '.join(get_args(Weights))}")
    where, chosen = resolve_device(device, "--device"), parse_dtype(dtype, "--dtype")
    started = started_by_torchrun() or 1
    if together is None and started > 1:
        raise UserError(f"torchrun started {started} processes, and this command is for one; start it without torchrun")
    with nullcontext() if together is None else together.first_then_others("found"):
        folder = find(model)
    tokenizer = find_tokenizer(folder)
    if tokenizer is None and (base_of(folder) / "config.json").is_file():
        raise UserError(f"{model}: no tokenizer.json or tiktoken.model in this folder; text needs one")
    options: dict[str, Any] = {
        "dtype": chosen,
        "device": where,
        "weights": weights,
        "allow_missing": allow_missing or (),
    }
    if together is not None:
        from abyssal.distributed.inference import load_part

        options["device"] = together.mesh.device
        with byte_bars("loading") if together.first else nullcontext([None]) as (progress,):
            network = load_part(folder, together, **options, progress=progress)
    else:
        with byte_bars("loading") as (progress,):
            network = load_weights(folder, **options, progress=progress)
    assert tokenizer is not None  # without a config.json nothing was loaded
    return network, tokenizer


def find_config(model: str) -> ModelConfig:
    """:func:`abyssal.loading.find_config`, and the config of a run that has no checkpoint yet."""
    from abyssal import loading
    from abyssal.checkpoint.run import MANIFEST
    from abyssal.config import ModelConfig, parse, read_mapping
    from abyssal.training.start import RECIPE

    path = Path(model)
    if (path / MANIFEST).is_file():  # a run of train or of tune: both write the model out in full
        return parse(ModelConfig, read_mapping(path / RECIPE).get("model"), f"{path / RECIPE}: model")
    return loading.find_config(model)


def parse_dtype(name: str, field: str, *, fp8: bool = False) -> torch.dtype | None:
    """``auto`` is None. Raises UserError naming ``field``."""
    from abyssal.checkpoint.precision import PRECISIONS
    from abyssal.errors import UserError

    known = {key: dtype for key, dtype in PRECISIONS.items() if fp8 or key != "fp8"}
    if name != "auto" and name not in known:
        raise UserError(f"{field}: {name!r} is not one of auto, {', '.join(known)}")
    return known.get(name)


@contextmanager
def byte_bars(*labels: str) -> Iterator[list[Callable[[int, int], None]]]:
    """Progress bars in bytes on stderr while the block runs, each shown from its first news on; nothing is shown where
    stderr is no terminal. Ctrl-C counts at the next news, between two tensors; a second one at once."""
    with _careful() as stopped, _bars(*labels) as show:

        def news(update: Callable[[int, int], None]) -> Callable[[int, int], None]:
            def progress(done: int, total: int) -> None:
                update(done, total)
                if stopped():
                    raise KeyboardInterrupt

            return progress

        yield [news(update) for update in show]


@contextmanager
def _careful() -> Iterator[Callable[[], bool]]:
    """Within, a first Ctrl-C is only noted: one that comes while a library reads a tensor would break it off there."""
    received: list[int] = []

    def note(number: int, _: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _bars(*labels: str) -> Iterator[list[Callable[[int, int], None]]]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield [lambda done, total: None] * len(labels)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:

        def news(label: str) -> Callable[[int, int], None]:
            task = bars.add_task(label, total=None, visible=False)
            return lambda done, total: bars.update(task, completed=done, total=total, visible=True)

        yield [news(label) for label in labels]
