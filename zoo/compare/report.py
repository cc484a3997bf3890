"""What is written of systems and their differences: Markdown, CSV, JSON, and a page for a browser without a network."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any

from zoo.compare.figures import AXES, COSTS, curve, explain
from zoo.compare.statistics import Estimate
from zoo.compare.systems import Difference, System, notes, references
from zoo.files import to_json
from zoo.lens.draw import COLOURS

Cells = list[list[str]]
"""A table as texts, its head first."""


def number(value: float | None) -> str:
    """Four digits; a dash for what is not known."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.4g}" if 1e-3 <= abs(value) < 1e6 or value == 0 else f"{value:.2e}"


def interval(one: Estimate) -> str:
    return "–" if one.low is None else f"{number(one.low)} to {number(one.high)}"


def cost(name: str, value: float) -> str:
    if math.isnan(value) or name in ("flops", "seconds"):
        return number(value)
    return f"{value / 1e6 if name == 'memory_bytes' else value:,.0f}"


class Report:
    """All that is written of a comparison."""

    def __init__(self, systems: list[System], differences: list[Difference]):
        self.systems, self.differences = systems, differences
        self.facts, self.references = systems[0].runs[0].metrics, references(systems)
        self.errors = {system.label: system.error() for system in systems}
        self.costs = {system.label: {name: system.number(name) for name in COSTS} for system in systems}
        self.title = f"{len(systems)} systems on {self.facts['task']}, {sum(len(x.runs) for x in systems)} runs"

    def main(self) -> Cells:
        """A row for each system, then one for each answer that needs no model."""
        cells = [["system", explain(self.systems), "95 % interval", "seeds", *COSTS.values()]]
        for system in self.systems:
            one, costs = self.errors[system.label], self.costs[system.label]
            words = [system.label, number(one.mean), interval(one), str(len(system.runs))]
            cells.append([*words, *(cost(name, value) for name, value in costs.items())])
        for name, one in self.references.items():
            cells.append([explain(self.systems, name), number(one.mean), interval(one), *["–"] * (1 + len(COSTS))])
        return cells

    def pairs(self) -> Cells:
        """The differences of all pairs."""
        cells = [["first", "second", "first − second", "95 % interval", "verdict", "P(first is better)", "seeds won"]]
        for one in self.differences:
            sure = "–" if one.size.below is None else f"{one.size.below:.3f}"
            measured = [number(one.size.mean), interval(one.size), one.verdict, sure, f"{one.wins} of {one.seeds}"]
            cells.append([one.first, one.second, *measured])
        return cells

    def others(self) -> Cells:
        """Further entries of the test, which depend on the model, as controls do."""
        cells, known = [["of the test", *self.errors]], {self.facts["main_metric"], *self.references}
        for name in [name for name in self.facts["test"] if name not in known]:
            row = [system.metric(name) for system in self.systems]
            cells.append([explain(self.systems, name), *("–" if one is None else number(one.mean) for one in row)])
        return cells

    def markdown(self) -> str:
        """All tables and notes; | and < of labels are escaped."""

        def table(cells: Cells) -> str:
            clean = [[cell.replace("|", "\\|") for cell in row] for row in cells]
            clean.insert(1, ["---"] * len(cells[0]))
            return "\n".join(f"| {' | '.join(row)} |" for row in clean)

        parts = [f"# {self.title}", table(self.main()), "\n".join(f"- {note}" for note in notes(self.systems))]
        for head, cells in {"Differences": self.pairs(), "Further entries of the test": self.others()}.items():
            parts += [f"## {head}", table(cells)] if len(cells) > 1 else []
        return "\n\n".join(filter(None, parts)).replace("<", "&lt;") + "\n"

    def csv(self) -> str:
        """The rows of the main table with all digits; nothing where a number is not known."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["system", self.facts["main_metric"], "low", "high", "seeds", *COSTS])
        for system in self.systems:
            known = ["" if math.isnan(value) else value for value in self.costs[system.label].values()]
            writer.writerow([system.label, *self.errors[system.label][:3], len(system.runs), *known])
        for name, one in self.references.items():
            writer.writerow([explain(self.systems, name), *one[:3], "", *[""] * len(COSTS)])
        return text.getvalue()

    def json(self) -> str:
        """Every number, with the folders of the runs."""
        systems = []
        for system in self.systems:
            tests = {name: one._asdict() for name in self.facts["test"] if (one := system.metric(name))}
            runs = [{"folder": str(run.folder), "seed": run.seed, "error": run.error} for run in system.runs]
            known = {"label": system.label, "error": self.errors[system.label]._asdict(), "test": tests, "runs": runs}
            systems.append(known | self.costs[system.label])
        said: dict[str, Any] = {name: self.facts.get(name) for name in ("task", "main_metric", "evaluation", "data")}
        said |= {"systems": systems, "references": {name: one._asdict() for name, one in self.references.items()}}
        pairs = [one._asdict() | {"size": one.size._asdict(), "verdict": one.verdict} for one in self.differences]
        return to_json({**said, "differences": pairs, "notes": notes(self.systems)}, 1) + "\n"

    def html(self) -> str:
        """page.html with its data and plotly.js inside; raises ValueError where plotly is not installed."""
        try:
            from plotly.offline import get_plotlyjs
        except ImportError:
            extra = "python -m pip install -c constraints.txt -e '.[compare]'"
            raise ValueError(f"index.html needs plotly, all else is written; install it with {extra}") from None
        systems, curves = [], []
        for k, (system, text) in enumerate(zip(self.systems, self.main()[1:], strict=False)):
            one = self.errors[system.label]
            said = {"label": system.label, "error": one.mean, "low": one.low, "high": one.high, "text": text}
            systems.append({**said, "colour": COLOURS[k % len(COLOURS)], "costs": self.costs[system.label]})
            if found := curve(system):
                curves.append({"of": k, "schedule": system.schedule, **found._asdict()})
        levels = [{"label": explain(self.systems, name), "error": one.mean} for name, one in self.references.items()]
        data: dict[str, Any] = {"title": self.title, "metric": explain(self.systems), "costs": COSTS, "axes": AXES}
        data |= {"systems": systems, "references": levels, "curves": curves, "notes": notes(self.systems)}
        data["tables"] = {"systems": self.main(), "differences": self.pairs(), "others": self.others()}
        page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
        safe = to_json(data).replace("<", "\\u003c")  # no text of a label ends the script that holds it
        return page.replace("{{plotly}}", get_plotlyjs()).replace("{{data}}", safe)
