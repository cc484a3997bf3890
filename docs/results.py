"""The tables of docs/results.md: trains what they are made from, and writes them.

    python docs/results.py run [EXPERIMENT…]   # trains what is missing, resumes what was stopped, then writes the page
    python docs/results.py                     # writes the page from docs/results/, in seconds
    python docs/results.py rates SWEEP…        # keeps what sweeps of rates found (multirun/tune_text), writes the page

What is missing is what docs/results/ lacks, and a clone lacks nothing: delete docs/results/NAME to train NAME anew.

A run is `python train.py experiment=NAME WORDS seed=SEED`; of it docs/results/ keeps test.npz and metrics.json, without
the paths of the machine. `python -m zoo.compare docs/results/NAME --out DIR` shows more of an experiment.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

import zoo
from zoo.compare.figures import SHOWN, pareto
from zoo.compare.report import Report
from zoo.compare.runs import find, read, require_one_test
from zoo.compare.systems import System, compare, group
from zoo.console import say
from zoo.files import to_json, write
from zoo.lens.draw import save
from zoo.lens.routing import information
from zoo.training.callbacks import read_rows

HERE = Path(__file__).parent
PAGE, KEPT, RUNS = HERE / "results.md", HERE / "results", Path("runs/results")
FAMILIES = ("transformer", "hypernet", "moe", "hyper_moe", "merged_experts", "fast_weights")
REGRESSION = ("transformer", "fast_weights", "moe", "hypernet")
WHOLE = "model.emission=full model.matrices=[gate,up] model.dim=32 model.hidden=32 model.code_dim=32 model.layers=1"
EXPERTS = "model=moe model.experts=8 model.hidden=16"


def chosen(sweep: str, family: str) -> list[str]:
    """The rates of Muon and AdamW that a sweep which docs/results/ keeps chose for a family."""
    found = json.loads((KEPT / f"{sweep}.json").read_text(encoding="utf-8"))[family]
    return min(found, key=found.get).split()


def of_text(family: str) -> str:
    """The words of a family at the rates of the sweep on text, of which all families chose the default of Muon."""
    return f"model={family} optim.lr={chosen('tune_text', family)[1]}"


def of_regression(family: str) -> str:
    """The same on regression."""
    muon_lr, lr = chosen("tune_regression", family)
    return f"model={family} optim.muon_lr={muon_lr} optim.lr={lr}"


class Experiment(NamedTuple):
    """systems: by name, the words of their command; seconds: of a run, about, on one core; experts: also measure what
    they tell of the domain."""

    seconds: int
    systems: dict[str, str]
    experts: bool = False
    seeds: tuple[int, ...] = (0, 1, 2)


EXPERIMENTS = {
    "incontext": Experiment(
        90,
        {
            **{family: of_regression(family) for family in FAMILIES},
            "hypernet-constant": f"{of_regression('hypernet')} model.code=constant",
            "moe-frozen": f"{of_regression('moe')} model.router=frozen",
            "moe-uniform": f"{of_regression('moe')} model.router=uniform",
        },
    ),
    "sparse": Experiment(60, {family: of_regression(family) for family in REGRESSION}),
    "two_layer": Experiment(150, {family: of_regression(family) for family in REGRESSION}),
    "compositional": Experiment(
        60,
        {
            "hypernet": f"model=hypernet {WHOLE}",
            "hypernet-constant": f"model=hypernet {WHOLE} model.code=constant",
            "one-layer": "model=transformer model.layers=1 model.hidden=576",
            "two-layers": "model=transformer model.layers=2 model.hidden=256",
        },
    ),
    "routed": Experiment(
        40,
        {
            "top-2": f"{EXPERTS} model.top_k=2",
            "top-8": f"{EXPERTS} model.top_k=8",
            "frozen": f"{EXPERTS} model.top_k=2 model.router=frozen",
            "uniform": f"{EXPERTS} model.top_k=2 model.router=uniform",
            "dense-active": "model=transformer model.hidden=32",
            "dense-total": "model=transformer model.hidden=128",
        },
    ),
    "recall": Experiment(
        90,
        {
            "transformer": "model=transformer",
            "delta": "model=fast_weights model.rule=delta",
            "sum": "model=fast_weights model.rule=sum",
            "hypernet": "model=hypernet",
        },
    ),
    "markov": Experiment(
        120, {family: f"model={family}" for family in ("transformer", "hypernet", "moe", "fast_weights")}
    ),
    "noise": Experiment(40, {family: f"model={family}" for family in FAMILIES}),
    "experts": Experiment(
        90,
        {
            "two-of-16": "model=moe model.experts=16 model.top_k=2 model.hidden=64",
            "two-of-8": "model=moe model.experts=8 model.top_k=2 model.hidden=64",
            "two-of-4": "model=moe model.experts=4 model.top_k=2 model.hidden=64",
            "two-of-2": "model=moe model.experts=2 model.top_k=2 model.hidden=64",
            "one-of-16": "model=moe model.experts=16 model.top_k=1 model.hidden=128",
            "one-of-16-sigmoid": "model=moe model.experts=16 model.top_k=1 model.hidden=128 model.score=sigmoid",
            "dense-active": "model=transformer model.hidden=128",
            "dense-total": "model=transformer model.hidden=1024",
        },
    ),
    "domains": Experiment(90, {route: f"model.route_on={route}" for route in ("context", "token")}, experts=True),
    "families": Experiment(
        90,
        {
            **{family: of_text(family) for family in FAMILIES},
            "hypernet-constant": "model=hypernet model.code=constant optim.lr=0.024",
        },
    ),
    "prompts": Experiment(
        90,
        {
            **{family: of_text(family) for family in ("transformer", "hypernet", "moe", "fast_weights")},
            "hypernet-constant": f"{of_text('hypernet')} model.code=constant",
            "hypernet-attends": f"{of_text('hypernet')} model.attend_context=true",
        },
    ),
    "haystack": Experiment(60, {family: f"model={family}" for family in ("transformer", "fast_weights", "hypernet")}),
    "overwrites": Experiment(
        60,
        {
            **{rule: f"model=fast_weights model.rule={rule}" for rule in ("delta", "sum")},
            "attention": "model=transformer model.layers=2",
        },
    ),
}
TESTS = (8, 32)
"""Batches and sequences of each that experts are looked at with."""
COLUMNS = ("95 % interval", "seeds", "parameters", "active", "FLOPs per token")


def jobs(names: list[str]) -> list[tuple[str, str, list[str]]]:
    """Experiment, folder and words of each run, seed by seed: what is stopped compares fewer seeds, not systems."""
    return [
        (name, f"{system},seed={seed}", [f"experiment={name}", *words.split(), f"seed={seed}"])
        for name in names
        for seed in EXPERIMENTS[name].seeds
        for system, words in EXPERIMENTS[name].systems.items()
    ]


def run(names: list[str]) -> None:
    """Trains what docs/results/ lacks, one run after the other; one that fails is said, and left out."""
    missing = [job for job in jobs(names) if not (KEPT / job[0] / job[1] / "metrics.json").exists()]
    hours = sum(EXPERIMENTS[name].seconds for name, _, _ in missing) / 3600
    advice = "" if missing else f": {KEPT} has them all; delete their folders there to train them anew"
    say(f"{len(missing)} runs, about {hours:.1f} hours on one core{advice}")
    for name, folder, words in missing:
        out = RUNS / name / folder
        if not (out / "metrics.json").exists():
            begun = (out / "checkpoints/last.ckpt").exists()
            where = [f"resume={out}"] if begun else [*words, f"out={out}"]
            command = [
                sys.executable,
                "train.py",
                *where,
                "trainer.accelerator=cpu",
                "trainer.enable_progress_bar=false",
            ]
            if subprocess.run(command, cwd=HERE.parent, stdout=subprocess.DEVNULL).returncode:
                say(f"failed: {' '.join(words)}")
                continue
        keep(out, KEPT / name / folder, words)
        say(f"{name}/{folder}")


def keep(out: Path, kept: Path, words: list[str]) -> None:
    """Copies the numbers of a run, without the paths of the machine that made them."""
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    del metrics["checkpoint"]
    metrics["command"], metrics["config"]["out"] = f"python train.py {' '.join(words)}", None
    kept.mkdir(parents=True, exist_ok=True)
    shutil.copy(out / "test.npz", kept)
    write(kept / "metrics.json", to_json(metrics, 1) + "\n")
    if EXPERIMENTS[kept.parent.name].experts:
        model = zoo.load(out)
        tests = [model.task.batch("test", k, TESTS[1]) for k in range(TESTS[0])]
        told = {label: value.tolist() for label, value in information(model, tests).items()}
        write(kept / "experts.json", to_json(told, 1) + "\n")


def specialisation(name: str) -> list[list[str]]:
    """The largest normalised mutual information of expert and domain over layers, of each run and of its controls: the
    mean over redraws of the same maximum."""
    rows = [["routed on", "seed"]]
    for file in sorted((KEPT / name).glob("*/experts.json")):
        told = {label: np.array(x).max(-1) for label, x in json.loads(file.read_text(encoding="utf-8")).items()}
        system, _, seed = file.parent.name.partition(",seed=")
        rows[0][2:] = told
        rows.append([system, seed, *(f"{x.mean():.3f}" for x in told.values())])
    return rows


def compared(name: str) -> Report:
    """The systems of an experiment under its own names for them."""
    runs = [read(folder) for folder in find([KEPT / name])]
    require_one_test(runs)
    systems = [System(one.runs[0].folder.name.partition(",seed=")[0], one.runs) for one in group(runs)]
    return Report(systems, compare(systems))


def tables(name: str) -> str:
    """Systems, differences to the first of the experiment, and further entries of its test, as Markdown."""
    report, first = compared(name), next(iter(EXPERIMENTS[name].systems))
    head, *rows = report.main()
    chosen = [0, 1, *(head.index(column) for column in COLUMNS)]
    labels, *pairs = report.pairs()
    parts = [
        [[row[column] for column in chosen] for row in (head, *rows)],
        [[*row[:5], row[6]] for row in (labels, *pairs) if row is labels or first in row[:2]],
        report.others(),
        specialisation(name),
    ]
    return "\n\n".join(
        "\n".join(f"| {' | '.join(row)} |" for row in (cells[0], ["---"] * len(cells[0]), *cells[1:]))
        for cells in parts
        if len(cells) > 1
    )


def draw(text: str) -> None:
    """Error against FLOPs, for each experiment of which the page shows that."""
    for name in re.findall(r"\(figures/results-(\w+)\.png\)", text):
        settings = {"command": f"python docs/results.py run {name}"}
        systems = compared(name).systems
        more = len(systems) - SHOWN
        figure = pareto(systems, f" {more} further systems are in the table." if more > 0 else "")
        figure = replace(figure, name=f"results-{name}", title=f"{name}: error and cost", settings=settings)
        say(str(save(figure, HERE / "figures")))


def keep_rates(sweep: Path) -> None:
    """Keeps the lowest validation loss of each run of a sweep of rates, by family and rates."""
    found: dict[str, dict[str, float]] = {}
    for file in sorted(sweep.glob("*/metrics.json")):
        metrics = json.loads(file.read_text(encoding="utf-8"))
        optim, rows = metrics["config"]["optim"], read_rows(file.with_name("metrics.jsonl"))
        lowest = min(row["validation_loss"] for row in rows if "validation_loss" in row)
        found.setdefault(metrics["model"], {})[f"{optim['muon_lr']:g} {optim['lr']:g}"] = round(lowest, 5)
    if len({*map(len, found.values())}) != 1 or not {*FAMILIES} <= {*found}:
        sys.exit(f"{sweep}: not every family has a run at every rate; start the sweep again, it makes up for them")
    write(KEPT / f"{sweep.name}.json", to_json(found, 1) + "\n")


def rates(name: str) -> str:
    """The validation loss of each family by the rates of Muon and AdamW, as Markdown; the lowest in bold."""
    found = json.loads((KEPT / f"{name}.json").read_text(encoding="utf-8"))
    columns = list(found["transformer"])
    rows = [["Muon, AdamW", *(column.replace(" ", ", ") for column in columns)], ["---"] * (len(columns) + 1)]
    for family in FAMILIES:
        losses = found[family]
        best = min(losses.values())
        rows.append([family, *(f"{'**' * (x == best)}{x:.4g}{'**' * (x == best)}" for x in map(losses.get, columns))])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def page(text: str) -> str:
    """The page with the tables of every experiment, and of every sweep of rates, between their marks."""
    for mark, make in (("results", tables), ("rates", rates)):

        def made(match: re.Match[str], mark: str = mark, make: Callable[[str], str] = make) -> str:
            return f"<!-- {mark}: {match[1]} -->\n{make(match[1])}\n<!-- /{mark} -->"

        text = re.sub(rf"<!-- {mark}: (\w+) -->\n.*?<!-- /{mark} -->", made, text, flags=re.DOTALL)
    return text


def main(words: list[str]) -> None:
    what, *names = words or ["the page"]
    if what not in ("run", "rates", "the page") or (what == "run" and {*names} - {*EXPERIMENTS}):
        some = f"run, and some of {', '.join(EXPERIMENTS)}; or rates, and folders of sweeps; or nothing"
        sys.exit(f"{' '.join(words)}: write {some}")
    if what == "run":
        run(names or [*EXPERIMENTS])
    for sweep in names if what == "rates" else ():
        keep_rates(Path(sweep))
    text = page(PAGE.read_text(encoding="utf-8"))
    write(PAGE, text)
    draw(text)


if __name__ == "__main__":
    main(sys.argv[1:])
