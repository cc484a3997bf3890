"""Byte pair encoding of raw bytes: what ids spell, how text becomes ids, and how the merges are found, or read.

Sennrich, Haddow & Birch 2016, arXiv 1508.07909; here on bytes, so any file can be encoded and is given back exactly.
Ids 0–255 are the bytes, 256 is the start of a document, which spells nothing. From a file, tokenizer.json of the
library `tokenizers`, the merges are taken, and how it cuts text into words, as data; text is not normalised, and none
of it means an added token such as <|endoftext|>.
Axes: V ids, N ids of a text.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo.config import one_line, show
from zoo.files import home
from zoo.tasks.text import corpus
from zoo.tasks.text.corpus import START, byte_ids
from zoo.tasks.text.sources import named

LONGEST, SPELLED = 64, 1 << 25  # bytes of a token that is learned, and of all tokens together
TRAINED = 10_000_000  # bytes that merges are learned from, an equal share from each source
MOST = 1 << 19  # merges
LARGEST = 1 << 26  # bytes of a file
PIECE = 1 << 15  # bytes that are encoded at once: a longer document is encoded piece by piece
BATCH = 128  # pieces encoded side by side
WORD = 1024  # bytes of a word that merges are learned from: the time grows with its square
# no token reaches over the end of a word, a number, a run of signs or of white space; bytes from 128 on, parts of
# letters in UTF-8, count as letters
PATTERN = r" ?[A-Za-z\x80-\xff]+| ?[0-9]+| ?[^\t-\r A-Za-z0-9\x80-\xff]+|[\t-\r ]+(?![^\t-\r ])|[\t-\r ]+"
WORDS = {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": PATTERN}}
SIGNS = {byte: 256 + k for k, byte in enumerate([*range(33), *range(127, 161), 173])}
"""The characters that stand in files for bytes that are not seen, as of GPT-2 (Radford et al. 2019)."""


class Tokenizer:
    """Merges in the order in which they apply, each a pair of ids; without merges, tokens are bytes.

    words: how text, which is UTF-8 then, is cut first, as files say it, None: whatever bytes, by WORDS; whole: a word
    that is a token stays one."""

    def __init__(self, merges: Any = (), words: Any = None, whole: Any = False):
        """Raises ValueError for anything but pairs of ids that exist by then."""
        self.words, self.whole = words, whole
        self.spelled = [bytes([byte]) for byte in range(START)] + [b""]
        self._ids = {token: index for index, token in enumerate(self.spelled) if token}
        self.merges: list[list[int]] = []
        total = 0
        if not isinstance(merges, list | tuple) or len(merges) > MOST:
            raise ValueError(f"a tokenizer is a list of {MOST} merges at most, got {show(merges)}")
        for pair in merges:
            known = isinstance(pair, list | tuple) and len(pair) == 2
            if not known or any(type(i) is not int or not 0 <= i < len(self.spelled) or i == START for i in pair):
                raise ValueError(f"merge {len(self.merges)} of a tokenizer must be two earlier ids, got {show(pair)}")
            token = self.spelled[pair[0]] + self.spelled[pair[1]]
            if (total := total + len(token)) > SPELLED:
                raise ValueError(f"merge {len(self.merges)} of a tokenizer is beyond {SPELLED} bytes in all")
            self.merges.append([*pair])
            if token not in self._ids:  # two merges may spell the same
                self._ids[token] = len(self.spelled)
                self.spelled.append(token)
        content = {"merges": self.merges, "words": words, "whole": whole}
        self.content = json.dumps(self.merges if words is None else content)
        self.dtype = np.min_scalar_type(len(self.spelled) - 1)  # of ids: uint16, or uint32

    @functools.cached_property
    def lengths(self) -> Tensor:
        """(V) bytes of each id."""
        return torch.tensor([len(token) for token in self.spelled])

    @functools.cached_property
    def counts(self) -> np.ndarray:
        """(V) byte ids that stand for each id: its bytes, or the start."""
        return self.lengths.numpy().clip(min=1)

    @functools.cached_property
    def _bpe(self) -> Any:
        words, signs = (WORDS, {}) if self.words is None else (self.words, SIGNS)
        texts = [token.decode("latin-1").translate(signs) for token in self.spelled]
        vocabulary = {text: index for index, text in enumerate(texts) if text}
        merges = [(texts[a], texts[b]) for a, b in self.merges]
        return pipeline(words, vocab=vocabulary, merges=merges, ignore_merges=self.whole)

    def encode(self, texts: Iterable[bytes]) -> Iterator[np.ndarray]:
        """The ids of documents one after the other, each after its start, in parts of any length; raises ValueError
        where a file's way to cut text into words would lose or add some."""
        if not self.merges:
            yield from map(byte_ids, texts)
            return
        pieces = ((not number, piece) for text in texts for number, piece in enumerate(_pieces(text)))
        coding = "latin-1" if self.words is None else "utf-8"
        while batch := list(islice(pieces, BATCH)):
            # every other part is a byte that is no text
            parts = [re.split("([\udc80-\udcff])", piece.decode(coding, "surrogateescape")) for _, piece in batch]
            with named("task.tokenizer"):
                encoded = iter(self._bpe.encode_batch_fast([part for split in parts for part in split[::2]]))
            for (first, piece), split in zip(batch, parts, strict=True):
                ids = [[ord(part) & 0xFF] if turn % 2 else next(encoded).ids for turn, part in enumerate(split)]
                flat = [START] * first + [*chain.from_iterable(ids)]
                if self.decode(flat) != piece:
                    raise ValueError(f"task.tokenizer loses or adds text: it does not spell {show(piece)}")
                yield np.array(flat, self.dtype)

    def decode(self, ids: Iterable[int]) -> bytes:
        """The bytes that ids spell; ids that no merge has made spell nothing."""
        return b"".join(self.spelled[i] for i in ids if i < len(self.spelled))

    def respelled(self, ids_N: np.ndarray) -> np.ndarray:
        """The byte ids (uint16) that ids stand for, one after the other."""
        every = np.frombuffer(bytes(START) + b"\0" + b"".join(self.spelled[START:]), np.uint8).astype(np.uint16)
        every[: START + 1] = np.arange(START + 1)
        count_N = self.counts[ids_N]
        place_N = self.counts.cumsum()[ids_N] - count_N.cumsum()  # in `every`, from the one in the result on
        return every[np.repeat(place_N, count_N) + np.arange(count_N.sum())]


