from __future__ import annotations

import json

import pytest

from kdcore.errors import InputError
from kdcore.reports import write_all
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
        ("plan.json", '{"plugin": "x", "headline": {}, "arms": [], "seeds": []}', r"key 'headline\.name' is missing"),
        ("plan.json", "[" * 100_000, r"plan\.json: no valid JSON \(nested too deeply\)"),
        ("plan.json", '{"a": ' * 50 + "1" + "}" * 50, r"plan\.json: nested more than 32 levels deep"),
        ("plan.json", f'{{"seeds": [{"9" * 5000}]}}', r"plan\.json: no valid JSON"),
        ("arms/distill/seed-1/evaluation.json", "{}", r"seed-1/evaluation\.json: key 'rows' is missing"),
        ("arms/distill/seed-1/evaluation.json", '{"rows": [{"subject": "s"}]}', r"key 'rows\[0\]\.split' is missing"),
        ("arms/distill/seed-1/evaluation.json", '{"rows": {}}', r"key 'rows' is {}, but must be a list of items"),
    ],
)
def test_a_broken_file_is_named_in_one_line(run_folder, name, text, message):
    (run_folder / name).write_text(text)
    with pytest.raises(InputError, match=message):
        open_run(run_folder)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("plugin", 3, "key 'plugin' is 3, but must be a string"),
        (
            "headline",
            {"name": "a", "better": "more"},
            r"'headline\.better' is .more., but must be one of higher, low",
        ),
        ("arms", [], "arms must not be empty"),
        ("arms", [{"name": "../x"}], r"key 'arms\[0\]' .* has '\.\./x', which must be a name of a file"),
        ("arms", [{"name": "x", "control": 1}], r"key 'arms\[0\]\.control' is 1, but must be true or false"),
        ("seeds", [], "seeds must not be empty"),
        ("seeds", ["../../.."], r"key 'seeds\[0\]' is .*, but must be an integer"),
        ("seeds", [10**300], "seeds has 1000.*, which must be at least 0 and less than"),
        ("teachers", ["large"], "key 'teachers' is .*, but must be an object"),
        ("teachers", None, "key 'teachers' is None, but must be an object"),
        ("teachers", {"../large": {}}, "teachers has '../large', which must be a name of a file"),
        ("yardsticks", ["a/b"], "yardsticks has 'a/b', which must be a name of a file"),
        ("stages", [1], r"key 'stages\[0\]' is 1, but must be a string"),
        ("stages", None, "key 'stages' is None, but must be a list of strings"),
        ("plugins", ["a"], r"key 'plugins\[0\]' is .a., but must be an object"),
        ("usage", 3, "key 'usage' is 3, but must be a string"),
        ("data", [1], r"key 'data' is \[1\], but must be an object"),
    ],
)
def test_a_plan_with_a_wrong_value_is_refused_by_its_key(run_folder, key, value, message):
    path = run_folder / "plan.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(InputError, match=rf"plan\.json: .*{message}"):
        open_run(run_folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parameters": "many"}, r"key 'rows\[0\]\.parameters' is .many., but must be an integer or null"),
        ({"bytes": [1]}, r"key 'rows\[0\]\.bytes' is \[1\], but must be an integer or null"),
        ({"bytes": -1}, "bytes has -1, which must be at least 0"),
        ({"path": 3}, r"key 'rows\[0\]\.path' is 3, but must be a string"),
        ({"metrics": [1]}, r"key 'rows\[0\]\.metrics' is \[1\], but must be an object"),
        ({"metrics": {"a": {}}}, r"rows\[0\]\.metrics\['a'\]\.value. is missing"),
        ({"metrics": {"a": {"value": {}}}}, r"metrics\['a'\]\.value. is {}, but must be a number or null"),
        ({"metrics": {"a": {"value": 10**400}}}, r"metrics\['a'\]\.value. is not valid: int too large"),
        ({"metrics": {"a": {"value": 1, "better": "x"}}}, "must be one of higher, lower"),
        ({"metrics": {"a": {"value": 1, "samples": [1]}}}, r"samples = \[1\] must be an object of numbers"),
        ({"metrics": {"a": {"value": 1, "samples": {"t": True}}}}, "samples has true for 't'"),
    ],
)
def test_an_evaluation_with_a_wrong_value_is_refused_by_its_key(run_folder, change, message):
    path = run_folder / "arms" / "distill" / "seed-0" / "evaluation.json"
    row = json.loads(path.read_text())["rows"][0]
    path.write_text(json.dumps({"rows": [row | change]}))
    with pytest.raises(InputError, match=rf"evaluation\.json: .*{message}"):
        open_run(run_folder)


