"""A corpus of some kB, a tiny V3-shaped model, and recipes over them; everything lives in the test's own folder."""

import random
from pathlib import Path

import torch

from abyssal.config import parse
from abyssal.model import Transformer
from abyssal.training.recipe import Recipe
from abyssal.training.start import start

WORDS = "the quick brown fox jumps over a lazy dog while seven wizards brew strong black tea at dawn".split()

# MLA, one dense layer, one of experts, one MTP module with experts of its own.
MODEL = {
    "vocab_size": 258,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "attention": {
        "kind": "mla",
        "num_attention_heads": 2,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    },
    "moe": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
    "mtp": {"num_nextn_predict_layers": 1},
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def write_corpus(path: Path, documents: int = 6, words: int = 80, seed: int = 0) -> Path:
    """``documents`` of random words in a .txt, with the separator between them."""
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(WORDS, k=words)) + ".\n" for _ in range(documents)]
    path.write_text("<|endoftext|>\n".join(texts), encoding="utf-8")
    return path


def tiny_recipe(folder: Path) -> dict:
    """A recipe of 8 steps over a corpus in ``folder``; what a test changes it changes in this dict."""
    corpus = folder / "corpus.txt"
    if not corpus.exists():
        write_corpus(corpus)
    return {
        "name": "tiny",
        "model": MODEL,
        "data": {"source": str(corpus), "tokenizer": "bytes", "cache": str(folder / "cache")},
        "training": {
            "steps": 8,
            "batch_size": 2,
            "sequence_length": 16,
            "accumulate": 2,
            "dtype": "float32",
            "device": "cpu",
            "recompute": True,
        },
        "optimizer": {"lr": 1e-2},
        "schedule": {"warmup": 2},
        "balance": "bias_sign",
        "validation": {"every": 3, "batches": 2},
        "samples": {"every": 100, "prompts": ["the "], "tokens": 4},
        "checkpoint": {"every": 3, "keep": 2},
    }


def build_recipe(data: dict, **changes: object) -> Recipe:
    """``data`` as a Recipe; changes are ``section__field=value`` or ``section=value``."""
    data = {key: dict(value) if isinstance(value, dict) else value for key, value in data.items()}
    for key, value in changes.items():
        section, _, field = key.partition("__")
        if field:
            data[section] = {**data[section], field: value}
        else:
            data[section] = value
    return parse(Recipe, data, "recipe")


def tiny_trainer(data: dict, path: Path, options: dict | None = None, **changes: object):
    """A trainer of a new run in ``path``."""
    return start(build_recipe(data, **changes), path, **(options or {}))


def scrambled(model: Transformer, seed: int = 7) -> Transformer:
    """``model`` with norms and biases that are not 1 and 0, so that a lost one is noticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", ".bias")):
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        for router in model.routers.values():
            if router.e_score_correction_bias is not None:
                router.e_score_correction_bias += 1e-3 * torch.randn(
                    router.e_score_correction_bias.shape, generator=generator
                )
    return model


def figures(records: list[dict]) -> list[dict]:
    """Metrics records without what depends on the machine's speed."""
    return [{k: v for k, v in r.items() if k not in ("step_time", "tokens_per_s", "memory")} for r in records]


def tensors_of(trainer) -> dict[str, torch.Tensor]:
    """Everything that a run's future depends on: weights, biases, optimizer's and balancers' state."""
    out = {f"model.{name}": value for name, value in trainer.model.state_dict().items()}
    for name, parameter in trainer.model.named_parameters():
        for key, value in trainer.optimizer.state[parameter].items():
            out[f"optimizer.{name}.{key}"] = value
    for name, balancer in trainer.balancers.items():
        out |= {f"balance.{name}.{key}": value for key, value in balancer.state_dict().items()}
    return {key: value.detach().clone() for key, value in out.items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Whether two such states are equal bit for bit."""
    return left.keys() == right.keys() and all(
        left[key].dtype == right[key].dtype and torch.equal(left[key], right[key]) for key in left
    )
