"""One training step, and what ends a run: loads, accumulation, recomputation, numbers not finite, full disks."""

import errno
import math

import pytest
import torch
from safetensors.torch import save_file
from tiny_runs import build_recipe, figures, same, tensors_of, tiny_trainer

import abyssal
import abyssal.checkpoint.folder
from abyssal.data.loader import Batch
from abyssal.errors import UserError
from abyssal.model import RoutingRecorder, Transformer
from abyssal.training.evaluate import Evaluation
from abyssal.training.start import resume
from abyssal.training.step import TrainingStep
from abyssal.training.trainer import Watcher, build_loader


class Hook(Watcher):
    """Calls ``action(step)`` after every step."""

    def __init__(self, action):
        self.action = action

    def step(self, step, steps, record):
        self.action(step)


class TestStep:
    def test_load_is_that_of_all_micro_batches(self, data, tmp_path):
        trainer = tiny_trainer(data, tmp_path / "run", balance="none", training__accumulate=3)
        model = Transformer(trainer.model.config, generator=torch.Generator().manual_seed(1234))
        loader = build_loader(trainer.recipe, model.config, trainer.loader.shards)
        recorder = RoutingRecorder()
        for _ in range(3):
            batch = loader.next()
            with torch.no_grad():
                hidden = model.hidden(batch.tokens[:, :16], recorder=recorder)
                model.mtp_hidden(hidden, batch.tokens[:, :17], recorder=recorder)
        expected = {}
        for layer, routings in recorder.routings.items():
            counts = [0] * 4
            for routing in routings:
                for expert in routing.indices.flatten().tolist():
                    counts[expert] += 1
            expected[layer] = counts
        loads = trainer.step().loads
        assert set(expected) == {1, 2}
        assert {layer: load.tolist() for layer, load in loads.items()} == expected
        assert all(sum(load) == 3 * 2 * 16 * 2 for load in expected.values())

    def test_the_bias_moves_by_the_whole_steps_load(self, data, tmp_path):
        trainer = tiny_trainer(data, tmp_path / "run", balance={"bias_sign": {"rate": 0.25}})
        expected = {layer: torch.zeros(4) for layer in (1, 2)}
        for _ in range(3):
            loads = trainer.step().loads
            for layer, load in loads.items():
                mean = load.sum().item() / 4
                expected[layer] += torch.tensor([0.25 * ((mean > x) - (mean < x)) for x in load.tolist()])
                assert torch.equal(trainer.model.routers[layer].e_score_correction_bias, expected[layer])
        assert any(bias.abs().max() > 0 for bias in expected.values())

    def test_recomputation_changes_nothing(self, data, tmp_path):
        """Each token is routed and counted once, also when activations are computed again (NeMo Automodel #3140)."""
        balance = "bias_sign+sequence_loss"
        results = []
        for recompute in (False, True):
            trainer = tiny_trainer(
                data,
                tmp_path / f"run-{recompute}",
                balance=balance,
                training__recompute=recompute,
                checkpoint__every=100,
            )
            steps = [trainer.step() for _ in range(4)]
            results.append((steps, tensors_of(trainer)))
        (plain, state), (again, state_again) = results
        for left, right in zip(plain, again, strict=True):
            assert (left.loss, left.mtp_loss, left.balance_loss, left.grad_norm) == (
                right.loss,
                right.mtp_loss,
                right.balance_loss,
                right.grad_norm,
            )
            assert all(torch.equal(left.loads[layer], right.loads[layer]) for layer in (1, 2))
            assert right.loads[1].sum() == 2 * 2 * 16 * 2
        assert same(state, state_again)

    @pytest.mark.parametrize("balance", ["none", "sequence_loss"])
    def test_accumulating_is_a_larger_batch(self, data, tmp_path, balance):
        """The corpus has borders, so the micro-batches count different numbers of targets."""
        gradients = []
        for size, accumulate in ((2, 2), (4, 1)):
            trainer = tiny_trainer(
                data,
                tmp_path / f"run-{size}",
                balance=balance if balance == "none" else {balance: {"alpha": 0.5}},
                training__batch_size=size,
                training__accumulate=accumulate,
                training__clip=1e9,
            )
            captured = {}
            trainer.model.double()
            trainer.optimizer.step = lambda scale, c=captured, t=trainer: c.update(
                {n: p.grad.clone() for n, p in t.model.named_parameters()}
            )
            result = trainer.step()
            gradients.append((result, captured))
        (small, a), (large, b) = gradients
        assert small.loss == pytest.approx(large.loss, rel=1e-6)
        assert small.balance_loss == pytest.approx(large.balance_loss, rel=1e-6)
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-6, atol=1e-9)

    def test_gradients_are_clipped(self, data, tmp_path):
        trainer = tiny_trainer(data, tmp_path / "run", training__clip=0.01)
        seen = []
        trainer.optimizer.step = lambda scale: seen.append(
            scale * math.sqrt(sum(p.grad.double().pow(2).sum().item() for p in trainer.model.parameters()))
        )
        norm = trainer.step().grad_norm
        assert norm > 0.01
        assert seen == [pytest.approx(0.01, rel=1e-3)]

    def test_the_learning_rate_reaches_the_optimizer(self, data, tmp_path):
        trainer = tiny_trainer(data, tmp_path / "run", schedule={"warmup": 2}, optimizer__lr=0.5)
        assert trainer.step().lr == 0.25
        assert {group["lr"] for group in trainer.optimizer.param_groups} == {0.25}

    def test_the_auxiliary_loss_is_in_the_gradient_and_not_in_the_loss(self, data, tmp_path):
        results, routers = [], []
        for alpha in (None, 10.0):
            balance = "none" if alpha is None else {"token_loss": {"alpha": alpha}}
            trainer = tiny_trainer(data, tmp_path / f"run-{alpha}", balance=balance)
            trainer.optimizer.step = lambda scale, t=trainer: routers.append(t.model.routers[1].weight.grad.clone())
            results.append(trainer.step())
        assert results[0].loss == results[1].loss
        assert results[0].balance_loss == 0 < results[1].balance_loss
        assert not torch.equal(routers[0], routers[1])

    def test_two_copies_of_a_seed_are_equal_and_another_seed_is_not(self, data, tmp_path):
        losses = []
        for i, seed in enumerate((1, 1, 2)):
            trainer = tiny_trainer(data, tmp_path / f"run-{i}", training__seed=seed)
            losses.append([trainer.step().loss for _ in range(2)])
        assert losses[0] == losses[1] != losses[2]


