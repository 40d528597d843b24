"""The report in a browser: of one run, of several, of names and samples that mean harm, and while a run trains."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import yaml
from tiny_runs import tiny_recipe, tiny_trainer

from abyssal.analysis.report import report

HOSTILE = "<img src=x onerror=\"document.title='owned'\"></script><script>document.title='owned'</script>&amp;<b>"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 24 steps: a layer of experts and an MTP module's, samples of two prompts at three steps."""
    folder = tmp_path_factory.mktemp("trained")
    data = tiny_recipe(folder)
    data["training"] |= {"steps": 24, "accumulate": 1}
    data["samples"] = {"every": 8, "prompts": ["the ", "a fox "], "tokens": 12}
    data["balance"] = {"bias_sign": {"rate": 0.01}}
    tiny_trainer(data, folder / "run").train()
    shutil.rmtree(folder / "run" / "checkpoints")
    return folder / "run"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Reports by the runs that they are on: making one takes a second."""
    return tmp_path_factory.mktemp("reports"), {}


@pytest.fixture
def open_report(open_page, written):
    """``open_report(*runs, **context options)`` -> the page of a report on them."""
    folder, files = written

    def open_(*runs, **options):
        if runs not in files:
            files[runs] = folder / f"{len(files)}.html"
            files[runs].write_text(report(list(runs)))
        return open_page(files[runs], **options).page

    return open_


def records(run, kind):
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in found if record["kind"] == kind]


def scroll_through(page) -> None:
    """Brings every chart into view, and waits until it is drawn."""
    for name in page.eval_on_selector_all(".chart", "all => all.map((one) => one.dataset.chart)"):
        page.locator(f'[data-chart="{name}"]').scroll_into_view_if_needed()
        page.wait_for_selector(f'[data-chart="{name}"] svg.main-svg', timeout=20_000)


def drawn(page, section) -> list[str]:
    return page.eval_on_selector_all(
        f"{section} .chart:has(svg.main-svg)", "all => all.map((one) => one.dataset.chart)"
    )


def traces(page, name) -> list[dict]:
    """What Plotly drew in a chart."""
    return page.evaluate(
        "(name) => document.querySelector(`[data-chart='${name}']`).data.map(({x, y, z, name}) => ({x, y, z, name}))",
        name,
    )


def wait_until(page, condition: str) -> None:
    """Until the JavaScript expression ``condition`` holds. Playwright's own wait_for_function evaluates text in the
    page, which the page's content security policy forbids."""
    page.evaluate(
        "async () => { const end = Date.now() + 60000; "
        f"while (!({condition})) {{ if (Date.now() > end) throw new Error('in vain'); "
        "await new Promise((go) => setTimeout(go, 20)); } }"
    )


def hover(page, name, fraction=0.5) -> str:
    """Holds the mouse over a chart and gives what the tooltip says, a line each."""
    chart = page.locator(f'[data-chart="{name}"]')
    chart.scroll_into_view_if_needed()
    page.wait_for_selector(f'[data-chart="{name}"] svg.main-svg')
    box = chart.locator(".nsewdrag").first.bounding_box()
    page.mouse.move(box["x"] + 2, box["y"] + 2)
    page.mouse.move(box["x"] + fraction * box["width"], box["y"] + box["height"] / 2, steps=4)
    page.wait_for_selector(f'[data-chart="{name}"] .hoverlayer text')
    return "\n".join(chart.locator(".hoverlayer text, .hoverlayer tspan").all_text_contents())


def overflow(page) -> int:
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


