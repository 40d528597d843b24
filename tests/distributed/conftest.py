from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from workers import Workers


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One after the other (xdist's --dist loadgroup): each of these tests is several processes."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.xdist_group("processes"))


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    these = Workers()
    yield these
    these.close()
