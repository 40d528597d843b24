"""What a model is: the config, the presets, and the published config.json files."""

from abyssal.config.model_config import (
    MHAConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    MTPConfig,
    RopeConfig,
    SeparateLatentsConfig,
    YarnConfig,
)
from abyssal.config.parsing import Config, merge, parse, parse_assignments, read_mapping
from abyssal.config.presets import config_from_dict, preset, preset_names, read_config, resolve_model
from abyssal.config.published import from_published, published_model_type, to_published

__all__ = [
    "Config",
    "MHAConfig",
    "MLAConfig",
    "MTPConfig",
    "MoEConfig",
    "ModelConfig",
    "RopeConfig",
    "SeparateLatentsConfig",
    "YarnConfig",
    "config_from_dict",
    "from_published",
    "merge",
    "parse",
    "parse_assignments",
    "preset",
    "preset_names",
    "published_model_type",
    "read_config",
    "read_mapping",
    "resolve_model",
    "to_published",
]
