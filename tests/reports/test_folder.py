from __future__ import annotations

import json

import pytest

from kdcore.errors import InputError
from kdcore.reports.folder import open_run, read_metrics


def test_a_torn_last_line_is_skipped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]


def test_a_broken_line_inside_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"loss": 2.0}\n{"step": 3}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl:2: not a JSON object with a step"):
        read_metrics(path)


def test_after_a_resume_the_newest_record_of_a_step_counts(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [(1, 5.0), (2, 4.0), (2, 3.0), (3, 2.0)]
    path.write_text("".join(json.dumps({"step": step, "loss": loss}) + "\n" for step, loss in lines))
    assert [(r["step"], r["loss"]) for r in read_metrics(path)] == [(1, 5.0), (2, 3.0), (3, 2.0)]


def test_shared_stages_are_found(run_folder):
    run = open_run(run_folder)
    (run_folder / "shared" / "seed-1" / "warm-up").mkdir(parents=True)
    (run_folder / "shared" / "teacher-stage").mkdir()
    assert run.stage_folder("distill", 1, "warm-up") == run_folder / "shared" / "seed-1" / "warm-up"
    assert run.stage_folder("control", 2, "teacher-stage") == run_folder / "shared" / "teacher-stage"
    assert run.stage_folder("control", 2, "distil") == run_folder / "arms" / "control" / "seed-2" / "distil"
    assert run.stage_folder("control", 2, "absent") is None


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("plan.json", "{", r"plan\.json:1: no valid JSON"),
        ("plan.json", "[]", r"plan\.json: expected a JSON object, found list"),
        ("plan.json", "{}", r"plan\.json: key 'plugin' is missing"),
        ("plan.json", '{"plugin": "x", "headline": {}, "arms": [], "seeds": []}', r"key 'headline\.name'"),
        (
            "plan.json",
            '{"plugin": "x", "headline": {"name": "a"}, "arms": [{"name": "../x"}], "seeds": [0]}',
            r"key 'arms\[0\]\.name' is missing or no file name",
        ),
        ("arms/distill/seed-1/evaluation.json", "{}", r"seed-1/evaluation\.json: key 'rows' is missing"),
        ("arms/distill/seed-1/evaluation.json", '{"rows": [{"subject": "s"}]}', r"rows\[0\] has no key 'split'"),
        (
            "teachers/large/evaluation.json",
            '{"rows": [{"subject": "s", "split": "test", "metrics": {"a": {"value": 1, "better": "more"}}}]}',
            r"large/evaluation\.json: rows\[0\] is not valid: .*better",
        ),
    ],
)
def test_a_broken_file_is_named_in_one_line(run_folder, name, text, message):
    (run_folder / name).write_text(text)
    with pytest.raises(InputError, match=message):
        open_run(run_folder)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="no run folder"):
        open_run(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        open_run(tmp_path / "absent")


def test_paths_outside_the_run_are_not_followed(run_folder):
    run = open_run(run_folder)
    (run_folder.parent / "elsewhere").mkdir()
    assert run.inside("arms/distill") == run_folder / "arms" / "distill"
    assert run.inside("../elsewhere") is None
    assert run.inside(str(run_folder.parent / "elsewhere")) is None