def _pieces(text: bytes) -> Iterator[bytes]:
    return (text[at : at + PIECE] for at in range(0, len(text) or 1, PIECE))


def pipeline(words: Any, **model: Any) -> Any:
    """BPE of the library `tokenizers` on text that is cut by `words`; raises ValueError where that is missing."""
    try:
        import tokenizers
    except ImportError:
        raise ValueError(
            "task.tokenizer needs the package tokenizers: python -m pip install -c constraints.txt -e '.[text]', "
            "or choose task.tokenizer=bytes"
        ) from None
    file = {"added_tokens": [], "pre_tokenizer": words, "model": {"type": "BPE", **model}}
    return tokenizers.Tokenizer.from_str(json.dumps(file))


def train(texts: Iterable[bytes], vocabulary: int) -> list[list[int]]:
    """The merges that give at most `vocabulary` ids, START among them: each joins the most frequent pair of `texts`,
    of those that come twice at least. Raises ValueError if the package `tokenizers` is missing."""
    short = {**WORDS, "pattern": {"Regex": PATTERN.replace("+", f"{{1,{WORD}}}")}}
    empty = pipeline(short, vocab={}, merges=[])
    from tokenizers.trainers import BpeTrainer

    ids = {chr(byte): byte for byte in range(START)}
    limits: dict[str, Any] = {"vocab_size": vocabulary - 1, "min_frequency": 2, "max_token_length": LONGEST}
    trainer = BpeTrainer(initial_alphabet=[*ids], show_progress=False, **limits)
    pieces = (piece.decode("latin-1") for text in texts for piece in _pieces(text))
    empty.train_from_iterator(pieces, trainer)
    return _numbered(json.loads(empty.to_str())["model"]["merges"], ids)


def learned(folders: Collection[Path], vocabulary: int) -> Tokenizer:
    """Merges of the training splits of sources, found once."""
    share = TRAINED // len(folders)

    def parts() -> Iterable[corpus.Part]:
        sample = (text for folder in folders for text in corpus.texts(corpus.read(folder)["train"][:share]))
        yield "tokenizer", json.dumps(train(sample, vocabulary)).encode()

    key = f"{vocabulary} {share} {' '.join(map(corpus.digest, folders))}"
    folder = corpus.prepare("bpe", key, parts(), ["tokenizer.json"])
    return Tokenizer(json.loads((folder / "tokenizer.json").read_bytes()))


def encoded(folder: Path, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """The token ids of a source by split."""
    if not tokenizer.merges:
        return corpus.read(folder)
    parts = ((split, ids) for split, x in corpus.read(folder).items() for ids in tokenizer.encode(corpus.texts(x)))
    key = f"bpe {hashlib.sha256(tokenizer.content.encode()).hexdigest()} of {corpus.digest(folder)}"
    return corpus.read(corpus.prepare("ids", key, parts), tokenizer.dtype)


def _numbered(pairs: Iterable[Any], ids: dict[str, int]) -> list[list[int]]:
    """Merges of texts as those of ids; `ids`: of bytes."""
    merges = []
    for pair in pairs:
        a, b = pair.split(" ") if isinstance(pair, str) else pair
        merges.append([ids[a], ids[b]])
        ids.setdefault(a + b, len(ids) + 1)  # the start has an id, but no text
    return merges


@functools.lru_cache(maxsize=4)
def restored(content: str) -> Tokenizer:
    """The tokenizer of a file that a checkpoint holds; raises ValueError for what is none."""
    with named("a tokenizer of a file"):
        return Tokenizer(**json.loads(content))


def read(path: str) -> Tokenizer:
    """The tokenizer of a file tokenizer.json; raises ValueError for what is none, and for those whose tokens do not
    spell bytes, as of GPT-2, Llama 3 or Qwen."""
    file = home(path)
    with named(f"task.tokenizer={file}"):
        if not file.is_file() or file.stat().st_size > LARGEST:
            raise ValueError(f"this is no file of {LARGEST:,} bytes at most: give a tokenizer.json, or model.base")
        content = json.loads(file.read_bytes())
        try:
            model = content["model"]
            merges = _numbered(model["merges"], {chr(SIGNS.get(byte, byte)): byte for byte in range(START)})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            kind = "give one of byte-level BPE, as of GPT-2, Llama 3, Qwen"
            raise ValueError(f"its tokens do not spell bytes, {one_line(repr(error), 80)}: {kind}") from None
        return Tokenizer(merges, content.get("pre_tokenizer") or {}, bool(model.get("ignore_merges")))
