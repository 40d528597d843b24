"""What ``look`` keeps, against plain forward passes and selections; reading texts; what is shown of tokens."""

import gzip
import json
import lzma

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain_models import V1_MOE, randomised, small

from abyssal.analysis import lens_page
from abyssal.analysis.lens import LayerRouting, Text, Texts, choose_window, look, moe_layers, read_texts
from abyssal.analysis.lens_page import build_lens, label, measures_json, page_data, pieces, visible
from abyssal.data.tokenizer import byte_tokenizer, train_bpe
from abyssal.errors import UserError
from abyssal.model import RoutingRecorder
from abyssal.model.moe import MoE


def random_texts(vocabulary, lengths, window, seed=0):
    """Documents of random tokens, each a text of its own."""
    rng = np.random.default_rng(seed)
    of = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    position = np.concatenate([np.arange(n, dtype=np.int32) % window for n in lengths])
    ids = rng.integers(vocabulary, size=sum(lengths)).astype(np.int32)
    return Texts([Text(f"t{i}", 1, n, False) for i, n in enumerate(lengths)], window, ids, of, of, position)


def model_of(**moe):
    config = small(moe=moe, mtp={"num_nextn_predict_layers": 2}, num_hidden_layers=3)
    return randomised(config).float().eval()


@torch.no_grad()
@pytest.mark.parametrize(
    "moe", [{}, V1_MOE, {"segments": 3}, {"n_shared_experts": 0}], ids=["v3", "v1", "cut", "routed"]
)
def test_looking_equals_plain_forward_passes(moe):
    model = model_of(**moe)
    texts = random_texts(model.config.vocab_size, [13, 4, 1, 24], 8)
    found = look(model, texts)
    assert sorted(found) == sorted(model.routers) == moe_layers(model.config)
    main = model.config.num_hidden_layers
    for start, end in texts.windows():
        recorder = RoutingRecorder()
        document_end = int((texts.document == texts.document[start]).nonzero()[0][-1]) + 1
        after = texts.ids[start : min(end + 2, document_end)].tolist()
        padded = torch.tensor([after + [0] * (end - start + 2 - len(after))])
        hidden = model.hidden(padded[:, : end - start], recorder=recorder)
        model.mtp_hidden(hidden, padded, recorder=recorder)
        for layer, (routing,) in recorder.routings.items():
            module = max(layer - main + 1, 0)
            known = min(end - start, len(after) - module) if module else end - start
            mine = found[layer]
            assert mine.mtp == module
            wanted = routing.indices.reshape(end - start, -1)[:known].numpy()
            assert mine.indices[start : start + known].tolist() == wanted.tolist()
            weights = routing.weights.reshape(end - start, -1)[:known].numpy()
            np.testing.assert_allclose(mine.weights[start : start + known], weights, rtol=1e-4, atol=1e-6)
            assert (mine.indices[start + max(known, 0) : end] == -1).all()
            assert (mine.weights[start + max(known, 0) : end] == 0).all()


@torch.no_grad()
def test_windows_give_each_token_once():
    model = model_of()
    texts = random_texts(model.config.vocab_size, [40], 16)
    assert texts.windows() == [(0, 16), (16, 32), (32, 40)]
    found = look(model, texts)
    main = [r for r in found.values() if not r.mtp]
    assert all(r.seen.all() for r in main)
    assert [int(r.seen.sum()) for r in found.values() if r.mtp] == [39, 38]  # the last have no next token
    whole = look(model, random_texts(model.config.vocab_size, [40], 64))
    for layer, r in found.items():  # what the first window saw, it saw as in one piece
        assert (r.indices[:16] == whole[layer].indices[:16]).all()


def test_looking_leaves_the_model_as_it_was():
    model = model_of().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    done = []
    look(model, random_texts(model.config.vocab_size, [30, 5], 8), lambda n, total: done.append((n, total)))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert done[-1] == (35, 35)


class Parts(RoutingRecorder):
    def __init__(self):
        super().__init__()
        self.parts = {}

    def record_outputs(self, layer, routed, shared):
        self.parts[layer] = routed, shared


