"""Files <-> models: the published layout, and writing that an interruption cannot spoil."""

from abyssal.checkpoint.atomic import LOCK, lock_folder, replace_folder, write_text
from abyssal.checkpoint.folder import read_tensors, save_model, write_tensors
from abyssal.checkpoint.load import load_into, load_model

__all__ = [
    "LOCK",
    "load_into",
    "load_model",
    "lock_folder",
    "read_tensors",
    "replace_folder",
    "save_model",
    "write_tensors",
    "write_text",
]
