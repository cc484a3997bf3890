"""What weights can hold of a context: patches of many users in one batch, contexts longer than trained, patches added.

    rm -r docs/results/prompts docs/results/haystack docs/results/incontext    # their numbers: else nothing is trained
    python docs/results.py run prompts haystack incontext     # trains the models, into runs/results
    python docs/memory.py [users] [added] [longer]      # five minutes each; tables, and docs/figures/longer.png

Axes: B users, n tokens of a context, T tokens, Q queries.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import zoo
from zoo.core.delta import LowRank
from zoo.core.patch import Patch
from zoo.lens import static
from zoo.lens.draw import save
from zoo.lens.figure import Figure, Lines, Series
from zoo.lens.patch_file import load_patch, save_patch
from zoo.memory import keep_freed_memory
from zoo.models import Model
from zoo.tasks import Batch
from zoo.training import validate

HERE = Path(__file__).parent
RUNS, SEEDS = Path("runs/results"), (0, 1, 2)
USERS = 512
LENGTHS = [16 * 2**k for k in range(8)]


def trained(experiment: str, system: str, seed: int) -> Model:
    return zoo.load(RUNS / experiment / f"{system},seed={seed}").requires_grad_(False)


def emitted(model: Model, context_Bn: Tensor) -> list[Patch]:
    """The patches of the contexts, which stand for them before any query."""
    return static._start(model.decoder, context_Bn, context_Bn.shape[1])


def each(patches: list[Patch], change: Callable[[Tensor], Tensor]) -> list[Patch]:
    """Low-rank patches with every factor changed."""
    return [
        Patch(weights={name: LowRank(change(delta.u), change(delta.v)) for name, delta in patch.weights.items()})
        for patch in patches
    ]


def together(users: list[list[Patch]]) -> list[Patch]:
    """Patches of one user each as rows of one batch."""
    return [
        Patch(
            weights={
                name: LowRank(*(torch.cat([getattr(p.weights[name], factor) for p in layer]) for factor in "uv"))
                for name in layer[0].weights
            }
        )
        for layer in zip(*users, strict=True)
    ]


# many users


def bits(model: Model, batch: Batch, output: Tensor) -> float:
    """Bits per byte of the targets."""
    return float(model.task.token_losses(output, batch).sum() / model.task.scored(batch).sum() / math.log(2))


def personalisation(seed: int) -> tuple[list[float], int]:
    """Bits per byte of USERS users, under a patch read from the user's file, another user's, and none, and of attention
    with the context and without; and the bytes of a file. Raises AssertionError where files change the answers."""
    hyper, plain = (trained("prompts", name, seed) for name in ("hypernet", "transformer"))
    batch = hyper.task.batch("test", 0, USERS)
    n, query_BT = batch.n_context, batch.tokens[:, batch.n_context :]
    patches = emitted(hyper, batch.tokens[:, :n])
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"user{k}.safetensors") for k in range(USERS)]
        for k, file in enumerate(files):
            save_patch(file, each(patches, lambda t, k=k: t[k : k + 1]), hyper)
        size = files[0].stat().st_size
        read = together([load_patch(file, hyper) for file in files])
    served = hyper(query_BT, patches=read)
    torch.testing.assert_close(served, hyper(batch.tokens, n)[:, n:], rtol=1e-4, atol=1e-4)
    other = emitted(hyper, batch.wrong_context)
    outputs = [hyper(query_BT, patches=other), hyper(query_BT)]
    found = [bits(hyper, batch, output) for output in (served, *outputs)]
    return [*found, bits(plain, batch, plain(batch.tokens, n)), bits(plain, batch, plain(query_BT))], size


# longer than trained


def misses(model: Model, length: int) -> float:
    """The share of wrong answers in 256 contexts of a length."""
    options = dict(model.hparams)
    options["task"] = {**options["task"], "haystack": [length, length]}
    task = validate.build(options).task
    tests = [task.batch("test", k, 16) for k in range(16)]
    return float(np.mean([_error(model, batch) for batch in tests]))


def _error(model: Model, batch: Batch) -> float:
    answers_BQ = model(batch.tokens, batch.n_context)[:, batch.n_context :].argmax(-1)
    return float((answers_BQ != batch.targets).float().mean())


# patches added


def stacking(system: str, seed: int) -> list[float]:
    """The error on queries of 512 functions: ten pairs A and ten others B read together, the sum of their two patches,
    half of it, A's patch alone, and none."""
    model = trained("incontext", system, seed)
    batch = model.task.batch("test", 0, 512)
    n, query_BQd = batch.n_context, batch.tokens[:, batch.n_context :]
    first, second = (emitted(model, part) for part in batch.tokens[:, :n].split(n // 2, 1))
    halves = [each(part, lambda t: t * 0.5**0.5) for part in (first, second)]
    added, mean = ([a.merged_with(b) for a, b in zip(*pair, strict=True)] for pair in ((first, second), halves))
    cases = emitted(model, batch.tokens[:, :n]), added, mean, first, None
    outputs = [model(query_BQd, patches=case) if case else model(query_BQd) for case in cases]
    return [float((out[..., 0] - batch.targets).square().mean() / model.task.variance) for out in outputs]


def row(cells: Iterable[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def by_seed(values: Iterable[float], digits: str = ".3f") -> str:
    return " ".join(f"{value:{digits}}" for value in values)


def users() -> None:
    """The table of patches of many users."""
    found = [personalisation(seed) for seed in SEEDS]
    print(row(["bits per byte of", *(f"seed {seed}" for seed in SEEDS)]), row(["---"] * 4), sep="\n")
    ways = ("the user's patch, from its file", "another user's patch", "no patch", "attention", "attention, no context")
    for way, values in zip(ways, zip(*(bits for bits, _ in found), strict=True), strict=True):
        print(row([way, *(f"{value:.3f}" for value in values)]))
    print(f"\n{found[0][1]} bytes a user, {USERS} users")


def added() -> None:
    """The table of patches added."""
    heads = ["A and B read together", "A + B", "half of A + B", "A alone", "none"]
    print(row(["added", *heads]), row(["---"] * 6), sep="\n")
    for system in ("hypernet", "fast_weights"):
        columns = zip(*(stacking(system, seed) for seed in SEEDS), strict=True)
        print(row([system, *(by_seed(values, ".2g") for values in columns)]))


def longer() -> None:
    """The table and the figure of contexts longer than trained."""
    print(row(["tokens", *LENGTHS]), row(["---"] * (1 + len(LENGTHS))), sep="\n")
    series = []
    for system in ("transformer", "fast_weights", "hypernet"):
        errors = [[misses(trained("haystack", system, seed), length) for seed in SEEDS] for length in LENGTHS]
        print(row([system, *(by_seed(values, ".2f") for values in errors)]))
        middle = [float(np.mean(values)) for values in errors]
        series.append(Series(system, LENGTHS, middle, low=[*map(min, errors)], high=[*map(max, errors)]))
    series.append(Series("guessing", LENGTHS, [0.875] * len(LENGTHS), control=True))
    panel = Lines(
        "eight keys and values",
        "tokens of the context",
        "share of wrong answers",
        tuple(series),
        log_x=True,
        marks={"longest of training": 64},
    )
    figure = Figure(
        "longer",
        "What is found in contexts longer than trained",
        (panel,),
        "Trained on 16 to 64 tokens. The mean of three seeds, and their range.",
        "that this holds for other tasks, sizes or positions: models of 3 layers, trained for 1000 steps.",
        {"command": "python docs/memory.py longer"},
    )
    print(save(figure, HERE / "figures"))


PARTS = {part.__name__: part for part in (users, added, longer)}

if __name__ == "__main__":
    if strange := {*sys.argv[1:]} - {*PARTS}:
        sys.exit(f"{', '.join(strange)}: the parts are {', '.join(PARTS)}")
    torch.set_num_threads(1)
    keep_freed_memory()
    for part in sys.argv[1:] or PARTS:
        with torch.no_grad():
            PARTS[part]()
