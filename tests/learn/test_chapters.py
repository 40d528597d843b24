"""The chapters of docs/learn run, and their checks hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

LEARN = Path(__file__).parents[2] / "docs" / "learn"
CHAPTERS = sorted(path for path in LEARN.glob("*.py") if path.stem != "checks")


def test_there_are_four_chapters_and_the_misreadings() -> None:
    assert [path.stem for path in CHAPTERS] == ["1_moe", "2_deepseek_moe", "3_mla", "4_model", "misreadings"]


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_runs_and_its_checks_hold(chapter: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, chapter],
        cwd=tmp_path,
        env=os.environ | {"PYTHONUTF8": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.rstrip().splitlines()[-1].startswith("all checks hold")
    assert not list(tmp_path.iterdir()), "a chapter leaves nothing where it was started"


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_notebook_is_the_script(chapter: Path) -> None:
    """The notebook beside a chapter holds the same cells (make learn makes it)."""
    notebook = json.loads(chapter.with_suffix(".ipynb").read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    script = chapter.read_text(encoding="utf-8")
    for cell in code:
        assert "".join(cell["source"]).strip() in script, "not the script's; run make learn"
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            lines = "".join(cell["source"]).strip().split("\n")
            assert "\n".join(f"# {line}" if line else "#" for line in lines) in script, (
                "not the script's; run make learn"
            )
    cells = [part for part in script.split("\n# %%") if not part.startswith(" [markdown]")]
    assert len(code) == len(cells) - 1
    assert all(cell.get("outputs") is not None and cell["execution_count"] for cell in code), "not executed"
