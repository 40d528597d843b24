"""Running an experiment: its jobs, several at a time, each with its figures kept as soon as it is done.

A folder holds

    lab.json                what is run: recipe, versions, machine
    figures/00-seed1.json   what a job found; a job with such a file is not run again
    report.html, README.md, figures.json, *.svg            (:mod:`abyssal.lab.report`)

and ``models/`` beside it the training runs, which all experiments share: where two of them train the same model with
the same seed, the second takes the first one's. A job that was stopped goes on from its run's last checkpoint.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from importlib.metadata import version
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import torch

from abyssal.checkpoint import LOCK, lock_folder, write_text
from abyssal.errors import UserError
from abyssal.lab.charts import check_plotting
from abyssal.lab.experiment import Job, Results, Stopped
from abyssal.lab.experiments import lab_of
from abyssal.lab.recipe import LabRecipe
from abyssal.training.hardware import describe, resolve_device, resolve_dtype
from abyssal.training.prepare import load_tokenizer, open_data
from abyssal.training.trainer import build_loader

MANIFEST = "lab.json"

Watcher = Callable[[int, int, str, float], None]
"""Told after every job: how many are done, of how many, which it was, and its seconds (0: it was done before)."""


def conduct(
    recipe: LabRecipe,
    folder: Path,
    *,
    jobs: int | None = None,
    overwrite: bool = False,
    watch: Watcher = lambda done, of, what, seconds: None,
) -> Results:
    """All jobs' figures; those that are in ``folder`` already are taken from there.

    ``jobs`` run at a time, each on its share of the cores: by default one a core, on a GPU one. Raises UserError for a
    folder that holds another experiment (``overwrite`` removes its figures) or none, or in which another process runs
    one, and where Matplotlib, which the report needs, is missing; KeyboardInterrupt where Ctrl-C or SIGTERM stopped it:
    what was trained is saved.
    """
    check_plotting()
    device = device_of(recipe)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = jobs or (cores if device.type == "cpu" else 1)
    check_folder(folder)
    lab_of(recipe.name).check(recipe)
    _check_data(recipe)
    folder.mkdir(parents=True, exist_ok=True)
    with lock_folder(folder, "running an experiment there"):
        _claim(recipe, folder, overwrite)
        return _all_figures(recipe, folder, jobs, cores, watch)


def _all_figures(recipe: LabRecipe, folder: Path, jobs: int, cores: int, watch: Watcher) -> Results:
    phases = _phases(recipe, folder)
    of = sum(len(phase) for phase in phases)
    done = 0
    for phase in phases:
        left = [job for job in phase if _kept(job) is None]
        for job in phase:
            if job not in left:
                done += 1
                watch(done, of, _called(job), 0.0)
        for job, seconds in _run_all(left, jobs, max(cores // jobs, 1)):
            done += 1
            watch(done, of, _called(job), seconds)
    figures: dict[str, dict[int, Any]] = {arm: {} for arm in recipe.arms}
    for job in phases[-1]:
        found = _kept(job)
        assert found is not None
        assert job.arm is not None
        figures[job.arm][job.seed] = found["figures"]
    return Results(recipe, figures)


def device_of(recipe: LabRecipe) -> torch.device:
    """Where jobs compute. Raises UserError where that is not there."""
    return resolve_device(str(recipe.base["training"].get("device", "auto")))


def time_spent(recipe: LabRecipe, folder: Path) -> tuple[float, float]:
    """Seconds that the jobs took together: of a processor, and by the clock (of jobs side by side each counts)."""
    found = [_kept(job) for phase in _phases(recipe, folder) for job in phase]
    kept = [one for one in found if one is not None]
    return sum(float(one["processor"]) for one in kept), sum(float(one["seconds"]) for one in kept)


def _phases(recipe: LabRecipe, folder: Path) -> list[list[Job]]:
    """What the arms of each seed have in common, then the arms, seed by seed."""
    models, seeds = folder.parent / "models", range(1, recipe.seeds + 1)
    common = [Job(recipe, None, seed, folder, models) for seed in seeds] if lab_of(recipe.name).has_common else []
    return [common, [Job(recipe, arm, seed, folder, models) for seed in seeds for arm in recipe.arms]]


def _check_data(recipe: LabRecipe) -> None:
    """Raises UserError for text that cannot be read or is too short, while nothing is made or dropped yet. What is
    tokenised here is there for all jobs."""
    seen = set()
    for arm in recipe.arms:
        one = recipe.recipe(arm, 1)
        config = one.model_config_resolved()
        what = (one.data.model_dump_json(), config.vocab_size, one.training.sequence_length, one.training.batch_size)
        if what in seen:
            continue
        seen.add(what)
        train, _ = open_data(one.data, load_tokenizer(one.data, config.vocab_size))
        build_loader(one, config, train)


def _called(job: Job) -> str:
    return f"seed {job.seed}, {'what its arms have in common' if job.arm is None else job.arm}"


def check_folder(folder: Path) -> None:
    """Raises UserError where ``folder`` is something else than an experiment's."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out: {folder} is a file; expected a folder, or a place where one can be made")
    inside = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if inside - {LOCK} and MANIFEST not in inside:
        raise UserError(f"--out: {folder}: exists and is no lab's folder; choose another")


