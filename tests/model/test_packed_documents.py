"""Sequences packed with several documents: each must come out as it would alone."""

import pytest
import torch
from plain_models import MHA, MLA, SEPARATE, V1_MOE, YARN, difference, randomised, small, tokens_for
from torch import Tensor

from abyssal.config import ModelConfig
from abyssal.model import RoutingRecorder, Transformer
from abyssal.model.attention import LatentAttention

GROUPED = MHA | {"num_key_value_heads": 2}
ATTENTIONS = {"mla": MLA, "mla without q latent": MLA | {"q_lora_rank": None}, "grouped": GROUPED, "separate": SEPARATE}
# Padding at the end, padding at the front, one document that fills the row.
LENGTHS = [[13, 1, 40, 16], [5, 33, 32], [70]]
NUMBERS = [[3, 4, 9, -1], [-1, 0, 1], [2]]
DOCUMENTS = torch.stack(
    [torch.tensor(n).repeat_interleave(torch.tensor(m)) for n, m in zip(NUMBERS, LENGTHS, strict=True)]
)
RUNS = [
    (row, sum(lengths[:i]), sum(lengths[: i + 1]), NUMBERS[row][i] >= 0)
    for row, lengths in enumerate(LENGTHS)
    for i in range(len(lengths))
]
TOGETHER = [(slice(None), 0, 70, True)]


def config_of(attention: str, yarn: bool, **changes: object) -> ModelConfig:
    rope = {"rope": {"yarn": YARN}} if yarn else {}
    return small(attention=ATTENTIONS[attention], mtp={"num_nextn_predict_layers": 2}, **rope, **changes)


def outputs(
    model: Transformer,
    tokens: Tensor,
    runs: list[tuple[int | slice, int, int, bool]],
    documents: Tensor | None,
    recompute: bool,
    recorder: RoutingRecorder | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Logits of the main model and the MTP modules, [B, T, V] each, from passes over ``runs``; and all gradients of
    the same function of them."""
    depth = len(model.mtp_modules)
    weights = torch.randn(len(tokens), 70, 31, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    outs = [torch.zeros_like(weights) for _ in range(1 + depth)]
    model.zero_grad(set_to_none=True)
    for row, start, end, counted in runs:
        own = tokens[row, start : end + depth].view(-1, end - start + depth)
        seen = recorder if counted else None
        hidden = model.hidden(own[:, : end - start], documents=documents, recompute=recompute, recorder=seen)
        all_hidden = [
            hidden,
            *model.mtp_hidden(hidden, own, documents=documents, recompute=recompute, recorder=seen),
        ]
        loss = torch.zeros((), dtype=torch.float64)
        for k, (out, h) in enumerate(zip(outs, all_hidden, strict=True)):
            logits = model.lm_head(h).double()
            out[row, start:end] = logits.detach().view(out[row, start:end].shape)
            loss = loss + (1 + k) * (logits * weights[row, start:end].view(logits.shape)).sum()
        loss.backward()
    return outs, [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize(("yarn", "recompute"), [(False, False), (True, True)])
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_logits_and_gradients_are_those_of_each_document_alone(
    dtype: torch.dtype, attention: str, yarn: bool, recompute: bool
):
    """FP32 goes through the CPU's tiles, FP64 through a mask."""
    model = randomised(config_of(attention, yarn), std=0.2, dtype=dtype)
    tokens = tokens_for(model.config, 3, 72)
    expected, gradients = outputs(model, tokens, RUNS, None, False)
    got, ours = outputs(model, tokens, TOGETHER, DOCUMENTS, recompute)
    bound = 1e-11 if dtype == torch.float64 else 1e-3
    assert max(difference(a, b) for a, b in zip(got, expected, strict=True)) < bound
    assert len(ours) == len(gradients) > 20
    for a, b in zip(ours, gradients, strict=True):
        assert (a - b).norm() <= bound * b.norm()


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_bfloat16_in_training_is_as_near_as_each_document_alone(attention: str):
    """Without experts: rounding may send a token elsewhere."""
    model = randomised(config_of(attention, yarn=False, moe=None), std=0.1, dtype=torch.float32)
    tokens = tokens_for(model.config, 3, 72)
    exact = outputs(model, tokens, RUNS, None, False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        alone = outputs(model, tokens, RUNS, None, False)
        packed = outputs(model, tokens, TOGETHER, DOCUMENTS, False)
    for a, b, c in zip(*([*outs, *gradients] for outs, gradients in (packed, alone, exact)), strict=True):
        assert (a - c).norm() < 1.3 * (b - c).norm() + 2e-3 * c.norm() + 1e-6
        assert (a - c).norm() < 0.04 * c.norm() + 1e-6


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_positions_begin_anew_in_each_document(attention: str):
    """Attention sees only how far apart two tokens are, so that the outputs alone don't show it."""
    model, seen = randomised(config_of(attention, yarn=True)), []
    for module in (model.blocks[0], model.mtp_modules[0]):
        module.self_attn.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[1].rope))
    tokens = tokens_for(model.config, 3, 72)
    outputs(model, tokens, TOGETHER, DOCUMENTS, False)
    packed = seen.copy()
    for row, start, end, _ in RUNS:
        seen.clear()
        outputs(model, tokens, [(row, start, end, True)], None, False)
        for ours, alone in zip(packed, seen, strict=True):
            for table, expected in zip(ours, alone, strict=True):
                assert torch.equal(table[row, start:end], expected[0])


