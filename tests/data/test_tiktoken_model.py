import base64
import json
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.data.tiktoken_model import last_pair, read_ranks
from abyssal.data.tokenizer import Tokenizer
from abyssal.errors import UserError

tiktoken = pytest.importorskip("tiktoken")

# Moonshot's pattern, typed a second time from tokenization_kimi.py so that a slip in the library's shows.
MOONSHOT = (
    r"""[\p{Han}]+"""
    r"""|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
    r"""|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
    r"""|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
CORPUS = [
    "Before we proceed any further, hear me speak. You're all resolved rather to die than to famish?",
    "   the cat sat on the mat, the cat's hat; THE CAT'S! 12345 6789 0.25 the the then they'll",
    "def forward(self, x):\n    if x is None:\n        return self.weight[0][1]\n\n\n    return x ** 2  # ok\r\n",
    "深度求索的模型是开源的，模型的权重也是开源的。深度学习模型，中文English混合2024年。人工智能",
    "naïve café über Ελληνικά русский текст 日本語のテキスト한국어 🙂🙂👩‍👩‍👧 e\u0301 \u3000\u00a0 ½ ² 〇",
] * 3
WORDS = [word for text in CORPUS[:5] for word in text.split(" ")]


def plain_bpe(texts: list[str], merges: int) -> dict[bytes, int]:
    """Byte-pair encoding by its definition: join the most frequent pair, again and again; words cut by blanks."""
    words = [[bytes([byte]) for byte in f" {word}".encode()] for text in texts for word in text.split(" ")]
    ranks = {bytes([byte]): byte for byte in range(256)}
    while len(ranks) < 256 + merges:
        pairs = Counter(pair for word in words for pair in pairwise(word) if pair[0] + pair[1] not in ranks)
        (left, right), _ = max(pairs.items(), key=lambda item: (item[1], item[0]))
        ranks[left + right] = len(ranks)
        for word in words:
            at = 0
            while at < len(word) - 1:
                if (word[at], word[at + 1]) == (left, right):
                    word[at : at + 2] = [left + right]
                at += 1
    return ranks


RANKS = plain_bpe(CORPUS, 300)
# Tokens that no merges lead to, and a token spelt like a special one's beginning: published vocabularies hold such.
# And every two of these characters, so that the ids show where the pattern cuts between them.
ALPHABET = "aStréÉǅʰ中〇ーひ'.!( \u3000\n\r12½🙂\u0301ſ"
PAIRS = [left + right for left in ALPHABET for right in ALPHABET]
for token in [b"xyzxyz", "齉龘".encode(), b"        ", b"[EO"]:
    RANKS[token] = len(RANKS)
for word in [*ALPHABET, *PAIRS]:
    for length in (2, 3, 4, len(word.encode())):
        RANKS.setdefault(word.encode()[:length], len(RANKS))
FIRST = len(RANKS)
NAMED = {0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|im_user|>", 5: "<|im_middle|>", 254: "[UNK]", 255: "[PAD]"}
CONFIG = {
    "added_tokens_decoder": {
        str(FIRST + at): {"content": name, "special": at != 5, "normalized": False} for at, name in NAMED.items()
    },
    "auto_map": {"AutoTokenizer": ["tokenization_moonshot.TikTokenTokenizer", None]},
    "bos_token": "[BOS]",
    "eos_token": "[EOS]",
    "unk_token": "[UNK]",
    "pad_token": "[PAD]",
    "additional_special_tokens": ["<|im_end|>", "<|im_user|>"],
    "model_max_length": 8192,
    "tokenizer_class": "TikTokenTokenizer",
    "chat_template": "{% for m in messages %}<|im_user|>{{ m.role }}<|im_middle|>{{ m.content }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_user|>assistant<|im_middle|>{% endif %}",
}
SPECIAL = {NAMED.get(at, f"<|reserved_token_{FIRST + at}|>"): FIRST + at for at in range(256)}
THEIRS = tiktoken.Encoding(name="moonshot", pat_str=MOONSHOT, mergeable_ranks=RANKS, special_tokens=SPECIAL)


def lines(ranks: dict[bytes, int]) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())


def write(folder: Path, content: bytes = lines(RANKS), config: object = CONFIG) -> Path:
    (folder / "tiktoken.model").write_bytes(content)
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write(tmp_path_factory.mktemp("moonshot")))


texts = (
    st.text(st.characters(exclude_categories=["Cs"]))
    | st.text(ALPHABET, max_size=12)
    | st.text("aAsStTréÉǅʰ中文龘〇ー'’.,!?([ \u3000\n\r\t1²½🙂\u0301\u200dſ", max_size=60)
    | st.lists(st.sampled_from([*WORDS, " ", "  ", "\n", "'S", "'ll", "’s"]), max_size=12).map("".join)
    | st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join)
)


@settings(max_examples=500)
@given(text=texts)
def test_ids_are_tiktokens(ours: Tokenizer, text: str):
    ids = ours.encode(text)
    assert ids == THEIRS.encode_ordinary(text)
    assert ours.decode(ids) == text


@pytest.mark.parametrize("text", [*CORPUS[:5], "xyzxyz", " xyzxyzxyz", "齉龘", "齉龘齉", "a" + " " * 40 + "b", "[EOS]"])
def test_ids_of_known_texts_are_tiktokens(ours: Tokenizer, text: str):
    assert ours.encode(text) == THEIRS.encode_ordinary(text)


@settings(max_examples=200)
@given(
    joins=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=25),
    text=st.text("abc", max_size=30),
    order=st.randoms(use_true_random=False),
)
def test_the_pairs_give_tiktokens_joins_for_any_vocabulary(joins: list[tuple[int, int]], text: str, order: Random):
    """Vocabularies in which a token can be put together in many ways, in none, or only from tokens of higher rank."""
    tokens = {bytes([byte]): None for byte in range(256)}
    made = [b"a", b"b", b"c"]
    for left, right in joins:
        token = (made[left % len(made)] + made[right % len(made)])[:9]
        made.append(token)
        tokens[token] = None
    shuffled = [*tokens]
    order.shuffle(shuffled)
    ranks = {token: rank for rank, token in enumerate(shuffled)}
    theirs = tiktoken.Encoding(name="abc", pat_str=r"[abc]+", mergeable_ranks=ranks, special_tokens={})
    pairs = [pair for token in ranks if (pair := last_pair(token, ranks))]
    spelling = {token: token.decode() for token in ranks if set(token) <= set(b"abc")}
    model = tokenizers.models.BPE(
        vocab={spelling[token]: ranks[token] for token in spelling},
        merges=[(spelling[left], spelling[right]) for left, right in pairs],
        ignore_merges=True,
    )
    assert [token.id for token in model.tokenize(text)] == theirs.encode_ordinary(text)


def test_special_ids_are_moonshots(ours: Tokenizer):
    assert ours.vocab_size == THEIRS.n_vocab == FIRST + 256
    assert (ours.bos_id, ours.eos_id) == (SPECIAL["[BOS]"], SPECIAL["[EOS]"])
    for content, index in SPECIAL.items():
        assert ours.token_bytes(index) == THEIRS.decode_single_token_bytes(index) == content.encode()
        assert ours.is_special(index) == (content != "<|im_middle|>")
    assert not ours.adds_bos


def test_a_special_tokens_spelling_is_text_in_a_text_and_an_id_in_a_chat(ours: Tokenizer):
    text = "a[EOS]b<|im_end|>"
    assert ours.encode(text) == THEIRS.encode_ordinary(text)
    chat = [{"role": "user", "content": "你好 [EOS] the cat's"}, {"role": "assistant", "content": "12345\n"}]
    for prompt in (True, False):
        rendered = ours.render_chat(chat, add_generation_prompt=prompt)
        assert ours.encode_chat(chat, add_generation_prompt=prompt) == THEIRS.encode(rendered, allowed_special="all")
    assert ours.end_of_turn_ids == {SPECIAL["<|im_end|>"]}


def test_a_file_named_itself_is_read(tmp_path: Path, ours: Tokenizer):
    assert Tokenizer.load(write(tmp_path) / "tiktoken.model").fingerprint == ours.fingerprint


def test_the_order_of_the_lines_and_blank_ones_do_not_matter(tmp_path: Path, ours: Tokenizer):
    shuffled = lines(dict(sorted(RANKS.items(), key=lambda item: item[0][::-1])))
    assert Tokenizer.load(write(tmp_path, b"\n" + shuffled.replace(b"\n", b"\r\n"))).fingerprint == ours.fingerprint


def test_saved_it_is_a_tokenizer_json_for_transformers(tmp_path: Path, ours: Tokenizer):
    transformers = pytest.importorskip("transformers")
    ours.save(tmp_path)
    again, theirs = Tokenizer.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again.fingerprint == ours.fingerprint
    assert not again.adds_bos
    assert again.end_of_turn_ids == ours.end_of_turn_ids
    for text in [*CORPUS, "a[EOS]b<|im_end|>"]:
        assert again.encode(text) == ours.encode(text)
        assert theirs(text)["input_ids"] == THEIRS.encode(text, allowed_special="all")
        assert theirs(text, split_special_tokens=True)["input_ids"] == ours.encode(text)
    chat = [{"role": "user", "content": "你好"}]
    assert theirs.apply_chat_template(chat, return_dict=False, add_generation_prompt=True) == ours.encode_chat(chat)
    assert (theirs.bos_token, theirs.pad_token, theirs.model_max_length) == ("[BOS]", "[PAD]", 8192)
    assert len(theirs) == ours.vocab_size
    written = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "auto_map" not in written


def test_ids_that_the_models_have_no_row_for_are_read_only_where_named(tmp_path: Path):
    named = {str(FIRST + 257): {"content": "<|extra|>"}}
    tokenizer = Tokenizer.load(write(tmp_path, config={"added_tokens_decoder": named}))
    assert tokenizer.vocab_size == FIRST + 258
    assert tokenizer.token_bytes(FIRST + 256).decode() == f"<|reserved_token_{FIRST + 256}|>"
    assert tokenizer.bos_id is None
    assert Tokenizer.load(write(tmp_path, config={})).vocab_size == FIRST + 256


def test_moonshots_tokenizer_adds_bos_where_its_config_says_so(tmp_path: Path):
    for value, expected in ((True, True), (False, False), (None, False)):
        assert Tokenizer.load(write(tmp_path, config={**CONFIG, "add_bos_token": value})).adds_bos is expected


def test_ranks_in_order(tmp_path: Path):
    assert list(read_ranks(write(tmp_path) / "tiktoken.model").items()) == list(RANKS.items())


def without(token: bytes) -> dict[bytes, int]:
    return {one: rank for rank, one in enumerate(one for one in RANKS if one != token)}


def named(index: object, token: object) -> dict[str, object]:
    return {"added_tokens_decoder": {str(index): token}}


@pytest.mark.parametrize(
    ("content", "config", "words"),
    [
        (b"YQ== 0\nYg==\n", {}, ["tiktoken.model", "line 2", "'Yg=='", "base64 and its rank"]),
        (b"YQ== 0\n*** 1\n", {}, ["line 2", "***"]),
        (b"YQ== zero\n", {}, ["line 1", "zero"]),
        (b"YQ== 0\nYg== 0\n", {}, ["line 2", "rank 0", "second time"]),
        (b"YQ== 0\nYg== 2\n", {}, ["no token has rank 1"]),
        (b"YQ== 0\nYQ== 1\n", {}, ["b'a'", "ranks 0 and 1"]),
        (lines(without(b"\xfe")), {}, ["0xFE", "256 bytes"]),
        (b"", {}, ["256 bytes"]),
        (lines(RANKS), named(5, {"content": "x"}), ["tokenizer_config.json", "id 5", str(FIRST), str(FIRST + 257)]),
        (lines(RANKS), named(FIRST + 258, {"content": "x"}), [f"id {FIRST + 258}", str(FIRST + 257)]),
        (lines(RANKS), named(FIRST, {"content": "[EO"}), ["'[EO'", "already a token"]),
        (lines(RANKS), named(FIRST, {"content": f"<|reserved_token_{FIRST + 1}|>"}), ["already a token"]),
        (lines(RANKS), named("x", {"content": "x"}), ["added_tokens_decoder", "expected an object"]),
        (lines(RANKS), named(FIRST, {}), ["added_tokens_decoder", "expected an object"]),
        (lines(RANKS), named(FIRST, "x"), ["added_tokens_decoder", "expected an object"]),
        (lines(RANKS), {"added_tokens_decoder": []}, ["added_tokens_decoder", "expected an object"]),
        (lines(RANKS), {"bos_token": "<none>"}, ["tiktoken.model", "<none>"]),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(tmp_path: Path, content: bytes, config: object, words: list[str]):
    with pytest.raises(UserError) as error:
        Tokenizer.load(write(tmp_path, content, config))
    assert "\n" not in str(error.value)
    for word in [str(tmp_path), *words]:
        assert word in str(error.value)


@pytest.mark.parametrize("make", [lambda folder: folder, lambda folder: folder / "tiktoken.model"])
def test_a_missing_file_is_named(tmp_path: Path, make: Callable[[Path], Path]):
    with pytest.raises(UserError, match="no such file"):
        Tokenizer.load(make(tmp_path))
