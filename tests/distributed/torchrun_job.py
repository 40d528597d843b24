"""What torchrun starts instead of ``-m abyssal``: commands one after another in the same processes, each with the fault
that a test wants. Called with a JSON file: ``commands`` (``arguments``, with {rank} in them, and ``fault``: the name of
a function here and its arguments) and ``results``, a folder for what came of each command on each process: exit code
and stderr. A command that fails ends the job with its code, unless it is ``expected`` to.
"""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch.distributed.checkpoint import HuggingFaceStorageWriter

from abyssal.checkpoint import sharded
from abyssal.cli import main
from abyssal.cli.running import _StopOnSignal
from abyssal.distributed.together import Together, local
from abyssal.training.step import TrainingStep

RANK = int(os.environ["RANK"])
LIFE = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
LIMIT = 60.0  # seconds


def until(what: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT
    while not what():
        assert time.monotonic() < end, "what was waited for did not come"
        time.sleep(0.01)


def until_saved(run: str, step: int) -> None:
    """The checkpoint is written in the background, and on a slow machine steps may be faster."""
    until((Path(run) / "checkpoints" / f"step-{step:08d}").is_dir)


@contextmanager
def in_step(number: int, act: Callable[[], Any]) -> Iterator[None]:
    """``act`` in the ``number``-th step that this process makes, before anything is worked out."""
    made, step = [0], TrainingStep.__call__

    def call(self: TrainingStep, *arguments: Any) -> Any:
        made[0] += 1
        if made[0] == number:
            act()
        return step(self, *arguments)

    with patch.object(TrainingStep, "__call__", call):
        yield


@contextmanager
def one_after_another(rank: int, run: str) -> Iterator[None]:
    """One process's four lives: killed in step 6; started anew after step 4, asked to stop in step 6; killed while step
    8 is saved, when it has written its part; left alone. What that last death leaves of ``run`` is copied."""
    write, mine = HuggingFaceStorageWriter.write_data, rank == RANK

    def half(self: HuggingFaceStorageWriter, *arguments: Any) -> Any:
        written = write(self, *arguments)
        if "step-00000008" in str(self.path) and mine and LIFE == 2:
            assert list(Path(self.path).iterdir())
            os.kill(os.getpid(), signal.SIGKILL)
        return written

    if LIFE == 3 and RANK == 0:
        shutil.copytree(run, f"{run}-left")
    with ExitStack() as stack:
        stack.enter_context(patch.object(HuggingFaceStorageWriter, "write_data", half))
        if mine and LIFE < 2:
            number, with_what = ((6, signal.SIGKILL), (2, signal.SIGTERM))[LIFE]

            def act() -> None:
                until_saved(run, 4)
                os.kill(os.getpid(), with_what)

            stack.enter_context(in_step(number, act))
        yield


@contextmanager
def unreadable(rank: int, number: int) -> Iterator[None]:
    """What one process alone finds out in a step."""

    def read() -> None:
        if rank == RANK:
            raise OSError(5, "Input/output error", "tokens.bin")

    with in_step(number, read):
        yield


@contextmanager
def waiting_for_signals(number: int, folder: str) -> Iterator[None]:
    """In step ``number`` each process says that it is there and waits for a signal; then it gets another."""
    handle, came = _StopOnSignal._handle, []

    def handler(self: _StopOnSignal, *arguments: Any) -> None:
        handle(self, *arguments)
        came.append(arguments)

    def wait() -> None:
        (Path(folder) / f"waiting-{RANK}").touch()
        until(lambda: bool(came))
        os.kill(os.getpid(), signal.SIGTERM)

    with patch.object(_StopOnSignal, "_handle", handler), in_step(number, wait):
        yield


@contextmanager
def nan(rank: int, number: int) -> Iterator[None]:
    """A gradient that is NaN in one place on one process."""
    norm, asked = Together.norm, [0]

    def spoiled(self: Together, gradients: Any) -> Any:
        asked[0] += 1
        if (rank, number) == (RANK, asked[0]):
            local(gradients[0]).view(-1)[0] = float("nan")
        return norm(self, gradients)

    with patch.object(Together, "norm", spoiled):
        yield


@contextmanager
def full_disk(rank: int, number: int, run: str) -> Iterator[None]:
    """From step ``number`` on, with the checkpoint after step 4 whole, no file of one process can exceed 100 kB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill() -> None:
        if rank == RANK:
            until_saved(run, 4)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))

    try:
        with in_step(number, fill):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextmanager
def slow_disk(step: int, steps: int) -> Iterator[None]:
    """Of the checkpoint after ``step`` steps nothing is written before this process has made ``steps`` steps."""
    write, done = sharded.write, [False]

    def late(tensors: Any, folder: Path, group: Any = None) -> None:
        if f"step-{step:08d}" in str(folder):
            until(lambda: done[0])
        write(tensors, folder, group)

    with patch.object(sharded, "write", late), in_step(steps, lambda: done.__setitem__(0, True)):
        yield


@contextmanager
def copied(run: str, to: str) -> Iterator[None]:
    """The second process has the run in another place."""
    if RANK == 1:
        shutil.copytree(run, to)
    yield


@contextmanager
def cut(part: str) -> Iterator[None]:
    """A file of which the second half is missing meanwhile."""
    path, whole = Path(part), b""
    if RANK == 0:
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    yield
    if RANK == 0:
        path.write_bytes(whole)


@contextmanager
def lost(part: str) -> Iterator[None]:
    """A file that is not there."""
    if RANK == 0:
        Path(part).unlink()
    yield


def run(arguments: list[str]) -> tuple[int, str]:
    """Exit code and stderr of a command."""
    sys.argv = ["abyssal", *(argument.replace("{rank}", str(RANK)) for argument in arguments)]
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            main()
        raise AssertionError("main() returned")
    except SystemExit as end:
        return int(end.code or 0), said.getvalue()
    finally:
        sys.stderr.write(said.getvalue())


def job(plan: dict[str, Any]) -> int:
    rendezvous = dist.rendezvous
    for number, command in enumerate(plan["commands"]):

        def meet(*arguments: Any, number: int = number, **options: Any) -> Iterator[Any]:
            for store, rank, size in rendezvous(*arguments, **options):
                yield dist.PrefixStore(f"command {number}", store), rank, size

        with ExitStack() as stack:
            stack.enter_context(patch.object(dist, "rendezvous", meet))
            if fault := command.get("fault"):
                stack.enter_context(globals()[fault[0]](*fault[1:]))
            code, said = run(command["arguments"])
        if dist.is_initialized():
            dist.destroy_process_group()
        result = {"code": code, "stderr": said}
        (Path(plan["results"]) / f"{number}-{RANK}.json").write_text(json.dumps(result))
        if code and not command.get("expected"):
            return code
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return 0


if __name__ == "__main__":
    sys.exit(job(json.loads(Path(sys.argv[1]).read_text())))