def _claim(recipe: LabRecipe, folder: Path, overwrite: bool) -> None:
    file = folder / MANIFEST
    wanted = json.loads(json.dumps(recipe.decisive()))
    figures = list((folder / "figures").glob("*.json"))
    if figures and file.is_file():  # without any the folder is anybody's
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
            there = stored["recipe"]
            machine_of(folder)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{file}: damaged; begin anew with --overwrite, or choose another folder") from None
        if there == wanted and not overwrite:
            return
        if not overwrite:
            raise UserError(
                f"{folder}: holds figures of another experiment: {_first_difference(there, wanted)}; "
                "choose another folder with --out, or replace them with --overwrite"
            )
        for old in figures:
            old.unlink()
    (folder / "figures").mkdir(exist_ok=True)
    device = device_of(recipe)
    dtype = resolve_dtype(str(recipe.base["training"].get("dtype", "auto")), device)
    machine = describe(device, dtype) | {"python": platform.python_version()}
    told = {"abyssal": version("abyssal"), "recipe": wanted, "machine": machine}
    write_text(file, json.dumps(told, indent=2, default=str) + "\n")


def machine_of(folder: Path) -> dict[str, Any]:
    """What the experiment in ``folder`` was begun on."""
    found: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return {"abyssal": found["abyssal"], **found["machine"]}


def _first_difference(there: Any, here: Any, path: str = "") -> str:
    if isinstance(there, dict) and isinstance(here, dict):
        for key in [*there, *(k for k in here if k not in there)]:
            if there.get(key) != here.get(key):
                return _first_difference(there.get(key), here.get(key), f"{path}.{key}" if path else str(key))
    return f"{path} is {there!r} there, {here!r} here"


def _file(job: Job) -> Path:
    return job.folder / "figures" / f"{job.name}.json"


def _kept(job: Job) -> dict[str, Any] | None:
    file = _file(job)
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        float(found["seconds"]), float(found["processor"])
        # Files are named by an arm's place; where arms were put in another order, it is another arm's.
        ours = "figures" in found and (found["arm"], found["seed"]) == (job.arm, job.seed)
        return found if ours else None
    except (ValueError, TypeError, KeyError):
        return None  # cut off, or somebody's edit: it is found out anew


def _run_all(todo: list[Job], jobs: int, threads: int) -> Iterator[tuple[Job, float]]:
    if not todo:
        return
    context = get_context("spawn")  # a fork would copy torch's threads, which do not survive it
    stop = context.Event()
    pool = ProcessPoolExecutor(min(jobs, len(todo)), context, initializer=_begin, initargs=(stop, threads))
    try:
        with _stopping(stop) as begun:
            running: dict[Future[float], Job] = {}
            with begun(threads):
                running |= {pool.submit(_run, job): job for job in todo}
            while running:
                ended, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
                if stop.is_set():
                    raise KeyboardInterrupt
                for one in ended:
                    job = running.pop(one)
                    yield job, one.result()
    except BrokenProcessPool:
        raise UserError(
            "a job's process was ended from outside (not enough memory?); what is done is kept: run the same command "
            "to go on, with --jobs 1 it needs the least memory"
        ) from None
    finally:
        stop.set()  # an error in one job ends them all
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _stopping(stop: Any) -> Iterator[Callable[[int], AbstractContextManager[None]]]:
    """Ctrl-C and SIGTERM ask the jobs to save and stop; a second Ctrl-C does not wait for them. What is yielded is for
    starting the jobs' processes in: they have so many threads from their first import on, and leave Ctrl-C, which
    reaches the whole group, to this one."""
    before: dict[int, Any] = {}

    def asked(number: int, _: Any) -> None:
        if stop.is_set() and number == signal.SIGINT:
            for child in active_children():
                child.kill()
            os._exit(130)
        stop.set()

    @contextmanager
    def begun(threads: int) -> Iterator[None]:
        kept = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = str(threads)
        with suppress(ValueError):
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a process begins with what its parent ignores
        try:
            yield
        finally:
            if kept is None:
                del os.environ["OMP_NUM_THREADS"]
            else:
                os.environ["OMP_NUM_THREADS"] = kept
            with suppress(ValueError):
                signal.signal(signal.SIGINT, asked)

    with suppress(ValueError):  # not the main thread: its owner sees to signals
        before = {number: signal.signal(number, asked) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield begun
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_stop: Any = None  # of the process of a job


def _begin(stop: Any, threads: int) -> None:
    global _stop
    _stop = stop
    for number in (signal.SIGINT, signal.SIGTERM):  # they reach the whole group; the first process tells the others
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(threads)


def _run(job: Job) -> float:
    """In a process of its own: the job's figures go into its file."""
    job = replace(job, stop=_stop.is_set)
    if job.stop():
        raise Stopped
    began, busy = time.monotonic(), time.process_time()
    lab = lab_of(job.lab.name)
    if job.arm is None:
        lab.common(job)
        figures = None
    else:
        figures = lab.run(job)
    seconds = time.monotonic() - began
    told = {
        "arm": job.arm,
        "seed": job.seed,
        "seconds": round(seconds, 2),
        "processor": round(time.process_time() - busy, 2),
        "figures": figures,
    }
    write_text(_file(job), json.dumps(told, indent=1) + "\n")
    return seconds
