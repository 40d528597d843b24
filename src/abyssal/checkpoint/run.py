"""The run folder: what a training run leaves behind, and how it is found again.

recipe.yaml         what was asked for, the model's config written out
run.json            fingerprints, versions, hardware, the dtype that ``auto`` came to
tokenizer.json, …   the tokenizer
metrics.jsonl       one JSON object a line, ``kind``: train, validation, samples
summary.json        the final figures
checkpoints/step-00000400/
    config.json, model.safetensors, tokenizer.json, …   a model folder in the published layout
    training.safetensors, state.json                      optimizer, balancers, loader position, best so far
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from abyssal.checkpoint.atomic import lock_folder, replace_folder, write_text
from abyssal.errors import UserError

_STEP = re.compile(r"step-(\d+)$")
MANIFEST = "run.json"


class Run:
    """A run folder on disk. :meth:`create` makes one, the constructor opens one (UserError where there is none)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None
        if not path.is_dir():
            raise UserError(f"{path}: no such run folder")
        if not (path / MANIFEST).is_file():
            raise UserError(f"{path}: not a run folder ({MANIFEST} is missing)")

    @classmethod
    def create(cls, path: Path, files: dict[str, str], *, overwrite: bool) -> Run:
        """Makes the folder with ``files`` (name to text) in it. Raises UserError where there is something already."""
        check_free(path, overwrite)
        if (path / MANIFEST).is_file():
            cls(path).lock()  # not while another process trains there
            shutil.rmtree(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            path.rmdir()
        with replace_folder(path) as partial:
            for name, text in files.items():
                (partial / name).write_text(text, encoding="utf-8")
        run = cls(path)
        run.lock()
        return run

    def lock(self) -> None:
        """Keeps others from writing here until :meth:`unlock`. Raises UserError where one already does."""
        if self._lock is None:
            self._lock = lock_folder(self.path, "training in this run folder")

    def unlock(self) -> None:
        """Lets others write here again."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    @property
    def manifest(self) -> dict[str, Any]:
        """run.json."""
        return _read_json(self.path / MANIFEST)

    def checkpoint(self, step: int) -> Path:
        """Folder of the checkpoint after ``step`` steps."""
        return self.path / "checkpoints" / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """Steps that have a whole checkpoint, in order."""
        folder = self.path / "checkpoints"
        names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
        return sorted(int(match[1]) for name in names if (match := _STEP.match(name)))

    def state(self, step: int) -> dict[str, Any]:
        """state.json of a checkpoint. Raises UserError where it is missing or no JSON."""
        return _read_json(self.checkpoint(step) / "state.json")

    def best(self) -> int | None:
        """Step of the checkpoint with the lowest validation loss; the last where none was validated; None: none yet."""
        steps = self.steps()
        if not steps:
            return None
        best = self.state(steps[-1]).get("best")
        return best["step"] if best and best["step"] in steps else steps[-1]

    def save(self, step: int, state: dict[str, Any], write: Callable[[Path], None], keep: int) -> None:
        """Writes a checkpoint beside and renames it, then drops all but the last ``keep`` and the best.

        ``write`` fills the folder. Raises OSError where the disk is full; what was there before is still there then.
        """
        target = self.checkpoint(step)
        if target.exists():
            return  # a run stopped at a step that it had just saved
        with replace_folder(target) as partial:
            write(partial)
            (partial / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        best = (state.get("best") or {}).get("step")
        for old in self.steps()[:-keep]:
            if old != best:
                shutil.rmtree(self.checkpoint(old))
        for leftover in target.parent.glob("*.partial"):
            shutil.rmtree(leftover, ignore_errors=True)

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Adds one line to metrics.jsonl."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """All records of metrics.jsonl; a last line that was cut off is left out."""
        return read_metrics(self.path / "metrics.jsonl")

    def forget_after(self, step: int) -> None:
        """Drops records of steps after ``step``: a resumed run writes them anew."""
        kept = [json.dumps(r) + "\n" for r in self.metrics() if r["step"] <= step]
        write_text(self.path / "metrics.jsonl", "".join(kept))


def check_free(path: Path, overwrite: bool) -> None:
    """Raises UserError where ``path`` is taken: by a run without ``overwrite``, or by anything that is no run."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not (
        (path / MANIFEST).is_file() and (path / "recipe.yaml").is_file() and "tokenizer" in _read_json(path / MANIFEST)
    ):
        raise UserError(f"{path}: exists and is no run folder; choose another with --out")
    if not overwrite:
        raise UserError(f"{path}: this run exists; continue it with --resume {path}, or replace it with --overwrite")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Records of a metrics.jsonl; lines that are no JSON (cut off by a kill) are left out. [] where it is missing."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and "kind" in record and "step" in record:
            records.append(record)
    return records


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise UserError(f"{path}: not valid JSON") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a mapping")
    return data
