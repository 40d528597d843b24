"""From prompts to text: `engine` continues many at once, `sampling` chooses tokens, `generate` is the short way."""

from abyssal.generation.engine import Engine
from abyssal.generation.generate import generate, stream
from abyssal.generation.sampling import Sampling

__all__ = ["Engine", "Sampling", "generate", "stream"]