@torch.no_grad()
def test_shared_share_and_cosine_equal_loops():
    model = model_of(n_shared_experts=2)
    texts = random_texts(model.config.vocab_size, [12], 12)
    found, recorder = look(model, texts), Parts()
    model.hidden(torch.from_numpy(texts.ids).long()[None], recorder=recorder)
    for layer, (routed, shared) in recorder.parts.items():
        for n in range(12):
            a, b = shared[0, n].double(), routed[0, n].double()
            size = float(a @ a) ** 0.5, float(b @ b) ** 0.5
            assert found[layer].shared[n] == pytest.approx(size[0] / sum(size), rel=1e-4)
            assert found[layer].cosine[n] == pytest.approx(float(a @ b) / (size[0] * size[1]), abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("silent", "share"), [("shared", 0.0), ("routed", 1.0), ("none", 0.0)])
def test_share_of_one_kind_alone(silent, share):
    model = model_of(n_shared_experts=0 if silent == "none" else 1)
    for block in (*model.blocks, *model.mtp_modules):
        if isinstance(block.mlp, MoE) and silent == "shared":
            block.mlp.shared_experts.down_proj.weight.zero_()
        elif isinstance(block.mlp, MoE) and silent == "routed":
            block.mlp.experts.down_proj.zero_()
    texts = random_texts(model.config.vocab_size, [12], 12)
    lens = build_lens("m", texts, look(model, texts))
    assert all(m.shared == share for m in lens.measures.values())
    assert all(m.cosine is None for m in lens.measures.values())


@torch.no_grad()
@pytest.mark.parametrize("groups", [1, 4])
def test_choices_moved_by_the_bias(groups):
    """Against the same model with its biases at zero, layer by layer: only the first sees the same input."""
    shape = {"n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": groups, "topk_group": min(groups, 2)}
    model = model_of(**shape)
    texts = random_texts(model.config.vocab_size, [60], 60)
    first = min(model.routers)
    model.routers[first].e_score_correction_bias.copy_(torch.linspace(-0.3, 0.3, 8))
    moved = look(model, texts)[first]
    for router in model.routers.values():
        router.e_score_correction_bias.zero_()
    plain = look(model, texts)
    expected = [
        len(set(a) - set(b)) for a, b in zip(moved.indices.tolist(), plain[first].indices.tolist(), strict=True)
    ]
    assert moved.moved.tolist() == expected
    assert sum(expected) > 0
    assert all((r.moved == 0).all() for r in plain.values())


def test_no_bias_to_move_anything():
    model = model_of(**V1_MOE)
    texts = random_texts(model.config.vocab_size, [10], 10)
    found = look(model, texts)
    assert all(r.moved is None for r in found.values())
    assert all(m.moved_tokens is None for m in build_lens("m", texts, found).measures.values())


def test_wrong_models_and_windows():
    texts = random_texts(30, [10], 10)
    with pytest.raises(UserError, match="no MoE layers"):
        look(randomised(small(moe=None)), texts)
    model = model_of()
    texts.ids[3] = model.config.vocab_size
    with pytest.raises(UserError, match=f"token id {model.config.vocab_size} in t0 is outside"):
        look(model, texts)
    longest = model.config.max_position_embeddings
    with pytest.raises(UserError, match=f"window: {longest + 1} is not between 1 and"):
        choose_window([model.config], longest + 1)
    with pytest.raises(UserError, match="window: 0 is not"):
        choose_window([model.config], 0)
    assert choose_window([model.config], None) == min(longest, 2048)


