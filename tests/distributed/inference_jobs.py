"""What the workers do with a divided model; and the models."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from abyssal.checkpoint import save_model
from abyssal.config import ModelConfig
from abyssal.data.tokenizer import byte_tokenizer
from abyssal.distributed.inference import Telling, load_part, parallel_of
from abyssal.distributed.mesh import Mesh
from abyssal.distributed.together import Together
from abyssal.generation import Sampling
from abyssal.generation.engine import Engine
from abyssal.generation.passes import follow
from abyssal.loading import load_weights
from abyssal.model import Transformer

TOKENIZER = byte_tokenizer()
V3: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "attention": {
        "kind": "mla",
        "num_attention_heads": 4,
        "kv_lora_rank": 16,
        "q_lora_rank": 12,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
    },
    "moe": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
    },
    "mtp": {"num_nextn_predict_layers": 1},
}
V1: dict[str, Any] = V3 | {
    "attention": {"kind": "mha", "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "bias": True},
    "moe": V3["moe"] | {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False},
    "mtp": {"num_nextn_predict_layers": 0},
}
LITE: dict[str, Any] = V3 | {
    "attention": V3["attention"] | {"q_lora_rank": None},
    "tie_word_embeddings": True,
    "mtp": {"num_nextn_predict_layers": 0},
}
# Wide enough for blocks of 128 in two parts.
WIDE: dict[str, Any] = V3 | {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "intermediate_size": 256,
    "initializer_range": 0.1,
    "attention": V3["attention"] | {"qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 64},
    "moe": V3["moe"] | {"moe_intermediate_size": 256},
}
DENSE: dict[str, Any] = V3 | {"moe": None, "mtp": {"num_nextn_predict_layers": 0}}


def write(config: dict[str, Any], folder: Path) -> Path:
    """A random model, and a tokenizer."""
    folder.mkdir()
    model = Transformer(ModelConfig.model_validate(config), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # as drawn they are 0
                parameter.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(1))
        for router in model.routers.values():
            if router.e_score_correction_bias is not None:
                router.e_score_correction_bias.copy_(torch.linspace(-0.2, 0.2, 8))
    save_model(model, folder)
    TOKENIZER.save(folder)
    return folder


@dataclass
class Answer:
    """What came of the prompts: new tokens, how many guesses were right, and how likely each first token was."""

    tokens: list[list[int]]
    accepted: list[int]
    likely: list[float] = field(compare=False)


def answer(model: Transformer, prompts: list[list[int]], others: Telling | None = None, **options: Any) -> Answer:
    """What an engine makes of ``prompts`` at once, in small pages and pieces."""
    sampling = Sampling(**({"temperature": 0, "max_new_tokens": 16, "logprobs": 0} | options.pop("sampling", {})))
    engine = Engine(model, TOKENIZER, others=others, **({"page": 4, "chunk": 24} | options))
    sequences = [engine.add(prompt, sampling) for prompt in prompts]
    while engine.busy:
        engine.step()
    likely = [sequence.logprobs[0].own for sequence in sequences]
    return Answer([sequence.new for sequence in sequences], engine.metrics.accepted, likely)


def alone(folder: Path, prompts: list[list[int]], weights: str = "auto", **options: Any) -> Answer:
    """By one process."""
    return answer(load_weights(folder, weights=weights, dtype=torch.float32), prompts, **options)  # type: ignore[arg-type]


def together(
    layout: dict[str, int], folder: str, prompts: list[list[int]], weights: str = "auto", **options: Any
) -> tuple[Answer | None, dict[str, tuple[int, ...]]]:
    """By several: what process 0 has to say, and the shapes of what each holds."""
    these = Together(Mesh(parallel_of(layout.get("tensor", 1), layout.get("expert", 1)), torch.device("cpu")))
    model = load_part(Path(folder), these, weights=weights, dtype=torch.float32)
    telling = Telling(these)
    found = None
    if these.first:
        answer(model, prompts[:1], telling)  # an engine that has gone when the next one comes
        found = answer(model, prompts, telling, **options)
        telling.end()
    else:
        follow(model, telling)
        assert telling.ended == 0
    return found, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def sums(numbers: int) -> list[bytes]:
    """What a sum of random numbers is to the last bit, for several sizes."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    out = []
    for count in (1, 7, 64, numbers):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(count, generator=generator).to(dtype)
            dist.all_reduce(x)
            out.append(x.view(torch.uint8).numpy().tobytes())
    return out


def orders(sent: list[list[int]]) -> list[list[int]]:
    """``sent`` as they arrive, numbers given with each."""
    these = Together(Mesh(parallel_of(2, 1), torch.device("cpu")))
    telling = Telling(these)
    if these.first:
        for order in sent:
            telling.tell(order, torch.tensor(order))
        telling.end(3)
        return sent
    heard = []
    while order := telling.hear():
        assert telling.take((len(order),), torch.int64).tolist() == order
        heard.append(order)
    assert telling.ended == 3
    return heard
