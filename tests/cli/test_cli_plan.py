"""``abyssal plan``: what it prints, and bad input in one line."""

import json
import re
import shlex
from importlib import resources

import pytest
import typer
from typer.testing import CliRunner

from abyssal.cli.plan import plan_command
from abyssal.errors import UserError
from abyssal.training.recipe import read_recipe

app = typer.Typer()
app.command()(plan_command)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.output


def fault(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, UserError)
    message = str(result.exception)
    assert "\n" not in message
    return message


def test_training_and_inference_and_time() -> None:
    out = run("deepseek-moe-16b", "--gpus", "8", "--gpu", "a100-40gb", "--tokens", "1B", "--gpu-hour", "2")
    for expected in (
        "GB are 10^9 bytes",
        "gathered blocks",
        "do not fit on one GPU",
        "layout: shard 8",
        "time:",
        "cost:",
    ):
        assert expected in out
    assert "inference, a GPU" in out


def test_lines_of_the_plan_fit_in_80_columns() -> None:
    out = run("deepseek-moe-16b", "--gpus", "8", "--gpu-memory", "40GB", "--tokens", "1B")
    assert max(len(line.rstrip()) for line in out.splitlines()) <= 88


def test_json() -> None:
    data = json.loads(run("demo", "--gpu", "h100", "--tokens", "1M", "--gpu-hour", "3", "--json"))
    training = data["training"]
    assert training["bytes"]["total"] == sum(v for k, v in training["bytes"].items() if k != "total")
    assert training["bytes"]["activations"] == sum(training["activations"].values())
    assert training["cost"] == pytest.approx(3 * training["gpu_hours"])
    seconds = training["gpu_hours"] * 3600
    assert seconds == pytest.approx(1e6 * training["flops_per_token"] / (989e12 * 0.4))
    assert training["seconds"] == pytest.approx(seconds)  # one GPU
    assert training["flops"] == 1e6 * training["flops_per_token"]
    assert not training["peak_is_assumed"]
    inference = data["inference"]
    assert inference["layout"] == {"tensor": 1, "expert": 1, "replicas": 1, "gpus": 1}
    assert {key: inference[key] for key in ("precision", "cache", "batch", "context", "chunk")} == {
        "precision": "bf16",
        "cache": "bf16",
        "batch": 1,
        "context": 1024,
        "chunk": 2048,
    }


def test_wall_clock_is_shared_by_gpus() -> None:
    data = json.loads(run("demo", "--gpu", "h100", "--gpus", "4", "--tokens", "1M", "--json"))["training"]
    assert data["seconds"] * 4 == pytest.approx(data["gpu_hours"] * 3600)


def test_without_a_card_s_name_the_speed_is_assumed_and_said() -> None:
    arguments = ("deepseek-moe-16b", "--gpus", "8", "--gpu-memory", "80GB", "--tokens", "1T", "--gpu-hour", "2")
    out = run(*arguments)
    for expected in ("FLOPs:  1.71e+22", "time:", "an assumed 312 TFLOP/s", "cost:", "--gpu NAME or --gpu-tflops"):
        assert expected in out
    data = json.loads(run(*arguments, "--json"))["training"]
    assert data["peak_is_assumed"]
    assert data["gpu_hours"] * 3600 == pytest.approx(data["flops"] / (312e12 * 0.4))
    assert "312 TFLOP/s" in run(*arguments[:5])  # no time: the layout's choice rests on it all the same
    assert "assumed" not in run("demo", "--gpu", "h100", "--tokens", "1M")


def test_inference_alone() -> None:
    out = run("deepseek-v3", "--gpus", "8", "--gpu", "h200", "--inference", "--batch", "4", "--context", "8192")
    assert "weights (FP8)" in out  # as published
    assert "training" not in out


def test_qlora() -> None:
    assert "NF4" in run("deepseek-v2-lite", "--gpu-memory", "24GB", "--qlora", "16")
    same = run("deepseek-v2-lite", "--gpu-memory", "24GB", "--lora", "16", "--frozen", "nf4")
    assert same == run("deepseek-v2-lite", "--gpu-memory", "24GB", "--qlora", "16")
    assert "int8 and BF16" in run("deepseek-v2-lite", "--gpu-memory", "40GB", "--lora", "16", "--frozen", "int8")


def test_esft() -> None:
    text = run("deepseek-v2-lite", "--gpu-memory", "80GB", "--esft", "0.1")
    assert "ESFT of 10.0% of the experts" in text
    assert "gradients" in text


def test_published() -> None:
    out = run("deepseek-moe-16b", "--published")
    assert "39.6 %" in out
    assert "≤ 40 GB" in out
    assert "none are kept for 'demo'" in fault("demo", "--published")


