"""Damaged, doubled, missing, misplaced: each is one line that names the file or the tensor, before memory is taken."""

import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import MODEL, scrambled

import abyssal
from abyssal.checkpoint import load_model
from abyssal.checkpoint.convert import convert
from abyssal.checkpoint.shards import INDEX, Shards
from abyssal.config import resolve_model
from abyssal.errors import UserError
from abyssal.model import Transformer

NAME = "model.layers.1.mlp.experts.2.up_proj.weight"


@pytest.fixture
def folder(tmp_path):
    model = scrambled(Transformer(resolve_model(MODEL), generator=torch.Generator().manual_seed(0)))
    abyssal.export(model, tmp_path / "m", shard_size=30_000)
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 3
    return tmp_path / "m"


def index_of(folder):
    return json.loads((folder / INDEX).read_text())


def change_index(folder, change):
    data = index_of(folder)
    change(data["weight_map"])
    (folder / INDEX).write_text(json.dumps(data))


def change_tensors(folder, name, change):
    """``change`` gets the tensors of the file that holds ``name``."""
    file = folder / index_of(folder)["weight_map"][name]
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def refused(folder, *parts):
    """By loading, exporting and converting alike; nothing is left behind."""
    messages = []
    before = sorted(path.name for path in folder.parent.iterdir())
    for action in (
        lambda: load_model(folder),
        lambda: abyssal.export(folder, folder.parent / "out"),
        lambda: convert(folder, folder.parent / "out", torch.float16),
    ):
        with pytest.raises(UserError) as caught:
            action()
        messages.append(str(caught.value))
        assert sorted(path.name for path in folder.parent.iterdir()) == before
    for message in messages:
        assert "\n" not in message
        for part in parts:
            assert part in message
    return messages[0]


class TestFiles:
    @pytest.mark.parametrize("keep", [0, 5, 200, -1, -3000])
    def test_cut(self, folder, keep):
        file = sorted(folder.glob("*.safetensors"))[2]
        file.write_bytes(file.read_bytes()[:keep])
        refused(folder, file.name, "not a readable safetensors file")

    def test_longer_than_its_header_says(self, folder):
        file = sorted(folder.glob("*.safetensors"))[0]
        file.write_bytes(file.read_bytes() + b"\0" * 16)
        refused(folder, file.name, "not a readable safetensors file")

    def test_noise(self, folder):
        file = sorted(folder.glob("*.safetensors"))[1]
        file.write_bytes(os.urandom(5000))
        refused(folder, file.name, "not a readable safetensors file")

    def test_missing(self, folder):
        file = sorted(folder.glob("*.safetensors"))[1]
        file.unlink()
        refused(folder, file.name, "no such file", INDEX)

    def test_a_loop_of_links(self, folder):
        file = sorted(folder.glob("*.safetensors"))[1]
        file.unlink()
        file.symlink_to(file.name)
        refused(folder, file.name, "a loop of symbolic links")

    def test_the_folder_is_a_loop_of_links(self, tmp_path):
        (tmp_path / "a").symlink_to(tmp_path / "b")
        (tmp_path / "b").symlink_to(tmp_path / "a")
        with pytest.raises(UserError):
            abyssal.load(tmp_path / "a")

    def test_a_link_to_nothing(self, folder):
        file = sorted(folder.glob("*.safetensors"))[1]
        file.unlink()
        file.symlink_to("gone")
        refused(folder, file.name, "a symbolic link to nothing")

    def test_links_to_elsewhere_are_how_the_hub_keeps_files(self, folder, tmp_path):
        expected = load_model(folder).state_dict()
        (tmp_path / "blobs").mkdir()
        for file in folder.glob("*.safetensors"):
            file.rename(tmp_path / "blobs" / file.stem)
            file.symlink_to(tmp_path / "blobs" / file.stem)
        again = load_model(folder).state_dict()
        assert all(torch.equal(expected[name], again[name]) for name in expected)

    def test_a_folder_in_place_of_a_file(self, folder):
        file = sorted(folder.glob("*.safetensors"))[1]
        file.unlink()
        file.mkdir()
        refused(folder, file.name, "not a file")

    def test_no_weights_at_all(self, folder):
        for file in folder.glob("*.safetensors*"):
            file.unlink()
        refused(folder, "model.safetensors", "no such file")

    def test_an_index_and_a_single_file_that_it_does_not_name(self, folder):
        save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
        refused(folder, "holds model.safetensors and model.safetensors.index.json")

    def test_an_index_that_is_a_link_to_nothing(self, folder):
        (folder / INDEX).unlink()
        (folder / INDEX).symlink_to("gone")
        refused(folder, INDEX, "a symbolic link to nothing")

    def test_a_file_in_place_of_the_folder(self, folder):
        with pytest.raises(UserError, match="expected the folder"):
            abyssal.load(folder / "config.json")

    def test_shards_without_an_index(self, folder):
        (folder / INDEX).unlink()
        refused(folder, "neither model.safetensors nor", INDEX)


