"""Figures: what they compute, that they are the same every time, and that labels cannot break them."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from linchain_cli.report.figures import (
    arm_curves,
    comparison_figure,
    layer_map,
    loss_curves,
    loss_figure,
    png,
    running_mean,
    seed_curve,
    spectrum_lines,
)
from linchain_cli.report.layers import LayerNumbers

HOSTILE = "$\\frac{<&>$ _x " + "long " * 30


def layer(path: str, *values: float) -> LayerNumbers:
    return LayerNumbers(path, values, 2.0, 1.5, 0.5, (1.0,))


LAYERS = [
    layer(f"model.layers.{i}.{kind}", 1.0 + i, 0.5)
    for i in range(3)
    for kind in ("attn.q_proj", "mlp.up_proj")
]


def test_a_running_mean_is_centred_and_shorter_at_the_ends():
    points = [(i, float(i * i)) for i in range(5)]
    assert running_mean(points, 1) == points
    assert running_mean(points, 3) == [(0, 0.5), (1, 5 / 3), (2, 14 / 3), (3, 29 / 3), (4, 12.5)]


def test_a_curve_over_seeds():
    curve = seed_curve("arm", [[(2, 1.0), (4, 3.0)], [(2, 2.0), (4, 5.0), (6, 0.0)]])
    assert curve.steps == (2, 4)  # what both have
    assert (curve.mean, curve.low, curve.high) == ((1.5, 4.0), (1.0, 3.0), (2.0, 5.0))
    assert seed_curve("arm", []) is None


@pytest.mark.parametrize(
    "draw", [lambda: loss_curves([(1, 2.0), (2, 1.0)], [(2, 1.5)]), lambda: spectrum_lines(LAYERS)]
)
def test_the_same_numbers_give_the_same_bytes(draw):
    assert draw().svg == draw().svg


def test_a_figure_says_what_it_shows():
    found = loss_curves([(1, 2.0), (50, 1.25)], [(10, 1.5), (50, 1.75)])
    assert "training loss from 2 at step 1 to 1.25 at step 50" in found.alt
    assert "lowest 1.5" in found.alt
    assert loss_curves([], []) is None
    found = layer_map(LAYERS, lambda one: one.norm, "size")
    assert "lowest 1.118 in layer 0" in found.alt and "in layer 2" in found.alt


def test_a_point_alone_is_a_dot():
    assert loss_figure([(6, 2.0)], [], "row").axes[0].get_ylabel() == "loss per row"
    line = loss_figure([(6, 2.0)], []).axes[0].lines[0]
    assert line.get_marker() == "o"
    assert loss_figure([(6, 2.0), (7, 1.0)], []).axes[0].lines[0].get_marker() == "None"
    row = {"arm": "a", "label": "a", "learning_rate": 1e-3, "seeds": [1]}
    run = {"arm": "a", "seed": 1, "training": [[6, 2.0]], "validation": [[6, 10.0, 1.0]]}
    axes = comparison_figure({"runs": [run]}, [row]).axes
    assert [each.lines[0].get_marker() for each in axes if each.lines] == ["o", "o"]


def test_a_step_alone_stands_at_a_whole_number():
    (axes,) = loss_figure([], [(3, 1.5)]).axes
    assert all(float(tick).is_integer() for tick in axes.get_xticks())


def test_a_map_of_what_is_not_there_is_none():
    assert layer_map(LAYERS, lambda one: one.relative_norm, "size") is None
    assert layer_map(LAYERS, lambda one: float("inf"), "size") is None
    assert spectrum_lines([layer("a.0.b", 0.0, 0.0)]) is None


def test_places_of_modules():
    assert layer("model.layers.12.self_attn.q_proj", 1.0).place == (12, "self_attn.q_proj")
    assert layer("h.0.mlp.experts.3.w1", 1.0).place == (0, "mlp.experts.*.w1")
    assert layer("lm_head", 1.0).place == (None, "lm_head")


def test_labels_cannot_break_a_figure():
    row = {"arm": "a", "label": HOSTILE, "learning_rate": 1e-3, "seeds": [1]}
    run = {"arm": "a", "seed": 1, "training": [[1, 2.0], [2, 1.0]], "validation": [[2, 10.0, 1.0]]}
    results = {"runs": [run]}
    assert png(comparison_figure(results, [row]))[:4] == b"\x89PNG"
    training, validation = arm_curves(results, [row])
    assert (training[0].label, validation[0].mean) == (HOSTILE, (1.0,))
    drawn = layer_map([layer("model.layers.0.$\\bad{<&>", 1.0)], lambda one: one.norm, "size")
    ElementTree.fromstring(drawn.svg)
