"""A parameter's value at a tensor: a number, a list over the layers, a table of patterns."""

from __future__ import annotations

import pytest

from kdcore.merging.plan import Setting, setting_at


@pytest.mark.parametrize(
    ("setting", "depth", "value"),
    [
        (0.5, 0.7, 0.5),
        (3, 0.0, 3),
        (False, 0.5, False),
        ("norm", 1.0, "norm"),
        ([0.25], 0.0, 0.25),
        ([0.25], 1.0, 0.25),
        ([0, 1], 0.0, 0),
        ([0, 1], 0.25, 0.25),
        ([0, 1], 1.0, 1),
        ([0, 1, 0.5], 0.5, 1),
        ([0, 1, 0.5], 0.75, 0.75),
        ((4.0, 2.0), 0.5, 3.0),
        ([True, False], 0.4, True),
        ([True, False], 1.0, False),
        (["density", "norm"], 0.99, "density"),
    ],
)
def test_numbers_and_lists_over_the_layers(setting: Setting, depth: float, value: object) -> None:
    found = setting_at(setting, None, "model.layers.0.weight", depth)
    assert found == pytest.approx(value) if isinstance(value, float) else found == value


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_a_list_as_long_as_the_layers_gives_each_its_own(count: int) -> None:
    values = [float(place * place) for place in range(count)]
    found = [setting_at(values, None, "w", place / max(1, count - 1)) for place in range(count)]
    assert found == pytest.approx(values)


def test_of_patterns_the_first_that_fits_counts() -> None:
    setting = {"*.mlp.*": 0.1, "*.layers.*": [0.2, 0.4], "*.q_proj.weight": 0.9, "lm_head.weight": {"lm*": 0.5}}
    assert setting_at(setting, 1.0, "model.layers.3.mlp.up.weight", 0.5) == 0.1
    assert setting_at(setting, 1.0, "model.layers.3.q_proj.weight", 0.5) == pytest.approx(0.3)
    assert setting_at(setting, 1.0, "lm_head.weight", 0.0) == 0.5
    assert setting_at(setting, 1.0, "model.embed.weight", 0.0) == 1.0
    assert setting_at(setting, 1.0, "MODEL.MLP.weight", 0.0) == 1.0
    assert setting_at({"lm*": {"x*": 0.5}}, 0.7, "lm_head", 0.0) == 0.7
