"""The use of experts in a model with routing: by domain, together, and without the context.

Axes: B sequences, T tokens, Q queries, L layers, E routed experts (shared ones are left out), K chosen, G groups of
data, N sequences of all batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.core.patch import Patch
from zoo.models import Model
from zoo.tasks import Batch

SHUFFLES = 20


class Usage(NamedTuple):
    """chosen (L,N,E): how many tokens of each sequence chose each expert; together (L,E,E): share of tokens that chose
    both experts, on the diagonal those that chose one; group (N): Batch.group, or None."""

    chosen: Tensor
    together: Tensor
    group: Tensor | None

    def load(self) -> Tensor:
        """Choices of each expert over the mean, (L,E): 1 at balance, 0 for an expert that no token chose."""
        count_LE = self.chosen.sum(1)
        return count_LE / count_LE.mean(1, keepdim=True)

    def by_group(self, order: Tensor | None = None) -> Tensor:
        """Choices by group and expert, (L,G,E); order: another order of the groups among sequences."""
        assert self.group is not None
        group = self.group if order is None else self.group[order]
        return F.one_hot(group).to(self.chosen).mT @ self.chosen


@torch.no_grad()
def usage(model: Model, batches: Iterable[Batch]) -> Usage:
    """The use of experts over all tokens of the batches; raises ValueError for a model without experts."""
    chosen: list[Tensor] = []
    groups: list[Tensor] = []
    pairs_LEE, tokens = torch.zeros(()), 0
    for batch in batches:
        patches = model.decoder(batch.tokens, batch.n_context)[1]
        sets_LBTE = torch.stack([expert_sets(patch) for patch in _routed(patches).values()]).double()
        if (real_BT := model.decoder.real(batch.tokens)) is not None:
            sets_LBTE = sets_LBTE * real_BT.unsqueeze(-1)
        chosen.append(sets_LBTE.sum(2))
        pairs_LEE = pairs_LEE + (sets_LBTE.mT @ sets_LBTE).sum(1)
        tokens += int(sets_LBTE[0].any(-1).sum())
        groups += [] if batch.group is None else [batch.group]
    return Usage(torch.cat(chosen, 1), pairs_LEE / tokens, torch.cat(groups) if groups else None)


def routed_layers(model: Model) -> list[int]:
    """The layers in which a router chooses what each token uses: the L of all that is counted here."""
    batch = model.task.batch("test", 0, 1)
    return [layer for layer, patch in enumerate(model.decoder(batch.tokens, batch.n_context)[1]) if patch.routing]


def _routed(patches: list[Patch]) -> dict[int, Patch]:
    if found := {layer: patch for layer, patch in enumerate(patches) if patch.routing}:
        return found
    raise ValueError("the model has no experts: no router chooses what its tokens use")


def expert_sets(patch: Patch) -> Tensor:
    """The routed experts that each token chose, (*,T,E), boolean; shared experts have later ids."""
    assert patch.routing is not None
    experts = torch.arange(patch.routing.logits.shape[-1], device=patch.routing.index.device)
    return (patch.routing.index.unsqueeze(-1) == experts).any(-2)


def mutual_information(counts: Tensor) -> Tensor:
    """2 I(X;Y)/(H(X) + H(Y)) of a table of counts (*,X,Y): (*), 0 if independent, 1 if each tells the other.

    The arithmetic mean of the entropies normalises (Vinh, Epps & Bailey 2010, JMLR 11); nan if nothing varies. A
    table of few counts is above 0 by chance.
    """
    p = counts / counts.sum((-2, -1), keepdim=True)
    joint, first, second = (torch.special.entr(q).sum(-1) for q in (p.flatten(-2), p.sum(-1), p.sum(-2)))
    return 2 * (first + second - joint) / (first + second)


@torch.no_grad()
def information(model: Model, batches: Sequence[Batch], redraws: int = 5) -> dict[str, Tensor]:
    """Mutual information of chosen expert and group by layer, (·,L), as trained and for its controls: above all for
    routers drawn anew, which read the same states but were never trained to choose."""
    own = usage(model, batches)
    generator = torch.Generator().manual_seed(0)
    # whole sequences are shuffled: their tokens share a text, which alone makes experts and labels depend
    orders = [torch.randperm(own.chosen.shape[1], generator=generator) for _ in range(SHUFFLES)]
    tables = {
        "as trained": [own.by_group()],
        "control: router redrawn": [usage(drawn_anew(model, seed), batches).by_group() for seed in range(redraws)],
        "control: untrained model": [usage(drawn_anew(model, 0, router_alone=False), batches).by_group()],
        "control: domains shuffled": [own.by_group(order) for order in orders],
    }
    return {label: mutual_information(torch.stack(found)) for label, found in tables.items()}


def drawn_anew(model: Model, seed: int, router_alone: bool = True) -> Model:
    """The model with weights as before training: those of its router alone, with all that it reads through, or all."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2_718_281_828 + seed)  # a run's own seed would draw the weights that it started from
        fresh = type(model)(**dict(model.hparams)).to(model.device, model.dtype)
    if router_alone:
        trained = {name: value for name, value in model.state_dict().items() if ".context_to_delta." not in name}
        fresh.load_state_dict(trained, strict=False)
    return fresh.requires_grad_(False).eval()


@torch.no_grad()
def switched(model: Model, tokens: Tensor, n_context: int) -> tuple[Tensor, Tensor]:
    """The share of tokens after the first n_context that choose other experts when these are taken away, by layer, (L).

    Twice: of the stored router on the stream of the patched layers below, and of one that is patched like the other
    readers of its state, which chooses as with the context (Goldwaser et al. 2025, arXiv 2511.17864) unless it reads
    the mean of the context. Raises ValueError for a model without experts.
    """
    shares: list[Tensor] = []
    for layer, patch in _routed(model.deltas(tokens, n_context, n_context)).items():
        assert patch.input is not None, "the form of the patch is shear"
        z = patch.input.a
        contextual = expert_sets(patch).squeeze(2)
        alone = [expert_sets(model.decoder.emit(state, layer, 0)) for state in (z, z + patch.input.shift)]
        shares.append(torch.stack([(chosen != contextual).any(-1).double().mean() for chosen in alone]))
    reduced, sheared = torch.stack(shares, 1)
    return reduced, sheared
