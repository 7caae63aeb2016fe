"""Methods of more than one pass or turn: a teacher in place, and a critic with an optimiser of its own."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kdcore.errors import PluginError
from kdcore.files import read_json

METHODS = Path(__file__).parents[1] / "methods"
SUBNETS, CRITIC = METHODS / "subnets.py", METHODS / "critic.py"


@pytest.fixture(autouse=True)
def methods_can_be_imported(monkeypatch):
    monkeypatch.syspath_prepend(str(METHODS))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(METHODS), os.environ.get("PYTHONPATH", "")]))


def done(folder, arm="distill"):
    facts = read_json(folder / "arms" / arm / "seed-0" / "distil" / "done.json")
    return {**facts, "seconds": 0}


def models(folder, name, arm="distill"):
    return load_file(folder / "arms" / arm / "seed-0" / "distil" / "models" / f"{name}.safetensors")


def terms(folder, arm="distill"):
    text = (folder / "arms" / arm / "seed-0" / "distil" / "metrics.jsonl").read_text()
    return [line["terms"] for line in map(json.loads, text.splitlines()) if line["split"] == "train"]


@pytest.mark.parametrize("method", [SUBNETS, CRITIC])
def test_the_control_has_the_methods_start_order_and_steps(execute, method):
    folder = execute(plugins=(method,), compare=True)
    for fact in ("initial_hash", "order_hash", "round_steps"):
        assert done(folder)[fact] == done(folder, "control")[fact]
    assert done(folder)["weights_hash"] != done(folder, "control")["weights_hash"]


@pytest.mark.parametrize("method", [SUBNETS, CRITIC])
def test_arms_end_bit_equal_where_no_distill_term_has_a_weight(execute, method, variant):
    tells = '[LossTerm("tells", tells, "distill", self.distill_weight)]'
    resting = '[LossTerm("still", 0.0 * sum(p.sum() for p in models.critic.parameters()), "task", control=0.0)]'
    plugin = variant({tells: f"{resting} + {tells}"} if method == CRITIC else {}, method)
    folder = execute("distill_weight=0", plugins=(plugin,), compare=True)
    ours, theirs = models(folder, "student"), models(folder, "student", "control")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_an_in_place_teacher_is_the_student_in_train_mode_with_its_graph(execute):
    folder = execute(plugins=(SUBNETS,))
    assert set(terms(folder)[0]) == {
        f"subnets/{name}" for name in ("whole", "cross entropy 4", "divergence 4", "cross entropy 8", "divergence 8")
    }
    first, last = terms(folder)[0]["subnets/whole"], terms(folder)[-1]["subnets/whole"]
    assert last < first


def test_the_graph_of_an_earlier_pass_is_refused(execute, variant):
    wrong = variant({'softmax(teacher["whole/logits"]': 'softmax(teacher.live("whole/logits")'}, SUBNETS)
    with pytest.raises(PluginError, match=r"teacher\.live\('whole/logits'\), whose graph the backward of an earlier"):
        execute(plugins=(wrong,))


def test_the_critic_learns_in_its_own_turn_and_rests_in_the_control(execute):
    folder = execute(plugins=(CRITIC,), compare=True)
    assert set(terms(folder)[0]) == {
        "critic/tells (critic)", "critic/cross entropy (student)", "critic/fools (student)",
    }  # fmt: skip
    assert set(terms(folder, "control")[0]) == {"critic/cross entropy (student)"}
    taught, rested = models(folder, "critic"), models(folder, "critic", "control")
    assert not all(torch.equal(taught[name], rested[name]) for name in taught)
    once = models(execute("steps=1", plugins=(CRITIC,), compare=True, out="once"), "critic", "control")
    assert all(torch.equal(once[name], rested[name]) for name in rested)


def test_a_teacher_that_is_not_stored_is_asked_once_for_all_turns(execute, variant, capsys):
    plugin = variant(
        {
            ', store={"logits": Row()}': "",
            'return {"logits": model(': 'print("asked", len(batch)) or {"logits": model(',
            "lambda: judged(logits, 1.0)": 'lambda: judged(logits, 1.0) + 0 * teacher["large/logits"].sum()',
        },
        CRITIC,
    )
    plugin.write_text(plugin.read_text().replace("print(", "return print("))
    execute("steps=3", "accumulate=2", plugins=(plugin,))
    before_the_first_check = capsys.readouterr().out.partition("validation")[0]
    assert before_the_first_check.count("asked 8") == 6


@pytest.mark.slow
@pytest.mark.parametrize("method", [SUBNETS, CRITIC])
@pytest.mark.parametrize(
    "moment",
    ["arms/distill/*/distil/metrics.jsonl", "arms/*/*/distil/checkpoints/step-5*", "arms/control/*/distil/best/*"],
)
def test_a_killed_run_resumes_to_the_same_bits(start, killed_at, tmp_path, method, moment):
    command = ["run", "--plugin", str(method), "--compare", "--device", "cpu"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start([*command, "--out", str(whole)]).wait() == 0
    assert killed_at(command, killed, moment)
    assert start(["run", "--resume", str(killed)]).wait() == 0
    for arm in ("distill", "control"):
        assert done(killed, arm) == done(whole, arm)
