"""The stand-in teacher of the benchmark, and what its page says, where the repository is at hand."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kd_plugin_emo_pillars.students import build_student, load_tokenizer
from kd_plugin_emo_pillars.taxonomy import GOEMOTIONS, read_taxonomy

BENCHMARKS = Path(__file__).parents[4] / "benchmarks"

pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the package alone")

POOL = ["we won the match", "the bus leaves at nine", "you broke my window"]


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark's two scripts."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import classifier_teacher
    import emo_pillars

    return classifier_teacher, emo_pillars


@pytest.fixture
def taught(scripts: Any, tiny_bert: str, tmp_path: Path) -> Iterator[Any]:
    """A stand-in whose classifier is untrained, with a tuned threshold amid its probabilities of the pool's first."""
    labels = read_taxonomy(GOEMOTIONS).labels
    torch.manual_seed(0)
    student = build_student(tiny_bert, labels, None, 32).eval()
    torch.nn.init.normal_(student.classifier.weight)
    tokenizer = load_tokenizer(tiny_bert)
    with torch.no_grad():
        probable = student(**tokenizer(POOL[0], return_tensors="pt")).logits.sigmoid()[0]
    student.config.threshold = float(probable.sort().values[-4:-2].mean())
    student.save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    return scripts[0].ClassifierTeacher(tmp_path / "student", POOL, 0), probable, student.config.threshold


def test_what_the_classifier_predicts_is_at_least_a_half(taught: Any) -> None:
    teacher, probable, threshold = taught
    prompt = f"Which emotions?\n\nUtterance: {json.dumps(POOL[0])}\nAnswer:"
    told = teacher.answer([{"role": "user", "content": prompt}])
    predicted = {label for label, p in zip(teacher.labels, probable.tolist()) if p >= threshold}
    assert len(predicted) == 3
    assert {label for label, value in told.items() if value >= 0.5} == predicted


@pytest.mark.parametrize("threshold", [0.07, 0.36, 0.5, 0.93])
def test_intensities_rise_with_probabilities_and_pass_a_half_at_the_threshold(scripts: Any, threshold: float) -> None:
    intensity = scripts[0].intensity
    told = [intensity(step / 1000, threshold) for step in range(1001)]
    assert told == sorted(told)
    assert (told[0], told[-1]) == (0, 1)
    assert intensity(threshold, threshold) == 0.5
    assert intensity(math.nextafter(threshold, 0), threshold) < 0.5


def test_the_page_tells_what_seeds_vary_and_how_many_examples_round_to_no_label(scripts: Any, tmp_path: Path) -> None:
    benchmark = scripts[1]
    for seed, intensities in enumerate(([0.5, 0.2], [0.49, 0.9])):
        rounds = tmp_path / "arms" / "hard-labels" / f"seed-{seed}" / "synthetic" / "rounds"
        rounds.mkdir(parents=True)
        rows = [{"data": {"labels": {"joy": value, "fear": 0.1}}} for value in intensities]
        (rounds / "0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    share = benchmark.unlabelled_share(tmp_path, "hard-labels", 2)
    assert share == 0.5
    quality = {arm: {} for arm in benchmark.ARMS}
    page = benchmark.page(
        {100: {"quality": quality, "differences": [], "unlabelled": share}}, dict.fromkeys(benchmark.METRICS, 0.5), 2
    )
    assert "One draw of labelled texts; seeds vary initialisation, order and synthesis." in page
    assert "without a label once rounded: 50.0% with 100 labels." in page
