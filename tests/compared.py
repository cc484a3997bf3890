"""Run folders that comparisons read, as training writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

NAMES = {"transformer": 0.3, "hypernet": 0.2, "moe": 0.25}


def write_run(folder: Path, model: str = "transformer", seed: int = 0, errors: Any = None, **changes: Any) -> Path:
    """A run folder as training writes it; errors: (N) of its test; changes: of metrics.json, by dotted names."""
    options = {"name": model, "dim": 64, "layers": 2, **({"top_k": 2} if model == "moe" else {})}
    optim = {"name": "muon", "steps": 100, "batch_size": 32, "schedule": "wsd"}
    task = {"name": "regression", "points": 20, "files": None}
    params = 1000 * len(model)
    main = np.abs(NAMES[model] + 0.1 * np.random.default_rng(seed).normal(size=64)) if errors is None else errors
    main = np.asarray(main, np.float32)
    zero = dict.fromkeys(("nmse_zero", "nmse_zero_5"), 1.0 + seed)
    metrics: dict[str, Any] = {
        **{"task": "regression", "model": model, "seed": seed, "steps": 100, "seconds": 10.0, "tokens": 89_600},
        **{"tokens_per_second": 8960.0, "params_total": params, "params_active": 900, "flops_per_token": 2000.0},
        **{"flops": 537_600_000.0, "mfu": None, "memory_bytes": 5_000_000, "precision": "32-true", "devices": 1},
        **{"accelerator": "cpu", "data": None, "main_metric": "nmse", "versions": {}, "command": "python train.py"},
        "evaluation": {"split": "test", "batches": 2, "batch_size": 32, "seed": seed},
        "test": {"nmse": float(main.mean()), "nmse_wrong_context": 2 + params / 1e4, **zero},
        "config": {"model": options, "task": task, "optim": optim, "seed": seed, "out": str(folder), "logger": {}},
    }
    for name, value in changes.items():
        place = metrics
        *groups, last = name.split("__")
        for one in groups:
            place = place[one]
        place[last] = value
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    layers = {f"layer{k}/entropy": 1.0 + k for k in range(2)} if model == "moe" else {}
    at = ({"step": k, "seconds": k / 10, "flops": 5_376_000.0 * k, "tokens": 896 * k} for k in (50, 100))
    rows = [{**row, "validation_loss": 30 / row["step"] + 0.01 * seed, **layers} for row in at]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows) + '{"step": 1')
    np.savez(folder / "test.npz", main=main, weight=np.full(len(main), 8.0, np.float32))
    return folder


def write_sweep(folder: Path) -> Path:
    """Three families, three seeds."""
    for model in NAMES:
        for seed in range(3):
            write_run(folder / f"{model}-{seed}", model, seed)
    return folder
