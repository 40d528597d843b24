"""Converting: interrupted and gone on with, verified, in little space, never over what is there."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import MODEL, scrambled

import abyssal
from abyssal.checkpoint import convert as module
from abyssal.checkpoint import export as export_module
from abyssal.checkpoint import load_model
from abyssal.checkpoint.convert import JOURNAL, convert
from abyssal.config import resolve_model
from abyssal.errors import UserError
from abyssal.model import Transformer

FP8 = torch.float8_e4m3fn


@pytest.fixture
def source(tmp_path):
    model = scrambled(Transformer(resolve_model(MODEL), generator=torch.Generator().manual_seed(0)))
    abyssal.export(model, tmp_path / "src", shard_size=30_000)
    return tmp_path / "src"


def tensors_in(folder):
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def same(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and a[k].equal(b[k]) for k in a)


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


class Interrupted(Exception):
    pass


def stop_after(count):
    """A progress callback that raises after so many tensors."""
    left = [count]

    def progress(done, total):
        left[0] -= 1
        if left[0] < 0:
            raise Interrupted

    return progress


class TestInterrupted:
    @pytest.mark.parametrize("to", [torch.bfloat16, FP8])
    @pytest.mark.parametrize("tensors", [0, 3, 20, 50])
    def test_goes_on_behind_the_last_whole_shard(self, source, tmp_path, tensors, to):
        convert(source, tmp_path / "whole", to)
        with pytest.raises(Interrupted):
            convert(source, tmp_path / "out", to, progress=stop_after(tensors))
        assert not (tmp_path / "out").exists()
        partial = tmp_path / "out.partial"
        done = set(json.loads((partial / JOURNAL).read_text())["done"]) if (partial / JOURNAL).exists() else set()
        kept = {file: (partial / file).stat().st_mtime_ns for file in done}
        assert tensors < 20 or done
        convert(source, tmp_path / "out", to)
        assert {file: (tmp_path / "out" / file).stat().st_mtime_ns for file in done} == kept
        assert same(tensors_in(tmp_path / "out"), tensors_in(tmp_path / "whole"))
        assert listing(tmp_path / "out") == listing(tmp_path / "whole")
        assert not partial.exists()

    def test_another_source_or_dtype_begins_anew(self, source, tmp_path):
        with pytest.raises(Interrupted):
            convert(source, tmp_path / "out", FP8, progress=stop_after(50))
        assert json.loads((tmp_path / "out.partial" / JOURNAL).read_text())["done"]
        convert(source, tmp_path / "out", torch.bfloat16)
        convert(source, tmp_path / "whole", torch.bfloat16)
        assert same(tensors_in(tmp_path / "out"), tensors_in(tmp_path / "whole"))
        assert listing(tmp_path / "out") == listing(tmp_path / "whole")

    def test_a_source_that_changed_meanwhile(self, source, tmp_path):
        with pytest.raises(Interrupted):
            convert(source, tmp_path / "out", torch.bfloat16, progress=stop_after(50))
        file = sorted(source.glob("*.safetensors"))[0]
        os.utime(file, ns=(1, 1))
        convert(source, tmp_path / "out", torch.bfloat16)
        convert(source, tmp_path / "whole", torch.bfloat16)
        assert same(tensors_in(tmp_path / "out"), tensors_in(tmp_path / "whole"))

    def test_killed(self, source, tmp_path):
        """kill -9 at a moment of the child's choosing: in the middle of its fourth shard."""
        program = (
            "import os, sys, signal\nfrom pathlib import Path\nimport torch\n"
            "from abyssal.checkpoint.convert import convert\n"
            "seen = []\n"
            "def progress(done, total):\n"
            "    seen.append(done)\n"
            "    if len(seen) == 45: os.kill(os.getpid(), signal.SIGKILL)\n"
            "convert(Path(sys.argv[1]), Path(sys.argv[2]), torch.bfloat16, progress=progress)\n"
        )
        child = subprocess.run([sys.executable, "-c", program, str(source), str(tmp_path / "out")], capture_output=True)
        assert child.returncode == -signal.SIGKILL, child.stderr
        assert not (tmp_path / "out").exists()
        assert json.loads((tmp_path / "out.partial" / JOURNAL).read_text())["done"]
        convert(source, tmp_path / "out", torch.bfloat16)
        convert(source, tmp_path / "whole", torch.bfloat16)
        assert same(tensors_in(tmp_path / "out"), tensors_in(tmp_path / "whole"))

    def test_two_at_once(self, source, tmp_path):
        def second(done, total):
            with pytest.raises(UserError, match="another process is converting there"):
                convert(source, tmp_path / "out", torch.bfloat16)
            raise Interrupted

        with pytest.raises(Interrupted):
            convert(source, tmp_path / "out", torch.bfloat16, progress=second)


