"""Files <-> models: the published layout, and writing that an interruption cannot spoil."""

from abyssal.checkpoint.atomic import replace_folder, write_text
from abyssal.checkpoint.folder import load_model, load_state, read_tensors, save_model, write_tensors

__all__ = [
    "load_model",
    "load_state",
    "read_tensors",
    "replace_folder",
    "save_model",
    "write_tensors",
    "write_text",
]
