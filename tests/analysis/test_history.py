"""Reading metrics.jsonl: what was written, in bins where it is much, with whatever may stand in such a file."""

import json
import math

import numpy as np
import pytest
from fake_runs import train_record, write_lines
from hypothesis import given
from hypothesis import strategies as st

from abyssal.analysis.history import History


def read(path, **options) -> History:
    history = History(path, **options)
    history.read(whole=True)
    return history


@given(lengths=st.lists(st.integers(1, 4), min_size=1, max_size=90), cells=st.sampled_from([1, 80, 200, 10_000]))
def test_bins_hold_what_the_records_hold(tmp_path_factory, lengths, cells):
    steps = np.cumsum(lengths).tolist()
    records = [train_record(step, length) for step, length in zip(steps, lengths, strict=True)]
    history = read(write_lines(tmp_path_factory.mktemp("h") / "metrics.jsonl", records), cells=cells)
    most = max(cells // 8, 8) // 2 * 2
    together = 1
    while math.ceil(len(records) / together) > most:
        together *= 2
    groups = [records[i : i + together] for i in range(0, len(records), together)]
    assert history.records_a_bin == together
    assert [(b.first, b.last) for b in history.bins] == [
        (group[0]["step"] - group[0]["steps"] + 1, group[-1]["step"]) for group in groups
    ]
    for row, layer in enumerate(("1", "2")):
        _, loads, biases = history.bins_of(int(layer))
        for i, group in enumerate(groups):
            rows = [record["layers"][layer] for record in group]
            assert loads[i].tolist() == [sum(column) for column in zip(*(r["load"] for r in rows), strict=True)]
            assert biases[i].tolist() == rows[-1]["bias"]
            weights = [record["steps"] for record in group]
            for key, total in (("cv", history.bins[i].cv), ("max_vio", history.bins[i].max_vio)):
                expected = sum(w * r[key] for w, r in zip(weights, rows, strict=True)) / sum(weights)
                assert total[row] / history.bins[i].steps == pytest.approx(expected)
            assert history.bins[i].dead[row] == max(r["dead"] for r in rows)


@given(cuts=st.lists(st.integers(0, 5000), max_size=6).map(sorted))
def test_read_piece_by_piece_is_read_at_once(tmp_path_factory, cuts):
    folder = tmp_path_factory.mktemp("h")
    records = [train_record(step) for step in range(1, 9)]
    records.insert(4, {"kind": "validation", "step": 4, "loss": 2.0, "bits_per_byte": 1.0, "tokens": 5})
    whole = write_lines(folder / "whole.jsonl", records).read_bytes()
    pieces = History(folder / "pieces.jsonl")
    assert not pieces.read()  # there is no such file yet
    for cut in [*cuts, len(whole)]:
        with (folder / "pieces.jsonl").open("ab") as file:
            file.write(whole[file.tell() : cut])
        pieces.read()
    assert not pieces.read()
    at_once = read(folder / "whole.jsonl")
    assert pieces.steps == at_once.steps == list(range(1, 9))
    assert pieces.scalars == at_once.scalars
    assert pieces.validations == at_once.validations == [(4, 2.0, 1.0)]
    assert np.array_equal(pieces.bins_of(2)[1], at_once.bins_of(2)[1])
    assert pieces.skipped == at_once.skipped == 0


def test_a_file_written_anew_is_read_anew(tmp_path):
    path = write_lines(tmp_path / "metrics.jsonl", [train_record(step) for step in (1, 2, 3)])
    history = read(path)
    write_lines(tmp_path / "other", [train_record(step, seed=1) for step in (1, 2)]).replace(path)
    assert history.read()
    assert history.steps == [1, 2]
    assert history.scalars["loss"] == [train_record(step, seed=1)["loss"] for step in (1, 2)]


@pytest.mark.parametrize(
    "end", [b"", b'{"kind": "train", "st', b'{"kind": "train", "step": 3, "loss": 1.', b"\xf0\x9f"]
)
def test_a_last_line_that_was_cut_off(tmp_path, end):
    path = write_lines(tmp_path / "metrics.jsonl", [train_record(step) for step in (1, 2)])
    path.write_bytes(path.read_bytes() + end)
    history = read(path)
    assert history.steps == [1, 2]
    assert history.cut == bool(end)
    assert history.skipped == 0


def test_a_last_line_without_its_end(tmp_path):
    path = write_lines(tmp_path / "metrics.jsonl", [train_record(step) for step in (1, 2)])
    path.write_text(path.read_text().rstrip("\n"))
    assert read(path).steps == [1, 2]


def broken(**changes) -> dict:
    record = train_record(2)
    for path, value in changes.items():
        *parents, key = path.split("__")
        place = record
        for parent in parents:
            place = place[parent]
        if value is ...:
            del place[key]
        else:
            place[key] = value
    return record


@pytest.mark.parametrize(
    ("record", "named"),
    [
        (broken(loss=...), "line 2: loss: missing"),
        (broken(loss="low"), "line 2: loss: 'low'; expected a number"),
        (broken(loss=float("nan")), "line 2: loss: nan"),
        (broken(loss=10**400), "line 2: loss: 1000"),
        (broken(loss=True), "line 2: loss: True"),
        (broken(step=1), "line 2: step: 1 comes after 1"),
        (broken(step=-2), "line 2: step: -2"),
        (broken(step=2.5), "line 2: step: 2.5; expected a whole number"),
        (broken(tokens=None), "line 2: tokens: None"),
        (broken(mtp_loss=3), "line 2: mtp_loss: 3; expected a list"),
        (broken(mtp_loss=[1, 2]), "line 2: mtp_loss: 2 numbers, 1 before"),
        (broken(memory=[]), "line 2: memory: []; expected a mapping"),
        (broken(memory__process="much"), "line 2: memory.process: 'much'"),
        (broken(layers=...), "line 2: layers: missing"),
        (broken(layers__one={}), "line 2: layers: "),
        (broken(layers__1=3), "line 2: layers.1: 3; expected a mapping"),
        (broken(layers__1__load=...), "line 2: layers.1.load: missing"),
        (broken(layers__1__load=[1, 2, None, 4]), "line 2: layers.1.load: expected numbers only"),
        (broken(layers__1__load=[1, 2, 10**400, 4]), "line 2: layers.1.load: expected numbers only"),
        (broken(layers__1__load=[1, 2, -3, 4]), "line 2: layers.1.load: "),
        (broken(layers__1__load=[]), "line 2: layers.1.load: 0 numbers"),
        (broken(layers__1__bias=[0.0]), "line 2: layers.1.load: 4 numbers and 1 of bias"),
        (broken(layers__2=...), "line 2: layers: other layers or experts"),
        ({"kind": "validation", "step": 2, "loss": 1.0}, "line 2: bits_per_byte: missing"),
        ({"kind": "samples", "step": 2, "samples": ["a"]}, "line 2: samples: expected a prompt and a text"),
        ({"kind": "samples", "step": 2, "samples": 1}, "line 2: samples: 1; expected a list"),
        ({"kind": 7}, "line 2: kind: 7"),
        ({}, "line 2: kind: missing"),
        ([1], "line 2: expected a mapping"),
    ],
)
def test_a_line_that_is_wrong_is_skipped_and_named(tmp_path, record, named):
    history = read(write_lines(tmp_path / "metrics.jsonl", [train_record(1), record, train_record(3)]))
    assert history.steps == [1, 3]
    assert {len(column) for column in (*history.scalars.values(), *history.memory.values(), *history.mtp_loss)} == {2}
    assert len(history.bins) == 2
    assert history.skipped == 1
    assert history.first_fault.startswith(named)
    assert len(history.first_fault) < 150


@pytest.mark.parametrize("line", ["{", "[" * 100_000, "\x00\x01", "NaN", '"x"'])
def test_a_line_that_is_no_record(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{json.dumps(train_record(1))}\n{line}\n\n{json.dumps(train_record(2))}\n")
    history = read(path)
    assert (history.steps, history.skipped) == ([1, 2], 1)


def test_kinds_of_later_versions_are_no_fault(tmp_path):
    records = [train_record(1), {"kind": "something new"}]
    assert read(write_lines(tmp_path / "metrics.jsonl", records)).skipped == 0
