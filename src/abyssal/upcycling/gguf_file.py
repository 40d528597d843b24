"""A dense Llama out of a GGUF file: read, and its quantised weights dequantised, by transformers.

transformers draws what a GGUF file lacks at random and drops what it has no place for, biases and scaled rotary
positions among it. So the file's tensors and the keys that change what a Llama computes are looked at first. And
transformers takes a tokenizer, a config or an adapter from the files beside the GGUF file: it is shown to it alone.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from abyssal.config import ModelConfig
from abyssal.config.published import from_published
from abyssal.data.tokenizer import Tokenizer
from abyssal.errors import UserError
from abyssal.model import Transformer

# What of transformers' config says what the model computes; the rest is about transformers or the GGUF file.
_KEYS = (
    "model_type vocab_size hidden_size num_hidden_layers intermediate_size max_position_embeddings hidden_act "
    "rms_norm_eps initializer_range tie_word_embeddings num_attention_heads num_key_value_heads head_dim "
    "attention_bias mlp_bias rope_theta rope_scaling rope_parameters bos_token_id eos_token_id pad_token_id"
).split()
_OF_BLOCK = "attn_q attn_k attn_v attn_output ffn_gate ffn_up ffn_down attn_norm ffn_norm".split()


def read_gguf(path: Path) -> tuple[Transformer, Tokenizer]:
    """The model in ``path``, FP32 and in eval mode, and its tokenizer.

    Raises UserError where transformers or gguf is not installed, or the file is damaged, is not a dense Llama without
    biases and with unscaled rotary positions, or has a tokenizer that is not byte-level BPE.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import gguf  # noqa: F401
        import transformers
    except ImportError as error:
        raise UserError(
            f"{path}: reading GGUF needs transformers and gguf ({error.name} is missing): pip install 'abyssal[tune]'"
        ) from None
    transformers.logging.set_verbosity_error()
    try:
        # transformers' progress bars go to stderr whatever its settings say.
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
            (Path(folder) / "model.gguf").symlink_to(path.resolve())
            where: dict[str, Any] = {"gguf_file": "model.gguf", "local_files_only": True}
            config = _config(path, transformers.AutoConfig.from_pretrained(folder, **where).to_dict())
            tokenizer = _tokenizer(transformers.AutoTokenizer.from_pretrained(folder, **where), config.vocab_size)
            where |= {"dtype": torch.float32, "output_loading_info": True}
            read: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, **where)
            other, info = read
    except UserError as error:
        said = str(error)
        raise UserError(said if said.startswith(str(path)) else f"{path}: {said}") from None
    except Exception as error:  # whatever transformers and gguf raise for a file that they do not understand
        raise UserError(f"{path}: not read by transformers: {_first_line(error)}") from None
    if wrong := sorted(map(str, {*info["missing_keys"], *info["mismatched_keys"]})):
        raise UserError(f"{path}: {wrong[0]}: missing, or not of the size that the file's own keys say")
    with torch.device("meta"):
        model = Transformer(config)
    weights: dict[str, Tensor] = {name: tensor.detach().float() for name, tensor in other.state_dict().items()}
    model.load_state_dict(weights, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval(), tokenizer


def _config(path: Path, published: dict[str, Any]) -> ModelConfig:
    """The file's config, if its tensors are those of a dense Llama and nothing in it scales positions."""
    import gguf

    if published.get("model_type") != "llama":
        raise UserError(f"{path}: architecture {published.get('model_type')!r} is not supported, only 'llama'")
    config = from_published({key: published[key] for key in _KEYS if published.get(key) is not None}, str(path))
    reader = gguf.GGUFReader(path)
    scaling = reader.get_field("llama.rope.scaling.type")
    if scaling is not None and scaling.contents() != "none":
        raise UserError(f"{path}: llama.rope.scaling.type: {scaling.contents()!r} is not supported, only 'none'")
    there = {str(tensor.name) for tensor in reader.tensors}
    needed = {f"blk.{block}.{name}.weight" for block in range(config.num_hidden_layers) for name in _OF_BLOCK}
    needed |= {"token_embd.weight", "output_norm.weight"}
    if more := sorted(there - needed - {"output.weight"}):
        raise UserError(f"{path}: {more[0]}: expected a dense Llama without experts, biases or scaled rotary positions")
    if lacking := sorted(needed - there):
        raise UserError(f"{path}: {lacking[0]} is missing, {len(lacking)} of {len(needed)} tensors in all")
    return config


def _tokenizer(theirs: Any, vocabulary: int) -> Tokenizer:
    """transformers' tokenizer as ours, by the files it writes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        theirs.save_pretrained(folder)
        _without_added(folder, vocabulary)
        try:
            tokenizer = Tokenizer.load(folder)
        except UserError as error:
            raise UserError(str(error).replace(f"{folder}{os.sep}tokenizer.json", "its tokenizer")) from None
    # Where the file comes from and how it was read, which says nothing to who reads it next.
    for key in ("is_local", "local_files_only", "backend", "name_or_path", "tokenizer_class"):
        tokenizer.config.pop(key, None)
    # GGUF's own flag for this does not come through: what its tokenizer does is what counts.
    tokenizer.adds_bos = tokenizer.bos_id is not None and theirs("a")["input_ids"][:1] == [tokenizer.bos_id]
    return tokenizer


def _without_added(folder: Path, vocabulary: int) -> None:
    """Takes out tokens that transformers adds behind the file's own ones (an ``<|endoftext|>`` that it expects of every
    byte-level BPE): the model has no embedding for them."""
    file, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    added = {token["content"] for token in data["added_tokens"] if token["id"] >= vocabulary}
    if not added:
        return
    data["added_tokens"] = [token for token in data["added_tokens"] if token["id"] < vocabulary]
    file.write_text(json.dumps(data), encoding="utf-8")
    kept = {
        key: value
        for key, value in json.loads(settings.read_text(encoding="utf-8")).items()
        if key != "added_tokens_decoder" and (value.get("content") if isinstance(value, dict) else value) not in added
    }
    settings.write_text(json.dumps(kept), encoding="utf-8")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