def test_published_beside_a_plan() -> None:
    arguments = ("deepseek-moe-16b", "--published", "--gpu", "h100", "--gpus", "8")
    out = run(*arguments)
    assert out.index("layout:") < out.index("39.6 %")
    assert "one micro-batch a step" in out
    data = json.loads(run(*arguments, "--json"))
    assert data["training"]
    assert [figure["unit"] for figure in data["published"]][:2] == ["B", "B"]
    result = CliRunner().invoke(app, ["demo", "--published", "--gpu", "h100"])
    assert isinstance(result.exception, UserError)
    assert result.output == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--gpu-memory: say how much"),
        (("--gpu-memory", "80 apples"), "--gpu-memory: '80 apples' is not a size"),
        (("--gpu", "h10"), "--gpu: 'h10' is not known (did you mean"),
        (("--gpu", "h100", "--gpus", "0"), "--gpus: 0"),
        (("--gpu", "h100", "--tokens", "lots"), "--tokens: 'lots'"),
        (("--gpu", "h100", "--mfu", "2"), "--mfu: 2"),
        (("--gpu", "h100", "--tokens", "1M", "--gpu-hour", "-1"), "--gpu-hour: -1"),
        (("--gpu", "h100", "--tokens", "1M", "--gpu-hour", "inf"), "--gpu-hour: inf"),
        (("--gpu", "h100", "--tokens", "1M", "--gpu-hour", "nan"), "--gpu-hour: nan"),
        (("--gpu", "h100", "--gpu-hour", "2"), "--gpu-hour: no effect without --tokens"),
        (("--gpu", "h100", "--adapt", "attention"), "--adapt: no effect without --lora or --qlora"),
        (("--gpu", "h100", "--inference", "--tokens", "1M", "--lora", "4"), "--tokens, --lora: no effect with"),
        (("--gpu", "h100", "--inference", "--state", "float32"), "--state: no effect with --inference"),
        (("--published", "--tokens", "1M"), "none are kept"),
        (("--gpu", "h100", "--gpu-tflops", "0"), "--gpu-tflops: 0"),
        (("--gpu", "h100", "--lora", "4", "--qlora", "4"), "take one of them"),
        (("--gpu", "h100", "--esft", "0.1", "--qlora", "4"), "--qlora 4 and --esft 0.1: take one of them"),
        (("--gpu", "h100", "--esft", "1.5"), "--esft: 1.5 is not above 0 and at most 1"),
        (("--gpu", "h100", "--qlora", "4", "--frozen", "int8"), "--frozen: no effect without --lora"),
        (("--gpu", "h100", "--lora", "4", "--adapt", "atention"), "did you mean 'attention'"),
        (("--gpu", "h100", "--inference", "--context", "99999"), "--context: 99999"),
        (("--gpu", "h100", "--inference", "--batch", "0"), "--batch: 0"),
        (("--gpu", "h100", "--inference", "--chunk", "0"), "--chunk: 0"),
        (
            (
                "--gpu-memory",
                "1MB",
            ),
            "does not fit",
        ),
    ],
)
def test_bad_input(arguments: tuple[str, ...], message: str) -> None:
    assert message in fault("demo", *arguments)


def test_communication_by_axis() -> None:
    arguments = ("deepseek-v2-lite", "--gpus", "16", "--gpu", "h100", "--shard", "16", "--expert", "8")
    shown, data = run(*arguments), json.loads(run(*arguments, "--json"))["training"]["communication"]
    assert list(data) == ["shard", "expert", "batch"]
    for axis in ("shard 16", "expert 8", "batch"):
        assert re.search(rf"^{axis} +[\d,]+ +[\d.,e-]+ +[\d.,e-]+ +[\d.e-]+$", shown, re.MULTILINE)
    assert data["expert"]["sent"] == data["expert"]["payload"] * 7 / 8
    assert "seconds if nothing is overlapped" in shown


@pytest.mark.parametrize("alone", [("--gpus", "1"), ("--gpus", "8", "--lora", "8")])
def test_where_nothing_is_sent_nothing_is_said(alone: tuple[str, ...]) -> None:
    assert "communication" not in run("demo", *alone, "--gpu", "h100")


@pytest.mark.parametrize("name", ["v2-lite", "v3"])
def test_recipes_say_what_their_plan_is(name: str) -> None:
    """The layout is the plan's, by the command that stands in the recipe, and so are the figures."""
    text = (resources.files("abyssal.training") / "recipes" / f"{name}.yaml").read_text()
    recipe = read_recipe(name)
    said = re.search(r"^# abyssal plan (.*)$", text, re.MULTILINE)
    assert said is not None
    plan = json.loads(run(*shlex.split(said[1]), "--json"))["training"]
    setup, layout = plan["setup"], plan["layout"]
    assert {axis: getattr(recipe.parallel, axis) for axis in layout if axis != "gpus"} | {
        "gpus": layout["gpus"]
    } == layout
    assert setup["sequence"] == recipe.training.sequence_length
    assert setup["micro_batch"] * recipe.parallel.data == recipe.training.batch_size
    assert setup["accumulate"] == recipe.training.accumulate
    assert setup["recompute"] == recipe.training.recompute
    assert setup["state"] == recipe.optimizer.state
    assert f"{plan['bytes']['total'] / 1e9:.1f} of 76 GB" in text
    assert f"a step sends {sum(axis['sent'] for axis in plan['communication'].values()) / 1e9:,.0f} GB" in text
