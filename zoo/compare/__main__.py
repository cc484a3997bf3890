"""Compares trained runs: python -m zoo.compare RUN_OR_SWEEP… --out DIR."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from zoo.config import show
from zoo.console import Parser, command, say
from zoo.files import write


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m zoo.compare",
        description="Compares runs of one task, from their folders alone: tables, paired differences, figures, a page.",
        epilog="Example: python -m zoo.compare multirun/2026-01-31/12-00-00 --out compared",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_OR_SWEEP", help="run folders, or folders of some")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write to")
    parser.add_argument("--evaluation", metavar="NAME", help="compare evaluations/NAME of each run, not its own test")
    options = parser.parse_args(argv)
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"--out {options.out} is a file: name a folder")
    if options.evaluation is not None and not re.fullmatch(r"[\w=,-][\w.=,-]*", options.evaluation):
        parser.error(f"--evaluation {show(options.evaluation)} must be a name, of letters, digits and . = , - _")
    return options


@command
def main(argv: list[str] | None = None) -> None:
    """Writes the comparison and prints its table; 2, with one line on stderr, for runs that cannot be compared."""
    options = parse(argv)
    from tqdm import tqdm  # after the options are read: --help is quick

    from zoo.compare.figures import all_figures
    from zoo.compare.report import Report
    from zoo.compare.runs import find, read, require_one_test
    from zoo.compare.systems import compare, group
    from zoo.lens import draw

    folders, out = find(options.runs), options.out
    runs = [read(folder, options.evaluation) for folder in tqdm(folders, unit=" runs", disable=len(folders) < 20)]
    require_one_test(runs)
    systems = group(runs)
    report = Report(systems, compare(systems))
    out.mkdir(parents=True, exist_ok=True)
    for ending, text in {"md": report.markdown(), "csv": report.csv(), "json": report.json()}.items():
        write(out / f"table.{ending}", text)
    say(report.markdown())
    for name in ("curves", "curves-1", "curves-2", "curves-3", "layers"):
        for ending in ("png", "json"):  # of what was compared here before
            (out / f"{name}.{ending}").unlink(missing_ok=True)
    for figure in all_figures(systems):
        draw.save(figure, out)
    write(out / "index.html", report.html())
    say(f"table.md, table.csv, table.json, figures and index.html in {out}")


if __name__ == "__main__":
    sys.exit(main())
