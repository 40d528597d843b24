"""How good a model is: perplexity of a text, and the tasks of lm-evaluation-harness (:mod:`.harness`, which needs the
extra ``eval`` and is therefore imported by its own name)."""

from abyssal.evaluation.perplexity import Perplexity, perplexity

__all__ = ["Perplexity", "perplexity"]
