"""A page in one HTML file that works offline: its text, style, script, data and the plotting library.

Data and library lie in it gzipped, in base64 (the library alone is 4.8 MB otherwise), and are unpacked by the browser
itself. Whatever text the data holds reaches the page as text: scripts put it there as text nodes, and base64 cannot end
a ``<script>`` element. A content security policy keeps the page from fetching anything from elsewhere.
"""

from __future__ import annotations

import base64
import gzip
import html
import json
import math
from functools import cache
from importlib import resources
from typing import Any

from abyssal.errors import UserError

# Live pages fetch from where they came from; everything else is inside.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; connect-src 'self'"
)


def render_page(name: str, title: str, data: Any) -> str:
    """The page ``name`` (pages/name.html, .css and .js) showing ``data``, which its script gets as ``show(data)``.

    ``data`` is anything that JSON can say; numbers that are not finite become null. Raises UserError where Plotly,
    whose library for the browser goes into the page, is not installed.
    """
    script = "\n".join((_file("page.js"), _file(f"{name}.js"), "start();"))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<link rel="icon" href="data:,">
<title>{html.escape(title)}</title>
<style>
{_file("page.css")}
{_file(f"{name}.css")}
</style>
</head>
<body>
{_file(f"{name}.html")}
<script type="text/plain" id="library">{_library()}</script>
<script type="text/plain" id="data">{_packed(to_json(data))}</script>
<script>
{script}
</script>
</body>
</html>
"""


def style() -> str:
    """What all pages look like: the style sheet that they share."""
    return _file("page.css")


def to_json(data: Any) -> str:
    """``data`` as JSON that every browser reads: no NaN, no infinity."""
    return json.dumps(_finite(data), separators=(",", ":"), allow_nan=False)


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return data


def _packed(text: str) -> str:
    return base64.b64encode(gzip.compress(text.encode("utf-8"), mtime=0)).decode("ascii")


@cache
def _library() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UserError("pages with charts need Plotly: pip install 'abyssal[plot]'") from None
    return _packed(get_plotlyjs())


def _file(name: str) -> str:
    return (resources.files("abyssal.analysis") / "pages" / name).read_text(encoding="utf-8")
