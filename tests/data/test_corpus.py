import gzip
import json
import lzma
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.data.corpus import SUFFIXES, corpus_fingerprint, documents
from abyssal.errors import UserError


def write(file: Path, data: bytes | str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    data = data.encode() if isinstance(data, str) else data
    pack = {".gz": gzip.compress, ".xz": lzma.compress}.get(file.suffix, bytes)
    file.write_bytes(pack(data))
    return file


def write_parquet(file: Path, columns: dict[str, object], **options: object) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns), file, **options)
    return file


def test_tiny_shakespeare_is_the_usual_text():
    (text,) = documents("tinyshakespeare")
    assert len(text) == 1_115_394
    assert text.startswith("First Citizen:\nBefore we proceed any further")
    assert len(set(text)) == 65  # char-rnn's vocabulary
    assert text[int(len(text) * 0.9) :].startswith("?\n\nGREMIO:\nGood morrow, neighbour Baptista.")


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".txt.xz", ".TXT"])
def test_text_files_are_divided_at_the_separator_and_else_untouched(tmp_path: Path, suffix: str):
    text = "  one\r\n\n<|endoftext|>\n\ntwo <|endoftext|> still two\n<|endoftext|>\r\n \n<|endoftext|>\nthree"
    file = write(tmp_path / f"a{suffix}", "\ufeff" + text)
    assert list(documents(file)) == ["  one\r\n\n", "\ntwo <|endoftext|> still two\n", "three"]
    assert list(documents(str(file))) == list(documents(file))


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.xz"])
def test_jsonl(tmp_path: Path, suffix: str):
    lines = [
        '\ufeff{"text": "one\\n", "body": "1"}',
        "",
        '{"body": "2", "text": " two 世"}',
        '{"text": "", "body": "3"}',
    ]
    file = write(tmp_path / f"a{suffix}", "\n".join(lines))
    assert list(documents(file)) == ["one\n", " two 世"]
    assert list(documents(file, field="body")) == ["1", "2", "3"]


def test_parquet(tmp_path: Path):
    texts = [f"document {n} 世\n" for n in range(600)]
    file = write_parquet(tmp_path / "a.parquet", {"text": texts, "n": list(range(600))}, row_group_size=100)
    assert list(documents(file)) == texts


def test_a_folder_is_read_in_the_order_of_relative_names(tmp_path: Path):
    write(tmp_path / "b.txt", "b")
    write(tmp_path / "a" / "z.jsonl.gz", '{"text": "az"}')
    write(tmp_path / "c.txt.xz", "c")
    write(tmp_path / ".hidden.txt", "no")
    write(tmp_path / ".git" / "x.txt", "no")
    write(tmp_path / "README.md", "no")
    assert list(documents(tmp_path)) == ["az", "b", "c"]
    assert list(documents(tmp_path)) == ["az", "b", "c"]


def test_a_hidden_folder_named_by_the_caller_is_read(tmp_path: Path):
    write(tmp_path / ".cache" / "x.txt", "yes")
    assert list(documents(tmp_path / ".cache")) == ["yes"]


@settings(deadline=None, max_examples=50)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n"), min_size=1), min_size=1)
)
def test_every_format_gives_back_the_texts(tmp_path_factory: pytest.TempPathFactory, texts: list[str]):
    folder = tmp_path_factory.mktemp("formats")
    texts = ["x" + text + "\n" for text in texts]
    write(folder / "a.txt", "<|endoftext|>\n".join(texts))
    write(folder / "a.jsonl", "\n".join(json.dumps({"text": text}) for text in texts))
    assert list(documents(folder / "a.txt")) == texts
    assert list(documents(folder / "a.jsonl")) == texts


def test_memory_holds_one_document(tmp_path: Path):
    document = "a line of some length, and then its end\n" * 500  # 20 kB
    file = write(tmp_path / "a.txt.gz", "<|endoftext|>\n".join([document] * 100))
    tracemalloc.start()
    assert sum(1 for _ in documents(file)) == 100
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 500_000  # of 2 MB


def test_fingerprint_follows_names_and_contents(tmp_path: Path):
    prints = set()
    for name, text in [("a.txt", "x"), ("a.txt", "y"), ("b.txt", "y")]:
        folder = tmp_path / f"{name}{text}"
        write(folder / "sub" / name, text)
        prints.add(corpus_fingerprint(folder))
        assert corpus_fingerprint(folder) == corpus_fingerprint(folder)
    assert len(prints) == 3
    # Wherever the folder lies, it is the same corpus.
    write(tmp_path / "moved" / "sub" / "a.txt", "x")
    assert corpus_fingerprint(tmp_path / "moved") in prints


def check_message(error: UserError, *words: str) -> None:
    assert "\n" not in str(error)
    for word in words:
        assert word in str(error)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("tinyshakespear", ["did you mean 'tinyshakespeare'?"]),
        ("no/such/file.txt", ["no/such/file.txt", "no such file or folder", "tinyshakespeare"]),
    ],
)
def test_a_missing_source_is_refused_at_once(source: str, words: list[str]):
    for function in (documents, corpus_fingerprint):
        with pytest.raises(UserError) as error:
            function(source)
        check_message(error.value, *words)


