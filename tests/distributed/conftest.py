from __future__ import annotations

from collections.abc import Iterator

import pytest
from workers import Workers


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    these = Workers()
    yield these
    these.close()