class TestOneRun:
    def test_charts_are_drawn_when_they_are_looked_at(self, open_report, trained):
        page = open_report(trained, viewport={"width": 1000, "height": 500})
        assert drawn(page, "#layers") == []
        scroll_through(page)
        names = ["loss", "bits_per_byte", "mtp_loss", "lr", "grad_norm", "tokens_per_s", "memory"]
        assert drawn(page, "#training") == names
        assert drawn(page, "#curves") == ["0/cv", "0/max_vio", "0/dead"]
        assert drawn(page, "#layers") == ["0/1/load", "0/1/bias", "0/2/load", "0/2/bias"]
        assert page.locator("#layers .heatmaplayer image").count() == 2
        assert page.inner_text("h1") == "run"
        assert "24 of 24" in page.inner_text("#figures")

    def test_what_is_drawn_is_what_was_measured(self, open_report, trained):
        page = open_report(trained)
        scroll_through(page)
        train = records(trained, "train")
        for layer in ("1", "2"):
            (heatmap,) = traces(page, f"0/{layer}/load")
            loads = [record["layers"][layer]["load"] for record in train]
            assert heatmap["x"] == [record["step"] for record in train]
            assert heatmap["z"] == [[round(load[e] * 4 / sum(load), 2) for load in loads] for e in range(4)]
        assert traces(page, "loss")[0]["y"] == pytest.approx([record["loss"] for record in train], rel=1e-4)
        bits = [record["bits_per_byte"] for record in records(trained, "validation")]
        assert traces(page, "bits_per_byte")[0]["y"] == pytest.approx(bits, rel=1e-4)

    def test_hovering(self, open_report, trained):
        page = open_report(trained)
        train = records(trained, "train")
        tooltip = hover(page, "loss")
        losses = [f"{record['loss']:.5g}" for record in train]
        assert any(loss in tooltip for loss in losses)
        tooltip = hover(page, "0/2/load")
        expert, step, value = re.search(r"^expert (\d), step (\d+)\n([\d.]+) × the mean$", tooltip, re.M).groups()
        load = next(record for record in train if record["step"] == int(step))["layers"]["2"]["load"]
        assert float(value) == pytest.approx(load[int(expert)] * 4 / sum(load), abs=0.0051)

    def test_choosing_a_layer(self, open_report, trained):
        page = open_report(trained)
        select = page.get_by_label("layer", exact=True)
        assert select.locator("option").all_text_contents() == ["all", "layer 1", "layer 2 (MTP)"]
        select.select_option("layer 2 (MTP)")
        scroll_through(page)
        assert drawn(page, "#layers") == ["0/2/load", "0/2/bias"]
        assert "layer 2 (MTP): load" in page.locator('[data-chart="0/2/load"] .gtitle').text_content()
        page.get_by_label("layer before").click()
        assert select.input_value() == "1"
        scroll_through(page)
        assert drawn(page, "#layers") == ["0/1/load", "0/1/bias"]
        select.select_option("all")
        scroll_through(page)
        assert len(drawn(page, "#layers")) == 4

    def test_choosing_samples(self, open_report, trained):
        page = open_report(trained)
        taken = {record["step"]: record["samples"] for record in records(trained, "samples")}
        assert list(taken) == [8, 16, 24]

        def shown():
            return page.locator("#samples .text").evaluate_all("all => all.map((one) => one.textContent)")

        assert shown() == [sample["prompt"] + sample["text"] for sample in taken[24]]
        page.get_by_label("step", exact=True).select_option("8")
        assert shown() == [sample["prompt"] + sample["text"] for sample in taken[8]]
        page.get_by_label("next step").click()
        assert shown() == [sample["prompt"] + sample["text"] for sample in taken[16]]

    def test_the_config(self, open_report, trained):
        page = open_report(trained)
        assert page.locator("pre.recipe").text_content() == (trained / "recipe.yaml").read_text()
        assert "4 routed, 2 a token, 1 shared" in page.inner_text("#config")

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_light_and_dark(self, open_report, trained, scheme):
        page = open_report(trained, color_scheme=scheme)
        scroll_through(page)
        ground, ink = page.evaluate(
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
        )
        label = page.locator('[data-chart="loss"] .gtitle').evaluate("one => getComputedStyle(one).fill")
        even = page.evaluate("document.querySelector(`[data-chart='0/1/load']`).data[0].colorscale[1][1]")

        def brightness(colour):
            numbers = [int(x) for x in re.findall(r"\d+", colour)[:3]]
            return sum(numbers) / 3

        assert label == ink
        assert (brightness(ground) < 60 < 200 < brightness(ink)) == (scheme == "dark")
        assert (even == "#f7f7f7") == (scheme == "light")
        # Who changes while the page is open has it changed.
        page.emulate_media(color_scheme="light" if scheme == "dark" else "dark")
        wait_until(page, f"document.querySelector(`[data-chart='0/2/load']`).data[0].colorscale[1][1] !== '{even}'")

    @pytest.mark.parametrize("width", [320, 400])
    def test_a_narrow_screen(self, open_report, trained, width):
        page = open_report(trained, viewport={"width": width, "height": 800})
        scroll_through(page)
        assert overflow(page) <= 0
        for box in page.eval_on_selector_all(".chart", "all => all.map((one) => one.getBoundingClientRect().right)"):
            assert box <= width

    def test_a_model_without_experts(self, open_report, tmp_path):
        data = tiny_recipe(tmp_path)
        data["model"] = {**data["model"], "moe": None, "mtp": {"num_nextn_predict_layers": 0}}
        data["training"] |= {"steps": 3, "accumulate": 1}
        data |= {"schedule": {}, "balance": "none", "samples": {"every": 100, "prompts": []}}
        tiny_trainer(data, tmp_path / "dense").train()
        page = open_report(tmp_path / "dense")
        assert page.inner_text("#no-experts") == "This model has no experts."
        assert page.inner_text("#samples") == "No samples were taken."
        assert page.locator("#curves .chart, #layers .chart").count() == 0
        scroll_through(page)
        assert "mtp_loss" not in drawn(page, "#training")


