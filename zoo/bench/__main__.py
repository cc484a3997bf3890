"""Measures how fast the zoo is here: python -m zoo.bench [--quick] [SECTION …]."""

from __future__ import annotations

import argparse
import platform
import re
import shlex
import sys
from importlib.metadata import distributions, version
from pathlib import Path
from typing import TYPE_CHECKING

from zoo.config import lookup, require_positive
from zoo.console import Parser, command

if TYPE_CHECKING:
    import torch

    from zoo.bench.timing import Row

SECTIONS = {
    "layers": "one FFN with its family against a dense FFN of equal active FLOPs, plain matrix products, and a peer",
    "memory": "what an FFN keeps for its backward pass",
    "growth": "cost against the number of experts, the rank and the length, with fits",
    "steps": "whole training steps: a peer, the limit of the matrix products, the families",
    "loops": "the trainer against a bare loop, the extraction of a weight update",
}
MARKS = ("<!-- bench -->", "<!-- /bench -->")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options; raises ValueError for those that do not fit each other."""
    parser = Parser(
        prog="python -m zoo.bench",
        description="Ratios of times: variants run in turn, the median over rounds with its quartiles.",
        epilog="Sections:\n" + "\n".join(f"  {name:<8}{text}" for name, text in SECTIONS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sections", nargs="*", help="which ones (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer sizes and rounds, under a minute")
    parser.add_argument("--rounds", type=int, help="pairs of measurements (default: 21, quick 2)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; with 1, CPU time is taken (default: 1)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    parser.add_argument("--compile", action="store_true", help="also compiled steps (about a minute more)")
    parser.add_argument("--figure", type=Path, metavar="FOLDER", help="also draw growth.png in FOLDER")
    page = f"also put the table between the lines {' and '.join(MARKS)} of FILE"
    parser.add_argument("--page", type=Path, metavar="FILE", help=page)
    options = parser.parse_args(argv)
    for name in options.sections:
        lookup(name, SECTIONS, "section")
    options.sections = options.sections or list(SECTIONS)
    options.rounds = (2 if options.quick else 21) if options.rounds is None else options.rounds
    require_positive("", rounds=options.rounds, threads=options.threads)
    if options.figure and "growth" not in options.sections:
        raise ValueError("--figure draws the section growth: name it too")
    if options.page:
        text = options.page.read_text(encoding="utf-8") if options.page.is_file() else ""
        if not all(mark in text for mark in MARKS):
            raise ValueError(f"--page {options.page} must be a file with the lines {' and '.join(MARKS)}")
    return options


@command
def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    import torch
    from tqdm import tqdm

    from zoo.bench import growth, layers, steps
    from zoo.bench.timing import measure
    from zoo.files import write
    from zoo.training.memory import keep_freed_memory

    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda is not there: torch sees no CUDA device")
    torch.set_num_threads(options.threads)
    device, quick = torch.device(options.device), options.quick
    kept = keep_freed_memory()  # as train.py does
    about = {**machine(device), "freed memory": "kept" if kept else "given back", "rounds": options.rounds}
    rows = list(layers.memory(device)) if "memory" in options.sections else []
    timed = {
        "layers": lambda: layers.cases(device, quick),
        "growth": lambda: growth.growth(device, quick),
        "steps": lambda: steps.steps(device, options.compile),
        "loops": lambda: steps.loops(device, quick),
    }
    cases = [case for name in timed if name in options.sections for case in timed[name]()]
    with tqdm(total=len(cases) * options.rounds, unit="round", disable=None) as bar:
        for case in cases:
            bar.set_description(case.name[:40])
            rows += measure(case, options.rounds, device, bar.update)
    head = ", ".join(f"{key} {value}" for key, value in about.items())
    text = "\n\n".join(filter(None, [head, table(rows), "\n".join(growth.lines(rows))]))
    print(text)
    if options.figure:
        print(growth.draw(rows, options.figure))
    if options.page:
        typed = shlex.join(["python", "-m", "zoo.bench", *(sys.argv[1:] if argv is None else argv)])
        before, _, rest = options.page.read_text(encoding="utf-8").partition(MARKS[0])
        after = rest.partition(MARKS[1])[2]
        write(options.page, f"{before}{MARKS[0]}\n`{typed}`\n\n{text}\n{MARKS[1]}{after}")


def machine(device: torch.device) -> dict[str, str]:
    """The machine and the libraries that the numbers depend on; the rates are measured."""
    import torch

    from zoo.bench.timing import rates

    products, copies = rates(device)
    cpus = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.+)", cpus.read_text() if cpus.is_file() else "")
    names = [name for name in ("torch", "lightning", "transformers") if any(distributions(name=name))]
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else cpu[1] if cpu else platform.machine(),
        "float32 products": f"{products:.0f} GFLOP/s",
        "copies": f"{copies:.1f} GB/s",
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    lines = ["| case | variant / baseline | ratio | quartiles | wanted | ms | MB |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        wanted = f"≤ {row.bar:.2f}{'' if row.ratio <= row.bar else ' ✗'}" if row.bar else ""
        spread = f"{row.low:.2f}–{row.high:.2f}"
        ms = "" if row.seconds is None else f"{1e3 * row.seconds:.1f}"
        mb = "" if row.megabytes is None else f"{row.megabytes:.0f}"
        names = f"{row.case} | {row.variant} / {row.baseline}"
        lines.append(f"| {names} | {row.ratio:.2f} | {spread} | {wanted} | {ms} | {mb} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
