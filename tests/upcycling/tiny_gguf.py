"""Small random Llamas as GGUF files, written with gguf's own writer."""

import numpy as np
from tiny_dense import dense_folder
from tokenizers import pre_tokenizers

_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_OF_BLOCK = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(name):
    name = name.removesuffix(".weight")
    if name in _NAMES:
        return f"{_NAMES[name]}.weight"
    _, _, block, rest = name.split(".", 3)
    return f"blk.{block}.{_OF_BLOCK[rest]}.weight"


def paired(weight, heads):
    """Rows of each head as GGUF orders them: a pair's two side by side."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def gguf_file(path, *, drop=(), extra=None, keys=None, text_end="<|endoftext|>", vocabulary="gpt2"):
    """Writes ``path`` and returns the model in it as transformers has it, with two key/value heads."""
    import gguf

    model = dense_folder(path.parent / f"{path.stem}-dense")
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(2e-5)
    writer.add_rope_freq_base(5000.0)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(258)
    writer.add_tokenizer_model(vocabulary)
    if vocabulary == "gpt2":
        writer.add_tokenizer_pre("default")
        writer.add_token_list(["<s>", text_end, *sorted(pre_tokenizers.ByteLevel.alphabet())[:-1], "th"])
        writer.add_token_types([3, 3] + [1] * 256)
        writer.add_token_merges(["t h"])
    else:
        writer.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(255))])
        writer.add_token_scores([0.0] * 258)
        writer.add_token_types([2, 3, 3] + [6] * 255)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    if keys is not None:
        keys(writer)
    for name, tensor in model.state_dict().items():
        weight = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:
            weight = paired(weight, 4 if "q_proj" in name else 2)
        if gguf_name(name) not in drop:
            writer.add_tensor(gguf_name(name), np.ascontiguousarray(weight))
    for name, weight in (extra or {}).items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model
