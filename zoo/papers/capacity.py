"""The number of query tokens that one static patch can serve: as many as the matrix it changes has inputs.

Axes: B = 1 sequence, m query tokens, D model, F hidden units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from zoo.core.decoder import Decoder, Sizes
from zoo.core.delta import Full
from zoo.core.exact import LayerStates, replace_context
from zoo.core.patch import Patch
from zoo.lens.figure import Figure, Lines, Series
from zoo.tasks.noise import Noise

DIM, HIDDEN, VOCABULARY = 32, 80, 256
LENGTHS = (1, 2, 4, 8, 16, 24, 28, *range(30, 35), 36, 40, 48, 64, 72, 76, *range(78, 83), 84, 96)


def decoder(seed: int, layers: int) -> Decoder:
    """A decoder in float64 with drawn weights, norm scales too."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        sizes = Sizes(dim=DIM, layers=layers, hidden=HIDDEN)
        model = Decoder(sizes, Noise({"vocabulary": VOCABULARY}, seed)).double()
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1, 0.2)
    return model


def tokens(seed: int, count: int) -> Tensor:
    """Different tokens (1,count): two equal first ones have equal states without a context, which no patch parts."""
    return torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(seed))[None, :count]


def over_trials(label: str, x: Sequence[Any], trials: Any, quantiles: tuple[float, float, float]) -> Series:
    """The values (trials,x) at each x as a lower, a middle and an upper quantile."""
    low, middle, high = np.quantile(trials, quantiles, axis=0).tolist()
    return Series(label, x, middle, low, high, control="control" in label)


def input_side(states: LayerStates) -> Patch:
    """One for all: gate and up read z + Mz with M z = z_ctx − z fitted, `down` adds v_ctx − v; exact to m = D."""
    move_BDD = (torch.linalg.pinv(states.z) @ (states.z_ctx - states.z)).mT
    patch = Patch(weights={name: Full(states.ffn.weight(name) @ move_BDD) for name in states.ffn.input_matrices})
    return _down(states, patch, states.v_ctx - states.v)


def output_side(states: LayerStates) -> Patch:
    """One patch for all tokens: `down` adds all that is missing from the block's output; exact to m = F."""
    return _down(states, Patch(), states.out_ctx - states.v - states.ffn(states.z))


def _down(states: LayerStates, patch: Patch, missing_BmD: Tensor) -> Patch:
    update_BDF = (torch.linalg.pinv(states.ffn.hidden(states.z, patch)) @ missing_BmD).mT
    return replace(patch, weights={**patch.weights, "down": Full(update_BDF)})


@torch.no_grad()
def capacity_cliffs(
    seeds: Sequence[int] = range(10), context: int = 20, layers: int = 6, lengths: Sequence[int] = LENGTHS
) -> Figure:
    """Logit error of one static patch per layer against the number of query tokens it has to serve."""
    sides = {"gate, up and down (input side)": input_side, "down alone (output side)": output_side}
    errors: dict[str, list[float]] = {name: [] for name in (*sides, "control: no patch")}
    for seed in tqdm(seeds, desc="capacity", leave=False, disable=None):
        model = decoder(seed, layers)
        for m in lengths:
            tokens_BT = tokens(seed, context + m)
            wanted = model(tokens_BT)[0][:, context:]
            for name in errors:
                patches = replace_context(model, tokens_BT, context, sides[name]) if name in sides else None
                error = model(tokens_BT[:, context:], patches=patches)[0] - wanted
                errors[name].append(error.abs().max().item())
    series = [
        over_trials(name, lengths, np.reshape(values, (len(seeds), -1)), (0, 0.5, 1)) for name, values in errors.items()
    ]
    panel = Lines(
        "",
        "query tokens m served by one patch per layer",
        "largest logit error",
        tuple(series),
        log_y=True,
        marks={f"m = D = {DIM}": DIM, f"m = F = {HIDDEN}": HIDDEN},
    )
    return Figure(
        "capacity-cliffs",
        "One static patch serves as many tokens as its matrix has inputs",
        (panel,),
        f"{context} context tokens are replaced by one weight update per layer, by least squares, in a random decoder "
        f"of {layers} layers (float64). Median and range over {len(seeds)} seeds. Exact up to D tokens where the patch "
        "acts on the FFN's input, up to F where it acts on the hidden units; rounding is magnified close to the limit.",
        "that such a patch works for tokens it was not fitted on: below the cliff it interpolates. The states here are "
        "those of random weights; where the cliff of a trained model lies is not measured.",
        {"seeds": f"{min(seeds)} to {max(seeds)}", "layers": layers, "context": context, "D": DIM, "F": HIDDEN},
    )
