import json
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.data.corpus import corpus_fingerprint, documents
from abyssal.data.shards import TokenShards, open_shards, prepare, read_manifest, train_split
from abyssal.data.tokenizer import Tokenizer, byte_tokenizer, train_bpe
from abyssal.errors import UserError

TOKENIZER = byte_tokenizer()
texts = st.lists(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).map("x".__add__), min_size=1
)


def write(file: Path, documents: list[str]) -> Path:
    file.write_text("\n".join(json.dumps({"text": text}) for text in documents), encoding="utf-8")
    return file


def stream(tokenizer: Tokenizer, documents: list[str]) -> tuple[list[int], list[int]]:
    """All tokens and the number of each one's document, the plain way."""
    tokens, numbers = [], []
    for number, text in enumerate(documents):
        ids = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
        tokens += ids
        numbers += [number] * len(ids)
    return tokens, numbers


def split_plainly(documents: list[str], cut: int) -> tuple[list[str], list[str]]:
    train, validation, position = [], [], 0
    for text in documents:
        before = "".join(c for i, c in enumerate(text) if position + i < cut)
        after = "".join(c for i, c in enumerate(text) if position + i >= cut)
        train += [before] if before else []
        validation += [after] if after else []
        position += len(text)
    return train, validation


@settings(max_examples=50, deadline=None)
@given(texts=texts, shard_tokens=st.integers(1, 50), fraction=st.floats(0, 0.6), data=st.data())
def test_reading_equals_plain_concatenation(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], shard_tokens: int, fraction: float, data: st.DataObject
):
    folder = tmp_path_factory.mktemp("shards")
    source = write(folder / "a.jsonl", texts)
    total = sum(map(len, texts))
    if int(total * (1 - fraction)) == 0:
        return
    expected = dict(zip(("train", "validation"), split_plainly(texts, int(total * (1 - fraction))), strict=True))
    prepared = prepare(source, TOKENIZER, folder / "out", validation_fraction=fraction, shard_tokens=shard_tokens)
    assert list(train_split(source, fraction)) == expected["train"]
    for split, documents_ in expected.items():
        if not documents_:
            assert prepared.manifest.splits[split].tokens == 0
            continue
        shards = open_shards(folder / "out", split)
        tokens, numbers = stream(TOKENIZER, documents_)
        assert len(shards) == len(tokens)
        assert shards.bytes == len("".join(documents_).encode())
        start = data.draw(st.integers(0, len(tokens)))
        count = data.draw(st.integers(0, len(tokens) - start))
        for got, plain in [(shards.read, tokens), (shards.documents, numbers)]:
            assert got(start, count).dtype == np.int64
            assert got(start, count).tolist() == plain[start : start + count]
            assert got(0, len(tokens)).tolist() == plain
        assert all(0 < shard.tokens <= shard_tokens for shard in prepared.manifest.splits[split].shards)
    shutil.rmtree(folder)


@settings(deadline=None)
@given(
    parts=st.lists(st.lists(st.integers(0, 2**16 - 1), max_size=9), min_size=1, max_size=5),
    dtype=st.sampled_from(["<u2", "<u4"]),
    data=st.data(),
)
def test_shards_of_any_size_and_type(parts: list[list[int]], dtype: str, data: st.DataObject):
    plain = [i for part in parts for i in part]
    shards = TokenShards([np.array(part, dtype=dtype) for part in parts], np.array([0], dtype=np.int64), 0)
    start = data.draw(st.integers(0, len(plain)))
    count = data.draw(st.integers(0, len(plain) - start))
    assert shards.read(start, count).tolist() == plain[start : start + count]


def test_reading_outside_the_split_is_an_error():
    shards = TokenShards([np.arange(10, dtype="<u2")], np.array([0], dtype=np.int64), 0)
    for start, count in [(-1, 2), (5, 6), (11, 0), (0, -1)]:
        for read in (shards.read, shards.documents):
            with pytest.raises(IndexError, match="split of 10"):
                read(start, count)


