"""A run that was interrupted and resumed is, bit for bit, the run that was not."""

import json
import os
import shutil

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import build_recipe, figures, same, tensors_of, tiny_recipe, tiny_trainer, write_corpus

import abyssal
from abyssal.checkpoint import read_tensors, write_tensors
from abyssal.checkpoint.run import Run
from abyssal.data.tokenizer import train_bpe
from abyssal.errors import UserError
from abyssal.training.evaluate import Evaluation
from abyssal.training.start import newest_run, resume
from abyssal.training.trainer import Watcher

BALANCES = {
    "none": "none",
    "bias_sign": "bias_sign",
    "bias_proportional": {"bias_proportional": {"rate": 0.5, "every": 3}},
    "token_loss": {"token_loss": {"alpha": 0.1}},
    "sequence_loss": {"sequence_loss": {"alpha": 0.1}},
    "all": {
        "bias_sign": {"rate": 0.01},
        "bias_proportional": {"rate": 0.5, "every": 4},
        "token_loss": {"alpha": 0.1},
        "sequence_loss": {"alpha": 0.1},
    },
}


class Killed(Exception):
    pass


class KillAfter(Watcher):
    """Ends the run hard after a step: nothing is saved any more."""

    def __init__(self, step):
        self.last = step

    def step(self, step, steps, record):
        if step == self.last:
            raise Killed


def stop_after(step):
    """A should_stop that says so once ``step`` steps are done."""
    asked = []

    def should_stop():
        asked.append(1)
        return len(asked) == step

    return {"should_stop": should_stop}


def covered(records: list[dict]) -> list[int]:
    """The steps that train records account for, in order, each as often as it is counted."""
    return [s for r in records if r["kind"] == "train" for s in range(r["step"] - r["steps"] + 1, r["step"] + 1)]


@pytest.mark.parametrize("name", BALANCES)
def test_stopped_killed_and_resumed(data, tmp_path, name):
    """Stopped after step 2, killed after step 5 (the last checkpoint is of step 3), stopped after 7, then to the end.

    With accumulation, an MTP module and recomputation; 3 and 4, the balancers' intervals, divide none of these.
    """
    data["balance"] = BALANCES[name]
    data["checkpoint"] = {"every": 3, "keep": 9}
    whole = tiny_trainer(data, tmp_path / "whole")
    assert whole.train()

    path = tmp_path / "run"
    assert not tiny_trainer(data, path, stop_after(2)).train()
    killed = resume(path, None, watcher=KillAfter(5))
    assert killed.done == 2
    with pytest.raises(Killed):
        killed.train()
    stopped = resume(path, build_recipe(data), **stop_after(4))
    assert stopped.done == 3
    assert not stopped.train()
    last = resume(path, None)
    assert last.done == 7
    assert last.train()

    assert figures(last.run.metrics()) == figures(whole.run.metrics())
    assert covered(last.run.metrics()) == list(range(1, 9))
    assert same(tensors_of(last), tensors_of(whole))
    assert last.tokens == whole.tokens == 8 * 2 * 2 * 16
    assert last.best == whole.best


def test_the_bias_moved(data, tmp_path):
    """Else the test above would compare zeros with zeros."""
    data["balance"] = BALANCES["bias_proportional"]
    trainer = tiny_trainer(data, tmp_path / "run")
    trainer.train()
    biases = [r["layers"]["1"]["bias"] for r in trainer.run.metrics() if r["kind"] == "train"]
    assert [any(bias) for bias in biases] == [False, False, *[True] * 6]
    assert biases[2] == biases[4] != biases[5]


def test_bfloat16_resumes_in_bfloat16(data, tmp_path):
    data["training"]["dtype"] = "bfloat16"
    tiny_trainer(data, tmp_path / "run", stop_after(1)).train()
    trainer = resume(tmp_path / "run", None)
    assert str(trainer.dtype) == "torch.bfloat16"