class TestText:
    def test_what_means_harm_is_text(self, open_report, trained, tmp_path):
        hostile = tmp_path / "<b>one<img src=x onerror=document.title=1>"
        shutil.copytree(trained, hostile)
        lines = [json.dumps({"kind": "samples", "step": 25, "samples": [{"prompt": HOSTILE, "text": HOSTILE}]})]
        lines.append(json.dumps({"kind": HOSTILE * 2, "step": HOSTILE}))
        lines.append(json.dumps({"kind": "train", "step": HOSTILE}))
        with (hostile / "metrics.jsonl").open("a") as file:
            file.write("".join(line + "\n" for line in lines))
        recipe = yaml.safe_load((hostile / "recipe.yaml").read_text())
        recipe["name"] = HOSTILE
        (hostile / "recipe.yaml").write_text(yaml.safe_dump(recipe, width=1000))
        manifest = json.loads((hostile / "run.json").read_text())
        manifest["hardware"]["device_name"] = HOSTILE
        (hostile / "run.json").write_text(json.dumps(manifest))

        for runs in ((hostile,), (hostile, trained)):
            page = open_report(*runs)
            page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
            scroll_through(page)
            assert page.locator("main img, main b, main script").count() == 0
            assert page.title().startswith("abyssal: <b>one<img")
            assert HOSTILE * 2 in page.locator("#samples").text_content()
            assert HOSTILE in page.locator("#figures").text_content()
            assert HOSTILE in page.locator("#config").text_content()
            assert 'step: "<img src=x' in page.locator("#notes").text_content().replace("'<img", '"<img')
        # In charts, too: the legend shows the name as it is.
        assert hostile.name[:10] in page.locator('[data-chart="lr"] .legend').text_content()
        assert HOSTILE in page.locator("#differences").text_content()


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Another model: three layers, six experts, no MTP; so layer 2 is an ordinary one."""
    folder = tmp_path_factory.mktemp("other")
    data = tiny_recipe(folder)
    moe = {**data["model"]["moe"], "n_routed_experts": 6}
    data["model"] = {**data["model"], "num_hidden_layers": 3, "moe": moe, "mtp": {"num_nextn_predict_layers": 0}}
    data["training"] |= {"steps": 10, "accumulate": 1}
    data["samples"] = {"every": 8, "prompts": ["a fox ", "the tea "], "tokens": 12}
    tiny_trainer(data, folder / "run").train()
    return folder / "run"


class TestSeveralRuns:
    def test_overlaid(self, open_report, trained, other):
        page = open_report(trained, other)
        scroll_through(page)
        names = [f"{trained.parent.name}/run", f"{other.parent.name}/run"]
        assert page.locator("#figures th").all_text_contents() == ["", *names]
        assert [trace["name"] for trace in traces(page, "lr")] == names
        assert [len(trace["x"]) for trace in traces(page, "lr")] == [24, 10]
        assert [trace["name"] for trace in traces(page, "mtp_loss")] == names[:1]
        assert [trace["name"] for trace in traces(page, "all/2/cv")] == names
        rows = page.locator("#differences tr").evaluate_all(
            "all => all.map((row) => [...row.cells].map((c) => c.textContent))"
        )
        assert ["training.steps", "24", "10"] in rows
        assert ["model.moe.n_routed_experts", "4", "6"] in rows
        assert not any(row[0] == "optimizer.lr" for row in rows)

    def test_choosing_a_run(self, open_report, trained, other):
        page = open_report(trained, other)
        scroll_through(page)
        assert len(traces(page, "0/2/load")[0]["z"]) == 4
        page.get_by_label("run", exact=True).select_option(f"{other.parent.name}/run")
        scroll_through(page)
        assert drawn(page, "#curves") == ["1/cv", "1/max_vio", "1/dead"]
        assert len(traces(page, "1/2/load")[0]["z"]) == 6
        assert page.locator('[data-chart="0/2/load"]').count() == 0

    def test_samples_side_by_side(self, open_report, trained, other):
        page = open_report(trained, other)
        page.get_by_label("step", exact=True).select_option("8")
        ours, theirs = (
            {
                s["prompt"]: s["prompt"] + s["text"]
                for r in records(run, "samples")
                if r["step"] == 8
                for s in r["samples"]
            }
            for run in (trained, other)
        )
        rows = page.locator("#samples .side").evaluate_all(
            "all => all.map((row) => [...row.querySelectorAll('.text, p')].map((one) => one.textContent))"
        )
        none = "no such sample at this step"
        assert rows == [[ours["the "], none], [ours["a fox "], theirs["a fox "]], [none, theirs["the tea "]]]

    def test_a_narrow_screen(self, open_report, trained, other):
        page = open_report(trained, other, viewport={"width": 400, "height": 800})
        scroll_through(page)
        assert overflow(page) <= 0


# Trains on only when told to, one line a step, so that nothing here depends on how fast a machine is.
SLOWLY = """
import sys
from abyssal.analysis import live
from abyssal.cli import main
from abyssal.cli.progress import ConsoleWatcher

