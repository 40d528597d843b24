"""``abyssal.export`` and ``abyssal.convert``: the published layout, for transformers, vLLM, SGLang and whoever reads
it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from abyssal.checkpoint.adapter import read_adapter
from abyssal.checkpoint.convert import convert as convert_folder
from abyssal.checkpoint.export import SHARD_SIZE, InMemory, check_target, write_model
from abyssal.checkpoint.load import Progress, read_model_config, wanted_tensors
from abyssal.checkpoint.merge import Patched, Rounding, adapter_patches, overlay_patches
from abyssal.checkpoint.overlay import is_overlay, read_overlay
from abyssal.checkpoint.packing import packings, stored_kind
from abyssal.checkpoint.recast import Source
from abyssal.checkpoint.run import MANIFEST
from abyssal.checkpoint.shards import Shards
from abyssal.config import ModelConfig, read_mapping
from abyssal.data.tokenizer import Tokenizer
from abyssal.errors import UserError
from abyssal.kernels.packed import Kind
from abyssal.loading import base_of, find, find_tokenizer
from abyssal.model import Transformer
from abyssal.model.adapting import adapters, matrices


def export(
    source: str | Path | Transformer,
    folder: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    dtype: torch.dtype | None = None,
    shard_size: int = SHARD_SIZE,
    power_of_two: bool = False,
    allow_missing: Sequence[str] = (),
    force: bool = False,
    progress: Progress | None = None,
    rounding: Callable[[Rounding], None] | None = None,
) -> Path:
    """Writes ``source`` (a run, a folder, a name on the hub, or a model in memory) to ``folder``, and returns it.

    Written are config.json, generation_config.json, the tokenizer with its chat template, and weights a tensor an
    expert, in shards of at most ``shard_size`` bytes. From a folder, tensors are streamed: nothing more than one shard
    of it is in memory. ``dtype`` None keeps the stored one; ``torch.float8_e4m3fn`` writes FP8 blocks as V3's (scales
    powers of two with ``power_of_two``). Packed weights stay packed, for abyssal alone, or with a ``dtype`` are
    dequantised. ``tokenizer`` replaces the source's own. Embedding and head are repeated
    under the MTP modules of what was trained here, as serving engines expect; a published folder stays as it is.
    An adapter is merged into its base on the way, in FP32, and cast or quantised to what is stored; what this rounding
    did to it is told to ``rounding`` at the end.

    Raises UserError where ``folder`` exists, the disk is too small, the source is damaged, the layout cannot express
    the model, or (without ``force``) transformers' code for it would compute something else.
    """
    folder = Path(folder).absolute()
    check_target(folder)
    patched: Patched | None = None
    if isinstance(source, Transformer):
        if next(adapters(source), None) is not None:
            raise UserError("the model has an adapter beside it; merge_lora(model) first, or write_adapter alone")
        held = InMemory(source)
        tensors: Source = held
        wanted: Collection[str] = held.wanted
        packed = held.packed
        config, own, generation = source.config, tokenizer, None
        trained_here = True
    else:
        found = find(source)
        if found.resolve() in folder.resolve().parents:
            raise UserError(f"{folder}: lies in the source; choose a folder outside {found}")
        base = base_of(found)
        config, shards = read_model_config(base), Shards(base)
        wanted, tensors = wanted_tensors(config, shards, allow_missing), shards
        packed = packings(config, stored_kind(config, base))
        own = tokenizer or find_tokenizer(found)
        holder = found if (found / "generation_config.json").is_file() else base
        generation = read_mapping(path) if (path := holder / "generation_config.json").is_file() else None
        if base != found:
            if packed:
                kind = stored_kind(config, base)
                raise UserError(f"{base}: its weights are {kind}; merge into the checkpoint that they were made from")
            tensors = patched = _patched(found, config, shards, wanted)
            trained_here = (base / "state.json").is_file()
        else:
            trained_here = (Path(source) / MANIFEST).is_file() or (found / "state.json").is_file()
    if own is not None and own.chat is not None:
        own.chat.check()
    if own is not None and own.vocab_size > config.vocab_size:
        raise UserError(f"tokenizer: its vocabulary of {own.vocab_size} is larger than the model's {config.vocab_size}")
    write_model(
        tensors,
        wanted,
        config,
        folder,
        dtype=dtype,
        packed=packed,
        shard_size=shard_size,
        power_of_two=power_of_two,
        repeat_shared=trained_here,
        generation_config=generation or _generation_config(config, own),
        write_others=own.save if own is not None else None,
        written=patched.written if patched is not None else None,
        force=force,
        progress=progress,
    )
    if patched is not None and rounding is not None:
        rounding(patched.rounding)
    return folder


def _patched(found: Path, config: ModelConfig, shards: Shards, wanted: Collection[str]) -> Patched:
    """The base with what ``found`` holds worked in."""
    if is_overlay(found):
        return Patched(shards, overlay_patches(read_overlay(found)))
    adapter = read_adapter(found)
    adapter.check_base(config)
    with torch.device("meta"):
        known = matrices(Transformer(config))
    shapes = {name: shards[name].shape for name in wanted}
    return Patched(shards, adapter_patches(adapter.changes(known), shapes))


def convert(
    source: str | Path,
    folder: str | Path,
    to: torch.dtype | Kind,
    *,
    power_of_two: bool = False,
    allow_missing: Sequence[str] = (),
    progress: Progress | None = None,
    verifying: Progress | None = None,
) -> Path:
    """Writes the checkpoint ``source`` (a folder, a run, a name on the hub) to ``folder`` in the dtype ``to``, or
    packed as "int8" or "int4", shard by shard; returns ``folder``. See :func:`abyssal.checkpoint.convert.convert`."""
    found = find(source)
    if base_of(found, weights=False) != found:
        raise UserError(
            f"{found}: not a model but what changes one; merge it first: abyssal export {source} NEW-FOLDER"
        )
    convert_folder(
        found,
        Path(folder),
        to,
        power_of_two=power_of_two,
        allow_missing=allow_missing,
        progress=progress,
        verifying=verifying,
    )
    return Path(folder)


def _generation_config(config: ModelConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Where text begins and ends: the model's own ids, the tokenizer's, and the end of an assistant's turn."""
    several = config.published.get("eos_token_id")
    ends = list(several) if isinstance(several, list) else [config.eos_token_id]
    if tokenizer is not None:
        ends += [tokenizer.eos_id, *sorted(tokenizer.end_of_turn_ids | tokenizer.end_ids)]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    bos = config.bos_token_id if tokenizer is None or tokenizer.bos_id is None else tokenizer.bos_id
    out: dict[str, Any] = {"_from_model_config": True}
    if bos is not None:
        out["bos_token_id"] = bos
    if ends:
        out["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    return out
