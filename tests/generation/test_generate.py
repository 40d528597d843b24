import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from abyssal.config import ModelConfig, config_from_dict, to_published
from abyssal.data.tokenizer import Tokenizer, byte_tokenizer, train_bpe
from abyssal.errors import UserError
from abyssal.generation import Sampling, generate, stream
from abyssal.generation.engine import Engine
from abyssal.generation.sampling import make_generators
from abyssal.model import Transformer
from abyssal.model.attention import Context
from abyssal.model.paged import PagedCache

BYTES = byte_tokenizer()
BPE = train_bpe(["stop here, stop there: été 🙂🙂 und so weiter und so fort\n\n" * 9], 320)

MLA = {
    "kind": "mla",
    "num_attention_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "bias": True,
}
MHA = {"kind": "mha", "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "bias": True}
SEPARATE = {key: value for key, value in MLA.items() if key != "kv_lora_rank"} | {
    "kind": "separate_latents",
    "k_lora_rank": 12,
    "v_lora_rank": 10,
}
MOE = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
}
LETTERS = "stop her:é🙂"
PROMPTS = ["Once upon a time", "", "é", "a somewhat longer prompt than the others are"]


def make_config(**changes: Any) -> ModelConfig:
    fields: dict[str, Any] = {
        "vocab_size": 264,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 128,
        "attention": MLA,
    }
    return ModelConfig.model_validate(fields | changes)


def make_model(dtype: torch.dtype = torch.float64, **changes: Any) -> Transformer:
    g = torch.Generator().manual_seed(5)
    model = Transformer(make_config(**changes), generator=g).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # wide enough that greedy decoding does not go in circles
            parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.3, generator=g)
        for router in model.routers.values():
            router.e_score_correction_bias.normal_(0, 0.3, generator=g)
    return model


class Scripted(Transformer):
    """Says the given tokens, one sequence a script; then its last token again and again. `wish` is any row of logits
    that is said instead of a token."""

    def __init__(self, scripts: list[list[int | Tensor]], **changes: Any) -> None:
        sizes = {"vocab_size": 330, "hidden_size": 8, "num_hidden_layers": 1} | changes
        super().__init__(make_config(**sizes), generator=torch.Generator().manual_seed(0))
        self.lm_head = nn.Identity()
        self.lm_head.weight = nn.Parameter(torch.zeros(1))
        self.scripts = scripts
        self.calls = 0
        self.modes: list[bool] = []
        self.said: dict[int, int] = {}  # how often each sequence was asked, by its first page

    def through_blocks(self, x: Tensor, context: Context, *, cache: PagedCache, **_: Any) -> Tensor:  # type: ignore[override]
        ragged = cache.ragged
        pages = [int(table[0]) for table in ragged.tables]
        for piece in ragged.pieces:
            pages += [int(piece.table[0])] * (piece.end - piece.start)
        rows = []
        for row, page in enumerate(pages):
            self.said.setdefault(page, 0)
            script = self.scripts[list(self.said).index(page)]
            wish = script[min(self.said[page], len(script) - 1)]
            one = torch.zeros(self.config.vocab_size)
            rows.append(wish if isinstance(wish, Tensor) else one.index_fill(0, torch.tensor(wish), 100.0))
            if row + 1 == len(pages) or pages[row + 1] != page:
                self.said[page] += 1
        self.calls += 1
        self.modes.append(self.training or any(m.training for m in self.modules()))
        return torch.stack(rows).unsqueeze(0)


def saying(tokenizer: Tokenizer, *texts: str, **changes: Any) -> Scripted:
    return Scripted([[*tokenizer.encode(text), tokenizer.eos_id] for text in texts], **changes)


def tokens_of(model: Transformer, prompts: list[list[int]], sampling: Sampling) -> list[list[int]]:
    engine = Engine(model, BYTES, prefix_cache=False)
    generators = make_generators(sampling.seed, len(prompts))
    sequences = [engine.add(prompt, sampling, generator=g) for prompt, g in zip(prompts, generators, strict=True)]
    while engine.busy:
        engine.step()
    return [sequence.new for sequence in sequences]