class TestVerified:
    @pytest.mark.parametrize("where", ["header", "first", "last"])
    def test_a_byte_that_the_disk_changed(self, source, tmp_path, monkeypatch, where):
        """What is on the disk is read again, not what was in memory."""
        write = module.write_shard
        calls = []

        def damage(path, entries, tensors):
            digests = write(path, entries, tensors)
            calls.append(path)
            if len(calls) == 3:
                data = bytearray(path.read_bytes())
                data[{"header": 12, "first": len(data) - sum(e.nbytes for e in entries), "last": -1}[where]] ^= 1
                path.write_bytes(data)
            return digests

        monkeypatch.setattr(module, "write_shard", damage)
        with pytest.raises(UserError, match="read back is not"):
            convert(source, tmp_path / "out", torch.bfloat16)
        assert not (tmp_path / "out").exists()
        monkeypatch.undo()
        convert(source, tmp_path / "out", torch.bfloat16)  # that shard is written anew
        load_model(tmp_path / "out")

    def test_progress_of_both_passes(self, source, tmp_path):
        written, verified = [], []
        total = convert(
            source,
            tmp_path / "out",
            torch.bfloat16,
            progress=lambda *x: written.append(x),
            verifying=lambda *x: verified.append(x),
        )
        assert total == sum(t.nbytes for t in tensors_in(tmp_path / "out").values())
        assert written[-1] == verified[-1] == (total, total)


class TestSpace:
    def test_too_little_is_said_before_anything_is_written(self, source, tmp_path, monkeypatch):
        usage = type("Usage", (), {"free": 1000})
        monkeypatch.setattr(export_module.shutil, "disk_usage", lambda path: usage)
        for action in (
            lambda: convert(source, tmp_path / "out", torch.bfloat16),
            lambda: abyssal.export(source, tmp_path / "out"),
        ):
            with pytest.raises(UserError, match=r"needs 0\.\d MB, the disk has 0\.0 MB free"):
                action()
            assert not (tmp_path / "out").exists()
            assert not list(tmp_path.glob("out*/*.safetensors"))

    def test_a_disk_that_fills_up_leaves_nothing_that_looks_whole(self, source, tmp_path, monkeypatch):
        fallocate = os.posix_fallocate
        calls = []

        def full(descriptor, offset, size):
            calls.append(size)
            if len(calls) == 3:
                raise OSError(28, "No space left on device")
            fallocate(descriptor, offset, size)

        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match="No space left"):
            abyssal.export(source, tmp_path / "out", shard_size=30_000)
        assert listing(tmp_path) == ["src"]
        calls.clear()
        with pytest.raises(OSError, match="No space left"):
            convert(source, tmp_path / "out", torch.bfloat16)
        assert listing(tmp_path) == ["out.partial", "src"]
        assert not (tmp_path / "out.partial" / "config.json").exists()
        monkeypatch.undo()
        convert(source, tmp_path / "out", torch.bfloat16)
        load_model(tmp_path / "out")


