"""Means over seeds, their spread, and when two arms differ.

Arms are compared seed by seed: seed s gives both the same text in the same order (and, where their shapes agree, the
same first weights), so that what is common to both drops out of the difference. Of n differences with mean d and sample
deviation s the 95% interval is d ± t · s/√n, t the two-sided quantile of Student's distribution with n − 1 degrees of
freedom (W. S. Gosset, "The probable error of a mean", 1908): 4.30 for three seeds. Arms differ where it leaves out 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Two-sided 95% quantiles for 1, 2, … degrees of freedom; beyond them the normal distribution's, 4% less at most.
_T: tuple[float, ...] = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
)
_T += (2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)
_NORMAL = 1.960


def mean(values: Sequence[float]) -> float:
    """The mean; NaN of nothing."""
    return math.fsum(values) / len(values) if values else math.nan


def deviation(values: Sequence[float]) -> float:
    """The sample standard deviation (n − 1); 0 of a single value."""
    if len(values) < 2:
        return 0.0
    middle = mean(values)
    return math.sqrt(math.fsum((x - middle) ** 2 for x in values) / (len(values) - 1))


def quantile(freedom: int) -> float:
    """Student's t for a two-sided 95% interval."""
    return _T[freedom - 1] if freedom <= len(_T) else _NORMAL


@dataclass(frozen=True)
class Difference:
    """The mean of b − a over seeds, and its 95% interval."""

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out 0: a difference that these seeds show."""
        return self.low > 0 or self.high < 0

    def interval(self, digits: int = 3) -> str:
        """``0.012 to 0.034``."""
        return f"{signed(self.low, digits)} to {signed(self.high, digits)}"


def difference(a: Sequence[float], b: Sequence[float]) -> Difference:
    """b − a, seed by seed. Raises ValueError where there are not as many of both, or fewer than two."""
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"{len(a)} and {len(b)} values; expected as many of both, and two at least")
    each = [y - x for x, y in zip(a, b, strict=True)]
    reach = quantile(len(each) - 1) * deviation(each) / math.sqrt(len(each))
    return Difference(mean(each), mean(each) - reach, mean(each) + reach, len(each))


def signed(value: float, digits: int = 3) -> str:
    """With a sign, a real minus, and no −0."""
    text = f"{value:+.{digits}f}"
    if float(text) == 0:
        return text[1:]
    return text.replace("-", "−")


def spread(values: Sequence[float], digits: int = 3) -> str:
    """``1.234 ± 0.005``: the mean and one standard deviation over seeds."""
    return f"{mean(values):.{digits}f} ± {deviation(values):.{digits}f}".replace("-", "−")


def change(values: Sequence[float], digits: int = 3) -> str:
    """``+1.234 ± 0.005``: the same of what was added or taken away."""
    return f"{signed(mean(values), digits)} ± {deviation(values):.{digits}f}"


def verdict(first: Sequence[float], second: Sequence[float], more: str, less: str, same: str) -> str:
    """Which of three phrases fits ``second`` beside ``first``: ``same`` where these seeds show no difference."""
    found = difference(first, second)
    return same if not found.clear else more if found.mean > 0 else less


def against(
    what: str,
    first: tuple[str, Sequence[float]],
    second: tuple[str, Sequence[float]],
    *,
    digits: int = 3,
    words: tuple[str, str] = ("higher", "lower"),
) -> str:
    """A sentence on ``second`` beside ``first``, each a name and its values: how ``what`` differs, or that these seeds
    show no difference. ``words`` say that the second's is more, and less."""
    found = difference(first[1], second[1])
    said = found.clear and float(f"{abs(found.mean):.{digits}f}") > 0  # what is 0 as printed is no difference
    numbers = f"{mean(second[1]):.{digits}f} against {mean(first[1]):.{digits}f}".replace("-", "−")
    if not said:
        return (
            f"{what}: no difference between {second[0]} and {first[0]} that {found.seeds} seeds show "
            f"({numbers}; difference {signed(found.mean, digits)}, 95% interval {found.interval(digits)})."
        )
    word = words[0] if found.mean > 0 else words[1]
    return (
        f"{what}: {word} with {second[0]} than with {first[0]} "
        f"({numbers}; difference {signed(found.mean, digits)}, 95% interval {found.interval(digits)})."
    )
