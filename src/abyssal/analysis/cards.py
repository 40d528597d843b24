"""GPUs by name: what a plan needs to know of them, from their vendors' data sheets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """``memory`` in bytes, 10^9 to the data sheet's GB; dense BF16 products with FP32 sums in FLOP/s, None where
    unknown; ``link`` in bytes a second, one way, to the other GPUs of its node (NVLink, Infinity Fabric, or PCIe)."""

    name: str
    memory: float
    flops: float | None
    link: float


def _card(name: str, gigabytes: float, teraflops: float, link: float) -> Card:
    return Card(name, gigabytes * 1e9, teraflops * 1e12, link * 1e9)


CARDS = {
    card.name: card
    for card in (
        _card("a100-40gb", 40, 312, 300),
        _card("a100-80gb", 80, 312, 300),
        _card("h100", 80, 989, 450),  # SXM5
        _card("h800", 80, 989, 200),  # H100 with NVLink of 400 GB/s, both ways counted
        _card("h20", 96, 148, 450),
        _card("h200", 141, 989, 450),
        _card("b200", 180, 2250, 900),  # as in HGX B200
        _card("l40s", 48, 362, 32),
        _card("rtx-3090", 24, 71, 32),
        _card("rtx-4090", 24, 165.2, 32),
        _card("mi300x", 192, 1307.4, 448),
    )
}
