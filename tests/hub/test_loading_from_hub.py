"""Every way in takes a name on the hub: load, a few layers, the config alone, convert and export."""

import json

import pytest
import torch
from huggingface_hub import constants
from tiny_runs import MODEL, same, scrambled

import abyssal
from abyssal.checkpoint.convert import convert
from abyssal.config import resolve_model
from abyssal.data.tokenizer import byte_tokenizer
from abyssal.errors import UserError
from abyssal.loading import find, find_config, find_tokenizer
from abyssal.model import Transformer

NAME = "deep/tiny"


@pytest.fixture
def published(hub, tmp_path):
    model = scrambled(Transformer(resolve_model(MODEL), generator=torch.Generator().manual_seed(0)))
    abyssal.export(model, tmp_path / "model", tokenizer=byte_tokenizer(), shard_size=30_000)
    hub.write(NAME, {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()})
    return model


def downloaded(hub):
    return {path.rsplit("/", 1)[1] for method, path in hub.requests if method == "GET" and "/resolve/" in path}


def test_load(hub, published):
    model, tokenizer = abyssal.load(NAME)
    assert same(dict(model.state_dict()), dict(published.state_dict()))
    assert tokenizer.fingerprint == byte_tokenizer().fingerprint
    hub.requests.clear()
    abyssal.load(NAME)
    assert not downloaded(hub)  # from the cache


def test_offline_after_that(hub, published, monkeypatch):
    abyssal.load(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    abyssal.load(NAME)


def test_offline_before(hub, published, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as caught:
        abyssal.load(NAME)
    assert "HF_HUB_OFFLINE is set" in str(caught.value)
    assert str(constants.HF_HUB_CACHE) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_weights(hub, published):
    folder = find(NAME, weights=False)
    assert find_tokenizer(folder).fingerprint == byte_tokenizer().fingerprint
    assert "tokenizer.json" in downloaded(hub)
    assert not any(name.endswith(".safetensors") for name in downloaded(hub))


def test_one_layer_downloads_its_own_files(hub, published, tmp_path):
    part, _ = abyssal.load(NAME, layers=[0])
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {file for name, file in index.items() if ".layers." not in name or ".layers.0." in name}
    assert {name for name in downloaded(hub) if name.endswith(".safetensors")} == needed
    assert len(needed) < len(set(index.values()))
    assert torch.equal(part.blocks[0].mlp.up_proj.weight, published.blocks[0].mlp.up_proj.weight)


def test_the_config_alone(hub, published):
    assert find_config(NAME).attention == published.config.attention
    assert downloaded(hub) == {"config.json"}


def test_convert_and_export(hub, published, tmp_path):
    convert(find(NAME), tmp_path / "bf16", torch.bfloat16)
    abyssal.export(NAME, tmp_path / "out")
    model, tokenizer = abyssal.load(tmp_path / "out")
    assert same(dict(model.state_dict()), dict(published.state_dict()))
    assert tokenizer is not None


@pytest.mark.parametrize("name", ["deep/none", "runs/dmeo"])
def test_what_is_nowhere(hub, published, name):
    with pytest.raises(UserError, match=r"no such folder here; on the hub: .* has no such repository") as caught:
        abyssal.load(name)
    assert str(caught.value).count(name) == 1


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "/nowhere", "./none", "~/none", ""])
def test_what_is_no_name(hub, published, name):
    with pytest.raises(UserError):
        abyssal.load(name) if name else find_config(name)
    assert not hub.requests


def test_a_shard_cut_off_leaves_no_model(hub, published):
    files = [path.name for path in (hub.root / NAME / "main").glob("*.safetensors")]
    hub.refuse = lambda method, path: "cut" if method == "GET" and path.endswith(sorted(files)[2]) else None
    with pytest.raises(UserError, match="broke off"):
        abyssal.load(NAME)
    hub.refuse = lambda method, path: None
    abyssal.load(NAME)
