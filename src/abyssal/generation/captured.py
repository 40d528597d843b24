"""Passes that are the same every time but for their numbers, as one call: what a step of decoding is.

Where all rows of a pass attend one by one (:class:`~abyssal.model.paged.Ragged`), it depends on nothing but how many
there are. So the model is run once and what it did is kept, in a tape of compiled calls on a CPU
(:mod:`abyssal.kernels.tape`) and in a CUDA graph on a GPU; from then on a pass is to put tokens, places and lengths
where the first ones were, and to run that again. On a GPU numbers of rows are rounded up, and the rows that are too
many look at nothing and write to a page of nobody's.

Models that do something which cannot be kept, and processors without compiled code, are run as ever; so are models with
forward hooks, which want to see every pass. What routers decide is among what is kept: a recorder sees it in any case.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from abyssal.kernels import native
from abyssal.kernels.tape import NotOnTape, record
from abyssal.model import OutputRecorder, Recorder, Routing, RoutingRecorder, Transformer
from abyssal.model.attention import Context
from abyssal.model.paged import PagedCache, Ragged
from abyssal.model.rotary import inverse_frequencies, rotary_tables

Compute = Callable[[list[Tensor], Context, PagedCache, Recorder | None], list[Tensor]]
"""From inputs [1, N, ...] to outputs whose first or second dimension is N as well; the recorder sees the routing."""

_KEPT = 32  # passes at a time: each keeps its activations
_ROWS = 32  # with more, calls are not what takes the time (and few() of kernels/decode.py ends here)
_SIZES = (1, 2, 4, 8, 12, 16, 24, _ROWS)  # on a GPU


class CapturedPasses:
    """Runs passes over the pages ``pools`` of ``width`` pages a sequence at most; ``spare`` is a page of nobody's.
    Where it is not ``allowed``, none is captured."""

    def __init__(
        self, model: Transformer, pools: list[list[Tensor]], width: int, spare: int, allowed: bool = True
    ) -> None:
        self.model, self.pools, self.width, self.spare, self.allowed = model, pools, width, spare, allowed
        self.page = pools[0][0].shape[1]
        self.device = pools[0][0].device
        self.sizes: Sequence[int] = _SIZES if self.device.type == "cuda" else range(1, _ROWS + 1)
        """How many rows a captured pass may have; fewer are filled up."""
        self._known: OrderedDict[Hashable, _Pass | None] = OrderedDict()
        self._possible = False
        self._weights: list[tuple[int, int]] = []

    def refresh(self) -> bool:
        """Forgets what is known where weights lie elsewhere than they did. Whether any were changed since the last
        call, as far as PyTorch tells: not through ``.data``."""
        tensors = (*self.model.parameters(), *self.model.buffers())
        before, self._weights = self._weights, [(x.data_ptr(), _version(x)) for x in tensors]
        if [place for place, _ in before] != [place for place, _ in self._weights]:
            self._known.clear()
        hooked = any(m._forward_hooks or m._forward_pre_hooks for m in self.model.modules())
        code = self.device.type == "cuda" or (self.device.type == "cpu" and native.library() is not None)
        self._possible = self.allowed and code and not hooked
        return bool(before) and before != self._weights

    def run(
        self,
        kind: Hashable,
        compute: Compute,
        inputs: list[Tensor],
        ragged: Ragged,
        recorder: Recorder | None = None,
    ) -> list[Tensor]:
        """What ``compute`` gives for ``inputs`` and ``ragged``; captured under the name ``kind`` if it can be. The
        outputs are good until the next call; what ``recorder`` is given is its own."""
        rows = inputs[0].shape[1]
        fits = not ragged.pieces and rows <= self.sizes[-1] and ragged.tables.shape[1] <= self.width
        outputs = recorder is not None and isinstance(recorder, OutputRecorder)
        if not self._possible or not fits or outputs:
            return self._plainly(compute, inputs, ragged, recorder)
        rows = next(size for size in self.sizes if size >= rows)
        key = (kind, rows, torch.get_num_threads())
        if key in self._known:
            known = self._known[key]
            self._known.move_to_end(key)
            if known is not None:
                known.again(inputs, ragged)
        else:
            try:
                known = _Pass(self, compute, inputs, ragged, rows)
            except NotOnTape:
                known = None
            self._known[key] = known
            if len(self._known) > _KEPT:
                self._known.popitem(last=False)
        if known is None:
            return self._plainly(compute, inputs, ragged, recorder)
        count = inputs[0].shape[1]
        if recorder is not None:
            known.tell(recorder, count)
        return known.results(count)

    def _plainly(
        self, compute: Compute, inputs: list[Tensor], ragged: Ragged, recorder: Recorder | None = None
    ) -> list[Tensor]:
        return compute(inputs, self.model.ragged_context(ragged), PagedCache(self.pools, ragged), recorder)


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


class _Pass:
    """One pass over ``rows`` rows, captured while it computes ``inputs``."""

    def __init__(
        self, passes: CapturedPasses, compute: Compute, inputs: list[Tensor], ragged: Ragged, rows: int
    ) -> None:
        model, device = passes.model, passes.device
        self.rows, self.config, self.dtype = rows, model.config, model.lm_head.weight.dtype
        self.inputs = [torch.zeros(1, rows, *x.shape[2:], dtype=x.dtype, device=device) for x in inputs]
        self.unused = passes.spare * passes.page
        dim, exact = self.config.attention.rotary_dim, torch.promote_types(self.dtype, torch.float32)
        self.frequencies = inverse_frequencies(self.config.rope, dim, exact, device)
        self.ragged = Ragged(
            torch.zeros(1, rows, dtype=torch.int64, device=device),
            torch.full((rows,), self.unused, dtype=torch.int64, device=device),
            torch.zeros(rows, passes.width, dtype=torch.int32, device=device),
            torch.zeros(rows, dtype=torch.int32, device=device),
            (),
        )
        self.rope = [table.contiguous() for table in self._tables(self.ragged.positions)]
        context = Context((self.rope[0], self.rope[1]), 0, None, False)
        cache = PagedCache(passes.pools, self.ragged)
        # What the calls read must not go away under them.
        self.kept = [x.detach() for x in (*model.parameters(), *model.buffers())]
        self._fill(inputs, ragged)
        routing = RoutingRecorder()

        def call() -> list[Tensor]:
            routing.routings.clear()  # a graph is computed more than once until it is kept
            return compute(self.inputs, context, cache, routing)

        if device.type == "cuda":
            self.replay, self.outputs = _graph(call, device)
        else:
            with record() as tape:
                self.outputs = call()
            self.replay = lambda: native.play(tape)
        self.routings = [(layer, given) for layer, (given,) in routing.routings.items()]

    def again(self, inputs: list[Tensor], ragged: Ragged) -> None:
        """Computes other numbers."""
        self._fill(inputs, ragged)
        self.replay()

    def results(self, count: int) -> list[Tensor]:
        """The outputs' first ``count`` rows."""
        return [x if count == self.rows else x.narrow(x.shape.index(self.rows), 0, count) for x in self.outputs]

    def tell(self, recorder: Recorder, count: int) -> None:
        """Hands what the routers decided for the first ``count`` rows to ``recorder``; copies, if it keeps them."""
        keeps = getattr(recorder, "keeps", True)
        for layer, routing in self.routings:
            parts = [routing.indices, routing.weights, routing.scores]
            if count < self.rows:
                choices = count * parts[0].shape[1] // self.rows  # segments of a token have choices of their own
                parts = [part[:, :choices] for part in parts]
            if keeps:
                routing = Routing(*(part.clone() for part in parts))
            elif count < self.rows:
                routing = Routing(*parts)
            recorder.record(layer, routing)

    def _fill(self, inputs: list[Tensor], ragged: Ragged) -> None:
        count = inputs[0].shape[1]
        for mine, x in zip(self.inputs, inputs, strict=True):
            mine[:, :count] = x
        places = self.ragged
        places.positions[:, :count] = ragged.positions
        places.slots[:count] = ragged.slots
        places.tables[:count, : ragged.tables.shape[1]] = ragged.tables
        places.lengths[:count] = ragged.lengths
        if count < self.rows:
            places.slots[count:] = self.unused
            places.lengths[count:] = 0
        for table, new in zip(self.rope, self._tables(places.positions), strict=True):
            table.copy_(new)

    def _tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        dim = self.config.attention.rotary_dim
        return rotary_tables(self.config.rope, dim, positions, self.dtype, self.frequencies)


def _graph(compute: Callable[[], list[Tensor]], device: torch.device) -> tuple[Callable[[], None], list[Tensor]]:
    """Raises NotOnTape for what waits for the device."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            compute()  # kernels are compiled, and libraries get their memory, before anything is kept
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("error")
            try:
                compute()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise NotOnTape(str(error)) from error
            finally:
                torch.cuda.set_sync_debug_mode(before)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = compute()

    def replay() -> None:
        with torch.cuda.device(device):
            graph.replay()

    replay()
    return replay, outputs
