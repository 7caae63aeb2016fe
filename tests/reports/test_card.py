from __future__ import annotations

import json
import tomllib

import pytest
from huggingface_hub import ModelCard

from kdcore.reports.card import configuration, write_cards


def test_every_student_has_a_card_that_the_hub_can_read(run_folder):
    cards = write_cards(run_folder)
    assert len(cards) == 6
    assert cards[0] == run_folder / "arms/distill/seed-0/student/README.md"
    data = ModelCard.load(cards[0]).data
    assert (data.library_name, data.base_model) == ("transformers", "prajjwal1/bert-tiny")
    assert {"knowledge-distillation", "kdcore", "soft-labels"} <= set(data.tags)
    assert data.metrics == ["accuracy", "log loss", "calibration error"]


def test_the_card_tells_the_result_and_how_to_load(run_folder):
    text = write_cards(run_folder)[0].read_text()
    for kind in ("| teacher: large | control (3 seeds) |", "| accuracy ↑ | 0.960 | 0."):
        assert kind in text
    assert "**Distillation helped.**" in text
    assert "distill - control: accuracy +" in text
    assert 'load({"folder": "mine/arms/distill/seed-0/student"})' in text
    assert "https://arxiv.org/abs/1503.02531" in text
    assert "Plugin `soft-labels` of `kd-plugin-soft-labels` 0.1.0" in text
    assert "\n\n\n" not in text


def test_a_claim_that_does_not_hold_is_said(make, tmp_path):
    folder = make(tmp_path / "null", distils=False)
    assert "**The claim does not hold here" in write_cards(folder)[0].read_text()


def test_no_path_of_the_machine_is_in_it(run_folder):
    plan = json.loads((run_folder / "plan.json").read_text())
    plan["plugins"].append({"name": "joiner", "version": "1", "distribution": "/data/joiner.py"})
    (run_folder / "plan.json").write_text(json.dumps(plan))
    text = write_cards(run_folder)[0].read_text()
    assert "Plugin `joiner` of `joiner.py` 1" in text
    assert "/data/" not in text
    assert str(run_folder.parent) not in text
    assert "Teacher `large`: `big-teacher`" in text
    assert 'data = "reviews"' in text


def test_a_control_is_called_one(run_folder):
    text = (write_cards(run_folder)[-1]).read_text()
    assert "# soft-labels student (control)" in text
    assert "trained without distillation" in text


def test_a_single_student_lies_at_the_top(make, tmp_path):
    folder = make(tmp_path / "alone", seeds=(0,), compare=False)
    (folder / "student" / "modules.json").write_text("[]")
    assert write_cards(folder) == [folder / "student" / "README.md"]
    assert ModelCard.load(folder / "student" / "README.md").data.library_name == "sentence-transformers"


def test_without_usage_a_way_to_load_is_given(run_folder):
    plan = run_folder / "plan.json"
    plan.write_text(json.dumps(json.loads(plan.read_text()) | {"usage": ""}))
    text = write_cards(run_folder)[0].read_text()
    assert 'AutoModel.from_pretrained("mine/arms/distill/seed-0/student")' in text


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ("/srv/models/model", "model"),
        ("~/model/", "model"),
        ("C:\\\\models\\\\big", "big"),
        ("org/model", "org/model"),
        ("./model", "./model"),
        ("/a/one, org/two", "one, org/two"),
        ("https://example.org/x", "https://example.org/x"),
    ],
)
def test_absolute_paths_keep_their_last_part(value, kept):
    text = f'top = "{value}"  # why\n[run]\nlist = ["{value}"]\nsteps = 3\n'
    assert tomllib.loads(configuration(text)) == {"top": kept, "run": {"list": [kept], "steps": 3}}
    assert "# why" in configuration(text)
