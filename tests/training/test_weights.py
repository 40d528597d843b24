"""Which weights become BF16, that no bit is lost there and back, and that they are written to disk as FP32."""

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import MODEL, scrambled
from torch import nn

from abyssal.checkpoint import load_model, save_model
from abyssal.config import resolve_model
from abyssal.kernels.adamw import merge
from abyssal.model import Transformer
from abyssal.training.optimizer import build_optimizer
from abyssal.training.recipe import OptimizerConfig
from abyssal.training.weights import lows, product_matrices, sum_gradients_in_float32, to_bfloat16, to_float32

MHA = {"kind": "mha", "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "bias": True}


def build(**changes: object) -> tuple[Transformer, torch.optim.Optimizer]:
    config = resolve_model({**MODEL, **changes})
    model = scrambled(Transformer(config, generator=torch.Generator().manual_seed(0)))
    return model, build_optimizer(model, OptimizerConfig(lr=1e-3))


class TestRule:
    def test_by_name(self):
        model, _ = build()
        others = {n for n, _ in model.named_parameters()} - product_matrices(model).keys()
        norms = {n for n in others if n.endswith("norm.weight")}
        routers = {"model.layers.1.mlp.gate.weight", "model.layers.2.mlp.gate.weight"}
        assert others - norms == {"model.embed_tokens.weight", *routers}
        assert len(norms) == 2 * 5 + 2 * 1 + 4 - 1 + 1  # four in each of three blocks, three more in MTP, the last one
        for name in ("lm_head.weight", "model.layers.2.eh_proj.weight", "model.layers.1.mlp.experts.gate_up_proj"):
            assert name in product_matrices(model)

    def test_a_tied_head_is_an_embedding(self):
        model, _ = build(tie_word_embeddings=True)
        assert not {"lm_head.weight", "model.embed_tokens.weight"} & product_matrices(model).keys()

    def test_biases_are_no_matrices(self):
        model, _ = build(attention=MHA, rope={"layout": "halves"})
        names = product_matrices(model).keys()
        assert "model.layers.0.self_attn.q_proj.weight" in names
        assert "model.layers.0.self_attn.q_proj.bias" not in names


class TestThereAndBack:
    @pytest.mark.parametrize("tied", [False, True])
    def test_no_bit_is_lost(self, tied):
        model, optimizer = build(tie_word_embeddings=tied)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        same = dict(model.named_parameters())
        model(torch.arange(9).view(1, 9)).sum().backward()
        to_bfloat16(model, optimizer)
        matrices = product_matrices(model)
        for name, p in model.named_parameters():
            assert p is same[name]
            assert p.dtype == (torch.bfloat16 if name in matrices else torch.float32)
        assert lows(model, optimizer).keys() == matrices.keys()
        for name, low in lows(model, optimizer).items():
            assert torch.equal(merge(matrices[name].data, low), before[name])
            assert matrices[name].grad is None
        to_float32(model, optimizer)
        for name, p in model.named_parameters():
            assert p is same[name]
            assert p.dtype == torch.float32
            assert torch.equal(p, before[name])
        assert lows(model, optimizer) == {}
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied

    def test_gradients_of_the_new_dtype(self):
        model, optimizer = build()
        to_bfloat16(model, optimizer)
        matrices = product_matrices(model)
        for wanted, dtype in ((True, torch.float32), (False, torch.bfloat16)):
            sum_gradients_in_float32(model, wanted)
            for _ in range(2):
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    hidden = model.hidden(torch.arange(9).view(1, 9))
                    model.lm_head(hidden).float().square().sum().backward()
            for name, p in model.named_parameters():
                if p.grad is not None:
                    assert p.grad.dtype == (dtype if name in matrices else torch.float32), name
            model.zero_grad()


class TestOnDisk:
    @pytest.mark.parametrize("tied", [False, True])
    def test_masters_are_written(self, tmp_path, tied):
        model, optimizer = build(tie_word_embeddings=tied)
        (tmp_path / "before").mkdir(), (tmp_path / "after").mkdir()
        save_model(model, tmp_path / "before")
        to_bfloat16(model, optimizer)
        save_model(model, tmp_path / "after", lows(model, optimizer))
        left, right = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "after"))
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) and right[name].dtype == torch.float32 for name in left)
        assert (tmp_path / "before/config.json").read_text() == (tmp_path / "after/config.json").read_text()
        assert all(p.dtype == torch.float32 for p in load_model(tmp_path / "after").parameters())

    def test_one_tensor_at_a_time(self, tmp_path, monkeypatch):
        """No two masters of a matrix stand in memory together."""
        import abyssal.checkpoint.folder as folder

        model, optimizer = build()
        to_bfloat16(model, optimizer)
        alive: list[int] = []

        class Counted(nn.Parameter):
            def __del__(self):
                alive.pop()

        def counted(weight, low):
            assert len(alive) <= 1
            alive.append(1)
            return Counted(merge(weight, low), requires_grad=False)

        monkeypatch.setattr(folder, "merge", counted)
        save_model(model, tmp_path, lows(model, optimizer))
        assert (tmp_path / "model.safetensors").stat().st_size > 4 * sum(p.numel() for p in model.parameters())
