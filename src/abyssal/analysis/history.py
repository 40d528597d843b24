"""What metrics.jsonl says of a run, read line by line: figures of every record, loads and biases in bins over steps.

A run may have a hundred thousand records of 58 layers × 256 experts. Numbers a record are kept one by one; what is
there for every expert is kept in bins of as many records as it takes, so that memory and pages stay small.

Shapes: L layers of experts, R = experts of all layers, one layer after the other.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_BINS = 600
LEAST_BINS = 8
# Bins × R at most: at about four bytes each for load and bias in the page.
CELLS = 700_000
SCALARS = ("loss", "balance_loss", "lr", "grad_norm", "step_time", "tokens_per_s")


class _Fault(Exception):
    """A line that can't be used, and why."""


@dataclass
class Bin:
    """Successive records as one."""

    first: int  # the first step it covers
    last: int
    records: int
    steps: int
    load: NDArray  # [R] assignments, added up
    bias: NDArray  # [R] after the last step; NaN for a router without one
    cv: NDArray  # [L] Σ steps · CV
    max_vio: NDArray  # [L] Σ steps · MaxVio
    dead: NDArray  # [L] the most in any record

    def join(self, later: Bin) -> Bin:
        """This and what comes after it."""
        return Bin(
            self.first,
            later.last,
            self.records + later.records,
            self.steps + later.steps,
            self.load + later.load,
            later.bias,
            self.cv + later.cv,
            self.max_vio + later.max_vio,
            np.maximum(self.dead, later.dead),
        )


