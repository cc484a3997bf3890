"""The tables of docs/devices.md: the same runs by one process and by two, and runs that change their processes midway.

    python docs/devices.py        # trains all, about five minutes on two cores, and writes the page

All runs of two processes are made by one pair of processes, which torchrun starts with this file and their jobs.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import zoo
from zoo.console import quiet, say
from zoo.files import write
from zoo.training.callbacks import read_rows

PAGE = Path(__file__).with_suffix(".md")
FAMILIES = ("transformer", "hypernet", "moe", "hyper_moe", "merged_experts", "fast_weights")
TASKS: dict[str, dict[str, Any]] = {
    "regression": {"name": "regression", "points": 5, "queries": 3},
    "text": {"name": "text", "tokens": 40, "domains": ["law", "code"]},
    "prompts": {"name": "prompts", "context": 24, "query": 4, "target": 12, "domains": ["law", "code"]},
}
SIZES = {"dim": 16, "layers": 2, "heads": 2, "hidden": 16}
OPTIM = {"steps": 20, "batch_size": 8, "warmup": 2, "schedule": "constant"}
OFTEN = {"validate_every": 10, "log_every": 5, "validation_batches": 2, "test_batches": 3}
MOE = {"experts": 4, "bias_rate": 0.01}


class Job(NamedTuple):
    """A run: which family on which task, by which strategy (one: a process alone), with what else; then, if it goes on
    from half of its steps by another strategy, by which."""

    family: str
    task: str
    how: str
    more: str = ""
    then: str = ""

    @property
    def name(self) -> str:
        return "-".join(filter(None, (self.family, self.task, self.how, self.more, self.then)))


MORE: dict[str, dict[str, Any]] = {
    "": {},
    "accumulate": {"optim": {"accumulate": 2}},
    "shared": {"model": {"shared": 2}},
    "checkpointing": {"activation_checkpointing": True},
    "bf16": {"trainer": {"precision": "bf16-mixed"}},
    "adamw": {"optim": {"name": "adamw"}},
    "clipped": {"optim": {"clip": 0.01}},
    "compile": {"compile": True},
}
LIMITS = {"regression": 1e-5, "text": 1e-4, "prompts": 1e-4}
"""Largest difference of a weight to that of one process; of hypernetworks 1e-4 everywhere."""


def strategies(family: str) -> tuple[str, ...]:
    return ("ddp", "fsdp", "experts") if family == "moe" else ("ddp", "fsdp")


SAME = [Job(family, task, how) for family in FAMILIES for task in TASKS for how in strategies(family)] + [
    Job("moe", "text", how, more) for more in list(MORE)[1:] for how in strategies("moe")
]
CHANGED = [
    Job("moe", "text", *way)
    for way in [
        *(("one", "", how) for how in ("ddp", "fsdp", "experts")),
        *((how, "", "one") for how in ("ddp", "fsdp", "experts")),
        *(("ddp", "", "fsdp"), ("fsdp", "", "ddp"), ("fsdp", "", "experts"), ("experts", "", "ddp")),
    ]
] + [Job("hypernet", "regression", "fsdp", "adamw", "one"), Job("hypernet", "regression", "ddp", "", "fsdp")]


def train(folder: Path, job: Job, second: bool) -> None:
    """The run, or its half: the first of two, or the second."""
    more, how = MORE[job.more], job.then if second else job.how
    trainer = {"accelerator": "cpu", "enable_progress_bar": False, **more.get("trainer", {})}
    trainer |= {"strategy": "auto", "devices": 1} if how == "one" else {"strategy": how, "devices": 2}
    steps = OPTIM["steps"] // 2 if job.then and not second else OPTIM["steps"]
    if second:
        zoo.train(resume=str(folder / job.name), optim={"steps": OPTIM["steps"]}, trainer=trainer)
        return
    model = {"name": job.family, **SIZES, **(MOE if job.family == "moe" else {}), **more.get("model", {})}
    options = {name: more[name] for name in ("compile", "activation_checkpointing") if name in more}
    optim = {**OPTIM, **more.get("optim", {}), "steps": steps}
    zoo.train(model, TASKS[job.task], optim, trainer, **OFTEN, **options, seed=1, out=str(folder / job.name))


def work(folder: Path, jobs: Iterable[Job]) -> None:
    """Trains what of the jobs is that of this process, or of this pair; writes why one is refused."""
    pair = torch.distributed.is_torchelastic_launched()
    for job in jobs:
        for second in (False, True)[: 1 + bool(job.then)]:
            how = job.then if second else job.how
            if (how != "one") != pair or (folder / f"{job.name}.txt").exists():
                continue
            try:
                train(folder, job, second)
            except ValueError as error:
                write(folder / f"{job.name}.txt", str(error))


def pairs(folder: Path, jobs: list[Job]) -> None:
    """Has two processes train what takes two."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, __file__, str(folder), *map(json.dumps, jobs)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])


