"""Upcycling: a published dense model turned into one with latent attention, experts, or both."""

from __future__ import annotations

from abyssal.upcycling.conversion import upcycle
from abyssal.upcycling.dense import read_dense
from abyssal.upcycling.experts import ExpertSplit
from abyssal.upcycling.report import Report
from abyssal.upcycling.settings import Settings

__all__ = ["ExpertSplit", "Report", "Settings", "read_dense", "upcycle"]