def test_keys_that_a_later_version_adds_are_left_out(run_folder):
    path = run_folder / "plan.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"new": 1}))
    assert "new" not in open_run(run_folder).plan


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"step": 1e999}', "key 'step' is .*, but must be an integer"),
        ('{"step": 1, "loss": "x"}', "key 'loss' is .x., but must be a number or null"),
        ('{"step": 1, "terms": 3}', "key 'terms' is 3, but must be an object"),
        ('{"step": 1, "metrics": {"a": []}}', r"key \"metrics\['a'\]\" is \[\], but must be a number or null"),
        ("[" * 100_000, "not a JSON object with a step"),
    ],
)
def test_a_log_line_with_a_wrong_value_is_named(tmp_path, line, message):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + line + '\n{"step": 3}\n')
    with pytest.raises(InputError, match=rf"metrics\.jsonl:2: ?{message}"):
        read_metrics(path)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("data.json", '{"leaks": 3}', r"data\.json: key 'leaks' is 3, but must be a list of strings"),
        ("data.json", '{"leaks": {"a": 1}}', r"data\.json: key 'leaks' is .*, but must be a list of strings"),
        ("environment.json", "[]", r"environment\.json: expected a JSON object, found list"),
        (
            "arms/distill/seed-0/distil/done.json",
            '{"steps": "x"}',
            r"done\.json: key 'steps' is .x., but must",
        ),
        ("arms/distill/seed-0/distil/done.json", "[]", r"done\.json: expected a JSON object, found list"),
        (
            "arms/distill/seed-0/distil/metrics.jsonl",
            '{"step": "x"}\n',
            r"metrics\.jsonl:1: key 'step' is .x.",
        ),
    ],
)
def test_no_report_is_written_of_a_damaged_run(run_folder, file, text, message):
    (run_folder / file).write_text(text)
    with pytest.raises(InputError, match=message):
        write_all(run_folder)


@pytest.mark.parametrize("file", ["report.html", "result.json", "arms/distill/seed-0/student/README.md"])
def test_a_folder_in_a_reports_place_is_named(run_folder, file):
    (run_folder / file).mkdir()
    with pytest.raises(InputError, match=rf"{file}: cannot be written \(Is a directory\); move it away"):
        write_all(run_folder)


def test_a_run_with_the_least_that_is_valid_has_its_reports(tmp_path):
    (tmp_path / "plan.json").write_text(
        '{"plugin": "x", "headline": {"name": "a"}, "arms": [{"name": "distill"}], "seeds": [0], "stages": ["s"]}'
    )
    stage = tmp_path / "arms" / "distill" / "seed-0" / "s"
    stage.mkdir(parents=True)
    (tmp_path / "student").mkdir()
    for path in (stage / "done.json", stage / "synthesis.json", tmp_path / "data.json", tmp_path / "environment.json"):
        path.write_text("{}")
    (stage / "metrics.jsonl").write_text('{"step": 1}\n')
    assert all(path.is_file() for path in write_all(tmp_path))
    assert "None" not in (tmp_path / "student" / "README.md").read_text()


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
    assert run.inside("arms/../../elsewhere") is None
    assert run.inside("x" * 300) is None
    assert run.inside("a\0b") is None
    assert run.inside(str(run_folder.parent / "elsewhere")) is None