def everything(folder: Path, jobs: list[Job]) -> None:
    """All runs, and each as one process makes it without a stop."""
    alone = {job._replace(how="one", then="") for job in jobs}
    firsts = [job for job in jobs if job.how == "one"]
    for job in [*alone, *firsts]:
        train(folder, job, False)
    pairs(folder, [job for job in jobs if {job.how, job.then} & {"ddp", "fsdp", "experts"}])
    for job in jobs:
        if job.then == "one":
            train(folder, job, True)


def weights(run: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights of the last checkpoint and moments of its optimiser, by name."""
    saved = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    moments = {
        f"{i}.{name}": torch.as_tensor(value)
        for i, state in saved["optimizer_states"][0]["state"].items()
        for name, value in state.items()
    }
    return saved["state_dict"], moments


def largest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def compared(folder: Path, job: Job) -> dict[str, float | str]:
    """Largest differences to the run of one process: of weights, of moments, of what is logged and what is tested."""
    if (folder / f"{job.name}.txt").exists():
        return {"refused": (folder / f"{job.name}.txt").read_text()}
    ours, alone = folder / job.name, folder / job._replace(how="one", then="").name
    (w, m), (w1, m1) = weights(ours), weights(alone)
    rows = [
        {(row["step"], key): value for row in read_rows(run / "metrics.jsonl") for key, value in row.items()}
        for run in (ours, alone)
    ]
    names = {name for name in rows[1] if name[1] not in ("seconds", "step")}
    assert names <= rows[0].keys(), names - rows[0].keys()
    tests = [json.loads((run / "metrics.json").read_text())["test"] for run in (ours, alone)]
    with np.load(ours / "test.npz") as a, np.load(alone / "test.npz") as b:
        assert (a["weight"] == b["weight"]).all()
        sequences = float(np.abs(a["main"] - b["main"]).max())
    return {
        "weights": largest(w, w1),
        "moments": largest(m, m1),
        "logged": max(abs(rows[0][name] - rows[1][name]) for name in names),
        "test": max(abs(tests[0][name] - tests[1][name]) for name in tests[1]),
        "sequences": sequences,
    }


def table(folder: Path, jobs: list[Job]) -> str:
    head = ["run", "weights", "moments", "logged", "test", "of a sequence"]
    rows = [head, ["---"] * len(head)]
    for job in jobs:
        found = compared(folder, job)
        label = f"{job.family}, {job.task}{job.more and f', {job.more}'}: {job.how}{job.then and f' → {job.then}'}"
        cells = [f"refused: {found['refused']}"] if "refused" in found else [f"{x:.0e}" for x in found.values()]
        rows.append([label, *cells, *[""] * (len(head) - 1 - len(cells))])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    quiet()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        everything(folder, [*SAME, *CHANGED])
        text = PAGE.read_text(encoding="utf-8")
        for mark, jobs in (("same", SAME), ("changed", CHANGED)):
            made = f"<!-- {mark} -->\n{table(folder, jobs)}\n<!-- /{mark} -->"
            text = re.sub(rf"<!-- {mark} -->\n.*?<!-- /{mark} -->", lambda _: made, text, flags=re.DOTALL)  # noqa: B023
        write(PAGE, text)
        say(str(PAGE))


if __name__ == "__main__":
    if sys.argv[1:]:
        torch.set_num_threads(1)
        work(Path(sys.argv[1]), [Job(*json.loads(job)) for job in sys.argv[2:]])
    else:
        main()
