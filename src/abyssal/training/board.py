"""The run's metrics in TensorBoard, where it is installed; metrics.jsonl has them in any case."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class Board:
    """Writes metrics records as TensorBoard scalars into ``folder``; does nothing where TensorBoard is missing."""

    def __init__(self, folder: Path, first_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.writer = None
            return
        # What an interrupted run wrote after its last checkpoint is replaced by the resumed one.
        self.writer = SummaryWriter(str(folder), purge_step=first_step)

    def add(self, record: dict[str, Any]) -> None:
        """One record of metrics.jsonl."""
        if self.writer is None:
            return
        for name, value in _scalars(record).items():
            self.writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Flushes what is buffered."""
        if self.writer is not None:
            self.writer.close()


def _scalars(record: dict[str, Any]) -> dict[str, float]:
    if record["kind"] == "validation":
        return {f"validation/{key}": value for key, value in record.items() if isinstance(value, float)}
    if record["kind"] != "train":
        return {}
    out = {f"train/{key}": value for key, value in record.items() if isinstance(value, float)}
    out |= {f"train/mtp_loss_{k}": value for k, value in enumerate(record["mtp_loss"], start=1)}
    out |= {f"memory/{key}": value for key, value in record["memory"].items() if value is not None}
    for layer, row in record["layers"].items():
        out |= {f"balance_layer_{layer}/{key}": row[key] for key in ("cv", "max_vio", "dead")}
    return out