class TestOptimizers:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("state", ["float32", "bfloat16", "8bit"])
    @pytest.mark.parametrize("name", ["adamw", "muon"])
    def test_stopped_and_resumed(self, data, tmp_path, name, state, dtype):
        """Weights, with every bit of a BF16 weight's master, and moments: as without an interruption."""
        data["optimizer"] = {"lr": 1e-2, "name": name, "state": state}
        data["training"] |= {"dtype": dtype, "steps": 5, "batch_size": 1}
        data |= {"validation": {"every": 100, "batches": 1}, "checkpoint": {"every": 100}}
        whole = tiny_trainer(data, tmp_path / "whole")
        assert whole.train()
        tiny_trainer(data, tmp_path / "run", stop_after(2)).train()
        last = resume(tmp_path / "run", None)
        assert last.done == 2
        assert (last.model.lm_head.weight.dtype == torch.bfloat16) == (dtype == "bfloat16")
        assert last.train()
        assert figures(last.run.metrics()) == figures(whole.run.metrics())
        assert same(tensors_of(last), tensors_of(whole))

    def test_a_checkpoint_is_as_it_always_was(self, data, tmp_path):
        """FP32 weights, and FP32 moments under the names that earlier versions wrote and read: nothing else."""
        data["training"]["dtype"] = "bfloat16"
        trainer = tiny_trainer(data, tmp_path / "run", stop_after(2))
        trainer.train()
        folder = trainer.run.checkpoint(2)
        written = read_tensors(folder / "training.safetensors")
        names = [name for name, _ in trainer.model.named_parameters()]
        keys = ("step", "exp_avg", "exp_avg_sq")
        assert {k for k in written if k.startswith("optimizer.")} == {f"optimizer.{k}.{n}" for n in names for k in keys}
        assert all(x.dtype == torch.float32 for k, x in written.items() if k.startswith("optimizer."))
        assert all(written[f"optimizer.step.{name}"] == 2 for name in names)
        weights = read_tensors(folder / "model.safetensors")
        assert all(x.dtype == torch.float32 for x in weights.values())
        # Masters: FP32 numbers of which BF16 could not show most.
        head = weights["lm_head.weight"]
        assert (head != head.bfloat16().float()).float().mean() > 0.9
        assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "float32"

    def test_moments_of_another_kind(self, data, tmp_path):
        path = tmp_path / "run"
        tiny_trainer(data, path, stop_after(2)).train()
        file = Run(path).checkpoint(2) / "training.safetensors"
        tensors = read_tensors(file)
        for damage, match in (
            (lambda x: x.bfloat16(), r"optimizer\.exp_avg\.lm_head\.weight: torch\.bfloat16 \[258, 32\], expected"),
            (lambda x: x[:-1], r"optimizer\.exp_avg\.lm_head\.weight: torch\.float32 \[257, 32\], expected"),
        ):
            changed = damage(tensors["optimizer.exp_avg.lm_head.weight"])
            write_tensors(tensors | {"optimizer.exp_avg.lm_head.weight": changed}, file)
            with pytest.raises(UserError, match=match):
                resume(path, None)
        del tensors["optimizer.exp_avg.lm_head.weight"]
        write_tensors(tensors, file)
        with pytest.raises(UserError, match=r"no optimizer\.exp_avg\.lm_head\.weight"):
            resume(path, None)


