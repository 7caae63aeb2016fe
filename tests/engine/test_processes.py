"""Two processes of one run, by torch's own launcher and gloo."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kdcore.files import read_json

SOFT_LABELS = Path(__file__).parents[1] / "methods" / "soft_labels.py"
LAUNCHED = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]


@pytest.mark.slow
def test_two_processes_train_as_one_does(execute, tmp_path):
    settings = ("steps=6", "dropout=0.0", "keep=last")
    alone = execute(*settings, compare=True, out="alone")
    chosen = [part for setting in settings for part in ("--set", setting)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    command = ["kdcore", "run", "--plugin", str(SOFT_LABELS), "--compare", "--device", "cpu", *chosen]
    done = subprocess.run(
        [*LAUNCHED, *command, "--out", str(tmp_path / "both")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert read_json(tmp_path / "both" / "identity.json")["number of processes"] == 2
    for arm in ("distill", "control"):
        one, two = (folder / "arms" / arm / "seed-0" / "distil" for folder in (alone, tmp_path / "both"))
        assert read_json(one / "done.json")["order_hash"] == read_json(two / "done.json")["order_hash"]
        expected, found = (load_file(folder / "models" / "student.safetensors") for folder in (one, two))
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-5)
