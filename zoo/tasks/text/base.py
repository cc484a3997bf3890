"""The common part of tasks on text: where it lies, what its tokens are, their order, and how many bits a byte takes.

Axes: B sequences, T tokens, Q of them after the context, V ids, N sequences of a split, or ids in a row, D sources.
"""

from __future__ import annotations

import functools
import math
import warnings
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.config import show
from zoo.files import home
from zoo.tasks.base import SPLITS, Batch, Predict, Task
from zoo.tasks.text import corpus, domains, sources, tokenizer
from zoo.tasks.text.corpus import START
from zoo.tasks.text.ngram import Trigram
from zoo.tasks.text.tokenizer import Tokenizer, learned

ADVICE = (
    "bring that text back, name where it lies now (resume=… task.files=[…]), or let ZOO_CACHE name a folder that holds "
    "it as it was prepared"
)


def _changed(folders: dict[str, Path], digests: Sequence[str]) -> str:
    """One line on folders that hold other text than the `digests` of a checkpoint say, "" where none does."""
    pairs = zip(folders.items(), digests, strict=False)
    changed = "; ".join(name for (name, folder), digest in pairs if corpus.digest(folder) != digest)
    return changed and f"the checkpoint was trained on other text than is found now for {changed}"


@functools.lru_cache(maxsize=16)
def _order(size: int, seed: int, split: str, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, SPLITS[split], epoch]).permutation(size)


