"""A stranger's family whose weights differ from token to token: a router over low-rank updates made of the context."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoo.core.context import ContextMean, ContextToDelta, Source
from zoo.core.delta import LowRank
from zoo.core.layers import split_chunks
from zoo.core.patch import Patch
from zoo.lens.static import answer, fit, relative_error
from zoo.models.base import ContextConfig, Model

pytestmark = pytest.mark.numeric


@dataclass(frozen=True)
class GatedConfig(ContextConfig):
    name: str = "gated"
    rank: int = 3


class Gated(ContextToDelta):
    reads_query = True  # type: ignore[assignment]

    def __init__(self, config: GatedConfig):
        super().__init__(config.source, config.layers)
        self.rank = config.rank
        self.u, self.v = (
            nn.Linear(config.dim, config.hidden * config.rank),
            nn.Linear(config.dim, config.dim * config.rank),
        )
        self.router = nn.Linear(config.dim, config.rank)

    def update(self, context: ContextMean, layer: int) -> dict[str, Any]:
        u, v = (head(context.mean).unflatten(-1, (-1, self.rank)) for head in (self.u, self.v))
        return {"up": LowRank(u * context.nonempty.unsqueeze(-1), v)}

    def forward(self, z_BTD: Tensor, *args: Any, **options: Any) -> Patch:
        patch = super().forward(z_BTD, *args, **options)
        gate = split_chunks(self.router(z_BTD).softmax(-1), patch.chunk)
        return replace(patch, weights={"up": replace(patch.weights["up"], gate=gate)})


class GatedModel(Model):
    Config = GatedConfig
    Family = Gated


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    sizes = {"name": "gated", "dim": 16, "layers": 2, "heads": 2, "hidden": 24, "attend_context": True}
    return (
        GatedModel(sizes, {"name": "regression", "points": 7, "queries": 20}, {}).double().eval().requires_grad_(False)
    )


def test_the_law_holds(model: Model) -> None:
    tokens = model.task.batch("test", 0, 3).tokens.double()
    contextual = model(tokens, 7)[:, 7:]
    assert (model(tokens[:, 7:], patches=model.deltas(tokens, 7)) - contextual).abs().max() < 1e-10
    assert (model(tokens[:, 7:]) - contextual).abs().max() > 1e-2


def test_a_static_patch_comes_on_top_of_it(model: Model) -> None:
    """It is fitted, as for any family that reads the query: what differs between tokens is in no patch of all."""
    tokens = model.task.batch("test", 0, 1).tokens.double()
    patches = fit(model.decoder, tokens, 7, "output", ridge=0.0)
    nothing = [Patch()] * 2
    assert (
        relative_error(model.decoder, tokens, 7, patches)
        < 1e-3
        < 1e-1
        < relative_error(model.decoder, tokens, 7, nothing)
    )
    assert torch.equal(answer(model.decoder, tokens[:, 7:], nothing), model(tokens[:, 7:]))


def test_its_size_differs_from_token_to_token(model: Model) -> None:
    patch, ffn = model.decoder(model.task.batch("test", 0, 3).tokens.double(), 7)[1][0], model.decoder.blocks[0].ffn
    size_BT = patch.weights["up"].norm(ffn.up)
    each_BT = patch.per_token(torch.arange(27)).weights["up"].norm(ffn.up)
    torch.testing.assert_close(size_BT[:, 7:], each_BT[:, 7:], rtol=1e-10, atol=0)
    values = model.decoder.context_to_delta.metrics(patch, ffn)["delta_norm_up"]  # type: ignore[union-attr]
    assert values.mean().item() == pytest.approx((size_BT.mean() / ffn.up.norm()).item(), rel=1e-6)


def test_one_that_says_it_does_not_read_the_query_is_refused(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gated, "reads_query", False)
    with pytest.raises(ValueError, match="weighs its factors token by token: its reads_query must be True"):
        fit(model.decoder, model.task.batch("test", 0, 1).tokens.double(), 7)


TASKS = [({"name": "regression", "points": 7}, 7), ({"name": "noise", "tokens": 12}, 0)]


@pytest.mark.parametrize(("task", "expected"), TASKS)
def test_running_text_has_no_separate_context(
    task: dict[str, Any], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a law takes for the context: a family that reads the first tokens cannot leak them to each other."""
    seen, forward = [], Gated.forward

    def spy(self: Gated, z: Tensor, layer: int, n_context: int, *rest: Any) -> Patch:
        seen.append(n_context)
        return forward(self, z, layer, n_context, *rest)

    monkeypatch.setattr(Gated, "forward", spy)
    made = GatedModel({"name": "gated", "dim": 16, "layers": 1, "heads": 2, "hidden": 24}, task, {})
    tokens = made.task.batch("test", 0, 1).tokens
    made(tokens, 7)
    made.deltas(tokens, 7)
    assert set(seen) == {expected}


@pytest.mark.parametrize(("tokens", "chunk"), [(12, 6), (63, 31), (128, 32)])
def test_an_open_chunk_fits_short_sequences(tokens: int, chunk: int) -> None:
    made = GatedModel({"name": "gated"}, {"name": "noise", "tokens": tokens}, {})
    assert made.config.source == Source("chunk", chunk)