@torch.no_grad()
def greedy_without_cache(model: Transformer, prompt: list[int], count: int) -> list[int]:
    """The plainest account there is: the whole sequence anew for each token."""
    tokens = list(prompt)
    for _ in range(count):
        token = int(model(torch.tensor([tokens]))[0, -1, : BYTES.vocab_size].argmax())
        if token == BYTES.eos_id:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


# --- the tokens are the right ones


@pytest.mark.parametrize(
    ("attention", "moe"),
    [(MLA, MOE), (MLA, None), (MHA, MOE), (MHA, None), (SEPARATE, MOE)],
    ids=["mla-moe", "mla", "mha-moe", "mha", "separate_latents-moe"],
)
def test_greedy_batch_equals_each_prompt_alone_and_a_loop_without_cache(attention, moe):
    model = make_model(attention=attention, moe=moe, num_hidden_layers=3)
    prompts = [[BYTES.bos_id, *BYTES.encode(p)] for p in PROMPTS]
    greedy = Sampling(temperature=0, max_new_tokens=16)
    together = tokens_of(model, prompts, greedy)
    assert together == [tokens_of(model, [prompt], greedy)[0] for prompt in prompts]
    assert together == [greedy_without_cache(model, prompt, 16) for prompt in prompts]
    assert len({token for tokens in together for token in tokens}) > 10  # the model is not stuck
    texts = [BYTES.decode(tokens) for tokens in together]
    assert generate(model, BYTES, PROMPTS, greedy) == texts
    assert "".join(stream(model, BYTES, PROMPTS[0], temperature=0, max_new_tokens=16)) == texts[0]


def test_greedy_equals_transformers_generate():
    config = config_from_dict(to_published(make_config(moe=MOE, num_hidden_layers=3, vocab_size=258)), "test")
    ours = make_model(torch.float32, moe=MOE, num_hidden_layers=3, vocab_size=258)
    theirs = DeepseekV3ForCausalLM(DeepseekV3Config(**to_published(config))).eval()
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not missing
    assert not unexpected
    for prompt in ([0, 50, 60, 70], [0, *BYTES.encode("Once upon a time")]):
        want = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=32, eos_token_id=None)
        got = tokens_of(ours, [prompt], Sampling(temperature=0, max_new_tokens=32))[0]
        assert BYTES.eos_id not in want[0, len(prompt) :]
        assert got == want[0, len(prompt) :].tolist()
        assert len(got) == 32


def test_same_seed_same_text_and_another_seed_another():
    model = make_model(moe=MOE)
    first = generate(model, BYTES, PROMPTS, seed=3, max_new_tokens=20)
    assert generate(model, BYTES, PROMPTS, seed=3, max_new_tokens=20) == first
    assert generate(model, BYTES, PROMPTS, seed=4, max_new_tokens=20) != first
    fresh = [generate(model, BYTES, "a", max_new_tokens=20) for _ in range(4)]
    assert len(set(fresh)) > 1  # two may both be empty
    assert "".join(stream(model, BYTES, PROMPTS[0], seed=3, max_new_tokens=20)) == first[0]
    twins = generate(model, BYTES, ["a", "a"], seed=3, max_new_tokens=20)
    assert twins[0] != twins[1]


def test_a_text_does_not_depend_on_its_neighbours():
    model = make_model(moe=MOE)
    settings = Sampling(seed=11, max_new_tokens=20, top_p=0.9, repetition_penalty=1.2, temperature=1.3)
    want = generate(model, BYTES, PROMPTS, settings)
    for change in (["", "b", "and one that is a good deal longer than all the rest"], ["x"] * 3):
        assert generate(model, BYTES, [PROMPTS[0], *change], settings)[0] == want[0]
    assert generate(model, BYTES, ["b", PROMPTS[1]], settings)[1] == want[1]
    assert generate(model, BYTES, PROMPTS[0], settings) == want[0]


