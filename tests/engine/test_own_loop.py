"""Stages that own their loop, and merge stages whose targets a search finds."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kdcore import Run
from kdcore.config import read_run
from kdcore.engine.experiment import execute as run
from kdcore.errors import InputError, PluginError, RunError
from kdcore.files import read_json
from kdcore.reports.folder import read_metrics
from kdcore.reports.summary import number

METHODS = Path(__file__).parents[1] / "methods"

OWN_LOOP = METHODS / "own_loop.py"


@pytest.fixture(autouse=True)
def methods_can_be_imported(monkeypatch):
    monkeypatch.syspath_prepend(str(METHODS))


def test_a_loop_has_its_own_accelerator_and_reaches_the_stages_teachers(execute):
    folder = execute(plugins=(OWN_LOOP,), precision="no") / "arms" / "distill" / "seed-0"
    done = read_json(folder / "train" / "done.json")
    assert done["metrics"]["last"]["value"] > 0
    assert done["steps"] == 3
    assert done["weights_hash"] != done["initial_hash"]
    trained, merged = (load_file(folder / stage / "models" / "student.safetensors") for stage in ("train", "merge"))
    assert all(torch.equal(merged[name], tensor * 0.5) for name, tensor in trained.items())


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('return [Metric("last", loss.item(), "lower")]', "return None", "gave a NoneType; return a list of Metric"),
        ('"last", loss.item()', '"last", float("nan")', r"last \(the loop of stage 'train'\) is nan"),
    ],
)
def test_what_a_loop_returns_is_checked(execute, variant, old, new, words):
    with pytest.raises((PluginError, RunError), match=words):
        execute(plugins=(variant({old: new}, OWN_LOOP),))


def test_what_a_loop_records_and_returns_stands_in_the_reports(execute):
    folder = execute("merge=false", plugins=(OWN_LOOP,))
    metrics = folder / "arms" / "distill" / "seed-0" / "train" / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [(line["step"], line["split"], [*line["terms"]]) for line in lines] == [
        (step, "train", ["loss of the loop"]) for step in (1, 2, 3)
    ]
    [row] = read_json(folder / "arms" / "distill" / "seed-0" / "evaluation.json")["rows"]
    assert row["metrics"]["last"] == {
        "value": lines[-1]["terms"]["loss of the loop"],
        "better": "lower",
        "samples": None,
    }
    assert row["metrics"]["accuracy"]["samples"]
    page = (folder / "report.html").read_text()
    assert "What the loop of stage “train” recorded of its steps" in page
    first, last = (number(lines[place]["terms"]["loss of the loop"]) for place in (0, -1))
    assert f"loss of the loop: distill {first} to {last}" in page


def test_a_metric_of_the_loop_and_of_the_test_have_different_names(execute, variant):
    with pytest.raises(PluginError, match="'accuracy' is a metric of evaluate and of the loop of stage 'train'"):
        execute("merge=false", plugins=(variant({'Metric("last"': 'Metric("accuracy"'}, OWN_LOOP),))


def test_a_torn_line_of_a_killed_loop_is_cut_off_and_a_step_recorded_again_counts_once(execute):
    folder = execute("merge=false", plugins=(OWN_LOOP,))
    arm = folder / "arms" / "distill" / "seed-0"
    before = read_metrics(arm / "train" / "metrics.jsonl")
    (arm / "evaluation.json").unlink()
    (arm / "train" / "done.json").unlink()
    with (arm / "train" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "spl')
    run(read_run(folder), resume=folder)
    assert read_metrics(arm / "train" / "metrics.jsonl") == before


def test_only_a_loop_records(tmp_path):
    with pytest.raises(PluginError, match=r"run\.record is called outside of a stage's own loop"):
        Run(folder=tmp_path).record(1, {"loss": 0.5})


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
