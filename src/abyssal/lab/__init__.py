"""Experiments on small models: repeatable runs, over several seeds, that answer questions about the architecture."""
