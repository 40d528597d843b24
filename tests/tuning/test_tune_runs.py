"""Whole tuning runs of a tiny model: what is trained and what is not, what is saved and how it is found again."""

import json
import shutil

import pytest
import torch
from tiny_runs import figures, same, tensors_of
from tiny_tuning import continued, tune_recipe, tuner, write_base, write_pairs, write_questions

from abyssal import load
from abyssal.checkpoint.run import read_metrics
from abyssal.errors import UserError
from abyssal.model.partial import PartialExperts

METHODS = {
    "full": {"method": "full"},
    "lora": {"method": "lora"},
    "esft": {"method": "esft", "esft__p": 0.5},
    "shared": {"method": "esft", "esft__shared": True, "balance": "bias_sign"},
    "muon": {"method": "full", "optimizer__name": "muon", "training__mtp_weight": 0.3},
}


@pytest.fixture
def base(tmp_path):
    return write_base(tmp_path)


@pytest.fixture
def questions(tmp_path):
    return write_questions(tmp_path / "questions.jsonl")


def losses(path):
    return [r["loss"] for r in read_metrics(path / "metrics.jsonl") if r["kind"] == "train"]


@pytest.mark.parametrize("name", METHODS)
def test_learns_and_resumes_bit_for_bit(tmp_path, base, questions, name):
    recipe = tune_recipe(base, questions, **METHODS[name])
    whole = tuner(recipe, tmp_path / "whole")
    assert whole.train()
    seen = losses(tmp_path / "whole")
    assert len(seen) == 6
    assert seen[-1] < seen[0]

    stopped = tuner(recipe, tmp_path / "stopped", should_stop=lambda: True)
    assert not stopped.train()
    assert stopped.done == 1
    again = continued(tmp_path / "stopped")
    assert again.done == 1
    assert again.train()
    assert same(tensors_of_trained(whole), tensors_of_trained(again))
    records = [figures(read_metrics(tmp_path / run / "metrics.jsonl")) for run in ("whole", "stopped")]
    assert records[0] == records[1]


def tensors_of_trained(trainer):
    trained = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    out = tensors_of_all(trainer)
    assert trained
    return out


def tensors_of_all(trainer):
    for parameter in trainer.model.parameters():
        if not parameter.requires_grad:
            trainer.optimizer.state.pop(parameter, None)
    return tensors_of(trainer)


@pytest.mark.parametrize("name", METHODS)
def test_only_what_is_to_be_trained_changes(tmp_path, base, questions, name):
    trainer = tuner(tune_recipe(base, questions, **METHODS[name]), tmp_path / "run")
    model = trainer.model
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    biases = {n: b.clone() for n, b in model.named_buffers() if n.endswith("bias")}
    assert trainer.train()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed <= {n for n, p in model.named_parameters() if p.requires_grad}
    moved = any(not torch.equal(b, biases[n]) for n, b in model.named_buffers() if n in biases)
    assert moved == (name == "shared")  # only there a balancer was asked for
    if name == "lora":
        assert changed
        assert all("lora_" in n for n in changed)
        assert not any(n.startswith("model.layers.2.") for n in changed)  # the MTP module
    elif name in ("esft", "shared"):
        chosen = json.loads((tmp_path / "run" / "esft.json").read_text())["experts"]["1"]
        module = model.get_submodule("model.layers.1.mlp.experts")
        assert isinstance(module, PartialExperts)
        assert sorted(module.trained) == sorted(chosen)
        expected = {"model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"}
        assert expected <= changed
        assert {n for n in changed - expected if ".shared_experts." not in n} == set()
        assert (len(changed) > 2) == (name == "shared")
    else:
        deep = {n for n in changed if n.startswith("model.layers.2.")}
        assert bool(deep) == (name == "muon")  # MTP modules are trained where their loss has a weight
        assert len(changed) > 20


@pytest.mark.parametrize("name", METHODS)
def test_the_run_is_a_model(tmp_path, base, questions, name):
    """``load`` gives the tuned model from the run's folder, whatever its checkpoints hold."""
    trainer = tuner(
        tune_recipe(base, questions, checkpoint__every=6, validation__every=6, **METHODS[name]), tmp_path / "run"
    )
    assert trainer.train()
    tokens = torch.randint(2, 258, (2, 20), generator=torch.Generator().manual_seed(0))
    trainer.model.eval()
    with torch.no_grad():
        expected = trainer.model(tokens)
        model, tokenizer = load(tmp_path / "run")
        torch.testing.assert_close(model(tokens), expected, rtol=1e-5, atol=1e-5)
        untouched, _ = load(base)
        assert not torch.allclose(untouched(tokens), expected, atol=1e-4)
    assert tokenizer is not None
    assert tokenizer.chat is not None


