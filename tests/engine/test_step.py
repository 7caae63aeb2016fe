from collections import OrderedDict, defaultdict, namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from kdcore import LossTerm
from kdcore.engine.models import Models
from kdcore.engine.step import Passes, detach_memo, step_totals, weighted_sum
from kdcore.errors import PluginError
from kdcore.losses.topk import top_k
from kdcore.taps import tapped

MODELS = Models(nn.ModuleDict({"student": nn.Linear(2, 2)}))


def never():
    raise AssertionError("a term of weight 0 was evaluated")


def test_terms_are_weighed_by_arm_and_a_weight_of_zero_is_never_evaluated():
    ranknet = LossTerm("ranknet", lambda: torch.tensor(3.0), "task", 0.0, control=1.0)
    margin = LossTerm("margin", torch.tensor(5.0), "distill", 2.0)
    infinite = LossTerm("infinite", torch.tensor(float("inf")), "distill", 0.0)
    terms = [("p", ranknet), ("p", margin), ("p", infinite), ("p", LossTerm("no", never, "distill", 0.0))]
    loss, values = weighted_sum(terms, control=False, portion=1.0, totals={})
    assert loss == 10.0
    assert values == {"p/margin": 5.0}
    loss, values = weighted_sum(terms, control=True, portion=1.0, totals={})
    assert loss == 3.0
    assert values == {"p/ranknet": 3.0}


def test_means_are_weighted_by_their_share_and_sums_divided_once():
    mean, total = LossTerm("mean", torch.tensor(2.0)), LossTerm("sum", torch.tensor(12.0), per="tokens")
    loss, _ = weighted_sum(
        [("p", mean), ("p", total)], control=False, portion=0.25, totals={"tokens": torch.tensor(24.0)}
    )
    assert loss == pytest.approx(2.0 * 0.25 + 12 / 24)


@pytest.mark.parametrize(
    ("term", "words"),
    [
        (LossTerm("vector", torch.ones(3)), "must be a scalar"),
        (LossTerm("number", 3.0), "must be a scalar"),
        (LossTerm("per", torch.tensor(1.0), per="frames"), "the stage counts tokens"),
    ],
)
def test_bad_terms_name_plugin_and_term(term, words):
    with pytest.raises(PluginError, match=rf"mine/{term.name}.*{words}"):
        weighted_sum([("mine", term)], control=False, portion=1.0, totals={"tokens": torch.tensor(1.0)})


def test_pass_k_joins_the_kth_list_of_every_plugin():
    def three_passes():
        for number in range(3):
            yield [LossTerm(f"pass{number}", torch.tensor(1.0))]

    answers = {"generator": three_passes(), "list": [LossTerm("plain", torch.tensor(1.0))], "silent": None}
    passes = Passes(list(answers), lambda plugin, models: answers[plugin])
    found = []
    while not passes.finished:
        found.append([term.name for _, term in passes.next(MODELS)])
    assert [sorted(names) for names in found] == [["pass0", "plain"], ["pass1"], ["pass2"], []]


def test_a_plain_list_is_known_to_be_the_last_pass():
    passes = Passes(["a"], lambda plugin, models: [LossTerm("x", torch.tensor(1.0))])
    assert len(passes.next(MODELS)) == 1
    assert passes.finished


def test_an_answer_that_is_no_list_of_terms_is_refused():
    for answer in (LossTerm("x", torch.tensor(1.0)), [torch.tensor(1.0)], torch.tensor(1.0)):
        with pytest.raises(PluginError, match="student_loss of plugin a"):
            Passes(["a"], lambda plugin, models, answer=answer: answer).next(MODELS)


Pair = namedtuple("Pair", "left right")


def test_what_a_pass_leaves_in_the_memo_keeps_its_kind_and_loses_its_graph():
    live = torch.ones(2, 3, requires_grad=True) * 2
    net = nn.Sequential(nn.Linear(3, 3))
    with tapped(net, "0") as taps:
        net(live)
    memo = {
        "tensor": live,
        "nested": {"list": [live, 1], "tuple": (live, None)},
        "named": Pair(live, "text"),
        "ordered": OrderedDict(a=live),
        "default": defaultdict(list, a=[live]),
        "taps": taps,
        "top": top_k(live, 2),
    }
    detach_memo(memo)
    found = [memo["tensor"], memo["nested"]["list"][0], memo["nested"]["tuple"][0], memo["named"].left]
    found += [memo["ordered"]["a"], memo["default"]["a"][0], memo["taps"]["0"], *memo["top"][1:3]]
    assert not any(tensor.requires_grad for tensor in found)
    assert memo["named"].right == "text"
    assert memo["default"]["new"] == []
    assert live.requires_grad


@pytest.mark.parametrize("value", [4, 4.0, True, np.int64(4), torch.tensor(4), torch.tensor([4])])
def test_a_count_is_a_number_of_any_kind(value):
    stage = SimpleNamespace(counts=lambda batch: {"n": value}, name="distil")
    accelerator = SimpleNamespace(device=torch.device("cpu"), num_processes=1)
    total = step_totals(stage, [None, None], accelerator)["n"]
    assert total.shape == ()
    assert total == 2 * float(value)


@pytest.mark.parametrize("value", [torch.tensor([1, 2]), torch.empty(0)])
def test_a_count_of_several_numbers_is_refused(value):
    stage = SimpleNamespace(counts=lambda batch: {"n": value}, name="distil")
    accelerator = SimpleNamespace(device=torch.device("cpu"), num_processes=1)
    with pytest.raises(PluginError, match="counts of stage 'distil' gave 'n' the shape"):
        step_totals(stage, [None], accelerator)
