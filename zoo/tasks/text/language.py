"""Language modelling of real text: four domains, local files or a set of the hub, as bytes or byte pairs."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from zoo.tasks.base import TaskConfig
from zoo.tasks.text import corpus, sources, tokenizer
from zoo.tasks.text.base import TextTask, one_source
from zoo.tasks.text.corpus import START
from zoo.tasks.text.tokenizer import MOST, Tokenizer

TRAINED = 10_000_000  # bytes that merges are learned from, an equal share from each domain
COUNTED = 1 << 25  # ids of each training split that baselines are counted on: all of a domain, a part of a large set


@dataclass(frozen=True)
class TextConfig(TaskConfig):
    """Sequences of `tokens` tokens out of one of `domains` each, or out of local `files`, or out of the set `hub`.

    subset, documents: a configuration of the set, and how many documents of each of its splits; column: of tables and
    sets; tokenizer: bytes, or bpe with `vocabulary` ids in all.
    """

    name: str = "text"
    tokens: int = 128
    domains: tuple[Literal["code", "medicine", "law", "speeches"], ...] | None = None
    files: tuple[str, ...] | None = None
    hub: str | None = None
    subset: str | None = None
    documents: int | None = None
    column: str | None = None
    tokenizer: Literal["bytes", "bpe"] = "bytes"
    vocabulary: int | None = None

    def resolve(self) -> Self:
        config = one_source(super().resolve(), "domains", "files", "hub")
        for option, needs, given in (
            ("subset", "task.hub", config.hub),
            ("documents", "task.hub", config.hub),
            ("column", "task.hub or task.files", config.hub or config.files),
            ("vocabulary", "task.tokenizer=bpe", config.tokenizer == "bpe"),
        ):
            if getattr(config, option) is not None and not given:
                raise ValueError(f"task.{option}={getattr(config, option)} needs {needs}")
        if config.domains is None:
            config = replace(config, column=config.column or "text")
        if config.tokenizer == "bytes":
            return config
        vocabulary = config.vocabulary or 1024
        if not START + 1 < vocabulary <= MOST:
            raise ValueError(f"task.vocabulary={vocabulary} must lie between {START + 2} and {MOST}")
        return replace(config, vocabulary=vocabulary)


class Text(TextTask):
    """Next-token prediction in bits per byte.

    A source gives blocks of T+1 ids that overlap by one. The start of the next document is learned as the end of the
    one before, but bits per byte are of bytes alone.
    """

    Config = TextConfig

    def __init__(self, options: dict[str, Any], seed: int):
        super().__init__(options, seed)
        self.tokens = self.config.tokens
        self.vocabulary = self.output_dim = self.config.vocabulary or START + 1
        self.sources = self.config.domains or ("hub" if self.config.files is None else "files",)

    def prepare_source(self) -> dict[str, Path]:
        config = self.config
        if config.files is not None:
            files = sources.find(config.files)
            key, label = f"{config.column} {sources.fingerprint(files)}", f"task.files: {', '.join(config.files)}"
            parts = corpus.split_documents("files", sources.read_files(files, config.column))
        else:
            options = (config.hub, config.subset, config.column, config.documents)
            key, label, parts = sources.hub_origin(*options), f"task.hub={config.hub}", sources.read_hub(*options)
        return {label: corpus.prepare(self.sources[0], key, parts, label=label)}

    @functools.cached_property
    def texts(self) -> list[dict[str, np.ndarray]]:
        """Byte ids of each source by split."""
        return [corpus.read(folder) for folder in self.folders.values()]

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """Trained on the training splits, once; a checkpoint brings its own."""
        if self.config.tokenizer == "bytes":
            return Tokenizer()
        share = TRAINED // len(self.texts)

        def parts() -> Iterable[corpus.Part]:
            sample = (text for splits in self.texts for text in corpus.texts(splits["train"][:share]))
            yield "tokenizer", json.dumps(tokenizer.train(sample, self.vocabulary)).encode()

        key = f"{self.vocabulary} {share} {' '.join(map(corpus.digest, self.folders.values()))}"
        folder = corpus.prepare("bpe", key, parts(), ["tokenizer.json"])
        return Tokenizer(json.loads((folder / "tokenizer.json").read_bytes()))

    @functools.cached_property
    def ids(self) -> list[dict[str, np.ndarray]]:
        """Token ids of each source by split."""
        ids = [self._encoded(folder) for folder in self.folders.values()] if self.tokenizer.merges else self.texts
        shortest = min(len(split) for splits in ids for split in splits.values())
        if self.tokens >= shortest:
            raise ValueError(f"task.tokens={self.tokens} must be below {shortest}, the tokens of the shortest split")
        return ids

    def _encoded(self, folder: Path) -> dict[str, np.ndarray]:
        encoded = (
            (split, part)
            for split, ids in corpus.read(folder).items()
            for part in self.tokenizer.encode(corpus.texts(ids))
        )
        merges = hashlib.sha256(json.dumps(self.tokenizer.merges).encode()).hexdigest()
        key = f"bpe {merges} of {corpus.digest(folder)}"
        return corpus.read(corpus.prepare("ids", key, encoded))

    def state_dict(self) -> dict[str, Any]:
        merges = {"merges": self.tokenizer.merges} if self.config.tokenizer == "bpe" else {}
        return merges | super().state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a tokenizer, too; raises ValueError if it is broken, or not one for these options."""
        if self.config.tokenizer == "bpe":
            state = dict(state)
            restored = Tokenizer(state.pop("merges", None))
            if (size := len(restored.spelled)) > self.vocabulary:
                raise ValueError(f"a tokenizer of {size} ids exceeds task.vocabulary={self.vocabulary}")
            self.tokenizer = restored
            self.__dict__.pop("ids", None)  # made with another tokenizer, maybe
        super().load_state_dict(state)

    def sizes(self, split: str) -> list[int]:
        return [(len(splits[split]) - 1) // self.tokens for splits in self.ids]

    def sequence(self, split: str, source: int, order: np.ndarray, place: int) -> tuple[np.ndarray, ...]:
        start = order[place] * self.tokens
        window = self.ids[source][split][start : start + self.tokens + 1]
        return window[:-1], window[1:]

    def train_bytes(self) -> Iterable[np.ndarray]:
        return (splits["train"][:COUNTED] for splits in self.texts)

    def train_targets(self) -> Iterable[np.ndarray]:
        return (splits["train"][:COUNTED] for splits in self.ids)
