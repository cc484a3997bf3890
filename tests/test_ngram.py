"""The trigram beside a naive one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from zoo.tasks.text.corpus import START
from zoo.tasks.text.ngram import Trigram


def naive(texts: list[list[int]]) -> Callable[[tuple[int, ...], int], float]:
    """p(byte | history) by the definition, from dicts."""
    counts: dict[tuple[int, ...], Counter[int]] = {}
    for ids in texts:
        for place, byte in enumerate(ids):
            for order in range(min(place, 2) + 1):
                history = tuple(ids[place - order : place])
                if max((*history, byte)) < 256:
                    counts.setdefault(history, Counter())[byte] += 1

    def p(history: tuple[int, ...], byte: int) -> float:
        shorter = p(history[1:], byte) if history else 1 / 256
        after = counts.get(history)
        if not after:
            return shorter
        return (after[byte] + len(after) * shorter) / (after.total() + len(after))

    return p


@pytest.fixture(scope="module")
def texts() -> list[np.ndarray]:
    """Ids over six bytes, the last one among them, with many starts."""
    draw = np.random.default_rng(0)
    alphabet = np.array([0, 1, 97, 98, 255, START])
    return [alphabet[draw.integers(0, 6, size)].astype(np.uint16) for size in (400, 1, 2, 150)]


def test_the_trigram_is_that_of_its_definition(texts: list[np.ndarray]) -> None:
    p = naive([ids.tolist() for ids in texts])
    trigram, draw = Trigram(texts), np.random.default_rng(1)
    alphabet = np.array([0, 1, 97, 98, 255, 7, START])  # 7 was never seen
    tokens, targets = alphabet[draw.integers(0, 7, (50, 9))], alphabet[draw.integers(0, 6, (50, 9))]
    bits = trigram.bits(tokens, targets)
    for row in range(50):
        for place in range(9):
            history = tokens[row, max(0, place - 1) : place + 1].tolist()
            while START in history:
                history = history[history.index(START) + 1 :]
            assert bits[row, place] == pytest.approx(-math.log2(p(tuple(history), int(targets[row, place]))))


def test_the_probabilities_of_the_trigram_sum_to_one(texts: list[np.ndarray]) -> None:
    trigram, targets = Trigram(texts), np.repeat(np.arange(256)[:, None], 2, 1)
    for history in ([97, 98], [START, 97], [97, START], [START, START], [7, 97], [7, 7]):
        bits = trigram.bits(np.tile(history, (256, 1)), targets)
        assert (2.0**-bits).sum(0) == pytest.approx([1, 1])


def test_a_start_hides_what_was_before(texts: list[np.ndarray]) -> None:
    trigram = Trigram(texts)
    tokens = np.array([[97, START, 98], [255, START, 98]])
    bits = trigram.bits(tokens, np.full((2, 3), 97))
    assert bits[0, 0] != bits[1, 0]
    assert np.array_equal(bits[0, 1:], bits[1, 1:])
    assert bits[0, 2] == trigram.bits(np.array([[98]]), np.array([[97]]))[0, 0]  # as at the start of a sequence
