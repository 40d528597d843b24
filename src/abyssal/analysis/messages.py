"""Messages between processes: among whom, how large, how long they take (:mod:`abyssal.analysis.communication` lists
a training step's)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from abyssal.analysis.layouts import NETWORK, NODE
from abyssal.config.parallel import ParallelConfig

Axis = Literal["shard", "replicate", "expert", "tensor", "context", "pipeline", "batch"]
Operation = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "send"]


@dataclass(frozen=True)
class Group:
    """``processes`` that talk to each other, each ``stride`` numbers behind the one before."""

    processes: int
    stride: int

    def ranks(self, rank: int) -> list[int]:
        """Those that process ``rank`` talks to, with itself."""
        first = rank - rank // self.stride % self.processes * self.stride
        return [first + i * self.stride for i in range(self.processes)]


@dataclass(frozen=True)
class Message:
    """One that a process takes part in ``times`` a step; ``nbytes`` is its payload."""

    axis: Axis
    what: str
    operation: Operation
    nbytes: int
    times: int
    group: Group

    @property
    def payload(self) -> int:
        """Bytes a step."""
        return self.nbytes * self.times

    @property
    def sent(self) -> float:
        """Bytes a step that leave the process."""
        if self.operation == "send":
            return self.payload
        others = (self.group.processes - 1) / self.group.processes
        return self.payload * others * (2 if self.operation == "all_reduce" else 1)

    def seconds(self, link: float) -> float:
        """A step's, at ``link`` bytes a second to each GPU of the node and NETWORK to others. A ring through several
        nodes enters and leaves a node by as many cards as it has members there."""
        many, stride = self.group.processes, self.group.stride
        inside = min(many, max(NODE // stride, 1))
        if many * stride <= NODE:
            return self.sent / link
        if self.operation == "all_to_all":
            return self.payload / many * ((inside - 1) / link + (many - inside) / NETWORK)
        return self.sent / (NETWORK if self.operation == "send" else min(link, inside * NETWORK))


@dataclass(frozen=True)
class Sum:
    """Messages added up: how many, bytes a process and step, and seconds if they were waited for one by one."""

    messages: int = 0
    payload: int = 0
    sent: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Sum) -> Sum:
        return Sum(
            self.messages + other.messages,
            self.payload + other.payload,
            self.sent + other.sent,
            self.seconds + other.seconds,
        )


def by_axis(messages: Iterable[Message], link: float) -> dict[Axis, Sum]:
    """What ``messages`` come to, axis by axis; ``link``: as for :meth:`Message.seconds`."""
    out: dict[Axis, Sum] = {}
    for m in messages:
        out[m.axis] = out.get(m.axis, Sum()) + Sum(m.times, m.payload, m.sent, m.seconds(link))
    return out


def groups(parallel: ParallelConfig) -> dict[str, Group]:
    """The groups that a process belongs to, by axis; as :mod:`abyssal.distributed.mesh` lays them."""
    p, t = parallel, parallel.tensor
    ranks = p.data * p.context  # that experts are spread over
    experts = max(p.sharers // p.expert, 1)
    return {
        "tensor": Group(t, 1),
        "context": Group(p.context, t),
        "shard": Group(p.sharers, t),
        "replicate": Group(p.replicate, t * p.sharers),
        "batch": Group(ranks, t),
        "expert": Group(p.expert, t),
        "expert shard": Group(experts, t * p.expert),
        "expert replicate": Group(ranks // (experts * p.expert), t * p.expert * experts),
        "pipeline": Group(p.pipeline, t * ranks),
    }
