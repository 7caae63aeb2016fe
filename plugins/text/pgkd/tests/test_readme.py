"""The README says what the plugin is: settings and defaults, arms, and how a student is used."""

from __future__ import annotations

import re
from pathlib import Path

import attrs
import pytest
from kd_plugin_pgkd import PGKD

from kdcore.run import Run
from kdcore.text_model import TextModel

README = Path(__file__).parents[1] / "README.md"
FIELDS = attrs.fields_dict(PGKD)


def rows(heading: str) -> list[list[str]]:
    """The cells of the table below a heading."""
    section = README.read_text(encoding="utf-8").partition(f"{heading}\n")[2].partition("\n#")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" |")] for line in lines[1:]]


def test_the_settings_exist_and_have_these_defaults() -> None:
    table = rows("## Configuration")
    assert len(table) > 10
    for names, defaults, _ in table:
        settings = re.findall(r"`\[?(\w+)\]?`", names)
        assert set(settings) <= FIELDS.keys()
        written = defaults.split(", ")
        if re.fullmatch(r"`?[\w.]+`?", written[0]):
            values = [FIELDS[name].default for name in settings]
            assert [cell.strip("`") for cell in written] == [
                f"{v:g}" if isinstance(v, float) else str(v) for v in values
            ]


def test_the_arms_are_these(tmp_path: Path) -> None:
    run = Run(folder=tmp_path, data_path=str(tmp_path))
    teacher = TextModel(model="mine", endpoint="http://localhost:8000/v1")
    declared = {arm.name for arm in PGKD(teacher=teacher).recipe(run).arms}
    assert {cells[0].strip("`") for cells in rows("## How it goes")} == {"control", *declared}


def test_the_student_is_used_as_it_says(
    run, server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(server.address, out="runs/mine", settings=("rounds=1",))
    program = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)[0]
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(compile(program, README.name, "exec"), {})
    assert re.search(r"'label': '(cancel_transfer|card_arrival|top_up_failed)'", capsys.readouterr().out)
