"""Trains the small models that come with the package: python -m zoo.ship (about a quarter of an hour on a CPU)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import zoo
from zoo import console

STEPS = {"regression": 1000, "text": 500}
NAMES = [f"{task}/{model}" for task in STEPS for model in ("transformer", "hypernet", "moe")]


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
    from zoo.memory import keep_freed_memory
    from zoo.records import shipped
    from zoo.records.card import card
    from zoo.training import checkpoint

    keep_freed_memory()
    for name in arguments.names:
        task, _, model = name.partition("/")
        run = Path(arguments.runs, name)
        if not (run / "metrics.json").is_file():
            zoo.train(model, task, {"steps": STEPS[task]}, out=str(run))
        metrics, weights = (
            json.loads((run / "metrics.json").read_text()),
            checkpoint.read(run / "checkpoints/best.ckpt"),
        )
        how = f"python train.py model={model} task={task} optim.steps={STEPS[task]}"  # names no folder of ours
        metrics["command"] = weights["zoo"]["command"] = how
        path = shipped.save(weights, name, card(metrics, zoo.load(run).task))
        console.say(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
