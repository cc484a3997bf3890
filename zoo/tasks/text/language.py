"""Language modelling of real text: four domains, local files or a set of the hub, as bytes or byte pairs.

Axes: B sequences, T tokens, L bytes of the longest token.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from zoo.config import require_positive
from zoo.tasks.base import Batch, Predict, nats
from zoo.tasks.text import corpus, sources, tokenizer
from zoo.tasks.text.corpus import START, split_documents
from zoo.tasks.text.domains import DOMAINS, origin
from zoo.tasks.text.finite import Pick
from zoo.tasks.text.ngram import Trigram
from zoo.tasks.text.prepared import CorpusTask
from zoo.tasks.text.tokenizer import Tokenizer

TRAINED = 10_000_000  # bytes that merges are learned from, an equal share from each domain
COUNTED = (
    1 << 25
)  # ids of each training split that the baselines are counted on: all of a domain, a part of a large set


@dataclass(frozen=True)
class TextConfig:
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


def domain_ids(domains: Sequence[str]) -> list[dict[str, np.ndarray]]:
    """Byte ids of each domain by split; raises ValueError where a domain's package is missing."""
    return [corpus.read(folder) for folder in domain_folders(domains).values()]


def domain_folders(domains: Sequence[str]) -> dict[str, Path]:
    """Where the byte ids of domains lie, with what their text depends on."""
    return {
        f"{domain} ({origin(domain)})": corpus.prepare(domain, origin(domain), functools.partial(_domain_parts, domain))
        for domain in domains
    }


def _domain_parts(domain: str) -> Iterable[corpus.Part]:
    return split_documents(domain, DOMAINS[domain]())


