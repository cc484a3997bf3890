"""Byte pairs: the merges beside naive ones, exact round trips of any bytes, and foreign merges refused."""

from __future__ import annotations

import re
import sys
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from zoo.tasks.text import tokenizer
from zoo.tasks.text.corpus import START, byte_ids
from zoo.tasks.text.tokenizer import LONGEST, Tokenizer, train

PROSE = (
    (
        "It was the best of times, it was the worst of times; déjà vu, naïveté, Ελληνικά 日本語.\n"
        "    def f(x):\n\t\treturn x_1 + 12345  # the sum\r\n\n"
    ).encode()
    * 3
    + bytes(range(256))
    + b"\xff\xfe\x00 \x85\xa0"
)
TEXTS = [PROSE, b"", b"the worst", b" ", b"a" * 300]


def words(text: bytes) -> list[list[int]]:
    """The bytes of each word: runs of letters, digits, signs or white space; all but the last take a space before."""
    letter, digit, space = rb"[A-Za-z\x80-\xff]", rb"[0-9]", rb"[\t-\r ]"
    sign = rb"[^A-Za-z0-9\x80-\xff\t-\r ]"
    kinds = rb"|".join(rb" ?" + kind + rb"+" for kind in (letter, digit, sign))
    # white space leaves its last character to what follows it
    return [list(word) for word in re.findall(kinds + rb"|" + space + rb"+(?!" + rb"[^\t-\r ])|" + space + rb"+", text)]


def merged(word: list[int], pair: tuple[int, int], new: int) -> list[int]:
    made: list[int] = []
    for token in word:
        if made and (made[-1], token) == pair:
            made[-1] = new
        else:
            made.append(token)
    return made


def pairs(found: list[list[int]]) -> Counter[tuple[int, int]]:
    return Counter(pair for word in found for pair in pairwise(word))


@pytest.fixture(scope="module")
def merges() -> list[list[int]]:
    return train(TEXTS, 400)


def test_each_merge_joins_the_most_frequent_pair() -> None:
    merges, found = train([PROSE], 400), words(PROSE)
    spelled = Tokenizer(merges).spelled
    assert len(merges) > 50
    for a, b in merges:
        counts = pairs(found)
        assert counts[a, b] == max(counts.values()) >= 2
        found = [merged(word, (a, b), spelled.index(spelled[a] + spelled[b])) for word in found]


@pytest.mark.parametrize("piece", [1 << 15, 50])
def test_ids_are_those_of_the_definition(merges: list[list[int]], piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "PIECE", piece)
    monkeypatch.setattr(tokenizer, "BATCH", 3)
    made, expected = Tokenizer(merges), []
    for text in TEXTS:
        expected.append(START)
        for word in (word for at in range(0, len(text), piece) for word in words(text[at : at + piece])):
            while found := [k for k, pair in enumerate(merges) if tuple(pair) in pairs([word])]:
                a, b = merges[found[0]]
                word = merged(word, (a, b), made.spelled.index(made.spelled[a] + made.spelled[b]))
            expected += word
    ids = np.concatenate(list(made.encode(TEXTS)))
    assert ids.dtype == np.uint16
    assert ids.tolist() == expected
    assert len(ids) < 0.6 * sum(map(len, TEXTS))


def test_any_bytes_come_back(merges: list[list[int]]) -> None:
    draw = np.random.default_rng(0)
    texts = [*TEXTS, draw.bytes(5000), " \xa0\x85\u2028\x1f  ".encode(), b"<|endoftext|>\x00\x00"]
    for made in (Tokenizer(merges), Tokenizer()):
        assert [made.decode(np.concatenate(list(made.encode([text])))) for text in texts] == texts
    assert np.array_equal(np.concatenate(list(made.encode(texts))), np.concatenate([*map(byte_ids, texts)]))


def test_no_token_is_longer_than_the_limit() -> None:
    assert LONGEST / 2 < max(map(len, Tokenizer(train([b"abcdefghi" * 300], 400)).spelled)) <= LONGEST
    with pytest.raises(ValueError, match="merge 24 of a tokenizer is beyond 33554432 bytes in all"):
        Tokenizer([[97, 97], *([256 + k, 256 + k] for k in range(1, 40))])


def test_training_again_gives_the_same(merges: list[list[int]]) -> None:
    assert train(TEXTS, 400) == merges
    assert train(TEXTS, 300) == merges[:43]
    assert train([b"ab", b"cd"], 400) == []  # no pair comes twice


def test_ids_are_respelled_in_bytes(merges: list[list[int]]) -> None:
    made = Tokenizer(merges)
    ids = np.random.default_rng(0).permutation(len(made.spelled))
    expected = [list(made.spelled[i]) if i != START else [START] for i in ids]
    assert made.respelled(ids).tolist() == [byte for token in expected for byte in token]
    assert len(set(made.spelled)) == len(made.spelled)


def test_two_merges_may_spell_the_same() -> None:
    made = Tokenizer([[97, 98], [98, 99], [257, 99], [97, 258]])
    assert made.spelled[257:] == [b"ab", b"bc", b"abc"]
    assert np.concatenate(list(made.encode([b"abc bc"]))).tolist() == [START, 259, 32, 258]
    assert made.decode([97, START, 300, 258]) == b"abc"  # ids that no merge has made spell nothing


@pytest.mark.parametrize(
    "merges",
    ["merges", None, [1, 2], [[1]], [["a", "b"]], [[True, 2]], [[-1, 2]], [[97, START]], [[97, 257]]],
)
def test_foreign_merges_are_refused(merges: Any) -> None:
    with pytest.raises(ValueError, match=r"^a tokenizer is a list of 524288 merges|^merge 0 of a tokenizer must"):
        Tokenizer(merges)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"needs the package tokenizers: python -m pip install .*'\.\[text\]'"):
        train(TEXTS, 300)
    assert next(Tokenizer().encode([b"ab"])).tolist() == [START, 97, 98]


def test_merges_are_learned_from_pieces_of_long_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time grows with the square of a word."""
    monkeypatch.setattr(tokenizer, "WORD", 6)
    assert max(map(len, Tokenizer(train([b"abcdefghi" * 300], 400)).spelled)) == 6
