"""How the processes that torchrun started find each other, and fail together.

Everything up to the first step goes through a key-value store rather than through collectives: a process that cannot go
on says why in the store, the others find it there, and all end with the same line instead of waiting.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from abyssal.config.parallel import ParallelConfig
from abyssal.distributed.mesh import Mesh
from abyssal.distributed.together import Together
from abyssal.errors import UserError

_FAILED = "failed"
_POLL = 0.05  # seconds


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
        self.store.compare_set(_FAILED, "", why)

    def arrive(self, name: str, said: str = "") -> list[str]:
        """Waits until all have arrived at ``name``; returns what each of them ``said``.

        Raises UserError where one of them has failed, or did not come in time.
        """
        self.store.set(f"{name}/{self.rank}", said)
        until = time.monotonic() + self.limit
        words = []
        for rank in range(self.size):
            while not self.store.check([f"{name}/{rank}"]):
                if self.store.check([_FAILED]):
                    raise UserError(self.store.get(_FAILED).decode())
                if time.monotonic() > until:
                    raise UserError(f"process {rank} of {self.size} did not get to {name!r} within {self.limit:.0f} s")
                time.sleep(_POLL)
            words.append(self.store.get(f"{name}/{rank}").decode())
        return words

    def same(self, what: str, value: str) -> None:
        """Raises UserError where ``value`` is not everywhere what it is on process 0."""
        values = self.arrive(what, value)
        other = [rank for rank, theirs in enumerate(values) if theirs != values[0]]
        if other:
            raise UserError(f"{what}: process {other[0]} has another one than process 0; all have to be started alike")


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


def end_together() -> None:
    """Waits a moment for the others to end too: torchrun kills those that run when the first one has ended, and what
    they had to say would be lost."""
    if (started_by_torchrun() or 1) > 1:
        with suppress(UserError, RuntimeError):
            meet(limit=10.0).arrive("the end")


def own_device(device: torch.device) -> torch.device:
    """``device``, with the GPU that is this process's."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
