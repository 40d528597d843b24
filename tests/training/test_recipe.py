"""Recipes: what is read, what is refused, and that writing one out loses nothing."""

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import tiny_recipe

from abyssal.errors import UserError
from abyssal.training.recipe import read_recipe, recipe_names, to_yaml


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(path.parent)))
    return path


@pytest.mark.parametrize("name", recipe_names())
def test_built_in(name):
    recipe = read_recipe(name)
    assert recipe.model_config_resolved().vocab_size > 0
    assert recipe.training.steps > recipe.schedule.warmup


LARGER = {"parallel": {"shard": 64}, "training": {"batch_size": 64, "accumulate": 240}}
REPLICAS = {"parallel": {"replicate": 4}, "training": {"batch_size": 64, "accumulate": 8}}


@pytest.mark.parametrize(
    ("name", "changes", "processes"),
    [
        *((name, {}, 1) for name in recipe_names() if name not in ("v2-lite", "v3")),
        *(("v2-lite", {}, 8), ("v2-lite", {"parallel": {"expert": 8}}, 8), ("v2-lite", REPLICAS, 32)),
        *(("v3", {}, 256), ("v3", LARGER, 2048)),  # as the recipes' and examples' comments say
    ],
)
def test_layouts_of_built_in_recipes(name, changes, processes):
    recipe = read_recipe(name, changes)
    t, model = recipe.training, recipe.model_config_resolved()
    assert recipe.parallel.world == processes
    recipe.parallel.check(
        model, batch_size=t.batch_size, sequence_length=t.sequence_length, accumulate=t.accumulate, world=processes
    )
    assert not (recipe.samples.prompts and recipe.parallel.pipeline > 1)


BALANCERS = ("bias_sign", "bias_proportional", "token_loss", "sequence_loss")
CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "training": st.fixed_dictionaries(
            {},
            optional={
                "steps": st.integers(3, 10**6),
                "seed": st.integers(0, 2**40),
                "clip": st.floats(1e-6, 1e6),
                "recompute": st.booleans(),
            },
        ),
        "optimizer": st.fixed_dictionaries({"lr": st.floats(1e-12, 1.0)}),
        "balance": st.lists(st.sampled_from(BALANCERS), min_size=1, unique=True).map("+".join) | st.just("none"),
        "samples": st.fixed_dictionaries({"prompts": st.lists(st.text(max_size=8), max_size=3)}),
        "model": st.fixed_dictionaries({"moe": st.fixed_dictionaries({"n_routed_experts": st.integers(2, 9)})}),
        "name": st.from_regex(r"[a-z0-9][a-z0-9_-]{0,8}", fullmatch=True),
    },
)


@settings(max_examples=25)
@given(changes=CHANGES, resolved=st.booleans())
def test_written_out_and_read_again(tmp_path_factory, file, changes, resolved):
    recipe = read_recipe(str(file), changes)
    again = tmp_path_factory.getbasetemp() / "again.yaml"
    again.write_text(to_yaml(recipe, resolved=resolved), encoding="utf-8")
    read = read_recipe(str(again))
    assert read.model_config_resolved() == recipe.model_config_resolved()
    assert read.model_dump(exclude={"model"}) == recipe.model_dump(exclude={"model"})
    for section, values in changes.items():
        if section in ("training", "optimizer", "samples"):
            assert {key: getattr(getattr(read, section), key) for key in values} == values
    if "balance" in changes:
        named = {name for name in BALANCERS if getattr(read.balance, name) is not None}
        assert named == set(changes["balance"].split("+")) - {"none"}


def test_changing_a_preset_keeps_the_rest():
    plain, changed = read_recipe("demo"), read_recipe("demo", {"model": {"moe": {"n_routed_experts": 16}}})
    before, after = (r.model_config_resolved().model_dump(exclude={"published"}) for r in (plain, changed))
    assert before["moe"].pop("n_routed_experts") == 8
    assert after["moe"].pop("n_routed_experts") == 16
    assert before == after


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "..", "/abs"])
def test_names_that_are_no_folder(file, name):
    with pytest.raises(UserError, match="does not do as a folder's name"):
        read_recipe(str(file), {"name": name})
