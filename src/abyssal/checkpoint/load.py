"""A published checkpoint into a model: tensor by tensor from mapped files, straight into place, cast or
quantised on the way, or packed as it is stored.

First everything is compared by names, shapes and dtypes alone (:func:`match`); only when all fits is memory taken. What
is in memory then is the model, and of the files at most one shard's pages.
"""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from abyssal.checkpoint.names import BIAS, SCALE, disk_tensors, is_derived, layer_of, repeated_names, stacked_name
from abyssal.checkpoint.packing import (
    SCALES,
    check_packed_scales,
    from_disk,
    on_disk,
    packings,
    stored_kind,
    wrong_packed,
)
from abyssal.checkpoint.parts import WHOLE, Part
from abyssal.checkpoint.recast import check_scales
from abyssal.checkpoint.shards import DTYPES, Shards, tensor_names
from abyssal.config import ModelConfig, MTPConfig, read_config
from abyssal.errors import UserError
from abyssal.kernels import fp8, nf4
from abyssal.kernels.nf4 import NF4
from abyssal.kernels.packed import Kind, Packed, dequantize, quantize
from abyssal.model import Transformer
from abyssal.model.fp8 import use_fp8
from abyssal.model.quantized import Held, nf4_matrices, packed_matrices, use_packed

Progress = Callable[[int, int], None]
"""Called with bytes read so far and in all."""
Weights = Literal["auto", "dense", "fp8", "int8", "int4", "nf4"]
"""What a model's weights are in memory; auto: int8 or int4 where the checkpoint holds that, else dense."""


@dataclass(frozen=True)
class Match:
    """How a checkpoint's tensors meet a model's."""

    names: list[str]
    """Tensors to be read, as the model has them; FP8 scales not among them."""
    quantized: set[str]
    """Those of them that are stored in FP8 blocks."""
    packed: dict[str, Packed]
    """Those of them that are stored packed, and how."""
    copies: dict[str, str]
    """What the checkpoint repeats (under MTP modules; a tied head), and of which tensor it is a copy."""
    absent: list[str]
    """Missing from the checkpoint, and allowed to be."""


def load_model(
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    layers: int | Sequence[int] | None = None,
    weights: Weights = "auto",
    allow_missing: Sequence[str] = (),
    part: Part = WHOLE,
    threads: int = 1,
    progress: Progress | None = None,
) -> Transformer:
    """The model in ``folder``, in eval mode.

    ``dtype`` None takes the embedding's (BF16 for the published FP8 files). ``layers`` reads the first so many, or just
    those listed, with embedding, norm and head: the others are empty places, and their files need not be there.
    ``weights="auto"`` keeps what is stored packed and is ``"dense"`` for other checkpoints. ``"fp8"`` keeps what is
    stored in FP8 blocks as it is and computes with it (abyssal.model.fp8); ``"dense"`` dequantises, packed weights with
    a warning. ``"int8"`` and ``"int4"`` quantise every tensor as it is read, from the file's own numbers whatever
    ``dtype`` is, so that the dense model is never in memory (abyssal.model.quantized); from one to the other there is
    no way. ``"nf4"`` does the same, for training adapters on.
    Tensors missing or left over are an error unless a pattern of ``allow_missing`` names them; missing ones are drawn
    anew. Of a ``part`` nothing else is read or takes memory, and nothing may be missing. ``threads`` read tensors side
    by side.

    Raises UserError, before any weight is read, where a file is missing or damaged or tensors and config.json disagree.
    """
    if weights not in get_args(Weights):
        raise UserError(f"weights: {weights!r} is not one of {', '.join(map(repr, get_args(Weights)))}")
    if dtype is not None and dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise UserError(f"dtype: {dtype!r} is not one of torch.bfloat16, float16, float32, float64")
    try:
        device = torch.device(device or "cpu")
    except (RuntimeError, TypeError) as error:
        raise UserError(f"device: {device!r} is not one that torch knows ({str(error).splitlines()[0]})") from None
    if not isinstance(threads, int) or threads < 1:
        raise UserError(f"threads: {threads!r} is not a number from 1")
    config = read_model_config(folder)
    held = _weights(weights, stored_kind(config, folder), folder)
    kept = kept_layers(layers, config)
    shards = Shards(folder, kept)
    with torch.device("meta"):
        model = Transformer(config)
    keep_layers(model, kept)
    found = match(model, shards, allow_missing)
    if found.absent and not part.whole:
        raise UserError(f"{shards.source}: tensors missing: {_listed(found.absent)}; none may be on several processes")
    if held == "fp8":
        part.check_fp8((name, shards[name].shape) for name in found.quantized)
    elif held != "dense":
        part.check_packed(found.packed)
    part.take(model)
    if held == "fp8":
        if not found.quantized:
            raise UserError(
                f"{folder}: weights='fp8' needs a checkpoint in FP8 blocks (….weight{SCALE}); convert it first: "
                "abyssal convert SRC DST --to fp8"
            )
        whole = {stacked_name(name) for name in found.quantized}
        whole -= {stacked_name(name) for name in (*found.names, *found.absent) if name not in found.quantized}
        whole.discard("lm_head.weight")  # as published; its dtype is the model's
        use_fp8(model, whole, power_of_two=config.scales_are_powers_of_two)
    elif held != "dense":
        use_packed(model, held)
    if held != "dense":
        model.requires_grad_(False)  # what is quantised is not trained
    model.to(dtype or _dtype_of(shards))
    # What to_empty does; that imports sympy for a tensor on the meta device.
    model._apply(lambda x: torch.empty(x.shape, dtype=x.dtype, device=device))
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight  # each of the two got its own memory
    fill(model, shards, found, part=part, threads=threads, progress=progress)
    return model.eval()


