"""One static patch is exact up to the number of inputs of the matrix it changes; every kind of the menu is exact in
float64, and loses in low precision what its figure says."""

import numpy as np
import pytest
import torch

from zoo.core.delta import InputShift, LowRank
from zoo.core.exact import replace_context
from zoo.core.patch import Patch
from zoo.papers import patches
from zoo.papers.patches import CONTROL, DIM, HIDDEN, MENU, PLAIN

pytestmark = pytest.mark.numeric

INPUT, OUTPUT = "gate, up and down (input side)", "down alone (output side)"
ELEMENTWISE = "norm scale, rank 1 of down"


@pytest.fixture(scope="module")
def errors() -> dict[str, dict[int, tuple[float, float]]]:
    """The range of the logit error over seeds, by side and number of query tokens."""
    torch.set_num_threads(1)
    lengths = (1, 8, DIM - 2, DIM + 1, HIDDEN - 4, HIDDEN + 1)
    (panel,) = patches.capacity_cliffs(range(3), context=10, layers=2, lengths=lengths).panels
    return {one.label: dict(zip(one.x, zip(one.low, one.high, strict=True), strict=True)) for one in panel.series}  # type: ignore[union-attr]


def test_exact_below_the_cliff_and_not_above_it(errors: dict[str, dict[int, tuple[float, float]]]) -> None:
    for side, limit in ((INPUT, DIM), (OUTPUT, HIDDEN)):
        for m, (least, most) in errors[side].items():
            assert most < 1e-9 if m <= limit else least > 1e-3, (side, m)


def test_without_a_patch_the_logits_are_far_off(errors: dict[str, dict[int, tuple[float, float]]]) -> None:
    assert min(least for least, _ in errors[CONTROL].values()) > 0.1


def test_one_matrix_serves_all_tokens() -> None:
    model = patches.decoder(0, layers=2)
    tokens = torch.arange(14)[None]
    for side in (patches.input_side, patches.output_side):
        for patch in replace_context(model, tokens, 6, side):
            assert not patch.biases
            assert patch.input is None
            assert all(delta.matrix.dim() == 3 and len(delta.matrix) == 1 for delta in patch.weights.values())  # type: ignore[attr-defined]


def test_two_equal_tokens_at_the_start_have_no_static_patch() -> None:
    # they attend to equal values, so their states without the context are the same, with it they are not
    model = patches.decoder(0, layers=1)
    tokens = torch.tensor([[1, 2, 3, 4, 9, 9]])
    wanted = model(tokens)[0][:, 4:]
    found = replace_context(model, tokens, 4, patches.output_side)
    assert (model(tokens[:, 4:], patches=found)[0] - wanted).abs().max() > 1e-3


@torch.no_grad()
def test_every_patch_is_exact_in_float64_and_no_patch_is_not() -> None:
    for seed in range(5):
        error = patches.errors(seed, context=12, dtype=torch.float64)
        assert set(error) == {PLAIN, *MENU}
        assert error.pop(CONTROL) > 0.1
        assert max(error.values()) < 1e-12, error


def test_cast_stores_every_number_in_the_given_precision() -> None:
    ones = torch.ones(1, 1, 3, dtype=torch.float64)
    patch = Patch(input=InputShift(ones, ones), weights={"down": LowRank(ones, ones)}, biases={"up": ones}, chunk=1)
    low = patches.cast(patch, torch.bfloat16)
    down = low.weights["down"]
    assert {t.dtype for t in (low.input.a, low.input.shift, down.u, down.v, low.biases["up"])} == {torch.bfloat16}
    assert (low.chunk, low.routing, down.gate) == (1, None, None)


def test_low_precision_and_elementwise_scales_cost_what_the_figure_says() -> None:
    (panel,) = patches.precision_of_patches(range(40)).panels
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
    first, again = (patches.precision_of_patches(range(2)).plain() for _ in range(2))
    assert first == again
    trials = [list(patches.errors(seed, 12, torch.bfloat16).values()) for seed in range(2)]
    assert first["panels"][0]["series"][0]["y"] == pytest.approx(np.median(trials, 0))
