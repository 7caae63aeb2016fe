"""Stages that own their loop, and merge stages whose targets a search finds."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kdcore import Run
from kdcore.config import read_run
from kdcore.engine.experiment import execute as run
from kdcore.errors import InputError, PluginError, RunError
from kdcore.files import read_json

METHODS = Path(__file__).parents[1] / "methods"

OWN_LOOP = METHODS / "own_loop.py"


@pytest.fixture(autouse=True)
def methods_can_be_imported(monkeypatch):
    monkeypatch.syspath_prepend(str(METHODS))


def test_a_loop_has_its_own_accelerator_and_reaches_the_stages_teachers(execute):
    folder = execute(plugins=(OWN_LOOP,), precision="no") / "arms" / "distill" / "seed-0"
    done = read_json(folder / "train" / "done.json")
    assert done["metrics"]["loss"] > 0
    assert done["weights_hash"] != done["initial_hash"]
    trained, merged = (load_file(folder / stage / "models" / "student.safetensors") for stage in ("train", "merge"))
    assert all(torch.equal(merged[name], tensor * 0.5) for name, tensor in trained.items())


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('return [Metric("loss", loss.item(), "lower")]', "return None", "gave a NoneType; return a list of Metric"),
        ("loss.item()", 'float("nan")', r"loss \(the loop of stage 'train'\) is nan"),
    ],
)
def test_what_a_loop_returns_is_checked(execute, variant, old, new, words):
    with pytest.raises((PluginError, RunError), match=words):
        execute(plugins=(variant({old: new}, OWN_LOOP),))


def test_the_teachers_of_a_loop_cannot_be_kept_from_an_automatic_control(execute):
    with pytest.raises(InputError, match=r"'train' owns its loop, so .* declare an Arm\(control=True\)"):
        execute(plugins=(OWN_LOOP,), compare=True)


def test_a_search_finds_the_targets_of_a_merge_and_what_it_found_is_kept(execute):
    folder = execute("search=true", plugins=(OWN_LOOP,))
    arm = folder / "arms" / "distill" / "seed-0"
    rows = read_json(arm / "evaluation.json")["rows"]
    assert [row["subject"] for row in rows] == ["scaled-0", "scaled-1"]
    assert rows[0]["path"] == "student/scaled-0"
    scale = read_json(arm / "merge" / "facts" / "round-0.json")["scales"][1]
    trained = load_file(arm / "train" / "models" / "student.safetensors")
    found = load_file(arm / "merge" / "models" / "scaled-1.safetensors")
    assert all(torch.equal(found[name], tensor * scale) for name, tensor in trained.items())
    (arm / "evaluation.json").unlink()
    run(read_run(folder), resume=folder)
    assert read_json(arm / "evaluation.json")["rows"] == rows


def test_the_search_of_a_shared_stage_is_done_once_for_all_arms(execute, variant, capsys):
    shared = {
        'name="train",': 'name="train", shared="arms",',
        'name="merge",': 'name="merge", shared="arms",',
        "def search():": "def search():\n            print('searching in', run.arm.name)",
        "teachers=teachers": "teachers={}",
        'run.teacher("large")': "skeleton(run)",
    }
    folder = execute("search=true", plugins=(variant(shared, OWN_LOOP),), compare=True)
    assert capsys.readouterr().out.count("searching in") == 1
    arms = [read_json(folder / "arms" / arm / "seed-0" / "evaluation.json") for arm in ("distill", "control")]
    assert [row["metrics"] for row in arms[0]["rows"]] == [row["metrics"] for row in arms[1]["rows"]]


@pytest.mark.parametrize("name", ['"a/b"', '"../y"', '"same"', "place"])
def test_what_a_search_finds_has_names_that_differ_and_name_files(execute, variant, name):
    plugin = variant({'f"scaled-{place}"': name}, OWN_LOOP)
    with pytest.raises(PluginError, match="return Targets of different names, each a name of a file"):
        execute("search=true", plugins=(plugin,))


def test_a_search_that_finds_others_when_it_is_called_again_is_refused(execute, variant):
    drawn = "map(float, torch.rand(2, generator=GENERATOR))"
    plugin = variant({'run.remember("scales", search)': drawn}, OWN_LOOP)
    text = plugin.read_text().replace("@frozen(", "GENERATOR = torch.Generator()\n\n\n@frozen(", 1)
    plugin.write_text(text)
    with pytest.raises(PluginError, match=r"its search for targets found others than before: keep what the search"):
        execute("search=true", plugins=(plugin,))


def test_a_teacher_is_asked_for_inside_a_stage_only(tmp_path):
    with pytest.raises(PluginError, match=r"run.teacher\('large'\) is asked for outside of a stage"):
        Run(folder=tmp_path).teacher("large")