def test_unsupported_files_and_folders_without_text_are_refused(tmp_path: Path):
    file = write(tmp_path / "a.csv", "x")
    for source in (file, tmp_path):
        with pytest.raises(UserError) as error:
            documents(source)
        check_message(error.value, str(source), *SUFFIXES)


@pytest.mark.parametrize("text", ["", " \n\n", "<|endoftext|>\n<|endoftext|>\n"])
def test_an_empty_corpus_is_refused(tmp_path: Path, text: str):
    file = write(tmp_path / "a.txt", text)
    with pytest.raises(UserError) as error:
        list(documents(file))
    check_message(error.value, str(file), "empty")


BAD_LINES = [
    ('{"text": "b"', ["line 3", "not JSON"]),
    ("[" * 100_000, ["line 3", "not JSON"]),
    ('["b"]', ["line 3", "list", "'text'"]),
    ('{"Text": "b", "id": 1}', ["line 3", "no field 'text'", "did you mean 'Text'?", "id"]),
    ("{}", ["line 3", "no field 'text'"]),
    ('{"text": null}', ["line 3", "'text' is null"]),
    ('{"text": "ab\\ud800"}', ["line 3", "U+D800 at character 2"]),
]


@pytest.mark.parametrize(("line", "words"), BAD_LINES, ids=lambda value: str(value)[:20])
def test_a_bad_record_is_named_by_file_and_line(tmp_path: Path, line: str, words: list[str]):
    file = write(tmp_path / "a.jsonl", '{"text": "a"}\n\n' + line)
    with pytest.raises(UserError) as error:
        list(documents(file))
    check_message(error.value, str(file), *words)


@pytest.mark.parametrize(
    ("name", "data", "offset"),
    [
        ("a.txt", b"good\n<|endoftext|>\nab\xffc", 21),
        ("a.txt", b"\xef\xbb\xbfa\n\n\xc3(", 6),
        ("a.txt.gz", b"cut short \xe4\xb8", 10),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}', 24),
    ],
)
def test_what_is_not_utf8_is_named_by_file_and_byte(tmp_path: Path, name: str, data: bytes, offset: int):
    file = write(tmp_path / name, data)
    with pytest.raises(UserError) as error:
        list(documents(file))
    check_message(error.value, str(file), f"byte {offset} ")


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
@pytest.mark.parametrize("damage", ["cut", "changed", "other"])
def test_a_damaged_archive_is_named(tmp_path: Path, suffix: str, damage: str):
    file = write(tmp_path / f"a.txt{suffix}", "some text that is long enough " * 1000)
    data = bytearray(file.read_bytes())
    middle = len(data) // 2
    data[middle] ^= 0xFF
    file.write_bytes({"cut": bytes(data[:middle]), "changed": bytes(data), "other": b"plain text"}[damage])
    with pytest.raises(UserError) as error:
        list(documents(file))
    check_message(error.value, str(file), "damaged")


def test_bad_parquet_is_named(tmp_path: Path):
    file = write_parquet(tmp_path / "a.parquet", {"Text": ["a"], "n": [1]})
    for field, words in [("text", ["no column 'text'", "did you mean 'Text'?"]), ("n", ["row 1", "'n' is an int"])]:
        with pytest.raises(UserError) as error:
            list(documents(file, field=field))
        check_message(error.value, str(file), *words)
    file = write_parquet(tmp_path / "null.parquet", {"text": ["a", None]})
    with pytest.raises(UserError, match="row 2: field 'text' is null"):
        list(documents(file))
    file = write(tmp_path / "b.parquet", b"not parquet at all")
    with pytest.raises(UserError) as error:
        list(documents(file))
    check_message(error.value, str(file), "no Parquet file")


def test_parquet_text_that_is_not_utf8_is_named(tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow")
    raw = pyarrow.array([b"ok", b"\xff"], type=pyarrow.binary())
    strings = pyarrow.Array.from_buffers(pyarrow.string(), 2, raw.buffers())
    file = write_parquet(tmp_path / "a.parquet", {"text": strings})
    with pytest.raises(UserError) as error:
        list(documents(file))
    check_message(error.value, str(file), "row 2", "not UTF-8")


def test_missing_pyarrow_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = write(tmp_path / "a.parquet", b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError) as error:
        list(documents(file))
    check_message(error.value, str(file), "pip install 'abyssal[train]'")


def test_an_unreadable_file_is_named(tmp_path: Path):
    file = tmp_path / "a.txt"
    file.mkdir()
    write(file / "b.txt", "x")
    assert list(documents(file)) == ["x"]  # a folder, whatever it is called
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    with pytest.raises(UserError) as error:
        list(documents(tmp_path / "loop.txt"))
    check_message(error.value, "loop.txt")
