import random

import numpy as np
import pytest
import torch
from torch import nn

from kdcore import Data, Example, Run, Stage
from kdcore.engine.loader import fixed_item


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, ids, mask):
        return (self.dropout(ids * self.weight) * mask).sum(1)


def outputs(model, batch):
    assert not torch.is_grad_enabled()
    assert not model.training
    return {"sum": model(batch["ids"].float(), batch.mask("ids"))}


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_rows_come_in_order_whatever_the_batches(tmp_path, batch_size):
    examples = [Example({"ids": list(range(n % 13 + 1))}, id=str(n)) for n in range(100)]
    model = Sum().train()
    rows = Run(folder=tmp_path).predict(
        model, examples, outputs, item=lambda e: {"ids": e["ids"]}, batch_size=batch_size
    )
    assert [float(row["sum"]) for row in rows] == [sum(e["ids"]) for e in examples]
    assert model.training
    assert model.dropout.training


def test_half_precision_outputs_are_numpy_arrays(tmp_path):
    rows = Run(folder=tmp_path).predict(
        Sum(),
        [Example({"ids": [1, 2]})],
        lambda model, batch: {"x": batch["ids"].to(torch.bfloat16)},
        item=lambda e: dict(e.data),
    )
    assert rows[0]["x"].tolist() == [1.0, 2.0]


def test_the_stages_own_collate_and_fixed_items_are_used(tmp_path):
    def noisy(example):
        return {"value": np.array([example["value"] + random.random()])}

    def counted(items):
        return {
            "value": torch.tensor([item["value"].sum() for item in items]),
            "n": torch.full((len(items),), len(items)),
        }

    run = Run(folder=tmp_path)
    data = Data(item=noisy, collate=counted)
    run.stage = Stage(name="s", loop=lambda *_: [], build=lambda run: {}, data=data)
    examples = [Example({"value": n}, id=str(n)) for n in range(5)]
    rows = run.predict(Sum(), examples, lambda model, batch: {"value": batch["value"], "n": batch["n"]})
    assert [int(row["n"]) for row in rows] == [5] * 5
    assert [float(row["value"]) for row in rows] == [float(fixed_item(data, e)["value"][0]) for e in examples]
