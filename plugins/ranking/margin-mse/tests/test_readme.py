"""The README and the guide say what the plugin is: settings, defaults, formulas, and how a student is searched."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import attrs
import pytest
import torch
from kd_plugin_margin_mse import MarginMSE
from kd_plugin_margin_mse.plugin import Loss
from kd_plugin_margin_mse.students import Architecture

from kdcore.config import configure
from kdcore.engine.experiment import execute
from kdcore.losses import margins
from kdcore.plugins import load

README = Path(__file__).parents[1] / "README.md"
GUIDE = Path(__file__).parents[4] / "docs" / "how-to" / "run-on-your-data.md"
FIELDS = attrs.fields_dict(MarginMSE)


def rows(page: Path, heading: str) -> list[list[str]]:
    """The cells of the table below a heading."""
    section = page.read_text(encoding="utf-8").partition(f"{heading}\n")[2].partition("\n#")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" |")] for line in lines[1:]]


def test_the_settings_exist_and_have_these_defaults() -> None:
    table = rows(README, "## Configuration")
    assert len(table) > 5
    for names, default, _ in table:
        first, *others = re.findall(r"`(\w+)`", names)
        assert {first, *others} <= FIELDS.keys()
        value = FIELDS[first].default
        if re.fullmatch(r"`?[\w.]+`?", default):
            written = f"{value:g}" if isinstance(value, float) else str(value)
            assert default.strip("`") == (written.lower() if isinstance(value, bool) else written)
    guide = " ".join(cells[0] for cells in rows(GUIDE, "## 3. Configure"))
    assert set(re.findall(r"`(\w+)`", guide)) <= FIELDS.keys()


def test_every_architecture_and_loss_is_described() -> None:
    assert {cells[0].strip("`") for cells in rows(README, "## Architectures")} == set(get_args(Architecture))
    described = {re.findall(r"`(\w+)`", cells[0])[0] for cells in rows(README, "## Losses")}
    assert described == {*get_args(Loss), "ranknet"}


def test_the_formulas_are_those_of_the_code() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = [3 * torch.randn(7, generator=generator, dtype=torch.float64) for _ in range(4)]
    names = dict(zip(("s+", "s-", "t+", "t-"), ("sp", "sn", "tp", "tn")))
    for cells in rows(README, "## Losses"):
        name = re.findall(r"`(\w+)`", cells[0])[0]
        formula = cells[1].strip("`").replace("²", "**2").replace("log σ(", "* logsigmoid(").replace(") * (", ")*(")
        for written, variable in names.items():
            formula = formula.replace(written, variable)
        formula = formula.replace("- *", "-").replace("-*", "-")
        known: dict[str, Any] = dict(zip(names.values(), scores)) | {"logsigmoid": torch.nn.functional.logsigmoid}
        expected = eval(formula, {"__builtins__": {}}, known).mean()
        given = scores[: 2 if name == "ranknet" else 4]
        torch.testing.assert_close(getattr(margins, name)(*given), expected)


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, beir_folder: Path, tiny_bert: str, tiny_cross_encoders: tuple[str, str]
) -> Path:
    """The folder in which ``runs/mine`` lies, after two steps of training."""
    folder = tmp_path_factory.mktemp("readme")
    settings = [f"student={tiny_bert}", f"teacher={tiny_cross_encoders[0]}", "layers=1", "validation_queries=2"]
    options: dict[str, Any] = {"data": str(beir_folder), "max_steps": 2, "device": "cpu", "threads": 1}
    options |= {"trackers": (), "compare": False, "out": str(folder / "runs" / "mine")}
    execute(configure([load("margin-mse")], None, settings, options))
    return folder


@pytest.mark.parametrize("page", [README, GUIDE], ids=lambda page: page.name)
def test_the_student_is_searched_as_they_say(
    page: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    programs = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    [program] = [each for each in programs if "Searcher" in each]
    monkeypatch.chdir(finished)
    capsys.readouterr()
    exec(compile(program, page.name, "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 5
