"""One static patch is exact up to the number of inputs of the matrix it changes, and not beyond."""

import pytest
import torch

from zoo.core.exact import replace_context
from zoo.papers import capacity
from zoo.papers.capacity import DIM, HIDDEN

INPUT, OUTPUT, CONTROL = "gate, up and down (input side)", "down alone (output side)", "control: no patch"


@pytest.fixture(scope="module")
def errors() -> dict[str, dict[int, tuple[float, float]]]:
    """The range of the logit error over seeds, by side and number of query tokens."""
    torch.set_num_threads(1)
    lengths = (1, 8, DIM - 2, DIM + 1, HIDDEN - 4, HIDDEN + 1)
    (panel,) = capacity.capacity_cliffs(range(3), context=10, layers=2, lengths=lengths).panels
    return {one.label: dict(zip(one.x, zip(one.low, one.high, strict=True), strict=True)) for one in panel.series}  # type: ignore[union-attr]


def test_exact_below_the_cliff_and_not_above_it(errors: dict[str, dict[int, tuple[float, float]]]) -> None:
    for side, limit in ((INPUT, DIM), (OUTPUT, HIDDEN)):
        for m, (least, most) in errors[side].items():
            assert most < 1e-9 if m <= limit else least > 1e-3, (side, m)


def test_without_a_patch_the_logits_are_far_off(errors: dict[str, dict[int, tuple[float, float]]]) -> None:
    assert min(least for least, _ in errors[CONTROL].values()) > 0.1


def test_one_matrix_serves_all_tokens() -> None:
    model = capacity.decoder(0, layers=2)
    tokens = torch.arange(14)[None]
    for side in (capacity.input_side, capacity.output_side):
        for patch in replace_context(model, tokens, torch.arange(14) < 6, side):
            assert not patch.biases
            assert patch.input is None
            assert all(delta.matrix.dim() == 3 and len(delta.matrix) == 1 for delta in patch.weights.values())  # type: ignore[attr-defined]


def test_two_equal_tokens_at_the_start_have_no_static_patch() -> None:
    # they attend to equal values, so their states without the context are the same, with it they are not
    model = capacity.decoder(0, layers=1)
    tokens = torch.tensor([[1, 2, 3, 4, 9, 9]])
    removed = torch.arange(6) < 4
    wanted = model(tokens)[0][:, 4:]
    patches = replace_context(model, tokens, removed, capacity.output_side)
    assert (model(tokens[:, 4:], patches=patches)[0] - wanted).abs().max() > 1e-3
