"""Systems: runs that differ in their seed alone, by labels that say what sets them apart, and their differences.

Axes: S seeds, N sequences of a test.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np

from zoo.compare.runs import Run
from zoo.compare.statistics import ENOUGH, Estimate, estimate, weighted
from zoo.config import flat, show

ELSEWHERE = {"seed", "out", "resume", "logger", "trainer", "placement", "task", "log_every", "budget", "budget_of"}
"""Options of a run that do not say which system it is: that of the task is the same for all."""
BODY = {f"model.{name}" for name in ("dim", "layers", "heads", "kv_heads", "tied")}  # of every family
FOLLOWS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("model.balance_weight", "model.z_weight"), ("model.router",)),
    **{"optim.warmup": ("optim.steps",), "optim.decay": ("optim.steps", "optim.schedule")},
    "optim.muon_lr": ("optim.name",),
}
"""Options whose defaults are made of others: where these tell them, no label does."""
BUDGETS = ("steps", "tokens", "precision", "accelerator", "devices", "seed")  # alike in a fair comparison, or said


@dataclass(frozen=True)
class System:
    """Runs of one configuration, in the order of their seeds."""

    label: str
    runs: list[Run]

    @property
    def schedule(self) -> str:
        """Of the learning rate."""
        name = str(flat(self.runs[0].metrics["config"]).get("optim.schedule"))
        return name if name.isalnum() else "unknown"

    def number(self, name: str) -> float:
        """The mean over runs of a number of metrics.json, nan where one run does not say it."""
        return float(np.mean([run.number(name) for run in self.runs]))

    def error(self) -> Estimate:
        """The main metric over seeds and sequences."""
        return estimate(values(self.runs))

    def metric(self, name: str) -> Estimate | None:
        """A metric of the test over seeds, None where one run does not have it."""
        found = [run.metrics["test"].get(name) for run in self.runs]
        return None if None in found else estimate(np.array(found, np.float64)[:, None])


class Difference(NamedTuple):
    """`first` minus `second` in the main metric, paired by seed and sequence, over the `seeds` that both have; wins:
    those in which the first is better."""

    first: str
    second: str
    size: Estimate
    seeds: int
    wins: int

    @property
    def verdict(self) -> str:
        """Which is better, in words; "tied" where 0 lies inside the interval."""
        if self.size.low is None or self.size.high is None:
            return f"fewer than {ENOUGH} common seeds" if self.seeds else "no common seed"
        tied = self.size.low <= 0 <= self.size.high
        return "tied" if tied else f"{self.first if self.size.mean < 0 else self.second} is better"


def values(runs: list[Run], others: list[Run] | None = None) -> np.ndarray:
    """The errors of runs (S,N), minus those of `others` of the same seeds; (S,1), those of whole tests, where a run did
    not keep those of sequences. Raises ValueError where the runs of a seed had other sequences."""
    for a, b in zip(runs, others or [], strict=False):
        if a.weight_N is not None and b.weight_N is not None and not np.array_equal(a.weight_N, b.weight_N):
            counts = " and ".join(f"{len(w)} sequences of {w.sum():.0f} predictions" for w in (a.weight_N, b.weight_N))
            raise ValueError(f"{a.folder} and {b.folder} had different tests, {counts}: test one of them again")
    S, every = len(runs), [*runs, *(others or [])]
    errors = [run.errors_N for run in every if run.errors_N is not None]
    weights = [run.weight_N for run in runs if run.weight_N is not None]
    if len(errors) < len(every) or len({*map(len, errors)}) > 1:
        errors, weights = [np.array([run.error]) for run in every], [np.ones(1)] * S
    return weighted(np.stack(errors[:S]) - (np.stack(errors[S:]) if others else 0), np.stack(weights))


def compare(systems: list[System]) -> list[Difference]:
    """All pairs, each over the seeds that both have; the first has the lower mean over its own."""
    found = []
    for a, b in combinations(systems, 2):
        left, right = ({run.seed: run for run in system.runs} for system in (a, b))
        size, wins, seeds = Estimate(math.nan), 0, sorted(left.keys() & right.keys())
        if seeds:
            size_SN = values([left[seed] for seed in seeds], [right[seed] for seed in seeds])
            size, wins = estimate(size_SN), int((size_SN.mean(1) < 0).sum())
        found.append(Difference(a.label, b.label, size, len(seeds), wins))
    return found


def group(runs: list[Run]) -> list[System]:
    """The systems of these runs, the lowest error first; raises ValueError for two runs of one system and seed."""
    members: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        config = {name: value for name, value in run.metrics["config"].items() if name not in ELSEWHERE}
        options = flat({**config, "precision": run.metrics.get("precision")}) | {"model.name": run.metrics["model"]}
        identity = {name: json.dumps(value) for name, value in options.items() if value is not None}
        alike = members[json.dumps(identity, sort_keys=True)]
        for other in alike:
            if other.seed == run.seed:
                both = f"{other.folder} and {run.folder} are the same system with the same seed, {run.seed}"
                raise ValueError(f"{both}: name one of them")
        alike.append(run)
    labelled = zip(_labels([json.loads(identity) for identity in members]), members.values(), strict=True)
    found = [System(label, sorted(same, key=lambda run: run.seed)) for label, same in labelled]
    return sorted(found, key=lambda system: float(np.mean([run.error for run in system.runs])))


def _labels(identities: list[dict[str, str]]) -> list[str]:
    """Family names, with the options that differ: a family's own within it, those that all share anywhere."""

    def differing(among: list[dict[str, str]]) -> set[str]:
        def kinds(*names: str) -> int:
            return len({tuple(map(identity.get, names)) for identity in among})

        known = {name: FOLLOWS.get(name, ()) for name in set().union(*among)}
        return {name for name, others in known.items() if kinds(name, *others) > kinds(*others)}

    anywhere = {name for name in differing(identities) if not name.startswith("model.") or name in BODY}
    labels, seen = [], Counter[str]()
    for identity in identities:
        family = identity["model.name"]
        words = [family.strip('"')]
        for name in sorted(anywhere | differing([other for other in identities if other["model.name"] == family])):
            value = identity.get(name, "null").strip('"')[:40]
            words.append(f"{name.removesuffix('.name').rpartition('.')[2]}={value}")
        label = ", ".join(words)
        seen[label] += 1  # long values are cut, and may then agree
        labels.append(label if seen[label] == 1 else f"{label} ({seen[label]})")
    return labels


