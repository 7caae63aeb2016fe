from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from kdcore.cli.compare import compare, letter_of
from kdcore.cli.report import report
from kdcore.engine.identity import DATA
from kdcore.errors import InputError

_spec = importlib.util.spec_from_file_location("run_maker", Path(__file__).parents[1] / "reports" / "conftest.py")
_maker = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_maker)
make_run = _maker.make_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    base = tmp_path_factory.mktemp("runs")
    first, second = make_run(base / "a"), make_run(base / "b", steps=150)
    config = second / "config.toml"
    config.write_text(config.read_text().replace("temperature = 2.0", "temperature = 4.0\nextra = true"))
    (first / "identity.json").write_text(json.dumps({DATA: "ab12", "temperature": 2.0}))
    (second / "identity.json").write_text(json.dumps({"data": "ab12"}))  # as an older version wrote it
    return first, second


def invoke(command, *arguments):
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def test_report_rebuilds_and_names_what_it_wrote(runs):
    output = invoke(report, runs[0])
    assert "student: distill (3 seeds)" in output
    assert "distill - control: accuracy +" in output
    for name in ("result.json", "report.html", "arms/control/seed-2/student/README.md"):
        assert str(runs[0] / name) in output.splitlines()
        assert (runs[0] / name).is_file()


def test_report_opens_the_page(runs, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    invoke(report, runs[0], "--open")
    assert opened == [(runs[0] / "report.html").as_uri()]


@pytest.mark.parametrize("command", [report, compare])
def test_a_folder_that_is_no_run_is_refused(command, runs, tmp_path):
    arguments = [tmp_path] if command is report else [runs[0], tmp_path]
    with pytest.raises(InputError, match="no run folder") as caught:
        invoke(command, *arguments)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("command", [report, compare])
def test_help_has_examples(command):
    output = invoke(command, "--help")
    assert "Examples:" in output
    assert f"  kdcore {command.name} runs/" in output


def test_compare_as_json(runs):
    found = json.loads(invoke(compare, *runs, "--json"))
    assert found["configuration"] == {"temperature": [2.0, 4.0], "extra": [None, True]}
    assert {row["metric"] for row in found["rows"]} == {"accuracy"}
    arms = {(entry["arm"], entry["subject"]): entry for entry in found["comparison"]}
    assert list(arms) == [("distill", "student"), ("control", "student"), (None, "large")]
    student, teacher = arms["distill", "student"], arms[None, "large"]
    means = {row["run"]: row["mean"] for row in found["rows"] if row["arm"] == "distill"}
    assert student["difference"] == pytest.approx(means[str(runs[1])] - means[str(runs[0])])
    assert (student["seeds"], student["examples"]) == (3, 300)
    assert (teacher["difference"], teacher["p_value"]) == (0, 1)
    assert (student["letter"], student["tested"], found["not_compared"]) == ("B", "accuracy", [])


def test_compare_in_words(runs):
    output = invoke(compare, *runs)
    assert [line.split() for line in output.splitlines() if line.startswith("temperature")] == [
        ["temperature", "2.0", "4.0"]
    ]
    assert "B - A (distill student): accuracy " in output
    assert "300 examples" in output


def test_compare_a_run_with_itself(runs):
    output = invoke(compare, runs[0], runs[0])
    assert "The configurations are the same." in output
    assert "accuracy 0.000 [0.000, 0.000], p = 1.000" in output


def test_a_run_given_twice_has_two_letters(runs):
    output = invoke(compare, runs[0], runs[0], runs[1])
    assert [line.split()[0] for line in output.splitlines() if line.split()[1:] == [str(runs[0])]] == ["A", "B"]
    assert "B - A (distill student): accuracy 0.000" in output
    assert "C - A (distill student): accuracy " in output
    rows = json.loads(invoke(compare, runs[0], runs[0], "--json"))["rows"]
    assert [row["letter"] for row in rows if row["arm"] == "distill"] == ["A", "B"]
    assert [letter_of(index) for index in (0, 25, 26)] == ["A", "Z", "27"]


@pytest.mark.parametrize(
    ("identity", "reason"),
    [
        ({DATA: "cd34"}, "they ran on different data"),
        ({"seed": 0}, "c/identity.json does not record the data, so it may be other data"),
        (None, "c/identity.json does not record the data, so it may be other data"),
    ],
)
def test_runs_on_other_data_are_only_shown_side_by_side(runs, tmp_path, identity, reason):
    other = shutil.copytree(runs[1], tmp_path / "c")
    (other / "identity.json").unlink()
    if identity is not None:
        (other / "identity.json").write_text(json.dumps(identity))
    output = invoke(compare, *runs, other)
    assert "B - A (distill student): accuracy " in output
    assert "C - A (" not in output
    [line] = [line for line in output.splitlines() if line.startswith("C - A")]
    assert line.startswith("C - A: not compared: ")
    assert line.endswith(f"{reason}.")
    found = json.loads(invoke(compare, *runs, other, "--json"))
    assert {entry["letter"] for entry in found["comparison"]} == {"B"}
    assert [entry["letter"] for entry in found["not_compared"]] == ["C"]
    assert {row["letter"] for row in found["rows"]} == {"A", "B", "C"}


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("identity.json", "[]", "identity.json: expected a JSON object, found list"),
        ("identity.json", '{"hash of the data": 3}', "identity.json: key 'hash of the data' must be a string, not 3"),
        ("config.toml", "a = ", "config.toml: not valid TOML"),
        ("config.toml", "a = " + "[" * 3000, "config.toml: not valid TOML (nested too deeply)"),
        ("config.toml", "a" + ".a" * 3000 + " = 1", "config.toml: not valid TOML (nested too deeply)"),
        ("config.toml", "a = " + "9" * 5000, "config.toml: not valid TOML (Exceeds the limit"),
    ],
)
def test_compare_names_a_damaged_file(runs, tmp_path, file, text, message):
    other = shutil.copytree(runs[1], tmp_path / "c")
    (other / file).write_text(text)
    with pytest.raises(InputError, match=re.escape(message)):
        invoke(compare, runs[0], other)


def test_compare_needs_two(runs):
    with pytest.raises(InputError, match="at least two"):
        invoke(compare, runs[0])
