"""Each balancer against numbers worked out by hand, and against plain loops in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import MODEL, build_recipe

from abyssal.config import parse, resolve_model
from abyssal.errors import UserError
from abyssal.model import Routing, RoutingRecorder, Transformer
from abyssal.model.router import Router
from abyssal.training.balance import AuxiliaryLoss, BiasProportional, BiasSign, build_balancers
from abyssal.training.optimizer import build_optimizer
from abyssal.training.recipe import BalanceConfig, OptimizerConfig


def router_of(experts: int) -> Router:
    moe = resolve_model({**MODEL, "moe": {**MODEL["moe"], "n_routed_experts": experts}}).moe
    return Router(8, moe)


def routing_of(scores: list, indices: list, valid: list | None = None) -> Routing:
    """Sequences of tokens: scores [B, T, E], indices [B, T, K]."""
    scores_t, indices_t = torch.tensor(scores), torch.tensor(indices)
    weights = scores_t.gather(-1, indices_t)
    return Routing(indices_t, weights, scores_t, None if valid is None else torch.tensor(valid))


class TestBiasSign:
    def test_three_steps_by_hand(self):
        router, balancer = router_of(4), BiasSign(0.001)
        # mean 5: above goes down, below goes up, exactly the mean stays
        balancer.after_step(1, router, torch.tensor([5, 9, 6, 0]))
        torch.testing.assert_close(router.e_score_correction_bias, torch.tensor([0.0, -0.001, -0.001, 0.001]))
        balancer.after_step(1, router, torch.tensor([5, 9, 6, 0]))
        balancer.after_step(1, router, torch.tensor([1, 0, 0, 19]))
        torch.testing.assert_close(router.e_score_correction_bias, torch.tensor([0.001, -0.001, -0.001, 0.001]))

    def test_the_rate_falls_along_a_cosine(self):
        router, balancer = router_of(2), BiasSign(0.01, final=0.2)
        load, b = torch.tensor([3, 1]), router.e_score_correction_bias
        # cos 0°, 60°, 90°, 180° = 1, 1/2, 0, -1: of the way from 0.01 to 0.002 it has gone 0, 1/4, 1/2, 1
        for progress, rate in ((0.0, 0.01), (1 / 3, 0.008), (0.5, 0.006), (1.0, 0.002)):
            before = b.clone()
            balancer.after_step(1, router, load, progress)
            torch.testing.assert_close(b - before, torch.tensor([-rate, rate]), rtol=1e-4, atol=1e-8)

    def test_an_even_load_moves_nothing(self):
        router = router_of(4)
        BiasSign(0.5).after_step(1, router, torch.tensor([7, 7, 7, 7]))
        assert router.e_score_correction_bias.tolist() == [0, 0, 0, 0]

    @given(st.lists(st.integers(0, 1000), min_size=2, max_size=8), st.sampled_from([0.001, 0.1]))
    def test_formula(self, load, rate):
        router = router_of(max(len(load), 2))
        BiasSign(rate).after_step(0, router, torch.tensor(load))
        mean = sum(load) / len(load)
        signs = [(mean > x) - (mean < x) for x in load]
        # where the mean is no FP32 number a load may only differ from it by less than rounding: loads are integers
        assert router.e_score_correction_bias.tolist() == pytest.approx([rate * s for s in signs], rel=1e-6)


class TestBiasProportional:
    def test_every_two_steps_by_hand(self):
        router, balancer = router_of(4), BiasProportional(0.1, 2)
        balancer.after_step(3, router, torch.tensor([8, 0, 0, 0]))
        assert router.e_score_correction_bias.tolist() == [0, 0, 0, 0]
        balancer.after_step(3, router, torch.tensor([0, 4, 4, 0]))
        # shares of 16: 1/2, 1/4, 1/4, 0; less 1/4 each, times -0.1
        expected = torch.tensor([-0.025, 0.0, 0.0, 0.025])
        torch.testing.assert_close(router.e_score_correction_bias, expected)
        balancer.after_step(3, router, torch.tensor([0, 0, 0, 8]))  # a third step, which 2 does not divide
        torch.testing.assert_close(router.e_score_correction_bias, expected)
        balancer.after_step(3, router, torch.tensor([0, 0, 0, 8]))  # the load before counts no more
        torch.testing.assert_close(
            router.e_score_correction_bias, expected + torch.tensor([0.025, 0.025, 0.025, -0.075])
        )

    def test_layers_do_not_mix(self):
        first, second, balancer = router_of(2), router_of(2), BiasProportional(1.0, 2)
        for _ in range(2):
            balancer.after_step(1, first, torch.tensor([4, 0]))
            balancer.after_step(2, second, torch.tensor([1, 3]))
        assert first.e_score_correction_bias.tolist() == [-0.5, 0.5]
        assert second.e_score_correction_bias.tolist() == [0.25, -0.25]

    @given(
        loads=st.lists(st.lists(st.integers(0, 50), min_size=3, max_size=3), min_size=1, max_size=11),
        every=st.integers(1, 5),
        saved_after=st.integers(0, 11),
    )
    def test_saved_in_between(self, loads, every, saved_after):
        """A balancer that is saved and built anew at any step moves the bias as a plain loop does."""
        loads = [[x + 1 for x in load] for load in loads]
        router, balancer = router_of(3), BiasProportional(0.1, every)
        bias, pending, waited = [0.0] * 3, [0] * 3, 0
        for step, load in enumerate(loads):
            if step == saved_after:
                state = {k: v.clone() for k, v in balancer.state_dict().items()}
                balancer = BiasProportional(0.1, every)
                balancer.load_state_dict(state)
            balancer.after_step(5, router, torch.tensor(load))
            pending, waited = [p + x for p, x in zip(pending, load, strict=True)], waited + 1
            if waited == every:
                bias = [b - 0.1 * (p / sum(pending) - 1 / 3) for b, p in zip(bias, pending, strict=True)]
                pending, waited = [0] * 3, 0
        assert router.e_score_correction_bias.tolist() == pytest.approx(bias, abs=1e-6)


# Two sequences of two tokens over three experts, two chosen a token.
SCORES = [[[0.5, 0.3, 0.2], [0.6, 0.1, 0.3]], [[0.2, 0.2, 0.6], [0.1, 0.1, 0.8]]]
INDICES = [[[0, 1], [0, 2]], [[2, 0], [2, 1]]]


class TestAuxiliaryLoss:
    def test_by_token_by_hand(self):
        # 8 assignments: expert 0 got 3, 1 got 2, 2 got 3; f = share * 3; P = (1.4, 0.7, 1.9) / 4
        expected = 0.01 * (9 / 8 * 0.35 + 6 / 8 * 0.175 + 9 / 8 * 0.475)
        loss = AuxiliaryLoss(0.01, by_sequence=False, normalize=False).loss(routing_of(SCORES, INDICES))
        assert loss.item() == pytest.approx(expected, rel=1e-6)

    def test_by_sequence_by_hand(self):
        # sequence 1: counts 2, 1, 1 of 4, P = .55, .2, .25; sequence 2: counts 1, 1, 2, P = .15, .15, .7
        one = 1.5 * 0.55 + 0.75 * 0.2 + 0.75 * 0.25
        two = 0.75 * 0.15 + 0.75 * 0.15 + 1.5 * 0.7
        loss = AuxiliaryLoss(0.01, by_sequence=True, normalize=False).loss(routing_of(SCORES, INDICES))
        assert loss.item() == pytest.approx(0.01 * (one + two) / 2, rel=1e-6)

    def test_normalised_scores_do_not_depend_on_their_scale(self):
        halved = [[[x * (0.5 if i else 0.25) for x in token] for i, token in enumerate(seq)] for seq in SCORES]
        one = 1.5 * 0.55 + 0.75 * 0.2 + 0.75 * 0.25
        two = 0.75 * 0.15 + 0.75 * 0.15 + 1.5 * 0.7
        loss = AuxiliaryLoss(0.01, by_sequence=True, normalize=True).loss(routing_of(halved, INDICES))
        assert loss.item() == pytest.approx(0.01 * (one + two) / 2, rel=1e-6)

    def test_padding_does_not_count(self):
        valid = [[True, False], [True, True]]
        # sequence 1 has one token: counts 1, 1, 0 of 2, P = its scores
        one = 1.5 * 0.5 + 1.5 * 0.3
        two = 0.75 * 0.15 + 0.75 * 0.15 + 1.5 * 0.7
        loss = AuxiliaryLoss(1.0, by_sequence=True, normalize=False).loss(routing_of(SCORES, INDICES, valid))
        assert loss.item() == pytest.approx((one + two) / 2, rel=1e-6)
        # by token: 6 assignments: 2, 2, 2; P = (.8, .6, 1.6) / 3
        loss = AuxiliaryLoss(1.0, by_sequence=False, normalize=False).loss(routing_of(SCORES, INDICES, valid))
        assert loss.item() == pytest.approx((0.8 + 0.6 + 1.6) / 3, rel=1e-6)

    @given(st.data())
    def test_plain_loop_in_float64(self, data):
        batch, tokens, experts = (data.draw(st.integers(1, n)) for n in (3, 4, 5))
        chosen = data.draw(st.integers(1, experts))
        seed = data.draw(st.integers(0, 2**20))
        by_sequence, normalize, padded = data.draw(st.booleans()), data.draw(st.booleans()), data.draw(st.booleans())
        generator = torch.Generator().manual_seed(seed)
        scores = torch.rand(batch, tokens, experts, generator=generator, dtype=torch.float64) + 0.01
        indices = torch.rand(batch, tokens, experts, generator=generator).topk(chosen).indices
        valid = torch.rand(batch, tokens, generator=generator) < 0.7 if padded else torch.ones(batch, tokens).bool()
        valid[:, 0] = True  # every sequence has a token
        loss = AuxiliaryLoss(0.3, by_sequence, normalize).loss(
            Routing(indices, scores.gather(-1, indices), scores, valid if padded else None)
        )

        def term(rows: list[tuple[int, int]]) -> float:
            total = 0.0
            for expert in range(experts):
                count = sum(int(expert in indices[b, t].tolist()) for b, t in rows)
                p = 0.0
                for b, t in rows:
                    s = scores[b, t].tolist()
                    p += s[expert] / (math.fsum(s) if normalize else 1)
                total += count / (len(rows) * chosen) * experts * p / len(rows)
            return total

        real = [[(b, t) for t in range(tokens) if valid[b, t]] for b in range(batch)]
        if by_sequence:
            expected = 0.3 * sum(term(rows) for rows in real) / batch
        else:
            expected = 0.3 * term([row for rows in real for row in rows])
        assert loss.item() == pytest.approx(expected, rel=1e-9)

    def test_perfect_balance_gives_the_sum_of_scores(self):
        """f is 1 for every expert then, so the loss is alpha * sum of P = alpha for normalised scores."""
        scores = torch.tensor([[[0.5, 0.25, 0.125, 0.125], [0.1, 0.2, 0.3, 0.4]]])
        indices = torch.tensor([[[0, 1], [2, 3]]])
        loss = AuxiliaryLoss(0.1, False, True).loss(Routing(indices, scores.gather(-1, indices), scores))
        assert loss.item() == pytest.approx(0.1, rel=1e-6)


@pytest.fixture
def model():
    return Transformer(resolve_model(MODEL), generator=torch.Generator().manual_seed(0))


TOKENS = torch.arange(40).view(2, 20) % 97


class TestGradient:
    @pytest.mark.parametrize("name", ["token_loss", "sequence_loss"])
    def test_reaches_the_router_and_changes_no_output(self, model, name):
        balancer = build_balancers(parse(BalanceConfig, {name: {"alpha": 0.5}}, "balance"))[name]
        plain = model(TOKENS)
        recorder = RoutingRecorder()
        watched = model(TOKENS, recorder=recorder)
        assert torch.equal(plain, watched)
        routing = recorder.routings[1][0]
        balancer.loss(routing).backward()
        gradient = model.routers[1].weight.grad
        assert gradient.abs().max() > 0
        # By finite differences along the gradient's own direction: the choice of experts does not change so near.
        direction = gradient / gradient.norm()
        values = []
        for eps in (1e-2, -1e-2):
            with torch.no_grad():
                model.routers[1].weight += eps * direction
                recorder = RoutingRecorder()
                model(TOKENS, recorder=recorder)
                moved = recorder.routings[1][0]
                model.routers[1].weight -= eps * direction
                # f has no gradient: it is held at the first decision
                values.append(balancer.loss(Routing(routing.indices, moved.weights, moved.scores)).item())
        assert (values[0] - values[1]) / 2e-2 == pytest.approx(gradient.norm().item(), rel=2e-2)

    def test_the_bias_is_no_parameter(self, model):
        optimizer = build_optimizer(model, OptimizerConfig(lr=1e-3))
        biases = {id(router.e_score_correction_bias) for router in model.routers.values()}
        assert len(biases) == 2  # the main layer's and the MTP module's
        assert not biases & {id(p) for group in optimizer.param_groups for p in group["params"]}
        model(TOKENS).sum().backward()
        assert all(not r.e_score_correction_bias.requires_grad for r in model.routers.values())
        assert all(r.e_score_correction_bias.grad is None for r in model.routers.values())


class TestConfig:
    def test_none_and_words(self, data):
        def names(word):
            return list(build_balancers(build_recipe(data, balance=word).balance))

        assert names("none") == []
        assert names("bias_sign + sequence_loss") == ["bias_sign", "sequence_loss"]
        everything = build_balancers(
            build_recipe(data, balance="sequence_loss+token_loss+bias_proportional+bias_sign").balance
        )
        assert set(everything) == {"bias_sign", "bias_proportional", "token_loss", "sequence_loss"}
        assert [everything[n].by_sequence for n in ("token_loss", "sequence_loss")] == [False, True]

    def test_settings_arrive(self, data):
        settings = {
            "bias_sign": {"rate": 0.5},
            "bias_proportional": {"rate": 0.25, "every": 3},
            "token_loss": {"alpha": 2.0, "normalize": True},
            "sequence_loss": {"alpha": 3.0, "normalize": False},
        }
        built = build_balancers(build_recipe(data, balance=settings).balance)
        found = {name: {k: v for k, v in vars(of).items() if k != "together"} for name, of in built.items()}
        assert found == {
            "bias_sign": {"rate": 0.5, "final": 1.0},
            "bias_proportional": {"rate": 0.25, "every": 3, "pending": {}, "steps": {}},
            "token_loss": {"alpha": 2.0, "by_sequence": False, "normalize": True},
            "sequence_loss": {"alpha": 3.0, "by_sequence": True, "normalize": False},
        }

    @pytest.mark.parametrize(
        ("word", "right"), [("bias_sing", "bias_sign"), ("token_loss+sequense_loss", "sequence_loss")]
    )
    def test_misspelt(self, data, word, right):
        with pytest.raises(UserError, match=f"did you mean '{right}'") as caught:
            build_recipe(data, balance=word)
        assert "\n" not in str(caught.value)
