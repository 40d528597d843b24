"""The experiments, one a file: how a job is run, and what is concluded from all jobs' figures."""

from __future__ import annotations

from importlib import import_module

from abyssal.lab.experiment import Lab


def lab_of(name: str) -> Lab:
    """The experiment called ``name``, one of :func:`abyssal.lab.recipe.lab_names`."""
    lab: Lab = import_module(f"abyssal.lab.experiments.{name}").LAB
    return lab
