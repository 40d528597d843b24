import math

import pytest
import torch

from abyssal.analysis.balance import balance


def test_by_hand():
    # mean 3, deviations -2, 0, 3, -3, 2: variance 26 / 5
    b = balance(torch.tensor([1, 3, 6, 0, 5]))
    assert b.cv == pytest.approx(math.sqrt(26 / 5) / 3)
    assert b.max_vio == pytest.approx(1.0)  # (6 - 3) / 3
    assert b.dead == 1


def test_even_and_empty_loads():
    even = balance(torch.full((8,), 5))
    assert (even.cv, even.max_vio, even.dead) == (0, 0, 0)
    nothing = balance(torch.zeros(4, dtype=torch.int64))
    assert (nothing.cv, nothing.max_vio, nothing.dead) == (0, 0, 4)
