"""Jobs of a sweep: what the complete ones came to, and the table at its end."""

from __future__ import annotations

import json
from pathlib import Path

from zoo.config import plain
from zoo.files import home
from zoo.training.callbacks import read_rows
from zoo.training.options import of_run


def finished(options: dict) -> dict | None:
    """What the complete run with these options in the folder `out` came to, None where there is none; raises ValueError
    for one with other options."""
    file = home(options["out"]) / "metrics.json"
    if not file.is_file():
        return None
    asked = {key: value for key, value in options.items() if key not in ("trainer", "logger")}
    config, _ = of_run({**plain(asked), "resume": options["out"]})
    metrics = json.loads(file.read_text(encoding="utf-8"))
    return metrics if metrics["steps"] >= config.optim["steps"] else None


def table(folder: Path, failed: set[str]) -> str:
    """The table of all jobs of a sweep, whether complete or not, or `failed`; options are chosen by the validation."""
    runs = sorted({path.parent.parent for path in folder.glob("*/checkpoints/*.ckpt")} | {folder / x for x in failed})
    rows = [("job", "steps", "seconds", "parameters", "validation", "test")]
    for run in runs:
        try:
            metrics = {} if run.name in failed else json.loads((run / "metrics.json").read_text(encoding="utf-8"))
            test = f"{metrics['main_metric']} {metrics['test'][metrics['main_metric']]:.4g}"
            size = f"{metrics['params_total']:,}"
            losses = [row["validation_loss"] for row in read_rows(run / "metrics.jsonl") if row.get("validation_loss")]
            best = f"{min(losses):.4g}" if losses else ""
            rows.append((run.name, str(metrics["steps"]), f"{metrics['seconds']:.0f}", size, best, test))
        except (OSError, ValueError, KeyError, TypeError):
            how = "failed" + "; holds an earlier run" * (run / "metrics.json").is_file()
            rows.append((run.name, "", "", "", "", how if run.name in failed else "not complete"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(["", f"{folder}: {len(runs)} runs", *lines])