def test_a_sequence_that_ended_does_not_disturb_the_others():
    nan = torch.full((330,), torch.nan)
    model = Scripted([[70, BYTES.eos_id, nan], [*BYTES.encode("four"), BYTES.eos_id]])
    assert generate(model, BYTES, ["a", "bc"]) == ["D", "four"]
    assert model.calls == 5


# --- where a text ends


def test_text_ends_at_eos_of_tokenizer_or_config():
    eos = BYTES.eos_id
    assert generate(Scripted([[70, 71, eos, 72]]), BYTES, "a", max_new_tokens=4) == "DE"
    assert generate(Scripted([[70, 71, eos, 72]], eos_token_id=70), BYTES, "a", max_new_tokens=4) == ""
    several = {"eos_token_id": 72, "published": {"eos_token_id": [72, 71]}}
    assert generate(Scripted([[70, 71, 72]], **several), BYTES, "a", max_new_tokens=4) == "D"
    assert generate(Scripted([[70, 71, 73, 72]], eos_token_id=72), BYTES, "a", max_new_tokens=4) == "DEG"


def test_text_ends_after_max_new_tokens():
    model = Scripted([[70]])
    assert generate(model, BYTES, "a", max_new_tokens=5) == "DDDDD"
    assert model.calls == 5


def test_text_ends_with_the_context_for_each_sequence():
    texts = generate(Scripted([[70], [71]], max_position_embeddings=16), BYTES, ["x" * 12, ""], max_new_tokens=9)
    assert texts == ["D" * 3, "E" * 9]  # BOS and 12 bytes leave 3 places
    assert generate(Scripted([[70]], max_position_embeddings=16), BYTES, "x" * 14, max_new_tokens=9) == "D"


def cut(text: str, stop: tuple[str, ...]) -> str:
    """Before the stop string that is complete first; of several, the longest."""
    for end in range(len(text) + 1):
        starts = [end - len(s) for s in stop if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)]
    return text


@settings(max_examples=80, deadline=None)
@given(
    text=st.text(LETTERS, max_size=30),
    stop=st.lists(st.text(LETTERS, min_size=1, max_size=4), max_size=3),
    bpe=st.booleans(),
    data=st.data(),
)
def test_stop_strings_cut_the_text_wherever_tokens_begin_and_end(text, stop, bpe, data):
    if text and data.draw(st.booleans()):  # a stop string that does occur
        start = data.draw(st.integers(0, len(text) - 1))
        stop = [*stop, text[start : data.draw(st.integers(start + 1, len(text)))]]
    tokenizer = BPE if bpe else BYTES
    want = cut(text, tuple(stop))
    pieces = list(stream(saying(tokenizer, text), tokenizer, "a", stop=stop))
    assert "".join(pieces) == want
    assert all(pieces)
    assert not any("\ufffd" in piece for piece in pieces)
    assert generate(saying(tokenizer, text, "no end"), tokenizer, ["a", "b"], stop=stop) == [
        want,
        cut("no end", tuple(stop)),
    ]


@pytest.mark.parametrize("tokenizer", [BPE, BYTES], ids=["bpe", "bytes"])
def test_the_stop_string_that_is_complete_first_counts(tokenizer):
    assert any(b"stop" in tokenizer.token_bytes(i) for i in tokenizer.encode("und stop")) == (tokenizer is BPE)
    for stop, want in [(("t", "stop"), "und s"), (("stop", "t"), "und s"), (("op", "stop"), "und "), (("nd",), "u")]:
        assert generate(saying(tokenizer, "und stop"), tokenizer, "a", stop=stop) == want


def test_a_stop_string_ends_the_work_too():
    model = saying(BYTES, "one. two. three.", "uno")
    assert generate(model, BYTES, ["a", "b"], stop=(". t", "x")) == ["one", "uno"]
    assert model.calls == len("one. t")


