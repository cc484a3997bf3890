"""Measures how fast the zoo is here: python -m zoo.bench [--quick] [SECTION …]."""

from __future__ import annotations

import argparse
import platform
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import distributions
from pathlib import Path

import torch

from zoo.bench.generation import generation
from zoo.bench.growth import figure, growth
from zoo.bench.hf import hf
from zoo.bench.layers import layers
from zoo.bench.processes import processes
from zoo.bench.startup import startup
from zoo.bench.steps import loops, steps
from zoo.bench.timing import Rates, Row, Setting, rates
from zoo.config import lookup, require_positive
from zoo.console import Parser, command
from zoo.files import write
from zoo.lens.draw import save
from zoo.memory import keep_freed_memory

SECTIONS: dict[str, Callable[[Setting], Iterator[Row]]] = {
    section.__name__: section for section in (layers, growth, steps, loops, generation, hf, startup, processes)
}
"""A section yields rows; the line that --help has of it is its docstring."""
PAGE = re.compile("(<!-- bench -->\n).*?(<!-- /bench -->)", re.DOTALL)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options; raises ValueError for those that do not fit each other."""
    parser = Parser(
        prog="python -m zoo.bench",
        description="Ratios of times: variants run in turn, the median over rounds with its quartiles.",
        epilog="Sections:\n" + "\n".join(f"  {name:<11}{section.__doc__}" for name, section in SECTIONS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("sections", nargs="*", help="which ones (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer sizes and rounds, under a minute")
    parser.add_argument("--rounds", type=int, help="pairs of measurements (default: 21, quick 2)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; with 1, CPU time is taken (default: 1)")
    parser.add_argument("--device", choices=devices, default="cpu", help="default: cpu")
    parser.add_argument("--compile", action="store_true", help="also compiled steps (about a minute more)")
    parser.add_argument("--model", metavar="DIR", help="a folder of transformers, for the section hf")
    parser.add_argument("--figure", type=Path, metavar="FOLDER", help="also draw growth.png in FOLDER")
    parser.add_argument("--page", type=Path, metavar="FILE", help="also put the table there, between its marks")
    options = parser.parse_args(argv)
    for name in options.sections:
        lookup(name, SECTIONS, "section")
    options.sections = options.sections or list(SECTIONS)
    options.rounds = (2 if options.quick else 21) if options.rounds is None else options.rounds
    require_positive("", rounds=options.rounds, threads=options.threads)
    for name, section in (("figure", "growth"), ("model", "hf")):
        if getattr(options, name) and section not in options.sections:
            raise ValueError(f"--{name} is for the section {section}: name it too")
    if options.page and not PAGE.search(options.page.read_text(encoding="utf-8")):
        raise ValueError(f"--page {options.page} must have the lines <!-- bench --> and <!-- /bench -->")
    return options


@command
def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    torch.set_num_threads(options.threads)
    freed = "kept" if keep_freed_memory() else "given back"  # as train.py does
    device = torch.device(options.device)
    setting = Setting(device, options.rounds, rates(device), options.quick, options.compile, options.model)
    about = {**machine(device, setting.rates), "freed memory": freed, "rounds": options.rounds}
    # in bfloat16, as a GPU trains here
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        rows = [row for name in options.sections for row in SECTIONS[name](setting)]
    text = ", ".join(f"{key} {value}" for key, value in about.items()) + "\n\n" + table(rows)
    print(f"{text}\n\n{verdict(rows)}")
    if options.figure:
        print(save(figure(rows), options.figure))
    if options.page:
        typed = shlex.join(["python", "-m", "zoo.bench", *(sys.argv[1:] if argv is None else argv)])
        page = options.page.read_text(encoding="utf-8")
        write(options.page, PAGE.sub(lambda marks: f"{marks[1]}`{typed}`\n\n{text}\n{marks[2]}", page))


def machine(device: torch.device, rates: Rates) -> dict[str, str]:
    """The machine, its rates, and the libraries that the numbers depend on."""
    cpus = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.+)", cpus.read_text() if cpus.is_file() else "")
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else cpu[1] if cpu else platform.machine(),
        "float32 products": f"{rates.products / 1e9:.0f} GFLOP/s",
        "copies": f"{rates.copies / 1e9:.1f} GB/s",
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        **{one.name: one.version for one in distributions() if one.name in ("torch", "lightning", "transformers")},
    }


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    lines = ["| case | variant / baseline | ratio | quartiles | wanted | ms | MB |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        wanted = f"≤ {row.bar:.2f}{'' if row.ratio <= row.bar else ' ✗'}" if row.bar else ""
        names, spread = f"{row.case} | {row.variant} / {row.baseline}", f"{row.low:.2f}–{row.high:.2f}"
        measured = f"{1e3 * row.seconds:.1f} | {row.megabytes:.0f}"
        lines.append(f"| {names} | {row.ratio:.2f} | {spread} | {wanted} | {measured} |")
    return "\n".join(lines)


def verdict(rows: list[Row]) -> str:
    """One line: whether all is as fast as wanted, and where it is not."""
    wanted = [row for row in rows if row.bar]
    slow = [row for row in wanted if row.bar and row.ratio > row.bar]
    if not slow:
        return f"As fast as wanted: all {len(wanted)} ratios."
    places = "; ".join(f"{row.case}: {row.variant} {row.ratio:.2f} instead of {row.bar:.2f}" for row in slow)
    return f"Slower than wanted in {len(slow)} of {len(wanted)} ratios: {places}."


if __name__ == "__main__":
    sys.exit(main())
