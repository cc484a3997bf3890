"""Byte pair encoding of raw bytes: what ids spell, how text becomes ids, and how the merges are found.

Sennrich, Haddow & Birch 2016, arXiv 1508.07909; here on bytes, so any file can be encoded and is given back exactly.
Ids 0–255 are the bytes, 256 is the start of a document, which spells nothing.
Axes: V ids, L bytes of the longest token.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo.config import show
from zoo.tasks.text.corpus import START, byte_ids

LONGEST = 64  # bytes of a token
MOST = 1 << 16
PIECE = 1 << 15  # bytes that are encoded at once: a longer document is encoded piece by piece
BATCH = 128  # pieces encoded side by side
WORD = 1024  # bytes of a word that merges are learned from: the time grows with its square
# no token reaches over the end of a word, a number, a run of signs or of white space; bytes from 128 on, parts of
# letters in UTF-8, count as letters
WORDS = r" ?[A-Za-z\x80-\xff]+| ?[0-9]+| ?[^\t-\r A-Za-z0-9\x80-\xff]+|[\t-\r ]+(?![^\t-\r ])|[\t-\r ]+"


class Tokenizer:
    """Merges in the order in which they apply, each a pair of ids; without merges, tokens are bytes."""

    def __init__(self, merges: Any = ()):
        """Raises ValueError for anything but pairs of ids that exist by then."""
        self.spelled = [bytes([byte]) for byte in range(START)] + [b""]
        self._ids = {token: index for index, token in enumerate(self.spelled) if token}
        self.merges: list[list[int]] = []
        if not isinstance(merges, list | tuple) or len(merges) > MOST:
            raise ValueError(f"a tokenizer is a list of {MOST} merges at most, got {show(merges)}")
        for pair in merges:
            known = isinstance(pair, list | tuple) and len(pair) == 2
            if not known or any(type(i) is not int or not 0 <= i < len(self.spelled) or i == START for i in pair):
                raise ValueError(f"merge {len(self.merges)} of a tokenizer must be two earlier ids, got {show(pair)}")
            if len(token := self.spelled[pair[0]] + self.spelled[pair[1]]) > LONGEST:
                raise ValueError(f"merge {len(self.merges)} of a tokenizer spells more than {LONGEST} bytes")
            self.merges.append([*pair])
            if token not in self._ids:  # two merges may spell the same
                self._ids[token] = len(self.spelled)
                self.spelled.append(token)

    @functools.cached_property
    def lengths(self) -> Tensor:
        """(V) bytes of each id."""
        return torch.tensor([len(token) for token in self.spelled])

    @functools.cached_property
    def table(self) -> np.ndarray:
        """(V,L) the bytes of each id, −1 after its last; START alone for the start."""
        table = np.full((len(self.spelled), max(map(len, self.spelled))), -1, np.int16)
        for row, token in zip(table, self.spelled, strict=True):
            row[: len(token)] = list(token)
        table[START, 0] = START
        return table

    @functools.cached_property
    def _bpe(self) -> Any:
        texts = [token.decode("latin-1") for token in self.spelled]
        vocabulary = {text: index for index, text in enumerate(texts) if text}
        return _pipeline(WORDS, vocabulary, [(texts[a], texts[b]) for a, b in self.merges])

    def encode(self, texts: Iterable[bytes]) -> Iterator[np.ndarray]:
        """The ids (uint16) of documents one after the other, each after its start, in parts of any length."""
        if not self.merges:
            yield from map(byte_ids, texts)
            return
        pieces = ((not number, piece) for text in texts for number, piece in enumerate(_pieces(text)))
        while batch := list(islice(pieces, BATCH)):
            encoded = self._bpe.encode_batch_fast([piece for _, piece in batch])
            for (first, _), part in zip(batch, encoded, strict=True):
                yield np.array([START] * first + part.ids, np.uint16)

    def decode(self, ids: Iterable[int]) -> bytes:
        """The bytes that ids spell; ids that no merge has made spell nothing."""
        return b"".join(self.spelled[i] for i in ids if i < len(self.spelled))


def _pieces(text: bytes) -> Iterator[str]:
    """A character for each byte."""
    return (text[at : at + PIECE].decode("latin-1") for at in range(0, len(text) or 1, PIECE))


def _pipeline(words: str, *model: Any) -> Any:
    try:
        import tokenizers
    except ImportError:
        raise ValueError(
            "task.tokenizer=bpe needs the package tokenizers: python -m pip install -c constraints.txt -e '.[text]', "
            "or choose task.tokenizer=bytes"
        ) from None
    pipeline = tokenizers.Tokenizer(tokenizers.models.BPE(*model))
    pipeline.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(words), "isolated")
    return pipeline


def train(texts: Iterable[bytes], vocabulary: int) -> list[list[int]]:
    """The merges that give at most `vocabulary` ids, START among them: each joins the most frequent pair of `texts`,
    of those that come twice at least. Raises ValueError if the package `tokenizers` is missing."""
    pipeline = _pipeline(WORDS.replace("+", f"{{1,{WORD}}}"))
    from tokenizers.trainers import BpeTrainer

    ids, merges = {chr(byte): byte for byte in range(START)}, []
    trainer = BpeTrainer(
        vocab_size=vocabulary - 1,
        min_frequency=2,
        initial_alphabet=[*ids],
        max_token_length=LONGEST,
        show_progress=False,
    )
    pipeline.train_from_iterator(chain.from_iterable(map(_pieces, texts)), trainer)
    for a, b in json.loads(pipeline.to_str())["model"]["merges"]:
        merges.append([ids[a], ids[b]])
        ids.setdefault(a + b, len(ids) + 1)  # the start has an id, but no text
    return merges
