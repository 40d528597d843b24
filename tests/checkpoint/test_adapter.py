"""Adapters in and out, with PEFT and transformers as the judges: we write, PEFT reads over the exported model and gives
the same logits; PEFT writes, we read.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_models import MHA, V1_MOE, difference, randomised, small, tokens_for
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import abyssal
from abyssal.checkpoint.adapter import (
    apply_adapter,
    base_identity,
    copy_adapter,
    read_adapter,
    write_adapter,
)
from abyssal.cli import main
from abyssal.config import ModelConfig
from abyssal.data.tokenizer import byte_tokenizer
from abyssal.errors import UserError
from abyssal.loading import find_config, find_tokenizer, load
from abyssal.model import Transformer
from abyssal.model.adapting import add_lora, attach, low_ranks, matrices, merge_lora
from abyssal.model.lora import LoRALinear, LowRank

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
transformers.logging.set_verbosity_error()
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*num_nextn_predict_layers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]

# transformers' grouped products want rows of a multiple of 16 bytes.
V3: dict[str, Any] = {"vocab_size": 264, "moe": {"moe_intermediate_size": 8}}
V2: dict[str, Any] = {
    **V3,
    "attention": {"q_lora_rank": None, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 6},
    "moe": {
        "moe_intermediate_size": 8,
        "scoring_func": "softmax",
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": False,
        "n_shared_experts": 2,
    },
}
LLAMA: dict[str, Any] = {"vocab_size": 264, "attention": MHA, "moe": None, "rope": {"layout": "halves"}}
V1: dict[str, Any] = {
    **LLAMA,
    "moe": {**V1_MOE, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0},
}


def exported(folder: Path, changes: dict[str, Any], dtype: torch.dtype | None = None) -> Transformer:
    """A random model, and what it is as ``folder``/base."""
    model = randomised(small(**changes), std=0.12, dtype=torch.float32).eval()
    abyssal.export(model, folder / "base", dtype=dtype, tokenizer=byte_tokenizer(), force=True)
    return model


def adapt(model: Transformer, targets: str | list[str] = "all", rank: int = 2, **options: Any) -> Transformer:
    add_lora(model, targets, rank, 3.0, generator=torch.Generator().manual_seed(1), **options)
    shake(model)
    return model


def shake(model: nn.Module) -> None:
    """Random numbers where adapters begin with zeros."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.3, generator=generator)


