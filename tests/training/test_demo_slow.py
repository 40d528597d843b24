"""What the demo promises, by running it: minutes on 2 cores (make test-slow)."""

import math

import pytest
from exported_perplexity import perplexity_in_transformers

import abyssal
from abyssal.data.corpus import documents
from abyssal.evaluation import perplexity
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
    # Exported, it predicts as well in transformers as here.
    abyssal.export(tmp_path / "run", tmp_path / "exported", shard_size=10_000_000)
    text = "".join(documents("tinyshakespeare"))[-20_000:]
    model, tokenizer = abyssal.load(tmp_path / "run")
    context = model.config.max_position_embeddings
    pieces = [text[start : start + context // 2] for start in range(0, len(text), context // 2)]
    ours = sum((p := perplexity(model, tokenizer, [piece], context=context)).nats * p.tokens for piece in pieces)
    tokens = sum(len(tokenizer.encode(piece)) for piece in pieces)
    theirs = [math.log(perplexity_in_transformers(tmp_path / "exported", piece, context)) for piece in pieces]
    lengths = [len(tokenizer.encode(piece)) for piece in pieces]
    expected = sum(nats * length for nats, length in zip(theirs, lengths, strict=True)) / tokens
    assert math.exp(ours / tokens) == pytest.approx(math.exp(expected), rel=1e-4)