def test_a_stream_holds_back_only_what_may_become_a_stop_string():
    pieces = list(stream(saying(BYTES, "ab\nc\n\nd"), BYTES, "x", stop=("\n\n", "zz")))
    assert pieces == ["a", "b", "\nc"]
    assert list(stream(saying(BYTES, "ab\n"), BYTES, "x", stop=("\n\n",))) == ["a", "b", "\n"]
    assert list(stream(saying(BYTES, "ab\n"), BYTES, "x", stop=("\n\n",), max_new_tokens=3)) == ["a", "b", "\n"]


def test_a_stream_gives_whole_characters_one_by_one():
    text = "né 世界 🙂👩‍🔬!"
    assert list(stream(saying(BYTES, text), BYTES, "x")) == list(text)
    assert "".join(stream(saying(BPE, text), BPE, "x")) == text


def test_a_character_left_unfinished_is_as_decode_has_it():
    ids = BYTES.encode("a🙂")[:3]
    assert generate(Scripted([ids]), BYTES, "x", max_new_tokens=3) == BYTES.decode(ids) == "a\ufffd"
    assert list(stream(Scripted([ids]), BYTES, "x", max_new_tokens=3)) == ["a", "\ufffd"]


def test_pieces_come_as_soon_as_their_token():
    model = saying(BYTES, "abc")
    pieces = stream(model, BYTES, "x")
    assert isinstance(pieces, Iterator)
    assert (model.calls, next(pieces), model.calls, next(pieces), model.calls) == (0, "a", 1, "b", 2)


# --- ids that nobody trained


def test_ids_that_the_tokenizer_does_not_have_are_never_sampled():
    wish = torch.zeros(330)
    wish[BYTES.vocab_size :] = 50.0
    wish[70] = 20.0
    for temperature in (0, 1):
        assert generate(Scripted([[wish]]), BYTES, "a", max_new_tokens=3, temperature=temperature) == "DDD"


def test_the_penalty_knows_prompt_and_new_tokens_but_no_padding():
    wish = torch.zeros(330)
    wish[[70, 71, 72, 73]] = torch.tensor([3.0, 2.0, 1.0, 3.5])
    more = wish.index_fill(0, torch.tensor(0), 5.0)  # the id that prompts are padded with
    sampling = Sampling(temperature=0, repetition_penalty=2.0, max_new_tokens=4)
    got = tokens_of(Scripted([[wish], [more]]), [[73, 99, 73], [99]], sampling)
    assert got == [[70, 71, 73, 73], [0, 73, 70, 0]]