class TestTarget:
    def test_a_journal_that_is_damaged(self, source, tmp_path):
        for text in ("{", "[]", "{}", json.dumps({"what": 3, "done": 4})):
            (tmp_path / "out.partial").mkdir()
            (tmp_path / "out.partial" / JOURNAL).write_text(text)
            if text in ("{", "[]"):
                with pytest.raises(UserError, match=JOURNAL):
                    convert(source, tmp_path / "out", torch.bfloat16)
                shutil.rmtree(tmp_path / "out.partial")
            else:  # of no conversion that this one could go on with
                convert(source, tmp_path / "out", torch.bfloat16)
                load_model(tmp_path / "out")
                shutil.rmtree(tmp_path / "out")

    def test_export_into_the_source(self, source):
        with pytest.raises(UserError, match="lies in the source"):
            abyssal.export(source, source / "out")

    def test_a_folder_that_ends_in_partial_is_somebodys(self, source, tmp_path):
        """DST.partial may be the source itself, or anybody's folder."""
        source.rename(tmp_path / "x.partial")
        before = {path.name: path.read_bytes() for path in (tmp_path / "x.partial").iterdir()}
        with pytest.raises(UserError, match="lies in the source, or would be written into it"):
            convert(tmp_path / "x.partial", tmp_path / "x", torch.bfloat16)
        abyssal.export(tmp_path / "x.partial", tmp_path / "x")
        assert {path.name: path.read_bytes() for path in (tmp_path / "x.partial").iterdir()} == before
        (tmp_path / "y.partial").mkdir()
        (tmp_path / "y.partial" / "thesis.txt").write_text("years")
        with pytest.raises(UserError, match="is no interrupted conversion; move it away"):
            convert(tmp_path / "x", tmp_path / "y", torch.bfloat16)
        assert listing(tmp_path / "y.partial") == ["thesis.txt"]
        abyssal.export(tmp_path / "x", tmp_path / "y")
        assert listing(tmp_path / "y.partial") == ["thesis.txt"]

    def test_links_and_the_working_folder(self, source, tmp_path, monkeypatch):
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "real")
        monkeypatch.chdir(tmp_path / "real")
        for target in (tmp_path / "link", tmp_path / "real"):
            for action in (
                lambda target=target: convert(source, target, torch.bfloat16),
                lambda target=target: abyssal.export(source, target),
            ):
                with pytest.raises(UserError, match=r"nothing is overwritten|the folder you are in"):
                    action()
        with pytest.raises(UserError, match="the folder you are in"):
            abyssal.export(source, ".")
        assert listing(tmp_path) == ["link", "real", "src"]

    def test_a_file_in_place_of_the_parent(self, source, tmp_path):
        (tmp_path / "file").write_text("x")
        with pytest.raises(UserError, match="is not a folder that you can write to"):
            abyssal.export(source, tmp_path / "file" / "out")

    def test_what_is_there_stays(self, source, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("kept")
        with pytest.raises(UserError, match="nothing is overwritten"):
            convert(source, tmp_path / "out", torch.bfloat16)
        assert (tmp_path / "out" / "mine").read_text() == "kept"
        (tmp_path / "file").write_text("kept")
        with pytest.raises(UserError, match="nothing is overwritten"):
            convert(source, tmp_path / "file", torch.bfloat16)
        with pytest.raises(UserError, match="nothing is overwritten"):
            convert(source, source, torch.bfloat16)

    def test_inside_the_source(self, source):
        with pytest.raises(UserError, match="lies in the source"):
            convert(source, source / "bf16", torch.bfloat16)
        assert "bf16" not in listing(source)

    def test_an_empty_folder_is_taken(self, source, tmp_path):
        (tmp_path / "out").mkdir()
        convert(source, tmp_path / "out", torch.bfloat16)
        load_model(tmp_path / "out")


def test_config_says_what_is_in_the_files(source, tmp_path):
    convert(source, tmp_path / "fp8", FP8)
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert config["quantization_config"] == {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
    assert config["torch_dtype"] == "bfloat16"
    convert(tmp_path / "fp8", tmp_path / "bf16", torch.bfloat16)
    config = json.loads((tmp_path / "bf16" / "config.json").read_text())
    assert "quantization_config" not in config
    before = json.loads((source / "config.json").read_text())
    assert {**before, "torch_dtype": "bfloat16"} == config


def test_powers_of_two_are_kept_and_made(source, tmp_path):
    """What comes from a ue8m0 file and is quantised again has such scales; asked for, FP32 scales are made anew."""

    def mantissas(folder):
        return {float(torch.frexp(s).mantissa.max()) for n, s in tensors_in(folder).items() if n.endswith("_scale_inv")}

    convert(source, tmp_path / "fp32-scales", FP8)
    assert mantissas(tmp_path / "fp32-scales") != {0.5}
    convert(tmp_path / "fp32-scales", tmp_path / "asked", FP8, power_of_two=True)
    abyssal.export(tmp_path / "fp32-scales", tmp_path / "exported", power_of_two=True)
    model = load_model(tmp_path / "asked")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.7)
    abyssal.export(model, tmp_path / "trained", dtype=FP8)
    for name in ("asked", "exported", "trained"):
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["quantization_config"]["scale_fmt"] == "ue8m0"
        assert mantissas(tmp_path / name) == {0.5}
    for action in (
        lambda: convert(source, tmp_path / "x", torch.bfloat16, power_of_two=True),
        lambda: abyssal.export(source, tmp_path / "x", power_of_two=True),
    ):
        with pytest.raises(UserError, match="nothing is written in FP8"):
            action()


def test_what_float16_cannot_hold(tmp_path):
    model = Transformer(resolve_model(MODEL), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.blocks[0].mlp.up_proj.weight[3, 4] = -1e6
    abyssal.export(model, tmp_path / "src")
    for action in (
        lambda: convert(tmp_path / "src", tmp_path / "out", torch.float16),
        lambda: abyssal.export(model, tmp_path / "out", dtype=torch.float16),
    ):
        with pytest.raises(UserError, match=r"layers\.0\.mlp\.up_proj\.weight: holds 1e\+06, too large for float16"):
            action()
        assert not (tmp_path / "out").exists()


def test_the_same_dtype_keeps_every_bit(source, tmp_path):
    convert(source, tmp_path / "fp32", torch.float32)
    assert same(tensors_in(source), tensors_in(tmp_path / "fp32"))
    convert(source, tmp_path / "fp8", FP8)
    convert(tmp_path / "fp8", tmp_path / "again", FP8)
    assert same(tensors_in(tmp_path / "fp8"), tensors_in(tmp_path / "again"))
