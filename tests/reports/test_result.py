from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from kdcore.reports.result import build_result, verdict, write_result


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def entry(result, metric, arm="distill"):
    return next(e for e in result["comparison"] if (e["metric"], e["arm"]) == (metric, arm))


def test_rows_hold_every_student_and_teacher(run_folder):
    result = build_result(run_folder)
    assert [(r["arm"], r["seed"], r["subject"]) for r in result["rows"]] == [
        *[(arm, seed, "student") for arm in ("distill", "control") for seed in (0, 1, 2)],
        (None, None, "large"),
    ]
    first = result["rows"][0]
    recorded = json.loads((run_folder / "arms/distill/seed-0/evaluation.json").read_text())["rows"][0]
    assert set(first) == {
        "arm", "seed", "subject", "split", "metrics", "parameters", "bytes", "latency_ms", "path"
    }  # fmt: skip
    assert first["metrics"]["accuracy"] == recorded["metrics"]["accuracy"]["value"]
    assert first["latency_ms"] == recorded["metrics"]["latency_ms"]["value"]
    assert "latency_ms" not in first["metrics"]
    assert first["path"] == "arms/distill/seed-0/student"


def test_comparison_agrees_with_the_evaluations(run_folder):
    result = build_result(run_folder)
    values = {
        arm: [
            json.loads((run_folder / f"arms/{arm}/seed-{seed}/evaluation.json").read_text())["rows"][0]["metrics"]
            for seed in range(3)
        ]
        for arm in ("distill", "control")
    }
    for metric in ("accuracy", "log loss", "calibration error"):
        means = {arm: np.mean([row[metric]["value"] for row in rows]) for arm, rows in values.items()}
        assert entry(result, metric)["difference"] == pytest.approx(means["distill"] - means["control"])
    found = entry(result, "accuracy")
    assert found["ci95"][0] < found["difference"] < found["ci95"][1]
    assert found["equal"] == {"initial_weights": True, "order": True, "steps": True}
    assert (found["against"], found["seeds"], found["examples"], found["because"]) == ("control", 3, 300, "")
    assert verdict(found) == "better"
    assert verdict(entry(result, "log loss")) == "better"
    assert verdict(entry(result, "calibration error")) == "untested"


def test_an_arm_without_the_teacher_equals_its_control(make, tmp_path):
    found = entry(build_result(make(tmp_path / "null", distils=False)), "accuracy")
    assert (found["difference"], found["ci95"], found["p_value"], verdict(found)) == (0, [0, 0], 1.0, "unclear")


@pytest.mark.parametrize(
    ("key", "name"), [("initial_weights", "initial_hash"), ("order", "order_hash"), ("steps", "steps")]
)
def test_one_unequal_seed_is_reported(run_folder, key, name):
    other = 7 if name == "steps" else "ab12"
    edit(run_folder / "arms/control/seed-1/distil/done.json", lambda done: done.update({name: other}))
    found = entry(build_result(run_folder), "accuracy")
    assert found["equal"] == {"initial_weights": True, "order": True, "steps": True} | {key: False}
    assert found["hashes"][1][key][1] == other


def test_an_earlier_stage_that_differs_is_reported(run_folder):
    edit(run_folder / "plan.json", lambda plan: plan.update(stages=["warm-up", "distil"]))
    for arm, steps in (("distill", 6), ("control", 40)):
        for seed in range(3):
            stage = run_folder / "arms" / arm / f"seed-{seed}" / "distil"
            shutil.copytree(stage, stage.with_name("warm-up"))
            edit(stage.with_name("warm-up") / "done.json", lambda done, steps=steps: done.update(steps=steps))
    found = entry(build_result(run_folder), "accuracy")
    assert found["equal"] == {"initial_weights": True, "order": True, "steps": False}
    assert found["hashes"][0]["steps"] == [6, 40]


def test_what_is_not_recorded_is_unknown(run_folder):
    (run_folder / "arms/control/seed-1/distil/done.json").unlink()
    assert set(entry(build_result(run_folder), "accuracy")["equal"].values()) == {None}


def test_every_arm_is_compared_with_every_control_and_keeps_its_reason(run_folder):
    def declare(plan):
        plan["arms"].append({"name": "short", "control": False, "because": "half the steps", "set": {"steps": 150}})
        plan["arms"].append({"name": "from-scratch", "control": True, "because": "", "set": {}})

    edit(run_folder / "plan.json", declare)
    for arm, source in (("short", "distill"), ("from-scratch", "control")):
        (run_folder / "arms" / source).joinpath("x").mkdir()
        for seed in range(3):
            place = run_folder / "arms" / arm / f"seed-{seed}"
            place.mkdir(parents=True)
            place.joinpath("evaluation.json").write_bytes(
                (run_folder / "arms" / source / f"seed-{seed}" / "evaluation.json").read_bytes()
            )
    result = build_result(run_folder)
    pairs = dict.fromkeys((e["arm"], e["against"]) for e in result["comparison"])
    assert list(pairs) == [(arm, control) for arm in ("distill", "short") for control in ("control", "from-scratch")]
    assert entry(result, "accuracy", arm="short")["because"] == "half the steps"


def test_subjects_are_paired(run_folder):
    for arm in ("distill", "control"):
        for seed in range(3):
            edit(
                run_folder / f"arms/{arm}/seed-{seed}/evaluation.json",
                lambda value: value["rows"].append(value["rows"][0] | {"subject": "tiny"}),
            )
    subjects = dict.fromkeys(e["subject"] for e in build_result(run_folder)["comparison"])
    assert list(subjects) == ["student", "tiny"]


def test_values_that_are_not_finite_become_null(run_folder):
    def spoil(value):
        value["rows"][0]["metrics"]["calibration error"]["value"] = float("nan")

    edit(run_folder / "arms/distill/seed-0/evaluation.json", spoil)
    path = write_result(run_folder)
    result = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert result["rows"][0]["metrics"]["calibration error"] is None
    assert entry(result, "calibration error")["difference"] is None


def test_an_unfinished_run_compares_the_seeds_it_has(run_folder):
    (run_folder / "arms/control/seed-2/evaluation.json").unlink()
    assert entry(build_result(run_folder), "accuracy")["seeds"] == 2
    for path in run_folder.glob("arms/*/*/evaluation.json"):
        path.unlink()
    result = build_result(run_folder)
    assert (len(result["rows"]), result["comparison"]) == (1, [])


def test_the_result_is_a_function_of_the_folder(run_folder):
    first = write_result(run_folder).read_bytes()
    assert write_result(run_folder).read_bytes() == first
