"""The README says what the plugin is: commands, settings, defaults, arms, formulas, and how a student is used."""

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
from kd_plugin_bai import BAI
from kd_plugin_bai.merging import merged
from kd_plugin_bai.tasks import read_tasks

from kdcore.cli import main
from kdcore.run import Run

README = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
FIELDS = attrs.fields_dict(BAI)


def rows(heading: str) -> list[list[str]]:
    """The cells of the table below a heading."""
    section = README.partition(f"{heading}\n")[2].partition("\n#")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" |")] for line in lines[1:]]


def test_the_settings_exist_and_have_these_defaults() -> None:
    assert len(rows("## Configuration")) == 10
    for names, default, _ in rows("## Configuration"):
        settings = re.findall(r"`(\w+)`", names)
        assert settings
        values = [FIELDS[name].default for name in settings]
        told = [json.loads(each) for each in re.findall(r"\[[^]]*\]|true|[\d.]+", default)]
        if told:
            assert told == [list(value) if isinstance(value, tuple) else value for value in values]
        else:
            assert not any(values)
    for setting in re.findall(r"--set (\w+)=", README):
        assert setting in FIELDS


def test_the_arms_are_those_of_the_recipe(tmp_path: Path) -> None:
    arms = {
        arm.name: (arm.set["instruct_weight"], arm.set["alpha"]) for arm in BAI().recipe(run=Run(folder=tmp_path)).arms
    }
    arms["distill"] = (BAI().instruct_weight, BAI().alpha)
    told = {}
    for names, share, alphas, _ in rows("## Arms"):
        for name, alpha in zip(re.findall(r"`([\w.-]+)`", names), alphas.split(", "), strict=True):
            told[name] = (float(share), float(alpha))
    assert told == arms


def test_the_formulas_are_those_of_the_code() -> None:
    generator = torch.Generator().manual_seed(0)
    names = ("instruct", "reasoning", "pretrained")
    values: dict[str, Any] = {name: torch.randn(3, generator=generator) for name in names} | {"λ": 0.3, "α": 0.7}
    for formula, pair, share in re.findall(
        r"^- `((?:middle|balanced) = ((?:λ|α)) (\* .*))`$", README, flags=re.MULTILINE
    ):
        name, _, right = formula.partition(" = ")
        values[name] = eval(right, {"__builtins__": {}}, values)
        first, second = re.findall(r"\* (\w+)", share)
        ratio = values[pair]
        [(_, found)] = merged([{"w": values[first]}, {"w": values[second]}], (ratio, 1 - ratio), {})
        torch.testing.assert_close(found, values[name])
    assert values.keys() >= {"middle", "balanced"}


@pytest.mark.slow
def test_the_commands_run_and_the_student_is_used_as_it_says(
    models: dict[str, str], tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    tasks.rename(tmp_path / "my-tasks")
    [table] = re.findall(r"```toml\n(.*?)```", README, flags=re.DOTALL)
    for role, place in models.items():
        folder = tomllib.loads(table)[role]
        Path(folder).symlink_to(place)
    small = table.replace("chat = true", "chat = false").replace("steps = 100", "steps = 2").replace("1024", "8")
    Path("run.toml").write_text(small + "prompts = 2\nresponses = 2\n", encoding="utf-8")
    [block] = re.findall(r"```\n(pip install.*?)```", README, flags=re.DOTALL)
    commands = [shlex.split(line, comments=True) for line in block.splitlines()]
    assert commands[0] == ["pip", "install", "kd-plugin-bai"]
    assert commands[1] == ["kdcore", "run", "--plugin", "bai"]
    for command in commands[2:]:
        seeds = ["--seeds", "1"] if "--compare" in command else []
        assert main([*command[1:], *seeds, "--device", "cpu"]) == 0
    [program] = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    capsys.readouterr()
    exec(compile(program, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("38+27=")


def test_the_example_row_is_read(tasks: Path) -> None:
    [row] = re.findall(r"train\.jsonl +(\{.*\})", README)
    (tasks / "train.jsonl").write_text(row + "\n", encoding="utf-8")
    [example] = read_tasks(tasks, "prompt", "answer")["train"]
    assert example.data == json.loads(row)


def test_the_bundle_installs_it() -> None:
    bundle = Path(__file__).parents[2]
    if not (bundle / "pyproject.toml").is_file():
        pytest.skip("the package alone")
    project = tomllib.loads((bundle / "pyproject.toml").read_text("utf-8"))["project"]
    assert "kd-plugin-bai>=0.1" in project["dependencies"]
    assert "pip install kd-plugin-llm\n" in (bundle / "README.md").read_text("utf-8")
