"""The pages of an engine, and who holds them.

Every page is in one of three states: free; held by one or more sequences; or idle, which is held by nobody but still
full of a known text's latents, so that a prompt that begins with this text need not be computed (prefix caching). Idle
pages are given out again when no free ones are left, those first that were let go the longest ago.

What is known is a tree whose edges are pages of tokens: the path from the root to a node spells a text, and the
node has the page with its last tokens. A sequence holds all pages on its path, so a node falls idle no earlier than
what hangs on it; sequences let go of their last page first, so the oldest idle page never has one hanging on it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Pages
from dataclasses import dataclass, field

import torch

from abyssal.config import ModelConfig
from abyssal.model.paged import make_pools


@dataclass(eq=False)
class Node:
    """A page of known text."""

    page: int
    edge: tuple[int, ...]
    """The tokens that lead here from the parent."""
    parent: Node | None
    children: dict[tuple[int, ...], Node] = field(default_factory=dict)


class PagePool:
    """``pages`` pages of ``page`` tokens for ``layers`` layers of a model. Nothing else knows which pages are free."""

    def __init__(
        self,
        config: ModelConfig,
        pages: int,
        page: int,
        *,
        layers: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.page, self.pages, self.device = page, pages, device
        self.pools = make_pools(config, pages + 1, page, layers=layers, dtype=dtype, device=device)
        """[layer][tensor], [pages + 1, page, …] each; the last page is nobody's, for rows that fill a pass up."""
        self.root = Node(-1, (), None)
        self._free = list(range(pages))[::-1]
        self._holders = [0] * pages
        self._known: dict[int, Node] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Pages that :meth:`take` can still give."""
        return len(self._free) + len(self._idle)

    @property
    def in_use(self) -> int:
        """Pages that sequences hold."""
        return self.pages - self.available

    def take(self) -> int | None:
        """A page for one holder, its content forgotten; None: all are held."""
        if self._free:
            page = self._free.pop()
        elif self._idle:
            page, _ = self._idle.popitem(last=False)
            node = self._known.pop(page)
            assert node.parent is not None
            assert not node.children
            del node.parent.children[node.edge]
        else:
            return None
        self._holders[page] = 1
        return page

    def forget(self) -> None:
        """Nothing is known any more; for a pool that nobody holds pages of, whose model has changed."""
        assert self.in_use == 0
        self._free += self._idle
        self._idle.clear()
        self._known.clear()
        self.root = Node(-1, (), None)

    def release(self, pages: Pages[int]) -> None:
        """One holder lets go of ``pages``, a sequence's in its order."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page] > 0:
                continue
            if page in self._known:
                self._idle[page] = None
            else:
                self._free.append(page)

    def find(self, edges: Iterable[tuple[int, ...]]) -> list[Node]:
        """The known pages along ``edges``, as far as they go, each held once more for the caller."""
        path: list[Node] = []
        node = self.root
        for edge in edges:
            following = node.children.get(edge)
            if following is None:
                break
            node = following
            self._hold(node.page)
            path.append(node)
        return path

    def publish(self, parent: Node, edge: tuple[int, ...], page: int) -> Node:
        """Makes ``page``, whose tokens follow ``parent``'s text, known by ``edge``. Where another sequence was first,
        its page is held instead and this one is let go of: the caller goes on with the node's."""
        known = parent.children.get(edge)
        if known is not None:
            self._hold(known.page)
            self.release([page])
            return known
        node = Node(page, edge, parent)
        parent.children[edge] = node
        self._known[page] = node
        return node

    def _hold(self, page: int) -> None:
        self._holders[page] += 1
        self._idle.pop(page, None)