class TestPickles:
    class Bomb:
        def __init__(self, path):
            self.path = path

        def __reduce__(self):
            return (open, (str(self.path), "w"))

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "model.pkl"])
    def test_alone(self, folder, tmp_path, name):
        for file in folder.glob("*.safetensors*"):
            file.unlink()
        (folder / name).write_bytes(pickle.dumps(self.Bomb(tmp_path / "exploded")))
        refused(folder, name, "never loaded")
        assert not (tmp_path / "exploded").exists()

    @pytest.mark.parametrize("inside", ["pickle", "torch"])
    def test_named_safetensors(self, folder, tmp_path, inside):
        file = sorted(folder.glob("*.safetensors"))[0]
        if inside == "pickle":
            file.write_bytes(pickle.dumps(self.Bomb(tmp_path / "exploded")))
        else:
            torch.save({"x": torch.zeros(3)}, file)
        refused(folder, file.name, "not a readable safetensors file")
        assert not (tmp_path / "exploded").exists()

    def test_named_by_the_index(self, folder):
        (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
        change_index(folder, lambda weight_map: weight_map.update({NAME: "pytorch_model.bin"}))
        refused(folder, NAME, "pytorch_model.bin", "never loaded")


class TestIndex:
    @pytest.mark.parametrize("file", ["../m/x.safetensors", "/etc/x.safetensors", "a/../../x.safetensors", "..\\x"])
    def test_leaves_the_folder(self, folder, file):
        change_index(folder, lambda weight_map: weight_map.update({NAME: file}))
        refused(folder, INDEX, NAME, repr(file), "leaves the folder")

    @pytest.mark.parametrize("file", [None, 3, "", ["x.safetensors"], "x.txt"])
    def test_no_file_name(self, folder, file):
        change_index(folder, lambda weight_map: weight_map.update({NAME: file}))
        refused(folder, INDEX, NAME, repr(file))

    def test_a_tensor_twice_in_the_index(self, folder):
        text = (folder / INDEX).read_text()
        entry = f'"{NAME}": "{index_of(folder)["weight_map"][NAME]}"'
        assert entry in text
        (folder / INDEX).write_text(text.replace(entry, f'{entry}, "{NAME}": "other.safetensors"'))
        refused(folder, INDEX, NAME, "named twice")

    def test_a_tensor_in_two_files(self, folder):
        change_tensors(folder, "model.norm.weight", lambda tensors: tensors.update({NAME: torch.zeros(16, 32)}))
        refused(folder, NAME, "a tensor twice", index_of(folder)["weight_map"]["model.norm.weight"])

    def test_a_tensor_that_is_not_in_its_file(self, folder):
        change_tensors(folder, NAME, lambda tensors: tensors.pop(NAME))
        refused(folder, NAME, "is not in it", INDEX)

    def test_a_tensor_that_the_index_does_not_name(self, folder):
        change_tensors(folder, NAME, lambda tensors: tensors.update({"model.extra": torch.zeros(3)}))
        refused(folder, "model.extra", "does not name")

    @pytest.mark.parametrize(
        "text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "\xff", "[" * 10**5]
    )
    def test_no_index(self, folder, text):
        (folder / INDEX).write_text(text, encoding="latin-1")
        refused(folder, INDEX)


class TestTensors:
    def test_missing_are_listed(self, folder):
        change_tensors(folder, NAME, lambda tensors: tensors.pop(NAME))
        change_index(folder, lambda weight_map: weight_map.pop(NAME))
        refused(folder, "missing", NAME)

    def test_unexpected_are_listed(self, folder):
        change_tensors(folder, NAME, lambda tensors: tensors.update({"model.extra": torch.zeros(3)}))
        change_index(folder, lambda weight_map: weight_map.update({"model.extra": weight_map[NAME]}))
        refused(folder, "unexpected", "model.extra")

    def test_wrong_shape(self, folder):
        change_tensors(folder, NAME, lambda tensors: tensors.update({NAME: torch.zeros(32, 16)}))
        refused(folder, NAME, "shape [32, 16], the config says [16, 32]")

    @pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.uint8, torch.float8_e5m2])
    def test_wrong_dtype(self, folder, dtype):
        change_tensors(folder, NAME, lambda tensors: tensors.update({NAME: torch.zeros(16, 32).to(dtype)}))
        refused(folder, NAME, "expected one of F64, F32")

    @pytest.mark.parametrize(
        ("change", "part"),
        [
            ({"num_hidden_layers": 1}, "model.layers.1."),
            ({"hidden_size": 48}, "the config says"),
            ({"n_routed_experts": 5}, "experts.4."),
            ({"n_routed_experts": 3}, "experts.3."),
            ({"kv_lora_rank": 12}, "kv_a_proj_with_mqa"),
            ({"vocab_size": 300}, "model.embed_tokens.weight"),
            ({"first_k_dense_replace": 2}, "model.layers.1.mlp"),
            ({"num_nextn_predict_layers": 2}, "model.layers.3."),
            ({"q_lora_rank": None}, "q_proj"),
        ],
    )
    def test_a_config_that_contradicts(self, folder, change, part):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        refused(folder, part)

    def test_an_mtp_copy_that_is_none(self, folder):
        """Embedding and head under the MTP module are those of the model; another one would be lost."""
        name = "model.layers.2.embed_tokens.weight"
        change_tensors(folder, name, lambda tensors: tensors.update({name: tensors[name] + 1}))
        with pytest.raises(UserError, match=r"differs from model\.embed_tokens\.weight") as caught:
            load_model(folder)
        assert f"--allow-missing {name}" in str(caught.value)
        with pytest.warns(UserWarning, match=r"left out: model\.layers\.2\.embed_tokens\.weight"):
            load_model(folder, allow_missing=[name])

    def test_a_tied_head_that_is_another(self, tmp_path):
        model = Transformer(resolve_model({**MODEL, "tie_word_embeddings": True, "mtp": {}}))
        abyssal.export(model, tmp_path / "m")
        tensors = load_file(tmp_path / "m" / "model.safetensors")
        head = tensors["model.embed_tokens.weight"].clone()
        save_file({**tensors, "lm_head.weight": head}, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
        load_model(tmp_path / "m")
        abyssal.export(tmp_path / "m", tmp_path / "kept")
        assert "lm_head.weight" in Shards(tmp_path / "kept")
        save_file({**tensors, "lm_head.weight": head + 1}, tmp_path / "m" / "model.safetensors")
        with pytest.raises(UserError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
            load_model(tmp_path / "m")

    def test_rotary_tables_of_old_files(self, folder, tmp_path):
        """Every code computes them from the config; some published files hold them all the same."""
        name = "model.layers.0.self_attn.rotary_emb.inv_freq"
        change_tensors(folder, NAME, lambda tensors: tensors.update({name: torch.zeros(4)}))
        change_index(folder, lambda weight_map: weight_map.update({name: weight_map[NAME]}))
        load_model(folder)
        abyssal.export(folder, tmp_path / "out")
        assert name not in Shards(tmp_path / "out")

    @pytest.mark.parametrize(
        "options",
        [{"dtype": torch.int8}, {"dtype": torch.float8_e4m3fn}, {"dtype": "bf16"}, {"device": "foo"}, {"threads": 0}],
    )
    def test_impossible_options(self, folder, options):
        with pytest.raises(UserError, match=next(iter(options))):
            load_model(folder, **options)


class TestAllowed:
    def test_missing_and_unexpected(self, folder):
        change_tensors(folder, NAME, lambda tensors: tensors.update({"model.extra": torch.zeros(3)}))
        change_index(folder, lambda weight_map: weight_map.update({"model.extra": weight_map[NAME]}))
        change_tensors(folder, NAME, lambda tensors: tensors.pop(NAME))
        change_index(folder, lambda weight_map: weight_map.pop(NAME))
        for patterns in (["model.extra"], ["*.up_proj.weight"]):
            with pytest.raises(UserError, match="missing" if patterns == ["model.extra"] else "unexpected"):
                load_model(folder, allow_missing=patterns)
        with pytest.warns(UserWarning, match=f"drawn anew: {NAME}; left out: model.extra"):
            model = load_model(folder, allow_missing=["model.extra", "*.up_proj.weight"])
        drawn = model.model.layers[1].mlp.experts.gate_up_proj[2, 16:]
        assert drawn.isfinite().all()
        assert 0 < drawn.std() < 0.1

    def test_what_is_left_out_is_not_written_either(self, folder, tmp_path):
        change_tensors(folder, NAME, lambda tensors: tensors.update({"model.extra": torch.zeros(3)}))
        change_index(folder, lambda weight_map: weight_map.update({"model.extra": weight_map[NAME]}))
        with pytest.warns(UserWarning, match=r"left out: model\.extra"):
            abyssal.export(folder, tmp_path / "out", allow_missing=["model.extra"])
        with pytest.warns(UserWarning, match=r"left out: model\.extra"):
            convert(folder, tmp_path / "fp8", torch.float8_e4m3fn, allow_missing=["model.extra"])
        for name in ("out", "fp8"):
            assert "model.extra" not in Shards(tmp_path / name)
            load_model(tmp_path / name)

    def test_no_copy_is_made_of_what_is_not_there(self, folder, tmp_path):
        change_tensors(folder, NAME, lambda tensors: tensors.pop(NAME))
        change_index(folder, lambda weight_map: weight_map.pop(NAME))
        for action in (
            lambda: abyssal.export(folder, tmp_path / "out", allow_missing=["*"]),
            lambda: convert(folder, tmp_path / "out", torch.bfloat16, allow_missing=["*"]),
        ):
            with pytest.warns(UserWarning, match="drawn anew"), pytest.raises(UserError, match="no copy can be made"):
                action()

    def test_fp8_layers_left_over_or_missing(self, folder, tmp_path):
        convert(folder, tmp_path / "fp8", torch.float8_e4m3fn)
        config = json.loads((tmp_path / "fp8" / "config.json").read_text())
        (tmp_path / "fp8" / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 0}))
        with pytest.warns(UserWarning, match="the checkpoint holds 1 MTP modules"):
            assert len(load_model(tmp_path / "fp8").mtp_modules) == 1
        (tmp_path / "fp8" / "config.json").write_text(json.dumps({**config, "first_k_dense_replace": 2}))
        with pytest.raises(UserError, match="missing"):
            load_model(tmp_path / "fp8")
        with pytest.warns(UserWarning, match="left out"):
            model = load_model(tmp_path / "fp8", allow_missing=["model.layers.1.mlp.*"])
        assert model.blocks[1].mlp.up_proj.weight.isfinite().all()
        (tmp_path / "fp8" / "config.json").write_text(json.dumps(config))
        for name in (NAME, NAME + "_scale_inv"):
            change_tensors(tmp_path / "fp8", name, lambda tensors, name=name: tensors.pop(name))
            change_index(tmp_path / "fp8", lambda weight_map, name=name: weight_map.pop(name))
        with pytest.warns(UserWarning, match=f"drawn anew: {NAME}"):
            model = load_model(tmp_path / "fp8", weights="fp8", allow_missing=[NAME])
        assert model.model.layers[1].mlp.experts.gate_up_proj.dtype == torch.bfloat16  # the layer's experts go together
        assert model.model.layers[2].mlp.experts.gate_up_proj.dtype == torch.float8_e4m3fn

    def test_a_norm_is_one_and_a_bias_zero(self, folder):
        names = ["model.layers.1.input_layernorm.weight", "model.layers.1.mlp.gate.e_score_correction_bias"]
        for name in names:
            change_tensors(folder, name, lambda tensors, name=name: tensors.pop(name))
            change_index(folder, lambda weight_map, name=name: weight_map.pop(name))
        with pytest.warns(UserWarning, match="drawn anew"):
            model = load_model(folder, allow_missing=names)
        assert (model.model.layers[1].input_layernorm.weight == 1).all()
        assert (model.routers[1].e_score_correction_bias == 0).all()


