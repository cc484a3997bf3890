"""Drawing tokens: right frequencies, seeds, modes left alone, mistakes refused at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import cases
from cases import build
from test_cache import BY_NAME, ids, recall
from zoo.core.sampling import choose

pytestmark = pytest.mark.numeric

__all__ = ["recall"]


def draws(count: int, **options: Any) -> Tensor:
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0]]).expand(count, 4)
    return choose(logits, generator=torch.Generator().manual_seed(0), **{"temperature": 1.0, "top_k": None, **options})


@pytest.mark.parametrize(
    ("temperature", "top_k"), [(1.0, None), (0.5, None), (3.0, None), (1.0, 2), (2.0, 3), (1.0, 4)]
)
def test_frequencies_are_those_of_the_softmax(temperature: float, top_k: int | None) -> None:
    count = 40_000
    found = draws(count, temperature=temperature, top_k=top_k).bincount(minlength=4) / count
    p = (torch.tensor([0.0, 2.0, 1.0, -1.0]) / temperature).softmax(-1)
    if top_k:
        p = torch.where(p >= p.sort(descending=True).values[top_k - 1], p, 0)
    torch.testing.assert_close(found, p / p.sum(), rtol=0, atol=0.012)  # five standard errors
    assert torch.equal(found > 0, p > 0)


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"temperature": 1e-300}, {"top_k": 1}, {"temperature": 5e-324}]
)
def test_no_temperature_or_one_choice_is_greedy(options: dict[str, Any]) -> None:
    assert (draws(100, **options) == 1).all()


def test_same_seed_same_ids() -> None:
    model = build(BY_NAME["hypernet-chunk"])

    def drawn(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return [token.tolist() for token in model.generate(ids(model, 5), 20, 0, 1.0, 6, generator)]

    assert drawn(0) == drawn(0) != drawn(1)
    assert len(drawn(0)) == 20
    assert {len(row) for row in drawn(0)} == {3}


def test_gradients_are_off_within_a_step_alone() -> None:
    model, seen = build(BY_NAME["hypernet-chunk"]), []
    model.decoder.blocks[1].ffn.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    for token in model.generate(ids(model, 4), 3):
        assert torch.is_grad_enabled()
        assert not token.requires_grad
    assert seen == [False] * 3


def test_inference_mode() -> None:
    model = build(BY_NAME["hypernet-running"])
    expected = [token.tolist() for token in model.generate(ids(model, 4), 6)]
    with torch.inference_mode():
        assert [token.tolist() for token in model.generate(ids(model, 4), 6)] == expected


# mistakes

TOKENS = torch.zeros(2, 5, dtype=torch.long)
MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"tokens": TOKENS[0]}, r"the prompt must be token ids \(B,T\), got torch.int64 of shape \(5,\)"),
    ({"tokens": TOKENS.float()}, "got torch.float32"),
    ({"tokens": TOKENS + 8}, "token ids from 8 to 8 do not fit the vocabulary, 0 to 7"),
    ({"tokens": TOKENS - 1}, "token ids from -1 to -1 do not fit the vocabulary"),
    ({"count": 0}, "count=0 must be at least 1"),
    ({"n_context": -1}, "n_context=-1 must lie between 0 and the 5 tokens given"),
    ({"n_context": 5}, "all 5 tokens are context"),
    ({"temperature": -0.5}, "temperature=-0.5 must be a finite number"),
    ({"temperature": float("nan")}, "temperature=nan must be a finite number"),
    ({"temperature": float("inf")}, "temperature=inf must be a finite number"),
    ({"top_k": 0}, "top_k=0 must lie between 1 and the vocabulary of 8"),
    ({"top_k": 9}, "top_k=9 must lie between 1 and the vocabulary of 8"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes_are_refused_at_once(arguments: dict[str, Any], message: str) -> None:
    model = build(BY_NAME["transformer-noise-tied"])
    with pytest.raises(ValueError, match=message):
        model.generate(**{"tokens": TOKENS, "count": 2, **arguments})


def test_a_task_without_token_ids_is_refused() -> None:
    model = cases.build(cases.CASES[0])
    with pytest.raises(ValueError, match="regression has no next token"):
        model.generate(TOKENS, 2)
