"""A model in a folder: round trips bit for bit, published names, transformers as the judge, and damaged files."""

import json
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_runs import MODEL, same, scrambled

import abyssal
from abyssal.checkpoint import load_model, save_model, write_tensors
from abyssal.config import resolve_model
from abyssal.data.tokenizer import byte_tokenizer
from abyssal.errors import UserError
from abyssal.model import Transformer

V2_MOE = {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False}
MHA = {"kind": "mha", "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
SHAPES = {
    "v3": MODEL,
    "v3-groups": {**MODEL, "moe": {**MODEL["moe"], "n_group": 2, "topk_group": 1}, "num_hidden_layers": 3},
    "two-mtp": {**MODEL, "mtp": {"num_nextn_predict_layers": 2}},
    "v2": {
        **MODEL,
        "moe": {**MODEL["moe"], **V2_MOE, "topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1},
        "mtp": {},
    },
    "v1": {**MODEL, "attention": MHA, "rope": {"layout": "halves"}, "moe": {**MODEL["moe"], **V2_MOE}, "mtp": {}},
    "dense": {**MODEL, "moe": None, "mtp": {}},
    "tied": {**MODEL, "tie_word_embeddings": True},
    "attention-bias": {**MODEL, "attention": {**MODEL["attention"], "bias": True}},
}


def build(shape: dict) -> Transformer:
    return scrambled(Transformer(resolve_model(shape), generator=torch.Generator().manual_seed(5))).eval()


@pytest.fixture
def saved(tmp_path):
    model = build(MODEL)
    save_model(model, tmp_path)
    return model, tmp_path


class TestRoundTrip:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_bit_for_bit(self, tmp_path, shape, dtype):
        model = build(SHAPES[shape]).to(dtype)
        save_model(model, tmp_path)
        again = load_model(tmp_path)
        assert same(dict(model.state_dict()), dict(again.state_dict()))
        assert again.config.model_copy(update={"published": {}}) == model.config
        assert not again.training
        tokens = torch.arange(24).view(2, 12)
        with torch.no_grad():
            assert torch.equal(model(tokens), again(tokens))
        if again.config.tie_word_embeddings:
            assert again.lm_head.weight is again.model.embed_tokens.weight

    def test_biases_stay_in_float32(self, tmp_path):
        """A step of 0.001 vanishes in BF16 (transformers, DeepSpeed #8358)."""
        model = build(MODEL).to(torch.bfloat16)
        bias = torch.tensor([1.0, -1.0, 0.5, 0.25]) + 0.001
        model.routers[1].e_score_correction_bias.copy_(bias)
        save_model(model, tmp_path)
        for dtype in (None, torch.bfloat16, torch.float64):
            again = load_model(tmp_path, dtype=dtype)
            assert again.routers[1].e_score_correction_bias.dtype == torch.float32
            assert torch.equal(again.routers[1].e_score_correction_bias, bias)
            assert again.lm_head.weight.dtype == (dtype or torch.bfloat16)

    def test_another_dtype(self, saved):
        model, folder = saved
        again = load_model(folder, dtype=torch.bfloat16)
        assert torch.equal(again.lm_head.weight, model.lm_head.weight.to(torch.bfloat16))


class TestOnDisk:
    def test_published_names_and_shapes(self, saved):
        model, folder = saved
        attention = {
            "q_a_proj.weight": [16, 32],
            "q_a_layernorm.weight": [16],
            "q_b_proj.weight": [32, 16],  # 2 heads of 8 + 8
            "kv_a_proj_with_mqa.weight": [24, 32],
            "kv_a_layernorm.weight": [16],
            "kv_b_proj.weight": [32, 16],  # 2 heads of 8 + 8
            "o_proj.weight": [32, 16],
        }
        expected = {"model.embed_tokens.weight": [258, 32], "model.norm.weight": [32], "lm_head.weight": [258, 32]}

        def mlp(prefix, width):
            for name in ("gate_proj", "up_proj"):
                expected[f"{prefix}.{name}.weight"] = [width, 32]
            expected[f"{prefix}.down_proj.weight"] = [32, width]

        for layer in range(3):
            p = f"model.layers.{layer}"
            expected |= {f"{p}.self_attn.{name}": shape for name, shape in attention.items()}
            expected |= {f"{p}.{name}.weight": [32] for name in ("input_layernorm", "post_attention_layernorm")}
            if layer == 0:
                mlp(f"{p}.mlp", 48)
                continue
            expected |= {f"{p}.mlp.gate.weight": [4, 32], f"{p}.mlp.gate.e_score_correction_bias": [4]}
            mlp(f"{p}.mlp.shared_experts", 16)
            for expert in range(4):
                mlp(f"{p}.mlp.experts.{expert}", 16)
        expected |= {f"model.layers.2.{name}.weight": [32] for name in ("enorm", "hnorm", "shared_head.norm")}
        expected["model.layers.2.eh_proj.weight"] = [32, 64]
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            assert {name: file.get_slice(name).get_shape() for name in file.keys()} == expected  # noqa: SIM118
            assert file.metadata() == {"format": "pt"}
            experts = model.model.layers[1].mlp.experts
            name = "model.layers.1.mlp.experts.2"
            assert torch.equal(file.get_tensor(f"{name}.gate_proj.weight"), experts.gate_up_proj[2, :16])
            assert torch.equal(file.get_tensor(f"{name}.up_proj.weight"), experts.gate_up_proj[2, 16:])
            assert torch.equal(file.get_tensor(f"{name}.down_proj.weight"), experts.down_proj[2])

    def test_a_tied_head_is_written_once(self, tmp_path):
        save_model(build(SHAPES["tied"]), tmp_path)
        names = load_file(tmp_path / "model.safetensors").keys()
        assert "model.embed_tokens.weight" in names
        assert "lm_head.weight" not in names

    def test_what_published_files_repeat_is_accepted(self, saved):
        """V3's checkpoint holds embedding and head a second time under the MTP module."""
        model, folder = saved
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.2.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.2.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        assert same(dict(model.state_dict()), dict(load_model(folder).state_dict()))

    def test_config_is_published(self, saved):
        content = json.loads((saved[1] / "config.json").read_text())
        assert content["model_type"] == "deepseek_v3"
        assert content["architectures"] == ["DeepseekV3ForCausalLM"]
        assert content["kv_lora_rank"] == 16
        assert content["num_nextn_predict_layers"] == 1


def test_transformers_reads_it(tmp_path):
    transformers = pytest.importorskip("transformers")
    shape = {**SHAPES["v3-groups"], "moe": {**SHAPES["v3-groups"]["moe"], "routed_scaling_factor": 2.5}}
    model = build(shape)
    save_model(model, tmp_path)
    byte_tokenizer().save(tmp_path)
    theirs = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens = torch.randint(2, 258, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, got = theirs(tokens).logits, model(tokens)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("né", add_special_tokens=False)["input_ids"] == [2 + byte for byte in "né".encode()]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
    assert tokenizer.decode([2 + byte for byte in b"two words"]) == "two words"


class TestDamaged:
    def refused(self, folder, match):
        with pytest.raises(UserError, match=match) as caught:
            load_model(folder)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    @pytest.mark.parametrize("keep", [0, 4, 100, -1, -5000])
    def test_cut(self, saved, keep):
        file = saved[1] / "model.safetensors"
        file.write_bytes(file.read_bytes()[:keep])
        self.refused(saved[1], r"model\.safetensors: not a readable safetensors file")

    def test_header_is_noise(self, saved):
        file = saved[1] / "model.safetensors"
        file.write_bytes(file.read_bytes()[:8] + b"\xff" * 40 + file.read_bytes()[48:])
        self.refused(saved[1], r"model\.safetensors: not a readable safetensors file")

    def test_missing_files(self, saved):
        (saved[1] / "model.safetensors").unlink()
        self.refused(saved[1], r"model\.safetensors: no such file")
        (saved[1] / "config.json").unlink()
        self.refused(saved[1], r"config\.json: no such file")

    def change(self, folder, action):
        tensors = load_file(folder / "model.safetensors")
        action(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    def test_missing_tensor(self, saved):
        name = "model.layers.1.mlp.experts.3.up_proj.weight"
        self.change(saved[1], lambda tensors: tensors.pop(name))
        assert name in self.refused(saved[1], "tensors missing")

    def test_missing_bias(self, saved):
        name = "model.layers.1.mlp.gate.e_score_correction_bias"
        self.change(saved[1], lambda tensors: tensors.pop(name))
        assert name in self.refused(saved[1], "tensors missing")

    def test_missing_embedding(self, saved):
        self.change(saved[1], lambda tensors: tensors.pop("model.embed_tokens.weight"))
        self.refused(saved[1], r"tensors missing: model\.embed_tokens\.weight$")

    def test_many_missing_are_counted(self, saved):
        self.change(saved[1], lambda tensors: [tensors.pop(n) for n in list(tensors) if ".experts." in n])
        self.refused(saved[1], r"\(24 in all\)")

    def test_unexpected_tensor(self, saved):
        self.change(saved[1], lambda tensors: tensors.update({"model.layers.9.x": torch.zeros(1)}))
        self.refused(saved[1], r"tensors unexpected: model\.layers\.9\.x$")

    def test_wrong_shape(self, saved):
        name = "model.layers.0.self_attn.o_proj.weight"
        self.change(saved[1], lambda tensors: tensors.update({name: torch.zeros(16, 32)}))
        assert "shape [16, 32], the config says [32, 16]" in self.refused(saved[1], name)

    def test_pickles_are_never_read(self, saved, tmp_path):
        class Bomb:
            def __reduce__(self):
                return (open, (str(tmp_path / "exploded"), "w"))

        _, folder = saved
        bomb = pickle.dumps(Bomb())
        (folder / "model.safetensors").unlink()
        for name in ("pytorch_model.bin", "model.bin", "model.pt", "training.pt"):
            (folder / name).write_bytes(bomb)
        self.refused(folder, "pickled weights are never loaded")
        (folder / "model.safetensors").write_bytes(bomb)
        self.refused(folder, "not a readable safetensors file")
        assert not (tmp_path / "exploded").exists()


def test_a_writer_that_fails_names_the_file(tmp_path):
    with pytest.raises(OSError, match="cannot be written") as caught:
        write_tensors({"x": torch.zeros(4)}, tmp_path / "missing" / "x.safetensors")
    assert caught.value.filename == str(tmp_path / "missing" / "x.safetensors")


def test_views_of_one_storage_are_written_apart(tmp_path):
    whole = torch.arange(6.0).view(2, 3)
    write_tensors({"a": whole[0], "b": whole[1], "t": whole.t()}, tmp_path / "x.safetensors")
    again = load_file(tmp_path / "x.safetensors")
    assert again["a"].tolist() == [0, 1, 2]
    assert again["b"].tolist() == [3, 4, 5]
    assert again["t"].tolist() == [[0, 3], [1, 4], [2, 5]]


class TestLoad:
    def test_a_folder_without_tokenizer(self, saved):
        model, tokenizer = abyssal.load(saved[1])
        assert tokenizer is None
        assert same(dict(saved[0].state_dict()), dict(model.state_dict()))

    def test_a_folder_with_tokenizer(self, saved):
        byte_tokenizer().save(saved[1])
        _, tokenizer = abyssal.load(str(saved[1]))
        assert tokenizer.fingerprint == byte_tokenizer().fingerprint

    def test_nothing_there(self, tmp_path):
        with pytest.raises(UserError, match="no such run or folder"):
            abyssal.load(tmp_path / "none")

    def test_a_run_without_checkpoint(self, tmp_path):
        (tmp_path / "run.json").write_text("{}")
        with pytest.raises(UserError, match="no checkpoint yet"):
            abyssal.load(tmp_path)
