"""The MTP modules, and what a block does with the recorder and recomputation."""

from typing import Any

import pytest
import torch
from plain_models import MHA, YARN, Plain, difference, randomised, small, tokens_for

from abyssal.model import RoutingRecorder
from abyssal.model.moe import MoE


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize(
    "changes",
    [{}, {"rope": {"yarn": YARN}, "tie_word_embeddings": True}, {"attention": MHA, "moe": None}],
    ids=["v3", "yarn, tied", "dense"],
)
def test_mtp_logits_equal_plain_loops(depth: int, changes: dict[str, Any]):
    config = small(**changes, mtp={"num_nextn_predict_layers": depth}, num_hidden_layers=2)
    model, tokens = randomised(config), tokens_for(config, 2, 8 + depth)
    ours = model.mtp_logits(tokens)
    assert len(ours) == depth
    for row in range(2):
        plain = Plain(model).mtp(tokens[row].tolist())
        for k in range(depth):
            assert ours[k].shape == (2, 8, config.vocab_size)
            assert difference(ours[k][row], plain[k]) < 1e-10


def test_mtp_module_sees_no_token_after_the_one_it_embeds():
    config = small(mtp={"num_nextn_predict_layers": 2})
    model, tokens = randomised(config), tokens_for(config, 1, 12)
    before = model.mtp_logits(tokens)
    for k in (1, 2):  # position i of depth k has seen tokens up to i + k
        changed = tokens.clone()
        changed[0, 7] = (changed[0, 7] + 1) % config.vocab_size
        after = model.mtp_logits(changed)[k - 1]
        assert difference(after[:, : 7 - k], before[k - 1][:, : 7 - k]) < 1e-12
        assert (after[0, 7 - k] != before[k - 1][0, 7 - k]).any()


def test_mtp_needs_its_tokens():
    config = small(mtp={"num_nextn_predict_layers": 2})
    model, tokens = randomised(config), tokens_for(config, 1, 9)
    hidden = model.hidden(tokens[:, :8])
    with pytest.raises(ValueError, match="tokens: 9 a row are too few for 8 \\+ 2"):
        model.mtp_hidden(hidden, tokens)


@pytest.mark.parametrize(
    ("first", "freq", "expected"),
    [(1, 1, [False, True, True, True, True]), (0, 2, [True, False, True, False, True]), (5, 1, [False] * 5)],
)
def test_which_layers_have_experts(first: int, freq: int, expected: list[bool]):
    moe = {"first_k_dense_replace": first, "moe_layer_freq": freq}
    config = small(moe=moe, num_hidden_layers=4, mtp={"num_nextn_predict_layers": 1})
    model = randomised(config)
    assert [isinstance(block.mlp, MoE) for block in (*model.blocks, *model.mtp_modules)] == expected
    recorder = RoutingRecorder()
    tokens = tokens_for(config, 1, 5)
    model.mtp_hidden(model.hidden(tokens[:, :4], recorder=recorder), tokens, recorder=recorder)
    assert sorted(recorder.routings) == [layer for layer, has in enumerate(expected) if has]


def test_names_are_the_checkpoints():
    config = small(mtp={"num_nextn_predict_layers": 1}, num_hidden_layers=2)
    names = set(randomised(config).state_dict())
    last = {n.removeprefix("model.layers.2.") for n in names if n.startswith("model.layers.2.")}
    assert {"eh_proj.weight", "enorm.weight", "hnorm.weight", "shared_head.norm.weight"} < last
    assert not any("embed" in n or "shared_head.head" in n for n in last)
    assert {n for n in names if not n.startswith("model.layers.")} == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    }
    assert {n.removeprefix("model.layers.1.") for n in names if n.startswith("model.layers.1.")} == {
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        *(f"self_attn.{p}.weight" for p in ("q_a_proj", "q_a_layernorm", "q_b_proj")),
        *(f"self_attn.{p}.weight" for p in ("kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj")),
        "mlp.gate.weight",
        "mlp.gate.e_score_correction_bias",
        "mlp.experts.gate_up_proj",
        "mlp.experts.down_proj",
        *(f"mlp.shared_experts.{p}_proj.weight" for p in ("gate", "up", "down")),
    }


def test_recomputation_keeps_fewer_activations():
    config = small(num_hidden_layers=3, moe={"first_k_dense_replace": 1})
    model, tokens = randomised(config, dtype=torch.float32), tokens_for(config, 2, 20)
    kept = {}
    for recompute in (False, True):
        seen: dict[int, int] = {}

        def pack(tensor: torch.Tensor, seen: dict[int, int] = seen) -> torch.Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            hidden = model.hidden(tokens, recompute=recompute)
            kept[recompute] = sum(seen.values())
        hidden.sum().backward()
    parameters = sum(p.nbytes for p in model.parameters())
    assert kept[True] < parameters + (kept[False] - parameters) / 2