class TestTexts:
    @pytest.fixture
    def folder(self, tmp_path):
        (tmp_path / "a.txt").write_text("seven wizards\n<|endoftext|>\nbrew tea\n", encoding="utf-8")
        with gzip.open(tmp_path / "b.jsonl.gz", "wt", encoding="utf-8") as file:
            file.write("\n".join(json.dumps({"text": text}) for text in ("été", "at dawn")))
        with lzma.open(tmp_path / "c.txt.xz", "wt", encoding="utf-8") as file:
            file.write("x" * 100)
        return tmp_path

    def test_every_token_of_every_document_once(self, folder):
        tokenizer = byte_tokenizer()
        texts = read_texts([folder / name for name in ("a.txt", "b.jsonl.gz", "c.txt.xz")], tokenizer, 8)
        documents = ["seven wizards\n", "brew tea\n", "été", "at dawn", "x" * 100]
        expected = [[0, *(2 + byte for byte in text.encode())] for text in documents]
        assert texts.ids.tolist() == [token for ids in expected for token in ids]
        assert texts.document.tolist() == [i for i, ids in enumerate(expected) for _ in ids]
        assert texts.text.tolist() == [(0, 0, 1, 1, 2)[i] for i in texts.document]
        assert texts.position.tolist() == [n % 8 for ids in expected for n in range(len(ids))]
        assert texts.texts == [Text("a", 2, 25, False), Text("b", 2, 14, False), Text("c", 1, 101, False)]
        assert [b - a for a, b in texts.windows()] == [8, 7, 8, 2, 6, 8, *[8] * 12, 5]

    @pytest.mark.parametrize("limit", [1, 15, 16, 25, 26])
    def test_limit(self, folder, limit):
        whole = read_texts([folder / "a.txt"], byte_tokenizer(), 64, None)
        texts = read_texts([folder / "a.txt"], byte_tokenizer(), 64, limit)
        assert texts.ids.tolist() == whole.ids.tolist()[:limit]
        assert texts.texts[0].cut == (limit < 25)
        assert texts.texts[0].documents == (2 if limit > 15 else 1)

    def test_a_long_text_is_not_read_to_its_end(self, tmp_path):
        words = " ".join(f"word{n}" for n in range(20000))
        (tmp_path / "long.txt").write_text(words)
        tokenizer = train_bpe([words[:4000]], 300)
        whole = tokenizer.encode(words)
        texts = read_texts([tmp_path / "long.txt"], tokenizer, 64, 100)
        assert texts.ids.tolist() == [tokenizer.bos_id, *whole[:99]]
        assert texts.texts[0].cut

    def test_names(self, folder, tmp_path):
        (tmp_path / "sub").mkdir()
        (tmp_path / "sub" / "a.txt").write_text("other")
        texts = read_texts([folder / "a.txt", tmp_path / "sub" / "a.txt"], byte_tokenizer(), 8)
        assert [text.name for text in texts.texts] == [str(folder / "a.txt"), str(tmp_path / "sub" / "a.txt")]
        with pytest.raises(UserError, match="given twice"):
            read_texts([folder / "a.txt", folder / "." / "a.txt"], byte_tokenizer(), 8)

    def test_folder(self, folder):
        with pytest.raises(UserError, match="a folder; expected a file"):
            read_texts([folder], byte_tokenizer(), 8)


def texts_of(tokenizer, *documents):
    parts = [tokenizer.encode(text) for text in documents]
    lengths = [len(part) for part in parts]
    of = np.repeat(np.arange(len(parts), dtype=np.int32), lengths)
    position = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])
    ids = np.array([token for part in parts for token in part], np.int32)
    return Texts([Text("t", len(parts), len(of), False)], 64, ids, of, of * 0, position)


class TestShownTokens:
    @given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=20), min_size=1, max_size=3))
    def test_pieces_in_a_row_are_the_text(self, documents):
        for tokenizer in (byte_tokenizer(), train_bpe(["日本語日本語", *documents], 300)):
            texts = texts_of(tokenizer, *documents)
            shown = pieces(texts, tokenizer)
            assert len(shown) == len(texts.ids)
            for i, document in enumerate(documents):
                mine = [piece for piece, of in zip(shown, texts.document, strict=True) if of == i]
                assert "".join(mine) == visible(document)

    def test_a_character_stands_where_it_begins(self):
        tokenizer = byte_tokenizer()
        assert pieces(texts_of(tokenizer, "a é😀b"), tokenizer) == ["a", " ", "é", "", "😀", "", "", "", "b"]
        texts = texts_of(tokenizer, "é!", "😀")
        cut = Texts(texts.texts, 64, texts.ids[1:-1], texts.document[1:-1], texts.text[1:-1], texts.position[1:-1])
        assert pieces(cut, tokenizer) == ["�", "!", "�", "", ""]  # half a character on either side

    def test_special_tokens_are_spelt(self):
        tokenizer = byte_tokenizer()
        texts = texts_of(tokenizer, "abc")
        texts.ids[1] = 1
        assert pieces(texts, tokenizer) == ["a", tokenizer.eos, "c"]

    def test_labels(self):
        tokenizer = train_bpe(["the the the\n"], 280)
        ids = tokenizer.encode(" the\n")
        assert "".join(label(tokenizer, i) for i in ids) == "␣the⏎"
        assert label(byte_tokenizer(), 2 + 0xE2) == "<E2>"
        assert label(byte_tokenizer(), 2) == "␀"

    def test_what_cannot_be_seen(self):
        assert visible("a\0\x1b\x7f\r\n\tb") == "a␀␛␡␍\n\tb"
        assert visible("\u202eabc\u2066\x85\u2028\ufeff") == "[U+202E]abc[U+2066][U+0085][U+2028][U+FEFF]"
        for kept in ("שלום", "ابجد", "👩‍👩‍👧", "❤️", "日本", "a\u00a0b", "<b>&amp;", "e\u0301"):
            assert visible(kept) == kept


