from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from kdcore.cli.compare import compare
from kdcore.cli.report import report
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


def test_compare_needs_two(runs):
    with pytest.raises(InputError, match="at least two"):
        invoke(compare, runs[0])
