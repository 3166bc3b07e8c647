"""The checks that options, ops, rewards and the command line share."""

import math

import numpy as np
import pytest
import torch

from cppo.options.values import is_finite_number, is_number, nearest, one_of, suggestion, unknown
from cppo.records import Views, map_tensors


@pytest.mark.parametrize(
    "value, finite, number",
    [
        (0, True, True),
        (-1.5, True, True),
        (np.float32(2), True, True),
        (math.inf, False, True),
        (math.nan, False, True),
        (10**400, False, True),
        (True, False, False),
        ("1", False, False),
        (None, False, False),
        (1j, False, False),
    ],
)
def test_numbers(value, finite, number):
    assert (is_finite_number(value), is_number(value)) == (finite, number)


def test_words():
    assert one_of(("a", "b")) == "one of 'a', 'b'"
    assert nearest("acuracy", ["format", "accuracy"]) == "accuracy"
    assert nearest("length", ["format", "accuracy"]) is None
    assert suggestion("acuracy", ["accuracy"]) == "; did you mean 'accuracy'?"
    assert suggestion(3, ["accuracy"]) == ""
    words = "unknown reward 'acuracy'; did you mean 'accuracy'? (allowed: format, accuracy)"
    assert unknown("reward", "acuracy", iter(["format", "accuracy"])) == words


def test_map_tensors_reaches_every_tensor_and_nothing_else():
    words = ["kept as it is"]
    views = Views(torch.zeros(2), None, torch.ones(2))
    value = {"views": views, "list": [torch.ones(1), 3], "plain": words, "set": {1}}
    doubled = map_tensors(value, lambda x: x + 1)
    assert isinstance(doubled["views"], Views) and doubled["views"].positive is None
    assert doubled["views"].negative.tolist() == [2, 2] and doubled["list"][1] == 3
    assert doubled["list"][0].item() == 2 and doubled["plain"] == words
    assert doubled["set"] is value["set"] and views.anchor.tolist() == [0, 0]
