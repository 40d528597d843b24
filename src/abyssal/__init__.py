"""abyssal: the DeepSeek model line in one small, readable PyTorch library.

config = abyssal.preset("demo")
model = abyssal.Transformer(config)
logits = model(tokens)                                  # [B, T] int64 -> [B, T, V]
model, tokenizer = abyssal.load("runs/demo")
text = abyssal.generate(model, tokenizer, "ROMEO:", temperature=0.8, seed=1)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from abyssal.config import ModelConfig, preset
    from abyssal.errors import UserError
    from abyssal.exporting import convert, export
    from abyssal.generation import Engine, Sampling, generate, stream
    from abyssal.loading import load
    from abyssal.model import Cache, RoutingRecorder, Transformer

# Loaded when first asked for: `abyssal --help` and `import abyssal` need not wait for torch.
_WHERE = {
    "Cache": "abyssal.model",
    "Engine": "abyssal.generation",
    "ModelConfig": "abyssal.config",
    "RoutingRecorder": "abyssal.model",
    "Sampling": "abyssal.generation",
    "Transformer": "abyssal.model",
    "UserError": "abyssal.errors",
    "convert": "abyssal.exporting",
    "export": "abyssal.exporting",
    "generate": "abyssal.generation",
    "load": "abyssal.loading",
    "preset": "abyssal.config",
    "stream": "abyssal.generation",
}
__all__ = [
    "Cache",
    "Engine",
    "ModelConfig",
    "RoutingRecorder",
    "Sampling",
    "Transformer",
    "UserError",
    "convert",
    "export",
    "generate",
    "load",
    "preset",
    "stream",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'abyssal' has no attribute {name!r}")
    value = getattr(import_module(_WHERE[name]), name)
    globals()[name] = value
    return value
