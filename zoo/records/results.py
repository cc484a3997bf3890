"""What a run or a later test of it came to: the numbers of metrics.json, and the error of each test sequence."""

from __future__ import annotations

import hashlib
import platform
import resource
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist

from zoo.files import to_json, whole, write
from zoo.models import Model, flops
from zoo.training.data import Stream

PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12}
"""FLOP/s of dense products in 16 bits, by a part of the name of a GPU, from NVIDIA's data sheets."""


def numbers(
    engine: L.Trainer, model: Model, test: Stream, steps: int, seconds: float, where: dict[str, Any], **said: Any
) -> dict[str, Any]:
    """Sizes and costs of a model trained for `steps` in `seconds`, placed as `where` says, what else is `said` of it,
    and what came out of the test that `engine` has run."""
    count, cost = flops.parameters(model), flops.step_cost(model)
    tokens = steps * model.optim.batch_size * model.task.tokens
    name = torch.cuda.get_device_name() if where.get("accelerator") == "cuda" and torch.cuda.is_available() else ""
    peak = next((peak for part, peak in PEAKS.items() if part in name and "16" in str(where.get("precision"))), None)
    used, kept = steps * cost["flops"], model.task.state_dict()
    return {
        "task": model.task.config.name,
        "model": model.config.name,
        "seed": model.hparams["seed"],
        "steps": steps,
        "seconds": round(seconds, 3),
        "tokens": tokens,
        "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
        "params_total": count["total"],
        "params_active": count["active"],
        "params": count,
        "flops_per_token": flops.flops_per_token(model),
        "flops": used,
        "mfu": peak and used / (max(seconds, 1e-9) * peak * where["devices"]),
        **where,
        "data": kept.get("corpus"),
        "tokenizer": kept.get("tokenizer") and hashlib.sha256(kept["tokenizer"].encode()).hexdigest(),
        "evaluation": {"split": test.split, "batches": test.batches, "batch_size": test.size, "seed": model.task.seed},
        "main_metric": model.task.main_metric,
        "versions": {name: version(name) for name in ("zoo", "torch", "lightning")}
        | {"python": platform.python_version(), "commit": commit()},
        **said,
        "test": {name: float(value) for name, value in engine.callback_metrics.items()},
    }


def by_sequence(model: Model, test: Stream) -> dict[str, np.ndarray]:
    """main (N): the main metric of each test sequence, 0 for one without predictions; weight (N): how many it has.

    Each process calls this after the test, whose order of sequences is that of one process.
    """
    parts = [model.tested]
    if test.world > 1:
        parts = [[] for _ in range(test.world)]
        dist.all_gather_object(parts, model.tested)
    batches = []
    for index, batch in enumerate(zip(*parts, strict=True)):
        shared = test.passes and len(test.passes[index]) < test.world  # all processes have read the same
        batches.append(torch.cat(batch[:1] if shared else batch, 1))
    total_N, weight_N = torch.cat(batches, 1).numpy()
    return {"main": (total_N / np.maximum(weight_N, 1)).astype(np.float32), "weight": weight_N.astype(np.int64)}


def save(file: Path, metrics: dict[str, Any], sequences: dict[str, np.ndarray], arrays: Path) -> None:
    """Writes the numbers to `file` and the errors of test sequences to `arrays`."""
    with whole(arrays) as temporary:
        np.savez_compressed(temporary, **sequences)  # type: ignore[arg-type]
    write(file, to_json(metrics, 2) + "\n")


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that was allocated on a GPU, or that this process had on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def commit() -> str | None:
    """The commit of the repository that this file lies in, None outside of one."""
    with suppress(OSError, subprocess.SubprocessError):
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        return subprocess.check_output(git, text=True, stderr=subprocess.DEVNULL, timeout=10).strip()
    return None