class TextTask(Task):
    """Finitely many sequences of text out of D sources, the domains or one other, and predictions in bits per byte.

    Sequence j of a split comes from source j mod D, which gives all its own in a new order every epoch; held-out ones
    always in the same. The text lies in the cache: a checkpoint says which text that is, and no run goes on with other.
    """

    main_metric = "bits_per_byte"
    labels: ClassVar = {
        "bits_per_byte": "test bits per byte",
        "bits_per_byte_without_context": "  with its context removed",
        "bits_per_byte_wrong_context": "  with another document's context",
        "bits_per_byte_trigram": "  of a byte trigram",
    }
    lr, muon_lr = 0.012, 0.02
    has_text = True

    vocabulary = output_dim = START + 1
    sources: tuple[str, ...]
    """Their names in the cache."""
    digests: list[str] | None = None
    """Of the folders in use, or to be used."""

    # where the text lies

    @abstractmethod
    def prepare_source(self) -> dict[str, Path]:
        """The folder of the only source that is no domain, with its name for messages; made if need be."""

    @functools.cached_property
    def folders(self) -> dict[str, Path]:
        """Where each source lies, by its name for messages; what a checkpoint names by its digest is taken first."""
        then = self.digests or []
        kept = {source: corpus.find(source, digest) for source, digest in zip(self.sources, then, strict=False)}
        if kept and all(kept.values()):
            return kept  # type: ignore[return-value]
        try:
            prepared = domains.prepare(self.sources) if self.config.domains else self.prepare_source()
        except ValueError as error:
            raise ValueError(f"{error}; {ADVICE}") if self.digests else error from None
        if changed := _changed(prepared, then):
            warnings.warn(changed, stacklevel=2)
        self.digests = list(map(corpus.digest, prepared.values()))
        return prepared

    def prepare(self) -> None:
        self.sizes("train")

    def origin(self) -> str:
        config = self.config
        if config.domains:
            return "; ".join(
                f"{name}: {domains.origin(name).partition(' in ')[0]}, {domains.LICENCES[name]}"
                for name in config.domains
            )
        given = {name: value for name, value in vars(config).items() if name in ("files", "hub") and value}
        return f"{show(given)}: whoever chose them knows their licence."

    def state_dict(self) -> dict[str, Any]:
        kind, used = self.config.tokenizer, self.tokenizer
        kept = {"bytes": {}, "bpe": {"merges": used.merges}}.get(kind, {"tokenizer": used.content})
        return kept if self.digests is None else {**kept, "corpus": self.digests}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over which text and tokenizer to use; raises ValueError if they are broken, or not those in use."""
        state, kind = dict(state), self.config.tokenizer
        if kind == "bpe":
            self._take(Tokenizer(state.pop("merges", None)))
        elif kind != "bytes":
            self._take(tokenizer.restored(str(state.pop("tokenizer", ""))))
        super().load_state_dict({key: value for key, value in state.items() if key != "corpus"})
        if "corpus" not in state:  # older checkpoints do not say
            return
        digests = state["corpus"]
        if not isinstance(digests, list) or list(map(type, digests)) != [str] * len(self.sources):
            raise ValueError(f"the corpus of this task is a list of hashes of {self.sources}, got {show(digests)}")
        if "folders" in self.__dict__ and (changed := _changed(self.folders, digests)):
            raise ValueError(f"{changed}; {ADVICE}")
        self.digests = digests

    # in which order it comes

    @abstractmethod
    def sizes(self, split: str) -> list[int]:
        """How many sequences each source has."""

    @abstractmethod
    def sequence(self, split: str, source: int, order: np.ndarray, place: int) -> tuple[np.ndarray, ...]:
        """Tokens (T), targets (Q) and, with a context, a wrong one (C), of what is at a place in a source's order."""

    def batch(self, split: str, k: int, size: int) -> Batch:
        return self.at(split, k * size + np.arange(size))

    def at(self, split: str, index_N: np.ndarray) -> Batch:
        sizes, rows, sources = self.sizes(split), [], []
        for j in index_N.tolist():
            turn, source = divmod(j, len(sizes))
            epoch, place = divmod(turn, sizes[source])
            key = (self.seed, split, epoch) if split == "train" else (0, split, 0)
            rows.append(self.sequence(split, source, _order(sizes[source], *key), place))
            sources.append(source)
        flat = (torch.from_numpy(np.concatenate(part, dtype=np.int64)) for part in zip(*rows, strict=True))
        tokens, targets, *wrong = (part.view(len(rows), -1) for part in flat)
        return Batch(tokens, targets, self.n_context, wrong[0] if wrong else None, torch.tensor(sources))

    def once(self, split: str, draws: int) -> np.ndarray:
        sizes = np.array(self.sizes(split))
        turn_N, source_N = np.divmod(np.arange(min(draws, len(sizes) * sizes.max())), len(sizes))
        return np.flatnonzero(turn_N < sizes[source_N])

    # tokens

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """Bytes, or what is learned or read at the first use; a checkpoint brings its own."""
        kind, vocabulary = self.config.tokenizer, self.config.vocabulary
        if kind == "bytes":
            return Tokenizer()
        return self._fits(learned(self.folders.values(), vocabulary) if kind == "bpe" else tokenizer.read(kind))

    def _fits(self, found: Tokenizer) -> Tokenizer:
        if (size := len(found.spelled)) > self.vocabulary:
            raise ValueError(f"a tokenizer of {size} ids exceeds task.vocabulary={self.vocabulary}")
        return found

    def _take(self, restored: Tokenizer) -> None:
        """Goes on with the tokenizer of a checkpoint."""
        path = self.config.tokenizer
        # with text in use a run goes on; a model that is loaded looks for no file
        looks = "folders" in self.__dict__ and path not in sources.KINDS and home(path).is_file()
        if looks and tokenizer.read(path).content != restored.content:
            advice = "bring that file back, or take this one away: the checkpoint holds its own"
            raise ValueError(f"task.tokenizer={path} is another one than the checkpoint was trained with; {advice}")
        self.tokenizer = self._fits(restored)
        for name in ("ids", "examples"):  # made with another tokenizer, maybe
            self.__dict__.pop(name, None)

    def encode(self, text: str) -> list[int]:
        return np.concatenate(list(self.tokenizer.encode([text.encode()]))).tolist()

    def decode(self, ids: Iterable[int]) -> bytes:
        return self.tokenizer.decode(ids)

    # what is measured

    @abstractmethod
    def train_bytes(self) -> Iterable[np.ndarray]:
        """The byte ids of training splits that the trigram is counted on."""

    @abstractmethod
    def train_targets(self) -> Iterable[np.ndarray]:
        """The targets of each source in training, or many of them."""

    @functools.cached_property
    def trigram(self) -> Trigram:
        """One for all sources."""
        return Trigram(self.train_bytes())

    def baselines(self) -> dict[str, float]:
        counts = np.stack([np.bincount(ids, minlength=self.output_dim) for ids in self.train_targets()])
        p = (counts / counts.sum(1, keepdims=True)).mean(0)
        unit = "token" if self.tokenizer.merges else "byte"
        return {f"best fixed {unit} distribution": float(-(p[p > 0] * np.log(p[p > 0])).sum())}

    def _lengths(self, batch: Batch) -> Tensor:
        """How many bytes each target stands for, (B,Q); 0 of a start and of what is not scored."""
        targets = batch.targets.where(self.scored(batch), START)
        return self.tokenizer.lengths.to(targets.device)[targets]

    def rows(self, batch: Batch) -> Tensor:
        return super().rows(batch).repeat_interleave(self._lengths(batch).flatten())

    def evaluate(self, predict: Predict, batch: Batch) -> dict[str, Tensor]:
        """Bits of each byte, of the model and of the trigram, for all sources and by domain. The bits of a token are
        spread evenly over its bytes, so that means over bytes are bits per byte whatever the tokens are."""
        assert batch.group is not None
        targets, lengths_BQ = batch.targets, self._lengths(batch)
        lengths = lengths_BQ.flatten()
        bits = {
            name: (losses.flatten() / lengths).repeat_interleave(lengths) / math.log(2)
            for name, losses in self.errors(predict, batch).items()
        }
        bits["bits_per_byte_trigram"] = self._trigram_bits(batch, lengths_BQ > 0).to(targets.device)
        group = batch.group[:, None].expand_as(targets).flatten().repeat_interleave(lengths)
        parts = {
            f"{name}_{domain}": values[group == index]
            for index, domain in enumerate(self.config.domains or ())
            for name, values in bits.items()
        }
        return bits | parts

    def _trigram_bits(self, batch: Batch, scored_BQ: Tensor) -> Tensor:
        """Bits that the trigram needs for each scored byte, having read the same queries as the model."""
        windows_BT = torch.cat([batch.tokens[:, batch.n_context :], batch.targets[:, -1:]], 1)
        windows_BT = F.pad(windows_BT, (1, 0), value=START)  # one stream of all sequences: starts hide what was before
        ids_N = windows_BT.where(windows_BT >= 0, START).flatten().cpu().numpy()
        wanted = np.repeat(F.pad(scored_BQ, (2, 0)).flatten().cpu().numpy(), self.tokenizer.counts[ids_N])
        return torch.from_numpy(self.trigram.bits(self.tokenizer.respelled(ids_N))[wanted]).float()
