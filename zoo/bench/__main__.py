"""Measures how fast the zoo is here: python -m zoo.bench [--quick] [--json FILE]."""

from __future__ import annotations

import argparse
import platform
import shlex
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

from zoo.config import lookup
from zoo.console import Parser, command

SECTIONS = {
    "layers": "one FFN with its family against a dense FFN of equal active FLOPs, plain matrix products, and peers",
    "memory": "what an FFN keeps for its backward pass",
    "growth": "cost against the number of experts, the rank and the length, with fits",
    "steps": "whole training steps: peers, the limit of the matrix products, the families",
    "loops": "the trainer against a bare loop, loaders, imports, the extraction of a weight update",
}


SIZES = (
    ("dim", 256, 16, "width of the model in layers, memory and growth, a multiple of 16"),
    ("hidden", 512, 4, "units of an expert, or of the dense FFN, there; a multiple of 4"),
    ("tokens", 2048, 512, "tokens that the experts of layers share, a multiple of 512"),
)
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
    for name, default, _, text in SIZES:
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: {default})")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; with 1, CPU time is taken (default: 1)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    parser.add_argument("--compile", action="store_true", help="also compiled steps (about a minute more)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every number to FILE")
    parser.add_argument("--figure", type=Path, metavar="FOLDER", help="also draw growth.png in FOLDER")
    page = f"also put the table between the lines {' and '.join(MARKS)} of FILE"
    parser.add_argument("--page", type=Path, metavar="FILE", help=page)
    options = parser.parse_args(argv)
    for name in options.sections:
        lookup(name, SECTIONS, "section")
    options.sections = [name for name in SECTIONS if name in (options.sections or SECTIONS)]
    if options.rounds is None:
        options.rounds = 2 if options.quick else 21
    for name, _, unit, text in (*SIZES, ("rounds", 0, 1, "pairs of measurements"), ("threads", 0, 1, "CPU threads")):
        value = getattr(options, name)
        if value < unit or value % unit:
            raise ValueError(f"--{name} {value} must be a positive multiple of {unit}: {text}")
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
    from zoo.files import to_json, write
    from zoo.training.memory import keep_freed_memory

    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda is not there: torch sees no CUDA device")
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    kept = keep_freed_memory()  # as train.py does
    sizes = layers.Sizes(options.dim, options.hidden, options.tokens)
    about = {**machine(device, options.threads), "freed memory": "kept" if kept else "given back"}
    rows: list[Any] = list(layers.memory(sizes, device)) if "memory" in options.sections else []
    timed: dict[str, Callable[[], Iterable[Any]]] = {
        "layers": lambda: layers.cases(sizes, device, options.quick),
        "growth": lambda: growth.growth(sizes, device, options.quick),
        "steps": lambda: steps.steps(device, options.quick, options.compile),
        "loops": lambda: steps.loops(device, options.quick),
    }
    cases = [case for name in timed if name in options.sections for case in timed[name]()]
    with tqdm(total=len(cases) * options.rounds, unit="round", disable=None) as bar:
        for case in cases:
            bar.set_description(case.name[:40])
            rows += measure(case, options.rounds, device, bar.update)
    typed = shlex.join(["python", "-m", "zoo.bench", *(sys.argv[1:] if argv is None else argv)])
    head = ", ".join(f"{key} {value}" for key, value in about.items())
    text = "\n\n".join(filter(None, [head, table(rows), "\n".join(growth.lines(rows))]))
    print(text)
    if options.json:
        content = {"command": typed, "machine": about, "rows": [asdict(row) for row in rows]}
        write(options.json, to_json(content, 2) + "\n")
    if options.figure:
        print(growth.draw(rows, options.figure))
    if options.page:
        before, _, rest = options.page.read_text(encoding="utf-8").partition(MARKS[0])
        after = rest.partition(MARKS[1])[2]
        write(options.page, f"{before}{MARKS[0]}\n`{typed}`\n\n{text}\n{MARKS[1]}{after}")


def machine(device: Any, threads: int) -> dict[str, str]:
    """The machine and the libraries that the numbers depend on; the rates are measured."""
    from zoo.bench.timing import rates

    products, copies = rates(device)
    names = ("torch", "lightning", "transformers", "x-transformers", "st-moe-pytorch")
    return {
        "device": _name(device),
        "float32 products": f"{products:.0f} GFLOP/s",
        "copies": f"{copies:.1f} GB/s",
        "threads": str(threads),
        "python": platform.python_version(),
        **{name: version(name) for name in names if any(distributions(name=name))},
    }


def _name(device: Any) -> str:
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def table(rows: list[Any]) -> str:
    """The rows as Markdown."""
    lines = [
        "| case | variant / baseline | ratio | quartiles | wanted | pairs | ms | tokens/s | MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        wanted = f"≤ {row.bar:.2f}{'' if row.ratio <= row.bar else ' ✗'}" if row.bar else ""
        spread = f"{row.low:.2f}–{row.high:.2f}"
        ms = "" if row.seconds is None else f"{1e3 * row.seconds:.1f}"
        speed = f"{row.tokens / row.seconds:.2g}" if row.tokens and row.seconds else ""
        mb = "" if row.megabytes is None else f"{row.megabytes:.0f}"
        lines.append(
            f"| {row.case} | {row.variant} / {row.baseline} | {row.ratio:.2f} | {spread} | {wanted} | {row.pairs} | "
            f"{ms} | {speed} | {mb} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