def _weights(wanted: Weights, stored: Kind | None, folder: Path) -> Literal["dense", "fp8"] | Held:
    """What ``wanted`` comes to for a checkpoint that is packed as ``stored``."""
    if stored is None:
        return "dense" if wanted == "auto" else wanted
    if wanted == "dense":
        warnings.warn(f"{folder}: its weights are {stored}; dequantised, and no more exact than that", stacklevel=3)
    elif wanted not in ("auto", stored):
        raise UserError(
            f"{folder}: its weights are {stored} and not made {wanted} from that; expected {stored}, dense or auto, "
            "or the checkpoint that it was made from"
        )
    return stored if wanted == "auto" else wanted


def read_model_config(folder: Path) -> ModelConfig:
    """config.json of a checkpoint, with as many MTP modules as the checkpoint holds.

    transformers writes ``num_nextn_predict_layers: 1`` beside models that it saves without one, and older files hold
    modules that their config does not count. Both are taken as the tensors say, with a warning; a number of modules
    that is neither 0 in one nor in the other is left to :func:`match`, which refuses it.
    """
    config = read_config(folder)
    said, n = config.mtp.num_nextn_predict_layers, config.num_hidden_layers
    found = {layer_of(name) for name in tensor_names(folder) if name.endswith(".eh_proj.weight")}
    held = 0
    while n + held in found:
        held += 1
    if said == held or (said and held):
        return config
    warnings.warn(
        f"{folder}: config.json says num_nextn_predict_layers {said}, the checkpoint holds {held} MTP modules; "
        "taken as the checkpoint has it",
        stacklevel=3,
    )
    return config.model_copy(update={"mtp": MTPConfig(num_nextn_predict_layers=held)})


def load_into(model: Transformer, folder: Path) -> None:
    """Replaces ``model``'s weights by those in ``folder``. Raises UserError as :func:`load_model` does."""
    shards = Shards(folder)
    fill(model, shards, match(model, shards))


def match(model: Transformer, shards: Shards, allow_missing: Sequence[str] = ()) -> Match:
    """Compares names, shapes and dtypes; ``model`` (dense) may be on the meta device.

    Raises UserError that lists the tensors missing, left over, of another shape, or in FP8 or packed without their
    scales.
    """
    config = model.config
    packed = packings(config, stored_kind(config, shards.folder))
    targets = dict(disk_tensors(model))
    quantized = {name for name, stored in shards.tensors.items() if stored.dtype == torch.float8_e4m3fn}
    left = {name for name in shards.tensors if not is_derived(name)}
    copies = {
        name: original
        for name, original in repeated_names(config).items()
        if name in left and original in shards and not _allowed([name], allow_missing)
    }
    left -= copies.keys()
    missing, wrong = [], []
    for name, target in targets.items():
        if name.endswith(SCALE):
            continue
        if name not in shards:
            missing.append(name)
            continue
        left.discard(name)
        stored = shards[name]
        if name in packed:
            left.discard(name + SCALES)
            wrong += wrong_packed(name, shards, packed[name])
        elif stored.dtype == torch.uint8:
            left.discard(name + SCALES)
            known = ", ".join(key for key, dtype in DTYPES.items() if dtype != torch.uint8)
            wrong.append(f"{name}: U8, and no quantization_config says that it is packed; expected one of {known}")
        elif stored.shape != tuple(target.shape):
            wrong.append(f"{name}: shape {list(stored.shape)}, the config says {list(target.shape)}")
        elif name in quantized:
            left.discard(name + SCALE)
            wrong += _wrong_scale(name, shards)
        elif stored.dtype == torch.float8_e8m0fnu:
            wrong.append(f"{name}: F8_E8M0, which is for scales")
    for name in sorted(left):
        weight = name.removesuffix(SCALE)
        if weight in quantized:
            left.discard(name)  # it goes where its weight goes
        elif weight != name and weight in shards:
            wrong.append(f"{name}: a scale, but its weight is {shards[weight].dtype} and not FP8")
            left.discard(name)
    absent = _allowed(missing, allow_missing)
    dropped = _allowed(sorted(left), allow_missing)
    for trouble, names in (
        ("missing", [n for n in missing if n not in absent]),
        ("unexpected", sorted(left - set(dropped))),
        ("wrong", wrong),
    ):
        if names:
            raise UserError(f"{shards.source}: tensors {trouble}: {_listed(names)}")
    if absent or dropped:
        told = [f"drawn anew: {_listed(absent)}"] * bool(absent) + [f"left out: {_listed(dropped)}"] * bool(dropped)
        warnings.warn(f"{shards.source}: {'; '.join(told)}", stacklevel=3)
    names = [name for name in targets if name in shards and not name.endswith(SCALE)]
    return Match(
        names, quantized & targets.keys(), {name: packed[name] for name in names if name in packed}, copies, absent
    )


