"""Figures of trained models, one label per model: what a context does to the weights of each family.

Every figure has its control. Regression gives contexts of pairs and queries that are blind to each other; on text the
context is the first half of a sequence and the query what follows.
Axes: B sequences, T tokens, Q queries, L layers, E experts, G groups of data, K samples.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from zoo.lens import static, structure
from zoo.lens.exact import exact
from zoo.lens.figure import Figure, Heat, Lines, Panel, Series
from zoo.lens.routing import information, routed_layers, switched, usage
from zoo.models import Model

Models = Mapping[str, Model]
PER_LINE = 8  # tokens of generated text


def example(model: Model, size: int) -> tuple[Tensor, int]:
    """Test tokens of the model's task, cut where the first query ends, and how many of them are the context."""
    batch = model.task.batch("test", 0, size)
    n = batch.n_context or model.task.tokens // 2
    return batch.unfilled(), n


@torch.no_grad()
def law_residuals(models: Models, size: int = 32, queries: int = 2) -> Figure:
    """Distance from the contextual output, relative to its largest entry, with dense patched weights."""
    assert size > 1, "the control takes the context of another sequence"
    errors = [_residuals(model, size, queries) for model in models.values()]
    series = tuple(
        Series(label, list(models), [row[label] for row in errors], control="control" in label) for label in errors[0]
    )
    panel = Lines("Largest error over queries", "model", "|y − y(context)| / max |y(context)|", series, log_y=True)
    return Figure(
        "law-residuals",
        "A context equals a weight update",
        (panel,),
        f"{size} contexts, {queries} query tokens each: output of the query alone, with dense patched weights W + ΔW "
        "in a plain forward pass, against the output with the context.",
        "anything about how the context is used: the identity holds for any weights, trained or not.",
        {"contexts": size, "queries": queries, "seed": 0},
    )


def _residuals(model: Model, size: int, queries: int) -> dict[str, float]:
    """Errors with formed weights, and in float64 with those of another context and of the query alone."""
    errors = {}
    for dtype in (torch.float32, torch.float64):
        cast = copy.deepcopy(model).to(dtype)
        tokens, n = example(cast, size)
        tokens = tokens[:, : n + queries]
        tokens = tokens.to(dtype) if tokens.is_floating_point() else tokens
        removed, query = torch.arange(tokens.shape[1]) < n, tokens[:, n:]
        positions = cast.decoder.layout(tokens.shape[1], n).positions[n:]
        contextual = cast(tokens, n)[:, n:]
        contexts: dict[str, Tensor | None] = {str(dtype).removeprefix("torch."): tokens}
        if dtype == torch.float64:
            contexts["control: another context"] = torch.cat([tokens[:, :n].roll(1, 0), query], 1)
            contexts["control: no patch"] = None
        for label, text in contexts.items():
            patches = None if text is None else exact(cast.decoder, text, removed, n_context=n, formed=True)
            difference = cast(query, patches=patches, positions=positions) - contextual
            errors[label] = float(difference.abs().max() / contextual.abs().max())
    return errors


def increments_by_family(models: Models, size: int = 32, queries: int = 4) -> list[Series]:
    """The change of all weights with each further context token, one series per model."""
    series = []
    for name, model in models.items():
        tokens, n = example(model, size)
        mean_i = structure.increments(model, tokens[:, : n + queries], n).mean((1, 2, 3))
        series.append(Series(f"{name}, all layers, relative to |W|", list(range(1, n)), mean_i[1:].tolist()))
    return series


