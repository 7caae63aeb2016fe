"""A run folder as the engine leaves it, filled by really training two small linear students in numpy.

The teacher is a logistic regression on many clean examples. The students see few examples with noisy labels and
start from equal weights in equal order; the distilled one also learns from the teacher's probabilities.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

CONFIG = """\
plugins = ["soft-labels"]
# folder or hub name of the teacher
teacher = "/data/models/big-teacher"  # a local copy
student = "prajjwal1/bert-tiny"
learning_rate = 0.5
temperature = 2.0

[run]
seeds = 3
compare = true
out = "/data/runs/mine"
data = "/data/corpora/reviews"
"""


def digest(*arrays: Any) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()


def probabilities(inputs: Any, weights: Any) -> Any:
    return 1 / (1 + np.exp(-inputs @ weights))


def evaluation(inputs: Any, labels: Any, weights: Any, latency: float) -> dict[str, Any]:
    chances = np.clip(probabilities(inputs, weights), 1e-6, 1 - 1e-6)
    right = ((chances > 0.5) == labels).astype(float)
    loss = -(labels * np.log(chances) + (1 - labels) * np.log(1 - chances))

    def by_id(values: Any) -> dict[str, float]:
        return {f"t{index}": float(value) for index, value in enumerate(values)}

    return {
        "accuracy": {"value": float(right.mean()), "better": "higher", "samples": by_id(right)},
        "log loss": {"value": float(loss.mean()), "better": "lower", "samples": by_id(loss)},
        "calibration error": {"value": float(abs(chances.mean() - labels.mean())), "better": "lower", "samples": None},
        "latency_ms": {"value": latency, "better": "lower", "samples": None},
    }


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def train(folder: Path, inputs: Any, labels: Any, soft: Any, held: Any, seed: int, distilled: bool, steps: int) -> Any:
    rng = np.random.default_rng(seed)
    weights = rng.normal(0, 0.1, inputs.shape[1])
    start = digest(weights)
    order = np.stack([rng.choice(len(inputs), 8) for _ in range(steps)])
    lines, best = [], (0.0, 0, weights)
    for step, chosen in enumerate(order, start=1):
        batch, chances = inputs[chosen], probabilities(inputs[chosen], weights)
        targets = {"soft-labels/ce": labels[chosen]} | ({"soft-labels/kl": soft[chosen]} if distilled else {})
        terms = {
            name: float(-(goal * np.log(chances) + (1 - goal) * np.log(1 - chances)).mean())
            for name, goal in targets.items()
        }
        gradient = sum(batch.T @ (chances - goal) / len(chosen) for goal in targets.values()) / len(targets)
        weights = weights - 0.5 * gradient
        if step % 5 == 0:
            record = {"step": step, "split": "train", "loss": sum(terms.values()) / len(terms), "terms": terms}
            record |= {"learning_rate": {"student": 0.5}, "gradient_norm": {"student": float(np.linalg.norm(gradient))}}
            lines.append(record)
        if step % 50 == 0:
            found = evaluation(*held, weights, 0.1)
            metrics = {name: found[name]["value"] for name in ("accuracy", "log loss")}
            directions = {name: found[name]["better"] for name in metrics}
            lines.append({"step": step, "split": "validation", "metrics": metrics, "better": directions})
            best = max(best, (metrics["accuracy"], step, weights), key=lambda check: check[:2])
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = {"steps": steps, "round_steps": [steps], "initial_hash": start, "order_hash": digest(order)}
    write(folder / "done.json", done | {"weights_hash": digest(best[2]), "best_step": best[1], "seconds": 0.1})
    return best[2]


def make_run(
    folder: Path, *, seeds: tuple[int, ...] = (0, 1, 2), compare: bool = True, distils: bool = True, steps: int = 300
) -> Path:
    """Write a run folder.

    :param distils: False gives the method's arm nothing of the teacher, so that it equals its control.
    """
    rng = np.random.default_rng(7)
    truth = rng.normal(size=40)
    inputs = rng.normal(size=(1500, 40))
    labels = (rng.random(1500) < probabilities(inputs, 2 * truth)).astype(float)
    teacher = np.zeros(40)
    for _ in range(400):
        teacher -= 0.5 * inputs[:1000].T @ (probabilities(inputs[:1000], teacher) - labels[:1000]) / 1000
    noisy = np.where(rng.random(60) < 0.3, 1 - labels[:60], labels[:60])
    soft = probabilities(inputs[:60], teacher)
    held, test = (inputs[1000:1100], labels[1000:1100]), (inputs[1100:1400], labels[1100:1400])
    arms = [("distill", False)] + ([("control", True)] if compare else [])
    plan = {
        "plugin": "soft-labels",
        "plugins": [
            {
                "name": "soft-labels",
                "version": "0.1.0",
                "distribution": "kd-plugin-soft-labels",
                "paper": "arXiv:1503.02531",
                "summary": "Teach a small classifier with a large one's softened labels.",
            }
        ],
        "headline": {"name": "accuracy", "better": "higher"},
        "arms": [{"name": name, "control": control, "because": "", "set": {}} for name, control in arms],
        "seeds": list(seeds),
        "subject": "student",
        "usage": '```python\nweights = load({"folder": "{folder}"})\n```',
        "teachers": {"large": {"source": "/data/models/big-teacher"}},
        "stages": ["distil"],
        "data": {"train": 60, "validation": 100, "test": 300},
        "started": "2026-01-02T03:04:05+00:00",
    }
    write(folder / "plan.json", plan)
    (folder / "config.toml").write_text(CONFIG)
    (folder / "events.log").write_text("run started\n")
    write(folder / "environment.json", {"versions": {"kdcore": "0.1.0", "numpy": np.__version__}, "git": None})
    write(folder / "data.json", {"duplicates": 0, "leaks": []})
    single = len(arms) == 1 and len(seeds) == 1
    for name, control in arms:
        for seed in seeds:
            place = folder / "arms" / name / f"seed-{seed}"
            weights = train(place / "distil", inputs[:60], noisy, soft, held, seed, distils and not control, steps)
            student = folder / "student" if single else place / "student"
            student.mkdir(parents=True)
            np.save(student / "weights.npy", weights.astype(np.float32))
            row = {"subject": "student", "split": "test", "metrics": evaluation(*test, weights, 0.4 + 0.01 * seed)}
            row |= {"parameters": 40, "bytes": (student / "weights.npy").stat().st_size}
            write(place / "evaluation.json", {"rows": [row | {"path": student.relative_to(folder).as_posix()}]})
    row = {"subject": "large", "split": "test", "metrics": evaluation(*test, teacher, 3.2)}
    write(folder / "teachers" / "large" / "evaluation.json", {"rows": [row | {"parameters": 40, "bytes": 4096}]})
    return folder


@pytest.fixture(scope="session")
def make() -> Callable[..., Path]:
    return make_run


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("made") / "mine")


@pytest.fixture
def run_folder(made_once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made_once, tmp_path / "mine"))