class Text(CorpusTask):
    """Next-token prediction in bits per byte, on average and by domain, beside one byte trigram for all domains.

    A domain gives blocks of T+1 ids that overlap by one. The start of the next document is learned as the end of the
    one before, but bits per byte are of bytes alone.
    """

    Config = TextConfig
    main_metric = "bits_per_byte"

    def __init__(self, options: dict[str, Any], seed: int):
        super().__init__(options, seed)
        config = self.config
        require_positive("task", tokens=config.tokens)
        self._resolve()
        self.tokens, self.domains = config.tokens, config.domains or ()
        self.vocabulary = self.output_dim = config.vocabulary or START + 1

    def _resolve(self) -> None:
        """Writes open defaults down; raises ValueError for options that do not fit each other."""
        config = self.config
        options = {name: getattr(config, name) for name in ("domains", "files", "hub")}
        given = [f"task.{name}={_plain(value)}" for name, value in options.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other: text has one source")
        if not given:
            object.__setattr__(config, "domains", tuple(DOMAINS))
        if config.domains is not None and (not config.domains or len(set(config.domains)) < len(config.domains)):
            raise ValueError(f"task.domains={list(config.domains)} must be different names out of {list(DOMAINS)}")
        if config.files is not None and not config.files:
            raise ValueError("task.files=[] must name files or globs")
        for option, needs in (("subset", ["hub"]), ("documents", ["hub"]), ("column", ["hub", "files"])):
            if getattr(config, option) is not None and all(getattr(config, need) is None for need in needs):
                needed = " or ".join(f"task.{need}" for need in needs)
                raise ValueError(f"task.{option}={getattr(config, option)} needs {needed}")
        if config.documents is not None:
            require_positive("task", documents=config.documents)
        if config.domains is None and config.column is None:
            object.__setattr__(config, "column", "text")
        if config.tokenizer == "bytes" and config.vocabulary is not None:
            raise ValueError(f"task.vocabulary={config.vocabulary} needs task.tokenizer=bpe, not bytes")
        if config.tokenizer == "bpe":
            vocabulary = 1024 if config.vocabulary is None else config.vocabulary
            if not START + 1 < vocabulary <= 1 << 16:
                raise ValueError(f"task.vocabulary={vocabulary} must lie between {START + 2} and {1 << 16}")
            object.__setattr__(config, "vocabulary", vocabulary)

    @property
    def _kinds(self) -> Sequence[str]:
        return self.config.domains or ["files" if self.config.files is not None else "hub"]

    def _prepared(self) -> dict[str, Path]:
        """Where the byte ids of each domain, or of the only other source, lie."""
        config = self.config
        if config.files is not None:
            files = sources.find(config.files)
            key, label = f"{config.column} {sources.fingerprint(files)}", sources.listed(files)
            parts = functools.partial(split_documents, "files", sources.read_files(files, config.column))
            return {label: corpus.prepare("files", key, parts, label=label)}
        if config.hub is not None:
            options = (config.hub, config.subset, config.column, config.documents)
            key, label = sources.hub_origin(*options), f"task.hub={config.hub}"
            return {label: corpus.prepare("hub", key, functools.partial(sources.read_hub, *options), label=label)}
        return domain_folders(self.domains)

    @functools.cached_property
    def texts(self) -> list[dict[str, np.ndarray]]:
        """Byte ids of each domain, or of the only other source, by split."""
        return [corpus.read(folder) for folder in self._folders]

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """Trained on the training splits, once; a checkpoint brings its own."""
        if self.config.tokenizer == "bytes":
            return Tokenizer()
        share = TRAINED // len(self.texts)

        def parts() -> Iterable[corpus.Part]:
            sample = (text for splits in self.texts for text in corpus.texts(splits["train"][:share]))
            merges = tokenizer.train(sample, self.config.vocabulary)
            yield "tokenizer", json.dumps(merges).encode()

        key = f"{self.config.vocabulary} {share} {' '.join(map(corpus.digest, self._folders))}"
        folder = corpus.prepare("bpe", key, parts, ["tokenizer"], ".json")
        return Tokenizer(json.loads((folder / "tokenizer.json").read_bytes()))

    @functools.cached_property
    def ids(self) -> list[dict[str, np.ndarray]]:
        """Token ids of each domain, or of the only other source, by split."""
        ids = self.texts
        if self.tokenizer.merges:
            ids = [corpus.read(self._encoded(folder)) for folder in self._folders]
        shortest = min(len(split) for splits in ids for split in splits.values())
        if self.tokens >= shortest:
            raise ValueError(f"task.tokens={self.tokens} must be below {shortest}, the tokens of the shortest split")
        return ids

    def _encoded(self, folder: Path) -> Path:
        def parts() -> Iterable[corpus.Part]:
            for split, ids in corpus.read(folder).items():
                yield from ((split, part) for part in self.tokenizer.encode(corpus.texts(ids)))

        return corpus.prepare("ids", f"bpe {self.tokenizer.digest} of {corpus.digest(folder)}", parts)

    def prepare(self) -> None:
        _ = self.ids

    def state_dict(self) -> dict[str, Any]:
        merges = {"merges": self.tokenizer.merges} if self.config.tokenizer == "bpe" else {}
        return merges | super().state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a tokenizer; raises ValueError if it is broken, or not one for these options."""
        expected = {"merges"} if self.config.tokenizer == "bpe" else set()
        state = dict(state)
        super().load_state_dict({"corpus": state.pop("corpus")} if "corpus" in state else {})
        if set(state) != expected:
            names = [", ".join(map(str, keys)) or "nothing" for keys in (expected, state)]
            raise ValueError(f"task.tokenizer={self.config.tokenizer} restores {names[0]}, got {names[1]}")
        restored = Tokenizer(state.get("merges", ()))
        if len(restored.spelled) > self.output_dim:
            raise ValueError(f"a tokenizer of {len(restored.spelled)} ids exceeds task.vocabulary={self.output_dim}")
        if "tokenizer" in self.__dict__ and self.tokenizer.merges == restored.merges:
            return
        for name in ("ids", "_lengths"):  # made with another tokenizer
            self.__dict__.pop(name, None)
        self.tokenizer = restored

    def encode(self, text: str) -> list[int]:
        """The ids of a document, its start first."""
        return np.concatenate(list(self.tokenizer.encode([text.encode()]))).tolist()

    def decode(self, ids: Iterable[int]) -> bytes:
        """The bytes that ids stand for; starts of documents have none."""
        return self.tokenizer.decode(ids)

    def sizes(self, split: str) -> list[int]:
        return [(len(splits[split]) - 1) // self.tokens for splits in self.ids]

    def rows(self, split: str, picks: list[Pick]) -> Batch:
        rows = np.empty((len(picks), self.tokens + 1), np.int64)
        for row, (source, order, place) in zip(rows, picks, strict=True):
            start = order[place] * self.tokens
            row[:] = self.ids[source][split][start : start + self.tokens + 1]
        window = torch.from_numpy(rows)
        return Batch(window[:, :-1], window[:, 1:], 0, group=torch.tensor([pick.source for pick in picks]))

    def token_losses(self, output: Tensor, batch: Batch) -> Tensor:
        """Nats of each token, ends of documents among them."""
        return nats(output, batch.targets)

    def baselines(self) -> dict[str, float]:
        counts = np.stack([np.bincount(s["train"][:COUNTED], minlength=self.output_dim) for s in self.ids])
        p = (counts / counts.sum(1, keepdims=True)).mean(0)
        unit = "token" if self.tokenizer.merges else "byte"
        return {f"best fixed {unit} distribution": float(-(p[p > 0] * np.log(p[p > 0])).sum())}

    @functools.cached_property
    def trigram(self) -> Trigram:
        """Counted over the bytes of the training splits of all domains."""
        return Trigram(splits["train"][:COUNTED] for splits in self.texts)

    @functools.cached_property
    def _lengths(self) -> Tensor:
        """(V) bytes of each id."""
        lengths = torch.zeros(self.output_dim, dtype=torch.long)
        lengths[: len(self.tokenizer.spelled)] = torch.tensor([len(token) for token in self.tokenizer.spelled])
        return lengths

    def evaluate(self, predict: Predict, batch: Batch) -> dict[str, Tensor]:
        """Bits of each byte, of the model and of the trigram, for all domains and for each one. The bits of a token are
        spread evenly over its bytes, so that means over bytes are bits per byte whatever the tokens are."""
        assert batch.group is not None
        lengths = self._lengths.to(batch.targets.device)[batch.targets].flatten()  # 0 of a start
        each = (self.token_losses(predict(batch.tokens, 0), batch).flatten() / lengths).repeat_interleave(lengths)
        bits = {
            "bits_per_byte": each / math.log(2),
            "bits_per_byte_trigram": self._trigram_bits(batch).to(each.device),
        }
        group = batch.group[:, None].expand_as(batch.targets).flatten().repeat_interleave(lengths)
        parts = {
            f"{name}_{domain}": values[group == index]
            for index, domain in enumerate(self.domains)
            for name, values in bits.items()
        }
        return bits | parts

    def _trigram_bits(self, batch: Batch) -> Tensor:
        """What the trigram needs for each byte of the targets, having read the same sequence as the model."""
        windows = torch.cat([batch.tokens[:, :1], batch.targets], 1).cpu().numpy()
        bytes_BTL = self.tokenizer.table[windows].astype(np.int64)
        predicted = (bytes_BTL >= 0) & (bytes_BTL != START)
        predicted[:, 0] = False
        # one stream of all sequences, a start before each: starts hide what was before
        before = np.full((len(windows), 1), START), np.zeros((len(windows), 1), bool)
        stream, wanted = (
            np.concatenate([first, part.reshape(len(windows), -1)], 1)
            for first, part in zip(before, (bytes_BTL, predicted), strict=True)
        )
        kept = stream >= 0
        stream, wanted = stream[kept], wanted[kept]
        bits = self.trigram.bits(stream[None, :-1], stream[None, 1:].clip(max=START - 1))[0]
        return torch.from_numpy(bits[wanted[1:]]).float()


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
