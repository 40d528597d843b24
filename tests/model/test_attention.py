"""The absorbed and the expanded path, with every kind of cache, against the plain forward pass and each other."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_models import MHA, MLA, SEPARATE, YARN, Plain, difference, randomised, small, tokens_for
from torch import Tensor

from abyssal.config import preset
from abyssal.model import Cache, Transformer
from abyssal.model.attention import Context, LatentAttention, build_mask
from abyssal.model.rotary import rotary_tables

KINDS: dict[str, dict[str, Any]] = {
    "mla": {"attention": MLA},
    "mla yarn": {"attention": {"q_lora_rank": None, "bias": True}, "rope": {"yarn": YARN}},
    "mla wide values": {"attention": {"v_head_dim": 15, "qk_nope_head_dim": 3}, "rope": {"layout": "halves"}},
    "mha": {"attention": MHA, "rope": {"layout": "halves"}},
    "mha grouped": {"attention": MHA | {"num_key_value_heads": 2}},
    "separate": {"attention": SEPARATE},
    "separate yarn": {"attention": SEPARATE, "rope": {"yarn": YARN}},
}
MODELS: dict[str, Transformer] = {}
PATHS = ("auto", "absorbed", "expanded", "expanded cache")


def model_of(kind: str) -> Transformer:
    """All dense: routing jumps would hide nothing here, and choices equal to the last bit are not the question."""
    if kind not in MODELS:
        MODELS[kind] = randomised(small(**KINDS[kind], moe=None, num_hidden_layers=2)).requires_grad_(False)
    return MODELS[kind]


def force(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    if path in ("absorbed", "expanded"):
        monkeypatch.setattr(LatentAttention, "absorb_pays", lambda self, queries: path == "absorbed")


def decode(
    model: Transformer, tokens: Tensor, cuts: list[int], valid: Tensor | None, expanded: bool, room: int = 0
) -> Tensor:
    """Logits of ``tokens`` fed in pieces that begin at ``cuts``; ``valid`` is for the first piece."""
    cache = Cache(model.config, tokens.shape[0], tokens.shape[1] + room, dtype=torch.float64, expanded=expanded)
    ends = [*cuts, tokens.shape[1]]
    out = []
    for start, end in zip([0, *cuts], ends, strict=True):
        out.append(model(tokens[:, start:end], valid=valid if start == 0 else None, cache=cache))
        assert cache.length == end
    return torch.cat(out, dim=1)


@settings(max_examples=80)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    path=st.sampled_from(PATHS),
    side=st.sampled_from(["none", "left", "right"]),
    cuts=st.lists(st.integers(1, 13), unique=True, max_size=13).map(sorted),
    short=st.integers(1, 5),
    room=st.integers(0, 3),
)
def test_cached_equals_uncached(kind: str, path: str, side: str, cuts: list[int], short: int, room: int):
    model = model_of(kind)
    tokens = tokens_for(model.config, 2, 14)
    prompt = cuts[0] if cuts else 14
    missing = min(short, prompt - 1)  # slots of the second row that the prompt leaves empty
    valid = torch.ones(2, prompt, dtype=torch.bool)
    if side == "left":
        valid[1, :missing] = False
    elif side == "right":
        valid[1, prompt - missing :] = False
    whole = torch.cat((valid, torch.ones(2, 14 - prompt, dtype=torch.bool)), dim=1)
    with pytest.MonkeyPatch.context() as patch:
        force(patch, path)
        given_valid = None if side == "none" else valid
        logits = decode(model, tokens, cuts, given_valid, path == "expanded cache", room)
    assert logits.isfinite().all()
    for row in range(2):  # the reference: each sequence by itself, without padding, without cache
        kept = whole[row]
        assert difference(logits[row, kept], model(tokens[row, kept].unsqueeze(0))[0]) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_uncached_equals_plain_loops(kind: str):
    model = model_of(kind)
    tokens = tokens_for(model.config, 1, 9)
    assert difference(model(tokens)[0], Plain(model)(tokens[0].tolist())) < 1e-10


@pytest.mark.parametrize("kind", [k for k in KINDS if k.startswith("mla")])
@pytest.mark.parametrize("padded", [False, True])
def test_absorbed_equals_expanded_without_a_cache(kind: str, padded: bool):
    model = model_of(kind)
    config, layer = model.config, model.blocks[1].self_attn
    assert isinstance(layer, LatentAttention)
    valid = torch.arange(9) >= torch.tensor([[0], [4]]) if padded else None
    positions = torch.arange(9).unsqueeze(0) if valid is None else (valid.long().cumsum(1) - 1).clamp_min(0)
    mask, causal = build_mask(valid, 0, 9, torch.device("cpu"))
    tables = rotary_tables(config.rope, config.attention.rotary_dim, positions, torch.float64)
    context = Context(tables, 0, mask, causal)
    x = torch.randn(2, 9, config.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    absorbed, expanded, chosen = (layer(x, context, absorb=absorb) for absorb in (True, False, None))
    seen = slice(None) if valid is None else valid
    assert not torch.equal(absorbed, expanded)  # two computations, or this test shows nothing
    assert difference(absorbed[seen], expanded[seen]) < 1e-10
    assert torch.equal(chosen, expanded)


@pytest.mark.parametrize("new", [1, 4])
def test_choosing_the_path_by_hand(new: int):
    model = model_of("mla yarn")
    config, layer = model.config, model.blocks[0].self_attn
    x = torch.randn(2, 6 + new, config.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    outs = {}
    for absorb in (True, False, None):
        cache = Cache(config, 2, 12, dtype=torch.float64).layers[0]
        for start, count in ((0, 6), (6, new)):
            positions = torch.arange(start, start + count).unsqueeze(0)
            tables = rotary_tables(config.rope, config.attention.rotary_dim, positions, torch.float64)
            context = Context(tables, start, *build_mask(None, start, count, torch.device("cpu")))
            outs[absorb] = layer(x[:, start : start + count], context, cache, absorb=absorb)
    assert difference(outs[True], outs[False]) < 1e-10
    assert torch.equal(outs[None], outs[layer.absorb_pays(new)])


def test_absorption_pays_for_up_to_170_new_tokens_of_v3():
    # a key and head: expanded C·(N + V) once + (N + R + V) a query; absorbed (C + R) + C a query
    with torch.device("meta"):
        layer = Transformer(preset("deepseek-v3").model_copy(update={"num_hidden_layers": 1})).blocks[0].self_attn
    assert isinstance(layer, LatentAttention)
    for queries in (1, 2, 100, 169, 170, 171, 1000):
        expanded, absorbed = 512 * (128 + 128) + queries * (128 + 64 + 128), queries * (512 + 64 + 512)
        assert layer.absorb_pays(queries) == (absorbed < expanded)
    assert layer.absorb_pays(170)
    assert not layer.absorb_pays(171)


@pytest.mark.parametrize("kind", ["mla", "mha", "separate"])
def test_a_moe_model_decodes_as_it_prefills(kind: str):
    model = randomised(small(**KINDS[kind]))
    tokens = tokens_for(model.config, 3, 10)
    assert difference(decode(model, tokens, [4, 5, 8], None, False), model(tokens)) < 1e-10


def test_no_token_sees_a_later_one():
    for kind in KINDS:
        model = model_of(kind)
        tokens = tokens_for(model.config, 1, 10)
        changed = tokens.clone()
        changed[0, 6] = (changed[0, 6] + 1) % 31
        before, after = model(tokens), model(changed)
        assert difference(after[:, :6], before[:, :6]) < 1e-12
        assert (before[:, 6:] != after[:, 6:]).any(-1).all()
