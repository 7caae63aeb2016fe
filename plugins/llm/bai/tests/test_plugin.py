"""Whole small runs: merges, arms, RL with its curves, the saved student, kill and resume, bad input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from kd_plugin_bai import BAI
from kd_plugin_bai.demo import demo_tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdcore.cli import main
from kdcore.errors import InputError
from kdcore.files import read_json
from kdcore.reports.folder import read_metrics
from kdcore.run import Run

CURVES = {"reward", "response length", "truncated responses", "entropy"}
ARMS = {
    "distill": (0.5, 0.6),
    "control": (0.0, 1.0),
    "instruct": (1.0, 1.0),
    "no-pretrained": (0.5, 1.0),
    "no-instruct": (0.0, 0.6),
    "alpha-0.4": (0.5, 0.4),
    "alpha-0.8": (0.5, 0.8),
}


def arguments(models: Mapping[str, str], *settings: str) -> list[str]:
    named = [f"{role}={folder}" for role, folder in models.items()]
    small = ("steps=6", "prompts=2", "responses=2", "longest=8", "save_every=2", "run.threads=1")
    given = [part for setting in (*named, *small, *settings) for part in ("--set", setting)]
    return ["run", "--plugin", "bai", *given, "--device", "cpu"]


def actor(folder: Path, arm: str) -> dict[str, torch.Tensor]:
    return load_file(folder / "arms" / arm / "seed-0" / "balanced" / "models" / "student.safetensors")


@pytest.mark.slow
def test_every_arm_begins_with_its_merge_and_has_its_curves(
    run: Callable[..., Path], models: dict[str, str], tasks: Path
) -> None:
    folder = run(data=tasks, compare=True)
    plan = read_json(folder / "plan.json")
    assert {arm["name"] for arm in plan["arms"]} == set(ARMS)
    assert [arm["name"] for arm in plan["arms"] if arm["control"]] == ["control"]
    weights = {role: load_file(Path(place) / "model.safetensors") for role, place in models.items()}
    for arm, (share, alpha) in ARMS.items():
        for name, tensor in actor(folder, arm).items():
            pretrained, instruct, reasoning = (weights[role][name].double() for role in models)
            exact = alpha * (share * instruct + (1 - share) * reasoning) + (1 - alpha) * pretrained
            assert tensor.dtype == torch.float32
            torch.testing.assert_close(tensor.double(), exact, rtol=0.01, atol=1e-3)
    for arm, role in (("control", "reasoning"), ("instruct", "instruct")):
        assert all(torch.equal(tensor, weights[role][name].float()) for name, tensor in actor(folder, arm).items())
    for arm in ARMS:
        lines = read_metrics(folder / "arms" / arm / "seed-0" / "rlhf" / "metrics.jsonl")
        assert [line["step"] for line in lines] == [1, 2, 3]
        assert all(line["terms"].keys() == CURVES for line in lines)
        assert not (folder / "arms" / arm / "seed-0" / "rlhf" / "checkpoints").exists()
    page = (folder / "report.html").read_text("utf-8")
    assert "What the loop of stage “rlhf” recorded of its steps" in page
    assert all(f"{curve}: distill" in page for curve in CURVES)
    result = read_json(folder / "result.json")
    of_the_loop = {"collapse_ratio", "reward_dip", "first_length", "first_reward", "rl_truncated"}
    assert all(row["metrics"].keys() == {"reward", "length", "truncated"} | of_the_loop for row in result["rows"])
    assert all(entry["because"].startswith("the same RL") for entry in result["comparison"])


def test_the_student_loads_with_its_tokenizer_and_has_learned(run: Callable[..., Path], tasks: Path) -> None:
    folder = run("learning_rate=0.01", "temperature=2", "responses=8", "marker=*", "steps=4", data=tasks)
    student = AutoModelForCausalLM.from_pretrained(folder / "student")
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    assert tokenizer.get_vocab() == demo_tokenizer().get_vocab()
    stage = folder / "arms" / "distill" / "seed-0"
    trained = load_file(stage / "rlhf" / "models" / "student.safetensors")
    before = actor(folder, "distill")
    assert all(torch.equal(tensor, trained[name]) for name, tensor in student.state_dict().items() if name in trained)
    rewarded = any(line["terms"]["reward"] > 0 for line in read_metrics(stage / "rlhf" / "metrics.jsonl"))
    moved = any(not torch.equal(tensor.float(), trained[name]) for name, tensor in before.items() if name in trained)
    assert moved == rewarded


def test_prompts_may_be_messages_of_a_chat(
    run: Callable[..., Path], models: dict[str, str], tasks: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "chatting"
    shutil.copytree(models["reasoning"], folder)
    tokenizer: Any = demo_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"
    tokenizer.save_pretrained(folder)
    out = run(f"reasoning={folder}", "chat=true", data=tasks)
    lines = read_metrics(out / "arms" / "distill" / "seed-0" / "rlhf" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert AutoTokenizer.from_pretrained(out / "student").chat_template == tokenizer.chat_template


def test_the_best_ratios_of_the_search_are_merged_and_kept(
    run: Callable[..., Path], models: dict[str, str], tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.1, 0.3, 0.2, 0.5, 0.4, 0.3])
    monkeypatch.setattr(BAI, "_validation_reward", lambda *_: next(scores))
    folder = run("search=[0.2, 0.7, 1.0]", data=tasks)
    stages = folder / "arms" / "distill" / "seed-0"
    facts = {name: read_json(stages / name / "facts" / "round-0.json") for name in ("middle", "balanced")}
    assert facts["middle"]["reward of each ratio"] == [[0.2, 0.1], [0.7, 0.3], [1.0, 0.2]]
    assert facts["balanced"]["reward of each ratio"] == [[0.2, 0.5], [0.7, 0.4], [1.0, 0.3]]
    weights = {role: load_file(Path(place) / "model.safetensors") for role, place in models.items()}
    for name, tensor in actor(folder, "distill").items():
        pretrained, instruct, reasoning = (weights[role][name].double() for role in models)
        exact = 0.2 * (0.7 * instruct + 0.3 * reasoning) + 0.8 * pretrained
        torch.testing.assert_close(tensor.double(), exact, rtol=0.01, atol=1e-3)


def test_the_search_scores_by_the_answers_on_validation(run: Callable[..., Path], tasks: Path) -> None:
    rows = [json.dumps({"prompt": f"{place}*1=", "answer": "a b c d e f g h"}) for place in range(3)]
    (tasks / "validation.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    folder = run("search=[0.5, 1.0]", "steps=1", data=tasks)
    facts = read_json(folder / "arms" / "distill" / "seed-0" / "middle" / "facts" / "round-0.json")
    assert facts["reward of each ratio"] == [[0.5, 0.0], [1.0, 0.0]]


@pytest.mark.slow
def test_the_demo_builds_its_models_and_max_steps_holds_everywhere(tmp_path: Path) -> None:
    out = tmp_path / "run"
    small = [
        part for setting in ("prompts=2", "responses=2", "longest=8", "ablations=false") for part in ("--set", setting)
    ]
    assert main(["run", "--plugin", "bai", *small, "--max-steps", "2", "--out", str(out), "--device", "cpu"]) == 0
    shared = out / "shared" / "seed-0"
    done = {stage: read_json(shared / stage / "done.json") for stage in ("pretrain", "instruct", "distil")}
    assert {each["steps"] for each in done.values()} == {2}
    assert done["instruct"]["initial_hash"] == done["distil"]["initial_hash"] == done["pretrain"]["weights_hash"]
    for arm in ("distill", "control"):
        assert read_json(out / "arms" / arm / "seed-0" / "rlhf" / "done.json")["steps"] == 2


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_checkpoint(
    killed_at: Callable[..., bool],
    models: dict[str, str],
    tasks: Path,
    tmp_path: Path,
) -> None:
    command = [*arguments(models, "temperature=2"), "--data", str(tasks)]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main([*command, "--out", str(whole)]) == 0
    assert killed_at(command, killed, "arms/*/*/rlhf/checkpoints/checkpoint-4/trainer_state.json")
    stage = Path("arms/distill/seed-0/rlhf")
    assert not (killed / stage / "done.json").exists()
    assert main(["run", "--resume", str(killed)]) == 0
    curves = [read_metrics(folder / stage / "metrics.jsonl") for folder in (whole, killed)]
    assert [line["step"] for line in curves[0]] == [1, 2, 3, 4, 5, 6]
    for one, other in zip(*curves, strict=True):
        assert one["terms"] == pytest.approx(other["terms"], rel=1e-5)
    weights = [load_file(folder / stage / "models" / "student.safetensors") for folder in (whole, killed)]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("instruct=",), "instruct is empty: name all three models"),
        (("pretrained=./nowhere",), "./nowhere: no such folder"),
        (
            ("prompts=3", "accumulate=4"),
            "6 responses an update cannot be cut into 4 x 1 equal parts",
        ),
        (("answer_column=solution",), "'solution'"),
        (("alpha=1.5",), "alpha"),
        (("search=[0.5, 1.5]",), "search = [0.5, 1.5]: a ratio is a number from 0 to 1"),
        (("chat=true",), "chat_template"),
        (("marker=",), "marker is empty: name what stands before an answer"),
        (("prompts=7",), "train has 6 tasks, an update needs prompts = 7"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    models: dict[str, str], tasks: Path, tmp_path: Path, capsys: Any, settings: Sequence[str], words: str
) -> None:
    command = arguments(models, *settings)
    assert main([*command, "--data", str(tasks), "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert words in said[0]


@pytest.mark.parametrize("template", ["{{ raise_exception('no user') }}", "{% for m in messages %}"])
def test_a_chat_template_that_fails_is_one_line_before_anything_is_merged(
    run: Callable[..., Path], models: dict[str, str], tasks: Path, tmp_path: Path, template: str
) -> None:
    folder = tmp_path / "chatting"
    shutil.copytree(models["reasoning"], folder)
    tokenizer: Any = demo_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match=r"the chat_template of reasoning .* takes no message of a user \(") as error:
        run(f"reasoning={folder}", "chat=true", data=tasks)
    assert "\n" not in str(error.value)


def test_own_data_needs_models(tasks: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["run", "--plugin", "bai", "--data", str(tasks), "--out", str(tmp_path / "run")]) == 2
    assert "set pretrained, instruct and reasoning" in capsys.readouterr().err


def test_an_alpha_of_the_method_is_no_further_arm(tmp_path: Path) -> None:
    arms = BAI(alphas=(0.2, 0.3), alpha=0.3).recipe(run=Run(folder=tmp_path)).arms
    assert {arm.name: (arm.set["instruct_weight"], arm.set["alpha"]) for arm in arms} == {
        "control": (0.0, 1.0),
        "instruct": (1.0, 1.0),
        "no-pretrained": (0.5, 1.0),
        "no-instruct": (0.0, 0.3),
        "alpha-0.2": (0.5, 0.2),
    }