class TestLearning:
    def test_the_loss_falls(self, data, tmp_path):
        trainer = tiny_trainer(data, tmp_path / "run", training__steps=30, validation__every=30, checkpoint__every=30)
        first = trainer.step().loss
        trainer.done = 1
        assert trainer.train()
        assert first == pytest.approx(math.log(258), rel=0.02)
        assert trainer.run.metrics()[-3]["loss"] < first - 1


class TestNotFinite:
    def fails(self, trainer, match):
        with pytest.raises(UserError, match=match) as caught:
            trainer.train()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    @pytest.mark.parametrize("value", [math.inf, math.nan])
    def test_weights(self, data, tmp_path, value):
        def poison(step):
            if step == 4:
                trainer.model.lm_head.weight.data.fill_(value)
                states.append(tensors_of(trainer))

        states = []
        trainer = tiny_trainer(data, tmp_path / "run", options={"watcher": Hook(poison)})
        message = self.fails(trainer, r"step 5: the loss is (nan|inf)")
        assert str(trainer.run.checkpoint(3)) in message
        assert {r["step"] for r in trainer.run.metrics() if r["kind"] == "train"} == {1, 2, 3, 4}
        assert trainer.run.steps() == [3]
        now = tensors_of(trainer)  # step 5 moved nothing: neither weights nor moments nor biases
        assert all(torch.equal(states[0][key].nan_to_num(), now[key].nan_to_num()) for key in states[0])
        model, _ = abyssal.load(trainer.run.path)
        assert all(p.isfinite().all() for p in model.parameters())

    def test_gradients(self, data, tmp_path):
        def poison(step):
            if step == 1:
                trainer.model.lm_head.weight.register_hook(lambda grad: grad * math.inf)
                states.append(tensors_of(trainer))

        states = []
        trainer = tiny_trainer(data, tmp_path / "run", options={"watcher": Hook(poison)})
        message = self.fails(trainer, "step 2: the gradient norm is")
        assert "no checkpoint yet" in message
        assert trainer.run.steps() == []
        assert same(states[0], tensors_of(trainer))

    def test_validation(self, data, tmp_path, monkeypatch):
        """A step with a finite loss can still ruin the weights; the checkpoint after it must not be written."""
        trainer = tiny_trainer(data, tmp_path / "run")
        losses = iter([3.0, math.nan])
        monkeypatch.setattr("abyssal.training.trainer.evaluate", lambda *_, **__: Evaluation(next(losses), 1.0, 10))
        self.fails(trainer, "step 6: the validation loss is nan")
        assert trainer.run.steps() == [3]
        assert trainer.run.state(3)["best"] == {"step": 3, "loss": 3.0}


