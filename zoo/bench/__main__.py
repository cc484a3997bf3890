"""Measures how fast the zoo is here: python -m zoo.bench [--quick] [--json FILE]."""

from __future__ import annotations

import argparse
import platform
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from zoo.console import command

SECTIONS = {
    "layers": "one FFN with its family against a dense FFN of equal active FLOPs, plain matrix products, and peers",
    "memory": "what an FFN keeps for its backward pass",
    "growth": "cost against the number of experts, the rank and the length, with fits",
    "steps": "whole training steps: peers, the limit of the matrix products, the families",
    "loops": "the trainer against a bare loop, loaders, imports, the extraction of a weight update",
}


SIZES = (
    ("dim", 256, "width of the model in layers, memory and growth, a multiple of 16"),
    ("hidden", 512, "units of an expert, or of the dense FFN, there; a multiple of 4"),
    ("tokens", 2048, "tokens that the experts of layers share, a multiple of 512"),
)
MARKS = ("<!-- bench -->", "<!-- /bench -->")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m zoo.bench",
        description="Ratios of times: variants run in turn, the median over rounds with its quartiles.",
        epilog="Sections:\n" + "\n".join(f"  {name:<8}{text}" for name, text in SECTIONS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sections", nargs="*", help="which ones (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer sizes and rounds, under a minute")
    parser.add_argument("--rounds", type=int, help="pairs of measurements (default: 21, quick 2)")
    for name, default, text in SIZES:
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: {default})")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; with 1, CPU time is taken (default: 1)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--compile", action="store_true", help="also compiled steps (about a minute more)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every number to FILE")
    parser.add_argument("--figure", type=Path, metavar="FOLDER", help="also draw growth.png in FOLDER")
    parser.add_argument(
        "--page", type=Path, metavar="FILE", help=f"also put the table between the lines {MARKS} of FILE"
    )
    return parser


@command
def main(argv: list[str] | None = None) -> None:
    parser = arguments()
    options = parser.parse_args(argv)
    unknown = [name for name in options.sections if name not in SECTIONS]
    if unknown:
        parser.error(f"unknown section {unknown[0]}; sections: {', '.join(SECTIONS)}")
    rounds = options.rounds if options.rounds is not None else (2 if options.quick else 21)
    if rounds < 1 or options.threads < 1:
        parser.error(f"--rounds {rounds} and --threads {options.threads} must be at least 1")
    for (name, _, text), unit in zip(SIZES, (16, 4, 512), strict=True):
        if getattr(options, name) < unit or getattr(options, name) % unit:
            parser.error(f"--{name} {getattr(options, name)}: {text}")
    names = [name for name in SECTIONS if name in (options.sections or SECTIONS)]
    if options.figure and "growth" not in names:
        parser.error("--figure draws the section growth: name it too")
    if options.page and not (
        options.page.is_file() and all(mark in options.page.read_text(encoding="utf-8") for mark in MARKS)
    ):
        parser.error(f"--page {options.page} must be a file with the lines {' and '.join(MARKS)}")
    import torch
    from tqdm import tqdm

    if options.device not in ("cpu", "cuda") or (options.device == "cuda" and not torch.cuda.is_available()):
        parser.error(f"--device {options.device} is not there; torch sees {torch.cuda.device_count()} CUDA devices")
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    from zoo.bench import growth, layers
    from zoo.bench.timing import measure
    from zoo.files import to_json, write
    from zoo.training.memory import keep_freed_memory

    kept = keep_freed_memory()  # as train.py does
    typed = shlex.join(["python", "-m", "zoo.bench", *(sys.argv[1:] if argv is None else argv)])
    sizes = layers.Sizes(options.dim, options.hidden, options.tokens)
    rows: list[Any] = list(layers.memory(sizes, device)) if "memory" in names else []
    about = {**machine(device, options.threads), "freed memory": "kept" if kept else "given back"}
    cases = list(chosen(names, sizes, device, options.quick, options.compile))
    with tqdm(total=len(cases) * rounds, unit="round", disable=None) as bar:
        for case in cases:
            bar.set_description(case.name[:40])
            rows += measure(case, rounds, device, bar.update)
    text = "\n\n".join(filter(None, [about_line(about), table(rows), "\n".join(growth.lines(rows))]))
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


def chosen(names: list[str], sizes: Any, device: Any, quick: bool, compiled: bool) -> Iterator[Any]:
    from zoo.bench import growth, layers, steps

    for name in names:
        if name == "layers":
            yield from layers.cases(sizes, device, quick)
        elif name == "growth":
            yield from growth.growth(sizes, device, quick)
        elif name == "steps":
            yield from steps.steps(device, quick, compiled)
        elif name == "loops":
            yield from steps.loops(device, quick)


def machine(device: Any, threads: int) -> dict[str, str]:
    """What the numbers depend on; the rates are measured."""
    from zoo.bench.timing import rates

    products, copies = rates(device)
    names = ("torch", "lightning", "transformers", "x-transformers", "st-moe-pytorch")
    versions = {}
    for name in names:
        try:
            versions[name] = version(name)
        except ImportError:  # PackageNotFoundError is one
            continue
    return {
        "device": _name(device),
        "float32 products": f"{products:.0f} GFLOP/s",
        "copies": f"{copies:.1f} GB/s",
        "threads": str(threads),
        "python": platform.python_version(),
        **versions,
    }


def _name(device: Any) -> str:
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def about_line(about: dict[str, str]) -> str:
    return ", ".join(f"{key} {value}" for key, value in about.items())


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
