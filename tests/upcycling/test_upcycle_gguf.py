import json

import numpy as np
import pytest
import torch
from tiny_dense import dense_folder, text_file
from tiny_gguf import gguf_file

from abyssal.errors import UserError
from abyssal.upcycling import Settings, read_dense, upcycle

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
TOKENS = torch.arange(2, 92).view(2, 45) * 7 % 250


def test_model_and_tokenizer_are_those_of_the_file(tmp_path):
    theirs = gguf_file(tmp_path / "m.gguf")
    dense = read_dense(tmp_path / "m.gguf")
    with torch.no_grad():
        assert torch.allclose(dense.model(TOKENS), theirs(TOKENS).logits, atol=1e-4)
    assert dense.tokenizer.vocab_size == 258
    assert dense.tokenizer.decode(dense.tokenizer.encode("the deep sea")) == "the deep sea"
    assert dense.tokenizer.encode("the")[0] == 257  # "th"
    assert dense.tokenizer.eos_id == 1


def test_tokens_that_transformers_adds_behind_the_vocabulary_are_left_out(tmp_path):
    gguf_file(tmp_path / "m.gguf", text_end="</s>")
    dense = read_dense(tmp_path / "m.gguf")
    assert dense.tokenizer.vocab_size == 258
    assert dense.tokenizer.decode(dense.tokenizer.encode("the sea <|endoftext|>")) == "the sea <|endoftext|>"
    upcycle(
        tmp_path / "m.gguf",
        tmp_path / "out",
        Settings(cache=30, windows=6, held_out=2, length=32, fit=0),
        calibration=text_file(tmp_path / "text.txt"),
    )


def test_files_beside_it_are_not_looked_at(tmp_path):
    gguf_file(tmp_path / "m.gguf")
    alone = read_dense(tmp_path / "m.gguf").tokenizer.encode("the sea")
    dense_folder(tmp_path)  # another model's config, weights and tokenizer
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "nobody/nothing", "task_type": "CAUSAL_LM"})
    )
    assert read_dense(tmp_path / "m.gguf").tokenizer.encode("the sea") == alone


def experts():
    shapes = {"ffn_gate_exps": (4, 96, 64), "ffn_up_exps": (4, 96, 64), "ffn_down_exps": (4, 64, 96)}
    return {f"blk.{i}.{name}.weight": np.ones(s, dtype=np.float32) for i in (0, 1) for name, s in shapes.items()}


def linear_scaling(writer):
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(4.0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"drop": ("blk.1.ffn_up.weight", "blk.0.attn_v.weight")}, "blk.0.attn_v.weight is missing, 2 of 20"),
        ({"extra": experts()}, "blk.0.ffn_down_exps.weight: expected a dense Llama without experts"),
        ({"extra": {"blk.0.attn_q.bias": np.ones(64, dtype=np.float32)}}, "blk.0.attn_q.bias: expected .* biases"),
        ({"extra": {"rope_freqs.weight": np.ones(8, dtype=np.float32)}}, "rope_freqs.weight: expected .* scaled"),
        ({"keys": linear_scaling}, "rope.scaling.type: 'linear' is not supported, only 'none'"),
        ({"vocabulary": "llama"}, "its tokenizer"),
    ],
)
def test_what_transformers_would_drop_or_draw_at_random_is_refused(tmp_path, changes, said):
    gguf_file(tmp_path / "m.gguf", **changes)
    with pytest.raises(UserError, match=said) as raised:
        read_dense(tmp_path / "m.gguf")
    assert str(raised.value).startswith(f"{tmp_path / 'm.gguf'}: ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"no gguf at all" * 100])
def test_damaged_files_are_refused_in_one_line(tmp_path, content):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(UserError, match=r"m\.gguf: not read by transformers") as raised:
        read_dense(tmp_path / "m.gguf")
    assert "\n" not in str(raised.value)


def test_a_cut_file_is_refused(tmp_path):
    gguf_file(tmp_path / "m.gguf")
    whole = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"m\.gguf: ") as raised:
        read_dense(tmp_path / "m.gguf")
    assert "\n" not in str(raised.value)
