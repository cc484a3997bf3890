"""Every patch of the menu is exact in float64, and loses in low precision what its figure says."""

import numpy as np
import pytest
import torch

from zoo.core.delta import InputShift, LowRank
from zoo.core.patch import Patch
from zoo.papers import precision
from zoo.papers.precision import CONTROL, MENU, PLAIN

pytestmark = pytest.mark.numeric

ELEMENTWISE = "norm scale, rank 1 of down"


@torch.no_grad()
def test_every_patch_is_exact_in_float64_and_no_patch_is_not() -> None:
    for seed in range(5):
        error = precision.errors(seed, context=12, dtype=torch.float64)
        assert set(error) == {PLAIN, *MENU}
        assert error.pop(CONTROL) > 0.1
        assert max(error.values()) < 1e-12, error


def test_cast_stores_every_number_in_the_given_precision() -> None:
    ones = torch.ones(1, 1, 3, dtype=torch.float64)
    patch = Patch(input=InputShift(ones, ones), weights={"down": LowRank(ones, ones)}, biases={"up": ones}, chunk=1)
    low = precision.cast(patch, torch.bfloat16)
    down = low.weights["down"]
    assert {t.dtype for t in (low.input.a, low.input.shift, down.u, down.v, low.biases["up"])} == {torch.bfloat16}
    assert (low.chunk, low.routing, down.gate) == (1, None, None)


def test_low_precision_and_elementwise_scales_cost_what_the_figure_says() -> None:
    (panel,) = precision.precision_of_patches(range(40)).panels
    middle = {one.label: dict(zip(one.x, one.y, strict=True)) for one in panel.series}  # type: ignore[union-attr]
    high = {one.label: dict(zip(one.x, one.high, strict=True)) for one in panel.series}  # type: ignore[union-attr]
    for name in middle["float32"].keys() - {CONTROL}:
        assert 1e-8 < middle["float32"][name] < 1e-5
        assert middle["bfloat16"][name] > 1000 * middle["float32"][name]
    for label in middle:
        for name in middle[label].keys() - {ELEMENTWISE, PLAIN, CONTROL}:
            assert middle[label][name] < 3 * middle[label][PLAIN], (label, name)
            assert high[label][ELEMENTWISE] > 2 * high[label][name], (label, name)
        assert middle[label][CONTROL] > 0.5


def test_numbers_depend_on_the_seeds_alone() -> None:
    first, again = (precision.precision_of_patches(range(2)).plain() for _ in range(2))
    assert first == again
    trials = [list(precision.errors(seed, 12, torch.bfloat16).values()) for seed in range(2)]
    assert first["panels"][0]["series"][0]["y"] == pytest.approx(np.median(trials, 0))
