"""Plans for inference beside the cache's own bytes and the weights that are written, and the groups that are chosen."""

import itertools
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.analysis.activations import StepShape, block_activations
from abyssal.analysis.cache import cache_size
from abyssal.analysis.cards import CARDS, Card
from abyssal.analysis.inventory import Inventory
from abyssal.analysis.layouts import Wishes
from abyssal.analysis.parameters import count_parameters
from abyssal.analysis.serving import (
    Group,
    InferenceMemory,
    InferencePlan,
    InferencePlanner,
    Precision,
    Serving,
    cache_bytes,
    weight_bytes,
)
from abyssal.analysis.weights import count_weights
from abyssal.config import preset
from abyssal.errors import UserError
from abyssal.model import Cache

NAMES = ("deepseek-v3", "deepseek-moe-16b", "demo", "llama2-7b")
INVENTORIES = {name: Inventory(preset(name)) for name in NAMES}


def plan(name: str, wishes: Wishes, serving: Serving) -> InferencePlan:
    return InferencePlanner(INVENTORIES[name], wishes, serving).plan()


@pytest.mark.parametrize("name", ["deepseek-moe-16b", "deepseek-v3", "demo", "llama2-7b"])
def test_inference_weights_are_those_of_inspect(name: str) -> None:
    config = preset(name)
    inventory, weights = Inventory(config), count_weights(config)
    main = [w for w in inventory.weights if w.layer is None or w.layer < config.num_hidden_layers]
    precisions: tuple[Precision, ...] = ("bf16", "fp8", "int8", "int4")
    for precision in precisions:
        counted = sum(weight_bytes(weight, precision) for weight in main)
        assert counted == weights[precision].main
    assert inventory.parameters == count_parameters(config).total + count_parameters(config).mtp


@pytest.mark.parametrize("name", ["deepseek-moe-16b", "deepseek-v2-lite", "demo"])
def test_cache_bytes_are_those_of_the_cache(name: str) -> None:
    config = preset(name)
    with torch.device("meta"):
        cache = Cache(config, 3, 100, dtype=torch.bfloat16, device="meta")
    assert (
        cache_bytes(config, 3, 100) == cache.nbytes == cache_size(config).nbytes(torch.bfloat16, context=100, batch=3)
    )


def test_tensor_parallelism_divides_keys_but_not_latents() -> None:
    mha, mla = preset("deepseek-moe-16b"), preset("deepseek-v2-lite")
    assert cache_bytes(mha, 2, 4096, tensor=4) * 4 == cache_bytes(mha, 2, 4096)
    assert cache_bytes(mla, 2, 4096, tensor=4) == cache_bytes(mla, 2, 4096)
    memory = InferenceMemory(Inventory(mla), Serving())
    one, four = (memory.of(Group(expert=expert), 8, 4096) for expert in (1, 4))
    assert four.by_term["cache"] * 4 == one.by_term["cache"]


def test_prefill_expands_the_context() -> None:
    """V3's expanded keys and values of one sequence are what its workspace consists of, in the main."""
    inventory = Inventory(preset("deepseek-v3"))
    memory = InferenceMemory(inventory, Serving())
    spaces = [memory.of(Group(), 1, context).by_term["workspace"] for context in (4096, 163840)]
    assert spaces[1] - spaces[0] == (163840 - 4096) * 128 * (192 + 192) * 2


