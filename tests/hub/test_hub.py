"""Fetching by name from a stand-in for the hub: what is asked for, what is not, and every way it can fail."""

import errno
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from hypothesis import given
from hypothesis import strategies as st

from abyssal.errors import UserError
from abyssal.hub import CONFIG, SMALL, WEIGHTS, fetch, is_hub_id

NAME = "deep/tiny"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
FILES = {
    "config.json": b'{"model_type": "deepseek_v3"}',
    "tokenizer.json": b"{}",
    "model.safetensors.index.json": b'{"weight_map": {}}',
    SHARDS[0]: bytes(range(256)) * 40,
    SHARDS[1]: b"weights" * 1000,
    "pytorch_model.bin": b"pickle",
    "old.pt": b"pickle",
    "old.ckpt": b"pickle",
    "modeling_deepseek.py": b"code",
    "README.md": b"# tiny",
    "onnx/model.safetensors": b"another copy",
    "inference/config_671B.json": b"{}",
}


@pytest.fixture
def cache() -> Path:
    return Path(constants.HF_HUB_CACHE)


def refused(spec: str, patterns: tuple[str, ...], *parts: str) -> None:
    with pytest.raises(UserError) as error:
        fetch(spec, patterns, progress=False)
    message = str(error.value)
    assert "\n" not in message
    assert spec in message
    for part in parts:
        assert part in message


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


class TestIsHubId:
    @pytest.mark.parametrize(
        "text",
        [
            "deepseek-ai/DeepSeek-V2-Lite",
            "a/b",
            "a/b.c_d-e",
            "a/b@main",
            "a/b@v1.0",
            "a/b@refs/pr/3",
            "a/b@" + 40 * "f",
        ],
    )
    def test_names(self, text):
        assert is_hub_id(text)

    @pytest.mark.parametrize(
        "text",
        ["", "gpt2", "./a/b", "../b", "a/..", "/a/b", "~/b", "a/b/c", "a/b/", "/b", "a/", ".a/b", "a/b.git", "a--b/c",
         "a b/c", "a/b@", "a/b@../../x", "a/b@-x", "a/b@x y", "@main", "a@b/c", "a\\b", "a/b\n", "https://hf.co/a/b"],
    )  # fmt: skip
    def test_others(self, text):
        assert not is_hub_id(text)

    @given(st.text(alphabet="aZ9-_./~ é\n", max_size=8))
    def test_without_a_revision_it_is_what_huggingface_hub_takes(self, text):
        try:
            validate_repo_id(text)
            valid = True
        except HFValidationError:
            valid = False
        assert is_hub_id(text) == (valid and text.count("/") == 1)


class TestFetch:
    def test_only_what_matches_is_asked_for_and_only_once(self, hub, cache):
        hub.write(NAME, FILES)
        folder = fetch(NAME, CONFIG)
        assert hub.files("GET") == ["config.json"]
        assert names(folder) == {"config.json"}
        assert (folder / "config.json").read_bytes() == FILES["config.json"]
        assert cache in folder.parents

        assert fetch(NAME, (*SMALL, *WEIGHTS)) == folder
        wanted = ["config.json", *SHARDS, "model.safetensors.index.json", "tokenizer.json"]
        assert hub.files("GET") == sorted(wanted)  # config.json not again
        assert {name: (folder / name).read_bytes() for name in wanted} == {name: FILES[name] for name in wanted}

        hub.requests.clear()
        assert fetch(NAME, (*SMALL, *WEIGHTS)) == folder
        assert hub.files("GET") == hub.files("HEAD") == []

    def test_pickles_code_and_subfolders_are_never_asked_for(self, hub):
        hub.write(NAME, FILES)
        folder = fetch(NAME, ["*"])
        wanted = {"config.json", "tokenizer.json", "model.safetensors.index.json", "README.md", *SHARDS}
        assert names(folder) == wanted
        assert set(hub.files("GET")) | set(hub.files("HEAD")) == wanted

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "*.pt", "modeling_deepseek.py", "onnx/model.safetensors"])
    def test_nor_by_name(self, hub, name):
        hub.write(NAME, FILES)
        refused(NAME, (name,), name, "not fetched")
        assert hub.requests == []

    def test_a_revision(self, hub):
        hub.write(NAME, {"config.json": b"new"})
        hub.write(NAME, {"config.json": b"old"}, revision="v1")
        old = fetch(f"{NAME}@v1", CONFIG)
        new = fetch(NAME, CONFIG)
        assert (old / "config.json").read_bytes() == b"old"
        assert (new / "config.json").read_bytes() == b"new"
        assert fetch(f"{NAME}@{old.name}", CONFIG) == old  # by its commit
        refused(f"{NAME}@v2", CONFIG, "no branch, tag or commit 'v2'")

    def test_a_new_commit_is_seen(self, hub):
        hub.write(NAME, {"config.json": b"1", "tokenizer.json": b"same"})
        fetch(NAME, ("*.json",))
        hub.write(NAME, {"config.json": b"2"})
        folder = fetch(NAME, ("*.json",))
        assert (folder / "config.json").read_bytes() == b"2"
        assert hub.files("GET").count("tokenizer.json") == 1

    def test_optional_files_come_where_there_are_some(self, hub):
        hub.write(NAME, {"config.json": b"{}", "chat_template.jinja": b"x", "tiktoken.model": b"y"})
        assert names(fetch(NAME, SMALL)) == {"config.json", "chat_template.jinja", "tiktoken.model"}

    def test_progress(self, hub, monkeypatch, capfd):
        monkeypatch.setenv("TQDM_POSITION", "-1")  # huggingface_hub's switch for bars where there is no terminal
        hub.write(NAME, FILES)
        fetch(NAME, CONFIG, progress=False)
        assert capfd.readouterr() == ("", "")
        fetch(NAME, WEIGHTS)
        assert "100%" in capfd.readouterr().err


