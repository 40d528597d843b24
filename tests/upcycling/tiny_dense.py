"""Small random Llamas as transformers writes them, with a byte tokenizer and text to convert by."""

import random
import warnings

import torch

from abyssal.data.tokenizer import byte_tokenizer

VOCABULARY = 258
WORDS = "the sea is deep and dark but light falls on it where small fish swim in wide slow circles".split()


def dense_folder(path, *, kv_heads=2, tied=False, seed=0, **changes):
    """A LlamaForCausalLM folder of two layers, four heads of 16; weights large enough that attention is not flat."""
    import transformers

    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 128,
        "rope_theta": 5000.0,
        "rms_norm_eps": 2e-5,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "tie_word_embeddings": tied,
        "initializer_range": 0.1,
    }
    config = transformers.LlamaConfig(**(settings | changes))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.LlamaForCausalLM(config).eval()
        model.save_pretrained(path)
    byte_tokenizer().save(path)
    return model


def text_file(path, *, words=4000, seed=0):
    chosen = random.Random(seed).choices(WORDS, k=words)
    path.write_text("\n<|endoftext|>\n".join(" ".join(chosen[i : i + 500]) for i in range(0, words, 500)))
    return path