class TestPageData:
    def lens(self, compared=False):
        model, tokenizer = model_of(), byte_tokenizer()
        config = small(vocab_size=258, moe={}, mtp={"num_nextn_predict_layers": 1})
        model, other = randomised(config), randomised(config, seed=5) if compared else None
        texts = texts_of(tokenizer, "seven wizards brew", "strong black tea")
        theirs = ("other", look(other, texts)) if compared else None
        return build_lens("m", texts, look(model, texts), theirs), tokenizer

    def test_json_is_finite_and_says_what_was_measured(self):
        lens, tokenizer = self.lens()
        data = measures_json(lens, tokenizer)
        json.dumps(data, allow_nan=False)
        for row in data["layers"]:
            m = lens.measures[row["layer"]]
            assert row["entropy"] == m.entropy
            assert row["token"]["bits"] == m.token.bits
            assert sum(expert["load"] for expert in row["experts"]) == int(m.load.sum())
            routing = lens.routing[row["layer"]]
            for number, expert in enumerate(row["experts"]):
                for context in expert["contexts"]:
                    at = routing.indices[context["token"]] == number
                    assert context["weight"] == routing.weights[context["token"]][at][0]
                    before, token, behind = context["context"]
                    assert token == tokenizer.decode([lens.texts.ids[context["token"]]])
                    assert (
                        before + token + behind in ("seven wizards brew", "strong black tea")
                        or len(behind) == 8
                        or len(before) == 8
                    )

    def test_comparing_a_model_with_itself(self):
        lens, tokenizer = self.lens()
        again = build_lens("m", lens.texts, lens.routing, ("m2", lens.routing))
        assert all(
            (d.overlap, d.same_first, d.variation, d.weight_change) == (1, 1, 0, 0) for d in again.other.drifts.values()
        )
        assert measures_json(again, tokenizer)["most_changed"] == page_data(again, tokenizer)["changed"] == []

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"num_hidden_layers": 5}, "other has other MoE layers than m"),
            ({"moe": {"n_routed_experts": 16}}, "other has other experts a layer than m: 16, not 8"),
            ({"moe": {"num_experts_per_tok": 2}}, "other has other experts a token than m: 2, not 3"),
        ],
    )
    def test_models_that_do_not_compare(self, changes, message):
        texts = random_texts(20, [10], 10)
        ours, theirs = look(randomised(small()), texts), look(randomised(small(**changes)), texts)
        with pytest.raises(UserError, match=message):
            build_lens("m", texts, ours, ("other", theirs))

    def test_lifts_survive_their_byte(self):
        lift = np.full((3, 3), np.nan)
        lift[0, 1] = lift[1, 0] = 1.0
        lift[0, 2] = lift[2, 0] = 3.0
        steps = lens_page._lift_steps(lift).tolist()
        assert steps == [128, round(np.log2(3) / 4 * 127 + 128), 0]


def test_layer_routing_names():
    nothing = np.zeros((1, 1))
    rows = [LayerRouting(3, k, 2, 1, nothing, nothing, None, nothing, nothing) for k in (0, 1)]
    assert [lens_page.layer_name(row) for row in rows] == ["3", "3 (MTP)"]
