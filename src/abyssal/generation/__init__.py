"""From a prompt to text: `sampling` chooses the next token, `generate` runs the model and turns tokens into text."""

from abyssal.generation.generate import generate, stream
from abyssal.generation.sampling import Sampling

__all__ = ["Sampling", "generate", "stream"]
