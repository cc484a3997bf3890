"""Several devices beside the models: FSDP2, which cuts every weight, and experts apart, which move tokens instead.

Applied to a model that is built; its weights become DTensors, and every part that reads one is told how. The rest of
the run sees whole tensors: one checkpoint of one form, whatever wrote it.
Axes: N rows sorted by block, M those that arrive here, E blocks, e those of this process, W processes, D model.
"""

from __future__ import annotations

from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

from zoo.core.exact import replace_context
from zoo.core.experts import product_dtype, swiglu
from zoo.core.layers import FeedForward
from zoo.models.base import Model


def shard(model: Model, mesh: DeviceMesh, experts: bool) -> None:
    """Cuts the weights of `model`, in place and once, over the processes of the one axis of `mesh`.

    FSDP2 (Zhao et al. 2023, arXiv 2304.11277) gathers those of attention, and of an FFN, for as long as each computes;
    all others together. experts: the blocks of each FFN stay where they are, and rows travel (Lepikhin et al. 2020,
    arXiv 2006.16668); there must be a multiple of W of them.
    """
    decoder = model.decoder
    if isinstance(decoder, FSDPModule):
        return
    apart: set[nn.Parameter] = set()
    for block in decoder.blocks:
        ffn = block.ffn
        fully_shard(block.attention, mesh=mesh)
        if experts:
            for name, p in ffn.named_parameters():
                cut = nn.Parameter(scattered(p.detach(), mesh, [Shard(0)]), requires_grad=p.requires_grad)
                setattr(ffn, name, cut)
                apart.add(cut)
            ffn.by_block = partial(_by_block, ffn, mesh)  # type: ignore[method-assign]
        else:
            fully_shard(ffn, mesh=mesh)
        ffn.stored = partial(_stored, ffn)  # type: ignore[method-assign]
    fully_shard(decoder, mesh=mesh, ignored_params=apart)
    # a weight outside of all groups would drift apart between processes, in silence
    assert all(isinstance(p, DTensor) for p in model.parameters())
    decoder.token_alone = None  # which would copy all weights
    decoder.within = MethodType(lambda self, call: call(), decoder)  # type: ignore[assignment]
    register_fsdp_forward_method(decoder, "within")
    model.deltas = partial(_deltas, decoder)  # type: ignore[method-assign]
    model.register_load_state_dict_pre_hook(_cut_whole_weights)


def _stored(ffn: FeedForward, name: str) -> Tensor:
    """The whole matrix, of this layer alone."""
    p = getattr(ffn, name)
    if not isinstance(p, DTensor):
        return p  # gathered by FSDP
    whole = p.full_tensor(grad_placements=[Partial()])
    return _mean_gradient(whole, p.device_mesh)


def _mean_gradient(w: Tensor, mesh: DeviceMesh) -> Tensor:
    """`w`, whose gradient is the sum over processes, with that of the mean of their losses."""
    if w.requires_grad:
        w.register_hook(lambda gradient: gradient / mesh.size())
    return w


def _by_block(ffn: FeedForward, mesh: DeviceMesh, x_ND: Tensor, counts_E: Tensor) -> Tensor:
    """What each block gives for its rows, computed where the block is."""
    group = mesh.get_group()
    sent_We = counts_E.view(mesh.size(), -1)
    got_We = torch.empty_like(sent_We)
    dist.all_to_all_single(got_We, sent_We, group=group)
    sent, got = torch.stack([sent_We.sum(1), got_We.sum(1)]).tolist()  # the one wait for the device
    x_MD = Exchange.apply(x_ND.to(product_dtype(x_ND)), sent, got, group)
    block_M = torch.arange(got_We.shape[1], device=x_MD.device).repeat(mesh.size())
    order_M = block_M.repeat_interleave(got_We.flatten(), output_size=sum(got)).argsort(stable=True)
    own = (_mean_gradient(getattr(ffn, name).to_local(), mesh) for name in ("gate", "up", "down"))
    y_MD = swiglu(x_MD[order_M], got_We.sum(0), ffn.backend, *own)
    y_MD = y_MD[torch.empty_like(order_M).scatter_(0, order_M, torch.arange(len(order_M), device=order_M.device))]
    return Exchange.apply(y_MD, got, sent, group)


class Exchange(torch.autograd.Function):
    """Rows to their processes: apply(x_ND, sent, got, group), sent and got by process, gives those that arrive here."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, sent: list[int], got: list[int], group: Any) -> Tensor:
        ctx.way = sent, got, group
        x_MD = x_ND.new_empty(sum(got), x_ND.shape[1])
        dist.all_to_all_single(x_MD, x_ND.contiguous(), got, sent, group)
        return x_MD

    @staticmethod
    def backward(ctx: Any, dx_MD: Tensor) -> tuple[Tensor, None, None, None]:
        sent, got, group = ctx.way
        dx_ND = dx_MD.new_empty(sum(sent), dx_MD.shape[1])
        dist.all_to_all_single(dx_ND, dx_MD.contiguous(), sent, got, group)
        return dx_ND, None, None, None


def _deltas(decoder: Any, tokens: Tensor, removed: Tensor | int, n_context: int | None = None) -> Any:
    """As Model.deltas: embeddings and generator are gathered meanwhile, layers one by one."""
    return decoder.within(lambda: replace_context(decoder, tokens, removed, n_context=n_context))


def scattered(whole: Tensor, mesh: DeviceMesh, placements: Any) -> DTensor:
    """The part of this process of a tensor that all processes have."""
    return distribute_tensor(whole, mesh, placements, src_data_rank=None)


def _cut_whole_weights(model: Model, state: dict[str, Any], *_: Any) -> None:
    """Before load_state_dict, so that the weights of any checkpoint fit."""
    model.decoder.reshard()  # type: ignore[operator]
    for name, p in model.named_parameters(remove_duplicate=False):
        if name in state and isinstance(p, DTensor):
            state[name] = scattered(state[name].to(p.device), p.device_mesh, p.placements)
