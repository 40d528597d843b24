"""Our models for llama.cpp: a GGUF file of one, and decoding with it through llama-cpp-python's low-level calls.

    python benchmarks/llama.py MODEL [--types f32 bf16 q8_0] [--tokens 48]

writes ``MODEL`` (a run or a folder) as GGUF in a temporary folder and compares llama.cpp's logits with ours on random
prompts: the error as a share of the logits' standard deviation, and how often the likeliest token is the same.

The file is what llama.cpp's converter writes for ``DeepseekV3ForCausalLM`` (architecture ``deepseek2``, MLA absorbed):
kv_b_proj in two, each head's W^UK transposed (attn_k_b) and W^UV (attn_v_b); experts stacked, gate and up apart; norms,
router and its bias in FP32. Rotary rows stay as they are: llama.cpp turns this architecture's pairs interleaved, too.
It has no tokenizer (``no_vocab``): prompts are ids here. q8_0 rounds every matrix but the router's, as llama-quantize
does, with gguf's own function.

What llama.cpp wants or refuses (llama-cpp-python 0.3.36): q_lora_rank must be there (it takes its absence for V2-Lite,
with 27 layers); at least one shared expert; with its AMX buffers (``use_extra_bufts``) a q8_0 file of this architecture
aborts while its graph is made, as those buffers do not take the products with attn_k_b and attn_v_b, and with these two
in BF16 it crashes in the first product: they are off unless a trial in a process of its own goes well.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from abyssal import load
from abyssal.config import MLAConfig, ModelConfig
from abyssal.errors import UserError
from abyssal.model import Transformer
from abyssal.training.hardware import limit_threads

TYPES = ("f32", "bf16", "q8_0")


def refuse(config: ModelConfig) -> None:
    """Raises UserError for what is not written here."""
    attention, moe = config.attention, config.moe
    for found, wanted in (
        (attention.kind, "mla"),
        (attention.bias, False),
        (config.rope.layout, "interleaved"),
        (config.rope.yarn, None),
    ):
        if found != wanted:
            raise UserError(f"for llama.cpp only models with {wanted!r} are written here, not {found!r}")
    if moe is None or not moe.n_shared_experts or moe.moe_layer_freq != 1 or moe.topk_method == "group_limited_greedy":
        raise UserError(
            "for llama.cpp only models with shared and routed experts in every later layer are written here"
        )


def tensors(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors under GGUF's names; matrices [..., O, I]."""
    a = model.config.attention
    assert isinstance(a, MLAConfig)
    yield "token_embd.weight", model.model.embed_tokens.weight
    yield "output_norm.weight", model.model.norm.weight
    if not model.config.tie_word_embeddings:
        yield "output.weight", model.lm_head.weight
    for i in range(model.config.num_hidden_layers):
        state, to = model.model.layers[i].state_dict(), f"blk.{i}."
        yield to + "attn_norm.weight", state["input_layernorm.weight"]
        yield to + "ffn_norm.weight", state["post_attention_layernorm.weight"]
        for ours, theirs in (
            ("q_proj", "attn_q"),
            ("q_a_proj", "attn_q_a"),
            ("q_a_layernorm", "attn_q_a_norm"),
            ("q_b_proj", "attn_q_b"),
            ("kv_a_proj_with_mqa", "attn_kv_a_mqa"),
            ("kv_a_layernorm", "attn_kv_a_norm"),
            ("o_proj", "attn_output"),
        ):
            if (name := f"self_attn.{ours}.weight") in state:
                yield f"{to}{theirs}.weight", state[name]
        heads = state["self_attn.kv_b_proj.weight"].unflatten(0, (a.num_attention_heads, -1))
        w_uk, w_uv = heads.split((a.qk_nope_head_dim, a.v_head_dim), dim=1)
        yield to + "attn_k_b.weight", w_uk.transpose(1, 2)
        yield to + "attn_v_b.weight", w_uv
        if not model.config.is_moe_layer(i):
            for part in ("gate", "up", "down"):
                yield f"{to}ffn_{part}.weight", state[f"mlp.{part}_proj.weight"]
            continue
        gate, up = state["mlp.experts.gate_up_proj"].chunk(2, dim=1)
        yield to + "ffn_gate_inp.weight", state["mlp.gate.weight"].float()
        if "mlp.gate.e_score_correction_bias" in state:
            yield to + "exp_probs_b.bias", state["mlp.gate.e_score_correction_bias"]
        yield to + "ffn_gate_exps.weight", gate
        yield to + "ffn_up_exps.weight", up
        yield to + "ffn_down_exps.weight", state["mlp.experts.down_proj"]
        for part in ("gate", "up", "down"):
            yield f"{to}ffn_{part}_shexp.weight", state[f"mlp.shared_experts.{part}_proj.weight"]


