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
    alphabet = np.array([0, 1, 97, 98, 255, 7, START])  # 7 was never seen
    ids = alphabet[np.random.default_rng(1).integers(0, 7, 900)]
    for place, bits in enumerate(Trigram(texts).bits(ids)):
        history = ids[max(0, place - 2) : place].tolist()
        while START in history:
            history = history[history.index(START) + 1 :]
        if ids[place] != START:
            assert bits == pytest.approx(-math.log2(p(tuple(history), int(ids[place]))))


def test_the_probabilities_of_the_trigram_sum_to_one(texts: list[np.ndarray]) -> None:
    trigram = Trigram(texts)
    for history in ([], [97], [97, 98], [START, 97], [97, START], [START, START], [7, 97], [7, 7]):
        bits = np.array([trigram.bits(np.array([*history, byte]))[-1] for byte in range(256)])
        assert (2.0**-bits).sum() == pytest.approx(1)
