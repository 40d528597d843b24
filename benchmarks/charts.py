"""Charts as SVG files, drawn by Plotly in a browser (chromium, and the package playwright)."""

from __future__ import annotations

import shutil
import urllib.parse


def drawn(lines: dict[str, tuple[list[float], list[float]]], across: str, up: str, log: bool = False) -> str:
    """An SVG with a line for each name."""
    import plotly.graph_objects as go
    from playwright.sync_api import sync_playwright

    figure = go.Figure()
    for name, (x, y) in lines.items():
        figure.add_scatter(x=x, y=y, mode="lines+markers", name=name)
    size = {"width": 860, "height": 420}
    figure.update_layout(template="plotly_white", margin={"l": 60, "r": 20, "t": 20, "b": 50}, **size)
    figure.update_layout(xaxis_title=across, yaxis_title=up)
    if log:
        figure.update_yaxes(type="log", dtick="D1")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        page = browser.new_page()
        page.set_content(figure.to_html(include_plotlyjs=True, div_id="curve"))
        url: str = page.evaluate("size => Plotly.toImage('curve', {format: 'svg', ...size})", size)
        browser.close()
    return urllib.parse.unquote(url.split(",", 1)[1])