def test_a_large_batch_s_tokens_are_worked_on_together() -> None:
    """Once more sequences than a chunk has tokens are served, each step's blocks see one token of each."""
    config = preset("deepseek-moe-16b")
    memory = InferenceMemory(INVENTORIES["deepseek-moe-16b"], Serving(chunk=64))
    few, many = (memory.of(Group(), batch, 4096).by_term["workspace"] for batch in (64, 6400))
    part = [
        max(sum(block.attention.values()), sum(block.feed_forward.values()))
        for tokens in (64, 6400)
        for block in [block_activations(config, 5, StepShape(1, tokens))]
    ]
    assert many - few == part[1] - part[0] + (6400 - 64) * (4 * config.hidden_size + 6 * config.vocab_size)


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-moe-16b", "demo"])
@pytest.mark.parametrize(("gpus", "card"), [(8, "h200"), (16, "h800"), (12, "h800")])
def test_no_group_holds_more(name: str, gpus: int, card: str) -> None:
    """Beside trying all groups and, around what is said, batches."""
    config, wishes = preset(name), Wishes(gpus, CARDS[card])
    try:
        found = plan(name, wishes, Serving("fp8"))
    except UserError:
        assert (name, gpus) != ("demo", 8)
        return
    experts = config.moe.n_routed_experts if config.moe else 1
    groups = [
        Group(tensor, expert)
        for tensor, expert in itertools.product((1, 2, 4, 8), range(1, gpus + 1))
        if gpus % (tensor * expert) == 0 and experts % expert == 0
        if config.attention.num_attention_heads % tensor == 0 and config.intermediate_size % tensor == 0
    ]
    memory = InferenceMemory(INVENTORIES[name], Serving("fp8"))
    for room in found.rooms:
        replicas = room.group.replicas
        assert room.group.gpus <= gpus
        if room.sequences:
            assert memory.of(room.group, room.sequences // replicas, room.context).total <= wishes.usable
        for group in groups:
            times = gpus // group.gpus
            one_more = room.sequences // times + 1
            assert memory.of(group, one_more, room.context).total > wishes.usable


def test_the_smallest_group_is_taken() -> None:
    assert plan("deepseek-v3", Wishes(16, CARDS["h200"]), Serving("fp8")).group.gpus == 8
    assert plan("deepseek-v3", Wishes(16, CARDS["h200"]), Serving("bf16")).group.gpus == 16
    # A dense model's group is a node at most: what it can't hold, a second one does.
    one = plan("llama2-7b", Wishes(16, CARDS["l40s"]), Serving(batch=1))
    many = plan("llama2-7b", Wishes(16, CARDS["l40s"]), Serving(batch=one.rooms[0].sequences))
    assert one.group == Group()
    assert many.group.gpus == 16
    assert many.group.replicas >= 2


@pytest.mark.parametrize(
    ("serving", "message"),
    [
        (Serving(batch=0), "--batch: 0 is not at least 1"),
        (Serving(chunk=0), "--chunk: 0 is not at least 1"),
        (Serving(context=5000), "--context: 5000 is more than the model's max_position_embeddings 4096"),
    ],
)
def test_bad_input(serving: Serving, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan("deepseek-moe-16b", Wishes(1, CARDS["h100"]), serving)


def followed(text: str, wishes: Wishes, serving: Serving) -> list[tuple[Wishes, Serving]]:
    """What a user makes of a recommendation: a choice of precisions is several."""
    change: dict[str, Any] = {}
    options = {"batch": int, "context": int, "cache": str}
    for option, kind in options.items():
        if match := re.search(rf"--{option} (\w+)", text):
            change[option] = kind(match[1])
    if match := re.search(r"([\d,]+) GPUs?", text):
        wishes = replace(wishes, gpus=int(match[1].replace(",", "")))
    if "another layout" in text:
        wishes = replace(wishes, tensor=None, expert=None)
    precisions = [serving.precision]
    if match := re.search(r"--weights (\w+(?: or \w+)*)", text):
        precisions = match[1].split(" or ")  # type: ignore[assignment]
    return [(wishes, replace(serving, precision=precision, **change)) for precision in precisions]


@settings(max_examples=60)
@given(
    st.sampled_from(NAMES),
    st.sampled_from([1, 2, 3, 8]),
    st.sampled_from([0.01, 0.5, 1, 8, 40, 80]),
    st.sampled_from(["bf16", "fp8", "int8", "int4"]),
    st.sampled_from([1, 40, 100_000]),
    st.sampled_from([None, 1, 1000]),
    st.sampled_from([None, 1]),
)
def test_what_is_recommended_fits(
    name: str, gpus: int, gigabytes: float, precision: Precision, batch: int, context: int | None, tensor: int | None
) -> None:
    wishes = Wishes(gpus, Card("GPU", gigabytes * 1e9, None, 3e11), tensor=tensor)
    serving = Serving(precision, batch, context)
    try:
        assert plan(name, wishes, serving).memory.total <= wishes.usable
        return
    except UserError as error:
        message = str(error)
    assert "\n" not in message
    _, known, would = message.partition("would fit: ")
    assert known or message.endswith("nothing that this plan knows would fit")
    for text in would.split(", or ") if known else []:
        for wanted in followed(text, wishes, serving):
            assert plan(name, *wanted).memory.total <= wishes.usable


def test_what_can_t_be_helped_by_more_is_not_said_to_be() -> None:
    """Int4 weights in half a gigabyte: neither GPUs, beyond a node of tensor parallelism, nor bits are left."""
    wishes = Wishes(64, Card("GPU", 1e9, None, 3e11), reserve=0.5)
    with pytest.raises(UserError, match=r"the largest term is weights, .*would fit: --context \d+$"):
        plan("llama2-7b", wishes, Serving("int4"))
    with pytest.raises(UserError, match="nothing that this plan knows would fit"):
        plan("llama2-7b", replace(wishes, reserve=0.6), Serving("int4"))
