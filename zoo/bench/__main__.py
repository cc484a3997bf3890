"""Measures how fast the zoo is here: python -m zoo.bench [--quick] [--json FILE]."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

SECTIONS = {
    "seats": "one FFN with its seat against a dense FFN of equal active FLOPs, plain matrix products, and peers",
    "growth": "cost against the number of experts, the rank and the length",
    "steps": "whole training steps: peers, the limit of the matrix products, the families",
    "loops": "the trainer against a bare loop, the loader, the extraction of a weight update",
}


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m zoo.bench",
        description="Ratios of times: variants run in turn, the median over rounds with its quartiles.",
        epilog="Sections:\n" + "\n".join(f"  {name:<8}{text}" for name, text in SECTIONS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sections", nargs="*", help="which ones (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer sizes and rounds, under a minute")
    parser.add_argument("--rounds", type=int, help="pairs of measurements (default: 21, quick 3)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; with 1, CPU time is taken (default: 1)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--compile", action="store_true", help="also compiled steps (about a minute each)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every number to FILE")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = arguments()
    options = parser.parse_args(argv)
    unknown = [name for name in options.sections if name not in SECTIONS]
    if unknown:
        parser.error(f"unknown section {unknown[0]}; sections: {', '.join(SECTIONS)}")
    rounds = options.rounds if options.rounds is not None else (3 if options.quick else 21)
    if rounds < 1 or options.threads < 1:
        parser.error(f"--rounds {rounds} and --threads {options.threads} must be at least 1")
    import torch
    from tqdm import tqdm

    if options.device not in ("cpu", "cuda") or (options.device == "cuda" and not torch.cuda.is_available()):
        parser.error(f"--device {options.device} is not there; torch sees {torch.cuda.device_count()} CUDA devices")
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    from zoo.bench.timing import measure

    cases = list(chosen(options.sections or list(SECTIONS), device, options.quick, options.compile))
    rows: list[Any] = []
    with tqdm(total=len(cases) * rounds, unit="round") as bar:
        for case in cases:
            bar.set_description(case.name[:40])
            rows += measure(case, rounds, device, bar.update)
    about = machine(device, options.threads)
    print(table(rows, about))
    if options.json:
        temporary = options.json.with_name(options.json.name + ".tmp")
        temporary.write_text(json.dumps({"machine": about, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")
        temporary.replace(options.json)


def chosen(names: list[str], device: Any, quick: bool, compiled: bool) -> Iterator[Any]:
    from zoo.bench import seats, steps

    for name in names:
        if name == "steps":
            yield from steps.steps(device, quick, compiled)
        elif name == "loops":
            yield from steps.loops(device, quick)
        else:
            yield from {"seats": seats.seats, "growth": seats.growth}[name](device, quick)


def machine(device: Any, threads: int) -> dict[str, str]:
    """What the numbers depend on."""
    import torch

    names = ("torch", "lightning", "transformers", "x-transformers", "st-moe-pytorch")
    versions = {}
    for name in names:
        try:
            versions[name] = version(name)
        except ImportError:  # PackageNotFoundError is one
            continue
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu(),
        "threads": str(threads),
        "python": platform.python_version(),
        **versions,
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def table(rows: list[Any], about: dict[str, str]) -> str:
    """The rows as Markdown."""
    lines = [", ".join(f"{key} {value}" for key, value in about.items()), ""]
    lines += [
        "| case | variant / baseline | ratio | quartiles | wanted | pairs | ms | peak MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        wanted = f"≤ {row.bar:.2f}{'' if row.ratio <= row.bar else ' ✗'}" if row.bar else ""
        spread = f"{row.low:.2f}–{row.high:.2f}"
        lines.append(
            f"| {row.case} | {row.variant} / {row.baseline} | {row.ratio:.2f} | {spread} | {wanted} | {row.pairs} | "
            f"{1e3 * row.seconds:.1f} | {row.peak_mb:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