def test_gaps_in_the_tokenizers_ids_are_never_sampled():
    vocabulary = {c: 3 * i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = Tokenizer(backend)
    wish = torch.full((800,), 5.0)
    wish[::3] = 0.0
    engine = Engine(Scripted([[wish]], vocab_size=800), tokenizer)
    sequence = engine.add([0], Sampling(max_new_tokens=60, seed=1))
    while engine.busy:
        engine.step()
    assert len(sequence.new) == 60
    assert all(token % 3 == 0 for token in sequence.new)


# --- prompts


def test_what_goes_in_and_what_comes_out():
    model = make_model()
    greedy = Sampling(temperature=0, max_new_tokens=8)
    text = generate(model, BYTES, "hi", greedy)
    ids = BYTES.encode("hi")
    assert isinstance(text, str)
    assert generate(model, BYTES, ["hi"], greedy) == [text]
    assert generate(model, BYTES, [], greedy) == []
    assert generate(model, BYTES, [BYTES.bos_id, *ids], greedy) == text
    assert generate(model, BYTES, np.array([BYTES.bos_id, *ids]).tolist(), greedy) == text
    bare = generate(model, BYTES, "hi", greedy, add_bos=False)
    assert generate(model, BYTES, [ids, [BYTES.bos_id, *ids]], greedy) == [bare, text]
    assert generate(model, BYTES, ["hi", ids], greedy) == [text, bare]
    assert bare != text
    assert list(stream(model, BYTES, [BYTES.bos_id, *ids], greedy)) == list(stream(model, BYTES, "hi", greedy))
    assert generate(Scripted([[70]]), BYTES, "hi", greedy, max_new_tokens=2) == "DD"  # an override goes first


# --- what must stay as it was


def test_training_flags_are_as_before_and_off_during_a_step():
    model = saying(BYTES, "abc")
    model.train()
    model.model.norm.eval()
    before = [m.training for m in model.modules()]
    for _ in stream(model, BYTES, "x"):
        assert [m.training for m in model.modules()] == before
        assert not torch.is_inference_mode_enabled()
    generate(model, BYTES, ["x"])
    assert [m.training for m in model.modules()] == before
    assert model.modes
    assert not any(model.modes)


def test_training_flags_are_as_before_after_an_error():
    model = Scripted([[70, torch.full((330,), torch.nan)]])
    with pytest.raises(UserError, match="logits: the largest is nan"):
        generate(model, BYTES, "x")
    assert all(m.training for m in model.modules())


def test_global_random_state_is_not_touched():
    model = make_model(moe=MOE)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    generate(model, BYTES, PROMPTS, max_new_tokens=4)
    generate(model, BYTES, PROMPTS, max_new_tokens=4, seed=1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert random.getstate() == before[2]


def test_weights_can_be_trained_afterwards():
    model = make_model()
    generate(model, BYTES, "x", max_new_tokens=2)
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# --- errors


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ("x" * 15, {}, "prompt: 16 tokens leave no room in the model's context of 16 .*; expected at most 15"),
        ("x" * 40, {}, "prompt: 41 tokens leave no room in the model's context of 16 .*; expected at most 15"),
        (["a", "x" * 15], {}, r"prompts\[1\]: 16 tokens leave no room"),
        ([5, 264], {}, "prompt: token id 264 is outside the model's vocabulary of 264 tokens"),
        ([[5], [-1]], {}, r"prompts\[1\]: token id -1 is outside the model's vocabulary of 264 tokens"),
        ("", {"add_bos": False}, "prompt: empty, with no BOS in front; expected at least one token"),
        (["a", []], {}, r"prompts\[1\]: empty, with no BOS in front"),
        (["a", 5], {}, r"prompts\[1\]: an int; expected a string or a list of token ids"),
        (["a", [1.5]], {}, r"prompts\[1\]: a list; expected a string or a list of token ids"),
        (None, {}, "prompt: null; expected a string or a list of token ids"),
        ("a", {"temprature": 0}, r"temprature: no such sampling setting \(did you mean 'temperature'\?\)"),
        ("a", {"drafts": 1}, "drafts: 1 is not valid; expected 0: this model has no MTP module to guess with"),
        ("a", {"logprobs": 101}, "logprobs: 101 is not valid"),
        ("a", {"schema": "{"}, "schema: not JSON"),
        ("a", {"temperature": float("nan")}, "temperature: nan is not valid"),
        ("a", {"temperature": -1}, "temperature: -1 is not valid; expected 0 .greedy. or a number from"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(prompt, settings, message):
    model = make_model(max_position_embeddings=16)
    with pytest.raises(UserError, match=f"^{message}") as error:
        generate(model, BYTES, prompt, **settings)
    assert "\n" not in str(error.value)
    if not isinstance(prompt, list) or isinstance(prompt[0], int):
        with pytest.raises(UserError, match=f"^{message}"):
            stream(model, BYTES, prompt, **settings)  # at once, not with the first piece


def test_a_tokenizer_larger_than_the_models_vocabulary_is_refused():
    message = "tokenizer: its vocabulary of 258 is larger than the model's of 200; expected the tokenizer that"
    with pytest.raises(UserError, match=message):
        generate(make_model(vocab_size=200), BYTES, "a")


def test_an_empty_prompt_needs_a_bos():
    backend = tokenizers.Tokenizer.from_str(BYTES.backend.to_str())
    with pytest.raises(UserError, match="prompt: empty, with no BOS in front"):
        generate(make_model(), Tokenizer(backend), "")
    assert isinstance(generate(make_model(), BYTES, "", max_new_tokens=2), str)
