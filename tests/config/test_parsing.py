from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abyssal.config import Config, ModelConfig, merge, parse, parse_assignments, preset, read_config, read_mapping
from abyssal.errors import UserError

NATIVE = preset("deepseek-v3").model_copy(update={"published": {}}).model_dump()


def message_of(function: object, *args: object) -> str:
    with pytest.raises(UserError) as caught:
        function(*args)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.json", b'{"a": 1,}', ["not valid json", "line 1"]),
        ("a.json", b"", ["not valid json"]),
        ("a.json", b"[" * 100_000, ["not valid json", "nested too deeply"]),
        ("a.yaml", b"a: [1", ["not valid yaml", "line 1"]),
        ("a.yaml", b"a: b: c\n", ["not valid yaml"]),
        ("a.yaml", b"a: \x00", ["not valid yaml"]),
        ("a.yml", b"a:\n\t- 1", ["not valid yml"]),
        ("a.json", b'{"a": "\xff"}', ["not UTF-8", "7"]),
        ("a.yaml", b"\xfe\xff", ["not UTF-8", "0"]),
        ("a.json", b"[1, 2]", ["expected a mapping", "[1, 2]"]),
        ("a.yaml", b"", ["expected a mapping", "None"]),
        ("a.yaml", b"just text", ["expected a mapping", "just text"]),
    ],
)
def test_files_that_do_not_parse(tmp_path: Path, name: str, content: bytes, says: list[str]):
    file = tmp_path / name
    file.write_bytes(content)
    for function in (read_mapping, read_config):
        message = message_of(function, file)
        assert message.startswith(f"{file}: ")
        assert all(part in message for part in says), message


def test_files_that_are_not_there(tmp_path: Path):
    assert message_of(read_mapping, tmp_path / "no.json") == f"{tmp_path}/no.json: no such file"
    assert message_of(read_config, tmp_path) == f"{tmp_path}/config.json: no such file"
    assert "cannot be read" in message_of(read_mapping, tmp_path)


def test_yaml_and_json_mean_the_same(tmp_path: Path):
    (tmp_path / "a.json").write_text('{"a": [1, 2.5, null], "b": {"c": "世"}}', encoding="utf-8")
    (tmp_path / "a.yaml").write_text("a: [1, 2.5, null]\nb:\n  c: 世\n", encoding="utf-8")
    expected = {"a": [1, 2.5, None], "b": {"c": "世"}}
    assert read_mapping(tmp_path / "a.json") == read_mapping(tmp_path / "a.yaml") == expected


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hiden_size": 3}, ["m: hiden_size: no such key (did you mean 'hidden_size'?)"]),
        ({"moe": {"n_routed_expert": 3}}, ["m: moe.n_routed_expert: no such key (did you mean 'n_routed_experts'?)"]),
        ({"attention": {"kv_lora_rnk": 3}}, ["m: attention.kv_lora_rnk: no such key (did you mean 'kv_lora_rank'?)"]),
        ({"rope": {"yarn": {"factr": 3}}}, ["m: rope.yarn.factr: no such key (did you mean 'factor'?)"]),
        ({"zzzz": 3}, ["m: zzzz: no such key; known keys: attention, "]),
        ({"attention": {"num_key_value_heads": 3}}, ["m: attention.num_key_value_heads: no such key"]),
        ({"two\nlines": 1}, ["m: two lines: no such key"]),
        ({"attention": {"kind": "mqa"}}, ["m: attention.kind: 'mqa' is not one of 'mha', 'mla', 'separate_latents'"]),
        ({"attention": "mla"}, ["m: attention: 'mla' is not valid"]),
        ({"moe": 3}, ["m: moe: 3 is not valid"]),
        ({"vocab_size": "129280"}, ["m: vocab_size: '129280' is not valid", "integer"]),
        ({"vocab_size": 1.5}, ["m: vocab_size: 1.5 is not valid", "integer"]),
        ({"vocab_size": True}, ["m: vocab_size: True is not valid", "integer"]),
        ({"vocab_size": None}, ["m: vocab_size: None is not valid", "integer"]),
        ({"hidden_size": 0}, ["m: hidden_size: 0 is not valid", "greater than 0"]),
        ({"num_hidden_layers": -2}, ["m: num_hidden_layers: -2 is not valid", "greater than 0"]),
        ({"moe": {"moe_intermediate_size": 0}}, ["m: moe.moe_intermediate_size: 0", "greater than 0"]),
        ({"moe": {"n_shared_experts": -1}}, ["m: moe.n_shared_experts: -1", "greater than or equal to 0"]),
        ({"moe": {"topk_method": "best"}}, ["m: moe.topk_method: 'best'", "'greedy'", "'noaux_tc'"]),
        ({"moe": {"n_group": 7}}, ["m: moe.n_group: 7 does not divide n_routed_experts 256"]),
        ({"moe": {"topk_group": 9}}, ["m: moe.topk_group: 9 is more than n_group 8"]),
        (
            {"moe": {"topk_group": 1, "num_experts_per_tok": 33}},
            ["m: moe.num_experts_per_tok: 33 is more than the 1 kept groups of 32 experts hold"],
        ),
        (
            {"moe": {"num_experts_per_tok": 257}},
            ["m: moe.num_experts_per_tok: 257 is more than n_routed_experts 256"],
        ),
        ({"moe": {"n_group": 256, "topk_group": 256}}, ["m: moe.n_group: 256 leaves 1 expert a group", "two best"]),
        ({"moe": {"segments": 5}}, ["m: moe.segments: 5 does not divide hidden_size 7168"]),
        ({"attention": {"qk_rope_head_dim": 63}}, ["m: attention.qk_rope_head_dim: 63 is odd", "pairs"]),
        ({"rope": {"yarn": {"factor": 0.5}}}, ["m: rope.yarn.factor: 0.5", "greater than or equal to 1"]),
        ({"rope": {"yarn": {"beta_fast": 0.5}}}, ["m: rope.yarn.beta_fast: 0.5 is below beta_slow 1.0"]),
        ({"rms_norm_eps": float("nan")}, ["m: rms_norm_eps: nan", "finite"]),
        ({"bos_token_id": 129280}, ["m: bos_token_id: 129280 is outside the vocabulary of 129280"]),
        ({"eos_token_id": -1}, ["m: eos_token_id: -1 is outside the vocabulary of 129280"]),
        ({"attention": {"compression_ratio": 5}}, ["attention.compression_ratio: 5 does not divide hidden_size 7168"]),
        ({"attention": {"compression_ratio": 0}}, ["attention.compression_ratio: 0 does not divide"]),
        ({"attention": {"compression_ratio": "4"}}, ["attention.compression_ratio: '4' does not divide"]),
        ({"attention": {"compression_ratio": 4}}, ["attention.q_lora_rank: 1536 contradicts compression_ratio 4"]),
    ],
    ids=str,
)
def test_bad_values(changes: dict[str, object], says: list[str]):
    message = message_of(parse, ModelConfig, merge(NATIVE, changes), "m")
    assert all(part in message for part in says), message


