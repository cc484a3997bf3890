"""The command that looks into checkpoints: reports, figures, patch files, and messages for what cannot be."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import zoo
from cases import Case, build, shared
from runs import SIZES, small
from zoo import analyze
from zoo.lens import draw, figures, report, static
from zoo.lens.figure import Heat, Lines
from zoo.models import MODELS
from zoo.papers import patches

FAMILIES = ("transformer", "hypernet", "moe")


@pytest.fixture(scope="module")
def regression(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return trained(tmp_path_factory.mktemp("regression"), "regression")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return trained(tmp_path_factory.mktemp("text"), "text")


def trained(folder: Path, task: str) -> dict[str, Path]:
    for family in FAMILIES:
        small(folder / family, family, task)
    return {family: folder / family for family in FAMILIES}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    fewer: dict[str, Callable] = {
        "law-residuals": functools.partial(figures.law_residuals, size=4),
        "static-error": functools.partial(figures.static_error, counts=(4, 24), contexts=2, held_out=32),
        "changed-experts": functools.partial(figures.changed_experts, size=4),
        "expert-use": functools.partial(figures.expert_use, size=64, redraws=2),
        "norms-and-alignment": functools.partial(figures.norms_and_alignment, size=4, queries=3),
        "generation-strip": functools.partial(figures.generation_strip, prompt=8),
    }
    for name, function in fewer.items():
        monkeypatch.setitem(report.TRAINED, name, function)
    monkeypatch.setattr(draw, "DPI", 50)


def models_of(runs: dict[str, Path]) -> figures.Models:
    return {name: zoo.load(path).requires_grad_(False) for name, path in runs.items()}


def series_of(panel: Lines) -> dict[str, list[float]]:
    return {series.label: list(series.y) for series in panel.series}


@pytest.mark.parametrize("task", ["regression", "text"])
def test_residuals_of_the_law_and_their_controls(task: str, request: pytest.FixtureRequest) -> None:
    models = models_of(request.getfixturevalue(task))
    (panel,) = figures.law_residuals(models, size=4).panels
    assert isinstance(panel, Lines)
    y = series_of(panel)
    assert max(y["float64"]) <= 1e-10
    assert 1e-10 < max(y["float32"]) <= 1e-5
    assert min(y["control: another context"] + y["control: no patch"]) > 1e-3
    assert all(p.dtype == torch.float32 for p in models["moe"].parameters())


def test_the_law_figure_sees_a_wrong_patch(regression: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = models_of(regression)["transformer"]
    exact = figures.exact
    monkeypatch.setattr(figures, "exact", lambda *args, **kw: [*exact(*args, **kw)[:-1], exact(*args, **kw)[0]])
    (panel,) = figures.law_residuals({"transformer": model}, size=4).panels
    assert isinstance(panel, Lines)
    assert series_of(panel)["float64"][0] > 1e-3


def test_generation_through_patches_gives_the_same_tokens(text: dict[str, Path]) -> None:
    figure = figures.generation_strip(models_of(text), prompt=8)
    (panel,) = figure.panels
    assert isinstance(panel, Heat)
    assert list(panel.y_names) == [f"{name}, {way}" for name in FAMILIES for way in figures.WAYS] * 4
    for row, name in enumerate(panel.y_names):
        values = torch.tensor(panel.values[row])
        assert len(values) == len(panel.texts[row]) == 8
        if name.endswith("ΔW"):
            assert not values.any()
            assert panel.texts[row] == panel.texts[row - 1]
    assert [figure.settings[f"{name}, W + ΔW"] for name in FAMILIES] == ["128 of 128"] * 3
    assert torch.tensor(panel.values).any()


def test_static_error_falls_with_samples_and_ridge_but_not_for_a_vector(regression: dict[str, Path]) -> None:
    models = {"transformer": models_of(regression)["transformer"]}
    (panel,) = figures.static_error(models, counts=(4, 64), contexts=3, held_out=64).panels
    assert isinstance(panel, Lines)
    y = series_of(panel)
    assert y["affine, λ₀ = 0.001"][1] < 0.5 * y["affine, λ₀ = 0.001"][0]
    assert y["affine, λ₀ = 0.001"][1] < 0.5 * y["control: vector"][1]
    assert panel.marks == {"K = D": 16.0, "K = hidden units": 16.0}


def test_norms_and_alignment(regression: dict[str, Path]) -> None:
    panels = figures.norms_and_alignment(models_of(regression), size=4, queries=3).panels
    assert [panel.title.partition(":")[0] for panel in panels] == [name for name in FAMILIES for _ in range(2)]
    hypernet = panels[3]
    assert isinstance(hypernet, Heat)
    cosine = torch.tensor(hypernet.values).unflatten(0, (4, 3)).unflatten(2, (4, 3))
    torch.testing.assert_close(cosine, cosine[:, :1, :, :1].expand_as(cosine), rtol=0, atol=1e-5)  # the context alone
    transformer = panels[1]
    assert isinstance(transformer, Heat)
    assert torch.tensor(transformer.values).std() > 0.01


def test_changed_experts_need_a_mixture(regression: dict[str, Path]) -> None:
    models = models_of(regression)
    (panel,) = report.make("changed-experts", models).panels
    assert isinstance(panel, Lines)
    y = series_of(panel)
    assert max(y["router reads the query alone"]) > 0
    assert max(y["control: router patched too"]) == 0
    for name in ("changed-experts", "expert-use"):
        with pytest.raises(ValueError, match=f"{name} needs a mixture of experts among the checkpoints"):
            report.make(name, {"transformer": models["transformer"]})


def test_the_use_of_experts_by_domain_stands_beside_its_controls() -> None:
    task = {"name": "text", "tokens": 16, "domains": ["law", "medicine"]}
    model = MODELS["moe"](model={"name": "moe", **SIZES}, task=task, optim={}).eval().requires_grad_(False)
    use, information, together, load = figures.expert_use({"moe": model}, size=64, redraws=2).panels
    assert isinstance(use, Heat)
    assert list(use.y_names) == [f"layer {layer}, {domain}" for layer in (0, 1) for domain in ("law", "medicine")]
    assert torch.tensor(use.values).sum(-1).tolist() == pytest.approx([1] * 4)
    assert isinstance(information, Lines)
    controls = ["router redrawn", "untrained model", "domains shuffled"]
    assert [series.label for series in information.series] == ["as trained", *(f"control: {c}" for c in controls)]
    assert [series.control for series in information.series] == [False, True, True, True]
    assert [bool(series.low) for series in information.series] == [False, True, False, True]
    assert isinstance(together, Heat)
    both = torch.tensor(together.values).unflatten(0, (2, 4))
    assert both.diagonal(dim1=1, dim2=2).isnan().all()
    assert both.nan_to_num().sum((1, 2)).tolist() == pytest.approx([2, 2])  # two of four experts, in either order
    assert isinstance(load, Lines)
    assert [sum(series.y) for series in load.series] == pytest.approx([4, 4])


def test_numbers_of_a_context_that_is_separate(regression: dict[str, Path]) -> None:
    models = models_of(regression)
    numbers = {name: report.summary(model, size=4) for name, model in models.items()}
    for name, model in models.items():
        values = model.task.evaluate(lambda tokens, n, model=model: model(tokens, n), model.task.batch("test", 0, 64))  # type: ignore[misc]
        gap = (values["nmse_wrong_context"] - values["nmse"]).mean()
        assert numbers[name]["error with a wrong context minus right"] == pytest.approx(gap.item())
    share = "variance of ΔW between contexts, last layer, "
    (of_hypernet,) = (value for name, value in numbers["hypernet"].items() if name.startswith(share))
    assert of_hypernet == pytest.approx(1, abs=1e-3)


def test_ranks_are_those_of_the_matrix_that_changes_most() -> None:
    numbers = report.summary(shared("hypernet-segment-down"), size=4)
    assert 0.99 < numbers["effective rank of ΔW, last layer, down"] < 2.01  # what is emitted has rank 2


def test_increments_of_families_fall(regression: dict[str, Path]) -> None:
    for series in figures.increments_by_family(models_of(regression), size=4, queries=2):
        assert list(series.x) == list(range(1, 5))
        assert series.y[-1] < series.y[0]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["regression", "text"])
def test_report(
    task: str, quick: None, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = request.getfixturevalue(task)
    assert analyze.main(["report", *map(str, runs.values()), "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    content = json.loads((tmp_path / "report.json").read_text())
    assert set(content["numbers"]) == set(FAMILIES)
    page = (tmp_path / "report.md").read_text()
    shown = re.findall(r"!\[[^]]*\]\(([^)]*)\)", page)
    special = "static-error" if task == "regression" else "generation-strip"
    assert {f"{name}.png" for name in content["figures"]} == set(shown)
    assert special in content["figures"]
    assert all((tmp_path / name).stat().st_size > 10_000 for name in shown)
    assert not list(tmp_path.glob("*tmp*"))
    for row in content["numbers"]["moe"]:
        assert row.replace("|", "\\|") in page
        assert row.replace("|", "\\|") in printed
    table = [line for line in page.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {len(FAMILIES) + 2}
    for figure in content["figures"].values():
        assert figure["caveat"] in page


def test_a_report_lies_in_the_run_folder(quick: None, text: dict[str, Path]) -> None:
    assert analyze.main(["report", str(text["transformer"])]) == 0
    assert "## A context equals a weight update\n" in (text["transformer"] / "report/report.md").read_text()


@pytest.mark.parametrize("task", ["regression", "text"])
def test_a_patch_stands_for_its_context(
    task: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = request.getfixturevalue(task)["transformer"]
    context, query = tmp_path / "context", tmp_path / "query"
    if task == "regression":
        context.write_text("1,0,0,2\n0,1,0,1\n0,0,1,-1\n" * 3)
        query.write_text("1,1,0\n0,2,1\n")
    else:
        context.write_text("7 green bottles hanging on the wall.\n")
        query.write_text("8 green bottles")
    file = tmp_path / "p.safetensors"
    made = ["patch", str(run), "--context", str(context), "--out", str(file), "--samples", "64"]
    assert analyze.main(made) == 0
    assert "affine patch for" in capsys.readouterr().out
    assert analyze.main(["apply", str(run), "--patch", str(file), "--query", str(query)]) == 0
    printed = capsys.readouterr()
    assert "patch of 'context" in printed.err
    numbers = [float(number) for number in re.findall(r"-?\d+\.\d+", printed.out)]
    model = zoo.load(run)
    if task == "regression":
        pairs = analyze.read_context(model, context)
        tokens = torch.cat([pairs[None], analyze.read_query(model, query)], 1)
        with torch.no_grad():
            expected, plain = model(tokens, 9)[0, 9:, 0], model(tokens[:, 9:])[0, :, 0]
        assert (torch.tensor(numbers[::2]) - expected).norm() < 0.6 * (plain - expected).norm()
    else:
        assert len(numbers) == 2


def test_figures_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert analyze.main(["figures"]) == 0
    listed = capsys.readouterr().out.split()
    theory, trained = analyze.all_figures()
    assert {*theory, *trained} <= set(listed)
    assert len({*theory, *trained}) == 11


def test_a_figure_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = functools.partial(patches.capacity_cliffs, seeds=[0], layers=2, lengths=(4, 40))
    monkeypatch.setattr(patches, "capacity_cliffs", quick)
    assert analyze.main(["figures", "capacity-cliffs", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "capacity-cliffs.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "nowhere"], "no checkpoint at nowhere"),
        (["report", "{transformer}", "{text}"], "trained on different tasks, regression, text: compare one"),
        (["figures", "law-residual", "--runs", "{transformer}"], "did you mean law-residuals"),
        (["figures", "static-error"], "figure without --runs 'static-error' does not exist"),
        (["figures", "capacity-cliffs", "--runs", "{transformer}"], "figure of trained models 'capacity-cliffs' does"),
        (["figures", "generation-strip", "--runs", "{transformer}"], "needs running text"),
        (["patch", "{transformer}", "--context", "none", "--out", "p"], "No such file or directory: 'none'"),
        (
            ["patch", "{transformer}", "--context", "{wrong}", "--out", "p"],
            "wrong: 4 numbers separated by commas are wanted in each line; could not convert",
        ),
        (["patch", "{transformer}", "--context", "{empty}", "--out", "p"], "empty is empty"),
        (["patch", "{transformer}", "--context", "{good}", "--out", "p", "--samples", "0"], "--samples 0 must be"),
        (["patch", "{transformer}", "--context", "{good}", "--out", "p", "--rank", "4"], "--rank is for the folder of"),
        (["apply", "{transformer}", "--patch", "none", "--query", "{good}"], "no patch file at none"),
        (["apply", "{transformer}", "--patch", "{good}", "--query", "{good}"], "is damaged or no patch file"),
        (["apply", "{moe}", "--patch", "{patch}", "--query", "{good}"], "was made for another model"),
        (["apply", "{transformer}", "--patch", "{patch}", "--query", "{good}"], "good: 3 numbers separated by commas"),
    ],
)
def test_mistakes(
    arguments: list[str],
    message: str,
    regression: dict[str, Path],
    text: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    contents = {"good": "1,0,0,2\n0,1,0,1\n", "wrong": "1,0,0,2\n0,x,0,1\n", "empty": ""}
    for name, content in contents.items():
        Path(name).write_text(content)
    names = {"text": text["transformer"], **regression, **{name: name for name in contents}, "patch": "p.safetensors"}
    if "{patch}" in arguments:
        made = f"patch {regression['transformer']} --context good --out p.safetensors --samples 8"
        assert analyze.main(made.split()) == 0
    capsys.readouterr()
    assert analyze.main([argument.format(**names) for argument in arguments]) == 2
    answer = capsys.readouterr()
    assert re.search(f"^error: .*({message})", answer.err), answer.err
    assert answer.err.count("\n") == 1
    assert not Path("p").exists()


@pytest.mark.parametrize("family", sorted({*MODELS} - {*FAMILIES}))
def test_the_numbers_of_a_report_know_further_families(family: str) -> None:
    model = build(Case("", family, "regression", {})).requires_grad_(False).float()
    numbers = report.summary(model)
    (share,) = (value for name, value in numbers.items() if name.startswith("variance"))
    assert all(math.isfinite(value) for value in numbers.values())
    assert (share == pytest.approx(1, abs=1e-6)) != static.reads_query(model.decoder)
