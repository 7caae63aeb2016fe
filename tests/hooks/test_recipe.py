"""The owner describes the method; joiners wrap its recipe."""

import pytest

from kdcore.errors import PluginError
from kdcore.files import read_json

WRAPPING = """
@hookimpl(wrapper=True)
def recipe(self, run):
    recipe = yield
    second = attrs.evolve(recipe.stages[0].teachers["large"], identity="second")
    teachers = {**recipe.stages[0].teachers, "second": second}
    return changed(attrs.evolve(recipe, arms=[Arm("hot", {"temperature": 8.0})]), steps=12, teachers=teachers)
"""


def test_hook_recipe_is_the_owners_as_changed_by_a_wrapping_joiner(execute, joiner, done):
    folder = execute(plugins=joiner(WRAPPING), compare=True)
    plan = read_json(folder / "plan.json")
    assert done(folder)["steps"] == 12
    assert set(plan["teachers"]) == {"large", "second"}
    assert [arm["name"] for arm in plan["arms"]] == ["distill", "control", "hot"]
    assert {path.name.rpartition("-")[0] for path in (folder / "store").iterdir()} == {"large", "second"}


def test_hook_recipe_of_a_joiner_is_not_asked(execute, joiner, done):
    body = """
    @hookimpl
    def recipe(self, run):
        raise OSError("a joiner was asked")
    """
    assert done(execute(plugins=joiner(body)))["steps"] == 30


def test_hook_recipe_is_asked_for_every_arm_and_seed(execute, joiner, told):
    body = """
    @hookimpl(wrapper=True)
    def recipe(self, run):
        tell(run.arm.name, run.seed, hasattr(run, "data"))
        return (yield)
    """
    execute("steps=2", plugins=joiner(body), compare=True, seeds=2)
    asked = set(told())
    assert {f"{arm} {seed} False" for arm in ("distill", "control") for seed in (0, 1)} <= asked
    assert not any(line.endswith("True") for line in asked)  # before any data are open


def test_hook_recipe_must_be_implemented_by_the_plugin_named_first(execute, joiner):
    owner, wrapping = joiner(WRAPPING)
    with pytest.raises(PluginError, match="name it after the plugin that it joins"):
        execute(plugins=(wrapping, owner))


def test_hook_recipe_must_give_a_recipe(execute, variant):
    wrong = variant({"return Recipe(": "return dict("})
    with pytest.raises(PluginError, match="plugin soft-labels gave no Recipe"):
        execute(plugins=(wrong,))
