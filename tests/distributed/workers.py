"""Processes that work together through gloo, started once for all tests: ``Workers.run`` has each of them call a
function (``module.name``, or a name in :mod:`jobs`) inside a process group of as many as the test wants."""

from __future__ import annotations

import faulthandler
import gc
import importlib
import queue
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

LIMIT = 240.0  # seconds until a job counts as hung
FRESH = 20  # jobs that processes do before others take their place


def _serve(rank: int, inbox: Any, outbox: Any) -> None:
    torch.set_num_threads(1)
    while (order := inbox.get()) is not None:
        job, size, meeting_place, arguments, options = order
        try:
            store = dist.FileStore(meeting_place, size)
            dist.init_process_group(
                "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=LIMIT / 2)
            )
            faulthandler.dump_traceback_later(0.8 * LIMIT)  # where a process hangs
            try:
                module, _, name = job.rpartition(".")
                function = getattr(importlib.import_module(module or "jobs"), name)
                outbox.put((rank, function(*arguments, **options), None))
            finally:
                faulthandler.cancel_dump_traceback_later()
                dist.destroy_process_group()
                gc.collect()  # groups that something still has keep threads that poll
        except BaseException:
            outbox.put((rank, None, traceback.format_exc()))


class Workers:
    """``count`` processes; :meth:`close` ends them. Every so many jobs they are begun anew: caches of torch's keep the
    groups of jobs that are over, and each of these has threads that poll."""

    def __init__(self, count: int = 4) -> None:
        self.count, self.jobs = count, 0
        self.folder = tempfile.TemporaryDirectory()
        self._start()

    def _start(self) -> None:
        count, context = self.count, mp.get_context("spawn")
        self.inboxes, self.outbox = [context.Queue() for _ in range(count)], context.Queue()
        self.processes = [
            context.Process(target=_serve, args=(rank, inbox, self.outbox), daemon=True)
            for rank, inbox in enumerate(self.inboxes)
        ]
        for process in self.processes:
            process.start()

    def run(self, job: str, *arguments: Any, size: int, **options: Any) -> list[Any]:
        """What ``job`` returned in each of the first ``size`` processes."""
        if self.jobs and self.jobs % FRESH == 0:
            self._end()
            self._start()
        self.jobs += 1
        place = str(Path(self.folder.name) / f"job-{self.jobs}")
        for inbox in self.inboxes[:size]:
            inbox.put((job, size, place, arguments, options))
        results: list[Any] = [None] * size
        errors = []
        for _ in range(size):
            try:
                rank, result, error = self.outbox.get(timeout=LIMIT)
            except queue.Empty:
                raise AssertionError("\n".join([f"{job}: a process hangs", *errors])) from None
            results[rank] = result
            errors += [f"process {rank}: {error}"] if error else []
        assert not errors, "\n".join(errors)
        return results

    def close(self) -> None:
        self._end()
        self.folder.cleanup()

    def _end(self) -> None:
        for inbox in self.inboxes:
            inbox.put(None)
        for process in self.processes:
            process.join(10)
            process.kill()
