"""Reading the dense model: a folder in Llama's layout, a run, a name on the hub, or a GGUF file.

A dense Llama is our own :class:`~abyssal.model.Transformer` with grouped-query attention, positions turned in halves
and no experts, and its tensors have the same names. So the model that is measured "before" runs in the same code as
the one that comes out. A GGUF file is read, and its quantised weights are dequantised, by transformers.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from abyssal.config import MHAConfig, ModelConfig
from abyssal.config.published import from_published
from abyssal.data.tokenizer import Tokenizer
from abyssal.errors import UserError
from abyssal.loading import find_config, load
from abyssal.model import Transformer

# What of transformers' config says what the model computes; the rest is about transformers or the GGUF file.
_KEYS = (
    "model_type vocab_size hidden_size num_hidden_layers intermediate_size max_position_embeddings hidden_act "
    "rms_norm_eps initializer_range tie_word_embeddings num_attention_heads num_key_value_heads head_dim "
    "attention_bias mlp_bias rope_theta rope_scaling rope_parameters bos_token_id eos_token_id pad_token_id"
).split()


@dataclass(frozen=True)
class Dense:
    """A dense model in FP32, in eval mode, with its tokenizer."""

    model: Transformer
    tokenizer: Tokenizer
    source: str

    @property
    def attention(self) -> MHAConfig:
        attention = self.model.config.attention
        assert isinstance(attention, MHAConfig)
        return attention


def read_dense(source: str | Path) -> Dense:
    """The dense model in ``source``: a ``.gguf`` file, or what :func:`abyssal.load` takes.

    Raises UserError where it is missing or damaged, is of another architecture than Llama's, has biases or scaled
    rotary positions, or no tokenizer; and for a GGUF file where transformers or gguf is not installed.
    """
    path = Path(source)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        model, tokenizer = _from_gguf(path)
    else:
        check_dense(find_config(str(source)), str(source))
        model, found = load(source, dtype=torch.float32)
        if found is None:
            raise UserError(f"{source}: no tokenizer.json or tiktoken.model in this folder; calibration needs one")
        tokenizer = found
    return Dense(model.requires_grad_(False), tokenizer, str(source))


def check_dense(config: ModelConfig, where: str) -> None:
    """Raises UserError for a model that is not dense, of Llama's layout and without biases."""
    attention = config.attention
    if not isinstance(attention, MHAConfig):
        raise UserError(f"{where}: it has latent attention already; expected a dense model of Llama's layout")
    if config.moe is not None:
        raise UserError(f"{where}: it has experts already; expected a dense model of Llama's layout")
    if attention.bias:
        raise UserError(f"{where}: attention_bias: True is not supported, only False")
    if config.rope.layout != "halves" or config.rope.yarn is not None:
        raise UserError(f"{where}: rotary positions other than Llama's, in halves and unscaled, are not supported")


def _from_gguf(path: Path) -> tuple[Transformer, Tokenizer]:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import gguf  # noqa: F401
        import transformers
    except ImportError as error:
        raise UserError(
            f"{path}: reading GGUF needs transformers and gguf ({error.name} is missing): pip install 'abyssal[tune]'"
        ) from None
    transformers.logging.set_verbosity_error()
    where: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    # Its progress bars go to stderr whatever its settings say.
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            published = transformers.AutoConfig.from_pretrained(path.parent, **where).to_dict()
        except Exception as error:  # whatever transformers and gguf raise for a file that they do not understand
            raise UserError(f"{path}: not read by transformers: {_first_line(error)}") from None
        if published.get("model_type") != "llama":
            raise UserError(f"{path}: architecture {published.get('model_type')!r} is not supported, only 'llama'")
        config = from_published({key: published[key] for key in _KEYS if published.get(key) is not None}, str(path))
        check_dense(config, str(path))
        try:
            other = transformers.AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **where)
            tokenizer = _tokenizer(transformers.AutoTokenizer.from_pretrained(path.parent, **where))
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except Exception as error:
            raise UserError(f"{path}: not read by transformers: {_first_line(error)}") from None
    with torch.device("meta"):
        model = Transformer(config)
    weights = {name: tensor.detach().float() for name, tensor in other.state_dict().items()}
    model.load_state_dict(weights, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval(), tokenizer


def _tokenizer(theirs: Any) -> Tokenizer:
    """transformers' tokenizer as ours, by the files it writes."""
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        tokenizer = Tokenizer.load(folder)
    # Where the file comes from and how it was read, which says nothing to who reads it next.
    for key in ("is_local", "local_files_only", "backend", "name_or_path", "tokenizer_class"):
        tokenizer.config.pop(key, None)
    # GGUF's own flag for this does not come through: what its tokenizer does is what counts.
    tokenizer.adds_bos = tokenizer.bos_id is not None and theirs("a")["input_ids"][:1] == [tokenizer.bos_id]
    return tokenizer


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
