"""Putting a page together; the pages themselves are opened in a browser in tests/pages."""

import base64
import builtins
import gzip
import json
import re

import pytest

from abyssal.analysis import page
from abyssal.errors import UserError

HOSTILE = "</script><script>alert(1)</script><!-- <b>&amp; \u2028 \x00"


@pytest.fixture
def probe(monkeypatch):
    """A page of our own: nothing but a place for problems."""
    files = {"probe.html": "<div id=problem></div>", "probe.css": "", "probe.js": "async function show(data) {}"}
    read = page._file
    monkeypatch.setattr(page, "_file", lambda name: files[name] if name in files else read(name))


def packed(html: str, name: str) -> str:
    block = re.search(rf'<script type="text/plain" id="{name}">([^<]*)</script>', html)
    return gzip.decompress(base64.b64decode(block[1])).decode()


def test_data_and_library_come_out_as_they_went_in(probe):
    pytest.importorskip("plotly")
    from plotly.offline import get_plotlyjs

    data = {"text": HOSTILE, "numbers": [1, 2.5, None], "nested": {"a": [True]}}
    html = page.render_page("probe", "a title", data)
    assert json.loads(packed(html, "data")) == data
    assert packed(html, "library") == get_plotlyjs()
    assert len(html) < 2_500_000


def test_text_of_users_is_never_markup(probe):
    pytest.importorskip("plotly")
    html = page.render_page("probe", HOSTILE, {"text": HOSTILE})
    assert "<script>alert" not in html
    assert html.count("<script") == html.count("</script>") == 3  # library, data, the page's own
    assert "<title>&lt;/script&gt;" in html


def test_numbers_that_are_not_finite_become_null():
    assert page.to_json({"a": [float("nan"), (1.0, float("inf"))]}) == '{"a":[null,[1.0,null]]}'


def test_the_same_data_make_the_same_page(probe):
    pytest.importorskip("plotly")
    assert page.render_page("probe", "t", [1]) == page.render_page("probe", "t", [1])


def test_without_plotly_the_error_says_what_to_install(probe, monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("plotly"):
            raise ImportError(name)
        return real(name, *rest)

    page._library.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'abyssal\[plot\]'"):
        page.render_page("probe", "t", [])
    page._library.cache_clear()
