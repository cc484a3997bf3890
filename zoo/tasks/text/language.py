"""Language modelling of real text: four domains, local files or a set of the hub, as bytes or byte pairs."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from zoo.config import did_you_mean, plain, show
from zoo.tasks.base import TaskConfig
from zoo.tasks.text import corpus, sources, tokenizer
from zoo.tasks.text.base import TextTask
from zoo.tasks.text.corpus import START
from zoo.tasks.text.domains import DOMAINS
from zoo.tasks.text.sources import KINDS
from zoo.tasks.text.tokenizer import MOST, encoded

COUNTED = 1 << 25  # ids of each training split that baselines are counted on: all of a domain, a part of a large set


@dataclass(frozen=True)
class SourceConfig(TaskConfig):
    """Text out of `domains`, or out of local `files`; tokenizer: bytes, bpe, learned from the training split, or a file
    tokenizer.json; vocabulary: how many ids, null: 1024 of bpe, of a file all."""

    domains: tuple[Literal["code", "medicine", "law", "speeches"], ...] | None = None
    files: tuple[str, ...] | None = None
    tokenizer: str = "bytes"
    vocabulary: int | None = None

    def resolve(self) -> Self:
        places = {name: getattr(self, name, None) for name in ("domains", "files", "hub")}
        given = {name: plain(value) for name, value in places.items() if value is not None}
        if len(given) > 1:
            named = " and ".join(f"task.{name}={show(value)}" for name, value in given.items())
            raise ValueError(f"{named} exclude each other: text has one source")
        for name, value in given.items():
            if isinstance(value, list) and (not value or len(set(value)) < len(value)):
                known = f"the domains are {', '.join(DOMAINS)}"
                raise ValueError(f"task.{name}={show(value)} must name something, nothing twice; {known}")
        config = self if given else replace(self, domains=tuple(DOMAINS))  # type: ignore[arg-type]
        return replace(super(SourceConfig, config).resolve(), vocabulary=self._ids())

    def _ids(self) -> int | None:
        kind, count = self.tokenizer, self.vocabulary
        if kind not in KINDS and not kind.endswith(".json"):
            raise ValueError(f"task.tokenizer {show(kind)} does not exist{did_you_mean(kind, [*KINDS, 'FILE.json'])}")
        if kind == "bytes" and count is not None:
            raise ValueError(f"task.vocabulary={count} needs task.tokenizer=bpe, or a file")
        if kind != "bytes" and count is None:
            count = 1024 if kind == "bpe" else len(tokenizer.read(kind).spelled)
        if count is not None and not START + 1 < count <= MOST:
            raise ValueError(f"task.vocabulary={count} must lie between {START + 2} and {MOST}")
        return count


@dataclass(frozen=True)
class TextConfig(SourceConfig):
    """Sequences of `tokens` tokens out of one of `domains` each, or out of `files`, or out of the set `hub`.

    subset, documents: a configuration of the set, and how many documents of each of its splits; column: of tables and
    sets."""

    name: str = "text"
    tokens: int = 128
    hub: str | None = None
    subset: str | None = None
    documents: int | None = None
    column: str | None = None

    def resolve(self) -> Self:
        config = super().resolve()
        for option, needs, given in (
            ("subset", "task.hub", config.hub),
            ("documents", "task.hub", config.hub),
            ("column", "task.hub or task.files", config.hub or config.files),
        ):
            if getattr(config, option) is not None and not given:
                raise ValueError(f"task.{option}={getattr(config, option)} needs {needs}")
        return config if config.domains else replace(config, column=config.column or "text")


class Text(TextTask):
    """Next-token prediction in bits per byte.

    A source gives blocks of T+1 ids that overlap by one. The start of the next document is learned as the end of the
    one before, but bits per byte are of bytes alone."""

    Config = TextConfig

    def __init__(self, options: dict[str, Any], seed: int):
        super().__init__(options, seed)
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
    def ids(self) -> list[dict[str, np.ndarray]]:
        """Token ids of each source by split."""
        ids = [encoded(folder, self.tokenizer) for folder in self.folders.values()]
        shortest = min(len(split) for splits in ids for split in splits.values())
        if self.tokens >= shortest:
            raise ValueError(f"task.tokens={self.tokens} must be below {shortest}, the tokens of the shortest split")
        return ids

    def sizes(self, split: str) -> list[int]:
        return [(len(splits[split]) - 1) // self.tokens for splits in self.ids]

    def sequence(self, split: str, source: int, order: np.ndarray, place: int) -> tuple[np.ndarray, ...]:
        start = order[place] * self.tokens
        window = self.ids[source][split][start : start + self.tokens + 1]
        return window[:-1], window[1:]

    def train_bytes(self) -> Iterable[np.ndarray]:
        return (corpus.read(folder)["train"][:COUNTED] for folder in self.folders.values())

    def train_targets(self) -> Iterable[np.ndarray]:
        return (splits["train"][:COUNTED] for splits in self.ids)
