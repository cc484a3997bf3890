"""The benchmark's instrument: ratios by rounds, bytes kept for the backward pass, kernels alone."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import zoo
from runs import QUIET
from test_readme import ROOT
from zoo.bench import __main__ as bench
from zoo.bench import growth, timing
from zoo.bench.layers import DIM, HIDDEN, TOKENS, mixture
from zoo.bench.timing import Case, Rates, Row, Setting, backward, kernels, measure, saved_bytes
from zoo.models import MODELS

CPU, RATES = torch.device("cpu"), Rates(90e9, 9e9)


def test_a_ratio_is_the_median_over_rounds_of_the_ratio_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that gets ten times slower from round to round leaves the ratios alone."""
    calls: list[str] = []
    speed = {"plain": 1.0, "twice": 2.0}

    def clock(work: object, device: torch.device) -> float:
        name = work()  # type: ignore[operator]
        calls.append(name)
        return speed[name] * 10 ** ((len(calls) - 1) // 2)

    monkeypatch.setattr(timing, "stopwatch", clock)
    work: dict[str, Callable[[], object]] = {name: lambda name=name: name for name in speed}
    case = Case("c", "plain", work, {("twice", "plain"): 1.5, ("plain", "twice"): 0.6})
    row, reverse = measure(case, Setting(CPU, rates=RATES, rounds=5))
    assert (row.ratio, row.low, row.high, row.bar) == (2.0, 2.0, 2.0, 1.5)
    assert (reverse.variant, reverse.baseline, reverse.ratio, reverse.bar) == ("plain", "twice", 0.5, 0.6)
    assert calls[:4] == ["plain", "twice", "twice", "plain"]  # none is always first
    assert "≤ 1.50 ✗" in bench.table([row])
    assert "✗" not in bench.table([reverse])


def test_a_variant_may_take_its_own_time() -> None:
    work = {"slow": lambda: 3.0, "fast": lambda: 1.0}
    (row,) = measure(Case("c", "fast", work), Setting(CPU, rates=RATES, rounds=3))
    assert (row.ratio, row.seconds, row.megabytes) == (3.0, 3.0, 0.0)


def test_saved_bytes_leave_parameters_out_and_count_storages_once_while_they_live() -> None:
    linear = nn.Linear(256, 256)
    x = torch.zeros(64, 256, requires_grad=True)
    assert saved_bytes(lambda: linear(x)) == x.nbytes
    assert saved_bytes(lambda: linear.weight.square()) == 0
    assert saved_bytes(lambda: (x * x).exp()) == 2 * x.nbytes  # x once, the result of exp
    assert saved_bytes(lambda: [x.exp().sum().backward() for _ in range(3)]) == x.nbytes
    assert saved_bytes(lambda: [x.exp() for _ in range(3)]) == 3 * x.nbytes


def test_backward_gives_all_gradients() -> None:
    gradients = backward(nn.Linear(4, 4), torch.randn(2, 4))()
    assert [tuple(g.shape) for g in gradients] == [(2, 4), (4, 4), (4,)]
    assert all(g.any() for g in gradients[:2])
    with torch.autocast("cpu", torch.bfloat16):
        assert backward(nn.Linear(4, 4), torch.randn(2, 4))()[0].dtype == torch.float32


def flops(f: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        f()
    return counter.get_total_flops()


def test_kernels_are_the_products_and_attentions_of_a_step() -> None:
    module, x = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), torch.randn(2, 4, 8)

    def work() -> None:
        module(x).sum().backward()

    assert flops(kernels(work)) == flops(work) > 0
    assert not any(isinstance(p.grad, Tensor) and p.grad.isnan().any() for p in module.parameters())
    assert flops(kernels(lambda: x.exp())) == 0


def test_the_variants_of_a_mixture_compute_the_same() -> None:
    case = mixture(1024, 2, Setting(CPU, 1, RATES))
    assert flops(case.variants["matrix products"]) == 9 * 2 * TOKENS * 2 * HIDDEN * DIM
    ours, theirs = (case.variants[name]() for name in ("moe", "transformers Mixtral, grouped_mm"))
    assert ours[0].norm() > 0
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-3, atol=1e-5)  # gradients of z, which differ between the two


