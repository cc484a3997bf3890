"""The error of each kind of patch in low precision, for one block and one query token.

The kinds are those of Goldwaser et al. 2025 (arXiv 2511.17864). Patches are made in float64, then stored and applied in
low precision. Axes: B = 1 sequence, T tokens, D model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from tqdm import tqdm

from zoo.core.delta import LowRank, Scale
from zoo.core.exact import LayerStates, bias, output, replace_context, shear_and_down
from zoo.core.patch import Patch
from zoo.lens.figure import Figure, Lines
from zoo.papers.capacity import DIM, HIDDEN, decoder, over_trials, tokens

PLAIN, CONTROL = "the block itself, with its context", "control: no patch"
PRECISIONS = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def scale_and_down(states: LayerStates) -> Patch:
    """The norm's scale, element by element, so that z becomes z_ctx, and v_ctx − v through `down`."""
    columns = states.z_ctx / states.z
    input_matrices = {
        name: Scale(torch.ones_like(states.ffn.weight(name)[:, 0]), columns) for name in states.ffn.input_matrices
    }
    patch = replace(states.emitted, weights=input_matrices)
    column = states.along("hidden units of", states.ffn.hidden(states.z, patch))
    return patch.with_delta("down", LowRank((states.v_ctx - states.v).unsqueeze(-1), column.unsqueeze(-1)))


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
        return replace(value, **{f.name: cast(getattr(value, f.name), dtype) for f in fields(value)})
    return value


def errors(seed: int, context: int, dtype: torch.dtype) -> dict[str, float]:
    """Relative error of the block's output at the last token in `dtype`, as it is and under each patch of the query."""
    exact, tokens_BT = decoder(seed, layers=1), tokens(seed, context + 1)
    low = copy.deepcopy(exact).to(dtype)
    block, x_BTD = low.blocks[0], low.embed(tokens_BT)
    v_ctx = block.attend(x_BTD, low.layout(context + 1, 0))[:, -1:]
    v = block.attend(x_BTD[:, -1:], low.layout(1, 0))
    outputs, found = {PLAIN: v_ctx + block.ffn(block.norm2(v_ctx))}, {}

    def compare(states: LayerStates) -> Patch:
        for name, patch_of in MENU.items():
            outputs[name] = v + block.ffn(block.norm2(v), cast(patch_of(states), dtype))
        for name, output_B1D in outputs.items():
            found[name] = ((output_B1D.double() - states.out_ctx).norm() / states.out_ctx.norm()).item()
        return states.emitted

    replace_context(exact, tokens_BT, context, compare)
    return found


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
