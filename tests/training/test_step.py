"""The step with BF16 weights beside plain autocast; and the step that does not know yet whether it was finite."""

import copy
import math

import pytest
import torch
from tiny_runs import MODEL, same, tensors_of, tiny_trainer

from abyssal.config import resolve_model
from abyssal.data.loader import Batch
from abyssal.errors import UserError
from abyssal.generation import generate
from abyssal.kernels.adamw import adamw_reference_
from abyssal.model import Transformer
from abyssal.training.hardware import autocast
from abyssal.training.loss import compute_losses, total_loss
from abyssal.training.recipe import BalanceConfig, OptimizerConfig
from abyssal.training.step import NotFinite, TrainingStep

CPU = torch.device("cpu")


def build(dtype: torch.dtype = torch.bfloat16, tied: bool = False, **optimizer: object) -> TrainingStep:
    config = resolve_model({**MODEL, "tie_word_embeddings": tied})
    return TrainingStep(
        Transformer(config, generator=torch.Generator().manual_seed(0)),
        optimizer=OptimizerConfig(**{"lr": 1e-3, **optimizer}),
        balance=BalanceConfig.model_validate("bias_sign"),
        clip=0.5,
        mtp_weight=0.3,
        device=CPU,
        dtype=dtype,
    )


def batches(count: int, seed: int = 0) -> list[Batch]:
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, 258, (count, 2, 18), generator=g)
    return [Batch(t, torch.zeros_like(t)) for t in tokens]


class Captured(Exception):
    pass


def gradients(step: TrainingStep, given: list[Batch]) -> tuple[float, dict[str, torch.Tensor]]:
    """The scale that the optimizer got, and the gradients before it ran."""
    seen: list[float] = []
    real, step.optimizer.step = step.optimizer.step, seen.append
    drop, step.optimizer.zero_grad = step.optimizer.zero_grad, lambda **_: None
    step(given, 16, 1e-3, 0.0)
    found = {name: p.grad for name, p in step.model.named_parameters()}
    drop()
    step.optimizer.step, step.optimizer.zero_grad = real, drop
    return seen[0], found


class TestBFloat16Weights:
    @pytest.mark.parametrize("tied", [False, True])
    def test_gradients_are_those_of_autocast(self, tied):
        """Which casts FP32 weights to BF16 for each product. (Half-way weights round otherwise: one in 65,536.)"""
        step, plain = build(tied=tied), build(torch.float32, tied=tied).model
        batch = batches(1)[0]
        scale, found = gradients(step, [batch])
        with autocast(CPU, torch.bfloat16):
            losses = compute_losses(plain, batch, 16)
        total_loss(losses, losses.counts, 0.3).backward()
        for name, p in plain.named_parameters():
            error = (found[name].float() - p.grad).norm() / p.grad.norm()
            assert error < 0.01, name
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in plain.parameters()))
        assert scale == pytest.approx(min(0.5 / norm, 1), rel=1e-3)

    def test_micro_batches_are_added_in_float32(self):
        step = build()
        given = batches(5)
        sums: dict[str, torch.Tensor] = {}
        counts = 5 * 2 * 16
        for batch in given:
            with autocast(CPU, torch.bfloat16):
                losses = compute_losses(step.model, batch, 16)
            total_loss(losses, [counts] * 2, 0.3).backward()
            for name, p in step.model.named_parameters():
                assert p.grad.dtype == p.dtype
                sums[name] = sums.get(name, 0) + p.grad.float()
                p.grad = None
        _, found = gradients(step, given)
        for name in sums:
            assert found[name].dtype == torch.float32
            if name == "lm_head.weight":  # used twice in a pass, whose own sum is BF16 above
                assert (found[name] - sums[name]).norm() < 0.004 * sums[name].norm()
            else:
                assert torch.equal(found[name], sums[name]), name
        _, found = gradients(step, given[:1])
        assert found["lm_head.weight"].dtype == torch.bfloat16

    def test_masters_move_where_weights_cannot_show_it(self):
        step = build(lr=1e-6)
        before = step.model.lm_head.weight.detach().clone()
        low = step.optimizer.state[step.model.lm_head.weight]["low"].clone()
        step(batches(1), 16, 1e-6, 0.0)
        moved = step.optimizer.state[step.model.lm_head.weight]["low"]
        assert (moved != low).float().mean() > 0.9
        assert torch.equal(step.model.lm_head.weight, before) or (
            (step.model.lm_head.weight != before).float().mean() < 0.2
        )

    def test_gradients_are_gone_after_a_step(self):
        step = build()
        for count in (1, 2, 1):
            step(batches(count), 16, 1e-3, 0.0)
            assert all(p.grad is None for p in step.model.parameters())

    def test_finishing_in_between_changes_nothing(self):
        left, right = build(), build()
        for i in range(3):
            left(batches(1, i), 16, 1e-3, 0.0)
            right(batches(1, i), 16, 1e-3, 0.0)
            right.finish()
            assert all(p.dtype == torch.float32 for p in right.model.parameters())
        left.finish()
        for (name, a), b in zip(left.model.named_parameters(), right.model.parameters(), strict=True):
            assert torch.equal(a, b), name

    def test_float32_stays(self):
        step = build(torch.float32)
        step(batches(2), 16, 1e-3, 0.0)
        assert all(p.dtype == torch.float32 for p in step.model.parameters())
        assert not any("low" in state for state in step.optimizer.state.values())


