import pytest
from plain_models import V3_MOE, small

from abyssal.analysis.flops import count_flops
from abyssal.analysis.layers import LayerGroup, group_layers
from abyssal.analysis.parameters import LayerParameters, count_parameters
from abyssal.config import ModelConfig, preset, preset_names


def groups_of(config: ModelConfig) -> list[LayerGroup]:
    return group_layers(config, count_parameters(config), count_flops(config, 7))


def lines(config: ModelConfig) -> list[str]:
    return [f"{group.label} {group.kind}" for group in groups_of(config)]


def test_of_published_models():
    assert lines(preset("deepseek-v3")) == ["0-2 dense", "3-60 MoE", "61 MTP"]
    assert lines(preset("deepseek-moe-16b")) == ["0 dense", "1-27 MoE"]
    assert lines(preset("llama2-7b")) == ["0-31 dense"]


@pytest.mark.parametrize(
    ("layers", "frequency", "mtp", "expected"),
    [
        (7, 2, 0, ["0-1, 3, 5 dense", "2, 4, 6 MoE"]),
        (12, 2, 0, ["0-1, 3, 5, … 11 dense", "2, 4, 6, … 10 MoE"]),
        (5, 3, 3, ["0-2, 4 dense", "3 MoE", "5, 7 MTP", "6 MTP"]),  # of the MTP modules, one has experts
    ],
)
def test_of_layers_that_alternate(layers: int, frequency: int, mtp: int, expected: list[str]):
    moe = V3_MOE | {"moe_layer_freq": frequency}
    assert lines(small(num_hidden_layers=layers, moe=moe, mtp={"num_nextn_predict_layers": mtp})) == expected


def test_label_of_runs():
    group = LayerGroup("MoE", (0, 1, 4, 6, 7, 8), LayerParameters({}, {}), 0)
    assert group.label == "0-1, 4, 6-8"


@pytest.mark.parametrize("name", preset_names())
def test_every_layer_stands_in_one_group_with_its_own_figures(name: str):
    config = preset(name)
    counts, flops = count_parameters(config), count_flops(config, 7)
    groups = group_layers(config, counts, flops)
    count = config.num_hidden_layers + config.mtp.num_nextn_predict_layers
    assert sorted(layer for group in groups for layer in group.layers) == list(range(count))
    for group in groups:
        for layer in group.layers:
            assert group.parameters == (*counts.layers, *counts.mtp_layers)[layer]
            assert group.flops == flops.by_layer[layer]
