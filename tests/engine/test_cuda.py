"""The same small method on a GPU, in every precision, resumed and with its control."""

from pathlib import Path

import pytest

from kdcore.files import read_json

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_run_on_the_gpu_has_the_same_start_order_and_steps_in_both_arms(execute, precision):
    folder: Path = execute("steps=20", device="cuda", precision=precision, compare=True)
    facts = [read_json(folder / "arms" / arm / "seed-0" / "distil" / "done.json") for arm in ("distill", "control")]
    assert all(facts[0][key] == facts[1][key] for key in ("initial_hash", "order_hash", "round_steps"))
    assert facts[0]["weights_hash"] != facts[1]["weights_hash"]


def test_the_gpu_learns_what_the_cpu_learns(execute):
    settings = ("steps=60", "dropout=0.0")
    accuracies = []
    for device in ("cpu", "cuda"):
        folder = execute(*settings, device=device, out=device)
        row = read_json(folder / "arms" / "distill" / "seed-0" / "evaluation.json")["rows"][0]
        accuracies.append(row["metrics"]["accuracy"]["value"])
    assert abs(accuracies[0] - accuracies[1]) < 0.1
