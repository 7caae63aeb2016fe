"""Which plugin answers for a teacher, and how often it is asked."""

import re
from collections import Counter

import pytest
import torch

from kdcore.errors import PluginError

SIZE = """
@hookimpl
def student_loss(self, teacher):
    return [LossTerm("size", lambda: teacher["NAME/logits"].abs().sum(), "distill", 1e-9)]
"""
SECOND = """
@hookimpl(wrapper=True)
def recipe(self, run):
    recipe = yield
    second = Teacher(build=lambda run: torch.nn.Identity(), store={"logits": Row()}, subject=False)
    return changed(recipe, teachers={**recipe.stages[0].teachers, "second": second})
"""


def test_hook_teacher_outputs_asks_the_newest_joiner_first(execute, joiner, terms):
    answer = """
    @hookimpl
    def teacher_outputs(self, batch):
        return {"logits": torch.full((len(batch), 6), VALUE)}
    """
    owner, older = joiner(answer.replace("VALUE", "1.0"), "older")
    _, newest = joiner(answer.replace("VALUE", "0.0") + SIZE.replace("\n", "\n    ").replace("NAME", "large"), "newest")
    folder = execute("steps=2", plugins=(owner, older, newest))
    assert all(logged["newest/size"] == 0.0 for logged in terms(folder))


def test_hook_teacher_outputs_may_decline(execute, joiner, terms, told):
    body = (
        SECOND
        + SIZE.replace("NAME", "large")
        + """
@hookimpl
def teacher_outputs(self, teacher, batch):
    tell(teacher)
    return {"logits": torch.zeros(len(batch), 1)} if teacher == "second" else None
"""
    )
    folder = execute("steps=2", plugins=joiner(body))
    assert set(told()) == {"large", "second"}
    assert all(logged["joiner/size"] > 0 for logged in terms(folder))  # the owner answered for its own
    assert {path.name.rpartition("-")[0] for path in (folder / "store").iterdir()} == {"large", "second"}


def test_hook_teacher_outputs_of_no_plugin_is_an_error(execute, joiner):
    body = """
    @hookimpl(wrapper=True)
    def teacher_outputs(self):
        yield
        return None
    """
    with pytest.raises(PluginError, match="no plugin answers teacher_outputs for teacher 'large' of stage 'distil'"):
        execute("steps=2", plugins=joiner(body))


COUNTING = """
@hookimpl(wrapper=True)
def recipe(self, run):
    recipe = yield
    return attrs.evolve(recipe, arms=[Arm("hot", {"temperature": 8.0})])

@hookimpl(wrapper=True)
def teacher_outputs(self, batch):
    for name in batch.ids:
        tell(name)
    return (yield)
"""


def test_hook_teacher_outputs_is_asked_once_for_all_arms_and_seeds(execute, joiner, told):
    folder = execute("steps=4", plugins=joiner(COUNTING), compare=True, seeds=2)
    asked = Counter(told())
    assert len(asked) > 100
    assert set(asked.values()) == {1}
    assert len(list((folder / "arms").glob("*/seed-*/distil/done.json"))) == 6


def test_hook_teacher_outputs_is_not_asked_where_another_run_stored_the_rows(execute, joiner, told, tmp_path):
    store = str(tmp_path / "store")
    execute("steps=60", plugins=joiner(COUNTING), store=store)
    assert told()
    execute("steps=2", plugins=joiner(COUNTING), store=store, seed=1, out="again")
    assert told() == []


def test_hook_teacher_outputs_is_asked_for_the_examples_that_the_steps_read_and_no_others(execute, joiner, told):
    execute("steps=2", "batch_size=8", plugins=joiner(COUNTING))
    asked = told()
    assert len(set(asked)) == len(asked) == 16


def test_hook_teacher_outputs_may_be_ragged(execute, joiner, told):
    body = """
    @hookimpl(wrapper=True)
    def recipe(self, run):
        recipe = yield
        tokens = Teacher(
            build=lambda run: torch.nn.Identity(), store={"states": Row(lengths="words")}, subject=False, batch_size=7
        )
        return changed(recipe, teachers={**recipe.stages[0].teachers, "tokens": tokens})

    @hookimpl
    def teacher_outputs(self, teacher, batch):
        if teacher != "tokens":
            return None
        states = batch["words"].float().unsqueeze(-1) + torch.arange(3.0)  # not zero in the padding
        tell("computed", *states.shape)
        return {"states": states}

    @hookimpl
    def student_loss(self, models, batch, teacher):
        states, mask = teacher["tokens/states"], batch.mask("words")
        expected = (batch["words"].float().unsqueeze(-1) + torch.arange(3.0)) * mask.unsqueeze(-1)
        tell("read", torch.equal(states, expected), mask.sum(1).unique().numel() > 1)
        return []
    """
    execute("steps=4", plugins=joiner(body), log_every=1)
    lines = told()
    assert lines.count("read True True") + lines.count("read True False") == 4
    assert "read True True" in lines
    assert len({line for line in lines if re.match(r"computed \d+ \d+ 3", line)}) > 1


def test_hook_teacher_outputs_runs_without_gradient_in_eval_mode(execute, joiner, told):
    body = """
    @hookimpl(wrapper=True)
    def teacher_outputs(self, model):
        tell(model.training, torch.is_grad_enabled(), any(p.requires_grad for p in model.parameters()))
        return (yield)
    """
    execute("steps=2", plugins=joiner(body))
    assert set(told()) == {"False False False"}
    assert torch.is_grad_enabled()
