"""Checkpoints in and out, with transformers as the judge: it writes, we read; we write, it reads."""

import json
import shutil
import warnings

import pytest
import torch
from plain_models import Plain, difference
from safetensors.torch import load_file, save_file
from tiny_runs import MODEL, scrambled

import abyssal
from abyssal.checkpoint import load_model
from abyssal.checkpoint.convert import convert
from abyssal.checkpoint.load import read_model_config
from abyssal.checkpoint.names import disk_tensors
from abyssal.config import from_published, resolve_model
from abyssal.data.tokenizer import byte_tokenizer
from abyssal.errors import UserError
from abyssal.model import Transformer

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore:.*num_nextn_predict_layers:UserWarning")

COMMON = {
    "vocab_size": 300,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 80,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.1,
}


def theirs(generation: int, *, q_lora=24, tied=False, dense_first=1, dtype=torch.float32, seed=0, **changes):
    """A model of transformers with random weights, norms and biases among them."""
    cls = {2: transformers.DeepseekV2Config, 3: transformers.DeepseekV3Config}[generation]
    settings = {"topk_method": "group_limited_greedy", "norm_topk_prob": False} if generation == 2 else {}
    config = cls(
        **{**COMMON, **settings, **changes},
        q_lora_rank=q_lora,
        tie_word_embeddings=tied,
        first_k_dense_replace=dense_first,
        routed_scaling_factor=2.5,
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("e_score_correction_bias"):
                tensor.normal_(std=0.05)
            elif "norm" in name:
                tensor.add_(0.1 * torch.randn_like(tensor))
    return model.to(dtype)


def tensors_in(folder):
    out = {}
    for file in sorted(folder.glob("*.safetensors")):
        new = load_file(file)
        assert not out.keys() & new.keys()
        out |= new
    return out


def identical(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def logits(model, tokens):
    with torch.no_grad():
        out = model(tokens)
    return getattr(out, "logits", out)


def llama(**changes):
    """A dense model of transformers with random weights, norms among them."""
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")
    names += ("max_position_embeddings", "bos_token_id", "eos_token_id", "initializer_range")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{name: COMMON[name] for name in names} | changes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                tensor.add_(0.1 * torch.randn_like(tensor))
    return model


LLAMAS = {
    "heads": {},
    "grouped": {"num_key_value_heads": 2, "rms_norm_eps": 1e-5},
    "one-kv-head-tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "wide-heads-with-bias": {"head_dim": 24, "attention_bias": True, "rope_parameters": {"rope_theta": 500.0}},
}
TOKENS = torch.randint(2, 300, (3, 40), generator=torch.Generator().manual_seed(1))
CASES = {
    "v2": (2, {}),
    "v2-no-q-lora-tied": (2, {"q_lora": None, "tied": True}),
    "v2-all-experts": (2, {"dense_first": 0, "topk_method": "greedy"}),
    "v3": (3, {}),
    "v3-no-q-lora": (3, {"q_lora": None, "dense_first": 2}),
    "v3-tied": (3, {"tied": True, "attention_bias": True}),
}


class TestRoundTrip:
    @pytest.mark.parametrize("shard", ["40KB", "300KB", "1GB"])
    @pytest.mark.parametrize("case", CASES)
    def test_float32(self, tmp_path, case, shard):
        generation, settings = CASES[case]
        reference = theirs(generation, **settings)
        expected = logits(reference, TOKENS)
        reference.save_pretrained(tmp_path / "theirs", max_shard_size=shard)
        files = len(list((tmp_path / "theirs").glob("*.safetensors")))
        assert (files == 1) == (shard == "1GB")

        model, tokenizer = abyssal.load(tmp_path / "theirs")
        assert tokenizer is None
        assert difference(logits(model, TOKENS), expected) <= 1e-5
        for source, name in ((model, "from-memory"), (tmp_path / "theirs", "from-folder")):
            abyssal.export(source, tmp_path / name, shard_size=150_000)
            assert identical(tensors_in(tmp_path / "theirs"), tensors_in(tmp_path / name))
            again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
            assert type(again) is type(reference)
            assert difference(logits(again.eval(), TOKENS), expected) <= 1e-5
        assert (tmp_path / "from-folder" / "model.safetensors.index.json").is_file()

    @pytest.mark.parametrize("generation", [2, 3])
    def test_bfloat16(self, tmp_path, generation):
        """Our error against FP32 is no larger than theirs. Routing may turn on a rounding, so means are compared."""
        reference = theirs(generation, dtype=torch.bfloat16)
        reference.save_pretrained(tmp_path / "m", max_shard_size="100KB")
        ours = load_model(tmp_path / "m")
        assert ours.lm_head.weight.dtype == torch.bfloat16
        exact = logits(load_model(tmp_path / "m", dtype=torch.float64), TOKENS)
        error = (logits(ours, TOKENS).double() - exact).abs().mean()
        their_error = (logits(reference, TOKENS).double() - exact).abs().mean()
        assert error <= 1.5 * their_error
        abyssal.export(tmp_path / "m", tmp_path / "out")
        assert identical(tensors_in(tmp_path / "m"), tensors_in(tmp_path / "out"))
        # transformers' .to(bfloat16) rounded the bias when it made this model; ours is FP32 from here on.
        abyssal.export(ours, tmp_path / "memory")
        widened = {
            name: tensor.float() if name.endswith("correction_bias") else tensor
            for name, tensor in tensors_in(tmp_path / "m").items()
        }
        assert identical(widened, tensors_in(tmp_path / "memory"))

    def test_the_first_generation(self, tmp_path):
        """transformers has no code for it: a plain float64 account judges."""
        attention = {"kind": "mha", "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
        moe = {**MODEL["moe"], "scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False}
        settings = {"attention": attention, "rope": {"layout": "halves"}, "moe": moe, "mtp": {}}
        config = resolve_model({**MODEL, **settings, "initializer_range": 0.2})
        model = scrambled(Transformer(config, generator=torch.Generator().manual_seed(2)))
        abyssal.export(model, tmp_path / "v1", shard_size=20_000)
        assert json.loads((tmp_path / "v1" / "config.json").read_text())["model_type"] == "deepseek"
        again = load_model(tmp_path / "v1")
        tokens = torch.randint(0, 258, (2, 12), generator=torch.Generator().manual_seed(3))
        plain = Plain(model.double())
        for row, got in zip(tokens.tolist(), logits(again, tokens), strict=True):
            assert difference(got, plain(row)) <= 1e-5
        assert identical(dict(model.float().state_dict()), dict(again.state_dict()))

    @pytest.mark.parametrize("shard", ["40KB", "1GB"])
    @pytest.mark.parametrize("case", LLAMAS)
    def test_llama(self, tmp_path, case, shard):
        reference = llama(**LLAMAS[case])
        expected = logits(reference, TOKENS)
        reference.save_pretrained(tmp_path / "theirs", max_shard_size=shard)
        stored = tensors_in(tmp_path / "theirs")
        assert ("lm_head.weight" in stored) == (not LLAMAS[case].get("tie_word_embeddings"))

        model, _ = abyssal.load(tmp_path / "theirs")
        assert difference(logits(model, TOKENS), expected) <= 1e-5
        for source, name in ((model, "from-memory"), (tmp_path / "theirs", "from-folder")):
            abyssal.export(source, tmp_path / name, shard_size=150_000)
            assert identical(stored, tensors_in(tmp_path / name))
            again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
            assert type(again) is transformers.LlamaForCausalLM
            assert difference(logits(again.eval(), TOKENS), expected) <= 1e-5
        # a dense model of ours is written in this layout, which more programs read than deepseek's
        ours = model.config.model_copy(update={"published": {}})
        abyssal.export(Transformer(ours), tmp_path / "ours")
        assert json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"] == "llama"

    def test_llama_from_a_cache(self, tmp_path):
        reference = llama(num_key_value_heads=2, vocab_size=258)
        reference.save_pretrained(tmp_path / "m")
        byte_tokenizer().save(tmp_path / "m")
        model, tokenizer = abyssal.load(tmp_path / "m")
        prompt = torch.tensor([[0, *tokenizer.encode("to be or ")]])
        settings = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "pad_token_id": 0}
        ids = reference.generate(prompt, max_new_tokens=32, **settings)[0, prompt.shape[1] :].tolist()
        expected = tokenizer.decode(ids[: ids.index(1)] if 1 in ids else ids)
        assert abyssal.generate(model, tokenizer, "to be or ", temperature=0, max_new_tokens=32) == expected

    def test_llama_that_transformers_does_not_take(self, tmp_path):
        config = from_published(llama().config.to_dict() | {"hidden_size": 66})
        with pytest.raises(UserError, match=r"hidden_size 66: transformers' Llama takes multiples of .* 4 only"):
            abyssal.export(Transformer(config), tmp_path / "out")

    @pytest.mark.parametrize("repeated", [False, True])
    @pytest.mark.parametrize("depth", [1, 3])
    def test_mtp_tensors_added_by_hand(self, tmp_path, depth, repeated):
        reference = theirs(3)
        reference.config.num_nextn_predict_layers = depth
        reference.save_pretrained(tmp_path / "m", max_shard_size="100KB")
        tensors = tensors_in(tmp_path / "m")
        generator = torch.Generator().manual_seed(4)
        added = {}
        for k in range(3, 3 + depth):
            for name, tensor in tensors.items():
                if name.startswith("model.layers.2."):
                    added[name.replace(".2.", f".{k}.", 1)] = torch.randn(tensor.shape, generator=generator)
            for name in ("enorm", "hnorm", "shared_head.norm"):
                added[f"model.layers.{k}.{name}.weight"] = torch.randn(64, generator=generator)
            added[f"model.layers.{k}.eh_proj.weight"] = torch.randn(64, 128, generator=generator)
            if repeated:
                added[f"model.layers.{k}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
                added[f"model.layers.{k}.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
        index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
        save_file(added, tmp_path / "m" / "mtp.safetensors", metadata={"format": "pt"})
        index["weight_map"] |= dict.fromkeys(added, "mtp.safetensors")
        (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(index))

        model = load_model(tmp_path / "m")
        assert len(model.mtp_modules) == depth
        for name, tensor in model.state_dict().items():
            if name in added:
                assert torch.equal(tensor, added[name])
        abyssal.export(tmp_path / "m", tmp_path / "out")
        assert identical(tensors | added, tensors_in(tmp_path / "out"))
        abyssal.export(model, tmp_path / "memory")
        out = tensors_in(tmp_path / "memory")
        assert identical(tensors | added, {name: out[name] for name in tensors | added})
        # Serving engines look for these; from memory they are always written.
        last = f"model.layers.{2 + depth}"
        assert torch.equal(out[f"{last}.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
        assert torch.equal(out[f"{last}.shared_head.head.weight"], tensors["lm_head.weight"])
        assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == depth
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
        assert difference(logits(again, TOKENS), logits(reference, TOKENS)) <= 1e-5

    def test_kimi_k2_is_written_as_deepseek_v3(self, tmp_path):
        reference = theirs(3)
        reference.save_pretrained(tmp_path / "m")
        path = tmp_path / "m" / "config.json"
        auto_map = {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"}
        path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "kimi_k2", "auto_map": auto_map}))
        assert difference(logits(load_model(tmp_path / "m"), TOKENS), logits(reference, TOKENS)) <= 1e-5
        abyssal.export(tmp_path / "m", tmp_path / "out")
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
        assert isinstance(again, transformers.DeepseekV3ForCausalLM)
        assert difference(logits(again, TOKENS), logits(reference, TOKENS)) <= 1e-5
        assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())

    def test_the_bias_keeps_float32_and_its_values(self, tmp_path):
        model = scrambled(Transformer(resolve_model(MODEL), generator=torch.Generator().manual_seed(5)))
        bias = model.routers[1].e_score_correction_bias
        name = "model.layers.1.mlp.gate.e_score_correction_bias"
        for dtype in (torch.bfloat16, torch.float8_e4m3fn, None):
            folder = tmp_path / str(dtype)
            abyssal.export(model, folder, dtype=dtype)
            assert tensors_in(folder)[name].dtype == torch.float32
            assert torch.equal(tensors_in(folder)[name], bias)
            assert torch.equal(load_model(folder, dtype=torch.bfloat16).routers[1].e_score_correction_bias, bias)


class TestGeneration:
    @pytest.mark.parametrize("generation", [2, 3])
    def test_greedy_as_transformers(self, tmp_path, generation):
        """64 tokens after prompts of different lengths, from the latent cache."""
        reference = theirs(generation, seed=generation, vocab_size=258)
        reference.save_pretrained(tmp_path / "m", max_shard_size="200KB")
        byte_tokenizer().save(tmp_path / "m")
        model, tokenizer = abyssal.load(tmp_path / "m")
        prompts = ["a", "to be or not to be, that", "né, 你好", "0123456789"]
        ids = [[0, *tokenizer.encode(prompt)] for prompt in prompts]
        width = max(map(len, ids))
        padded = torch.tensor([[0] * (width - len(row)) + row for row in ids])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
        settings = {"do_sample": False, "max_new_tokens": 64, "pad_token_id": 0, "eos_token_id": None}
        with torch.no_grad():
            out = reference.generate(padded, attention_mask=mask, **settings)[:, width:].tolist()
        expected = [tokenizer.decode(row[: row.index(1)] if 1 in row else row) for row in out]
        assert abyssal.generate(model, tokenizer, prompts, temperature=0, max_new_tokens=64) == expected
        assert len(set(expected)) == len(prompts)

    def test_ends_of_text_that_only_the_generation_config_lists(self, tmp_path):
        reference = theirs(3, vocab_size=258)
        reference.save_pretrained(tmp_path / "m")
        byte_tokenizer().save(tmp_path / "m")
        file = tmp_path / "m" / "generation_config.json"
        prompt = torch.tensor([[0, 2 + ord("a")]])
        settings = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "pad_token_id": 0}
        ids = reference.generate(prompt, max_new_tokens=20, **settings)[0, 2:].tolist()
        file.write_text(json.dumps({"eos_token_id": [1, ids[6]]}))
        model, tokenizer = abyssal.load(tmp_path / "m")
        expected = tokenizer.decode(ids[: ids.index(ids[6])])
        assert abyssal.generate(model, tokenizer, "a", temperature=0, max_new_tokens=20) == expected
        for wrong in ("x", [1, "x"], {}, 1.5):
            file.write_text(json.dumps({"eos_token_id": wrong}))
            with pytest.raises(UserError, match="eos_token_id"):
                abyssal.load(tmp_path / "m")


class TestRefused:
    """What transformers' code would compute differently is not exported, unless forced."""

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"moe": {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": True}}, "norm_topk_prob"),
            ({"moe": {"moe_layer_freq": 2}}, "moe_layer_freq 2"),
            (
                {
                    "rope": {
                        "yarn": {
                            "factor": 4.0,
                            "original_max_position_embeddings": 16,
                            "mscale": 0.5,
                            "mscale_all_dim": 0.0,
                        }
                    }
                },
                "mscale",
            ),
        ],
    )
    def test_the_reason_and_force(self, tmp_path, changes, reason):
        settings = {**MODEL, "mtp": {}, **changes}
        settings["moe"] = {**MODEL["moe"], **changes.get("moe", {})}
        model = Transformer(resolve_model(settings))
        with pytest.raises(UserError, match=reason) as caught:
            abyssal.export(model, tmp_path / "out")
        assert "--force" in str(caught.value)
        assert not (tmp_path / "out").exists()
        abyssal.export(model, tmp_path / "out", force=True)
        assert identical(dict(load_model(tmp_path / "out").state_dict()), dict(model.state_dict()))

    @pytest.mark.parametrize("changes", [{"moe": {**MODEL["moe"], "segments": 2}}])
    def test_study_variants_have_no_published_layout(self, tmp_path, changes):
        model = Transformer(resolve_model({**MODEL, "mtp": {}, **changes}))
        for force in (False, True):
            with pytest.raises(UserError, match="study variant"):
                abyssal.export(model, tmp_path / "out", force=force)

    def test_a_part_of_a_model(self, tmp_path):
        theirs(3).save_pretrained(tmp_path / "m")
        part = load_model(tmp_path / "m", layers=2)
        with pytest.raises(UserError, match="layer 2 was not loaded"):
            abyssal.export(part, tmp_path / "out")

    def test_an_existing_folder(self, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("kept")
        model = Transformer(resolve_model(MODEL))
        with pytest.raises(UserError, match="nothing is overwritten"):
            abyssal.export(model, tmp_path / "out")
        assert (tmp_path / "out" / "mine").read_text() == "kept"


class TestLayers:
    @pytest.fixture
    def folder(self, tmp_path):
        theirs(3).save_pretrained(tmp_path / "m", max_shard_size="60KB")
        return tmp_path / "m"

    def test_the_first_two_compute_as_a_model_of_two(self, folder, tmp_path):
        part = load_model(folder, layers=2)
        tensors = {name: tensor for name, tensor in tensors_in(folder).items() if ".layers.2." not in name}
        short = tmp_path / "short"
        short.mkdir()
        save_file(tensors, short / "model.safetensors")
        config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 2}
        (short / "config.json").write_text(json.dumps(config))
        assert torch.equal(logits(part, TOKENS), logits(load_model(short), TOKENS))

    def test_one_layer_from_its_own_files(self, folder):
        """The files of the others are not there, as after downloading what one layer needs."""
        whole = load_model(folder)
        index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        needed = {file for name, file in index.items() if ".layers." not in name or ".layers.2." in name}
        gone = [file for file in set(index.values()) - needed if not (folder / file).unlink()]
        assert gone
        part = load_model(folder, layers=[2])
        assert identical(dict(part.model.layers[2].state_dict()), dict(whole.model.layers[2].state_dict()))
        assert [block.layer for block in part.blocks] == [2]
        with pytest.raises(UserError, match=r"no such file \(model.safetensors.index.json names it\)"):
            load_model(folder)

    @pytest.mark.parametrize("layers", [0, 4, -1, [3], [-1], ["0"], "01", 1.0, True])
    def test_impossible(self, folder, layers):
        with pytest.raises(UserError, match="layers: "):
            load_model(folder, layers=layers)

    def test_none_at_all(self, folder):
        assert logits(load_model(folder, layers=[]), TOKENS).shape == (3, 40, 300)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("fp8")
    reference = theirs(3, hidden_size=160, intermediate_size=200, moe_intermediate_size=72, dtype=torch.bfloat16)
    for name, buffer in reference.named_buffers():
        if name.endswith("correction_bias"):
            buffer.data = buffer.data.float()
    reference.save_pretrained(root / "bf16", max_shard_size="300KB")
    convert(root / "bf16", root / "fp8", torch.float8_e4m3fn)
    return root


class TestFP8:
    """A published FP8 folder: written by us with shapes as V3 has them, judged by plain block products."""

    @staticmethod
    def plain(stored):
        """Dequantised in float64, block by block."""
        out = {}
        for name, tensor in stored.items():
            scale = stored.get(name + "_scale_inv")
            if name.endswith("_scale_inv"):
                continue
            out[name] = tensor.double()
            if scale is not None:
                for i in range(0, tensor.shape[0], 128):
                    for j in range(0, tensor.shape[1], 128):
                        out[name][i : i + 128, j : j + 128] *= scale[i // 128, j // 128].double()
        return out

    def test_dequantised_on_load(self, folders):
        expected = self.plain(tensors_in(folders / "fp8"))
        for dtype in (torch.float32, torch.bfloat16):
            model = load_model(folders / "fp8", dtype=dtype)
            for name, tensor in disk_tensors(model):
                # products of FP32 scales and E4M3 numbers are rounded to FP32 first
                assert torch.equal(tensor, expected[name].float().to(tensor.dtype)), name
        assert load_model(folders / "fp8").lm_head.weight.dtype == torch.bfloat16

    def test_and_back(self, folders, tmp_path):
        """BF16 -> FP8 -> BF16: within half a step of E4M3 (2^-4 of a number, or of the smallest normal of its
        block)."""
        convert(folders / "fp8", tmp_path / "back", torch.bfloat16)
        before, after = tensors_in(folders / "bf16"), tensors_in(tmp_path / "back")
        assert before.keys() == after.keys()
        stored = tensors_in(folders / "fp8")
        for name in before:
            assert before[name].dtype == after[name].dtype
            if name + "_scale_inv" not in stored:
                assert torch.equal(before[name], after[name])
                continue
            rows, columns = before[name].shape
            scale = stored[name + "_scale_inv"].repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
            bound = (
                torch.maximum(before[name].float().abs() * 2**-4, scale * 2**-10) * 1.01 + before[name].abs() * 2**-8
            )
            assert ((before[name].float() - after[name].float()).abs() <= bound).all(), name

    def test_scales_in_another_file_and_in_ue8m0(self, folders, tmp_path):
        """V3's shards end anywhere: a weight and its scales may be parted. Newer files hold scales as E8M0."""
        convert(folders / "bf16", tmp_path / "m", torch.float8_e4m3fn, power_of_two=True)
        stored = tensors_in(tmp_path / "m")
        expected = load_model(tmp_path / "m").state_dict()
        for file in (tmp_path / "m").glob("*.safetensors*"):
            file.unlink()
        scales = {n: t.to(torch.float8_e8m0fnu) for n, t in stored.items() if n.endswith("_scale_inv")}
        assert all(torch.equal(scale.float(), stored[name]) for name, scale in scales.items())
        rest = {n: t for n, t in stored.items() if n not in scales}
        save_file(rest, tmp_path / "m" / "a.safetensors")
        save_file(scales, tmp_path / "m" / "b.safetensors")
        weight_map = dict.fromkeys(rest, "a.safetensors") | dict.fromkeys(scales, "b.safetensors")
        (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        assert identical(dict(expected), dict(load_model(tmp_path / "m").state_dict()))
        assert json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]["scale_fmt"] == "ue8m0"
        kept = load_model(tmp_path / "m", weights="fp8")
        assert kept.model.layers[1].self_attn.o_proj.weight.dtype == torch.float8_e4m3fn
        assert kept.model.layers[1].self_attn.o_proj.power_of_two
        convert(tmp_path / "m", tmp_path / "back", torch.bfloat16)
        assert identical(dict(expected), dict(load_model(tmp_path / "back").state_dict()))
        abyssal.export(tmp_path / "m", tmp_path / "kept")
        assert identical(tensors_in(tmp_path / "m"), tensors_in(tmp_path / "kept"))

    def test_kept_in_fp8(self, folders):
        model = load_model(folders / "fp8", weights="fp8")
        dense = load_model(folders / "fp8")
        size = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
        assert size < 0.7 * sum(t.nbytes for t in (*dense.parameters(), *dense.buffers()))
        assert identical(tensors_in(folders / "fp8"), dict(disk_tensors(model)))
        got, expected = logits(model, TOKENS).double(), logits(dense, TOKENS).double()
        cosine = torch.nn.functional.cosine_similarity(got, expected, dim=-1)
        assert cosine.median() > 0.98  # activations are quantised too: near, not equal, and some tokens route elsewhere
        assert not torch.equal(got, expected)

    def test_fp8_needs_fp8(self, folders):
        with pytest.raises(UserError, match="--to fp8"):
            load_model(folders / "bf16", weights="fp8")
        with pytest.raises(UserError, match="'int3' is not one of"):
            load_model(folders / "bf16", weights="int3")


def test_a_model_that_transformers_saved_without_its_mtp_module(tmp_path):
    theirs(3, num_nextn_predict_layers=1).save_pretrained(tmp_path / "m")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        config = read_model_config(tmp_path / "m")
    assert config.mtp.num_nextn_predict_layers == 0
    assert "the checkpoint holds 0 MTP modules" in str(told[0].message)


def test_threads_and_progress(tmp_path):
    theirs(3).save_pretrained(tmp_path / "m", max_shard_size="60KB")
    seen = []
    one = load_model(tmp_path / "m")
    model = load_model(tmp_path / "m", threads=3, progress=lambda done, total: seen.append((done, total)))
    assert identical(dict(one.state_dict()), dict(model.state_dict()))
    total = sum(t.nbytes for t in tensors_in(tmp_path / "m").values())
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_other_files_are_left_alone(tmp_path):
    """A checkpoint's folder may hold anything; only what is needed is opened."""
    theirs(3).save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "training.safetensors").write_bytes(b"not for us")
    (tmp_path / "m" / "pytorch_model.bin").write_bytes(b"\x80\x04pickle")
    (tmp_path / "m" / "modeling_deepseek.py").write_text("raise SystemExit('ran')")
    load_model(tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "out", torch.bfloat16)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "modeling_deepseek.py" in names
    assert not names & {"pytorch_model.bin", "training.safetensors", "convert.json", ".lock"}
    shutil.rmtree(tmp_path / "out")