@torch.no_grad()
def static_error(
    models: Models, counts: Sequence[int] = (4, 8, 16, 32, 64, 128, 256), contexts: int = 5, held_out: int = 256
) -> Figure:
    """Held-out error of one patch for all queries against the number of queries it was fitted on, by model."""
    panels = []
    fits = {"control: vector": ("vector", 1e-3)}
    for form in ("matrix", "affine", "output"):
        fits |= {f"{form}, λ₀ = {ridge:g}": (form, ridge) for ridge in (0.0, 1e-3)}
    for name, model in models.items():
        decoder = model.decoder
        tokens, n = example(model, contexts)
        errors: dict[str, list[list[float]]] = {label: [] for label in fits}
        for row in tokens:
            samples = model.task.sample_queries(row[:n], max(counts), "train")
            test = model.task.sample_queries(row[:n], held_out, "validation")
            for label, (form, ridge) in fits.items():
                patches = (static.fit(decoder, samples[:, : n + K], n, form, ridge) for K in counts)
                errors[label].append([static.relative_error(decoder, test, n, patch) for patch in patches])
        medians = {label: torch.tensor(rows).median(0).values.tolist() for label, rows in errors.items()}
        series = [
            Series(label, counts, y, control="control" in label, points=label.endswith("= 0"))
            for label, y in medians.items()
        ]
        hidden, dim = decoder.blocks[0].ffn.gate.shape
        marks = {"K = D": float(dim), "K = hidden units": float(hidden)}
        panels.append(Lines(name, "samples K (queries)", "held-out error / variance", tuple(series), True, True, marks))
    return Figure(
        "static-error",
        "One weight update can stand for a context on queries it has not seen",
        tuple(panels),
        f"Median over {contexts} contexts of Σ|y − y(context)|² / Σ|y(context) − mean|² on {held_out} other queries. "
        "Without ridge (points) the error peaks where K meets the number of unknowns.",
        "that fitted patches carry over to other contexts or tasks. The error on the K samples themselves says "
        "nothing, as it is small even at the peaks.",
        {"contexts": contexts, "held_out": held_out, "seed": 0},
    )


@torch.no_grad()
def changed_experts(models: Models, size: int = 64) -> Figure:
    """Share of tokens that choose other experts when the context goes, by layer, of mixtures of experts."""
    panels = []
    for name, model in models.items():
        tokens, n = example(model, size)
        reduced, sheared = switched(model, tokens, n)
        layers = [str(layer) for layer in routed_layers(model)]
        series = (
            Series("router reads the query alone", layers, reduced.tolist()),
            Series("control: router patched too", layers, sheared.tolist(), control=True),
        )
        panels.append(Lines(name, "layer", "share of tokens with other experts", series))
    return Figure(
        "changed-experts",
        "Without its context, a token goes to other experts",
        tuple(panels),
        f"{size} test sequences; the sets of experts with the context against those of the query alone, on the stream "
        "of the patched layers below.",
        "that routing uses the context well: any change of the state before a router may change its choice.",
        {"sequences": size, "seed": 0},
    )