def test_tiny_shakespeare_splits_as_it_usually_does(tmp_path: Path):
    (text,) = documents("tinyshakespeare")
    tokenizer = train_bpe(train_split("tinyshakespeare", 0.1), 300)
    steps: list[tuple[int, int]] = []
    prepared = prepare("tinyshakespeare", tokenizer, tmp_path / "out", progress=lambda *step: steps.append(step))
    n = int(len(text) * 0.9)
    assert (prepared.train.bytes, prepared.validation.bytes) == (n, len(text) - n) == (1_003_854, 111_540)
    assert list(train_split("tinyshakespeare", 0.1)) == [text[:n]]
    for split, part in [("train", text[:n]), ("validation", text[n:])]:
        shards = open_shards(tmp_path / "out", split, tokenizer_fingerprint=tokenizer.fingerprint)
        assert shards.read(0, len(shards)).tolist() == [0, *tokenizer.encode(part), 1]  # encoded in one go
    assert steps[-1] == (len(text), len(text))
    assert steps == sorted(steps)


def test_manifest_says_what_was_prepared(tmp_path: Path):
    source = write(tmp_path / "a.jsonl", ["one", "two é"])
    prepared = prepare(source, TOKENIZER, tmp_path / "out", validation_fraction=0.5)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest == {
        "format": 1,
        "tokenizer": TOKENIZER.fingerprint,
        "vocab_size": 258,
        "corpus": corpus_fingerprint(source),
        "validation_corpus": None,
        "validation_fraction": 0.5,
        "splits": {
            "train": {
                "dtype": "uint16",
                "shards": [{"file": "train-00000.bin", "tokens": 8}],
                "tokens": 8,
                "documents": 2,
                "bytes": 4,
            },
            "validation": {
                "dtype": "uint16",
                "shards": [{"file": "validation-00000.bin", "tokens": 7}],
                "tokens": 7,
                "documents": 1,
                "bytes": 5,
            },
        },
    }
    assert read_manifest(tmp_path / "out") == prepared.manifest
    ids = np.fromfile(tmp_path / "out" / "train-00000.bin", dtype="<u2")
    assert ids.tolist() == [0, *(2 + byte for byte in b"one"), 1, 0, 2 + ord("t"), 1]
    assert np.fromfile(tmp_path / "out" / "train.documents.bin", dtype="<i8").tolist() == [0, 5]


def test_a_validation_source_leaves_the_training_text_whole(tmp_path: Path):
    source, held_out = write(tmp_path / "a.jsonl", ["one", "two"]), write(tmp_path / "b.jsonl", ["three"])
    prepared = prepare(source, TOKENIZER, tmp_path / "out", validation_source=held_out)
    assert (prepared.train.bytes, prepared.validation.bytes) == (6, 5)
    assert prepared.manifest.validation_corpus == corpus_fingerprint(held_out)
    assert prepared.manifest.validation_fraction is None
    shards = open_shards(tmp_path / "out", "validation")
    assert TOKENIZER.decode(shards.read(0, len(shards))) == "three"


def test_a_tokenizer_without_bos_and_eos_and_with_many_tokens(tmp_path: Path):
    backend = byte_tokenizer().backend
    backend.add_tokens([f"<{n}>" for n in range(2**16 - 258 + 1)])
    tokenizer = Tokenizer(backend)
    assert tokenizer.vocab_size == 2**16 + 1
    text = f"a<{2**16 - 258}>b"
    source = write(tmp_path / "a.jsonl", [text, "c"])
    prepared = prepare(source, tokenizer, tmp_path / "out", validation_fraction=0)
    assert prepared.train.dtype == "uint32"
    shards = open_shards(tmp_path / "out", "train")
    assert shards.read(0, len(shards)).tolist() == [2 + ord("a"), 2**16, 2 + ord("b"), 2 + ord("c")]
    assert shards.documents(0, len(shards)).tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"validation_fraction": 1.0}, ["validation_fraction is 1.0", "less than 1"]),
        ({"validation_fraction": -0.1}, ["validation_fraction is -0.1"]),
        ({"validation_fraction": float("nan")}, ["validation_fraction is nan"]),
        ({"validation_fraction": 0.9}, ["validation_fraction is 0.9", "none of 3 characters"]),
        ({"shard_tokens": 0}, ["shard_tokens is 0"]),
    ],
)
def test_bad_arguments_are_refused(tmp_path: Path, options: dict[str, float], words: list[str]):
    source = write(tmp_path / "a.jsonl", ["one"])
    with pytest.raises(UserError) as error:
        prepare(source, TOKENIZER, tmp_path / "out", **options)  # type: ignore[arg-type]
    for word in words:
        assert word in str(error.value)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.jsonl"]


