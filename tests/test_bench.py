"""The benchmark's instrument: ratios by rounds, bytes that live at once, bytes kept for the backward pass."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from zoo.bench import __main__ as bench
from zoo.bench import timing
from zoo.bench.seats import backward, products
from zoo.bench.timing import Case, Row, measure, peak_bytes, saved_bytes

CPU = torch.device("cpu")


def test_a_ratio_is_the_median_over_rounds_of_the_ratio_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that gets ten times slower from round to round leaves the ratios alone."""
    calls: list[str] = []
    speed = {"plain": 1.0, "twice": 2.0}

    def clock(work: object, device: torch.device) -> float:
        name = work()  # type: ignore[operator]
        calls.append(name)
        return speed[name] * 10 ** ((len(calls) - 1) // 2)

    monkeypatch.setattr(timing, "stopwatch", clock)
    case = Case("s", "c", "plain", {name: lambda name=name: name for name in speed}, {"twice": 1.5})
    (row,) = measure(case, 5, CPU)
    assert (row.ratio, row.low, row.high, row.pairs, row.bar) == (2.0, 2.0, 2.0, 5, 1.5)
    assert calls[:4] == ["plain", "twice", "twice", "plain"]  # none is always first
    assert "≤ 1.50 ✗" in bench.table([row], {"device": "x"})
    assert "✗" not in bench.table([Row(**{**vars(row), "bar": 2.5})], {"device": "x"})


def test_peak_counts_what_lives_at_once() -> None:
    def work() -> torch.Tensor:
        a = torch.zeros(1 << 18)  # a megabyte
        b = a + 1
        del a
        c = b * 2
        del b
        return c.view(2, -1).sum()  # a view needs no memory

    assert peak_bytes(work, CPU) == pytest.approx(2 << 20, abs=64)


def test_saved_bytes_leave_parameters_out_and_count_storages_once() -> None:
    linear = nn.Linear(256, 256)
    x = torch.zeros(64, 256, requires_grad=True)
    assert saved_bytes(lambda: linear(x)) == x.nbytes
    assert saved_bytes(lambda: (x * x).exp()) == 2 * x.nbytes  # x once, the result of exp


def test_backward_gives_all_gradients() -> None:
    gradients = backward(nn.Linear(4, 4), torch.randn(2, 4))()
    assert [tuple(g.shape) for g in gradients] == [(2, 4), (4, 4), (4,)]
    assert all(g.any() for g in gradients[:2])


def test_the_matrix_products_have_the_flops_of_a_gated_network() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        products(8, 16, CPU)()
    assert counter.get_total_flops() == 9 * 2 * 8 * 16 * 256


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["seat"], "unknown section seat; sections: seats, growth, steps, loops"),
        (["--rounds", "0"], "--rounds 0 and --threads 1 must be at least 1"),
        (["--device", "tpu"], "--device tpu is not there"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        bench.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_quick(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench.main(["--quick", "--rounds", "1", "--json", str(tmp_path / "bench.json")])
    printed = capsys.readouterr().out
    content = json.loads((tmp_path / "bench.json").read_text())
    assert {row["section"] for row in content["rows"]} == set(bench.SECTIONS)
    assert all(row["ratio"] > 0 and row["peak_mb"] >= 0 for row in content["rows"])
    assert printed.count("\n| ") == len(content["rows"]) + 1  # and a head
    assert content["machine"]["torch"] == torch.__version__
