from typing import Any

import pytest
import torch
from plain_models import MHA, MLA, SEPARATE, randomised, small, tokens_for

from abyssal.config import preset
from abyssal.errors import UserError
from abyssal.model import Cache

# values a token and layer: (as cached, with every head's key and value)
SIZES: dict[str, tuple[dict[str, Any], int, int]] = {
    "mha": (MHA | {"num_key_value_heads": 2}, 2 * 2 * 6, 2 * 2 * 6),
    "mla": (MLA, 8 + 6, 3 * (5 + 6 + 7)),
    "separate": (SEPARATE, 8 + 9, 3 * (5 + 6 + 7)),
}


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 4), (torch.bfloat16, 2), (torch.float64, 8)])
def test_nbytes_is_the_formula(kind: str, dtype: torch.dtype, width: int):
    attention, latent, expanded = SIZES[kind]
    config = small(attention=attention)
    assert config.attention.cached_values == latent
    assert config.attention.expanded_values == expanded
    assert Cache(config, 2, 11, dtype=dtype).nbytes == 3 * 2 * 11 * latent * width
    assert Cache(config, 2, 11, dtype=dtype, expanded=True).nbytes == 3 * 2 * 11 * expanded * width


def test_v3_keeps_71_times_less():
    config = preset("deepseek-v3")
    latent = Cache(config, 1, 2, dtype=torch.bfloat16).nbytes
    assert latent == 61 * 2 * 576 * 2
    expanded = Cache(config, 1, 2, dtype=torch.bfloat16, expanded=True).nbytes
    assert expanded == 61 * 2 * 40960 * 2
    assert round(expanded / latent) == 71


def test_it_holds_the_latents_and_the_rotary_key():
    config = small(moe=None)
    model, tokens = randomised(config), tokens_for(config, 2, 5)
    cache = Cache(config, 2, 8, dtype=torch.float64)
    model(tokens, cache=cache)
    layer = model.blocks[0]
    both = layer.self_attn.kv_a_proj_with_mqa(layer.input_layernorm(model.model.embed_tokens(tokens)))
    latent = both[..., :8]
    latent = latent / (latent.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.self_attn.kv_a_layernorm.weight
    (stored,) = cache.layers[0].tensors
    torch.testing.assert_close(stored[:, :5, :8], latent, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(stored[:, 0, 8:], both[:, 0, 8:])  # position 0 is not turned
    assert (stored[:, 5:] == 0).all()


@pytest.mark.parametrize("kind", SIZES)
def test_a_full_cache_says_so_and_stays_usable(kind: str):
    config = small(attention=SIZES[kind][0])
    model, tokens = randomised(config), tokens_for(config, 2, 8)
    cache = Cache(config, 2, 8, dtype=torch.float64)
    model(tokens[:, :6], cache=cache, valid=torch.ones(2, 6, dtype=torch.bool))
    with pytest.raises(UserError, match=r"^cache: 6 \+ 3 tokens are more than it has room for \(8\)$"):
        model(tokens[:, :3], cache=cache)
    assert cache.length == 6
    torch.testing.assert_close(model(tokens[:, 6:], cache=cache), model(tokens)[:, 6:], rtol=1e-9, atol=1e-9)
    with pytest.raises(UserError, match="cache: 8 \\+ 1 tokens"):
        model(tokens[:, :1], cache=cache)


def test_padding_in_a_later_piece():
    config = small(moe=None)
    model, tokens = randomised(config), tokens_for(config, 2, 9)
    cache = Cache(config, 2, 9, dtype=torch.float64)
    model(tokens[:, :3], cache=cache)
    valid = torch.tensor([[True, True, True, True], [True, True, False, False]])
    model(tokens[:, 3:7], cache=cache, valid=valid)
    out = model(tokens[:, 7:], cache=cache)
    short = torch.cat((tokens[1, :5], tokens[1, 7:])).unsqueeze(0)
    torch.testing.assert_close(out[1], model(short)[0, 5:], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(out[0], model(tokens[:1])[0, 7:], rtol=1e-9, atol=1e-9)
