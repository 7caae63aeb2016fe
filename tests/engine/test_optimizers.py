import torch

from kdcore import adamw


def test_groups_have_no_decay_for_vectors_and_rates_by_name():
    model = torch.nn.ModuleDict({"body": torch.nn.Linear(3, 2), "kernels": torch.nn.Linear(2, 1)})
    optimizer = adamw(1e-3, weight_decay=0.1, rates={"kernels.*": 1e-2})(list(model.named_parameters()))
    found = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    assert found[id(model["body"].weight)] == (1e-3, 0.1)
    assert found[id(model["body"].bias)] == (1e-3, 0.0)
    assert found[id(model["kernels"].weight)] == (1e-2, 0.1)
    assert found[id(model["kernels"].bias)] == (1e-2, 0.0)
