"""Tasks whose data lies in the cache: a checkpoint says which data that is, and no run goes on with other data."""

from __future__ import annotations

import functools
import re
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoo.config import show
from zoo.tasks.text import corpus
from zoo.tasks.text.finite import FiniteTask

ADVICE = (
    "bring that text back, name where it lies now (resume=… task.files=[…]), or let ZOO_CACHE name a folder that holds "
    "it as it was prepared"
)


class CorpusTask(FiniteTask):
    """A task on folders of the cache. Those that a checkpoint names by their digests are taken before all others."""

    digests: list[str] | None = None
    """Of the folders in use, or to be used."""
    _names: tuple[str, ...] = ("this task",)

    @property
    @abstractmethod
    def _kinds(self) -> Sequence[str]:
        """The names that corpus.prepare gives the folders of the options' data, one for each."""

    @abstractmethod
    def _prepared(self) -> dict[str, Path]:
        """The folders of the data that the options name, each with its name for messages; made if need be."""

    @functools.cached_property
    def _folders(self) -> list[Path]:
        kept = [corpus.find(kind, digest) for kind, digest in zip(self._kinds, self.digests or (), strict=False)]
        if kept and all(kept):
            return kept  # type: ignore[return-value]
        try:
            prepared = self._prepared()
        except ValueError as error:
            raise ValueError(f"{error}; {ADVICE}") if self.digests else error from None
        before, self.digests = self.digests, list(map(corpus.digest, prepared.values()))
        self._names = tuple(prepared)
        if changed := self._changed(before):
            warnings.warn(changed, stacklevel=2)
        return list(prepared.values())

    def _changed(self, before: list[str] | None) -> str:
        """What differs from the data of a checkpoint, if anything."""
        if before is None or before == self.digests:
            return ""
        pairs = zip(self._names, self.digests or (), before, strict=False)
        changed = [name for name, now, then in pairs if now != then] or self._names
        return f"the checkpoint was trained on other text than is found now for {'; '.join(changed)}"

    def state_dict(self) -> dict[str, Any]:
        return {} if self.digests is None else {"corpus": self.digests}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over which data to use; raises ValueError if it is not the data in use."""
        super().load_state_dict({key: value for key, value in state.items() if key != "corpus"})
        if "corpus" not in state:  # older checkpoints do not say
            return
        digests = state["corpus"]
        known = isinstance(digests, list) and len(digests) == len(self._kinds)
        if not known or not all(isinstance(item, str) and re.fullmatch("[0-9a-f]{64}", item) for item in digests):
            raise ValueError(f"the corpus of this task is a list of hashes of {self._kinds}, got {show(digests)}")
        if "_folders" in self.__dict__ and (changed := self._changed(digests)):
            raise ValueError(f"{changed}; {ADVICE}")
        self.digests = digests
