"""The README says what the plugin is: commands, settings, defaults, files, formula, and how a student is used."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from kd_plugin_emo_pillars import EmoPillars
from kd_plugin_emo_pillars.losses import soft_binary_cross_entropy
from kd_plugin_emo_pillars.taxonomy import read_taxonomy

from kdcore.cli import main
from kdcore.run import Run
from kdcore.synthesis.prompts import templates

README = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
FIELDS = attrs.fields_dict(EmoPillars)


def rows(heading: str) -> list[list[str]]:
    """The cells of the table below a heading."""
    section = README.partition(f"{heading}\n")[2].partition("\n#")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" |")] for line in lines[1:]]


def test_the_settings_exist_and_have_these_defaults() -> None:
    table = rows("## Configuration")
    assert len(table) == 10
    for names, default, _ in table:
        settings = re.findall(r"`([\w.]+)`", names)
        assert {setting.partition(".")[0] for setting in settings} <= FIELDS.keys()
        value = FIELDS[settings[0].partition(".")[0]].default
        if re.fullmatch(r"`?\w+`?", default):
            assert default.strip("`") == (str(value).lower() if isinstance(value, bool) else str(value))
    assert [FIELDS[name].default for name in ("synthetic_epochs", "steps")] == [3, 160]
    for setting in re.findall(r"--set (\w+)=", README):
        assert setting in FIELDS


def test_the_bundle_installs_the_demo_of_each_of_its_plugins() -> None:
    bundle = Path(__file__).parents[2]
    if not (bundle / "pyproject.toml").is_file():
        pytest.skip("the package alone")
    project = tomllib.loads((bundle / "pyproject.toml").read_text("utf-8"))["project"]
    demos = {requirement.replace("[demo]", "") for requirement in project["optional-dependencies"]["demo"]}
    assert demos == set(project["dependencies"])
    assert all("[demo]" in requirement for requirement in project["optional-dependencies"]["demo"])
    assert 'pip install "kd-plugin-text[demo]"\n' in (bundle / "README.md").read_text("utf-8")


def test_the_calls_are_the_prompts() -> None:
    assert {cells[0].strip("`") for cells in rows("## The calls")} == templates(EmoPillars()).keys()


def test_the_taxonomy_file_can_be_read(tmp_path: Path) -> None:
    [text] = re.findall(r"```text\n(calm\n.*?)```", README, flags=re.DOTALL)
    (tmp_path / "labels.txt").write_text(text, encoding="utf-8")
    taxonomy = read_taxonomy(str(tmp_path / "labels.txt"))
    assert taxonomy.labels == ("calm", "tense")
    assert taxonomy.mapped("nervous") == "tense"


def test_the_formula_is_that_of_the_code() -> None:
    [formula] = re.findall(r"^`(-\(y log.*)`\.$", README, flags=re.MULTILINE)
    for written, code in (("log σ(z)", "* s.log()"), ("log(1 - σ(z))", "* (1 - s).log()")):
        formula = formula.replace(written, code)
    generator = torch.Generator().manual_seed(0)
    z, y = (torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    y = y.sigmoid()
    expected = eval(formula, {"__builtins__": {}}, {"y": y, "s": z.sigmoid()}).mean()
    torch.testing.assert_close(soft_binary_cross_entropy(z, y, torch.ones_like(z)), expected)


def test_the_commands_run_and_the_student_is_used_as_it_says(
    data: Path, teacher: Any, tiny_bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    data.rename(tmp_path / "my-texts")
    [block] = re.findall(r"```\n(pip install.*?)```", README, flags=re.DOTALL)
    commands = [shlex.split(line, comments=True) for line in block.splitlines()]
    assert commands[0] == ["pip", "install", "kd-plugin-emo-pillars[demo]"]
    assert commands[1] == ["kdcore", "run", "--plugin", "emo-pillars"]
    small = {"student": tiny_bert, "layers": 1, "examples": 6, "length": 32, "teacher.endpoint": teacher.address}
    settings = [part for key, value in small.items() for part in ("--set", f"{key}={value}")]
    for command in commands[2:]:
        seeds = ["--seeds", "1"] if "--compare" in command else []
        assert main([*command[1:], *seeds, *settings, "--max-steps", "2"]) == 0
    [program] = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    capsys.readouterr()
    exec(compile(program.replace("import torch\n", "import torch\n", 1), "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert printed.startswith("{")


@pytest.mark.parametrize("command", ["config emo-pillars", "config emo-pillars --prompts"])
def test_the_configuration_is_printed(command: str, capsys: Any) -> None:
    assert command in README
    assert main(command.split()) == 0
    printed = capsys.readouterr().out
    assert ("Which emotions" if "--prompts" in command else "examples = 15") in printed


def test_the_example_row_is_read_without_a_setting(data: Path) -> None:
    [row] = re.findall(r"train\.jsonl +(\{.*\})", README)
    with (data / "train.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(json.loads(row)) + "\n")
    example = EmoPillars(examples=0).splits(Run(folder=data, data_path=str(data)))["train"][-1]
    assert (example["text"], example["context"]) == ("You came back!", "may be missing")
    assert example["labels"] == {"joy": 1.0, "surprise": 1.0}