class TestFP8:
    @pytest.fixture
    def fp8(self, folder):
        convert(folder, folder.parent / "fp8", torch.float8_e4m3fn)
        return folder.parent / "fp8"

    def test_a_missing_scale(self, fp8):
        scale = NAME + "_scale_inv"
        change_tensors(fp8, scale, lambda tensors: tensors.pop(scale))
        change_index(fp8, lambda weight_map: weight_map.pop(scale))
        refused(fp8, NAME, "FP8 without its scales")

    def test_a_scale_that_is_no_number(self, fp8):
        scale = NAME + "_scale_inv"
        change_tensors(fp8, scale, lambda tensors: tensors.update({scale: torch.full((1, 1), float("nan"))}))
        with pytest.raises(UserError, match=f"{scale}: holds NaN"):
            load_model(fp8)
        with pytest.raises(UserError, match=f"{scale}: holds NaN"):
            convert(fp8, fp8.parent / "out", torch.bfloat16)
        assert not (fp8.parent / "out").exists()
        assert not (fp8.parent / "out").with_suffix(".safetensors").exists()

    def test_a_scale_of_another_shape(self, fp8):
        scale = NAME + "_scale_inv"
        change_tensors(fp8, scale, lambda tensors: tensors.update({scale: torch.ones(1, 2)}))
        refused(fp8, scale, "shape [1, 2], a weight of [16, 32] has [1, 1]")

    def test_a_scale_in_another_dtype(self, fp8):
        scale = NAME + "_scale_inv"
        change_tensors(fp8, scale, lambda tensors: tensors.update({scale: torch.ones(1, 1).to(torch.float8_e4m3fn)}))
        refused(fp8, scale, "expected F32 or F8_E8M0")

    def test_a_scale_of_a_weight_that_is_not_fp8(self, fp8):
        change_tensors(fp8, NAME, lambda tensors: tensors.update({NAME: tensors[NAME].float()}))
        refused(fp8, NAME + "_scale_inv", "not FP8")

    def test_a_scale_without_its_weight(self, fp8):
        change_tensors(fp8, NAME, lambda tensors: tensors.pop(NAME))
        change_index(fp8, lambda weight_map: weight_map.pop(NAME))
        refused(fp8, "missing", NAME)

    def test_infinite_numbers_are_not_quantised(self, folder, tmp_path):
        def spoil(tensors):
            tensors[NAME][3, 5] = float("inf")

        change_tensors(folder, NAME, spoil)
        for action in (
            lambda: convert(folder, tmp_path / "out", torch.float8_e4m3fn),
            lambda: abyssal.export(folder, tmp_path / "out", dtype=torch.float8_e4m3fn),
        ):
            with pytest.raises(UserError, match=f"{NAME}: holds NaN or infinite"):
                action()
            assert not (tmp_path / "out").exists()


def test_a_subset_reads_no_other_header(folder):
    weight_map = index_of(folder)["weight_map"]
    wanted = {file for name, file in weight_map.items() if ".layers." not in name or ".layers.0." in name}
    for file in set(weight_map.values()) - wanted:
        (folder / file).write_bytes(b"damaged")
    assert set(Shards(folder, {0}).files) == wanted
    load_model(folder, layers=1)
