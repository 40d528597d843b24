"""What commands share that run a model on the processes that torchrun started: the options that divide it, and who
does what. Process 0 does all that is seen; the others compute their parts of its passes and say nothing."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from abyssal.cli.loaded import load_model

if TYPE_CHECKING:
    from abyssal.data.tokenizer import Tokenizer
    from abyssal.distributed.together import Alone
    from abyssal.generation.passes import Others
    from abyssal.model import Transformer

TensorOption = Annotated[
    int, typer.Option(metavar="N", help="With torchrun: divide heads, widths and vocabulary among N processes.")
]
ExpertOption = Annotated[
    int, typer.Option(metavar="N", help="With torchrun: divide routed experts among N sets of processes.")
]


def gather(tensor: int, expert: int, device: str) -> Alone:
    """The processes of a command with these options. Raises UserError where torchrun has started another number."""
    from abyssal.distributed.inference import begin, parallel_of
    from abyssal.distributed.launch import own_device, started_by_torchrun
    from abyssal.distributed.together import Alone
    from abyssal.errors import UserError
    from abyssal.training.hardware import resolve_device

    parallel, started = parallel_of(tensor, expert), started_by_torchrun()
    if parallel.alone and (started or 1) > 1:
        raise UserError(
            f"torchrun started {started} processes, and nothing says what they divide; give --tensor and --expert, or "
            "start one without torchrun"
        )
    if parallel.world != (started or 1):
        raise UserError(
            f"--tensor {tensor} × --expert {expert} = {parallel.world} processes, and there are {started or 1}; "
            f"expected torchrun --nproc-per-node {parallel.world} -m abyssal …"
        )
    if parallel.alone:
        return Alone()
    together = begin(tensor, expert, own_device(resolve_device(device, "--device")))
    if not together.first:
        warnings.simplefilter("ignore")
    return together


@contextmanager
def loaded(
    together: Alone, model: str, *, dtype: str, weights: str, device: str, allow_missing: Sequence[str] | None
) -> Iterator[tuple[Transformer, Tokenizer, Others | None]]:
    """Loads ``model``, each of ``together`` its part. Process 0 goes on with it, the tokenizer, and the others; these
    compute what it tells them until the block ends, and then the command ends for them. Raises UserError."""
    from abyssal.distributed.together import Together
    from abyssal.errors import UserError

    options: dict[str, Any] = {"dtype": dtype, "weights": weights, "device": device, "allow_missing": allow_missing}
    if not isinstance(together, Together):
        yield *load_model(model, **options), None
        return
    from abyssal.distributed.inference import Telling
    from abyssal.distributed.launch import is_contact_lost
    from abyssal.generation.passes import follow

    with together.agreed("loaded"):
        network, tokenizer = load_model(model, **options, together=together)
    telling = Telling(together)
    if not together.first:
        try:
            with _undisturbed():
                follow(network, telling)
        except RuntimeError as error:
            if not is_contact_lost(error):
                raise
            raise typer.Exit(1) from None  # process 0 has gone, and has said why, or torchrun does
        together.part_ways()
        if telling.ended == 2:
            raise UserError("process 0 could not go on")
        raise typer.Exit(telling.ended or 0)
    try:
        yield network, tokenizer, telling
    except BaseException as error:
        telling.end(2 if isinstance(error, UserError) else getattr(error, "exit_code", 1))
        raise
    telling.end()
    together.part_ways()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Within, Ctrl-C and SIGTERM count for process 0 alone, which may have answers to finish."""
    import signal

    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
