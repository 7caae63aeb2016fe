"""Examples made before a round: drawn lazily, sealed, and honest in the control."""

import json

import pytest

from kdcore.errors import PluginError, RunError

SYNTHETIC = """
@hookimpl(wrapper=True)
def recipe(self, run):
    recipe = yield
    data = attrs.evolve(recipe.stages[0].data, split=None, synth=Synth(SYNTH))
    return changed(recipe, data=data, batch_size=8, steps=None, epochs=1)

@hookimpl
def data_synth(self, run, models, report):
    for number, example in enumerate(run.data["train"]):
        tell(run.arm.name, run.round)
        first, *rest = example["text"].split()
        data = {"text": " ".join([*rest, first]), "label": example["label"]}
        teacher = "large" if number % 2 else ""
        yield Example(data, id=f"{run.round}/{number}", teacher=teacher, parents=(example.id,), origin="rotated")
"""


def method(joiner, synth, old="", new=""):
    assert old in SYNTHETIC
    return joiner(SYNTHETIC.replace(old, new, 1).replace("SYNTH", synth) if old else SYNTHETIC.replace("SYNTH", synth))


def sealed(folder, number, arm="distill"):
    path = folder / "arms" / arm / "seed-0" / "distil" / "rounds" / f"{number}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_hook_data_synth_is_drawn_lazily_and_sealed(execute, joiner, told):
    folder = execute(plugins=method(joiner, "take=16"))
    assert told() == ["distill 0"] * 16  # the stream has hundreds
    examples = sealed(folder, 0)
    assert [example["id"] for example in examples] == [f"0/{n}" for n in range(16)]
    assert all(example["parents"] and example["origin"] == "rotated" for example in examples)


@pytest.mark.parametrize(("window", "steps"), [("None", [2, 4, 6]), ("2", [2, 4, 4]), ("1", [2, 2, 2])])
def test_hook_data_synth_has_rounds_and_a_window(execute, joiner, told, done, window, steps):
    folder = execute(plugins=method(joiner, f"rounds=3, take=16, window={window}"))
    assert done(folder)["round_steps"] == steps
    assert told() == [f"distill {n}" for n in range(3) for _ in range(16)]
    assert sealed(folder, 2)[0]["id"] == "2/0"


@pytest.mark.parametrize("split", ["validation", "test"])
def test_hook_data_synth_cannot_read_what_is_measured(execute, joiner, split):
    with pytest.raises(RunError, match=f"the {split} split was read inside data_synth"):
        execute(plugins=method(joiner, "take=16", 'run.data["train"]', f'run.data["{split}"]'))


def test_hook_data_synth_carries_no_teachers_knowledge_into_the_control(execute, joiner):
    folder = execute(plugins=method(joiner, "take=16"), compare=True)
    assert sum("teacher" in example for example in sealed(folder, 0)) == 8
    control = sealed(folder, 0, "control")
    assert len(control) == 16
    assert not any("teacher" in example for example in control)


def test_hook_data_synth_reads_the_newest_report(execute, joiner, told):
    changes = 'for number, example in enumerate(run.data["train"]):\n', 'tell("accuracy", report["accuracy"].value)\n'
    folder = execute(plugins=method(joiner, "rounds=2, take=16", changes[0], changes[1] + "    " + changes[0]))
    reported = [float(line.split()[1]) for line in told() if line.startswith("accuracy")]
    path = folder / "arms" / "distill" / "seed-0" / "distil" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    checked = [line["metrics"]["accuracy"] for line in lines if line["split"] == "validation"]
    assert len(reported) == len(checked) == 2
    assert reported[1] == checked[0]  # measured after the first round, at the same weights


def test_hook_data_synth_may_not_repeat_an_id(execute, joiner):
    with pytest.raises(
        PluginError, match="data_synth of plugin joiner gave the id 'same', which is empty or already in the pool"
    ):
        execute(plugins=method(joiner, "take=16", 'f"{run.round}/{number}"', '"same"'))


def test_hook_data_synth_ends_quietly_in_the_control_where_it_asks_the_teacher(execute, joiner):
    asks = "        if number == 12:\n            run.teacher('large')\n        first, *rest", "        first, *rest"
    folder = execute("batch_size=4", plugins=method(joiner, "take=16", *reversed(asks)), compare=True)
    assert [len(sealed(folder, 0, arm)) for arm in ("distill", "control")] == [16, 6]
