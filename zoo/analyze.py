"""Looks into trained models: python -m zoo.analyze report runs/hypernet-regression/ID. All commands: --help."""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

import zoo
from zoo.config import lookup, show
from zoo.console import Parser, command, read
from zoo.lens import draw
from zoo.lens import report as pages
from zoo.lens.figures import increments_by_family
from zoo.lens.patch_file import describe, load_patch, save_patch
from zoo.lens.static import answer, fit, relative_error
from zoo.models import Model
from zoo.training import checkpoint


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m zoo.analyze",
        description="Reads, stores and reuses the weight update that a context amounts to.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    report = commands.add_parser("report", help="figures and numbers of one or several checkpoints")
    report.add_argument("runs", nargs="+", metavar="RUN_OR_CKPT", help="run folders, files, or a MODEL_DIR")
    report.add_argument("--text", type=Path, metavar="FILE", help="what a MODEL_DIR, a folder of transformers, reads")
    report.add_argument("--out", type=Path, help="folder of the report (default: RUN/report of the first run)")

    figures = commands.add_parser("figures", help="single figures; those of theory need no checkpoint")
    figures.add_argument("names", nargs="*", metavar="NAME", help="which ones (default: list them)")
    figures.add_argument("--runs", nargs="+", default=[], metavar="RUN_OR_CKPT", help="checkpoints to show")
    figures.add_argument("--out", type=Path, default=Path("figures"), help="folder (default: %(default)s)")

    patch = commands.add_parser("patch", help="turn a context into a patch file")
    patch.add_argument("checkpoint", metavar="RUN_OR_CKPT", help="or the folder of a transformers model, MODEL_DIR")
    patch.add_argument("--context", required=True, type=Path, metavar="FILE", help="text, or lines x1,…,xd,y of pairs")
    patch.add_argument("--out", required=True, type=Path, metavar="P.safetensors")
    patch.add_argument("--form", help="vector, matrix, affine or output (default: affine); MODEL_DIR: also sink-null "
                       "(default: the best on queries that are neither fitted nor reported)")  # fmt: skip
    patch.add_argument("--samples", type=int, default=256, help="sample queries it is fitted on (default: %(default)s)")
    patch.add_argument("--ridge", type=float, help="penalty, relative (default: 1e-3; of a MODEL_DIR as --form)")
    patch.add_argument("--queries", type=Path, metavar="FILE", help="of a MODEL_DIR: sample queries, one on each line")
    patch.add_argument("--keep-first", type=int, default=1, help="of a MODEL_DIR: how many tokens stay in "
                       "front of queries, as a sink of attention (default: %(default)s)")  # fmt: skip
    patch.add_argument("--lora", type=Path, metavar="DIR", help="of a MODEL_DIR: an adapter, too, that peft loads")
    patch.add_argument("--rank", type=int, help="of that adapter")
    patch.add_argument("--distil", type=int, metavar="STEPS", help="that train the adapter on, at most, about 1 s each")

    apply = commands.add_parser("apply", help="answer queries under a patch file, without the context")
    apply.add_argument("checkpoint", metavar="RUN_OR_CKPT", help="or the folder of a transformers model, MODEL_DIR")
    apply.add_argument("--patch", required=True, type=Path, metavar="P.safetensors")
    apply.add_argument("--query", required=True, type=Path, metavar="FILE", help="text, or lines x1,…,xd; "
                       "of a MODEL_DIR: one text on each line")  # fmt: skip
    for each in (report, figures, patch, apply):
        each.add_argument("--base", metavar="DIR", help="the pretrained model that is the W0 of runs with model.base")
    return parser.parse_args(argv)


