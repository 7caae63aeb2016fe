"""The guide to taps and gradient caching runs as it is written."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import torch

from kdcore import Batch, Example
from kdcore.data.padding import pad

GUIDE = Path(__file__).parents[1] / "docs" / "how-to" / "feature-taps-and-gradient-caching.md"


def test_the_guide_runs(capsys):
    torch.manual_seed(0)
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL):
        exec(compile(block, GUIDE.name, "exec"), names)
    assert capsys.readouterr().out == "['encoder.layer.0', 'encoder.layer.1']\n"
    assert all(parameter.grad is not None for parameter in names["projector"].parameters())

    items = [{"ids": list(range(2, n)), "query": [n, 1], "passage": [n, 2, 3]} for n in range(4, 24)]
    batch = Batch(pad(items), [Example({}, id=str(n)) for n, _ in enumerate(items)])
    stage = names["Hints"]().stage(item=dict)
    models = SimpleNamespace(**stage.build(None))
    outputs = names["Hints"]().teacher_outputs(stage.teachers["large"].build(None), batch)
    [term] = names["Hints"]().student_loss(models, batch, {"large/hidden": outputs["hidden"]})
    term.value().backward()
    assert models.projector.project.weight.grad.abs().sum() > 0
    models.student.zero_grad()

    values = []
    for [term] in names["Contrast"]().student_loss(models, batch):
        values.append(term.value())
        values[-1].backward()
    assert len(values) == 4
    assert models.student.encoder.layer[1].output.dense.weight.grad.abs().sum() > 0
