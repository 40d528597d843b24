import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "training"))  # tiny_runs: the same tiny model and recipe

from tiny_runs import tiny_recipe  # noqa: E402


@pytest.fixture
def data(tmp_path):
    """A tiny recipe as a dict; its corpus and cache lie in tmp_path."""
    return tiny_recipe(tmp_path)
