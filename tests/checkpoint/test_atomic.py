"""Whole or not there at all."""

import os

import pytest

from abyssal.checkpoint.atomic import replace_folder, write_text


class Stop(BaseException):
    """Like KeyboardInterrupt: no Exception."""


class TestFolder:
    def test_appears_when_whole(self, tmp_path):
        target = tmp_path / "deep" / "target"
        with replace_folder(target) as partial:
            (partial / "sub").mkdir()
            (partial / "sub" / "file").write_text("x")
            assert not target.exists()
            assert partial.parent == target.parent  # the same disk, so that renaming is one step
        assert (target / "sub" / "file").read_text() == "x"
        assert [p.name for p in target.parent.iterdir()] == ["target"]

    @pytest.mark.parametrize("error", [ValueError, OSError, Stop])
    def test_nothing_is_left_by_an_exception(self, tmp_path, error):
        with pytest.raises(error), replace_folder(tmp_path / "target") as partial:  # noqa: PT012
            (partial / "file").write_text("x")
            raise error
        assert list(tmp_path.iterdir()) == []

    def test_nothing_is_left_where_renaming_fails(self, tmp_path, monkeypatch):
        def fails(*_):
            raise OSError("no")

        monkeypatch.setattr(os, "rename", fails)
        with pytest.raises(OSError, match="no"), replace_folder(tmp_path / "target") as partial:
            (partial / "file").write_text("x")
        assert list(tmp_path.iterdir()) == []

    def test_what_a_kill_left_is_not_taken_over(self, tmp_path):
        (tmp_path / "target.partial").mkdir()
        (tmp_path / "target.partial" / "stale").write_text("x")
        with replace_folder(tmp_path / "target") as partial:
            (partial / "fresh").write_text("x")
        assert [p.name for p in (tmp_path / "target").iterdir()] == ["fresh"]

    def test_every_file_is_on_the_disk_before_the_name_is(self, tmp_path, monkeypatch):
        events, opened, real = [], {}, os.open
        monkeypatch.setattr(
            os, "open", lambda path, *rest: opened.setdefault(real(path, *rest), str(path)) and max(opened)
        )
        monkeypatch.setattr(os, "fsync", lambda descriptor: events.append(opened.pop(descriptor)))
        rename = os.rename
        monkeypatch.setattr(os, "rename", lambda a, b: (events.append("rename"), rename(a, b)))
        with replace_folder(tmp_path / "target") as partial:
            (partial / "a").write_text("x")
            (partial / "b").write_text("x")
        before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
        assert set(before) == {str(partial / "a"), str(partial / "b"), str(partial)}
        assert after == [str(tmp_path)]


class TestText:
    def test_replaces(self, tmp_path):
        write_text(tmp_path / "x", "old")
        write_text(tmp_path / "x", "né")
        assert (tmp_path / "x").read_bytes() == "né".encode()
        assert [p.name for p in tmp_path.iterdir()] == ["x"]

    @pytest.mark.parametrize("where", ["fsync", "replace"])
    def test_the_old_text_stays_where_the_new_cannot_be_written(self, tmp_path, monkeypatch, where):
        def fails(*_):
            raise OSError(28, "No space left on device")

        write_text(tmp_path / "x", "old")
        monkeypatch.setattr(os, where, fails)
        with pytest.raises(OSError, match="No space"):
            write_text(tmp_path / "x", "new")
        assert (tmp_path / "x").read_text() == "old"
        assert [p.name for p in tmp_path.iterdir()] == ["x"]
