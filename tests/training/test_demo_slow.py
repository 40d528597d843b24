"""What the demo promises, by running it: minutes on 2 cores (make test-slow)."""

import pytest

from abyssal.training.recipe import read_recipe
from abyssal.training.start import start
from abyssal.training.summary import summarize


@pytest.mark.slow
def test_the_demo_keeps_its_promises(tmp_path):
    recipe = read_recipe("demo", {"data": {"cache": str(tmp_path / "cache")}})
    trainer = start(recipe, tmp_path / "run")
    assert trainer.train()
    summary = summarize(trainer.run.metrics(), recipe.log.window)
    assert summary["validation"]["bits_per_byte"] <= 2.25
    assert len(summary["layers"]) == 4
    for row in summary["layers"].values():
        assert row["cv"] < 0.1
        assert row["bias_last"] < row["bias_first"] / 3
