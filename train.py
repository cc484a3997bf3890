"""Trains one model of the zoo: python train.py model=hypernet. All options: python train.py --help."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

OPTION = re.compile(r"^(model|task|optim)\.[^=]*=")


def run_folder(out: str | None, resume: str | None, model: str, task: str) -> str:
    """The folder that a run resumes, else `out`, else runs/MODEL-TASK/ID, the id from $ZOO_RUN_ID or the time."""
    if out and not resume:
        return out
    if resume:
        path = Path(resume)
        return str(path if path.is_dir() else path.parent.parent)
    return f"runs/{model}-{task}/{os.environ.get('ZOO_RUN_ID') or time.strftime('%Y-%m-%d_%H-%M-%S')}"


def asked_for(config: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """The part of `config` that the command line named: a resumed run takes all else from its checkpoint."""
    asked: dict[str, Any] = {}
    for override in overrides:
        path = override.split("=")[0].lstrip("+").split("@")[0]
        if path in ("model", "task"):
            path += ".name"
        group, _, option = path.partition(".")
        if group in ("model", "task", "optim") and option:
            asked.setdefault(group, {})[option] = config[group][option]
        elif group in config and not option and not isinstance(config[group], dict):
            asked[group] = config[group]
    return asked


def train_alone(overrides: list[str], folder: str) -> dict[str, Any]:
    """One job of a sweep over several processes, in a process of its own: its ranks must not repeat the sweep."""
    subprocess.run([sys.executable, __file__, *overrides, f"hydra.run.dir={folder}"], check=True)
    return json.loads(Path(folder, "metrics.json").read_text())


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float:
    state = HydraConfig.get()
    folder, overrides = state.runtime.output_dir, list(state.overrides.task)
    sweep = state.mode == RunMode.MULTIRUN
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    trainer, logger = config.pop("trainer"), config.pop("logger")
    if sweep and trainer.get("devices", 1) not in (1, "1", "auto"):
        metrics = train_alone(overrides, folder)
        return metrics["test"][metrics["headline"]]

    from zoo.callbacks import Interrupted
    from zoo.training import run

    try:
        config["out"] = folder
        if config["resume"]:
            config = {**asked_for(config, overrides), "resume": config["resume"]}
        # objects are made from conf/ alone, which belongs to whoever runs this; nothing of a checkpoint gets here
        arguments = hydra.utils.instantiate(trainer, _convert_="all")
        loggers = [hydra.utils.instantiate(logger, _convert_="all", save_dir=folder)] if logger else []
        metrics = run(config, arguments, loggers)
    except ValueError as error:
        if sweep or os.environ.get("HYDRA_FULL_ERROR"):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as stop:
        print(f"\n{stop}", file=sys.stderr)
        sys.exit(stop.code)
    return metrics["test"][metrics["headline"]]


if __name__ == "__main__":
    OmegaConf.register_new_resolver("run_folder", run_folder)
    # Hydra refuses an unknown key without a hint; added with ++, it reaches zoo.config, which says "did you mean"
    sys.argv[1:] = [f"++{argument}" if OPTION.match(argument) else argument for argument in sys.argv[1:]]
    main()