def stored_as(tensor: Tensor, name: str, kind: str) -> Any:
    """gguf's type of a tensor in a file of ``kind``."""
    from gguf import GGMLQuantizationType as Type

    if tensor.ndim == 1 or kind == "f32" or ".ffn_gate_inp." in name:
        return Type.F32
    # q8_0's blocks are 32 numbers of a row.
    return Type.Q8_0 if kind == "q8_0" and tensor.shape[-1] % 32 == 0 else Type.BF16


def as_bytes(tensor: Tensor, stored: Any) -> np.ndarray:
    from gguf import GGMLQuantizationType as Type
    from gguf.quants import quantize

    if stored == Type.BF16:
        return tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
    numbers = tensor.float().contiguous().numpy()
    return numbers if stored == Type.F32 else quantize(numbers, stored)


@torch.no_grad()
def write_gguf(model: Transformer, path: Path, kind: str) -> None:
    """Writes ``model`` to ``path``, a tensor at a time. Raises UserError for a model that is not written here."""
    import gguf
    from gguf.quants import quant_shape_to_byte_shape

    refuse(model.config)
    config, a, moe = model.config, model.config.attention, model.config.moe
    assert isinstance(a, MLAConfig)
    assert moe is not None
    w = gguf.GGUFWriter(path, "deepseek2")
    w.add_block_count(config.num_hidden_layers)
    w.add_context_length(config.max_position_embeddings)
    w.add_embedding_length(config.hidden_size)
    w.add_feed_forward_length(config.intermediate_size)
    w.add_vocab_size(config.vocab_size)
    w.add_head_count(a.num_attention_heads)
    w.add_head_count_kv(1)  # absorbed, every head has the same key: the latent and the rotary one
    w.add_layer_norm_rms_eps(config.rms_norm_eps)
    w.add_rope_freq_base(config.rope.theta)
    w.add_rope_dimension_count(a.qk_rope_head_dim)
    if a.q_lora_rank is not None:
        w.add_q_lora_rank(a.q_lora_rank)
    w.add_kv_lora_rank(a.kv_lora_rank)
    w.add_key_length(a.cached_values)
    w.add_value_length(a.kv_lora_rank)
    w.add_key_length_mla(a.qk_head_dim)
    w.add_value_length_mla(a.v_head_dim)
    w.add_leading_dense_block_count(moe.first_k_dense_replace)
    w.add_expert_feed_forward_length(moe.moe_intermediate_size)
    w.add_expert_count(moe.n_routed_experts)
    w.add_expert_used_count(moe.num_experts_per_tok)
    w.add_expert_shared_count(moe.n_shared_experts)
    w.add_expert_weights_scale(moe.routed_scaling_factor)
    w.add_expert_weights_norm(moe.norm_topk_prob)
    w.add_expert_gating_func(gguf.ExpertGatingFuncType[moe.scoring_func.upper()])
    if moe.topk_method == "noaux_tc" and moe.n_group > 1:
        w.add_expert_group_count(moe.n_group)
        w.add_expert_group_used_count(moe.topk_group)
    w.add_tokenizer_model("no_vocab")
    types = {"f32": gguf.LlamaFileType.ALL_F32, "bf16": gguf.LlamaFileType.MOSTLY_BF16}
    w.add_file_type(types.get(kind, gguf.LlamaFileType.MOSTLY_Q8_0))
    for name, tensor in tensors(model):
        stored = stored_as(tensor, name, kind)
        if stored == gguf.GGMLQuantizationType.F32:
            w.add_tensor_info(name, tuple(tensor.shape), np.dtype(np.float32), tensor.numel() * 4)
        else:
            shape = quant_shape_to_byte_shape(tuple(tensor.shape), stored)
            w.add_tensor_info(name, shape, np.dtype(np.uint8), int(np.prod(shape)), raw_dtype=stored)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_ti_data_to_file()
    for name, tensor in tensors(model):
        w.write_tensor_data(as_bytes(tensor, stored_as(tensor, name, kind)))
    w.close()


class Llama:
    """llama.cpp with the weights in ``file``: no mmap, ``threads`` threads. ``repack`` lets it lay weights out anew for
    AMX and the like; version 0.3.36 of the bindings crashes with that (see the module's docstring)."""

    def __init__(self, file: Path, threads: int, *, repack: bool = False) -> None:
        import llama_cpp

        self.lib, self.threads = llama_cpp, threads
        self.log: list[str] = []
        self._logger = llama_cpp.llama_log_callback(lambda _, text, __: self.log.append(text.decode(errors="replace")))
        llama_cpp.llama_log_set(self._logger, ctypes.c_void_p(0))
        params = llama_cpp.llama_model_default_params()
        params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
        params.use_extra_bufts = repack
        self.model = llama_cpp.llama_model_load_from_file(str(file).encode(), params)
        if self.model is None:
            raise UserError(f"{file}: llama.cpp does not take it: {self.last_words()}")
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def last_words(self) -> str:
        """What it said last."""
        return "; ".join(line.strip() for line in self.log[-2:])

    def context(self, sequences: int, length: int, *, flash: bool) -> Context:
        """Room for ``sequences`` of ``length`` tokens each."""
        return Context(self, sequences, length, flash)


