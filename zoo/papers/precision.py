"""The error of each kind of patch in low precision, for one block and one query token.

The kinds are those of Goldwaser et al. 2025 (arXiv 2511.17864), and one more for blocks with a norm after the FFN.
Patches are made in float64, then stored and applied in low precision. Axes: B = 1 sequence, T tokens, D model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from zoo.core.delta import InputShift, LowRank, Scale
from zoo.core.exact import LayerStates, bias, output, replace_context, shear_and_down
from zoo.core.patch import Patch
from zoo.lens.figure import Bars, Figure, Series
from zoo.papers.capacity import DIM, HIDDEN, VOCABULARY, decoder

PLAIN, CONTROL = "the block itself, with its context", "control: no patch"
PRECISIONS = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def scale_and_down(pair: LayerStates) -> Patch:
    """The norm's scale, element by element, so that z becomes z_ctx, and v_ctx − v through `down`."""
    columns = pair.z_ctx / pair.z
    input_matrices = {
        name: Scale(torch.ones_like(pair.ffn.weight(name)[:, 0]), columns) for name in pair.ffn.input_matrices
    }
    patch = replace(pair.emitted, weights=input_matrices)
    column = pair.along("hidden units of", pair.ffn.hidden(pair.z, patch))
    return patch.with_delta("down", LowRank((pair.v_ctx - pair.v).unsqueeze(-1), column.unsqueeze(-1)))


def three_biases(pair: LayerStates) -> Patch:
    """Biases of gate, up and down; no matrix changes."""
    biases = {name: (pair.z_ctx - pair.z) @ pair.ffn.weight(name).mT for name in pair.ffn.input_matrices}
    return replace(pair.emitted, biases={**biases, "down": pair.v_ctx - pair.v})


MENU: dict[str, Callable[[LayerStates], Patch]] = {
    "shear of gate and up, rank 1 of down": shear_and_down,
    "rank 1 of down alone": output,
    "norm scale, rank 1 of down": scale_and_down,
    "biases of gate, up and down": three_biases,
    "bias of down alone": bias,
    CONTROL: lambda pair: pair.emitted,
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


def _unit(y: Tensor, eps: float = 1e-6) -> Tensor:
    return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)


def post_norm_menu(pair: LayerStates, scale_D: Tensor) -> dict[str, tuple[Patch, Tensor]]:
    """Patches of v + scale ∘ r(ffn(z)), r(y) = y/rms(y), as in Gemma: what the FFN gets, and the new scale.

    The last one turns the FFN's output towards what the residual needs, so the scale hardly has to change.
    """
    shear = Patch(input=InputShift(pair.z, pair.z_ctx - pair.z), chunk=1)
    h, y = pair.ffn.hidden(pair.z, shear), pair.ffn(pair.z, shear)
    goal = pair.v_ctx - pair.v + scale_D * _unit(y)
    aim = goal * scale_D / (scale_D.square() + 0.05 * scale_D.square().mean())
    rms_aim, rms_y = (t.square().mean(-1, keepdim=True).sqrt() for t in (aim, y))
    turn = LowRank((rms_y * aim / rms_aim - y).unsqueeze(-1), pair.along("hidden units of", h).unsqueeze(-1))
    turned = shear.with_delta("down", turn)
    return {
        "shear, scale alone": (shear, goal / _unit(y)),
        "shear, rank 1 of down, scale": (turned, goal / _unit(pair.ffn(pair.z, turned))),
        CONTROL: (Patch(chunk=1), scale_D),
    }


def _errors(seed: int, context: int, dtype: torch.dtype) -> tuple[dict[str, float], dict[str, float]]:
    """Relative error of each patch's output in `dtype`: of the gated block, and of the one with a scale after it."""
    exact, generator = decoder(seed, layers=1), torch.Generator().manual_seed(seed)
    tokens_BT = torch.randperm(VOCABULARY, generator=generator)[None, : context + 1]
    scale_D = torch.randn(DIM, generator=generator, dtype=torch.float64)
    pairs: list[LayerStates] = []

    def keep(pair: LayerStates) -> Patch:
        pairs.append(pair)
        return pair.emitted

    replace_context(exact, tokens_BT, torch.arange(context + 1) < context, keep)
    (pair,) = pairs  # of the only layer
    low, low_scale_D = copy.deepcopy(exact).to(dtype), scale_D.to(dtype)
    block, x_BTD = low.blocks[0], low.embed(tokens_BT)
    v_ctx = block.attend(x_BTD, low.layout(context + 1, 0))[:, -1:]
    v = block.attend(x_BTD[:, -1:], low.layout(1, 0))
    z_ctx, z = block.norm2(v_ctx), block.norm2(v)
    gated = {PLAIN: v_ctx + block.ffn(z_ctx)}
    for name, patch_of in MENU.items():
        gated[name] = v + block.ffn(z, cast(patch_of(pair), dtype))
    scaled = {PLAIN: v_ctx + low_scale_D * _unit(block.ffn(z_ctx))}
    for name, (patch, new_scale) in post_norm_menu(pair, scale_D).items():
        scaled[name] = v + new_scale.to(dtype) * _unit(block.ffn(z, cast(patch, dtype)))

    def relative(outputs: dict[str, Tensor], wanted: Tensor) -> dict[str, float]:
        return {name: ((out.double() - wanted).norm() / wanted.norm()).item() for name, out in outputs.items()}

    return relative(gated, pair.out_ctx), relative(scaled, pair.v_ctx + scale_D * _unit(pair.ffn(pair.z_ctx)))


@torch.no_grad()
def precision_of_patches(seeds: Sequence[int] = range(200), context: int = 12) -> Figure:
    """Relative error of one block's output, patched in low precision, for each kind of patch."""
    panels: list[list[Series]] = [[], []]
    for label, dtype in PRECISIONS.items():
        rows = [_errors(seed, context, dtype) for seed in tqdm(seeds, desc=label, leave=False, disable=None)]
        for panel, trials in zip(panels, zip(*rows, strict=True), strict=True):
            values = [list(trial.values()) for trial in trials]
            low, middle, high = np.quantile(values, [0.05, 0.5, 0.95], axis=0).tolist()
            panel.append(Series(label, list(trials[0]), middle, low, high))
    titles = ("Gated block", "Gated block with a norm and a scale after its FFN (as in Gemma)")
    error = "relative error of the block's output, |error| / |output|"
    return Figure(
        "precision-of-patches",
        "Scaling states element by element magnifies rounding, other patches hardly do",
        tuple(
            Bars(title, "", error, tuple(series), log_y=True, horizontal=True)
            for title, series in zip(titles, panels, strict=True)
        ),
        f"One query token of a random block (D = {DIM}, F = {HIDDEN}, {context} context tokens). Patches are made in "
        "float64; the whole block, its patch too, is then stored and run in low precision. Error against float64, "
        f"median and 5 to 95 % of {len(seeds)} seeds. Where a state is near zero, its relative error is large, and a "
        "scale made to turn it into another state magnifies it.",
        "that patches made in low precision are as good, nor anything about many layers or trained weights.",
        {"seeds": f"{min(seeds)} to {max(seeds)}", "context": context, "D": DIM, "F": HIDDEN},
        columns=1,
    )
