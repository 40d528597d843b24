"""The final figures against numpy."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.training.summary import summarize


def record(step, load, bias=None, steps=1, loss=1.0):
    load = np.asarray(load)
    layer = {"load": load.tolist(), "cv": float(load.std() / max(load.mean(), 1e-9)), "max_vio": 0.0, "dead": 0}
    if bias is not None:
        layer["bias"] = list(bias)
    return {
        "kind": "train",
        "step": step,
        "steps": steps,
        "loss": loss,
        "tokens": 10 * step,
        "step_time": 0.5,
        "layers": {"1": layer},
    }


@settings(max_examples=40)
@given(
    loads=st.lists(st.lists(st.integers(0, 99), min_size=3, max_size=3), min_size=1, max_size=20),
    window=st.integers(1, 25),
    seed=st.integers(0, 1000),
)
def test_layers(loads, window, seed):
    steps = len(loads)
    biases = np.random.default_rng(seed).normal(size=(steps, 3))
    records = [record(i + 1, load, biases[i]) for i, load in enumerate(loads)]
    records.insert(steps // 2, {"kind": "samples", "step": 1, "samples": []})
    summary = summarize(records, window)
    used = min(window, steps)
    recent = np.array(loads[-used:], dtype=float)
    total = recent.sum(0)
    row = summary["layers"]["1"]
    assert summary["window"] == used
    if total.sum() > 0:
        assert row["cv"] == pytest.approx(total.std() / total.mean())
        assert row["max_vio"] == pytest.approx((total.max() - total.mean()) / total.mean(), abs=1e-12)
    assert row["dead"] == (total == 0).sum()
    assert row["cv_per_step"] == pytest.approx(np.mean([x.std() / max(x.mean(), 1e-9) for x in recent]))
    assert row["bias_range"] == pytest.approx([biases[-1].min(), biases[-1].max()], rel=1e-5)
    if used == steps:
        assert row["bias_first"] is row["bias_last"] is None
    else:
        assert row["bias_first"] == pytest.approx(np.abs(biases[used - 1]).mean(), rel=1e-5)
        assert row["bias_last"] == pytest.approx(
            np.abs(biases[-1] - biases[steps - used - 1]).mean(), rel=1e-4, abs=1e-6
        )
    assert summary["seconds"] == pytest.approx(0.5 * steps)
    assert summary["step"] == steps
    json.dumps(summary)


def test_records_of_several_steps_weigh_as_many():
    records = [record(3, [4, 0], steps=3), record(4, [2, 2])]
    row = summarize(records, 4)["layers"]["1"]
    assert row["cv_per_step"] == pytest.approx(0.75)  # three steps at 1, one at 0
    assert row["cv"] == pytest.approx(2 / 4)  # loads of 6 and 2


def test_validation():
    records = [
        {"kind": "validation", "step": s, "loss": x, "bits_per_byte": 2 * x} for s, x in ((1, 3), (2, 1), (3, 2))
    ]
    summary = summarize(records, 10)
    assert summary["validation"] == {"step": 3, "loss": 2, "bits_per_byte": 4}
    assert summary["best_validation"] == {"step": 2, "loss": 1, "bits_per_byte": 2}


def test_nothing_yet():
    assert summarize([], 10)["layers"] == {}