def wanted_tensors(config: ModelConfig, shards: Shards, allow_missing: Sequence[str] = ()) -> set[str]:
    """The tensors of a checkpoint that is to be written anew: all that the model has, and copies; not what
    ``allow_missing`` leaves out. Raises UserError as :func:`match` does, and for what is missing, allowed or not."""
    with torch.device("meta"):
        found = match(Transformer(config), shards, allow_missing)
    if found.absent:
        raise UserError(f"{shards.source}: tensors missing: {_listed(found.absent)}; no copy can be made without")
    return {*found.names, *found.copies}


@torch.no_grad()
def fill(
    model: Transformer,
    shards: Shards,
    found: Match,
    *,
    part: Part = WHOLE,
    threads: int = 1,
    progress: Progress | None = None,
) -> None:
    """Reads what was matched into ``model``, which is a ``part`` of what was matched, one file after the other. Raises
    UserError where a copy under an MTP module is not equal to what it repeats."""
    targets = {part.published(name): tensor for name, tensor in disk_tensors(model)}
    matrices: dict[str, Packed | NF4] = {**dict(packed_matrices(model)), **dict(nf4_matrices(model))}
    places = {part.published(name): matrix for name, matrix in matrices.items()}
    wanted = {name for name in (*found.names, *found.copies) if part.has(name)}
    total = sum(shards[name].nbytes for name in wanted)
    done = 0

    def own(tensor: Tensor, name: str) -> Tensor:
        return tensor[part.cut(name, tensor.shape)]

    def read(file: Any, name: str) -> int:
        if name in found.copies:
            check_copy(file.get_tensor(name), name, found.copies[name], shards, part)
        elif name in found.packed:
            scales = _beside(file, shards, name, name + SCALES)
            check_packed_scales(scales, name)
            place = places.get(name)
            if isinstance(place, Packed):
                for (_, to), tensor in zip(on_disk(name, place), (file.get_tensor(name), scales), strict=True):
                    to.copy_(own(tensor, name))
            else:
                device = targets[name].device
                held = from_disk(file.get_tensor(name).to(device), scales.to(device), found.packed[name])
                targets[name].copy_(own(dequantize(held, targets[name].dtype), name))
        elif name not in found.quantized:
            if name in places:
                _pack(own(file.get_tensor(name), name), places[name])
            else:
                targets[name].copy_(own(file.get_tensor(name), name))
        else:
            scale = name + SCALE
            scales = _beside(file, shards, name, scale)
            check_scales(scales, name)
            blocks = file.get_tensor(name)
            aligned = part.in_blocks(name, blocks.shape, fp8.BLOCK)
            if aligned:
                blocks, scales = own(blocks, name), own(scales, name)
            if name in places:
                device = places[name].data.device
                numbers = fp8.dequantize(blocks.to(device), scales.to(device), torch.float32)
                _pack(numbers if aligned else own(numbers, name), places[name])
            elif targets[name].dtype == torch.float8_e4m3fn:
                targets[name].copy_(blocks)
                targets[scale].copy_(scales.float())
            elif aligned:
                device = targets[name].device
                fp8.dequantize(blocks.to(device), scales.to(device), out=targets[name])
            else:
                targets[name].copy_(own(fp8.dequantize(blocks, scales, targets[name].dtype), name))
        return shards[name].nbytes

    in_order = (name for file in shards.files for name in shards.names(file) if name in wanted)
    for file, names in shards.batches(in_order):
        # The pool within: after an error, no thread may still be reading when the file is closed.
        with shards.open(file) as opened, ThreadPoolExecutor(threads) as pool:
            for nbytes in pool.map(lambda name, opened=opened: read(opened, name), names):
                done += nbytes
                if progress is not None:
                    progress(done, total)
    embedding = model.model.embed_tokens.weight
    generator = torch.Generator(embedding.device).manual_seed(0)
    for name in found.absent:
        if name in places:
            drawn = embedding.new_empty(places[name].shape)
            _draw(drawn, name, model.config, generator)
            _pack(drawn, places[name])
        else:
            _draw(targets[name], name, model.config, generator)