@command
def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns the exit code: 2, with one line on stderr, for mistakes. Of several processes that
    torchrun or srun started, the first one does it all."""
    if rank_zero_only.rank:  # type: ignore[attr-defined]
        return 0
    options = parse(argv)
    table: dict[str, Callable[..., None]] = {"report": report, "figures": figures, "patch": patch, "apply": apply}
    if any(map(foreign, [getattr(options, "checkpoint", ""), *getattr(options, "runs", [])])):
        from zoo.hf import commands

        table |= {"report": commands.report, "patch": commands.patch, "apply": commands.apply}
    table[options.command](options)
    return 0


def foreign(path: str) -> bool:
    """Whether this is the folder of a model of `transformers`."""
    return (Path(path) / "config.json").is_file() and not (Path(path) / "checkpoints").exists()


def load_all(paths: list[str], base: str | None = None) -> tuple[dict[str, Model], dict[str, Path]]:
    """Models and their files by label: the family, with a number where one comes twice."""
    models: dict[str, Model] = {}
    sources: dict[str, Path] = {}
    seen: Counter[str] = Counter()
    for file in [checkpoint.find(path, "best") for path in paths]:
        model = zoo.load(file, base).requires_grad_(False)
        family = model.config.name
        seen[family] += 1
        label = family if seen[family] == 1 else f"{family} {seen[family]}"
        models[label], sources[label] = model, file
    tasks = {model.task.config.name for model in models.values()}
    if len(tasks) > 1:
        raise ValueError(f"the checkpoints were trained on different tasks, {', '.join(sorted(tasks))}: compare one")
    for model in models.values():
        model.task.prepare()
    return models, sources


def report(options: argparse.Namespace) -> None:
    models, sources = load_all(options.runs, options.base)
    first = next(iter(sources.values()))
    run = first.parent.parent if first.parent.name == "checkpoints" else first.parent
    folder = options.out or run / "report"
    content = pages.write(models, folder, sources)
    print(pages.table(content["numbers"]))
    print(f"\n{len(content['figures'])} figures, report.md and report.json in {folder}")


def figures(options: argparse.Namespace) -> None:
    theory, trained = all_figures()
    if not options.names:
        print("without a checkpoint:", *theory, sep="\n  ")
        print("with --runs:", *trained, sep="\n  ")
        return
    table, what = (trained, "figure of trained models") if options.runs else (theory, "figure without --runs")
    makers = [lookup(name, table, what) for name in options.names]
    models = [load_all(options.runs, options.base)[0]] if options.runs else []
    for make in makers:
        print(draw.save(make(*models), options.out), flush=True)


def all_figures() -> tuple[pages.Makers, pages.Makers]:
    """Figures that train or draw their own small models, and those of checkpoints."""
    from zoo.papers import patches, toy_figures

    theory: pages.Makers = {
        "loss-through-delta": toy_figures.loss_through_delta,
        "increments-of-delta": toy_figures.increments_of_delta,
        "delta-and-fine-tuning": toy_figures.delta_and_fine_tuning,
        "capacity-cliffs": patches.capacity_cliffs,
        "precision-of-patches": patches.precision_of_patches,
    }
    trained: pages.Makers = {name: partial(pages.make, name) for name in pages.TRAINED}
    increments = toy_figures.increments_of_delta
    trained["increments-of-delta"] = lambda models: increments(more_increments=increments_by_family(models))
    return theory, trained


def patch(options: argparse.Namespace) -> None:
    if given := [name for name in ("queries", "lora", "rank", "distil") if getattr(options, name) is not None]:
        raise ValueError(f"--{given[0]} is for the folder of a model of transformers, {options.checkpoint} is none")
    if options.samples < 1:
        raise ValueError(f"--samples {options.samples} must be at least 1")
    (model,) = load_all([options.checkpoint], options.base)[0].values()
    context = read_context(model, options.context)
    form, ridge, n = options.form or "affine", 1e-3 if options.ridge is None else options.ridge, len(context)
    samples = model.task.sample_queries(context, options.samples, "train")
    held_out = model.task.sample_queries(context, 128, "validation")
    patches = fit(model.decoder, samples, n, form, ridge)
    error = relative_error(model.decoder, held_out, n, patches)
    about = {"form": form, "ridge": ridge, "samples": options.samples, "context": options.context.name}
    save_patch(options.out, patches, model, **about, held_out_error=error)
    print(f"{options.out}: {form} patch for {n} context tokens; on other queries its answers are off by")
    print(f"{error:.2g} of the variance of the answers with the context (0: the same, 1: no better than their mean)")


def apply(options: argparse.Namespace) -> None:
    (model,) = load_all([options.checkpoint], options.base)[0].values()
    patches = load_patch(options.patch, model)
    queries = read_query(model, options.query)
    with torch.no_grad():
        output = answer(model.decoder, queries, patches)
        alone = model(queries)
    print(f"patch of {show(describe(options.patch)['about'].get('context'))}", file=sys.stderr)
    if model.task.vocabulary is None:
        for patched, plain in zip(output[0, :, 0].tolist(), alone[0, :, 0].tolist(), strict=True):
            print(f"with the patch {patched:.4f}\twithout {plain:.4f}")
        return
    scores = [F.cross_entropy(y[0, :-1], queries[0, 1:]) for y in (output, alone)]
    size = len(model.task.decode(queries[0, 1:].tolist()))
    bits = [float(score) * (queries.shape[1] - 1) / size / math.log(2) for score in scores]
    print(f"bits per byte of the query: {bits[0]:.3f} with the patch, {bits[1]:.3f} without")


def read_context(model: Model, path: Path) -> Tensor:
    """The context in FILE as tokens (n) or (n,token_dim)."""
    task = model.task
    if task.token_dim:
        return _numbers(path, task.token_dim)
    return torch.tensor(task.encode_context(read(path)) if task.n_context else task.encode(read(path)))


def read_query(model: Model, path: Path) -> Tensor:
    """The query in FILE as tokens (1,T) or (1,T,token_dim)."""
    task = model.task
    if task.token_dim:
        return F.pad(_numbers(path, task.token_dim - 1), (0, 1))[None]
    return torch.tensor([task.encode(read(path))])


def _numbers(path: Path, width: int) -> Tensor:
    """The rows of a file of numbers, `width` in each."""
    wanted = f"{path}: {width} numbers separated by commas are wanted in each line"
    try:
        numbers = np.loadtxt(read(path).splitlines(), np.float32, delimiter=",", ndmin=2, comments=None)
    except ValueError as error:
        raise ValueError(f"{wanted}; {error}") from None
    if numbers.shape[1] != width:
        raise ValueError(f"{wanted}, got {numbers.shape[1]}")
    return torch.from_numpy(numbers)


if __name__ == "__main__":
    sys.exit(main())