def test_preferences(tmp_path, base):
    data = write_pairs(tmp_path / "pairs.jsonl")
    recipe = tune_recipe(base, data, training__steps=20, validation__every=10, optimizer__lr=2e-2)
    whole = tuner(recipe, tmp_path / "whole")
    assert whole.train()
    records = [r for r in read_metrics(tmp_path / "whole" / "metrics.jsonl") if r["kind"] == "train"]
    assert records[0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # ln 2: nothing is preferred yet
    assert records[0]["margin"] == pytest.approx(0, abs=1e-4)
    assert records[-1]["margin"] > 0.05
    validation = [r for r in read_metrics(tmp_path / "whole" / "metrics.jsonl") if r["kind"] == "validation"]
    assert validation[-1]["bits_per_byte"] is None
    assert 0 <= validation[-1]["accuracy"] <= 1

    # The reference is read and not worked out anew: by now the model is another.
    stopped = tuner(recipe, tmp_path / "stopped", should_stop=lambda: True)
    assert not stopped.train()
    again = continued(tmp_path / "stopped")
    assert torch.equal(again.parts.objective.reference, whole.parts.objective.reference)
    assert again.train()
    assert same(tensors_of_trained(whole), tensors_of_trained(again))


def test_another_base_or_other_data_is_told(tmp_path, base, questions):
    tuner(tune_recipe(base, questions), tmp_path / "run", should_stop=lambda: True).train()
    write_questions(questions, seed=1)
    with pytest.raises(UserError, match="data: not what this run began with"):
        continued(tmp_path / "run")
    write_questions(questions)
    (base / "config.json").write_text(
        (base / "config.json").read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05')
    )
    with pytest.raises(UserError, match="base: not what this run began with"):
        continued(tmp_path / "run")


def test_other_weights_of_the_same_shapes_are_told(tmp_path, base, questions):
    tuner(tune_recipe(base, questions), tmp_path / "run", should_stop=lambda: True).train()
    other = write_base(tmp_path / "other", seed=9)
    shutil.copy(other / "model.safetensors", base / "model.safetensors")
    with pytest.raises(UserError, match="weights: not what this run began with"):
        continued(tmp_path / "run")


def test_a_base_that_was_moved_is_named_anew(tmp_path, base, questions, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tuner(tune_recipe("base", "questions.jsonl"), tmp_path / "run", should_stop=lambda: True).train()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert continued(tmp_path / "run").done == 1  # paths were made absolute
    base.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="base"):
        continued(tmp_path / "run")
    assert continued(tmp_path / "run", {"base": str(tmp_path / "moved")}).done == 1


@pytest.mark.parametrize("name", ["lora", "esft"])
def test_a_tuned_model_that_is_not_whole_is_no_base(tmp_path, base, questions, name):
    tuner(tune_recipe(base, questions, **METHODS[name]), tmp_path / "run").train()
    with pytest.raises(UserError, match="tuned, and not whole; merge it first: abyssal export"):
        tuner(tune_recipe(tmp_path / "run", questions), tmp_path / "again")


def test_experts_begin_with_the_files_own_numbers(tmp_path, base, questions):
    """Also where products are BF16 and the file is FP32."""
    recipe = tune_recipe(base, questions, method="esft", esft__p=0.5, training__dtype="bfloat16", optimizer__lr=1e-30)
    assert tuner(recipe, tmp_path / "run").train()
    model, _ = load(tmp_path / "run")
    untouched, _ = load(base)
    for (name, got), (_, expected) in zip(model.named_parameters(), untouched.named_parameters(), strict=True):
        assert torch.equal(got, expected), name


def test_a_training_run_and_a_tuning_run_are_not_confused(tmp_path, base, questions):
    from abyssal.training.start import resume

    tuner(tune_recipe(base, questions), tmp_path / "run", should_stop=lambda: True).train()
    with pytest.raises(UserError, match="a run of abyssal tune; continue it with: abyssal tune --resume"):
        resume(tmp_path / "run", None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "full", "weights": "nf4"}, "weights: nf4 holds what is not trained"),
        ({"method": "esft", "training__fp8": True}, "training.fp8: only for method=full"),
        ({"balance": "bias_sign"}, "balance: an adapter has no place for the routers' biases"),
        ({"optimizer__name": "muon"}, "optimizer.name: muon is for whole matrices"),
        (
            {"training__sequence_length": 4096},
            "sequence_length: 4096 is more than the model's max_position_embeddings 128",
        ),
        ({"lora__rank": 0}, "lora.rank"),
        ({"lora__ranks": 3}, "lora.ranks"),
        ({"esft__p": 1.5}, "esft.p"),
        ({"dpo__beta": 0}, "dpo.beta"),
        ({"method": "qlora"}, "method"),
    ],
)
def test_settings_that_do_not_go_together(tmp_path, base, questions, changes, message):
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        tune_recipe(base, questions, **changes)


def test_too_few_examples_and_ranks_too_large_write_nothing(tmp_path, base):
    few = write_questions(tmp_path / "few.jsonl", count=3)
    with pytest.raises(UserError, match="leaves none to validate on"):
        tuner(tune_recipe(base, few, data__validation_fraction=0.0), tmp_path / "run")
    with pytest.raises(UserError, match="rank: 100 is larger than a side of model"):
        tuner(tune_recipe(base, few, data__validation_fraction=0.4, lora__rank=100), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_epochs_are_turned_into_steps(tmp_path, base, questions):
    recipe = tune_recipe(base, questions, training__steps=0, training__epochs=2)
    trainer = tuner(recipe, tmp_path / "run")
    rows = trainer.loader.epoch_rows
    assert trainer.recipe.training.steps == -(-2 * rows // 2)
    assert trainer.recipe.model["vocab_size"] == 258
