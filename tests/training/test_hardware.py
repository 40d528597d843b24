"""Threads beside what the kernel's files say: made-up /proc and /sys in the test's own folder."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import build_recipe

from abyssal.errors import UserError
from abyssal.training import hardware
from abyssal.training.hardware import describe, limit_threads, resolve_dtype, suitable_threads
from abyssal.training.recipe import to_yaml
from abyssal.training.start import start


@pytest.fixture(autouse=True)
def cores(monkeypatch):
    """64 cores, and nothing that the user asked for."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)


@pytest.fixture
def threads():
    """torch's threads are put back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_without_cgroups_the_cores_count(tmp_path):
    assert suitable_threads(tmp_path) == 64


@pytest.mark.parametrize(
    ("cpu_max", "expected"),
    [
        ("max 100000\n", 64),
        ("400000 100000\n", 4),
        ("150000 100000\n", 2),
        ("10000 100000\n", 1),
        ("9000000 100000\n", 64),
        ("50000 25000\n", 2),
        ("", 64),
        ("what\n", 64),
        ("1 0\n", 64),
    ],
)
def test_v2(tmp_path, cpu_max: str, expected: int):
    files = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": cpu_max}
    assert suitable_threads(write(tmp_path, files)) == expected


def test_v2_the_tightest_group_on_the_way_up_counts(tmp_path):
    files = {
        "proc/self/cgroup": "0::/system.slice/job.service\n",
        "sys/fs/cgroup/system.slice/cpu.max": "300000 100000\n",
        "sys/fs/cgroup/system.slice/job.service/cpu.max": "max 100000\n",
        "sys/fs/cgroup/other.slice/cpu.max": "100000 100000\n",
    }
    assert suitable_threads(write(tmp_path, files)) == 3


def test_v2_in_a_container_that_sees_its_group_as_the_root(tmp_path):
    files = {"proc/self/cgroup": "0::/docker/0123abcd\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"}
    assert suitable_threads(write(tmp_path, files)) == 3


@pytest.mark.parametrize(("quota", "expected"), [("-1", 64), ("200000", 2), ("250000", 3), ("0", 64)])
@pytest.mark.parametrize("controllers", ["cpu", "cpu,cpuacct", "cpuacct,cpu"])
def test_v1(tmp_path, controllers: str, quota: str, expected: int):
    files = {
        "proc/self/cgroup": f"9:cpuset:/\n4:{controllers}:/docker/0123abcd\n1:name=systemd:/docker/0123abcd\n0::/\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": f"{quota}\n",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/cpuset/cpu.cfs_quota_us": "100000\n",
        "sys/fs/cgroup/cpuset/cpu.cfs_period_us": "100000\n",
    }
    assert suitable_threads(write(tmp_path, files)) == expected


@given(quota=st.integers(1, 10**8), period=st.integers(1000, 10**6), cores=st.integers(1, 256))
def test_never_more_than_either_and_at_least_one(tmp_path_factory, quota: int, period: int, cores: int):
    root = tmp_path_factory.mktemp("root")
    write(root, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": f"{quota} {period}\n"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
        found = suitable_threads(root)
    assert 1 <= found <= cores
    assert found == cores or found - 1 < quota / period <= found
    assert found == min(cores, math.ceil(quota / period))


@pytest.mark.parametrize(("wanted", "expected"), [("7", 7), ("3,2", 3), ("0", 2), ("many", 2), ("", 2)])
def test_the_user_has_the_last_word(tmp_path, monkeypatch, wanted: str, expected: int):
    write(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"})
    monkeypatch.setenv("OMP_NUM_THREADS", wanted)
    assert suitable_threads(tmp_path) == expected


@pytest.mark.parametrize(("suitable", "expected"), [(2, 2), (3, 3), (8, 3)])
def test_limit_only_takes_away(monkeypatch, threads, suitable: int, expected: int):
    torch.set_num_threads(3)
    monkeypatch.setattr(hardware, "suitable_threads", lambda: suitable)
    limit_threads()
    assert torch.get_num_threads() == expected
    assert describe(torch.device("cpu"), torch.float32)["threads"] == expected


PROGRAM = """
import sys, torch
from abyssal.training import hardware
torch.set_num_threads(3)
hardware.suitable_threads = lambda: 2
from abyssal.cli import main
sys.argv = ["abyssal", *sys.argv[1:]]
main()
"""


def test_the_command_line_limits_them_and_a_run_records_them(data, tmp_path):
    data["training"]["steps"] = 3
    (tmp_path / "tiny.yaml").write_text(to_yaml(build_recipe(data)))
    command = [sys.executable, "-c", PROGRAM, "train", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["hardware"]["threads"] == 2


@pytest.mark.parametrize(
    ("probes", "vendor", "width", "expected"),
    [
        (["_is_amx_tile_supported", "_is_avx512_bf16_supported"], "GenuineIntel", 512, torch.bfloat16),
        (["_is_amx_tile_supported"], "GenuineIntel", 32, torch.bfloat16),
        (["_is_amx_tile_supported"], "GenuineIntel", 16, torch.float32),  # products are not what takes the time
        (["_is_avx512_bf16_supported"], "GenuineIntel", 512, torch.float32),  # slower in BF16
        (["_is_avx512_bf16_supported"], "AuthenticAMD", 512, torch.bfloat16),
        ([], "AuthenticAMD", 512, torch.float32),
        ([], None, 512, torch.float32),  # /proc says nothing
    ],
)
def test_auto_takes_what_is_faster_on_a_cpu(monkeypatch, probes, vendor, width, expected):
    for probe in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, probe, lambda there=probe in probes: there, raising=False)
    monkeypatch.setattr(hardware, "_cpu", {"vendor_id": vendor}.get)
    cpu = torch.device("cpu")
    assert resolve_dtype("auto", cpu, width) == expected
    assert resolve_dtype("bfloat16", cpu, width) == torch.bfloat16  # what is asked for is done
    assert resolve_dtype("float32", cpu, width) == torch.float32


def test_compiling_without_a_compiler_is_refused_before_anything_is_written(monkeypatch, data, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"^training\.compile: true needs a C\+\+ compiler"):
        start(build_recipe(data, training__compile=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()
