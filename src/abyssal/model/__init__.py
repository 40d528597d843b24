"""Tensors in, tensors out: the model, without files, processes or global state."""

from abyssal.model.cache import Cache
from abyssal.model.router import OutputRecorder, Recorder, Routing, RoutingRecorder
from abyssal.model.transformer import Transformer

__all__ = ["Cache", "OutputRecorder", "Recorder", "Routing", "RoutingRecorder", "Transformer"]
