"""Adapted models against the same models whose weights the test changed by s · B A itself, in float64 and without any
of the code under test; gradients against PyTorch's own through such weights.
"""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_models import MHA, SEPARATE, V1_MOE, difference, randomised, small, tokens_for
from torch import Tensor, nn

import abyssal
from abyssal.data.tokenizer import byte_tokenizer
from abyssal.errors import UserError
from abyssal.kernels import fp8, grouped
from abyssal.model import Cache, Transformer
from abyssal.model.adapting import add_lora, attach, choose, disabled, low_ranks, matrices, merge_lora
from abyssal.model.fp8 import FP8Experts, FP8Linear, use_fp8
from abyssal.model.layers import Linear
from abyssal.model.lora import LoRAExperts, LoRALinear, LowRank
from abyssal.model.moe import Experts
from abyssal.model.quantized import packed_matrices, use_packed

V3 = {"mtp": {"num_nextn_predict_layers": 1}}
CONFIGS: dict[str, dict[str, object]] = {
    "v3": V3,
    "v1": {"attention": {**MHA, "bias": True}, "moe": V1_MOE},
    "separate latents": {"attention": SEPARATE},
    "segments": {"moe": {"segments": 2}},
}
ATTENTION = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]


def adapted(base: Transformer, targets: str | list[str] = "all", rank: int = 2, **options: bool) -> Transformer:
    """A copy with random numbers in B, too."""
    model = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(5)
    add_lora(model, targets, rank, 3.0, generator=generator, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(0.0, 0.3, generator=generator)
    return model


def changed(base: Transformer, model: Transformer, rslora: bool = False) -> Transformer:
    """``base`` with s · B A added to its weights, from nothing but the parameters' names."""
    out = copy.deepcopy(base)
    places, parameters = dict(out.named_parameters()), dict(model.named_parameters())
    with torch.no_grad():
        for name, a in parameters.items():
            if not name.endswith("lora_A"):
                continue
            b = parameters[name.removesuffix("A") + "B"]
            rank = a.shape[-2]
            scale = 3.0 / (math.sqrt(rank) if rslora else rank)
            delta = scale * torch.einsum("...or,...ri->...oi", b.double(), a.double())
            target = name.removesuffix(".lora_A") + ".weight"
            for which in ("gate_up", "down"):
                if name.endswith(f"{which}_lora_A"):
                    target = name.removesuffix("_lora_A") + "_proj"
            places[target] += delta
    return out


class TestTargets:
    @pytest.mark.parametrize(
        ("targets", "expected"),
        [
            ("q_b_proj", {"self_attn.q_b_proj": 3}),
            ("q_*", {"self_attn.q_a_proj": 3, "self_attn.q_b_proj": 3}),
            ("down_proj", {"mlp.down_proj": 1, "mlp.shared_experts.down_proj": 2}),
            ("experts", {"mlp.experts.gate_up_proj": 2, "mlp.experts.down_proj": 2}),
            ("experts.down_proj", {"mlp.experts.down_proj": 2}),
            ("shared_experts", {f"mlp.shared_experts.{name}_proj": 2 for name in ("gate", "up", "down")}),
            ("layers.1.self_attn", {f"self_attn.{name}": 1 for name in ATTENTION}),
            ("model.layers.*.self_attn.o_proj", {"self_attn.o_proj": 3}),
            ("model.layers.3.eh_proj", {"eh_proj": 1}),
            (["o_proj", "self_attn.o_proj", "*.o_proj"], {"self_attn.o_proj": 3}),
            (
                "all",
                {
                    **{f"self_attn.{name}": 3 for name in ATTENTION},
                    **{f"mlp.{name}_proj": 1 for name in ("gate", "up", "down")},
                    **{f"mlp.shared_experts.{name}_proj": 2 for name in ("gate", "up", "down")},
                    "mlp.experts.gate_up_proj": 2,
                    "mlp.experts.down_proj": 2,
                },
            ),
        ],
    )
    def test_what_is_adapted(self, targets, expected):
        model = randomised(small(**V3))
        before = {name: type(module) for name, module in model.named_modules()}
        names = add_lora(model, targets, 1, 1.0).shapes
        found = [name.split(".", 3)[3] for name in names]
        assert {kind: found.count(kind) for kind in found} == expected
        for name, module in model.named_modules():
            if isinstance(module, LoRALinear):
                assert name in names
            elif isinstance(module, LoRAExperts):
                assert {f"{name}.gate_up_proj", f"{name}.down_proj"} & names.keys()
            elif name in before and name not in names:
                assert type(module) is before[name]

    @pytest.mark.parametrize(
        ("target", "reason"),
        [
            ("lm_head", "embedding and head are not adapted"),
            ("embed_tokens", "embedding and head are not adapted"),
            ("norm", "a norm is no matrix"),
            ("kv_a_layernorm", "a norm is no matrix"),
            ("mlp.gate", "a router's weight is not adapted"),
            ("gate", "its neighbours can be: experts"),
            ("router", "a router's weight is not adapted"),
            ("q_bproj", "matches nothing .did you mean 'q_b_proj'"),
            ("query_key_value", "matches nothing.*there are .*kv_b_proj.*experts, all"),
            ("experts.gate_proj", "did you mean"),
            ("eh_proj", "matches nothing"),
            ("layers.9.self_attn", "matches nothing"),
        ],
    )
    def test_what_is_not(self, target, reason):
        model = randomised(small(**V3))
        with pytest.raises(UserError, match=reason) as caught:
            add_lora(model, ["o_proj", target], 2, 4.0)
        assert "\n" not in str(caught.value)
        assert repr("gate" if target == "router" else target) in str(caught.value)
        assert all(p.requires_grad for p in model.parameters())
        assert not low_ranks(model)

    def test_experts_of_a_dense_model(self):
        with pytest.raises(UserError, match="'experts' matches nothing"):
            choose(randomised(small(moe=None)), ["experts"])

    def test_a_rank_that_is_too_large(self):
        with pytest.raises(UserError, match=r"rank: 6 is larger than a side of .*experts.down_proj \[8, 24, 5\]"):
            add_lora(randomised(small()), "experts.down_proj", 6, 4.0)
        for rank in (0, -1, 1.5, True):
            with pytest.raises(UserError, match=r"rank: .* is not a number from 1"):
                add_lora(randomised(small()), "all", rank, 4.0)  # type: ignore[arg-type]
        for alpha in (0.0, -1.0, math.nan, math.inf):
            with pytest.raises(UserError, match="alpha: "):
                add_lora(randomised(small()), "all", 1, alpha)

    def test_a_second_adapter(self):
        model = adapted(randomised(small()), "o_proj")
        with pytest.raises(UserError, match="has an adapter already"):
            add_lora(model, "q_b_proj", 2, 4.0)

    def test_what_it_says(self):
        """Numbers by hand: hidden 24, latents of queries 10, 3 heads of 11; 8 experts of width 5; 3 layers, 2 with
        experts."""
        found = add_lora(randomised(small(**V3)), ["q_b_proj", "experts.gate_up_proj"], 2, 4.0)
        lines = found.lines()
        assert lines[0] == f"self_attn.q_b_proj 3 x [33, 10], rank 2: {3 * 2 * 43}"
        assert lines[1] == f"mlp.experts.gate_up_proj 2 x [8, 10, 24], rank 2: {2 * 8 * 2 * 34:,}"
        assert lines[2].startswith("not adapted: self_attn.q_a_proj 3 x [10, 24], ")
        assert "mlp.experts.down_proj 2 x [8, 24, 5]" in lines[2]
        assert lines[2].endswith("11 matrices of MTP modules")
        total = sum(p.numel() for p in randomised(small(**V3)).parameters())
        assert lines[3].startswith(f"trained: {258 + 1088:,} parameters, ")
        assert lines[3].endswith(f"{total:,}")
        assert (found.trainable, found.total) == (258 + 1088, total)
        assert found.describe() == "\n".join(lines)


class TestStart:
    def test_parameters(self):
        model = randomised(small(hidden_size=256), dtype=torch.bfloat16)
        add_lora(model, "all", 2, 4.0, generator=torch.Generator().manual_seed(0))
        for name, change in low_ranks(model).items():
            assert change.a.dtype == change.b.dtype == torch.float32
            bound = 1 / math.sqrt(change.a.shape[-1])
            assert change.a.abs().max() <= bound, name
            assert change.a.numel() < 100 or change.a.abs().max() > 0.8 * bound
            assert not change.b.any()
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == ("lora_" in name)
        shapes = {name: tuple(p.shape) for name, p in model.model.layers[1].named_parameters() if "lora" in name}
        assert shapes["self_attn.q_b_proj.lora_A"] == (2, 10)
        assert shapes["self_attn.q_b_proj.lora_B"] == (33, 2)
        assert shapes["mlp.experts.gate_up_lora_A"] == (8, 2, 256)
        assert shapes["mlp.experts.gate_up_lora_B"] == (8, 10, 2)
        assert shapes["mlp.experts.down_lora_A"] == (8, 2, 5)
        assert shapes["mlp.experts.down_lora_B"] == (8, 256, 2)

    def test_the_generator_decides(self):
        first, second = (randomised(small()) for _ in range(2))
        for model in (first, second):
            add_lora(model, "all", 2, 4.0, generator=torch.Generator().manual_seed(3))
        pairs = zip(low_ranks(first).values(), low_ranks(second).values(), strict=True)
        assert all(torch.equal(a.a, b.a) for a, b in pairs)

    def test_the_model_computes_what_it_did(self):
        base = randomised(small())
        model = copy.deepcopy(base)
        add_lora(model, "all", 2, 4.0)
        tokens = tokens_for(base.config, 2, 9)
        assert torch.equal(model(tokens), base(tokens))


class TestOutputs:
    @pytest.mark.parametrize("rslora", [False, True])
    @pytest.mark.parametrize("name", CONFIGS)
    def test_float64(self, name, rslora):
        base = randomised(small(**CONFIGS[name]))
        model = adapted(base, rslora=rslora)
        tokens = tokens_for(base.config, 2, 9)
        right = changed(base, model, rslora)(tokens)
        assert difference(model(tokens), right) < 1e-12
        assert difference(base(tokens), right) > 0.01
        with torch.no_grad():
            assert difference(model(tokens), right) < 1e-12
            assert difference(model(tokens[:, :2]), right[:, :2]) < 1e-12

    @torch.no_grad()
    def test_mtp_modules_by_their_number(self):
        base = randomised(small(**V3))
        model = adapted(base, "model.layers.3.*")
        tokens = tokens_for(base.config, 2, 9)
        assert torch.equal(model(tokens), base(tokens))
        assert difference(model.mtp_logits(tokens)[0], changed(base, model).mtp_logits(tokens)[0]) < 1e-12

    @torch.no_grad()
    def test_both_paths_of_attention_and_the_cache(self):
        base = randomised(small())
        model = adapted(base, "kv_b_proj")
        tokens = tokens_for(base.config, 2, 12)
        right = changed(base, model)(tokens)
        cache = Cache(model.config, 2, 12, dtype=torch.float64)
        steps = [model(tokens[:, :7], cache=cache), *(model(tokens[:, i : i + 1], cache=cache) for i in range(7, 12))]
        assert difference(torch.cat(steps, dim=1), right) < 1e-12

    def test_generation(self):
        """Greedy text of the engine, captured passes and all; and nothing old is kept when the adapter changes."""
        base = randomised(small(vocab_size=264), std=0.15, dtype=torch.float32)
        model, tokenizer, texts = adapted(base), byte_tokenizer(), []
        for _ in range(2):
            mine, right = (
                abyssal.generate(m, tokenizer, ["a", "some more of it"], temperature=0, max_new_tokens=12)
                for m in (model, changed(base, model))
            )
            assert mine == right
            texts.append(mine)
            with torch.no_grad():
                for change in low_ranks(model).values():
                    change.b.mul_(-1.0)
        assert texts[0] != texts[1]


def grads(model: Transformer, tokens: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    logits = model(tokens)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    (logits * weights.to(logits.dtype)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


class TestGradients:
    @pytest.mark.parametrize("name", CONFIGS)
    def test_float64(self, name):
        """dL/dA = s Bᵀ G and dL/dB = s G Aᵀ, where G is the gradient of the weight that the two make."""
        base = randomised(small(**CONFIGS[name]))
        model = adapted(base)
        tokens = tokens_for(base.config, 2, 9)
        ours, whole = grads(model, tokens), grads(changed(base, model), tokens)
        assert set(ours) == {n for n, p in model.named_parameters() if "lora_" in n}
        for target, change in low_ranks(model).items():
            stacked = ".experts." in target
            gradient = whole[target if stacked else f"{target}.weight"]
            prefix = target.removesuffix("proj") if stacked else f"{target}."
            a, b = change.a.detach().double(), change.b.detach().double()
            right = {"A": 1.5 * b.mT @ gradient, "B": 1.5 * gradient @ a.mT}
            for end, expected in right.items():
                assert ours[f"{prefix}lora_{end}"].dtype == torch.float32
                assert difference(ours[f"{prefix}lora_{end}"], expected) < 1e-6, (target, end)

    def test_recomputed_activations(self):
        model = adapted(randomised(small()))
        tokens = tokens_for(model.config, 2, 9)
        model.hidden(tokens).sum().backward()
        plain = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        model.hidden(tokens, recompute=True).sum().backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is None) == (name not in plain)
            assert parameter.grad is None or torch.equal(parameter.grad, plain[name])

    def test_only_what_is_asked_for(self):
        """Experts alone in the last layer: nothing below needs a gradient, and x gets none."""
        model = adapted(randomised(small()), "model.layers.2.mlp.experts.down_proj")
        found = grads(model, tokens_for(model.config, 1, 5))
        assert set(found) == {f"model.layers.2.mlp.experts.down_lora_{end}" for end in "AB"}


class TestBF16:
    """Sizes that compiled products take, and ranks that they do not."""

    @settings(max_examples=15)
    @given(
        rank=st.sampled_from([1, 8, 16, 32]),
        tokens=st.integers(1, 40),
        which=st.sampled_from([("gate_up",), ("down",), ("gate_up", "down")]),
        autocast=st.booleans(),
        seed=st.integers(0, 2**20),
    )
    def test_experts(self, rank, tokens, which, autocast, seed):
        generator = torch.Generator().manual_seed(seed)
        config = small(hidden_size=96, moe={"moe_intermediate_size": 64})
        assert config.moe is not None

        def drawn(*shape: int, std: float = 1.0) -> Tensor:
            # Numbers that BF16 has: what is measured is what products and sums round.
            return (std * torch.randn(shape, generator=generator)).bfloat16().float()

        experts = Experts(96, config.moe)
        experts.gate_up_proj.data, experts.down_proj.data = drawn(8, 128, 96, std=0.1), drawn(8, 96, 64, std=0.1)
        experts.requires_grad_(False)
        shapes = {"gate_up": (128, 96), "down": (96, 64)}
        changes = {
            k: LowRank(drawn(8, rank, shapes[k][1], std=0.1), drawn(8, shapes[k][0], rank, std=0.3), 2.0 * rank)
            for k in which
        }
        indices = torch.randint(0, 8, (tokens, 3), generator=generator)
        weights, x, up = torch.rand(tokens, 3, generator=generator), drawn(tokens, 96), drawn(tokens, 96)
        exact = {k: [t.double().requires_grad_() for t in (c.a, c.b)] for k, c in changes.items()}
        base = experts if autocast else experts.bfloat16()
        module = LoRAExperts(base, changes.get("gate_up"), changes.get("down"))
        mine = x.clone().requires_grad_() if autocast else x.bfloat16().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = module(mine, indices, weights)
        assert out.dtype == torch.bfloat16
        (out.float() * up).sum().backward()

        theirs = x.double().requires_grad_()
        full = {
            k: getattr(experts, f"{k}_proj").double() + (2.0 * exact[k][1] @ exact[k][0] if k in exact else 0.0)
            for k in shapes
        }
        right = grouped.experts_reference(theirs, indices, weights.double(), full["gate_up"], full["down"])
        (right * up.double()).sum().backward()
        assert difference(out, right) < 0.03
        assert mine.grad is not None
        assert difference(mine.grad, theirs.grad) < 0.03
        for k, (a, b) in exact.items():
            assert difference(getattr(module, f"{k}_lora_A").grad, a.grad) < 0.03
            assert difference(getattr(module, f"{k}_lora_B").grad, b.grad) < 0.03

    @settings(max_examples=15)
    @given(
        rank=st.integers(1, 20),
        rows=st.integers(1, 50),
        bias=st.booleans(),
        autocast=st.booleans(),
        seed=st.integers(0, 2**20),
    )
    def test_linear(self, rank, rows, bias, autocast, seed):
        generator = torch.Generator().manual_seed(seed)

        def drawn(*shape: int, std: float = 1.0) -> Tensor:
            return (std * torch.randn(shape, generator=generator)).bfloat16().float()

        base = Linear(40, 24, bias=bias).requires_grad_(False)
        for parameter in base.parameters():
            parameter.copy_(drawn(*parameter.shape, std=0.2))
        module = LoRALinear(
            base if autocast else base.bfloat16(),
            LowRank(drawn(rank, 40, std=0.2), drawn(24, rank), 0.5 * rank),
        )
        x = drawn(2, rows, 40)
        mine = x.clone().requires_grad_() if autocast else x.bfloat16().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = module(mine)
            with torch.no_grad():
                again = module(mine)
        assert out.dtype == again.dtype == torch.bfloat16
        assert difference(again, out) < 0.02
        out.sum().backward()
        inputs = [mine, module.lora_A, module.lora_B]

        def reference(of: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
            """Output and gradients in FP64, of numbers that ``of`` has changed."""
            x, a, b = (of(t.detach().double()).requires_grad_() for t in inputs)
            shift = of(base.bias.double()) if bias else 0.0
            right = x @ (of(base.weight.double()) + 0.5 * b @ a).t() + shift
            return right.detach(), *torch.autograd.grad(right.sum(), (x, a, b))

        # Sums of numbers with both signs may come out small; what BF16 rounds in them goes with the numbers' sizes.
        found = [out.detach(), *(t.grad for t in inputs)]
        for got, expected, sizes in zip(found, reference(lambda t: t), reference(torch.abs), strict=True):
            assert got is not None
            assert ((got.double() - expected).abs() <= 0.01 * sizes).all()


class TestOtherBases:
    @pytest.mark.parametrize("kind", ["int8", "int4"])
    def test_packed(self, kind):
        """As adapters over the numbers that the packed weights stand for."""
        sizes = {"vocab_size": 264, "hidden_size": 128, "moe": {"moe_intermediate_size": 64}}
        dense = randomised(small(**sizes), std=0.1, dtype=torch.float64)
        packed = copy.deepcopy(dense)
        use_packed(packed, kind)
        from abyssal.checkpoint.names import disk_tensors  # the published names of both
        from abyssal.kernels.packed import dequantize, quantize

        places = dict(disk_tensors(dense))
        with torch.no_grad():
            for name, place in packed_matrices(packed):
                made = quantize(places[name], place.kind)
                place.data.copy_(made.data)
                place.scales.copy_(made.scales)
                places[name].copy_(dequantize(made, torch.float64))
        packed.requires_grad_(False)
        tokens = tokens_for(dense.config, 2, 9)
        ours, theirs = adapted(packed), adapted(dense)
        assert matrices(ours) == matrices(theirs)
        assert difference(ours(tokens), theirs(tokens)) < 1e-6
        mine, right = grads(ours, tokens), grads(theirs, tokens)
        assert mine.keys() == right.keys()
        assert max(difference(mine[name], right[name]) for name in mine) < 1e-5
        with pytest.raises(UserError, match="merges into dense weights"):
            merge_lora(ours)

    @torch.no_grad()
    def test_fp8(self):
        """The base's own rounding, and what is added beside it."""
        base = randomised(small(), std=0.1, dtype=torch.float32)
        names = {f"{name}.weight" for name, m in base.model.named_modules(prefix="model") if isinstance(m, nn.Linear)}
        names |= {n for n, _ in base.named_parameters() if ".experts." in n and "shared" not in n}
        use_fp8(base, names)
        for module in base.modules():
            if isinstance(module, FP8Linear):
                fill = torch.randn(module.weight.shape, generator=torch.Generator().manual_seed(1))
                module.weight[:], module.weight_scale_inv[:] = fp8.quantize(0.1 * fill)
            elif isinstance(module, FP8Experts):
                for name, parts in (("gate_up", 2), ("down", 1)):
                    weight = getattr(module, f"{name}_proj")
                    fill = 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
                    for expert, rows in enumerate(fill):
                        made = [fp8.quantize(part) for part in rows.chunk(parts)]
                        weight[expert] = torch.cat([m[0] for m in made])
                        scale = getattr(module, f"{name}_scale_inv")[expert]
                        scale[:] = torch.stack([m[1] for m in made]) if parts == 2 else made[0][1]
        model = adapted(base)
        x = torch.randn(3, 24, generator=torch.Generator().manual_seed(3))
        ours = model.model.layers[0].self_attn.o_proj
        assert isinstance(ours, LoRALinear)
        wide = torch.randn(3, 21, generator=torch.Generator().manual_seed(4))
        right = ours.base(wide) + 1.5 * wide @ ours.lora_A.t() @ ours.lora_B.t()
        assert difference(ours(wide), right) < 1e-6
        experts = model.model.layers[1].mlp.experts
        assert isinstance(experts, LoRAExperts)
        some = torch.tensor([[0, 1, 2], [3, 4, 5], [0, 6, 7]]), torch.rand(3, 3)
        plain, beside = experts.base(x, *some), experts(x, *some)
        for change in low_ranks(experts).values():
            change.b.zero_()
        assert difference(experts(x, *some), plain) < 0.05  # routing weights before the rounding or behind it
        assert difference(beside, plain) > 0.1
        assert model(tokens_for(base.config, 1, 5)).isfinite().all()


class TestPuttingBack:
    def test_disabled(self):
        base = randomised(small())
        model = adapted(base)
        tokens = tokens_for(base.config, 2, 9)
        before = model(tokens)
        with disabled(model):
            assert torch.equal(model(tokens), base(tokens))
            assert [n for n, _ in model.named_parameters()] == [n for n, _ in base.named_parameters()]
        assert torch.equal(model(tokens), before)
        with pytest.raises(ZeroDivisionError), disabled(model):
            raise ZeroDivisionError
        assert torch.equal(model(tokens), before)

    @pytest.mark.parametrize("rslora", [False, True])
    def test_merged(self, rslora):
        """FP32 weights against a float64 sum, each expert's; everything else is where it was."""
        base = randomised(small(**V3), dtype=torch.float32)
        model = adapted(base, ["all", "model.layers.3.mlp"], rslora=rslora)
        right = changed(base.double(), model, rslora)
        merge_lora(model)
        assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in base.named_modules()}
        for (name, ours), (_, theirs) in zip(model.named_parameters(), right.named_parameters(), strict=True):
            assert ours.dtype == torch.float32
            assert (ours.double() - theirs).abs().max() <= 1e-6 * max(1.0, float(theirs.detach().abs().max())), name

    def test_bf16_is_rounded_once(self):
        base = randomised(small(), std=0.2, dtype=torch.bfloat16)
        model = adapted(base)
        exact = changed(copy.deepcopy(base).double(), model)
        merge_lora(model)
        for (name, ours), (_, theirs) in zip(model.named_parameters(), exact.named_parameters(), strict=True):
            assert ours.dtype == torch.bfloat16
            once = theirs.float().bfloat16()
            # FP32 and float64 may round to neighbours where the sum lies between two.
            assert (ours != once).float().mean() < 0.01, name
            assert torch.allclose(ours, once, rtol=2**-7, atol=1e-6)

    def test_a_change_that_does_not_fit(self):
        model = randomised(small())
        a, b = torch.zeros(2, 24), torch.zeros(33, 2)
        with pytest.raises(UserError, match=r"self_attn.q_b_proj is for \[33, 24\], the model has \[33, 10\]"):
            attach(model, {"model.layers.0.self_attn.q_b_proj": LowRank(a, b, 1.0)})
        with pytest.raises(UserError, match=r"no such matrix .did you mean 'model.layers.0.self_attn.q_b_proj'"):
            attach(model, {"model.layers.0.self_attn.q_bproj": LowRank(a, b, 1.0)})
        assert not low_ranks(model)
