"""Trains the small models that come with the package: python -m zoo.ship (about half an hour on a CPU)."""

from __future__ import annotations

import sys
from pathlib import Path

import zoo
from zoo import console

NAMES = [f"{task}/{model}" for task in ("regression", "text") for model in ("transformer", "hypernet", "moe")]


@console.command
def main(argv: list[str] | None = None) -> int:
    parser = console.Parser("python -m zoo.ship", description=__doc__)
    parser.add_argument("names", nargs="*", default=NAMES, help=f"which ones (default: {' '.join(NAMES)})")
    parser.add_argument(
        "--runs", default="runs/shipped", help="where their runs lie; those that are complete are taken"
    )
    arguments = parser.parse_args(argv)
    if unknown := {*arguments.names} - {*NAMES}:
        parser.error(f"{sorted(unknown)[0]} is none of {', '.join(NAMES)}")
    from zoo.training import checkpoint, shipped
    from zoo.training.memory import keep_freed_memory

    keep_freed_memory()
    for name in arguments.names:
        task, _, model = name.partition("/")
        run = Path(arguments.runs, name)
        if not (run / "metrics.json").is_file():
            zoo.train(model, task, out=str(run))
        path = shipped.save(checkpoint.read(run / "checkpoints/best.ckpt"), name, (run / "card.md").read_text())
        console.say(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