@pytest.mark.parametrize("changes", [{}, {"moe": V1_MOE, "attention": GROUPED}, {"moe": {"segments": 2}}])
def test_padding_is_not_counted_as_load(changes: dict[str, object]):
    if changes.get("moe", {}) == V1_MOE:
        config = small(**changes)
    else:
        config = small(mtp={"num_nextn_predict_layers": 2}, **changes)
    model = randomised(config)
    tokens = tokens_for(config, 3, 72)
    alone, together = RoutingRecorder(), RoutingRecorder()
    outputs(model, tokens, RUNS, None, False, alone)
    outputs(model, tokens, TOGETHER, DOCUMENTS, False, together)
    assert set(alone.routings) == set(together.routings) == set(model.routers)
    for layer, routings in together.routings.items():
        assert torch.equal(sum(r.load() for r in routings), sum(r.load() for r in alone.routings[layer]))


def test_a_row_of_one_document_is_an_ordinary_row():
    model = randomised(small())
    tokens = tokens_for(model.config, 2, 40)
    documents = torch.tensor([[7], [0]]).expand(2, 40)
    torch.testing.assert_close(model.hidden(tokens, documents=documents), model.hidden(tokens), rtol=1e-11, atol=1e-11)


def test_absorbed_path_stays_within_documents():
    model = randomised(small())
    attention, seen = model.blocks[0].self_attn, []
    assert isinstance(attention, LatentAttention)
    attention.register_forward_pre_hook(lambda _, args: seen.append(args))
    model.hidden(tokens_for(model.config, 3, 70), documents=DOCUMENTS)
    x, context, _ = seen[0]
    assert difference(attention(x, context, absorb=True), attention(x, context, absorb=False)) < 1e-11


def test_documents_go_neither_with_a_cache_nor_with_valid():
    from abyssal.model import Cache

    model = randomised(small())
    tokens = tokens_for(model.config, 3, 70)
    with pytest.raises(ValueError, match="documents"):
        model.hidden(tokens, documents=DOCUMENTS, valid=DOCUMENTS >= 0)
    with pytest.raises(ValueError, match="documents"):
        model.hidden(tokens, documents=DOCUMENTS, cache=Cache(model.config, 3, 70))


def test_compiled_attention_takes_documents_and_is_not_compiled_anew_for_others():
    model = randomised(small(), dtype=torch.float32)
    tokens = tokens_for(model.config, 3, 70)
    others = torch.arange(70).div(9, rounding_mode="floor").expand(3, 70)
    expected = [model.hidden(tokens, documents=documents) for documents in (DOCUMENTS, others)]
    torch._dynamo.reset()
    for block in model.blocks:
        block.self_attn = torch.compile(block.self_attn, backend="eager", fullgraph=True, dynamic=False)
    got = [model.hidden(tokens, documents=DOCUMENTS)]
    with torch._dynamo.config.patch(error_on_recompile=True):
        got.append(model.hidden(tokens, documents=others))
    for a, b in zip(got, expected, strict=True):
        assert difference(a, b) < 1e-4