class Context:
    """Some sequences' caches, each a stream of its own, and calls that fill and use them."""

    def __init__(self, llama: Llama, sequences: int, length: int, flash: bool) -> None:
        self.llama, self.lib, self.vocab_size = llama, llama.lib, llama.vocab_size
        params = self.lib.llama_context_default_params()
        length = -(-length // 256) * 256
        params.n_ctx, params.n_seq_max, params.kv_unified = sequences * length, sequences, False
        params.n_batch = 2048
        params.n_threads = params.n_threads_batch = llama.threads
        params.flash_attn_type = (
            self.lib.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else self.lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        params.no_perf = True
        llama.log.clear()
        self.context = self.lib.llama_init_from_model(llama.model, params)
        if self.context is None:
            raise UserError(f"llama.cpp makes no context: {llama.last_words()}")
        told = re.findall(r"KV buffer size = *([0-9.]+) MiB", "".join(llama.log))
        self.cache_bytes = sum(map(float, told)) * 2**20 / params.n_ctx
        """A token's."""
        self.memory = self.lib.llama_get_memory(self.context)
        self.batch = self.lib.llama_batch_init(params.n_batch, 0, 1)
        self.size = params.n_batch

    def clear(self) -> None:
        self.lib.llama_memory_clear(self.memory, True)

    def run(self, tokens: Sequence[tuple[int, int, int]], wanted: Sequence[int]) -> np.ndarray:
        """One pass over (token, position, sequence) triples; logits [len(wanted), V] behind those numbered there."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence) in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = 0
        for i in wanted:
            batch.logits[i] = 1
        if (code := self.lib.llama_decode(self.context, batch)) != 0:
            raise RuntimeError(f"llama_decode: {code}")
        self.lib.llama_synchronize(self.context)
        rows = [self.lib.llama_get_logits_ith(self.context, i) for i in wanted]
        return np.stack([np.ctypeslib.as_array(row, (self.vocab_size,)) for row in rows]) if rows else np.empty(0)

    def fill(self, tokens: Sequence[int], sequence: int, start: int = 0) -> np.ndarray:
        """Logits [V] behind the last of ``tokens``, which begin at position ``start``."""
        out = np.empty(0)
        for first in range(0, len(tokens), self.size):
            part = tokens[first : first + self.size]
            last = [len(part) - 1] if first + len(part) == len(tokens) else []
            out = self.run([(t, start + first + i, sequence) for i, t in enumerate(part)], last)
        return out[0]

    def save(self, sequence: int) -> bytes:
        """A sequence's cache."""
        size = self.lib.llama_state_seq_get_size(self.context, sequence)
        data = (ctypes.c_uint8 * size)()
        if self.lib.llama_state_seq_get_data(self.context, data, size, sequence) != size:
            raise RuntimeError("llama_state_seq_get_data")
        return bytes(data)

    def restore(self, data: bytes, sequence: int) -> None:
        array = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
        if self.lib.llama_state_seq_set_data(self.context, array, len(data), sequence) == 0:
            raise RuntimeError("llama_state_seq_set_data")

    def close(self) -> None:
        self.lib.llama_batch_free(self.batch)
        self.lib.llama_free(self.context)


@torch.inference_mode()
def compare(model: Transformer, file: Path, tokens: int, flash: bool) -> tuple[float, float]:
    """On three random prompts: error of llama.cpp's logits (root mean square, as a share of the logits' deviation from
    their mean), and the share of positions with the same likeliest token."""
    context = Llama(file, torch.get_num_threads()).context(1, tokens, flash=flash)
    errors, same = [], []
    for seed in range(3):
        prompt = torch.randint(2, model.config.vocab_size, (tokens,), generator=torch.Generator().manual_seed(seed))
        context.clear()
        triples = [(token, i, 0) for i, token in enumerate(prompt.tolist())]
        theirs = torch.from_numpy(context.run(triples, range(tokens)))
        ours = model(prompt.unsqueeze(0))[0].float()
        errors.append(((theirs - ours).square().mean() / ours.var()).sqrt().item())
        same.append((theirs.argmax(-1) == ours.argmax(-1)).float().mean().item())
    context.close()
    return max(errors), sum(same) / len(same)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--types", nargs="+", default=list(TYPES), choices=TYPES)
    parser.add_argument("--tokens", type=int, default=48)
    options = parser.parse_args()
    limit_threads()
    for kind in options.types:
        model, _ = load(options.model, dtype=torch.float32 if kind == "f32" else torch.bfloat16)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"{kind}.gguf"
            write_gguf(model, file, kind)
            for flash in (False, True):
                error, same = compare(model, file, options.tokens, flash)
                print(f"{kind}, flash attention {'on' if flash else 'off'}: error {error:.2e}, same token {same:.1%}")


if __name__ == "__main__":
    main()
