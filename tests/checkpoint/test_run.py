"""The run folder: what stays, what goes, and whom it belongs to."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abyssal.checkpoint.run import Run, check_free, read_metrics
from abyssal.errors import UserError


@pytest.fixture
def run(tmp_path):
    return Run.create(tmp_path / "run", {"run.json": '{"tokenizer": ""}', "recipe.yaml": "x"}, overwrite=False)


def save(run: Run, step: int, best: int | None = None, keep: int = 2) -> None:
    run.save(step, {"best": {"step": best} if best else None}, lambda f: (f / "data").write_text(str(step)), keep)


class TestSave:
    @given(
        steps=st.lists(st.integers(1, 500), min_size=1, max_size=12, unique=True).map(sorted),
        better=st.lists(st.booleans(), min_size=12, max_size=12),
        keep=st.integers(1, 4),
    )
    def test_the_last_and_the_best_stay(self, tmp_path_factory, steps, better, keep):
        run = Run.create(
            tmp_path_factory.mktemp("x") / "run", {"run.json": '{"tokenizer": ""}', "recipe.yaml": ""}, overwrite=False
        )
        best, kept = None, []
        for i, step in enumerate(steps):
            best = step if best is None or better[i] else best
            save(run, step, best, keep)
            kept = [s for s in [*kept, step] if s in ([*kept, step])[-keep:] or s == best]
            assert run.steps() == kept
            assert run.best() == best
            assert all((run.checkpoint(s) / "data").read_text() == str(s) for s in kept)

    def test_best_without_validation_is_the_last(self, run):
        assert run.best() is None
        save(run, 3)
        save(run, 7)
        assert run.best() == 7

    def test_a_step_that_is_there_is_not_written_again(self, run):
        save(run, 3)
        run.save(3, {}, lambda folder: pytest.fail("written again"), 2)
        assert run.steps() == [3]

    def test_what_a_kill_left_does_not_count_and_goes(self, run):
        save(run, 3)
        partial = run.checkpoint(5).with_name("step-00000005.partial")
        partial.mkdir()
        (partial / "state.json").write_text("{}")
        assert run.steps() == [3]
        save(run, 6)
        assert not partial.exists()

    def test_a_failing_write_leaves_the_others(self, run):
        def write(folder):
            (folder / "half").write_text("x")
            raise OSError(28, "No space left on device")

        save(run, 1, keep=1)
        with pytest.raises(OSError, match="No space"):
            run.save(2, {}, write, 1)
        assert run.steps() == [1]
        assert [p.name for p in (run.path / "checkpoints").iterdir()] == ["step-00000001"]


class TestMetrics:
    def test_forget_after(self, run):
        for step in (1, 2, 2, 3, 4):
            run.append_metrics({"kind": "train", "step": step})
        run.forget_after(2)
        assert [r["step"] for r in run.metrics()] == [1, 2, 2]
        run.append_metrics({"kind": "train", "step": 3})
        assert [r["step"] for r in run.metrics()] == [1, 2, 2, 3]

    def test_forget_in_a_new_run(self, run):
        run.forget_after(0)
        assert run.metrics() == []

    @given(cut=st.integers(0, 60))
    def test_cut_anywhere(self, tmp_path_factory, cut):
        """Whole lines count, whatever a kill or a full disk did to the end of the file."""
        file = tmp_path_factory.mktemp("x") / "metrics.jsonl"
        lines = [json.dumps({"kind": "train", "step": s}) for s in (1, 2)]
        text = "\n".join(lines) + "\n"
        file.write_text(text[:cut])
        whole = [line for line in lines if line in text[:cut].splitlines()]
        assert [r["step"] for r in read_metrics(file)] == [json.loads(line)["step"] for line in whole]

    def test_noise(self, tmp_path):
        file = tmp_path / "metrics.jsonl"
        file.write_bytes(b'\xff\xfe{"kind"\n[1]\n"text"\n{"kind": "train"}\n\x00\n{"kind": "train", "step": 4}\n')
        assert [r["step"] for r in read_metrics(file)] == [4]

    def test_missing(self, tmp_path):
        assert read_metrics(tmp_path / "none") == []


class TestFolder:
    def test_free(self, tmp_path):
        check_free(tmp_path / "none", overwrite=False)
        (tmp_path / "empty").mkdir()
        check_free(tmp_path / "empty", overwrite=False)

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_what_is_no_run_is_never_deleted(self, tmp_path, overwrite):
        folder = tmp_path / "thesis"
        folder.mkdir()
        (folder / "chapter1.tex").write_text("years of work")
        file = tmp_path / "notes.txt"
        file.write_text("x")
        for path in (folder, file):
            with pytest.raises(UserError, match="is no run folder"):
                Run.create(path, {"run.json": '{"tokenizer": ""}', "recipe.yaml": ""}, overwrite=overwrite)
        assert (folder / "chapter1.tex").read_text() == "years of work"
        assert file.read_text() == "x"

    def test_taken(self, run):
        save(run, 1)
        run.unlock()
        with pytest.raises(UserError, match=r"--resume .* --overwrite"):
            Run.create(run.path, {"run.json": '{"tokenizer": ""}', "recipe.yaml": ""}, overwrite=False)
        assert run.steps() == [1]
        assert Run.create(run.path, {"run.json": '{"tokenizer": ""}', "recipe.yaml": ""}, overwrite=True).steps() == []
        assert (run.path / "recipe.yaml").read_text() == ""  # not the old one's

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_an_empty_folder_is_taken_over(self, tmp_path, overwrite):
        (tmp_path / "run").mkdir()
        files = {"run.json": '{"tokenizer": ""}', "recipe.yaml": ""}
        assert Run.create(tmp_path / "run", files, overwrite=overwrite).manifest == {"tokenizer": ""}

    def test_opening(self, tmp_path):
        with pytest.raises(UserError, match="no such run folder"):
            Run(tmp_path / "none")
        with pytest.raises(UserError, match=r"run\.json is missing"):
            Run(tmp_path)
        (tmp_path / "run.json").write_text("{")
        with pytest.raises(UserError, match="not valid JSON"):
            Run(tmp_path).manifest  # noqa: B018


class TestLock:
    def test_one_writer(self, run):
        other = Run(run.path)
        for _ in range(2):
            with pytest.raises(UserError, match="another process is training"):
                other.lock()
        with pytest.raises(UserError, match="another process is training"):
            Run.create(run.path, {"run.json": '{"tokenizer": ""}', "recipe.yaml": ""}, overwrite=True)
        run.lock()  # its own
        run.unlock()
        other.lock()
        with pytest.raises(UserError, match="another process is training"):
            run.lock()
