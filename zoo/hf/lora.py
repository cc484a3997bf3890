"""Patches as LoRA adapters that `peft` loads (Hu et al. 2021, arXiv 2106.09685): plain weights for every token.

Axes: o outputs and i inputs of a matrix, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from zoo.core.delta import LowRank
from zoo.core.patch import Patch
from zoo.files import to_json, whole, write
from zoo.hf.ffn import POST, ForeignFFN, wide
from zoo.hf.prompt import Prompt
from zoo.hf.wrapped import Wrapped


@torch.no_grad()
def truncated(model: Wrapped, patches: Sequence[Patch], rank: int) -> list[Patch]:
    """Each ΔW, an input shift included, as its best approximation of the rank (Eckart & Young 1936). Raises ValueError
    for what no LoRA can be: biases, scales of norms, changes of experts and routers, patches of several tokens."""
    if rank < 1:
        raise ValueError(f"rank={rank} must be at least 1")
    model.decoder.check(patches)
    layers = enumerate(zip(model.decoder.blocks, patches, strict=True))
    return [_truncated(index, block.ffn, patch, rank) for index, (block, patch) in layers]


def _truncated(index: int, ffn: ForeignFFN, patch: Patch, rank: int) -> Patch:
    wrong = {
        "biases: take the form matrix, output or sink-null": bool(patch.biases),
        "the scale of the norm behind it": POST in patch.weights or ffn.post is not None,
        "experts": ffn.experts is not None,
    }
    if found := [what for what, there in wrong.items() if there]:
        raise ValueError(f"layer {index}: a LoRA does not hold {', '.join(found)}")
    weights = {}
    for name in ffn.matrices:
        u_or, v_ir = _factors(index, ffn, name, patch)
        if u_or.shape[1] > rank:
            (q, a), (p, b) = torch.linalg.qr(u_or), torch.linalg.qr(v_ir)
            left, s, right = torch.linalg.svd(a @ b.mT)
            u_or, v_ir = q @ left[:, :rank] * s[:rank], p @ right[:rank].mT
        if u_or.shape[1]:
            weights[name] = LowRank(u_or[None], v_ir[None])
    return Patch(weights=weights)


def _factors(index: int, ffn: ForeignFFN, name: str, patch: Patch) -> tuple[Tensor, Tensor]:
    """u (o,r) and v (i,r) of all that the patch does to a matrix."""
    W = wide(ffn.weight(name))
    parts: list[Any] = [(W[:, :0], W[:0].mT)]
    if (delta := patch.weights.get(name)) is not None:
        parts.append(delta.factors(W))
    if patch.input and name in ffn.input_matrices:
        parts.append(patch.input.factors(W if delta is None else W + delta.dense(W)))
    if any(part is None or part[0].shape[:-2].numel() != 1 for part in parts):
        raise ValueError(f"layer {index}, {name}: a LoRA is one update, not one for each of many tokens")
    u_or, v_ir = (torch.cat([t.reshape(t.shape[-2:]) for t in side], 1) for side in zip(*parts, strict=True))
    return u_or, v_ir


USE = """# A prompt as a LoRA

It stands for a prompt of {tokens} tokens, without the first {keep}, which stay in front of every query: pass the tokens
{kept}, then the query, whose position_ids begin at {tokens}; without them answers are wrong.
"""


def save_lora(
    folder: str | Path, model: Wrapped, patches: Sequence[Patch], rank: int, prompt: Prompt | None = None
) -> list[Patch]:
    """Writes an adapter of `peft` into a new folder and returns the patches that it holds, ΔW at `rank`; README.md
    there says how one that stands for a prompt is used. Raises ValueError as `truncated` does."""
    folder, patches = Path(folder), truncated(model, patches, rank)
    names = {id(module): name for name, module in model.model.named_modules()}
    tensors: dict[str, Tensor] = {}
    targets, turned = [], set()
    for block, patch in zip(model.decoder.blocks, patches, strict=True):
        for name, delta in patch.weights.items():
            assert isinstance(delta, LowRank)
            path = names[id(block.ffn.modules[name])]
            targets.append(path)
            turned.add(name in block.ffn.turned)
            u_or, v_ir = (torch.nn.functional.pad(t[0], (0, rank - t.shape[-1])) for t in (delta.u, delta.v))
            tensors[f"base_model.model.{path}.lora_A.weight"] = v_ir.mT.contiguous()
            tensors[f"base_model.model.{path}.lora_B.weight"] = u_or.contiguous()
    if not tensors:
        raise ValueError("the patches change nothing: there is no adapter to write")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": targets,
        "fan_in_fan_out": turned == {True},
        "bias": "none",
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    with whole(folder / "adapter_model.safetensors") as temporary:
        save_file(tensors, temporary, {"format": "pt"})
    write(folder / "adapter_config.json", to_json(config, 2) + "\n")
    if prompt:
        kept = prompt.tokens[: prompt.keep].tolist()
        write(folder / "README.md", USE.format(tokens=len(prompt.tokens), keep=prompt.keep, kept=kept))
    return patches
