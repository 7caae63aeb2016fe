from __future__ import annotations

import base64
import math
import re

import numpy as np

from kdcore.reports.plots import POINTS, Curve, _binned, _mean, forest, panel


def svg(uri):
    return base64.b64decode(uri.partition(",")[2]).decode()


def test_bins_keep_the_mean():
    steps, values = _binned(range(1, 1001), [float(step) for step in range(1, 1001)])
    assert len(steps) == POINTS
    assert np.allclose(steps, values)
    assert steps[0] < steps[-1] <= 1000


def test_the_mean_covers_the_steps_that_all_seeds_reached():
    seeds = [(np.array([1, 2, 3]), np.array([1.0, 2.0, 3.0])), (np.array([1, 2]), np.array([3.0, 4.0]))]
    steps, mean = _mean(seeds)
    assert (steps.tolist(), mean.tolist()) == ([1, 2], [2.0, 3.0])


def test_a_panel_names_its_arms_and_is_the_same_again():
    curves = [
        Curve("distill", [([1, 2], [1.0, 0.5]), ([1, 2], [0.9, 0.4])], [(2, 0.5)]),
        Curve("control", [([1], [1])]),
    ]
    uri = panel("loss $x", curves, ["distill", "control"])
    assert all(word in svg(uri) for word in ("loss $x", "distill", "control", "step"))
    assert uri == panel("loss $x", curves, ["distill", "control"])


def test_as_many_arms_as_a_report_has_are_told_apart():
    arms = [f"arm-{number}" for number in range(12)]
    text = svg(panel("loss", [Curve(arm, [([1, 2], [1.0, 0.5])]) for arm in arms], arms))
    drawn = re.findall(r"clip-path=\"[^\"]*\" style=\"fill: none; ([^\"]*stroke-width: 1\.8[^\"]*)\"", text)
    assert len(drawn) == len(set(drawn)) == 12


def test_intervals_beside_zero_are_coloured_apart():
    colours = re.compile(r"stroke: (#\w{6}|currentColor); stroke-width: 2\.5")
    text = svg(forest([("a", 2.0, 1.0, 3.0), ("b", -2.0, -3.0, -1.0), ("c", 0.5, -1.0, 2.0), ("d", 1.0, None, None)]))
    found = colours.findall(text)
    assert len(found) == 3
    assert len(set(found)) == 3
    assert found[2] == "currentColor"
    assert not math.isnan(len(text))