def references(systems: list[System]) -> dict[str, Estimate]:
    """Entries of the test that no model enters, as an optimum and trivial answers: several systems have them alike."""
    found, metrics = {}, systems[0].runs[0].metrics
    for name in [name for name in metrics["test"] if name != metrics["main_metric"]]:
        by_seed: dict[int, list[float]] = defaultdict(list)
        for run in (run for system in systems for run in system.runs):
            by_seed[run.seed].append(run.metrics["test"].get(name, math.nan))
        alike = all(np.allclose(entries, entries[0], rtol=1e-4, atol=1e-12) for entries in by_seed.values())
        if alike and max(map(len, by_seed.values())) > 1:
            found[name] = estimate(np.array([entries[:1] for entries in by_seed.values()]))
    return found


def notes(systems: list[System]) -> list[str]:
    """What a reader of the numbers must know: unequal budgets, too few seeds, errors that were not kept."""
    said = []
    for name in BUDGETS:
        labels: dict[str, list[str]] = defaultdict(list)
        for system in systems:
            for value in sorted({show(run.metrics.get(name)).strip("'") for run in system.runs}):
                labels[value].append(system.label)
        if len(labels) > 1 and (name != "seed" or min(map(len, labels.values())) < len(systems)):
            parts = [f"{value} ({', '.join(those)})" for value, those in labels.items()]
            said.append(f"Unequal {name}: {'; '.join(parts)}")
    few = [f"{system.label} ({len(system.runs)})" for system in systems if len(system.runs) < ENOUGH]
    kept = [system.label for system in systems if any(run.errors_N is None for run in system.runs)]
    said += [f"Fewer than {ENOUGH} seeds, so no interval: {'; '.join(few)}"] if few else []
    return said + ([f"No errors of sequences, so intervals are over seeds alone: {'; '.join(kept)}"] if kept else [])
