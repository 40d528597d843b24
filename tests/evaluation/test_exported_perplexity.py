"""What was trained here, exported, predicts the same text as well in transformers, with no code of ours."""

import pytest
import torch
from exported_perplexity import perplexity_in_transformers
from tiny_runs import tiny_recipe, tiny_trainer

import abyssal
from abyssal.evaluation import perplexity

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
TEXT = "the quick brown fox jumps over a lazy dog. " * 12


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    data = tiny_recipe(folder)
    data["training"] = {**data["training"], "steps": 40}
    data["schedule"] = {"warmup": 2}
    trainer = tiny_trainer(data, folder / "run")
    assert trainer.train()
    abyssal.export(folder / "run", folder / "out", shard_size=20_000)
    return folder


def test_the_same_perplexity(exported):
    model, tokenizer = abyssal.load(exported / "run")
    # one window a document of ours is compared with their windows: text that fits in one context
    context = model.config.max_position_embeddings
    text = TEXT[: context - 8]
    ours = perplexity(model, tokenizer, [text], context=context)
    theirs = perplexity_in_transformers(exported / "out", text, context)
    assert ours.perplexity == pytest.approx(theirs, rel=1e-5)
    again, tokenizer = abyssal.load(exported / "out")
    assert perplexity(again, tokenizer, [text], context=context).nats == pytest.approx(ours.nats, rel=1e-6)
    untrained = abyssal.Transformer(model.config, generator=torch.Generator().manual_seed(0))
    assert ours.perplexity < 0.7 * perplexity(untrained, tokenizer, [text], context=context).perplexity


def test_the_same_text(exported):
    model, tokenizer = abyssal.load(exported / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported / "out", dtype=torch.float32).eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(exported / "out")
    ids = their_tokenizer("the quick", return_tensors="pt")["input_ids"]
    assert ids.tolist() == [[tokenizer.bos_id, *tokenizer.encode("the quick")]]
    out = theirs.generate(ids, do_sample=False, max_new_tokens=20, pad_token_id=0)[0, ids.shape[1] :]
    text = their_tokenizer.decode(out, skip_special_tokens=True)
    assert abyssal.generate(model, tokenizer, "the quick", temperature=0, max_new_tokens=20) == text