def test_a_folder_in_use_is_left_alone_and_an_empty_one_taken(tmp_path: Path):
    source = write(tmp_path / "a.jsonl", ["one"])
    (tmp_path / "empty").mkdir()
    prepare(source, TOKENIZER, tmp_path / "empty", validation_fraction=0)
    for taken in (tmp_path / "empty", source):
        with pytest.raises(UserError, match=f"{taken}: already exists"):
            prepare(source, TOKENIZER, taken)
    assert len(open_shards(tmp_path / "empty", "train")) == 5


def test_a_failed_run_leaves_nothing_behind(tmp_path: Path):
    source = tmp_path / "a.jsonl"

    def damage(done: int, total: int) -> None:
        raise KeyboardInterrupt

    write(source, ["one"])
    with pytest.raises(KeyboardInterrupt):
        prepare(source, TOKENIZER, tmp_path / "out", validation_fraction=0, progress=damage)
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_write_that_fails_raises_oserror_and_leaves_nothing_behind(tmp_path: Path):
    source = write(tmp_path / "a.jsonl", ["some text " * 10_000] * 5)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))  # the system's own refusal, as on a full disk
    try:
        with pytest.raises(OSError, match="File too large"):
            prepare(source, TOKENIZER, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    prepare(write(tmp_path / "a.jsonl", ["one", "two"]), TOKENIZER, tmp_path / "out", validation_fraction=0)
    return tmp_path / "out"


def edit(folder: Path, **changes: object) -> None:
    file = folder / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: shutil.rmtree(f), ["manifest.json", "no such file"]),
        (lambda f: (f / "manifest.json").write_text("{"), ["manifest.json", "not a manifest"]),
        (lambda f: (f / "manifest.json").write_text("[]"), ["manifest.json", "format is None"]),
        (lambda f: edit(f, format=2), ["manifest.json", "format is 2", "reads 1"]),
        (lambda f: edit(f, vocab_size="many"), ["manifest.json", "vocab_size"]),
        (lambda f: edit(f, splits={}), ["manifest.json", "no split 'train'"]),
        (lambda f: (f / "train-00000.bin").unlink(), ["train-00000.bin", "missing"]),
        (lambda f: (f / "train-00000.bin").write_bytes(b"123"), ["train-00000.bin", "3 bytes", "20"]),
        (lambda f: (f / "train.documents.bin").write_bytes(b""), ["train.documents.bin", "0 bytes", "16"]),
    ],
)
def test_a_damaged_folder_is_refused_by_file(prepared: Path, damage, words: list[str]):
    damage(prepared)
    with pytest.raises(UserError) as error:
        open_shards(prepared, "train")
    assert "\n" not in str(error.value)
    for word in [str(prepared), *words]:
        assert word in str(error.value)


def test_another_tokenizer_and_an_empty_split_are_refused(prepared: Path):
    with pytest.raises(UserError, match=r"manifest\.json: prepared with tokenizer .* 000000000000…"):
        open_shards(prepared, "train", tokenizer_fingerprint="0" * 64)
    with pytest.raises(UserError, match=r"'validation' holds no tokens"):
        open_shards(prepared, "validation")


def test_the_maps_are_read_only_and_what_is_read_is_a_copy(prepared: Path):
    shards = open_shards(prepared, "train")
    shards.read(0, 3)[:] = 0
    shards.documents(0, 3)[:] = 7
    assert TOKENIZER.decode(shards.read(0, 5)) == "one"