class TestMetrics:
    @pytest.mark.parametrize("log", [1, 2, 5])
    def test_no_step_is_missing_or_twice(self, data, tmp_path, log):
        data |= {"log": {"every": log}, "checkpoint": {"every": 4}, "validation": {"every": 7}}
        data["training"]["steps"] = 12
        with pytest.raises(Killed):
            tiny_trainer(data, tmp_path / "run", {"watcher": KillAfter(8 if log > 1 else 6)}).train()
        trainer = resume(tmp_path / "run", None)
        assert trainer.done in (4, 7)
        trainer.train()
        assert covered(trainer.run.metrics()) == list(range(1, 13))
        assert [r["step"] for r in trainer.run.metrics() if r["kind"] == "validation"] == [7, 12]

    def test_a_record_of_several_steps(self, data, tmp_path):
        one = tiny_trainer(data, tmp_path / "one")
        many = tiny_trainer(
            data, tmp_path / "many", log={"every": 100}, checkpoint={"every": 8}, validation={"every": 8}
        )
        one.train(), many.train()
        single = [r for r in one.run.metrics() if r["kind"] == "train"]
        (record,) = [r for r in many.run.metrics() if r["kind"] == "train"]
        assert (record["step"], record["steps"]) == (8, 8)
        assert record["loss"] == pytest.approx(sum(r["loss"] for r in single) / 8)
        assert record["mtp_loss"][0] == pytest.approx(sum(r["mtp_loss"][0] for r in single) / 8)
        for layer in ("1", "2"):
            columns = zip(*(r["layers"][layer]["load"] for r in single), strict=True)
            assert record["layers"][layer]["load"] == [sum(column) for column in columns]
            cvs = [r["layers"][layer]["cv"] for r in single]
            assert record["layers"][layer]["cv"] == pytest.approx(sum(cvs) / 8)
        assert record["grad_norm"] == single[-1]["grad_norm"]
        assert record["lr"] == single[-1]["lr"]

    def test_a_line_cut_in_the_middle_is_dropped(self, data, tmp_path):
        path = tmp_path / "run"
        tiny_trainer(data, path, stop_after(4)).train()
        file = path / "metrics.jsonl"
        text = file.read_text()
        file.write_text(text + text.splitlines()[0][: len(text.splitlines()[0]) // 2])
        before = Run(path).metrics()
        assert covered(before) == [1, 2, 3, 4]
        trainer = resume(path, None)
        trainer.train()
        for line in file.read_text().splitlines():
            json.loads(line)
        assert covered(trainer.run.metrics()) == list(range(1, 9))


class TestKept:
    @settings(max_examples=5)
    @given(
        losses=st.lists(st.integers(1, 50), min_size=6, max_size=6, unique=True),
        keep=st.integers(1, 3),
        every=st.integers(1, 3),
    )
    def test_the_last_ones_and_the_best(self, tmp_path_factory, losses, keep, every):
        folder = tmp_path_factory.mktemp("kept")
        data = tiny_recipe(folder)
        data["checkpoint"] = {"every": every, "keep": keep}
        data["validation"] = {"every": 1}
        data["training"] |= {"steps": 6, "accumulate": 1, "sequence_length": 4, "batch_size": 1}
        seen = {}

        class Capture(Watcher):
            def validated(self, step, evaluation):
                seen[step] = tensors_of(trainer)

        trainer = tiny_trainer(data, folder / "run", {"watcher": Capture()})
        values = iter(losses)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(
                "abyssal.training.trainer.evaluate", lambda *_, **__: Evaluation(float(next(values)), 1.0, 1)
            )
            trainer.train()
        best = losses.index(min(losses)) + 1
        # Saved: every so many steps, at the end, and whenever a validation was the best so far.
        saved = [s for s in range(1, 7) if s % every == 0 or s == 6 or losses[s - 1] == min(losses[:s])]
        assert trainer.run.steps() == sorted({*saved[-keep:], best})
        assert trainer.run.best() == best
        assert not list((folder / "run" / "checkpoints").glob("*.partial"))
        model, tokenizer = abyssal.load(folder / "run")
        expected = {k.removeprefix("model."): v for k, v in seen[best].items() if k.startswith("model.")}
        assert same(dict(model.state_dict()), expected)
        assert tokenizer.fingerprint == trainer.tokenizer.fingerprint


def test_the_best_before_an_interruption_is_not_forgotten(data, tmp_path, monkeypatch):
    losses = iter([1.0, 3.0, 2.0, 4.0, 5.0, 6.0])
    monkeypatch.setattr("abyssal.training.trainer.evaluate", lambda *_, **__: Evaluation(next(losses), 1.0, 1))
    data |= {"validation": {"every": 1}, "checkpoint": {"every": 1, "keep": 1}}
    data["training"]["steps"] = 6
    tiny_trainer(data, tmp_path / "run", stop_after(2)).train()
    trainer = resume(tmp_path / "run", None)
    assert trainer.best == {"step": 1, "loss": 1.0}
    trainer.train()
    assert trainer.run.steps() == [1, 6]
    assert trainer.run.best() == 1


class TestRefused:
    @pytest.fixture
    def path(self, data, tmp_path):
        path = tmp_path / "run"
        tiny_trainer(data, path, stop_after(2)).train()
        return path

    @pytest.mark.parametrize(
        ("changes", "key"),
        [
            ({"optimizer__lr": 0.5}, "optimizer.lr"),
            ({"optimizer__name": "muon"}, "optimizer.name"),
            ({"optimizer__state": "8bit"}, "optimizer.state"),
            ({"balance": "none"}, "balance.bias_sign"),
            ({"training__seed": 5}, "training.seed"),
            ({"training__accumulate": 1}, "training.accumulate"),
            ({"schedule": {"warmup": 1}}, "schedule.warmup"),
        ],
    )
    def test_another_recipe(self, data, path, changes, key):
        with pytest.raises(UserError, match=f"another recipe: {key}"):
            resume(path, build_recipe(data, **changes))

    def test_what_may_change(self, data, path):
        recipe = build_recipe(
            data,
            name="other",
            training__steps=5,
            validation={"every": 2},
            samples={"every": 1, "prompts": []},
            checkpoint={"every": 1, "keep": 1},
            log={"every": 2},
        )
        trainer = resume(path, recipe)
        assert trainer.train()
        assert trainer.done == 5
        assert trainer.run.steps()[-1] == 5
        assert yaml.safe_load((path / "recipe.yaml").read_text())["training"]["steps"] == 5

    def test_another_tokenizer(self, path, tmp_path):
        train_bpe(["some other text, some other tokens"], 270).save(path)
        with pytest.raises(UserError, match=r"tokenizer\.json: not the tokenizer that this run began with"):
            resume(path, None)

    def test_another_corpus(self, data, path, tmp_path):
        write_corpus(tmp_path / "corpus.txt", seed=1)
        with pytest.raises(UserError, match=r"data\.source: .*corpus\.txt has changed"):
            resume(path, None)

    def test_another_model_in_the_checkpoint(self, path):
        config = Run(path).checkpoint(2) / "config.json"
        content = json.loads(config.read_text())
        content["num_experts_per_tok"] = 1
        config.write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"config\.json: not the model that .*recipe\.yaml describes"):
            resume(path, None)

    @pytest.mark.parametrize("file", ["model.safetensors", "training.safetensors", "state.json"])
    @pytest.mark.parametrize("damage", ["cut", "missing"])
    def test_a_damaged_checkpoint(self, path, file, damage):
        target = Run(path).checkpoint(2) / file
        if damage == "cut":
            target.write_bytes(target.read_bytes()[: target.stat().st_size // 2])
        else:
            target.unlink()
        with pytest.raises(UserError, match=file.replace(".", r"\.")) as caught:
            resume(path, None)
        assert "\n" not in str(caught.value)

    def test_refusing_changes_no_file(self, data, path):
        before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file() and p.name != ".lock"}
        with pytest.raises(UserError):
            resume(path, build_recipe(data, optimizer__lr=0.5))
        with pytest.raises(UserError, match=r"samples\.prompts"):
            resume(path, None, {"samples": {"prompts": ["x" * 500]}})
        assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file() and p.name != ".lock"} == before


def test_without_a_checkpoint_it_begins_again(data, tmp_path):
    with pytest.raises(Killed):
        tiny_trainer(data, tmp_path / "run", {"watcher": KillAfter(2)}).train()
    trainer = resume(tmp_path / "run", None)
    assert trainer.done == 0
    trainer.train()
    assert covered(trainer.run.metrics()) == list(range(1, 9))


def test_newest_run(data, tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir()
    recipe = build_recipe(data)
    with pytest.raises(UserError, match=r"no run in .* fits"):
        newest_run(folder, recipe)
    for name, changes, when in (("old", {}, 100), ("new", {}, 300), ("other", {"optimizer__lr": 0.5}, 500)):
        trainer = tiny_trainer(data, folder / name, stop_after(1), **changes)
        trainer.train()
        os.utime(trainer.run.checkpoint(1) / "state.json", (when, when))
    assert newest_run(folder, recipe) == folder / "new"
    os.utime(folder / "old" / "checkpoints" / "step-00000001" / "state.json", (400, 400))
    assert newest_run(folder, recipe) == folder / "old"
    (folder / "old" / "recipe.yaml").write_text("name: [")  # damaged: no candidate
    assert newest_run(folder, recipe) == folder / "new"
    shutil.copytree(folder / "new", folder / "half.partial")  # what a kill leaves behind is none either
    shutil.rmtree(folder / "new")
    with pytest.raises(UserError, match=r"no run in .* fits"):
        newest_run(folder, recipe)