class TestTrainerInBFloat16:
    @pytest.mark.parametrize("attention", ["mla", "mha", "separate_latents"])
    def test_validates_and_writes_samples_meanwhile(self, data, tmp_path, attention):
        if attention == "mha":
            heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "bias": True}
            data["model"] = {**MODEL, "attention": {"kind": "mha", **heads}, "rope": {"layout": "halves"}}
        elif attention == "separate_latents":
            latents = {k: v for k, v in MODEL["attention"].items() if k != "kv_lora_rank"}
            data["model"] = {**MODEL, "attention": {**latents, "kind": attention, "k_lora_rank": 8, "v_lora_rank": 8}}
        data["training"] |= {"dtype": "bfloat16", "steps": 4}
        data["samples"] = {"every": 2, "prompts": ["the ", "a longer prompt "], "tokens": 4}
        trainer = tiny_trainer(data, tmp_path / "run")
        assert trainer.model.lm_head.weight.dtype == torch.bfloat16
        assert trainer.train()
        records = trainer.run.metrics()
        assert [r["step"] for r in records if r["kind"] == "samples"] == [2, 4]
        # … and afterwards the model is of one dtype again.
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
        assert isinstance(generate(trainer.model, trainer.tokenizer, "the ", max_new_tokens=3), str)
        whole = copy.deepcopy(trainer.model).to(torch.bfloat16)
        assert isinstance(generate(whole, trainer.tokenizer, "the ", max_new_tokens=3), str)

    def test_an_error_leaves_float32_weights_too(self, data, tmp_path):
        data["training"] |= {"dtype": "bfloat16"}
        trainer = tiny_trainer(data, tmp_path / "run")
        trainer.model.lm_head.weight.data.fill_(math.nan)
        with pytest.raises(UserError, match="step 1: the loss is nan"):
            trainer.train()
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
class TestNotWaiting:
    """What a GPU does, done on a CPU."""

    @pytest.fixture(autouse=True)
    def one_arithmetic(self, monkeypatch):
        """Without a compiler, a scale that is a number lets torch's own AdamW do the work, which rounds otherwise."""
        monkeypatch.setattr("abyssal.training.optimizer.adamw_", adamw_reference_)

    @pytest.mark.parametrize("name", ["adamw", "muon"])
    def test_is_the_same_step(self, dtype, name):
        left, right = build(dtype, name=name), build(dtype, name=name)
        right._waits = False
        for i in range(4):
            a, b = (step(batches(2, i), 16, 1e-2, 0.0) for step in (left, right))
            assert (a.loss, a.mtp_loss, a.balance_loss, a.grad_norm) == (
                b.loss,
                b.mtp_loss,
                b.balance_loss,
                b.grad_norm,
            )
        left.finish(), right.finish()
        for (key, a), b in zip(left.model.named_parameters(), right.model.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, msg=lambda m, n=key: n + m)
        for layer, router in left.model.routers.items():
            assert torch.equal(router.e_score_correction_bias, right.model.routers[layer].e_score_correction_bias)

    @pytest.mark.parametrize("name", ["adamw", "muon"])
    @pytest.mark.parametrize("what", ["loss", "gradient norm"])
    def test_nothing_changes_from_the_first_bad_step_on(self, dtype, name, what):
        step = build(dtype, name=name)
        step._waits = False
        step(batches(1, 0), 16, 1e-2, 0.0).check()
        norm = step.model.model.norm.weight
        if what == "gradient norm":
            hook = norm.register_hook(lambda grad: grad * math.inf)
        else:
            kept = norm.detach().clone()
            norm.data.fill_(math.inf)
        states = [_snapshot(step)]
        bad = step(batches(1, 1), 16, 1e-2, 0.0)
        states.append(_snapshot(step))
        if what == "gradient norm":
            hook.remove()
        else:
            norm.data.copy_(kept)
            states = [{k: v for k, v in s.items() if k != "model.model.norm.weight"} for s in states]
        good = step(batches(1, 2), 16, 1e-2, 0.0)  # finite again, but nobody has looked yet
        after = _snapshot(step)
        for key, value in states[0].items():
            assert torch.equal(value.nan_to_num(), states[1][key].nan_to_num()), key
            assert torch.equal(value.nan_to_num(), after[key].nan_to_num()), key
        good.check()
        with pytest.raises(NotFinite, match=what):
            bad.check()

    def test_the_trainer_names_the_step_when_it_logs(self, dtype, data, tmp_path):
        data["training"]["dtype"] = str(dtype).removeprefix("torch.")
        data |= {"log": {"every": 4}, "checkpoint": {"every": 4}, "validation": {"every": 8}}
        trainer = tiny_trainer(data, tmp_path / "run")
        trainer._step._waits = False
        real, done = trainer.step, []

        def poisoned():
            done.append(1)
            if len(done) == 6:
                trainer.model.model.norm.weight.data.fill_(math.nan)
            return real()

        trainer.step = poisoned
        with pytest.raises(UserError, match="step 6: the loss is nan"):
            trainer.train()
        assert len(done) == 8
        assert trainer.run.steps() == [4]

    def test_a_whole_run_is_the_same(self, dtype, data, tmp_path):
        data["training"]["dtype"] = str(dtype).removeprefix("torch.")
        runs = []
        for name in ("waits", "not"):
            trainer = tiny_trainer(data, tmp_path / name, log={"every": 4}, training__clip=1e9)
            trainer._step._waits = name == "waits"
            trainer.train()
            runs.append(tensors_of(trainer))
        assert same(*runs)


def _snapshot(step: TrainingStep) -> dict[str, torch.Tensor]:
    out = {f"model.{k}": v for k, v in step.model.state_dict().items()}
    for name, p in step.model.named_parameters():
        out |= {f"{name}.{k}": v for k, v in step.optimizer.state[p].items() if k != "step"}
    return {k: v.detach().clone() for k, v in out.items()}