class TestNotThere:
    def test_not_a_name(self, hub):
        refused("a/b/c", CONFIG, "owner/name@revision")
        assert hub.requests == []

    def test_no_repository(self, hub):
        refused("deep/none", CONFIG, hub.url, "no such repository", "private", "hf auth login")  # 401, as the real hub
        hub.refuse = lambda method, path: "no repository"
        refused(NAME, CONFIG, "no such repository")
        hub.refuse = lambda method, path: 404
        refused(NAME, CONFIG, "no such repository")

    def test_gated(self, hub):
        hub.write(NAME, FILES)
        hub.refuse = lambda method, path: "gated" if "/resolve/" in path else None  # the list of files is public
        refused(NAME, CONFIG, "gated", f"{hub.url}/{NAME}", "hf auth login")

    def test_a_name_or_glob_that_matches_nothing(self, hub):
        hub.write(NAME, {"config.json": b"{}", "pytorch_model.bin": b"pickle", "sub/model.safetensors": b"x"})
        refused(NAME, ("config.json", SHARDS[0]), f"no {SHARDS[0]}")
        refused(NAME, WEIGHTS, "no *.safetensors", "pickled")
        assert hub.files("GET") == []

    def test_the_hub_is_ill(self, hub, cache):
        hub.write(NAME, FILES)
        hub.refuse = lambda method, path: 503
        refused(NAME, CONFIG, "503", hub.url, str(cache), "config.json")
        hub.refuse = lambda method, path: "html"
        refused(NAME, CONFIG, "HF_ENDPOINT", str(cache))

    def test_a_proxy_that_leads_nowhere(self, hub, cache, monkeypatch):
        monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")  # needs the package socksio, or else a proxy there
        refused(NAME, CONFIG, "no connection", str(cache))

    def test_broken_off_and_taken_up_again(self, hub, cache, monkeypatch):
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # huggingface_hub waits between its attempts
        hub.write(NAME, FILES)
        hub.refuse = lambda method, path: "cut" if path.endswith(SHARDS[1]) else None
        refused(NAME, WEIGHTS, "broke off", hub.url, SHARDS[1])
        refused(NAME, WEIGHTS, "broke off")  # what came of it is not taken for the file
        hub.refuse = lambda method, path: None
        hub.requests.clear()
        folder = fetch(NAME, WEIGHTS)
        assert hub.files("GET") == [SHARDS[1]]
        assert (folder / SHARDS[1]).read_bytes() == FILES[SHARDS[1]]

    def test_too_large_for_the_disk(self, hub, cache, monkeypatch):
        hub.write(NAME, {**FILES, SHARDS[0]: bytes(20_000_000)})
        usage = shutil.disk_usage("/")
        monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=10_000_000))
        refused(NAME, WEIGHTS, "0.02 GB more", "0.01 GB are free", str(cache), "HF_HOME")
        assert hub.files("GET") == []
        monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=20_010_000))
        fetch(NAME, WEIGHTS)
        monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=0))
        fetch(NAME, WEIGHTS)  # what is in the cache needs no room

    @pytest.mark.parametrize(
        "error",
        # The second is how hf_xet says it.
        [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("IO Error: No space left (os error 28)")],
    )
    def test_disk_full_on_the_way(self, hub, cache, monkeypatch, error):
        def write(*args, **options):
            raise error

        hub.write(NAME, FILES)
        monkeypatch.setattr("huggingface_hub.file_download.http_get", write)
        refused(NAME, CONFIG, "no space", str(cache))

    def test_cache_that_cannot_be_written(self, hub, cache):
        hub.write(NAME, FILES)
        cache.write_text("a file where the folder should be")
        refused(NAME, CONFIG, "cannot write", str(cache))


