"""Which experts a mixture of experts uses, for what, and what the context has to do with it.

Axes: B sequences, T tokens, Q queries, L layers, E routed experts (shared ones are left out), K chosen, G groups of
data, N sequences of all batches.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.core.delta import InputShift
from zoo.core.exact import LayerStates, replace_context, shear_and_down
from zoo.core.patch import Patch, Routing
from zoo.models import Model
from zoo.models.moe import ExpertLoad, ExpertRouting, RouterEntropy
from zoo.tasks import Batch

SHUFFLES = 20


class Usage(NamedTuple):
    """The use of experts in each layer, over all tokens of all batches.

    load (L,E): tokens of each expert over the mean, 1 at balance; dead (L): share of experts that no token chose;
    entropy (L): mean entropy in nats of the softmax of the router's logits; together (L,E,E): share of tokens that
    chose both experts, on the diagonal those that chose one; information (L): normalised mutual information of chosen
    expert and Batch.group, and shuffled (L): its mean with groups shuffled among sequences, or None without groups.
    """

    load: Tensor
    dead: Tensor
    entropy: Tensor
    together: Tensor
    information: Tensor | None
    shuffled: Tensor | None


@torch.no_grad()
def usage(model: Model, batches: Iterable[Batch]) -> Usage:
    """The use of experts on `batches` of any task; raises ValueError for a model without experts or without batches."""
    context_to_delta = _experts(model)
    E = context_to_delta.config.experts
    loads = [ExpertLoad(E).to(model.device) for _ in model.decoder.blocks]
    entropies = [RouterEntropy().to(model.device) for _ in model.decoder.blocks]
    counts: list[Tensor] = []  # (L,B,E) of each batch
    groups: list[Tensor | None] = []
    together_LEE, tokens = torch.zeros((), dtype=torch.float64, device=model.device), 0
    for batch in batches:
        patches = model.decoder(batch.tokens, batch.n_context)[1]
        for block, patch, load, entropy in zip(model.decoder.blocks, patches, loads, entropies, strict=True):
            load.update(patch, block.ffn)
            entropy.update(patch, block.ffn)
        chosen = torch.stack([expert_sets(patch.routing, E) for patch in patches if patch.routing]).double()
        real = model.decoder.real(batch.tokens)
        chosen = chosen if real is None else chosen * real.unsqueeze(-1)
        counts.append(chosen.sum(2))
        together_LEE = together_LEE + (chosen.mT @ chosen).sum(1)
        groups.append(batch.group)
        tokens += batch.tokens.shape[:2].numel() if real is None else int(real.sum())
    if not counts:
        raise ValueError("no batches: the use of experts is counted over at least one")
    labels = [group for group in groups if group is not None]
    information = shuffled = None
    if len(labels) == len(groups):
        information, shuffled = _information(torch.cat(counts, 1), torch.cat(labels))
    return Usage(
        load=torch.stack([load.counts / load.counts.mean() for load in loads]),
        dead=torch.stack([load.compute()["dead_fraction"] for load in loads]),
        entropy=torch.stack([entropy.compute() for entropy in entropies]),
        together=together_LEE / tokens,
        information=information,
        shuffled=shuffled,
    )


def _experts(model: Model) -> ExpertRouting:
    context_to_delta = model.decoder.context_to_delta
    if not isinstance(context_to_delta, ExpertRouting):
        raise ValueError(f"model.name={model.config.name} has no experts: only a moe routes tokens")
    return context_to_delta


def expert_sets(routing: Routing, experts: int) -> Tensor:
    """Which of the first `experts` experts each token chose, (*,T,E), boolean; shared experts have later ids."""
    return (routing.index.unsqueeze(-1) == torch.arange(experts, device=routing.index.device)).any(-2)


def mutual_information(counts: Tensor) -> Tensor:
    """2 I(X;Y)/(H(X) + H(Y)) of a table of counts (*,X,Y): (*), 0 if independent, 1 if each tells the other.

    The arithmetic mean of the entropies normalises (Vinh, Epps & Bailey 2010, JMLR 11); nan if nothing varies. A
    table of few counts is above 0 by chance.
    """
    p = counts / counts.sum((-2, -1), keepdim=True)
    entropies = _entropy(p.sum(-1)) + _entropy(p.sum(-2))
    return 2 * (entropies - _entropy(p.flatten(-2))) / entropies


def _entropy(p: Tensor) -> Tensor:
    return -torch.xlogy(p, p).sum(-1)


def _information(chosen_LNE: Tensor, group_N: Tensor) -> tuple[Tensor, Tensor]:
    """Mutual information of experts and groups, (L), as it is and with shuffled groups."""
    generator = torch.Generator().manual_seed(0)
    # whole sequences are shuffled: their tokens share a text, which alone makes experts and labels depend
    orders = [torch.randperm(len(group_N), generator=generator).to(group_N.device) for _ in range(SHUFFLES)]
    tables = [chosen_LNE.mT @ F.one_hot(group).to(chosen_LNE) for group in (group_N, *(group_N[o] for o in orders))]
    information = mutual_information(torch.stack(tables))
    return information[0], information[1:].mean(0)


class Switched(NamedTuple):
    """Share of queries whose set of experts differs from that with the context, (L): reduced, if the router reads the
    state without the context; sheared, if its matrix is patched like the other readers of that state."""

    reduced: Tensor
    sheared: Tensor


@torch.no_grad()
def switched(model: Model, tokens: Tensor, n_context: int) -> Switched:
    """How many of the tokens after the first n_context choose other experts when these are taken away.

    Layer by layer on the stream that the fully patched layers below produced, so that a layer shows its own router
    alone. A router of the token's state is one more reader of it: sheared, it chooses as with the context, up to ties
    (Goldwaser et al. 2025, arXiv 2511.17864). One that reads the mean of the context is not: no shear of the token's
    state replaces the context. Raises ValueError for a model without experts.
    """
    E = _experts(model).config.experts
    shares: list[Tensor] = []

    def patch_of(pair: LayerStates) -> Patch:
        assert pair.emitted.routing
        contextual = expert_sets(pair.emitted.routing, E).squeeze(2)
        shear = InputShift(pair.z, pair.z_ctx - pair.z)
        states = {"reduced": pair.z, "sheared": shear.apply(pair.z.unsqueeze(2)).squeeze(2)}
        changed = []
        for z in states.values():
            routing = model.decoder.emit(z, pair.layer, 0).routing
            assert routing
            changed.append((expert_sets(routing, E) != contextual).any(-1).double().mean())
        shares.append(torch.stack(changed))
        return shear_and_down(pair)

    removed = torch.arange(tokens.shape[1], device=tokens.device) < n_context
    replace_context(model.decoder, tokens, removed, patch_of, n_context)
    return Switched(*torch.stack(shares, 1))
