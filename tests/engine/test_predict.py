import pytest
import torch
from torch import nn

from kdcore import Example, Run


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
