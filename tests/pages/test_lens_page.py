"""The lens page in a browser, against the arrays behind it."""

import numpy as np
import pytest
import torch
from tiny_runs import MODEL, tiny_recipe, tiny_trainer

import abyssal
from abyssal.analysis.lens import look, read_texts
from abyssal.analysis.lens_page import build_lens, page_data
from abyssal.analysis.page import render_page
from abyssal.cli import main
from abyssal.config import ModelConfig
from abyssal.data.tokenizer import byte_tokenizer
from abyssal.model import Transformer

TEXT = "seven wizards brew  strong\n\nblack tea\tat dawn: été, 日本, 😀!\n" * 6
HOSTILE = (
    "</script><script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\">\n"
    "&amp; &lt; <b>bold</b> ${x} `` {{x}} <!-- %s\n"
    "\0\x07\x1b[31m \u202egnol\u202c שלום עולם أبجد 👩‍👩‍👧 e\u0301 \ud7ff\ufffe\r\n"
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two checkpoints of a run, a page that compares them, and the routing of both."""
    folder = tmp_path_factory.mktemp("lens")
    data = tiny_recipe(folder)
    data["model"] = MODEL | {"initializer_range": 0.3}  # so that a few steps route by more than one habit
    trainer = tiny_trainer(data, folder / "run", training__steps=6, checkpoint__every=3)
    trainer.train()
    (folder / "one.txt").write_text(TEXT, encoding="utf-8")
    (folder / "two.txt").write_text(
        "<|endoftext|>\n".join(["a lazy dog\n", "the quick brown fox\n"] * 3), encoding="utf-8"
    )
    steps = sorted((folder / "run" / "checkpoints").iterdir())
    assert len(steps) == 2
    sources = [folder / "one.txt", folder / "two.txt"]
    page = folder / "page.html"
    arguments = [str(steps[1]), "--compare", str(steps[0]), "--out", str(page)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["abyssal", "lens", *arguments, *(x for s in sources for x in ("--text", str(s)))])
        with pytest.raises(SystemExit) as caught:
            main()
    assert caught.value.code == 0
    found = []
    for step in (steps[1], steps[0]):
        model, tokenizer = abyssal.load(step)
        texts = read_texts(sources, tokenizer, 128)
        found.append(look(model, texts))
    return page, texts, tokenizer, *found


def colours(page):
    return page.evaluate("[...document.querySelectorAll('#text .t')].map((span) => span.className)")


def experts_of(classes):
    return [next((int(c[1:]) for c in names.split() if c[0] == "e" and c[1:].isdigit()), -1) for names in classes]


def set_layer(page, index):
    page.locator("#layer").fill(str(index))


def tip_rows(page):
    rows = page.locator("#tip tbody tr")
    return [rows.nth(i).locator("td").all_inner_texts() for i in range(rows.count())]


def test_tokens_have_the_colour_of_their_expert_in_every_layer(trained, open_page):
    path, texts, _, ours, _ = trained
    page = open_page(path).page
    for index, routing in enumerate(ours.values()):
        set_layer(page, index)
        for choice in range(2):
            page.select_option("#choice", index=choice)
            assert experts_of(colours(page)) == routing.indices[:, choice].tolist()
        page.select_option("#choice", index=0)
    painted = page.evaluate(
        """() => {
          const spans = [...document.querySelectorAll('#text .t')];
          return Object.fromEntries(spans.map((span) => [span.className, getComputedStyle(span).backgroundColor]));
        }"""
    )
    shown = {value for name, value in painted.items() if "off" not in name}
    assert len(shown) >= 2  # experts, each with a colour of its own
    assert len(shown) == len({name.split()[-1] for name in painted if "off" not in name})
    assert len(texts.ids) == page.locator("#text .t").count()


def test_the_text_reads_as_the_text(trained, open_page):
    path, _, tokenizer, *_ = trained
    page = open_page(path).page
    parts = page.evaluate(
        """[...document.querySelectorAll('#text .part')].map((part) => {
             const copy = part.cloneNode(true);
             copy.querySelectorAll('i').forEach((mark) => mark.remove());
             return copy.textContent;
           })"""
    )
    bos = tokenizer.bos
    assert "".join(parts) == bos + TEXT + (f"{bos}a lazy dog\n" + f"{bos}the quick brown fox\n") * 3
    first = page.locator("#text .t", has_text="日")
    assert first.count() == 6
    box = page.locator("#text .t").nth(1).bounding_box()
    assert box["width"] > 4
    assert page.locator("#text .t.rest").first.bounding_box()["width"] > 2  # what a character's other bytes chose


def test_hover_shows_the_weights_of_a_forward_pass(trained, open_page):
    path, texts, _, ours, other = trained
    page = open_page(path).page
    layers = list(ours)
    for index, token in ((0, 1), (0, 30), (1, 30), (1, 40)):
        set_layer(page, index)
        page.locator("#text .t").nth(token).hover()
        tip = page.locator("#tip").inner_text()
        assert f"id {texts.ids[token]}, position {texts.position[token]} in its window" in tip
        mine, theirs = ours[layers[index]], other[layers[index]]
        rows = tip_rows(page)
        assert [row[0] for row in rows] == [f"expert {e}" for e in mine.indices[token]]
        assert [row[2] for row in rows] == [f"expert {e}" for e in theirs.indices[token]]
        assert [float(row[1]) for row in rows] == pytest.approx(mine.weights[token].tolist(), abs=6e-4)
        assert [float(row[3]) for row in rows] == pytest.approx(theirs.weights[token].tolist(), abs=6e-4)
        assert f"shared experts: {mine.shared[token]:.0%}" in tip or f"{mine.shared[token] - 0.004:.0%}" in tip
        moved = int(mine.moved[token])
        assert (f"the bias moved {moved} of 2" if moved else "the bias changed nothing") in tip
    last = len(texts.ids) - 1
    page.locator("#text .t").nth(last).hover()
    assert "No decision" in page.locator("#tip").inner_text()
    page.mouse.move(1, 1)
    assert page.locator("#tip").is_hidden()


def test_slider_changes_what_hover_says(trained, open_page):
    path, _, _, ours, _ = trained
    page = open_page(path).page
    page.locator("#text .t").nth(20).click()
    seen = []
    for index, routing in enumerate(ours.values()):
        set_layer(page, index)
        assert [row[0] for row in tip_rows(page)] == [f"expert {e}" for e in routing.indices[20]]
        seen.append([row[1] for row in tip_rows(page)])
    assert seen[0] != seen[1]
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()


def test_clicking_an_expert_shows_where_it_fires(trained, open_page):
    path, texts, _, ours, _ = trained
    page = open_page(path).page
    routing = next(iter(ours.values()))
    expert = int(np.bincount(routing.indices.ravel(), minlength=4).argmax())
    page.locator("#legend button").nth(expert).click()
    fires = (routing.indices == expert).any(1).tolist()
    assert [e == expert for e in experts_of(colours(page))] == fires
    contexts = page.locator("#expert .contexts button")
    listed = [int(contexts.nth(i).get_attribute("data-token")) for i in range(contexts.count())]
    assert len(listed) == len(set(texts.ids[listed])) > 3
    assert all(fires[token] for token in listed)
    weight = np.where(routing.indices == expert, routing.weights, 0).max(1)
    assert listed[0] == int(weight.argmax())
    assert [float(contexts.nth(i).locator(".figure").inner_text()) for i in range(len(listed))] == pytest.approx(
        weight[listed].tolist(), abs=6e-4
    )
    _, times = np.unique(texts.ids[fires], return_counts=True)
    row = page.locator("#expert tbody tr").first.locator("td").all_inner_texts()
    assert int(row[1]) == times.max()
    assert page.locator("#expert .js-plotly-plot").count() == 2
    contexts.first.click()
    assert page.evaluate("document.querySelector('[aria-current]').token") == listed[0]
    assert page.locator("#tip").is_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    assert experts_of(colours(page)) == routing.indices[:, 0].tolist()
    assert page.locator("#clear").is_hidden()


def test_keyboard_alone(trained, open_page):
    path, texts, _, ours, _ = trained
    page = open_page(path).page
    page.locator("#layer").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#layer-name").inner_text() == "2 (MTP)"
    page.keyboard.press("ArrowLeft")
    assert page.locator("#layer-name").inner_text() == "1"
    page.locator("#text").focus()
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    first = next(iter(ours.values()))
    assert f"position {texts.position[3]} " in page.locator("#tip").inner_text()
    page.keyboard.press("ArrowLeft")
    assert [row[0] for row in tip_rows(page)] == [f"expert {e}" for e in first.indices[2]]
    page.keyboard.press("ArrowUp")
    assert page.locator("#layer-name").inner_text() == "2 (MTP)"
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert page.locator(f"#legend button[data-expert='{first.indices[2, 0]}']").get_attribute("aria-pressed") == "true"
    page.keyboard.press("End")
    assert page.evaluate("document.querySelector('[aria-current]').token") == len(texts.ids) - 1
    other = (int(first.indices[2, 0]) + 1) % 4
    page.locator("#legend button").nth(other).focus()
    page.keyboard.press("Enter")
    assert f"Expert {other} in layer 1" in page.locator("#expert").inner_text()


def test_charts_and_tables(trained, open_page):
    path, texts, tokenizer, ours, other = trained
    page = open_page(path).page
    assert page.locator("#load .js-plotly-plot, #load.js-plotly-plot").count() == 1
    first = next(iter(ours.values()))
    loads = page.evaluate("document.getElementById('load').data.map((trace) => trace.y)")
    by_text = [np.bincount(first.indices[texts.text == t].ravel(), minlength=4).tolist() for t in (0, 1)]
    assert loads[:2] == by_text
    heat = page.evaluate("document.getElementById('together').data[0].customdata")
    lens = build_lens("m", texts, ours, ("other", other))
    expected = next(iter(lens.measures.values())).lift
    for i in range(4):
        for j in range(4):
            if np.isnan(expected[i, j]):
                assert heat[i][j] is None
            elif 1 / 16 < expected[i, j] < 16:
                assert heat[i][j] == pytest.approx(expected[i, j], rel=0.012)
    titles = page.locator("#layers .gtitle").all_text_contents()
    assert len(titles) == page.locator("#layers .js-plotly-plot").count() == 5
    assert "Drift between the two models" in titles
    cells = page.locator("#measures table").last.locator("tbody tr").first.locator("td").all_inner_texts()
    drift = next(iter(lens.other.drifts.values()))
    assert cells[1:3] == [f"{100 * drift.overlap:.1f}%", f"{100 * drift.same_first:.1f}%"]
    changed = page.locator("#changed button")
    assert int(changed.first.get_attribute("data-token")) == page_data(lens, tokenizer)["changed"][0]


@pytest.mark.parametrize("mode", ["weight", "shared", "moved", "changed"])
def test_other_colours(trained, open_page, mode):
    path, _, _, ours, other = trained
    page = open_page(path).page
    page.select_option("#colour", mode)
    mine, theirs = next(iter(ours.values())), next(iter(other.values()))
    quarter = {
        "weight": mine.weights[:, 0] / mine.weights.max(),
        "shared": mine.shared,
        "moved": mine.moved / 2,
        "changed": 1 - np.array([len(set(a) & set(b)) / 2 for a, b in zip(mine.indices, theirs.indices, strict=True)]),
    }[mode]
    for names, share in zip(colours(page), quarter.tolist(), strict=True):
        if "off" in names.split():
            assert mode in ("moved", "changed")
            assert share == 0
        else:
            level = next(int(c[1:]) for c in names.split() if c[0] == "q")
            assert level == pytest.approx(share * 9, abs=0.55)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_token_can_be_read(trained, open_page, scheme):
    """Contrast of ink and expert colour, WCAG's 4.5 or more."""
    page = open_page(trained[0], color_scheme=scheme).page
    ratios = page.evaluate(
        """() => {
          const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
          const luminance = (color) => {
            canvas.fillStyle = getComputedStyle(document.body).backgroundColor; canvas.fillRect(0, 0, 1, 1);
            canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
            const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3)
              .map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          colours(256);
          const span = document.querySelector('#text .t'), out = [];
          const classes = Array.from({length: 256}, (_, e) => [`t e${e}`, `t e${e} q9`]).flat();
          for (const name of [...classes, 't q0', 't q9', 't off']) {
            span.className = name;
            const style = getComputedStyle(span);
            const [a, b] = [luminance(style.color), luminance(style.backgroundColor)];
            out.push((Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05));
          }
          return out;
        }"""
    )
    assert min(ratios) >= 4.5


def test_colours_of_neighbours_differ(trained, open_page):
    page = open_page(trained[0]).page
    backgrounds = page.evaluate(
        """() => {
          colours(256);
          const span = document.querySelector('#text .t'), style = getComputedStyle(span);
          return Array.from({length: 256}, (_, e) => (span.className = `t e${e}`, style.backgroundColor));
        }"""
    )
    assert len(set(backgrounds)) == 256


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_screen(trained, open_page, scheme):
    page = open_page(trained[0], viewport={"width": 400, "height": 800}, has_touch=True, color_scheme=scheme).page
    page.locator("#legend button").first.click()
    page.locator("#text .t").nth(12).tap()
    tip = page.locator("#tip").bounding_box()
    assert tip["x"] >= 0
    assert tip["x"] + tip["width"] <= 400
    assert page.evaluate("document.documentElement.scrollWidth") <= 400


def hostile_page(tmp_path, name="<script>&amp;\u202e"):
    tokenizer = byte_tokenizer()
    model = Transformer(ModelConfig.model_validate(MODEL), generator=torch.Generator().manual_seed(0))
    sources = [tmp_path / f"{name} {n}.txt" for n in (1, 2)]
    for source in sources:
        source.write_bytes(HOSTILE.encode())
    texts = read_texts(sources, tokenizer, 64)
    lens = build_lens(f"<b>{name}", texts, look(model, texts))
    page = tmp_path / "page.html"
    page.write_text(render_page("lens", f"Routing of {name}", page_data(lens, tokenizer)))
    return page


def test_text_is_never_markup(open_page, tmp_path):
    page = open_page(hostile_page(tmp_path)).page
    assert page.title() == "Routing of <script>&amp;\u202e"
    assert page.locator("#text script, #text img, #text b").count() == 0
    text = page.locator("#text").inner_text()
    for expected in (
        "</script><script>",
        "&amp; &lt; <b>bold</b>",
        "␀␇␛[31m",
        "[U+202E]gnol[U+202C]",
        "שלום עולם",
        "👩‍👩‍👧",
        "␍",
    ):
        assert expected in text
    for i in range(0, 200, 10):
        page.locator("#text .t").nth(i).hover()
    page.locator("#legend button").first.click()
    assert "<script>&amp;[U+202E] 1" in page.locator("#expert").inner_text()
    legend = page.locator("#load .legendtext").all_text_contents()
    assert legend[0].startswith("<script>&amp;")
    assert page.evaluate("document.title") != "taken"


@pytest.mark.parametrize("segments", [1, 2])
def test_one_expert_a_token_no_bias_nothing_shared(open_page, tmp_path, segments):
    shape = {"num_experts_per_tok": 1, "topk_method": "greedy", "n_shared_experts": 0, "segments": segments}
    config = ModelConfig.model_validate(MODEL | {"moe": MODEL["moe"] | shape})
    model = Transformer(config, generator=torch.Generator().manual_seed(0))
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    texts = read_texts([tmp_path / "a.txt"], byte_tokenizer(), 64)
    found = look(model, texts)
    path = tmp_path / "page.html"
    path.write_text(render_page("lens", "one", page_data(build_lens("m", texts, found), byte_tokenizer())))
    page = open_page(path).page
    assert page.locator("#colour option").all_inner_texts() == ["expert", "weight"]
    assert page.locator("#text .begins").count() == len(texts.windows()) - 1
    page.locator("#text .t").nth(5).hover()
    rows, chosen = tip_rows(page), next(iter(found.values())).indices[5]
    assert [row[-2] for row in rows] == [f"expert {e}" for e in chosen]
    assert ("goes to one expert" in page.locator("#together").inner_text()) == (segments == 1)
    if segments == 2:
        assert [row[0] for row in rows] == ["part 1", "part 2"]
    page.locator("#legend button").nth(int(chosen[0])).click()
    assert page.locator("#expert .contexts li").count() > 0


def test_a_long_text_and_many_experts_stay_quick(open_page, tmp_path):
    """No listener a token; a change of layer touches class names alone, 20,000 of them in well under a second."""
    shape = {"n_routed_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 4}
    config = ModelConfig.model_validate(MODEL | {"num_hidden_layers": 3, "moe": MODEL["moe"] | shape})
    model = Transformer(config, generator=torch.Generator().manual_seed(0))
    (tmp_path / "long.txt").write_text("the quick brown fox jumps over a lazy dog\n" * 500)
    texts = read_texts([tmp_path / "long.txt"], byte_tokenizer(), 128, 20_000)
    path = tmp_path / "page.html"
    path.write_text(
        render_page("lens", "long", page_data(build_lens("m", texts, look(model, texts)), byte_tokenizer()))
    )
    assert path.stat().st_size < 5e6
    page = open_page(path).page
    assert page.locator("#legend button").count() == 256
    before = colours(page)
    assert len(before) == 20_000
    page.evaluate("setLayer(1)")
    after = colours(page)
    assert sum(a != b for a, b in zip(before, after, strict=True)) > 15_000