class History:
    """The records of one metrics.jsonl. :meth:`read` takes in what was written since it was last called.

    Lines that can't be used are skipped and counted: ``skipped``, and ``first_fault`` names the first one.
    """

    def __init__(self, path: Path, cells: int = CELLS) -> None:
        self.path, self.cells = path, cells
        self._begin()

    def _begin(self) -> None:
        self._inode, self._offset, self._line = -1, 0, 0
        self.skipped = 0
        self.first_fault: str | None = None
        self.cut = False
        self.steps: list[int] = []
        self.seconds = 0.0
        self.tokens = 0
        self.scalars: dict[str, list[float]] = {name: [] for name in SCALARS}
        self.memory: dict[str, list[float | None]] = {"process": [], "device": []}
        self.mtp_loss: list[list[float]] = []
        self.validations: list[tuple[int, float, float | None]] = []
        self.samples: dict[int, list[tuple[str, str]]] = {}
        self.layers: dict[int, slice] | None = None  # which of R are a layer's; None before the first record
        self.bins: list[Bin] = []
        self.records_a_bin = 1

    def read(self, *, whole: bool = False) -> bool:
        """Whether there was anything new. A last line without its end is left for the next time; with ``whole`` there
        is none, and a line that was cut off is noted in ``cut``. A file that was written anew is read anew."""
        try:
            status = self.path.stat()
        except FileNotFoundError:
            return False
        anew = status.st_ino != self._inode or status.st_size < self._offset
        if anew:
            self._begin()
            self._inode = status.st_ino
        before = self._offset
        with self.path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if line.endswith(b"\n"):
                    self._offset += len(line)
                    self._take(line)
                elif whole:
                    try:
                        json.loads(line)
                    except (ValueError, RecursionError):
                        self.cut = True
                    else:
                        self._take(line)
        return anew or self._offset != before

    def bins_of(self, layer: int) -> tuple[NDArray, NDArray, NDArray]:
        """The steps in the middle of the bins [B], and a layer's loads and biases in them [B, E]."""
        assert self.layers is not None
        where = self.layers[layer]
        middle = np.array([(b.first + b.last) // 2 for b in self.bins])
        loads = np.stack([b.load[where] for b in self.bins])
        return middle, loads, np.stack([b.bias[where] for b in self.bins])

    def _take(self, line: bytes) -> None:
        self._line += 1
        if not line.strip():
            return
        try:
            record = json.loads(line.decode("utf-8", errors="replace"))
            if not isinstance(record, dict):
                raise _Fault("expected a mapping")
            kind = record.get("kind")
            if kind == "train":
                self._train(record)
            elif kind == "validation":
                # null where the loss is not one of text, as with preferences
                none = record.get("bits_per_byte", 0) is None
                bits = None if none else _number(record, "bits_per_byte")
                self.validations.append((_count(record, "step"), _number(record, "loss"), bits))
            elif kind == "samples":
                self._samples(record)
            elif not isinstance(kind, str):
                raise _Fault(f"kind: {_show(record, 'kind')}")
        except (ValueError, RecursionError, _Fault) as error:
            self.skipped += 1
            reason = str(error) if isinstance(error, _Fault) else "not valid JSON"
            self.first_fault = self.first_fault or f"line {self._line}: {reason}"

    def _train(self, record: dict[str, Any]) -> None:
        step, steps = _count(record, "step"), _count(record, "steps")
        if self.steps and step <= self.steps[-1]:
            raise _Fault(f"step: {step} comes after {self.steps[-1]}")
        scalars = {name: _number(record, name) for name in SCALARS}
        tokens = _count(record, "tokens")
        memory = _mapping(record, "memory")
        taken = {key: None if memory.get(key) is None else _number(memory, key, "memory.") for key in self.memory}
        mtp_loss = _numbers(record, "mtp_loss")
        if self.steps and len(mtp_loss) != len(self.mtp_loss):
            raise _Fault(f"mtp_loss: {len(mtp_loss)} numbers, {len(self.mtp_loss)} before")
        layers, one = self._layers(record, step, steps)
        # Nothing is kept of a line that turns out to be wrong halfway.
        if self.layers is None:
            self.layers = layers
            self.mtp_loss = [[] for _ in mtp_loss]
        self.steps.append(step)
        self.tokens = tokens
        self.seconds += scalars["step_time"] * steps
        for name, value in scalars.items():
            self.scalars[name].append(value)
        for key, amount in taken.items():
            self.memory[key].append(amount)
        for column, value in zip(self.mtp_loss, mtp_loss, strict=True):
            column.append(value)
        if layers:
            self._bin(one, sum(where.stop - where.start for where in layers.values()))

    def _layers(self, record: dict[str, Any], step: int, steps: int) -> tuple[dict[int, slice], Bin]:
        rows = _mapping(record, "layers")
        if not all(name.isascii() and name.isdecimal() for name in rows):
            raise _Fault(f"layers: {_show(record, 'layers')}: expected layers by number")
        where: dict[int, slice] = {}
        columns: dict[str, list[float]] = {key: [] for key in ("load", "bias", "cv", "max_vio", "dead")}
        for name in sorted(rows, key=int):
            prefix = f"layers.{name}."
            row = _mapping(rows, name, "layers.")
            load = _numbers(row, "load", prefix)
            bias = _numbers(row, "bias", prefix) if row.get("bias") is not None else [math.nan] * len(load)
            if not load or len(bias) != len(load) or min(load) < 0:
                raise _Fault(
                    f"{prefix}load: {len(load)} numbers and {len(bias)} of bias; one each an expert, 0 or more"
                )
            where[int(name)] = slice(len(columns["load"]), len(columns["load"]) + len(load))
            columns["load"] += load
            columns["bias"] += bias
            for key in ("cv", "max_vio", "dead"):
                columns[key].append(_number(row, key, prefix))
        if self.layers is not None and where != self.layers:
            raise _Fault("layers: other layers or experts than in the records before")
        a = {key: np.array(column, dtype=np.float64) for key, column in columns.items()}
        first = step - steps + 1
        return where, Bin(first, step, 1, steps, a["load"], a["bias"], steps * a["cv"], steps * a["max_vio"], a["dead"])

    def _bin(self, one: Bin, experts: int) -> None:
        if self.bins and self.bins[-1].records < self.records_a_bin:
            self.bins[-1] = self.bins[-1].join(one)
            return
        # An even number: when all are full, two and two become one.
        most = 2 * (min(max(self.cells // experts, LEAST_BINS), MOST_BINS) // 2)
        if len(self.bins) >= most:
            self.bins = [a.join(b) for a, b in zip(self.bins[::2], self.bins[1::2], strict=True)]
            self.records_a_bin *= 2
        self.bins.append(one)

    def _samples(self, record: dict[str, Any]) -> None:
        step, samples = _count(record, "step"), record.get("samples")
        if not isinstance(samples, list):
            raise _Fault(f"samples: {_show(record, 'samples')}; expected a list")
        found = []
        for sample in samples:
            prompt, text = (sample.get("prompt"), sample.get("text")) if isinstance(sample, dict) else (None, None)
            if not isinstance(prompt, str) or not isinstance(text, str):
                raise _Fault("samples: expected a prompt and a text each")
            found.append((prompt, text))
        self.samples[step] = found


def _show(data: dict[str, Any], key: str) -> str:
    text = repr(data[key]) if key in data else "missing"
    return text if len(text) <= 40 else text[:37] + "..."


def _number(data: dict[str, Any], key: str, prefix: str = "") -> float:
    value = data.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        raise _Fault(f"{prefix}{key}: {_show(data, key)}; expected a number")
    return float(value)


def _count(data: dict[str, Any], key: str) -> int:
    value = data.get(key)
    if type(value) is not int or not 0 <= value < 2**53:
        raise _Fault(f"{key}: {_show(data, key)}; expected a whole number, 0 or more")
    return value


def _numbers(data: dict[str, Any], key: str, prefix: str = "") -> list[float]:
    values = data.get(key)
    if not isinstance(values, list):
        raise _Fault(f"{prefix}{key}: {_show(data, key)}; expected a list of numbers")
    try:
        # Millions of them are looked at: types in one go, and a sum that is finite has no terms that are not.
        fit = set(map(type, values)) <= {int, float} and math.isfinite(sum(values))
    except OverflowError:
        fit = False
    if not fit:
        raise _Fault(f"{prefix}{key}: expected numbers only")
    return values


def _mapping(data: dict[str, Any], key: str, prefix: str = "") -> dict[str, Any]:
    value = data.get(key)
    if not isinstance(value, dict):
        raise _Fault(f"{prefix}{key}: {_show(data, key)}; expected a mapping")
    return value