@pytest.mark.parametrize(
    ("attention", "says"),
    [
        ({"num_key_value_heads": 3}, "attention.num_key_value_heads: 3 does not divide num_attention_heads 16"),
        ({"head_dim": 127}, "attention.head_dim: 127 is odd"),
        ({"kv_lora_rank": 512}, "attention.kv_lora_rank: no such key"),
        ({"compression_ratio": 4}, "attention.compression_ratio: only for kind 'mla'"),
    ],
    ids=str,
)
def test_bad_values_of_multi_head_attention(attention: dict[str, object], says: str):
    native = preset("deepseek-moe-16b").model_dump()
    assert says in message_of(parse, ModelConfig, merge(native, {"attention": attention}), "m")


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers", "attention"])
def test_missing_keys(key: str):
    assert message_of(parse, ModelConfig, {k: v for k, v in NATIVE.items() if k != key}, "m") == f"m: {key}: missing"


def test_missing_keys_inside():
    attention = {k: v for k, v in NATIVE["attention"].items() if k != "v_head_dim"}
    assert message_of(parse, ModelConfig, NATIVE | {"attention": attention}, "m") == "m: attention.v_head_dim: missing"
    del attention["kind"]
    message = message_of(parse, ModelConfig, NATIVE | {"attention": attention}, "m")
    assert message == "m: attention.kind: missing; one of 'mha', 'mla', 'separate_latents'"
    assert message_of(parse, ModelConfig, [1], "m") == "m: expected a mapping of keys to values, found [1]"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(key=st.sampled_from(sorted(NATIVE)), value=json_values)
def test_whatever_a_value_is_it_is_read_or_refused_in_one_line(key: str, value: object):
    message = key
    try:
        parse(ModelConfig, NATIVE | {key: value}, "m")
    except UserError as error:
        message = str(error)
    assert len(message.splitlines()) == 1
    assert key in message


def test_configs_are_frozen_and_equal_by_value():
    one, two = parse(ModelConfig, NATIVE, "m"), parse(ModelConfig, NATIVE, "m")
    assert one == two
    with pytest.raises(ValueError, match="frozen"):
        one.vocab_size = 3
    assert issubclass(ModelConfig, Config)


def test_merge_lays_mappings_over_mappings_and_replaces_the_rest():
    base = {"a": {"b": 1, "c": {"d": 2}}, "e": [1, 2], "f": {"g": 1}}
    merged = merge(base, {"a": {"c": {"x": 3}}, "e": [9], "f": None, "h": 4})
    assert merged == {"a": {"b": 1, "c": {"d": 2, "x": 3}}, "e": [9], "f": None, "h": 4}
    assert base == {"a": {"b": 1, "c": {"d": 2}}, "e": [1, 2], "f": {"g": 1}}


def test_assignments():
    read = parse_assignments(
        ["optimizer.lr=1e-3", "optimizer.betas=[0.9, 0.95]", "balance=none", "n=3", "x=a=b", "y=", "z=true", "s='7'"]
    )
    assert read == {
        "optimizer": {"lr": 0.001, "betas": [0.9, 0.95]},
        "balance": "none",
        "n": 3,
        "x": "a=b",
        "y": None,
        "z": True,
        "s": 7.0,  # a quoted number is a number all the same: no field takes a text that looks like one
    }


@pytest.mark.parametrize(
    ("assignments", "says"),
    [
        (["a"], "argument 'a': expected key=value"),
        (["=3"], "argument '=3': expected key=value"),
        (["a..b=3"], "argument 'a..b=3': expected key=value"),
        (["a=[1"], "argument 'a=[1': the value is not valid YAML"),
        (["a=1", "a.b=2"], "argument 'a.b=2': 'a' was already set to a plain value"),
        (["a.b=2", "a=1"], "argument 'a=1': keys under 'a' were already set"),
    ],
)
def test_bad_assignments(assignments: list[str], says: str):
    assert says in message_of(parse_assignments, assignments)