@torch.no_grad()
def expert_use(models: Models, size: int = 256, redraws: int = 5) -> Figure:
    """The experts of each domain, their information on it beside controls, experts chosen together, and load."""
    panels: list[Panel] = []
    for name, model in models.items():
        batches = [model.task.batch("test", k, 64) for k in range(-(-size // 64))]
        own = usage(model, batches)
        layers, experts = ([str(k) for k in ids] for ids in (routed_layers(model), range(own.together.shape[1])))
        domains = getattr(model.task.config, "domains", None) or ()
        if len(domains) > 1:
            shares = (own.by_group() / own.by_group().sum(-1, keepdim=True)).flatten(0, 1).tolist()
            rows = [f"layer {layer}, {domain}" for layer in layers for domain in domains]
            panels.append(Heat(f"{name}: use by domain", "expert", "", "share of choices", shares, experts, rows))
            series = []
            for label, x in information(model, batches, redraws).items():
                low, high = (x.amin(0).tolist(), x.amax(0).tolist()) if len(x) > 1 else ((), ())
                series.append(Series(label, layers, x.mean(0).tolist(), low, high, "control" in label))
            title = f"{name}: what experts tell of the domain"
            panels.append(Lines(title, "layer", "normalised mutual information", tuple(series)))
        both_LEE = own.together.masked_fill(torch.eye(len(experts), dtype=torch.bool), torch.nan)
        if both_LEE.nan_to_num().any():  # a token uses more than one
            shares = both_LEE.flatten(0, 1).tolist()
            rows = [f"layer {layer}, expert {expert}" for layer in layers for expert in experts]
            panels.append(Heat(f"{name}: chosen together", "expert", "", "share of tokens", shares, experts, rows))
        load = [Series(f"layer {k}", experts, row) for k, row in zip(layers, own.load().tolist(), strict=True)]
        panels.append(Lines(f"{name}: load", "expert", "choices / mean over experts", tuple(load)))
    return Figure(
        "expert-use",
        "What experts are used for",
        tuple(panels),
        f"{size} test sequences. Information of the chosen expert and the domain of the text: 0 if it tells nothing, 1 "
        f"if it tells the domain. Redrawn: the trained model with new random routers, mean and range of {redraws}.",
        "that experts specialise, unless it stands above that of redrawn routers: the states of domains differ, so any "
        "router tells them apart to some degree, one with random weights too.",
        {"sequences": size, "redraws": redraws, "seed": 0},
    )


@torch.no_grad()
def norms_and_alignment(models: Models, size: int = 16, queries: int = 8) -> Figure:
    """Size of ΔW by layer and matrix, and how the updates of one layer align between contexts and queries."""
    panels: list[Panel] = []
    for name, model in models.items():
        tokens, n = example(model, size)
        tokens = tokens[:, : n + queries]
        relative = structure.relative_norms(model, tokens, n).mean((2, 3))
        layers = [f"layer {layer}" for layer in range(len(relative))]
        matrices, output = structure.names(model), model.decoder.blocks[-1].ffn.output_matrix
        panels.append(Heat(f"{name}: size", "matrix", "layer", "|ΔW| / |W|, mean", relative.tolist(), matrices, layers))
        cosines = structure.cosines(structure.grid(model, tokens[:4], n)[output]).tolist()
        title, x = f"{name}: alignment, last layer, {output}", f"update (4 contexts × {queries} queries)"
        panels.append(Heat(title, x, "update, context by context", "cosine of ΔW and ΔW′", cosines, diverging=True))
    return Figure(
        "norms-and-alignment",
        "How large the updates are, and who shares them",
        tuple(panels),
        f"Left: mean over {size} contexts and {queries} queries. Right: the same {queries} queries after 4 contexts; "
        "square blocks along the diagonal mean that the context decides, stripes that the query does.",
        "that a large update matters more: effects depend on what the matrix reads. Updates of rank 1 from one query "
        "align by construction where they share its state.",
        {"contexts": size, "queries": queries, "seed": 0},
    )


@torch.no_grad()
def generation_strip(models: Models, lines: int = 4, prompt: int = 64) -> Figure:
    """Greedy text after a prompt: with the context, from one token and its patches, and from that token alone."""
    count = lines * PER_LINE
    texts: dict[str, list[str]] = {}
    other: dict[str, Tensor] = {}
    same: dict[str, str] = {}
    for name, model in models.items():
        start = model.task.batch("test", 0, 4).tokens[:, :prompt]
        greedy = {way: _greedy(model, start, count, way) for way in WAYS}
        for way, ids in greedy.items():
            label, differs = f"{name}, {way}", ids != greedy["context"]
            texts[label] = [model.task.decode([i]).decode("utf-8", "replace") for i in ids[-1].tolist()]
            other[label] = differs[-1].float()
            same[label] = f"{int((~differs).sum())} of {ids.numel()}"
    cuts = [slice(first, first + PER_LINE) for first in range(0, count, PER_LINE)]
    title = f"{count} greedy tokens after {prompt} tokens, the last of 4 prompts"
    values = [other[label][cut].tolist() for cut in cuts for label in texts]
    shown = [texts[label][cut] for cut in cuts for label in texts]
    meaning = "0: as with the context, 1: another token"
    panel = Heat(title, "", "", meaning, values, y_names=[*texts] * len(cuts), texts=shown)
    return Figure(
        "generation-strip",
        "Text from one token and its weight updates",
        (panel,),
        "Each token of W + ΔW comes from a forward pass over the newest token alone, with the patches that stand for "
        "all tokens before it, made anew for each token. Equal to those with the context, over 4 prompts: "
        + "; ".join(f"{label}: {text}" for label, text in same.items() if not label.endswith("context"))
        + ".",
        "that patches are a cheaper memory: each one is made by a pass over the whole context.",
        {"count": count, "prompt": prompt, "seed": 0, **same},
    )


def _through_patches(model: Model, tokens: Tensor) -> Tensor:
    """Logits (B,1,V) from the last token alone, patched with what stands for all others."""
    T = tokens.shape[1]
    patches = model.deltas(tokens, T - 1, 0)
    return model(tokens[:, -1:], patches=patches, positions=torch.tensor([T - 1]))


WAYS: dict[str, Callable[[Model, Tensor], Tensor]] = {
    "context": lambda model, tokens: model(tokens),
    "W + ΔW": _through_patches,
    "control: W": lambda model, tokens: model(tokens[:, -1:]),
}
"""From tokens to the logits of the next one, those at the last place."""


def _greedy(model: Model, tokens: Tensor, count: int, way: str) -> Tensor:
    for _ in range(count):
        tokens = torch.cat([tokens, WAYS[way](model, tokens)[:, -1:].argmax(-1)], 1)
    return tokens[:, -count:]