def growing(case: str, first: int, sizes: list[int], ratio: Callable[[float], float]) -> list[Row]:
    values = [(str(size), ratio(size)) for size in sizes]
    return [Row(case, name, str(first), r, r, r, None, 1.0, 1.0) for name, r in values]


def test_growth_is_per_token_and_its_fit_finds_the_line() -> None:
    rows = growing(growth.EXPERTS, 8, [16, 32], lambda e: e / 8)  # total time in proportion to the tokens
    rows += growing(growth.RANK, 1, [4, 8], lambda r: (2 + r) / 3)
    for name in growth.LENGTHS.values():
        rows += growing(name, 128, [256, 512], lambda t: t**2 / 128**2)
    figure = growth.figure(rows)
    experts, rank, lengths = (panel.series for panel in figure.panels)  # type: ignore[union-attr]
    assert experts[0].y == [1, 1, 1]
    assert rank[1].label == "fit 0.67 +0.33·x"
    assert rank[1].y == pytest.approx(rank[0].y)
    assert lengths[1].y != pytest.approx(lengths[0].y, rel=0.1)  # a parabola is no line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["layer"], "section 'layer' does not exist; did you mean layers?"),
        (["layers", "--figure", "x"], "--figure is for the section growth: name it too"),
        (["--page", "absent.md"], "No such file or directory: 'absent.md'"),
        (["--page", __file__], "must have the lines <!-- bench --> and <!-- /bench -->"),
        (["--rounds", "0"], "rounds=0 must be above 0"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("network", ["gpt2", "x-transformers"])
def test_peers_train_as_families_of_ones_own(network: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(network.replace("gpt2", "transformers").replace("-", "_"))
    monkeypatch.setitem(zoo.MODELS, "peer", None)
    monkeypatch.syspath_prepend(ROOT / "docs")
    quality = importlib.import_module("quality")
    zoo.MODELS["peer"] = quality.Peer
    sizes, task = {"dim": 32, "heads": 2, "layers": 2, "hidden": 64}, {"name": "noise", "vocabulary": 8, "tokens": 16}
    options = {"steps": 2, "batch_size": 4, "name": "adamw"}
    model = {"name": "peer", "network": network, **sizes}
    metrics = zoo.train(model, task, options, out=str(tmp_path / "run"), trainer=QUIET)
    ours = zoo.MODELS["transformer"]({"name": "transformer", **sizes}, task, options)
    count = sum(p.numel() for p in ours.decoder.parameters())
    assert abs(metrics["params_total"] - count) < 0.02 * count
    peer, ids = zoo.load(tmp_path / "run"), torch.arange(16)[None] % 8
    changed = ids.clone()
    changed[0, 9] = 0
    difference = (peer(ids) - peer(changed)).abs().amax((0, 2))
    assert not difference[:9].any()
    assert difference[9:].all()


@pytest.mark.slow
def test_quick(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- bench -->\nold\n<!-- /bench -->\nafter\n")
    bench.main(["--quick", "--rounds", "1", "--figure", str(tmp_path / "figures"), "--page", str(page)])
    printed, text = capsys.readouterr().out, page.read_text()
    table = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    cases = {row[0] for row in table[1:]}
    assert len(cases) == 20 + len(MODELS)  # an extraction of each family
    assert cases > {growth.EXPERTS, "default run, 10 steps", "model.deltas of one query, moe"}
    assert all(float(row[2]) > 0 and float(row[-1]) >= 0 for row in table[1:])
    assert f"torch {torch.__version__}" in printed
    header, rows, rest = printed.split("\n\n", 2)
    assert f"{header}\n\n{rows}" in text
    assert rest.startswith(("As fast as wanted: all ", "Slower than wanted in "))  # then the path of the figure
    assert text.startswith("before\n")
    assert "`python -m zoo.bench --quick --rounds 1 " in text
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert (tmp_path / "figures" / "growth.png").exists()
