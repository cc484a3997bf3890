"""Two experiments on exact patches, in decoders with drawn weights.

Capacity: the number of query tokens that one static patch can serve is the number of inputs of the matrix it changes.
Precision: the error of each kind of patch for one query token of one block, made in float64, then stored and applied in
low precision; the kinds are those of Goldwaser et al. 2025 (arXiv 2511.17864).
Axes: B = 1 sequence, T tokens, m query tokens, D model, F hidden units.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from zoo.core.decoder import Decoder, Sizes
from zoo.core.delta import Full, Scale
from zoo.core.exact import LayerStates, replace_context, shear_and_down
from zoo.core.patch import Patch
from zoo.lens.exact import bias, output
from zoo.lens.figure import Figure, Lines, Series
from zoo.tasks.noise import Noise

DIM, HIDDEN, VOCABULARY = 32, 80, 256
LENGTHS = (1, 2, 4, 8, 16, 24, 28, *range(30, 35), 36, 40, 48, 64, 72, 76, *range(78, 83), 84, 96)
PLAIN, CONTROL = "the block itself, with its context", "control: no patch"
PRECISIONS = {"bfloat16": torch.bfloat16, "float32": torch.float32}


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
    errors: dict[str, list[float]] = {name: [] for name in (*sides, CONTROL)}
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
    x, y = "query tokens m served by one patch per layer", "largest logit error"
    marks = {f"m = D = {DIM}": DIM, f"m = F = {HIDDEN}": HIDDEN}
    panel = Lines("", x, y, tuple(series), log_y=True, marks=marks)
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


def scale_and_down(states: LayerStates) -> Patch:
    """The norm's scale, element by element, so that z becomes z_ctx, and v_ctx − v through `down`."""
    columns = states.z_ctx / states.z
    rows = torch.ones(HIDDEN, dtype=columns.dtype)
    patch = replace(states.emitted, weights={name: Scale(rows, columns) for name in states.ffn.input_matrices})
    return states.with_down(patch, states.v_ctx - states.v)


def three_biases(states: LayerStates) -> Patch:
    """Biases of gate, up and down; no matrix changes."""
    biases = {name: (states.z_ctx - states.z) @ states.ffn.weight(name).mT for name in states.ffn.input_matrices}
    return replace(states.emitted, biases={**biases, "down": states.v_ctx - states.v})


MENU: dict[str, Callable[[LayerStates], Patch]] = {
    "shear of gate and up, rank 1 of down": shear_and_down,
    "rank 1 of down alone": output,
    "norm scale, rank 1 of down": scale_and_down,
    "biases of gate, up and down": three_biases,
    "bias of down alone": bias,
    CONTROL: lambda states: states.emitted,
}


def cast(value: Any, dtype: torch.dtype) -> Any:
    """A patch with all its numbers stored in `dtype`."""
    if torch.is_tensor(value):
        return value.to(dtype)
    if isinstance(value, Mapping):
        return {key: cast(item, dtype) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **cast(vars(value), dtype))
    return value


def last_output(model: Decoder, tokens_BT: Tensor, patch: Patch) -> Tensor:
    """The output of the only block at the last token, (1,1,D)."""
    block = model.blocks[0]
    v = block.attend(model.embed(tokens_BT), model.layout(tokens_BT.shape[1], 0))[:, -1:]
    return v + block.ffn(block.norm2(v), patch)


def errors(seed: int, context: int, dtype: torch.dtype) -> dict[str, float]:
    """Relative error of the block's output at the last token in `dtype`, as it is and under each patch of the query."""
    exact, tokens_BT = decoder(seed, layers=1), tokens(seed, context + 1)
    low, wanted = copy.deepcopy(exact).to(dtype), last_output(exact, tokens_BT, Patch())
    outputs = {PLAIN: last_output(low, tokens_BT, Patch())}
    for name, patch_of in MENU.items():
        (patch,) = replace_context(exact, tokens_BT, context, patch_of)
        outputs[name] = last_output(low, tokens_BT[:, -1:], cast(patch, dtype))
    return {name: ((output.double() - wanted).norm() / wanted.norm()).item() for name, output in outputs.items()}


@torch.no_grad()
def precision_of_patches(seeds: Sequence[int] = range(200), context: int = 12) -> Figure:
    """Relative error of one block's output, patched in low precision, for each kind of patch."""
    series = []
    for label, dtype in PRECISIONS.items():
        trials = [errors(seed, context, dtype) for seed in tqdm(seeds, desc=label, leave=False, disable=None)]
        values = [list(trial.values()) for trial in trials]
        series.append(over_trials(label, list(trials[0]), values, (0.05, 0.5, 0.95)))
    error = "relative error of the block's output, |error| / |output|"
    return Figure(
        "precision-of-patches",
        "Scaling states element by element magnifies rounding, other patches hardly do",
        (Lines("", "", error, tuple(series), log_y=True),),
        f"One query token of a random block (D = {DIM}, F = {HIDDEN}, {context} context tokens). Patches are made in "
        "float64; the whole block, its patch too, is then stored and run in low precision. Error against float64, "
        f"median and 5 to 95 % of {len(seeds)} seeds. Where a state is near zero, its relative error is large, and a "
        "scale made to turn it into another state magnifies it.",
        "that patches made in low precision are as good, nor anything about many layers or trained weights.",
        {"seeds": f"{min(seeds)} to {max(seeds)}", "context": context, "D": DIM, "F": HIDDEN},
    )