class TestWithoutTheHub:
    def test_a_cache_filled_by_others_is_not_taken_for_more_than_it_is(self, hub, cache):
        """snapshot_download would return the folder, without weights and without a word."""
        hub.write(NAME, FILES)
        hf_hub_download(NAME, "config.json")  # leaves no list of the repository's files
        hub.refuse = lambda method, path: 500 if path.startswith("/api") else None
        assert names(fetch(NAME, CONFIG)) == {"config.json"}
        refused(NAME, WEIGHTS, str(cache), "*.safetensors")
        refused(NAME, SHARDS, SHARDS[0])

    def test_nor_where_the_hub_falls_silent_in_the_middle(self, hub, cache):
        hub.write(NAME, FILES)
        hf_hub_download(NAME, SHARDS[0])
        asked = []

        def refuse(method, path):
            asked.append("/revision/" in path)
            return 500 if sum(asked) > 1 else None

        hub.refuse = refuse
        refused(NAME, WEIGHTS, str(cache), SHARDS[1])

    def test_one_shard_is_not_all(self, hub, cache):
        hub.write(NAME, FILES)
        fetch(NAME, (*CONFIG, SHARDS[0]))
        hub.refuse = lambda method, path: 500
        assert SHARDS[0] in names(fetch(NAME, (SHARDS[0],)))
        refused(NAME, WEIGHTS, str(cache))
        refused(NAME, SHARDS, SHARDS[1])

    def test_a_link_to_nothing_is_not_a_file(self, hub, cache):
        hub.write(NAME, FILES)
        Path(hf_hub_download(NAME, "config.json")).resolve().unlink()
        hub.refuse = lambda method, path: 500
        refused(NAME, CONFIG, str(cache))

    def test_in_other_processes(self, hub, tmp_path):
        """The settings as people make them: HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE in the environment."""
        hub.write(NAME, FILES)
        code = """
from abyssal.hub import *
for patterns in CONFIG, SMALL, WEIGHTS:
    try:
        print(fetch(NAME, patterns, progress=False))
    except ValueError as error:
        print("error:", error)
""".replace("NAME", repr(NAME))

        def run(**settings: str) -> list[str]:
            environment = hub.environment(tmp_path / "home", **settings)
            done = subprocess.run(
                [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
            )
            assert done.stderr == ""
            return done.stdout.splitlines()

        cache = str(tmp_path / "home" / "hub")
        for line in run(HF_HUB_OFFLINE="1"):
            assert line.startswith(f"error: {NAME}: HF_HUB_OFFLINE is set")
            assert cache in line
        assert hub.requests == []
        for line in run(HF_ENDPOINT="http://127.0.0.1:9"):  # nothing listens there: discard
            assert line.startswith(f"error: {NAME}: no connection to http://127.0.0.1:9")
            assert cache in line
        folders = run()
        assert len(folders) == 3
        assert len(set(folders)) == 1
        assert (Path(folders[0]) / SHARDS[0]).read_bytes() == FILES[SHARDS[0]]
        hub.requests.clear()
        assert run(HF_HUB_OFFLINE="1") == folders
        assert hub.requests == []
        assert run(HF_ENDPOINT="http://127.0.0.1:9") == folders