class TestFullDisk:
    @pytest.mark.parametrize("file", ["model.safetensors", "training.safetensors"])
    def test_in_the_middle_of_a_checkpoint(self, data, tmp_path, monkeypatch, file):
        whole = tiny_trainer(data, tmp_path / "whole")
        whole.train()

        def no_space(tensors, path, metadata=None):
            save_file(tensors, path, metadata=metadata)
            if path.name == file and "step-00000006" in str(path):
                with path.open("r+b") as stream:
                    stream.truncate(path.stat().st_size // 2)
                raise OSError(errno.ENOSPC, "No space left on device", str(path))

        trainer = tiny_trainer(data, tmp_path / "run")
        with monkeypatch.context() as patched:
            patched.setattr(abyssal.checkpoint.folder, "save_file", no_space)
            with pytest.raises(OSError, match="No space left"):
                trainer.train()
        checkpoints = tmp_path / "run" / "checkpoints"
        assert [p.name for p in checkpoints.iterdir()] == ["step-00000003"]
        abyssal.load(checkpoints / "step-00000003")
        resumed = resume(tmp_path / "run", None)
        assert resumed.done == 3
        assert resumed.train()
        assert same(tensors_of(whole), tensors_of(resumed))
        assert figures(whole.run.metrics()) == figures(resumed.run.metrics())


def test_batches_are_moved_as_a_whole():
    batch = Batch(torch.ones(1, 2, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int64))
    moved = batch.to("meta")
    assert moved.tokens.device.type == moved.documents.device.type == "meta"


def test_a_second_trainer_may_not_write_there(data, tmp_path):
    trainer = tiny_trainer(data, tmp_path / "run")
    with pytest.raises(UserError, match="another process is training"):
        resume(tmp_path / "run", None)
    with pytest.raises(UserError, match="another process is training"):
        tiny_trainer(data, tmp_path / "run", {"overwrite": True})
    assert trainer.train()
    assert resume(tmp_path / "run", build_recipe(data)).done == 8


def test_training_in_fp8_learns_and_what_it_saves_is_an_ordinary_model(data, tmp_path):
    """The recipe's reference, in FP32 products: it needs no hardware."""
    losses = {}
    for fp8 in (True, False):
        trainer = tiny_trainer(data, tmp_path / f"run-{fp8}", training__fp8=fp8, training__dtype="float32")
        assert trainer.train()
        names = {type(module).__name__ for module in trainer.model.modules()}
        assert fp8 == ("FP8TrainingLinear" in names) == ("FP8TrainingExperts" in names)
        losses[fp8] = [record["loss"] for record in trainer.run.metrics() if record["kind"] == "train"]
    assert losses[True] != losses[False]  # something was rounded
    assert losses[True] == pytest.approx(losses[False], rel=0.01)
    model, _ = abyssal.load(tmp_path / "run-True")
    assert not any(type(module).__name__.startswith("FP8") for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_model_that_is_bfloat16_already_trains_on_float32_masters(data, tmp_path, dtype):
    trainer = tiny_trainer(data, tmp_path / "run")
    model = Transformer(trainer.model.config, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    step = TrainingStep(
        model,
        optimizer=trainer.recipe.optimizer,
        balance=trainer.recipe.balance,
        clip=1.0,
        mtp_weight=0.3,
        device=torch.device("cpu"),
        dtype=dtype,
    )
    losses = [step([trainer.loader.next()], 16, 1e-2, 0.0).loss for _ in range(5)]
    assert losses[-1] < losses[0]
    assert model.lm_head.weight.dtype == dtype
    assert model.model.embed_tokens.weight.dtype == torch.float32