def theirs(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def told(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        out = model(tokens)
    return out if isinstance(out, Tensor) else out.logits


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    """The exit code of ``abyssal`` with these arguments."""
    monkeypatch.setattr("sys.argv", ["abyssal", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    return left.value.code or 0


TARGETS: dict[str, str | list[str]] = {
    "all": "all",
    "attention": "self_attn",
    "experts": "experts",
    "one of the two": "experts.gate_up_proj",
    "the other, and q": ["experts.down_proj", "self_attn.q*_proj"],
    "dense and shared": ["gate_proj", "up_proj", "down_proj"],
    "one layer": "model.layers.1.*",
}


class TestPEFTReads:
    @pytest.mark.parametrize("rslora", [False, True])
    @pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS.keys())
    @pytest.mark.parametrize("changes", [V3, V2], ids=["v3", "v2"])
    def test_the_same_logits(self, tmp_path, changes, targets, rslora):
        model = exported(tmp_path, changes)
        tokens = tokens_for(model.config, 2, 9)
        before = told(model, tokens)
        adapt(model, targets, rslora=rslora)
        write_adapter(tmp_path, model, base="base")
        right = told(model, tokens)
        network = peft.PeftModel.from_pretrained(theirs(tmp_path / "base"), tmp_path)
        found = told(network, tokens)
        assert difference(found, right) < 1e-5
        assert difference(before, right) > 0.01
        trained = sum(p.numel() for n, p in network.named_parameters() if "lora_" in n)
        assert trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert difference(told(network.merge_and_unload(), tokens), right) < 1e-5

    def test_a_dense_model(self, tmp_path):
        model = exported(tmp_path, LLAMA)
        adapt(model)
        write_adapter(tmp_path, model, base="base")
        assert json.loads((tmp_path / "base" / "config.json").read_text())["model_type"] == "llama"
        settings = json.loads((tmp_path / "adapter_config.json").read_text())
        assert settings["target_parameters"] is None
        assert "mlp.gate_proj" in settings["target_modules"]
        tokens = tokens_for(model.config, 2, 9)
        network = peft.PeftModel.from_pretrained(theirs(tmp_path / "base"), tmp_path)
        assert difference(told(network, tokens), told(model, tokens)) < 1e-5

    def test_different_ranks(self, tmp_path):
        model = exported(tmp_path, V3)
        tokens = tokens_for(model.config, 2, 9)
        add_lora(model, ["q_b_proj", "experts", "shared_experts"], 1, 2.0)
        small_ones = low_ranks(model)
        other = exported(tmp_path / "other", V3)
        changes = {
            name: LowRank(c.a.repeat_interleave(2, -2).detach(), c.b.repeat_interleave(2, -1).detach(), 5.0)
            if "layers.1" in name or "down_proj" in name
            else c
            for name, c in small_ones.items()
        }
        attach(other, changes)
        shake(other)
        write_adapter(tmp_path, other, base="base")
        network = peft.PeftModel.from_pretrained(theirs(tmp_path / "base"), tmp_path)
        assert difference(told(network, tokens), told(other, tokens)) < 1e-5
        again = exported(tmp_path / "again", V3)
        apply_adapter(read_adapter(tmp_path), again)
        assert difference(told(again, tokens), told(other, tokens)) < 1e-6  # addresses decide how a product is summed

    def test_mtp_modules_are_left_alone(self, tmp_path):
        """PEFT has no place for them, and the rest is what it is."""
        changes = {**V3, "mtp": {"num_nextn_predict_layers": 1}}
        model = exported(tmp_path, changes)
        adapt(model, ["q_b_proj", "experts", "model.layers.3.*"])
        write_adapter(tmp_path, model, base="base")
        tokens = tokens_for(model.config, 2, 9)
        network = peft.PeftModel.from_pretrained(theirs(tmp_path / "base"), tmp_path)
        assert difference(told(network, tokens), told(model, tokens)) < 1e-5
        again, _ = load(tmp_path)
        with torch.no_grad():
            assert difference(again.mtp_logits(tokens)[0], model.mtp_logits(tokens)[0]) < 1e-5


class ModuleExperts(nn.Module):
    """A layer's experts as the remote code of DeepSeekMoE-16B has them: a list of modules."""

    def __init__(self, weights: dict[str, Tensor], prefix: str, experts: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList()
        for expert in range(experts):
            module = nn.Module()
            for which in ("gate", "up", "down"):
                weight = weights[f"{prefix}.{expert}.{which}_proj.weight"]
                linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
                linear.weight.data = weight
                setattr(module, f"{which}_proj", linear)
            self.experts.append(module)

    def forward(self, x: Tensor) -> Tensor:
        """Every expert's output for every row."""
        outs = []
        for e in self.experts:
            assert isinstance(e, nn.Module)
            outs.append(e.down_proj(torch.nn.functional.silu(e.gate_proj(x)) * e.up_proj(x)))
        return torch.stack(outs)


class TestExpertsAsModules:
    """Model type deepseek, which transformers has only as remote code: PEFT over modules of the same names."""

    def wrapped(self, weights: dict[str, Tensor]) -> nn.Module:
        root = nn.Module()
        root.model = nn.Module()
        root.model.layers = nn.ModuleDict({"1": nn.Module()})
        root.model.layers["1"].mlp = ModuleExperts(weights, "model.layers.1.mlp.experts", 6)
        root.forward = lambda x: root.model.layers["1"].mlp(x)  # type: ignore[method-assign]
        return root

    @pytest.mark.parametrize("targets", ["all", "experts.gate_up_proj", "experts.down_proj"])
    def test_out_and_in(self, tmp_path, targets):
        model = exported(tmp_path, V1)
        adapt(model, targets)
        write_adapter(tmp_path, model, base="base")
        stored = load_file(tmp_path / "adapter_model.safetensors")
        assert not any(re.search(r"experts\.lora|base_layer", key) for key in stored)
        settings = json.loads((tmp_path / "adapter_config.json").read_text())
        (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, "task_type": None}))  # no whole model
        network = self.wrapped(load_file(tmp_path / "base" / "model.safetensors"))
        x = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
        found = told(peft.PeftModel.from_pretrained(network, tmp_path), x)
        experts = model.model.layers[1].mlp.experts
        indices = torch.arange(6).unsqueeze(0)
        for row, expected in zip(x, found.transpose(0, 1), strict=True):
            for expert in range(6):
                chosen = indices[:, expert : expert + 1]
                assert difference(experts(row.unsqueeze(0), chosen, torch.ones(1, 1))[0], expected[expert]) < 1e-5
        again = exported(tmp_path / "again", V1)
        apply_adapter(read_adapter(tmp_path), again)
        ours, back = low_ranks(model), low_ranks(again)
        assert ours.keys() == back.keys()
        for name, change in ours.items():
            assert (change.rank, change.alpha) == (back[name].rank, back[name].alpha)
            assert torch.equal(change.a, back[name].a)
            assert torch.equal(change.b, back[name].b)

    def test_made_by_peft(self, tmp_path):
        """Each with matrices of its own, two experts with none, another rank and α for down."""
        model = exported(tmp_path, V1)
        network = self.wrapped(load_file(tmp_path / "base" / "model.safetensors"))
        config = peft.LoraConfig(
            r=2,
            lora_alpha=6,
            target_modules=r".*experts\.[0-3]\.(gate|up|down)_proj",
            rank_pattern={"down_proj": 3},
            alpha_pattern={"down_proj": 4},
            base_model_name_or_path="base",
        )
        wrapped = peft.get_peft_model(network, config)
        shake(wrapped)
        wrapped.save_pretrained(tmp_path / "made")
        apply_adapter(read_adapter(tmp_path / "made"), model)
        x = torch.randn(1, 24, generator=torch.Generator().manual_seed(0))
        right = told(wrapped, x)
        experts = model.model.layers[1].mlp.experts
        for expert in range(6):
            found = experts(x, torch.tensor([[expert]]), torch.ones(1, 1))
            assert difference(found, right[expert]) < 1e-5


class TestWeRead:
    @pytest.mark.parametrize(
        "options",
        [
            {"target_modules": ["q_b_proj", "o_proj", "kv_b_proj"]},
            {"target_modules": r".*layers\.[12]\.self_attn\.(q_a|kv_b)_proj", "use_rslora": True},
            {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
            {"target_modules": ["q_b_proj"], "target_parameters": ["experts.down_proj"]},
            {"target_modules": ["o_proj"], "target_parameters": ["1.mlp.experts.gate_up_proj"]},
            {"target_modules": ["q_a_proj", "o_proj"], "rank_pattern": {"o_proj": 3}, "alpha_pattern": {"o_proj": 5}},
            {
                "target_modules": ["o_proj"],
                "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
                "rank_pattern": {".*gate_up_proj": 4},
                "alpha_pattern": {"layers.2.mlp.experts.gate_up_proj": 1},
            },
        ],
        ids=["list", "regex, rslora", "stacked", "mixed", "one layer", "ranks", "ranks of experts"],
    )
    @pytest.mark.parametrize("train", [False, True])
    def test_the_same_logits(self, tmp_path, options, train):
        model = exported(tmp_path, V3)
        network = theirs(tmp_path / "base")
        config = peft.LoraConfig(r=2, lora_alpha=6, task_type="CAUSAL_LM", **options)
        wrapped = peft.get_peft_model(network, config).eval()
        shake(wrapped)
        wrapped.save_pretrained(tmp_path / "made")
        tokens = tokens_for(model.config, 2, 9)
        right = told(wrapped, tokens)
        if train:
            apply_adapter(read_adapter(tmp_path / "made"), model)
            trained = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
            assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained
        else:
            model, _ = load(tmp_path / "made")
            assert not low_ranks(model)
        assert difference(told(model, tokens), right) < 1e-5

    def test_all_linear_adapts_routers(self, tmp_path):
        """What PEFT 0.21 makes of all-linear: routers and experts, and no dense MLP. Merged when it is loaded."""
        exported(tmp_path, V3)
        config = peft.LoraConfig(r=2, lora_alpha=6, task_type="CAUSAL_LM", target_modules="all-linear")
        wrapped = peft.get_peft_model(theirs(tmp_path / "base"), config).eval()
        shake(wrapped)
        wrapped.save_pretrained(tmp_path / "made")
        model, _ = load(tmp_path / "made")
        tokens = tokens_for(model.config, 2, 9)
        assert difference(told(model, tokens), told(wrapped, tokens)) < 1e-5
        untouched, _ = load(tmp_path / "base")
        with pytest.raises(UserError, match=r"adapts routers .model.layers.1.mlp.gate.*merge it first"):
            apply_adapter(read_adapter(tmp_path / "made"), untouched)
        abyssal.export(tmp_path / "made", tmp_path / "merged", force=True)
        assert difference(told(theirs(tmp_path / "merged"), tokens), told(wrapped, tokens)) < 1e-5


class TestRoundTrip:
    def test_bit_by_bit(self, tmp_path):
        model = adapt(exported(tmp_path, V3))
        write_adapter(tmp_path, model, base="base")
        other = exported(tmp_path / "other", V3)
        add_lora(other, "all", 2, 3.0)
        copy_adapter(read_adapter(tmp_path), other)
        for (name, mine), (_, back) in zip(model.named_parameters(), other.named_parameters(), strict=True):
            assert torch.equal(mine, back), name

    @pytest.mark.parametrize(
        ("targets", "rank", "reason"),
        [
            ("self_attn", 2, "the file adapts it, the model does not"),
            (["all", "model.layers.3.*"], 2, "model.layers.3.*: missing"),
            ("all", 1, "rank 2 and scale 1.5, the model has 1 and 3"),
        ],
    )
    def test_another_adapter(self, tmp_path, targets, rank, reason):
        changes = {**V3, "mtp": {"num_nextn_predict_layers": 1}}
        write_adapter(tmp_path, adapt(exported(tmp_path, changes)), base="base")
        other = adapt(exported(tmp_path / "other", changes), targets, rank)
        before = {name: parameter.clone() for name, parameter in other.named_parameters()}
        with pytest.raises(UserError, match=reason):
            copy_adapter(read_adapter(tmp_path), other)
        assert all(torch.equal(before[name], p) for name, p in other.named_parameters())

    def test_a_model_without(self, tmp_path):
        with pytest.raises(UserError, match="has no adapter"):
            write_adapter(tmp_path, randomised(small()), base="base")


class TestAsASource:
    @pytest.fixture
    def folder(self, tmp_path):
        model = exported(tmp_path, V3)
        (tmp_path / "a" / "b").mkdir(parents=True)
        write_adapter(tmp_path / "a" / "b", adapt(model), base="../../base")
        return tmp_path / "a" / "b"

    @staticmethod
    def right(folder: Path) -> Transformer:
        model, _ = load(folder / "../../base")
        add_lora(model, "all", 2, 3.0)
        copy_adapter(read_adapter(folder), model)
        return model

    def test_merged_on_load(self, folder):
        model, tokenizer = load(folder)
        assert tokenizer is not None
        assert not any(isinstance(m, LoRALinear) for m in model.modules())
        assert all(p.requires_grad for p in model.parameters())
        assert not model.training
        tokens = tokens_for(model.config, 2, 9)
        assert difference(told(model, tokens), told(self.right(folder), tokens)) < 1e-5
        assert find_config(str(folder)) == find_config(str(folder / "../../base"))

    @pytest.mark.parametrize("weights", ["int8", "int4"])
    def test_beside_packed_weights(self, folder, weights):
        model, _ = load(folder, weights=weights)
        assert low_ranks(model).keys() == matrices(model).keys()
        assert not any(p.requires_grad for p in model.parameters())
        base, _ = load(folder / "../../base", weights=weights)
        apply_adapter(read_adapter(folder), base)
        tokens = tokens_for(model.config, 1, 9)
        assert difference(told(model, tokens), told(base, tokens)) < 1e-6
        assert abyssal.generate(model, byte_tokenizer(), "a", temperature=0, max_new_tokens=4) is not None

    def test_some_layers(self, folder):
        model, _ = load(folder, layers=[1])
        whole, _ = load(folder)
        name = "mlp.experts.gate_up_proj"
        assert torch.equal(model.model.layers[1].get_parameter(name), whole.model.layers[1].get_parameter(name))

    def test_bf16(self, folder):
        model, _ = load(folder, dtype=torch.bfloat16)
        base, _ = load(folder / "../../base", dtype=torch.bfloat16)
        apply_adapter(read_adapter(folder), base)
        merge_lora(base)
        for (name, mine), (_, right) in zip(model.named_parameters(), base.named_parameters(), strict=True):
            assert mine.dtype == torch.bfloat16
            assert torch.equal(mine, right), name

    def test_its_own_tokenizer_goes_before(self, folder):
        assert find_tokenizer(folder) is not None
        (folder / "tokenizer.json").write_text("{}")
        with pytest.raises(UserError, match=r"a/b/tokenizer.json"):
            find_tokenizer(folder)

    def test_on_the_command_line(self, folder, capsys, monkeypatch):
        options = ["--temperature", "0", "--tokens", "4", "--device", "cpu"]
        texts = []
        for source in (folder, folder / "../../base"):
            assert command(monkeypatch, "generate", str(source), "a", *options) == 0
            texts.append(capsys.readouterr().out)
        assert texts[0] != texts[1]

    def test_the_base_is_found(self, folder, tmp_path, monkeypatch):
        """Beside the adapter; from where we are; written as a whole path where we saw it."""
        model = self.right(folder)
        monkeypatch.chdir(tmp_path)
        write_adapter(folder, model, base="base")
        monkeypatch.chdir(tmp_path.parent)
        load(folder)
        settings = json.loads((folder / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == str((tmp_path / "base").resolve())

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("../../gone", "its base is not there: .*gone"),
            ("", "base_model_name_or_path: ''; expected a path or a name on the hub"),
            (None, "base_model_name_or_path: None"),
            (7, "base_model_name_or_path: 7"),
            ("../b", "its base .* has a base itself"),
        ],
    )
    def test_the_base_is_not_found(self, folder, name, reason, monkeypatch, capsys):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        settings = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": name}))
        with pytest.raises(UserError, match=reason) as caught:
            load(folder)
        assert "\n" not in str(caught.value)
        assert command(monkeypatch, "generate", str(folder), "a") == 2
        assert capsys.readouterr().err.count("\n") == 1

    def test_identity(self, folder, tmp_path):
        with pytest.raises(UserError, match="an adapter; merge it first"):
            base_identity(folder)
        abyssal.convert(tmp_path / "base", tmp_path / "bf16", torch.bfloat16)
        assert base_identity(tmp_path / "bf16") == base_identity(tmp_path / "base")
        exported(tmp_path / "other", {**V3, "intermediate_size": 22})
        assert base_identity(tmp_path / "other" / "base") != base_identity(tmp_path / "base")


class TestBadInput:
    @pytest.fixture
    def folder(self, tmp_path):
        write_adapter(tmp_path, adapt(exported(tmp_path, V3)), base="base")
        return tmp_path

    def refused(self, folder: Path, reason: str) -> None:
        with pytest.raises(UserError, match=reason) as caught:
            load(folder)
        assert "\n" not in str(caught.value)
        assert str(folder) in str(caught.value)

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"hidden_size": 32}, "another base: hidden_size 24, the base has 32"),
            ({"moe": {"moe_intermediate_size": 16}}, "another base: moe.moe_intermediate_size 8, the base has 16"),
            ({"rope": {"theta": 5000.0}}, "another base: rope.theta 10000.0, the base has 5000.0"),
            ({"num_hidden_layers": 2, "vocab_size": 300}, "vocab_size 264.*300; num_hidden_layers 3, the base has 2"),
        ],
    )
    def test_another_base(self, folder, changes, reason):
        merged = {**V3, **changes, "moe": {**V3["moe"], **changes.get("moe", {})}}
        exported(folder / "other", merged)
        settings = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "other/base"}))
        self.refused(folder, reason)
        with pytest.raises(UserError, match=reason):
            abyssal.export(folder, folder.parent / "merged", force=True)
        assert not (folder.parent / "merged").exists()
        # PEFT's say nothing of their base; then shapes do.
        (folder / "abyssal.json").unlink()
        if "rope" not in changes:
            with pytest.raises(UserError, match=r"made for|fit none of|not a matrix of the base|no routed experts"):
                load(folder)

    def test_what_does_not_matter(self, folder):
        path = folder / "base" / "config.json"
        config = json.loads(path.read_text()) | {"max_position_embeddings": 128, "initializer_range": 0.5}
        path.write_text(json.dumps(config))
        load(folder)

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("peft_type", "IA3"),
            ("peft_type", None),
            ("use_dora", True),
            ("bias", "lora_only"),
            ("modules_to_save", ["lm_head"]),
            ("layer_replication", [[0, 2]]),
            ("trainable_token_indices", [1, 2]),
            ("fan_in_fan_out", True),
            ("lora_bias", True),
            ("init_lora_weights", "pissa_niter_4"),
            ("lora_alpha", "much"),
            ("lora_alpha", None),
            ("alpha_pattern", {"(": 2}),
        ],
    )
    def test_more_than_low_rank_products(self, folder, key, value):
        settings = json.loads((folder / "adapter_config.json").read_text()) | {key: value}
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        self.refused(folder, f"adapter_config.json: {key}: ")

    @pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "\udcff"])
    def test_damaged_settings(self, folder, text):
        (folder / "adapter_config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        self.refused(folder, "adapter_config.json: ")

    def test_no_tensors(self, folder):
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
        self.refused(
            folder, "adapter_model.safetensors: holds adapter_model.bin, pickled weights, which are never loaded"
        )
        (folder / "adapter_model.bin").unlink()
        self.refused(folder, "adapter_model.safetensors: no such file")

    def test_a_cut_file(self, folder):
        path = folder / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-10])
        self.refused(folder, "adapter_model.safetensors: not a readable safetensors file")

    PREFIX = "base_model.model.model.layers.1."

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda t, p: t.pop(p + "self_attn.o_proj.lora_A.weight"), "o_proj: lora_A is missing"),
            (lambda t, p: t.update({p + "x.lora_magnitude_vector": torch.ones(2)}), "not a tensor of LoRA"),
            (lambda t, p: t.update({"base_model.model.lm_head.weight": torch.ones(2)}), "not a tensor of LoRA"),
            (lambda t, p: t[p + "self_attn.o_proj.lora_A.weight"].fill_(float("nan")), "not finite"),
            (
                lambda t, p: t.update({p + "self_attn.o_proj.lora_A.weight": torch.ones(3, 21)}),
                r"A \[3, 21\] and B \[24, 2\] do not go together",
            ),
            (
                lambda t, p: t.update({p + "self_attn.o_proj.lora_A.weight": torch.ones(2, 22)}),
                r"made for \[24, 22\], the base has \[24, 21\]",
            ),
            (
                lambda t, p: t.update({p + "mlp.experts.lora_A.weight": torch.ones(16, 9)}),
                r"A \[16, 9\] and B \[24, 16\] fit none of the base's experts",
            ),
            (
                lambda t, p: t.update(
                    {
                        "base_model.model.lm_head.lora_A.weight": torch.ones(2, 24),
                        "base_model.model.lm_head.lora_B.weight": torch.ones(264, 2),
                    }
                ),
                "lm_head: not a matrix of the base that can be adapted",
            ),
            (
                lambda t, p: t.update(
                    {
                        p + "mlp.experts.9.up_proj.lora_A.weight": torch.ones(2, 24),
                        p + "mlp.experts.9.up_proj.lora_B.weight": torch.ones(8, 2),
                    }
                ),
                "experts.9.up_proj: made for",
            ),
            (lambda t, p: t.clear(), "holds no tensors"),
        ],
    )
    def test_odd_tensors(self, folder, change, reason):
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors, self.PREFIX)
        save_file(tensors, path)
        self.refused(folder, reason)

    def test_tuning_it_further(self, folder):
        with pytest.raises(UserError, match="not a model but what changes one"):
            abyssal.convert(folder, folder / "fp8", torch.float8_e4m3fn)


def test_names_with_default_in_them(tmp_path):
    """As a state dict has them that was not saved by PEFT's own function."""
    model = adapt(exported(tmp_path, V3), "self_attn")
    write_adapter(tmp_path, model, base="base")
    path = tmp_path / "adapter_model.safetensors"
    save_file({key.replace(".weight", ".default.weight"): t for key, t in load_file(path).items()}, path)
    again, _ = load(tmp_path)
    tokens = tokens_for(model.config, 1, 9)
    assert difference(told(again, tokens), told(model, tokens)) < 1e-5


def test_a_study_variant(tmp_path):
    """No published layout, and still read back."""
    config: ModelConfig = small(vocab_size=264, moe={"segments": 2})
    model = adapt(randomised(config, dtype=torch.float32))
    write_adapter(tmp_path, model, base="base")
    again = randomised(config, dtype=torch.float32)
    apply_adapter(read_adapter(tmp_path), again)
    tokens = tokens_for(config, 1, 9)
    assert difference(told(again, tokens), told(model, tokens)) < 1e-6