def keep_layers(model: Transformer, kept: set[int] | None) -> None:
    """Puts empty places where layers (MTP modules count on) are not in ``kept``; names of the others stay."""
    for i in range(len(model.model.layers)):
        if kept is not None and i not in kept:
            model.model.layers[i] = nn.Identity()


def kept_layers(layers: int | Sequence[int] | None, config: ModelConfig) -> set[int] | None:
    """Which layers ``layers`` means: the first so many, or those listed; None: all. Raises UserError."""
    if layers is None:
        return None
    last = config.num_hidden_layers + config.mtp.num_nextn_predict_layers - 1
    if isinstance(layers, int) and not isinstance(layers, bool):
        if not 1 <= layers <= config.num_hidden_layers:
            raise UserError(f"layers: {layers}; the model has {config.num_hidden_layers}, expected 1 to that")
        return set(range(layers))
    if not isinstance(layers, Iterable) or isinstance(layers, str):
        raise UserError(f"layers: {layers!r}; expected a number of layers or a list of them")
    for layer in layers:
        if not isinstance(layer, int) or isinstance(layer, bool) or not 0 <= layer <= last:
            raise UserError(f"layers: {layer!r}; expected numbers from 0 to {last}")
    return set(layers)


def _wrong_scale(name: str, shards: Shards) -> list[str]:
    if name + SCALE not in shards:
        return [f"{name}: FP8 without its scales ({name}{SCALE} is missing)"]
    scale, right = shards[name + SCALE], fp8.scale_shape(shards[name].shape)
    if len(shards[name].shape) != 2 or scale.shape != right:
        return [f"{name}{SCALE}: shape {list(scale.shape)}, a weight of {list(shards[name].shape)} has {list(right)}"]
    if scale.dtype == torch.float8_e4m3fn:
        return [f"{name}{SCALE}: F8_E4M3; expected F32 or F8_E8M0"]
    return []


def _beside(file: Any, shards: Shards, name: str, scale: str) -> Tensor:
    """The scales of ``name``, which lies in ``file``; they may lie in another one."""
    tensor: Tensor = file.get_tensor(scale) if shards[scale].file == shards[name].file else shards.read(scale)
    return tensor


def check_copy(copy: Tensor, name: str, original: str, shards: Shards, part: Part = WHOLE) -> None:
    """Raises UserError where ``copy``, stored as ``name``, is not what ``original`` is; looks at ``part`` of it."""
    cut = part.cut(original, copy.shape)
    if shards[name].shape != shards[original].shape or not torch.equal(copy[cut], shards.read(original, cut)):
        raise UserError(
            f"{shards.source}: {name} differs from {original}; abyssal shares the two, as published, and would lose it "
            f"(--allow-missing {name} leaves it out)"
        )


def _pack(weight: Tensor, place: Packed | NF4) -> None:
    weight = weight.to(place.data.device).contiguous()
    if isinstance(place, NF4):
        for to, tensor in zip(place.tensors, nf4.quantize(weight).tensors, strict=True):
            to.copy_(tensor)
        return
    made = quantize(weight, place.kind)
    place.data.copy_(made.data)
    place.scales.copy_(made.scales)


def _draw(target: Tensor, name: str, config: ModelConfig, generator: torch.Generator) -> None:
    if name.endswith("norm.weight"):
        target.fill_(1.0)
    elif name.endswith((".bias", BIAS)):
        target.zero_()
    else:
        target.normal_(0.0, config.initializer_range, generator=generator)


def _allowed(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f", … ({len(names)} in all)" if len(names) > 8 else "")


def _dtype_of(shards: Shards) -> torch.dtype:
    embedding = shards.tensors.get("model.embed_tokens.weight")
    return embedding.dtype if embedding is not None and embedding.dtype.itemsize > 1 else torch.bfloat16
