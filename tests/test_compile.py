"""torch.compile: every family is one graph, and a compiled run writes what an uncompiled one writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import zoo
from cases import CASES, Case, batch_of, build
from runs import small
from zoo.bench.timing import saved_bytes


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.compiler.reset()
    return


# tracing takes seconds: one case of each family is traced with the fast tests
FAST = {"hypernet-chunk", "moe-token"}


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name, marks=[] if case.name in FAST else [pytest.mark.slow]) for case in CASES],
)
def test_one_graph_without_breaks_for_all_batches(case: Case) -> None:
    """aot_eager traces forward and backward as inductor would, without its minute of code generation."""
    case = case._replace(options={**case.options, "layers": 1})  # each layer is traced anew, which takes seconds
    model, plain = build(case).float(), build(case).float()
    model.decoder.compile(fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for k in range(2):
            batch = batch_of(model)._replace(tokens=model.task.batch("train", k, 3).tokens)
            losses = [m.task.token_losses(m(batch.tokens, batch.n_context), batch).mean() for m in (model, plain)]
            for loss in losses:
                loss.backward()
            torch.testing.assert_close(*losses, rtol=0, atol=1e-5)
    for (name, parameter), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=0, atol=1e-4, msg=name)
    assert list(model.state_dict()) == list(plain.state_dict())


def test_other_lengths_after_training_are_compiled_too() -> None:
    """The test leaves contexts out: lengths become symbols, and what attention asks of them must be plain."""
    model = build(next(case for case in CASES if case.name == "transformer-noise-gqa-tied")).float()
    model.decoder.compile(fullgraph=True, backend="eager")
    tokens = batch_of(model).tokens
    with torch.no_grad():
        assert [model(tokens[:, :T]).shape[1] for T in (12, 7, 5)] == [12, 7, 5]


@pytest.mark.slow
def test_activation_checkpointing_holds_in_compiled_code() -> None:
    model = build(next(case for case in CASES if case.name == "moe-token")).float().train()
    batch = model.task.batch("train", 0, 32)
    plain = saved_bytes(lambda: model.training_step(batch, 0))
    model.decoder.activation_checkpointing = True
    model.decoder.compile(fullgraph=True, backend="aot_eager")
    assert saved_bytes(lambda: model.training_step(batch, 0)) < plain / 4


def test_a_graph_break_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(CASES[0]).float()
    unembed = model.decoder.unembed

    def broken(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return unembed(x)

    monkeypatch.setattr(model.decoder, "unembed", broken)
    model.decoder.compile(fullgraph=True, backend="aot_eager")
    batch = batch_of(model)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        model(batch.tokens.float(), batch.n_context)


@pytest.mark.slow
def test_a_compiled_run_ends_like_an_uncompiled_one(tmp_path: Path) -> None:
    """Of the mixture of experts, which has all that the transformer has and operators of its own."""

    made = {name: small(tmp_path / name, "moe", "noise", compile=name == "compiled") for name in ("eager", "compiled")}
    assert made["compiled"]["test"]["nats"] == pytest.approx(made["eager"]["test"]["nats"], abs=1e-5)
    states = [zoo.load(tmp_path / name).state_dict() for name in ("eager", "compiled")]
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=0, atol=1e-4)
