"""What is written is read back by the safetensors library; what a disk spoils is noticed."""

import hashlib
import json
import struct
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from abyssal.checkpoint.shards import DTYPES, INDEX, Shards
from abyssal.checkpoint.writer import (
    Entry,
    check_shard,
    file_names,
    index_json,
    parse_size,
    split,
    write_index,
    write_shard,
)
from abyssal.errors import UserError

ORDER = sorted(DTYPES.values(), key=str)


def tensor_of(dtype: torch.dtype, shape: Sequence[int], seed: int) -> Tensor:
    """Random bytes as ``dtype``, NaN and all."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator).view(dtype).view(list(shape))


def entry_of(name: str, tensor: Tensor) -> Entry:
    return Entry(name, tensor.dtype, tuple(tensor.shape))


def write(path: Path, tensors: dict[str, Tensor]) -> tuple[list[Entry], dict[str, str]]:
    entries = [entry_of(name, tensor) for name, tensor in tensors.items()]
    return entries, write_shard(path, entries, iter(tensors.items()))


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda n: n != "__metadata__")
shapes = st.lists(st.integers(0, 5), max_size=3)
described = st.lists(
    st.tuples(names, st.sampled_from(ORDER), shapes), max_size=8, unique_by=lambda entry: entry[0]
).map(lambda entries: {name: tensor_of(dtype, shape, i) for i, (name, dtype, shape) in enumerate(entries)})


@settings(max_examples=60)
@given(tensors=described, data=st.data())
@example(tensors={f"{dtype}": tensor_of(dtype, [3, 5], 1) for dtype in ORDER}, data=None)
@example(tensors={f"{dtype}": tensor_of(dtype, [0, 5], 1) for dtype in ORDER}, data=None)
@example(
    tensors={"scalar": tensor_of(torch.float32, [], 1), "one byte": tensor_of(torch.float8_e4m3fn, [1], 1)}, data=None
)
def test_read_by_safetensors(tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Tensor], data):
    path = tmp_path_factory.mktemp("x") / "model.safetensors"
    entries = [entry_of(name, tensor) for name, tensor in tensors.items()]
    order = list(tensors) if data is None else data.draw(st.permutations(list(tensors)))
    digests = write_shard(path, entries, ((name, tensors[name]) for name in order))

    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(tensors)
        assert file.metadata() == {"format": "pt"}
        for name, tensor in tensors.items():
            got = file.get_tensor(name)
            assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape)
            assert raw(got) == raw(tensor)
    assert digests == {name: hashlib.sha256(raw(tensor)).hexdigest() for name, tensor in tensors.items()}

    # By the format itself: length of the header, header, tensors without gaps, each aligned to its item size.
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    start = 8 + length
    assert start % 8 == 0
    spans = sorted(tuple(header[name]["data_offsets"]) for name in tensors)
    assert [a for a, _ in spans] == [0, *(b for _, b in spans)][: len(spans)]
    assert len(content) == start + max((b for _, b in spans), default=0)
    for name, tensor in tensors.items():
        begin, end = header[name]["data_offsets"]
        assert (start + begin) % tensor.dtype.itemsize == 0
        assert content[start + begin : start + end] == raw(tensor)

    assert list(check_shard(path, entries, digests)) == [entry.nbytes for entry in entries]
    assert [entry.nbytes for entry in entries] == [len(raw(tensors[entry.name])) for entry in entries]


def test_views_are_written_as_they_look(tmp_path: Path):
    base = tensor_of(torch.float32, [6, 8], 0).nan_to_num()
    tensors = {"turned": base.t(), "every second": base[:, ::2], "expanded": base[:1].expand(3, -1)}
    tensors["parameter"] = torch.nn.Parameter(base)
    write(tmp_path / "x.safetensors", tensors)
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(name), tensor.detach())


def test_an_old_longer_file_is_replaced(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"x" * 10_000)
    entries, digests = write(path, {"a": torch.ones(3)})
    assert path.stat().st_size < 1000
    assert list(check_shard(path, entries, digests)) == [12]


def test_wrong_tensors_are_bugs(tmp_path: Path):
    entries = [Entry("a", torch.float32, (2,)), Entry("b", torch.float32, (2,))]
    for tensors in ({"a": torch.ones(2)}, {"a": torch.ones(2), "b": torch.ones(3)}, {"a": torch.ones(2).half()}):
        with pytest.raises(AssertionError):
            write_shard(tmp_path / "x.safetensors", entries, iter(tensors.items()))


class TestCheck:
    @pytest.fixture(scope="class")
    @staticmethod
    def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Entry], dict[str, str]]:
        path = tmp_path_factory.mktemp("x") / "model.safetensors"
        shapes = {torch.float8_e4m3fn: [7, 3], torch.float32: [2], torch.bfloat16: [5], torch.float8_e8m0fnu: [3]}
        return path, *write(path, {str(dtype): tensor_of(dtype, shape, 3) for dtype, shape in shapes.items()})

    def test_every_flipped_bit_is_noticed(self, written):
        path, entries, digests = written
        good = path.read_bytes()
        try:
            for at in range(len(good)):
                path.write_bytes(good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1 :])
                with pytest.raises(UserError, match="read back") as error:
                    list(check_shard(path, entries, digests))
                assert str(path) in str(error.value)
                assert "\n" not in str(error.value)
        finally:
            path.write_bytes(good)
        assert sum(check_shard(path, entries, digests)) == sum(entry.nbytes for entry in entries)

    def test_the_tensor_is_named(self, written):
        path, entries, digests = written
        good = path.read_bytes()
        (last,) = (entry for entry in entries if entry.dtype == torch.float8_e8m0fnu)
        try:
            path.write_bytes(good[:-1] + bytes([good[-1] ^ 128]))
            with pytest.raises(UserError, match=f"{last.name} read back is not what was written"):
                list(check_shard(path, entries, digests))
        finally:
            path.write_bytes(good)

    def test_every_other_length_is_noticed(self, written):
        path, entries, digests = written
        good = path.read_bytes()
        try:
            for content in (*(good[:at] for at in range(len(good))), good + b"\0"):
                path.write_bytes(content)
                with pytest.raises(UserError, match=f"{len(content)} bytes, {len(good)} were written"):
                    list(check_shard(path, entries, digests))
        finally:
            path.write_bytes(good)

    def test_a_tensor_without_digest(self, written):
        path, entries, digests = written
        with pytest.raises(UserError, match="is not what was written"):
            list(check_shard(path, entries, dict(list(digests.items())[1:])))


# A group: names' number, bytes of each.
groups = st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=3), max_size=20)


@settings(max_examples=200)
@given(sizes=groups, limit=st.integers(1, 120))
def test_split(sizes: list[list[int]], limit: int):
    entries = [
        [Entry(f"{i}.{j}", torch.float8_e4m3fn, (size,)) for j, size in enumerate(group)]
        for i, group in enumerate(sizes)
    ]
    shards = split(entries, limit)
    assert [entry for shard in shards for entry in shard] == [entry for group in entries for entry in group]
    where = {entry.name: number for number, shard in enumerate(shards) for entry in shard}
    for group in entries:
        assert len({where[entry.name] for entry in group}) == 1
    for shard in shards:
        size = sum(entry.nbytes for entry in shard)
        assert size <= limit or len({entry.name.split(".")[0] for entry in shard if entry.nbytes}) == 1
    for shard, following in pairwise(shards):  # none is begun before the last is full
        first = [entry for entry in following if entry.name.split(".")[0] == following[0].name.split(".")[0]]
        assert sum(entry.nbytes for entry in (*shard, *first)) > limit
    assert all(shards) or not sizes


def test_file_names():
    assert file_names(1) == ["model.safetensors"]
    assert file_names(163)[0] == "model-00001-of-00163.safetensors"
    assert file_names(163)[-1] == "model-00163-of-00163.safetensors"  # as V3's are called
    assert len(set(file_names(163))) == 163


class TestIndex:
    def test_is_read_back(self, tmp_path: Path):
        tensors = {"b": torch.ones(2, 3), "a": torch.ones(4).half(), "c": torch.ones(1, dtype=torch.float64)}
        files = {"model-00001-of-00002.safetensors": ["b", "a"], "model-00002-of-00002.safetensors": ["c"]}
        entries = {
            file: write(tmp_path / file, {name: tensors[name] for name in held})[0] for file, held in files.items()
        }
        write_index(tmp_path, entries)
        data = json.loads((tmp_path / INDEX).read_text())
        assert data["metadata"] == {"total_size": 24 + 8 + 8}
        assert data["weight_map"] == {name: file for file, held in files.items() for name in held}
        shards = Shards(tmp_path)
        assert all(torch.equal(shards.read(name), tensor) for name, tensor in tensors.items())

    def test_one_file_needs_none(self, tmp_path: Path):
        entries = {"model.safetensors": [Entry("a", torch.float32, (1,))]}
        assert index_json(entries) is None
        write_index(tmp_path, entries)
        assert not (tmp_path / INDEX).exists()
        assert index_json({"other.safetensors": entries["model.safetensors"]}) is not None


class TestParseSize:
    @pytest.mark.parametrize(
        ("text", "size"),
        [
            ("5GB", 5 * 10**9),
            ("500MB", 5 * 10**8),
            ("5gb", 5 * 10**9),
            ("5G", 5 * 10**9),
            (" 5 GB ", 5 * 10**9),
            ("1", 1),
            ("7B", 7),
            ("1KB", 1000),
            ("1KiB", 1024),
            ("1k", 1000),
            ("2MiB", 2 * 1024**2),
            ("3GiB", 3 * 1024**3),
            ("1TiB", 1024**4),
            ("1TB", 10**12),
            ("1.5GB", 1_500_000_000),
            ("0.5KiB", 512),
            ("1.001KB", 1001),  # as floats: 1000.9999999999999
            ("4.35KB", 4350),
            ("9007199254740993", 2**53 + 1),
        ],
    )
    def test_sizes(self, text: str, size: int):
        assert parse_size(text, "--shard-size") == size

    @given(st.integers(1, 10**9), st.integers(0, 3), st.sampled_from(["KB", "MB", "GB", "TB"]))
    def test_decimals_are_exact(self, thousandths: int, zeros: int, unit: str):
        power = 3 * (1 + ["KB", "MB", "GB", "TB"].index(unit))
        text = f"{thousandths // 1000}.{thousandths % 1000:03d}{'0' * zeros}{unit}"
        assert parse_size(text, "--shard-size") == thousandths * 10 ** (power - 3)

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "GB",
            "0",
            "0GB",
            "0.1B",
            "-5GB",
            "5 G B",
            "5XB",
            "5GBs",
            "1e9",
            "5,5GB",
            ".5GB",
            "5.",
            "5iB",
            "inf",
            "nan",
            "5\N{KELVIN SIGN}B",
            "5K\N{LATIN SMALL LETTER DOTLESS I}B",
            "\N{ARABIC-INDIC DIGIT FIVE}GB",
            "9" * 400,
        ],
    )
    def test_what_is_none(self, text: str):
        with pytest.raises(UserError, match=r"^--shard-size: .* is not a size; expected for instance 5GB") as error:
            parse_size(text, "--shard-size")
        assert "\n" not in str(error.value)
