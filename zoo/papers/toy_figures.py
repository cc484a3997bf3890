"""Three experiments on the toy block: the loss through ΔW, the size of its increments, and ΔW beside fine-tuning.

Settings after Dherin et al. 2025 (arXiv 2507.16003), which gives some of them only; the others are in `settings`.
Axes: B functions, C context pairs, Q queries, P numbers of a token.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from zoo.core.delta import InputShift
from zoo.lens.figure import Figure, Lines, Series
from zoo.papers.toy import BATCH_SIZE, LR, Toy, data, loss, trained, training

LOSS = "loss ½(ŷ − y)²"
LENGTHS = (0, 1, 2, 3, 5, 7, 10, 15, 20, 30, 40)
RECURRENT_LR = 3e-3


def mean_series(label: str, x: Sequence[float], value_BX: Tensor) -> Series:
    """The mean over B trials at each x, and one standard error to either side."""
    value_BX = value_BX.double()
    mean_X, error_X = value_BX.mean(0), value_BX.std(0) / len(value_BX) ** 0.5
    y, low, high = (values.tolist() for values in (mean_X, mean_X - error_X, mean_X + error_X))
    return Series(label, tuple(x), y, low, high, control="untrained" in label)


@torch.no_grad()
def loss_through_delta(
    seed: int = 0, steps: int = 500, points: int = 50, functions: int = 512, every: int = 10
) -> Figure:
    """Validation loss with the context and through ΔW while the block learns, and the gap between the predictions."""
    context, query, target = data(seed, "validation", 0, functions, points)
    x: list[int] = []
    recent: list[float] = []
    losses: dict[str, list[float]] = defaultdict(list)
    gaps: dict[str, list[float]] = defaultdict(list)
    model = Toy("attention", seed)
    for step, value in enumerate(training(model, seed, steps, points)):
        recent.append(value)
        if step % every:
            continue
        x.append(step)
        losses[f"training (mean of {every} steps)"].append(float(np.mean(recent[:-1] or recent)))
        recent.clear()
        wanted, exact, inputs = model(context, query), copy.deepcopy(model).double(), (context.double(), query.double())
        through, without = model.through_delta(context, query), model(context[:, :0], query)
        losses["validation, with the context"].append(loss(wanted, target).mean().item())
        losses["validation, query alone, W + ΔW"].append(loss(through, target).mean().item())
        losses["control: query alone, W"].append(loss(without, target).mean().item())
        gaps["float32"].append((through - wanted).abs().max().item())
        gaps["float64"].append((exact.through_delta(*inputs) - exact(*inputs)).abs().max().item())
        gaps["control: without ΔW, float32"].append((without - wanted).abs().max().item())

    def panel(title: str, y_label: str, curves: dict[str, list[float]]) -> Lines:
        series = (Series(name, x, y, control="control" in name, points="W + ΔW" in name) for name, y in curves.items())
        return Lines(title, "training step", y_label, tuple(series), log_y=True)

    return Figure(
        "loss-through-delta",
        "A context acts as a weight update, at every stage of training",
        (
            panel("Loss while the block learns", f"{LOSS}, mean", losses),
            panel("Gap between the two predictions", "largest |ŷ(C, x; W) − ŷ(x; W + ΔW)|", gaps),
        ),
        f"One attention block learns linear functions of two numbers from {points} pairs. Its predictions with the "
        f"context, and from the query alone with W + ΔW, are the same up to rounding, on {functions} new functions.",
        "that ΔW is cheaper or better than the context. Making ΔW needs the pass with the context, and the identity "
        "holds for any weights, so it says nothing about how the block solves the task.",
        {"seed": seed, "steps": steps, "points": points, "functions": functions, "lr": LR, "batch_size": BATCH_SIZE},
    )


def increments(model: Toy, context_BCP: Tensor, query_BQP: Tensor) -> Tensor:
    """Frobenius norms |ΔW_{i+1} − ΔW_i| for i = 1 … C−1, the first query of each function, (B,C−1).

    ΔW_i stands for the first i pairs. All ΔW_i share a = A(x), so a difference is the shear by A_{i+1} − A_i.
    """
    query_B1P = query_BQP[:, :1]
    states = [model.contextual(context_BCP[:, :i], query_B1P)[:, 0] for i in range(context_BCP.shape[1] + 1)]
    steps = [InputShift(states[0], new - old) for old, new in pairwise(states[1:])]
    return torch.stack([step.norm(model.inner.weight) for step in steps], 1)


def slope(series: Series, start: int = 10) -> float:
    """The log-log slope of a series over x >= start, by least squares."""
    log_x, log_y = np.log([(x, y) for x, y in zip(series.x, series.y, strict=True) if x >= start]).T
    return float(np.polyfit(log_x, log_y, 1)[0])


@torch.no_grad()
def increments_of_delta(
    seed: int = 0,
    steps: int = 500,
    points: int = 100,
    functions: int = 128,
    trained_points: int = 50,
    more_increments: Sequence[Series] = (),
) -> Figure:
    """The change of ΔW with each further pair of the context, and the loss by then, for four contextual layers.

    more_increments: series of other models, for the left panel.
    """
    context, query, target = data(seed, "test", 0, functions, points)
    models = {
        "attention, trained": trained("attention", seed, steps, trained_points),
        "attention, untrained": Toy("attention", seed),
        "mean pooling, untrained": Toy("mean", seed),
        "recurrent (GRU), trained": trained("recurrent", seed, steps, trained_points, RECURRENT_LR),
    }
    sizes, losses = [], []
    lengths = [i for i in sorted({*LENGTHS, trained_points, points}) if i <= points]
    for name, model in models.items():
        size = mean_series(name, range(1, points), increments(model, context, query))
        sizes.append(replace(size, label=f"{name}: slope {slope(size):.2f}".replace("-", "−")))
        values = [loss(model(context[:, :i], query), target).mean(1) for i in lengths]
        losses.append(mean_series(name, lengths, torch.stack(values, 1)))
    first = sizes[0]
    line = Series("1/i", first.x, [first.y[9] * 10 / float(i) for i in first.x], control=True)
    return Figure(
        "increments-of-delta",
        "Increments of ΔW fall as 1/i for averaging layers, trained or not",
        (
            Lines(
                "Size of the increments",
                "context length i (pairs)",
                "|ΔW(i+1) − ΔW(i)|, Frobenius norm",
                (*sizes, *more_increments, line),
                log_x=True,
                log_y=True,
            ),
            Lines("Loss at the same length", "context length i (pairs)", LOSS, tuple(losses)),
        ),
        f"Mean and standard error over {functions} linear functions of two numbers; slopes fitted from i = 10 on. "
        f"Trained on {trained_points} pairs at a time. Averaging gives 1/i (1/(i+2) with the query in the mean: slope "
        "−0.95 in this range). The recurrent block learns the task as well, and its increments hardly fall.",
        "that falling increments mean learning, or gradient descent: attention shows them before training, when its "
        "loss does not fall at all.",
        {
            "seed": seed,
            "steps": steps,
            "trained_points": trained_points,
            "functions": functions,
            "lr": LR,
            "lr_recurrent": RECURRENT_LR,
            "batch_size": BATCH_SIZE,
        },
    )


@torch.enable_grad()
def fine_tuned(model: Toy, names: Sequence[str], context_CP: Tensor, lr: float) -> Iterator[Toy]:
    """A copy of the model after 0, 1, … C steps of SGD on the parameters `names`, one pair per step, no context.

    It is the same object at every step. A pair (x, y) becomes the query (x, 0) with target y.
    """
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD([model.get_parameter(name) for name in names], lr)
    yield model
    for pair_P in context_CP:
        query_11P = torch.cat([pair_P[:-1], pair_P.new_zeros(1)])[None, None]
        optimizer.zero_grad()
        loss(model(query_11P[:, :0], query_11P), pair_P[-1]).mean().backward()
        optimizer.step()
        yield model


@torch.no_grad()
def delta_and_fine_tuning(
    seed: int = 0, steps: int = 500, points: int = 50, functions: int = 64, queries: int = 100, lr: float = 0.01
) -> Figure:
    """Test loss against the number of examples: as a context turned into ΔW, and as steps of fine-tuning."""
    model = trained("attention", seed, steps, points)
    context, query, target = data(seed, "test", 0, functions, points, queries)
    lengths = [i for i in sorted({*LENGTHS, points}) if i <= points]
    implicit = [loss(model.through_delta(context[:, :i], query), target).mean(1) for i in lengths]
    series = [mean_series("the examples as ΔW of W", lengths, torch.stack(implicit, 1))]
    everything = [name for name, _ in model.named_parameters()]
    for label, names in {"all parameters": everything, "W alone": ["inner.weight"]}.items():
        rows = [
            [
                loss(stage(context[:1, :0], query[b : b + 1]), target[b]).mean()
                for i, stage in enumerate(fine_tuned(model, names, context[b], lr))
                if i in lengths
            ]
            for b in tqdm(range(functions), desc=f"fine-tuning {label}", leave=False, disable=None)
        ]
        series.append(mean_series(f"SGD on {label}", lengths, torch.tensor(rows)))
    nothing = implicit[0].mean().item()
    series.append(Series("control: no example used", tuple(lengths), (nothing,) * len(lengths), control=True))
    return Figure(
        "delta-and-fine-tuning",
        "The same examples as a weight update and as fine-tuning",
        (Lines("", "number of examples", f"{LOSS} on {queries} test queries, mean", tuple(series), log_y=True),),
        f"The trained attention block gets examples of a new linear function: as a context, turned into ΔW of W for "
        f"each query; or one at a time, without context, as steps of SGD at rate {lr:g}. Mean and standard error over "
        f"{functions} functions.",
        "that ΔW is gradient descent: both losses fall, along different ways. The order of the curves depends on the "
        "learning rate, and two examples already determine the function: least squares has no loss from there on.",
        {"seed": seed, "steps": steps, "points": points, "functions": functions, "queries": queries, "lr": lr},
    )
