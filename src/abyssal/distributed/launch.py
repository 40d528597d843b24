"""How the processes that torchrun started find each other, and fail together.

Everything up to the first step, and whatever ends a run, goes through a key-value store rather than through
collectives: a process that cannot go on says why in the store, the others find it there, and all end with the same line
instead of waiting.
"""

from __future__ import annotations

import math
import os
import re
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import zip_longest

import torch
import torch.distributed as dist

from abyssal.config.parallel import ParallelConfig
from abyssal.distributed.mesh import Mesh
from abyssal.distributed.together import Together
from abyssal.errors import UserError

_FAILED, _SAID = "failed", "said"
_POLL = 0.05  # seconds
_GOODBYE = 10.0  # seconds that a process which ends waits for the others


def started_by_torchrun() -> int | None:
    """How many processes there are, where torchrun (or what sets the same variables) started this one."""
    if any(name not in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")):
        return None
    return int(os.environ["WORLD_SIZE"])


def restarted() -> bool:
    """Whether torchrun has started this job anew, after some process of it had died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


@dataclass
class Meeting:
    """What the processes tell each other through ``store``; ``limit`` is how many seconds one waits for the others."""

    store: dist.Store
    rank: int
    size: int
    limit: float = 300.0

    def fail(self, why: str) -> None:
        """Tells everyone that this process cannot go on. The first reason stays."""
        self.store.compare_set(_FAILED, "", f"process {self.rank}: {why}" if self.rank else why)

    @property
    def failed(self) -> str | None:
        """Why some process cannot go on; None: all can."""
        return self.store.get(_FAILED).decode() if self.store.check([_FAILED]) else None

    def arrive(self, name: str, said: str = "", *, patient: bool = False, heed: bool = True) -> list[str]:
        """Waits until all have arrived at ``name``; returns what each of them ``said``. ``patient`` waits as long as it
        takes: what another is at may take hours, and should it die, torchrun ends this process too. Without ``heed`` it
        makes no difference that one has failed.

        Raises UserError where one of them has failed, or did not come in time.
        """
        self.store.set(f"{name}/{self.rank}", said)
        until = math.inf if patient else time.monotonic() + self.limit
        words = []
        for rank in range(self.size):
            while not self.store.check([f"{name}/{rank}"]):
                if heed and (why := self.failed) is not None:
                    raise UserError(why)
                if time.monotonic() > until:
                    raise UserError(f"process {rank} of {self.size} did not get to {name!r} within {self.limit:.0f} s")
                time.sleep(_POLL)
            words.append(self.store.get(f"{name}/{rank}").decode())
        return words

    def once(self, say: Callable[[], None]) -> None:
        """Calls ``say``, unless a process has done so already."""
        if self.store.add(_SAID, 1) == 1:
            say()

    def same(self, what: str, value: str) -> None:
        """Raises UserError, with the first line that differs, where ``value`` is not everywhere what it is on process
        0."""
        values = self.arrive(what, value)
        for rank, theirs in enumerate(values):
            for ours, other in zip_longest(values[0].splitlines(), theirs.splitlines(), fillvalue="nothing"):
                if ours != other:
                    raise UserError(
                        f"{what}: {other.strip()} on process {rank}, {ours.strip()} on process 0; all have to be "
                        "started alike"
                    )


def meet(limit: float = 300.0) -> Meeting:
    """The meeting of the processes that torchrun started."""
    store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(seconds=limit)))
    # A restarted job may find the store of the one before.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Meeting(dist.PrefixStore(f"abyssal/{attempt}", store), rank, size, limit)


def join(meeting: Meeting, parallel: ParallelConfig, device: torch.device) -> Together:
    """Makes the process groups; ``device`` is this process's own."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("groups", meeting.store),
        rank=meeting.rank,
        world_size=meeting.size,
        timeout=timedelta(seconds=meeting.limit),
    )
    return Together(Mesh(parallel, device), meeting)


def end_together(why: str, say: Callable[[], None], *, wait: bool = True) -> None:
    """Tells the others ``why`` this process ends, and waits a moment for them to end too: torchrun kills those that run
    when one has ended. One process calls ``say``: the first, or where that does not come, another. Without ``wait``:
    where a process is gone already, and the first that finds out says so."""
    first = os.environ.get("RANK", "0") == "0"
    if (started_by_torchrun() or 1) == 1:
        say()
        return
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it comes as soon as one has ended; we end by ourselves
    try:
        meeting = meet(limit=_GOODBYE)
        if first or not wait:
            meeting.once(say)
        if wait:
            meeting.fail(why)
            with suppress(UserError):
                meeting.arrive("the end", heed=False)
            meeting.once(say)
    except RuntimeError:  # the store is gone too
        if first:
            say()


def is_contact_lost(error: BaseException) -> bool:
    """Whether ``error`` came of another process's end."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


def contact_lost(error: BaseException) -> tuple[str, int] | None:
    """What to say, and the exit code, where ``error`` came of another process's end; None where it is another one."""
    if not is_contact_lost(error):
        return None
    with suppress(RuntimeError):
        if (why := meet(limit=_GOODBYE).failed) is not None:
            return why, 2
    text = re.sub(r"^\[[^]]*\] ", "", str(error).splitlines()[0]).split(". ")[0]
    return (
        f"another process of this job has ended or does not answer ({text}); what stands above, and torchrun's report, "
        "say which; a run is continued with --resume, or by torchrun's --max-restarts"
    ), 1


def own_device(device: torch.device) -> torch.device:
    """``device``, with the GPU that is this process's. Raises UserError where there are more processes than GPUs."""
    if device.type != "cuda" or device.index is not None:
        return device
    index, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if index >= count:
        raise UserError(f"process {index + 1} of this machine has no GPU, there are {count}; torchrun --nproc-per-node")
    return torch.device("cuda", index)