live._AT_LEAST, live._SHARE = 0.0, 1.0
step = ConsoleWatcher.step
def wait(self, *arguments):
    step(self, *arguments)
    sys.stdin.readline()
ConsoleWatcher.step = wait
sys.argv = ["abyssal", *sys.argv[1:]]
main()
"""

POINTS = "(document.querySelector('[data-chart=loss]')?.data?.[0].x.length ?? 0)"


class TestLive:
    @pytest.fixture
    def training(self, tmp_path):
        """A child process that trains 8 steps, one for each line on its stdin; its page's address."""
        data = tiny_recipe(tmp_path)
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(data))
        arguments = ["train", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "run"), "--live", "--port", "0"]
        child = subprocess.Popen(
            [sys.executable, "-c", SLOWLY, *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            url = next(line.split()[-1] for line in child.stdout if line.startswith("live page "))
            yield child, url
        finally:
            child.kill()
            child.wait()

    def go_on(self, child, steps):
        child.stdin.write("\n" * steps)
        child.stdin.flush()

    def test_it_grows_and_is_finished(self, training, open_page):
        child, url = training
        page = open_page(url).page
        wait_until(page, f"{POINTS} >= 1")
        assert page.inner_text("#state") == "live: this page follows the training"
        self.go_on(child, 3)
        wait_until(page, f"{POINTS} >= 4")
        assert "4 of 8" in page.inner_text("#figures")
        scroll_through(page)
        assert len(traces(page, "0/1/load")[0]["x"]) == 4
        # What was zoomed in on and what was chosen stays.
        page.evaluate("Plotly.relayout(document.querySelector('[data-chart=loss]'), {'xaxis.range': [1, 3]})")
        page.get_by_label("layer", exact=True).select_option("layer 1")
        page.locator("[data-chart=loss]").scroll_into_view_if_needed()  # what is out of sight is not drawn
        self.go_on(child, 2)
        wait_until(page, f"{POINTS} >= 6")
        assert page.evaluate("document.querySelector('[data-chart=loss]').layout.xaxis.range") == [1, 3]
        assert page.get_by_label("layer", exact=True).input_value() == "1"
        child.communicate("\n" * 8, timeout=60)
        assert child.returncode == 0
        page.wait_for_selector("#state[data-state=finished]")
        wait_until(page, f"{POINTS} >= 8")
        assert page.locator("#samples .text").count() == 1  # taken at the end

    def test_stopped(self, training, open_page):
        child, url = training
        page = open_page(url).page
        wait_until(page, f"{POINTS} >= 1")
        child.send_signal(signal.SIGTERM)
        child.communicate("\n" * 8, timeout=60)
        assert child.returncode == 143
        page.wait_for_selector("#state[data-state=stopped]")

    def test_killed(self, training, chromium):
        child, url = training
        context = chromium.new_context()
        page = context.new_page()
        page.goto(url)
        wait_until(page, f"{POINTS} >= 1")
        child.kill()
        page.wait_for_selector("#state[data-state=lost]")
        assert page.inner_text("#state") == "connection lost — showing the last state"
        assert page.evaluate(POINTS) >= 1
        context.close()
