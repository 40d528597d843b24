import pytest
from lab_helpers import tiny

from abyssal.analysis.flops import count_flops
from abyssal.analysis.parameters import count_parameters
from abyssal.errors import UserError
from abyssal.lab.experiments import lab_of
from abyssal.lab.recipe import lab_names, question_of, read_lab


@pytest.mark.parametrize("size", ["cpu", "gpu"])
@pytest.mark.parametrize("name", lab_names())
def test_every_experiment_can_be_read_at_every_size(name, size):
    recipe = read_lab(name, size=size)
    assert recipe.seeds == 3
    assert recipe.question.endswith("?")
    assert question_of(name) == recipe.question
    lab_of(name).check(recipe)
    for arm in recipe.arms:
        assert recipe.recipe(arm, 7).training.seed == 7


@pytest.mark.parametrize("size", ["cpu", "gpu"])
def test_granularity_changes_nothing_but_how_finely_experts_are_cut(size):
    recipe = read_lab("granularity", size=size)
    configs = [recipe.recipe(arm, 1).model_config_resolved() for arm in recipe.arms]
    without_routers = set()
    for config in configs:
        counts, moe = count_parameters(config), config.moe
        layers = config.num_hidden_layers - moe.first_k_dense_replace
        routers = layers * moe.n_routed_experts * (config.hidden_size + 1)
        active = moe.num_experts_per_tok * moe.moe_intermediate_size
        without_routers.add((counts.total - routers, counts.active - routers, active))
    assert len(without_routers) == 1
    assert len({config.moe.n_routed_experts for config in configs}) == len(configs) >= 4


@pytest.mark.parametrize("size", ["cpu", "gpu"])
def test_dense_models_are_as_large_as_they_are_said_to_be(size):
    recipe = read_lab("dense", size=size)
    moe, active, total, *_ = (recipe.recipe(arm, 1).model_config_resolved() for arm in recipe.arms)
    assert count_parameters(active).total == pytest.approx(count_parameters(moe).active, rel=0.01)
    assert count_parameters(total).total == pytest.approx(count_parameters(moe).total, rel=0.01)
    assert count_flops(active, 128).forward == pytest.approx(count_flops(moe, 128).forward, rel=0.03)


def test_arms_of_a_seed_begin_with_the_same_numbers_and_read_the_same_text():
    recipe = read_lab("balancing")
    runs = [recipe.recipe(arm, 2) for arm in recipe.arms]
    assert len({(run.training.seed, run.data.model_dump_json(), run.training.steps) for run in runs}) == 1
    assert len({run.balance.model_dump_json() for run in runs}) == len(runs)


def test_changes_reach_the_recipe_and_the_settings():
    recipe = tiny("ablation", changes={"optimizer": {"lr": 0.5}, "lab": {"tokens": 64}})
    assert recipe.recipe(None, 1).optimizer.lr == 0.5
    assert recipe.settings["tokens"] == 64


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"name": "balancin"}, "did you mean 'balancing'.*known: ablation, balancing"),
        ({"name": "balancing", "size": "huge"}, "--size: 'huge' is not one of cpu, gpu"),
        ({"name": "balancing", "seeds": 1}, "--seeds: 1 is not valid; expected a whole number from 2"),
        ({"name": "balancing", "changes": {"training": {"stepps": 3}}}, "training.stepps: no such key"),
        ({"name": "balancing", "changes": {"lab": 3}}, "lab: 3 is not valid"),
        ({"name": "balancing", "changes": {"model": {"moe": None}}}, "has no experts"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(arguments, said):
    with pytest.raises(UserError, match=said) as raised:
        read_lab(**arguments)
    assert "\n" not in str(raised.value)
