"""The toy block: the law holds for every contextual layer, and its experiments show what their captions say."""

import pytest
import torch

from zoo.lens.figure import Figure, Series
from zoo.papers import toy, toy_figures
from zoo.papers.toy import LAYERS, Toy, data


def doubles(points: int = 12, queries: int = 3, functions: int = 4) -> tuple[torch.Tensor, ...]:
    return tuple(t.double() for t in data(1, "test", 0, functions, points, queries))


def by_label(figure: Figure, panel: int = 0) -> dict[str, Series]:
    return {series.label.split(": slope")[0]: series for series in figure.panels[panel].series}  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def trained() -> Toy:
    torch.set_num_threads(1)
    return toy.trained("attention", 0, 150, 30)


@pytest.mark.parametrize("layer", LAYERS)
def test_the_query_alone_with_dense_patched_weights_predicts_as_with_the_context(layer: str) -> None:
    model = Toy(layer, 0).double()
    context, query, _ = doubles()
    with torch.no_grad():
        wanted = model(context, query)
        assert (model.through_delta(context, query) - wanted).abs().max() < 1e-12
        assert (model(context[:, :0], query) - wanted).abs().max() > 1e-2
        assert (model.through_delta(context.flip(0), query) - wanted).abs().max() > 1e-3  # another function's context


@pytest.mark.parametrize("layer", LAYERS)
def test_a_query_reads_the_whole_context_and_itself(layer: str) -> None:
    model = Toy(layer, 0).double()
    context, query, _ = (t.requires_grad_() for t in doubles())
    of_context, of_query = torch.autograd.grad(model(context, query)[:, 1].sum(), (context, query))
    assert of_context.any(-1).all()
    assert of_query.any(-1).all(0).tolist() == [False, True, False]


def test_experiments_are_functions_of_their_seed_and_leave_the_global_one_alone() -> None:
    sizes = {"steps": 4, "points": 5, "functions": 8, "every": 2}
    state = torch.random.get_rng_state()
    first, again, other = (toy_figures.loss_through_delta(seed, **sizes).plain() for seed in (0, 0, 1))
    assert first == again
    assert first["panels"][0]["series"][1]["y"] != other["panels"][0]["series"][1]["y"]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_training_makes_as_many_steps_as_it_is_told() -> None:
    drawn, untrained, once = Toy("attention", 0), *(toy.trained("attention", 0, steps, 5) for steps in (0, 1))
    assert torch.equal(untrained.inner.weight, drawn.inner.weight)
    assert not torch.equal(Toy("attention", 1).inner.weight, drawn.inner.weight)
    change = (once.inner.weight - drawn.inner.weight).abs().max().item()
    assert change == pytest.approx(toy.LR, rel=1e-2)  # a first step of Adam


def test_loss_through_delta_is_the_loss_with_the_context_and_falls() -> None:
    figure = toy_figures.loss_through_delta(steps=100, points=30, functions=128, every=25)
    loss, gap = by_label(figure), by_label(figure, 1)
    with_context, through = loss["validation, with the context"], loss["validation, query alone, W + ΔW"]
    assert list(with_context.x) == [0, 25, 50, 75, 100]
    assert through.y == pytest.approx(with_context.y, rel=1e-5)
    assert with_context.y[-1] < 0.3 * with_context.y[0]
    assert min(loss["control: query alone, W"].y) > 0.5
    assert loss["training (mean of 25 steps)"].y[-1] < 0.5 * loss["training (mean of 25 steps)"].y[0]
    assert max(gap["float32"].y) < 1e-5
    assert max(gap["float64"].y) < 1e-12
    assert max(gap["float64"].y) < min(gap["float32"].y)
    assert min(gap["control: without ΔW, float32"].y) > 1e-2


def test_increments_are_the_norms_of_differences_of_dense_updates() -> None:
    model = Toy("attention", 0).double()
    context, query, _ = doubles(points=6)
    with torch.no_grad():
        sizes_BC = toy_figures.increments(model, context, query)
        W = model.inner.weight
        dense = [model.delta(context[:, :i], query[:, :1]).dense(W)[:, 0] for i in range(7)]
        wanted = [torch.linalg.matrix_norm(dense[i + 1] - dense[i]) for i in range(1, 6)]
        assert (sizes_BC - torch.stack(wanted, 1)).abs().max() < 1e-12


def test_slope_of_a_power_law() -> None:
    x = range(1, 101)
    series = Series("a", x, [5.0 / i**1.5 if i >= 10 else 1.0 for i in x])
    assert toy_figures.slope(series) == pytest.approx(-1.5)


@pytest.mark.slow
def test_increments_decay_by_averaging_not_by_learning() -> None:
    extra = Series("other", (1, 2), (1.0, 0.5))
    figure = toy_figures.increments_of_delta(
        steps=150, points=100, functions=48, trained_points=30, more_increments=[extra]
    )
    size, loss = by_label(figure), by_label(figure, 1)
    slopes = {name: toy_figures.slope(series) for name, series in size.items() if series is not extra}
    for name in ("attention, trained", "attention, untrained", "mean pooling, untrained"):
        assert slopes[name] == pytest.approx(-1, abs=0.1), slopes
    assert abs(slopes["recurrent (GRU), trained"]) < 0.2
    assert slopes["1/i"] == pytest.approx(-1)
    for name in ("attention, trained", "recurrent (GRU), trained"):
        at = dict(zip(loss[name].x, loss[name].y, strict=True))
        assert at[30] < 0.5 * at[0], (name, at)
    assert min(loss["attention, untrained"].y) > 0.5
    assert size["other"] is extra


def test_fine_tuning_takes_plain_gradient_steps_on_the_named_parameters(trained: Toy) -> None:
    context, _, _ = data(1, "test", 0, 1, 2)
    start, stages = trained.inner.weight.clone(), toy_figures.fine_tuned(trained, ["inner.weight"], context[0], 0.1)
    weights = [stage.inner.weight.detach().clone() for stage in stages]
    assert torch.equal(weights[0], start)
    assert torch.equal(trained.inner.weight, start)
    # by hand: ½(ŷ − y)² has the gradient (ŷ − y) ∂ŷ/∂W
    query = context[:, :1] * torch.tensor([1.0, 1.0, 0.0])
    prediction = trained(query[:, :0], query)
    (gradient,) = torch.autograd.grad(prediction.sum(), trained.inner.weight)
    wanted = start - 0.1 * (prediction - context[0, 0, -1]).detach() * gradient
    assert torch.allclose(weights[1], wanted, atol=1e-6)
    assert not torch.allclose(weights[1], start, atol=1e-4)
    *_, last = toy_figures.fine_tuned(trained, ["inner.weight"], context[0], 0.1)
    assert torch.equal(last.readout.weight, trained.readout.weight)


def test_delta_and_fine_tuning_start_together_and_both_learn(trained: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy_figures, "trained", lambda *args: trained)
    figure = toy_figures.delta_and_fine_tuning(points=30, functions=8, queries=25)
    series = by_label(figure)
    starts = [one.y[0] for one in series.values()]
    assert starts == pytest.approx([starts[0]] * 4, rel=1e-4)
    for name in ("the examples as ΔW of W", "SGD on all parameters"):
        assert series[name].x[-1] == 30
        assert series[name].y[-1] < 0.3 * starts[0]
    assert series["SGD on W alone"].y[-1] > 2 * series["SGD on all parameters"].y[-1]
    assert len(set(series["control: no example used"].y)) == 1
