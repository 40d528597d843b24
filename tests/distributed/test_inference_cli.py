"""``torchrun … -m abyssal generate`` and ``serve`` as they are started, and what they refuse."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from inference_jobs import V3, write

from abyssal.checkpoint import load_model
from abyssal.cli.processes import gather
from abyssal.data.tokenizer import byte_tokenizer
from abyssal.errors import UserError
from abyssal.generation import generate

LIMIT = 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(V3, tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def right(folder: Path) -> str:
    """What one process writes."""
    return generate(load_model(folder), byte_tokenizer(), "Once", temperature=0, max_new_tokens=12)


def torchrun(many: int, *arguments: object) -> list[str]:
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(many)),
        *("-m", "abyssal", *map(str, arguments)),
    ]


def ended(many: int, *arguments: object) -> tuple[str, list[str], list[int]]:
    """Stdout, what of stderr abyssal says, and the exit codes of processes that failed, by torchrun's account."""
    run = subprocess.run(torchrun(many, *arguments), capture_output=True, text=True, timeout=LIMIT)
    said = [line for line in run.stderr.splitlines() if line.startswith("abyssal: ")]
    return run.stdout, said, [int(code) for code in re.findall(r"^\s+exitcode\s*: (-?\d+) ", run.stderr, re.M)]


def test_four_processes_write_what_one_does(folder: Path, right: str) -> None:
    options = ("--temperature", 0, "--tokens", 12, "--tensor", 2, "--expert", 2)
    assert ended(4, "generate", folder, "Once", *options) == (f"Once{right}\n", [], [])


def test_what_is_found_out_late_ends_all(folder: Path) -> None:
    """By process 0 alone, when all have loaded."""
    out, said, codes = ended(2, "generate", folder, "Once", "--expert", 2, "--tokens", 1000)
    assert (out, [line[:40] for line in said]) == ("", ["abyssal: error: --tokens: 1000 do not fi"])
    assert codes == [2, 2]


def test_a_model_that_cannot_be_divided_ends_all(folder: Path) -> None:
    out, said, codes = ended(3, "generate", folder, "Once", "--tensor", 3)
    assert (out, said) == ("", ["abyssal: error: tensor: 3 does not divide the model's num_attention_heads 4"])
    assert codes == [2, 2, 2]


def test_a_server_on_two_processes(folder: Path, right: str) -> None:
    pytest.importorskip("fastapi", reason="needs fastapi (extra serve)")
    command = torchrun(2, "serve", folder, "--tensor", 2, "--port", 0)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            url = re.search(r"http://[\d.:]+", server.stdout.readline())
            assert url is not None
            body = {"model": "tiny", "prompt": "Once", "max_tokens": 12, "temperature": 0}
            for _ in range(2):
                answer = httpx.post(f"{url[0]}/v1/completions", json=body, timeout=LIMIT).json()
                assert answer["choices"][0]["text"] == right
            with httpx.stream(
                "POST", f"{url[0]}/v1/completions", json=body | {"stream": True, "max_tokens": 100}
            ) as one:
                next(one.iter_text())  # and the client goes
            assert httpx.get(f"{url[0]}/health").status_code == 200
        finally:
            server.send_signal(signal.SIGINT)
            said = server.communicate(timeout=LIMIT)[1]
    assert "abyssal: " not in said


def started(monkeypatch: pytest.MonkeyPatch, many: int) -> None:
    """As if torchrun had."""
    for name, value in {"RANK": 0, "WORLD_SIZE": many, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize(
    ("many", "tensor", "expert", "said"),
    [
        (2, 1, 1, "torchrun started 2 processes, and nothing says what they divide; give --tensor and --expert"),
        (4, 2, 1, "--tensor 2 × --expert 1 = 2 processes, and there are 4; expected torchrun --nproc-per-node 2"),
        (None, 2, 2, "--tensor 2 × --expert 2 = 4 processes, and there are 1; expected torchrun --nproc-per-node 4"),
        (2, 0, 1, "tensor: 0 is not valid"),
    ],
)
def test_processes_that_are_too_many_or_too_few(
    monkeypatch: pytest.MonkeyPatch, many: int | None, tensor: int, expert: int, said: str
) -> None:
    if many is not None:
        started(monkeypatch, many)
    with pytest.raises(UserError, match=f"^{re.escape(said)}"):
        gather(tensor, expert, "cpu")


def test_commands_for_one_process_say_so(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    from abyssal.cli.loaded import load_model

    started(monkeypatch, 2)
    with pytest.raises(UserError, match="torchrun started 2 processes, and this command is for one"):
        load_model(str(folder), dtype="auto", weights="auto", device="cpu", allow_missing=None)


def test_one_process_is_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "RANK" not in os.environ
    assert gather(1, 1, "cpu").first
    started(monkeypatch, 1)
    assert gather(1, 1, "cpu").first
