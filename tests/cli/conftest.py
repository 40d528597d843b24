import pytest
from tiny_runs import tiny_recipe


@pytest.fixture
def data(tmp_path):
    """A tiny recipe as a dict; its corpus and cache lie in tmp_path."""
    return tiny_recipe(tmp_path)
