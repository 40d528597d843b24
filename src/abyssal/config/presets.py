"""Named models: the published ``config.json`` files, and small ones of our own, each a file under presets/."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from abyssal.config.model_config import ModelConfig
from abyssal.config.parsing import merge, parse, read_mapping
from abyssal.config.published import from_published
from abyssal.errors import UserError, nearest

# The order a reader wants: the published line, what others made of it, then what can be trained at home.
_ORDER = (
    *("deepseek-moe-16b", "deepseek-v2-lite", "deepseek-v2", "deepseek-v3", "deepseek-r1", "deepseek-v3.1"),
    *("moonlight-16b-a3b", "kimi-k2"),
    *("deepseek-llm-7b", "llama2-7b"),  # dense, which DeepSeekMoE-16B is compared with
    *("demo", "small", "base"),
    *("yxanul-197m", "yxanul-197m-mini-moe", "yxanul-197m-low-rank", "smollm2-135m-mla-moe", "first-moe"),
)


def preset_names() -> list[str]:
    """Names of all presets."""
    folder = resources.files("abyssal.config") / "presets"
    found = {entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json")}
    return [name for name in _ORDER if name in found] + sorted(found - set(_ORDER))


def preset(name: str) -> ModelConfig:
    """The preset called ``name``. Raises UserError with the nearest name where there is none."""
    names = preset_names()
    if name not in names:
        raise UserError(f"preset {name!r}: no such preset{nearest(name, names) or '; known: ' + ', '.join(names)}")
    text = (resources.files("abyssal.config") / "presets" / f"{name}.json").read_text(encoding="utf-8")
    return config_from_dict(json.loads(text), f"preset {name}")


def config_from_dict(data: dict[str, Any], where: str) -> ModelConfig:
    """A published config.json (it has a ``model_type``) or abyssal's own form, as a ModelConfig."""
    return from_published(data, where) if "model_type" in data else parse(ModelConfig, data, where)


def read_config(path: Path) -> ModelConfig:
    """The config in the file ``path``, or in ``path``/config.json for a folder. Raises UserError."""
    if path.is_dir():
        path = path / "config.json"
    return config_from_dict(read_mapping(path), str(path))


def resolve_model(spec: str | dict[str, Any], where: str = "model") -> ModelConfig:
    """A model as recipes name it: a preset, a path to a config.json (or its folder), or a mapping.

    A mapping may start from another with the key ``preset`` (a preset or a path) and change single fields of it:
    ``{preset: demo, moe: {n_routed_experts: 16}}``.
    """
    if isinstance(spec, str):
        if spec in preset_names():
            return preset(spec)
        path = Path(spec)
        if path.exists():
            return read_config(path)
        if path.suffix or "/" in spec:
            raise UserError(f"{where}: {spec}: no such file or folder")
        return preset(spec)  # raises with the nearest name
    changes = dict(spec)
    base = changes.pop("preset", None)
    if base is None:
        return config_from_dict(changes, where)
    if not isinstance(base, str):
        raise UserError(f"{where}.preset: {base!r} is not a preset's name or a path")
    native = resolve_model(base, where).model_dump()
    attention = changes.get("attention")
    if (
        isinstance(attention, dict)
        and attention.get("kind", native["attention"]["kind"]) != native["attention"]["kind"]
    ):
        native["attention"] = {}  # another kind of attention has other fields
    if isinstance(attention, dict) and "compression_ratio" in attention:
        for rank in ("q_lora_rank", "kv_lora_rank"):  # the ratio sets them; the base's own would contradict it
            native["attention"].pop(rank, None)
    merged = merge(native, changes)
    if changes:  # no longer the published model: what only describes that one (quantisation, code to load) is left out
        merged["published"] = {}
    return parse(ModelConfig, merged, where)
