"""Reading the dense model: a folder in Llama's layout, a run, a name on the hub, or a GGUF file.

A dense Llama is our own :class:`~abyssal.model.Transformer` with grouped-query attention, positions turned in halves
and no experts, and its tensors have the same names. So the model that is measured "before" runs in the same code as
the one that comes out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from abyssal.config import MHAConfig, ModelConfig
from abyssal.data.tokenizer import Tokenizer
from abyssal.errors import UserError
from abyssal.evaluation.perplexity import check_vocabulary
from abyssal.loading import find_config, load
from abyssal.model import Transformer
from abyssal.upcycling.gguf_file import read_gguf


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
    rotary positions, no tokenizer or one that does not fit it; and for a GGUF file where transformers or gguf is not
    installed.
    """
    path = Path(source)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        model, tokenizer = read_gguf(path)
        check_dense(model.config, str(path))
    else:
        check_dense(find_config(str(source)), str(source))
        model, found = load(source, dtype=torch.float32, weights="dense")
        if found is None:
            raise UserError(f"{source}: no tokenizer.json or tiktoken.model in this folder; calibration needs one")
        tokenizer = found
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise UserError(f"{source}: {name}: it holds numbers that are not finite; expected an undamaged model")
    check_vocabulary(model, tokenizer)
    if tokenizer.chat is not None:
        tokenizer.chat.check()
    return Dense(model.requires_grad_(False), tokenizer, str(source))


def check_dense(config: ModelConfig, where: str) -> None:
    """Raises UserError for a model that is not dense, of Llama's layout and without biases."""
    attention = config.attention
    if not isinstance(attention, MHAConfig):
        raise UserError(f"{where}: it has latent attention already; expected a dense model of Llama's layout")
    if config.moe is not None:
        raise UserError(f"{where}: it has experts already; expected a dense model of Llama's layout")
    if config.mtp.num_nextn_predict_layers:
        raise UserError(f"{where}: it has MTP modules; expected a dense model of Llama's layout")
    if attention.bias:
        raise UserError(f"{where}: attention_bias: True is not supported, only False")
    if config.rope.layout != "halves" or config.rope.yarn is not None:
        raise UserError(f"{where}: rotary positions other than Llama's, in halves and unscaled, are not supported")
