"""Trains one model of the zoo: python train.py model=hypernet. All options: python train.py --help."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal import utils as hydra_utils
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from zoo import console

CONF = Path(__file__).parent / "conf"
PRESETS = ("experiment", "debug")


def added(argument: str) -> str:
    """`argument` such that Hydra passes an unknown option on to zoo.config, which says "did you mean"."""
    option = re.match(r"(\w+)(\.[^=]*)?=", argument)
    if option is None or option[1] in ("hydra", "logger") or (not option[2] and (CONF / option[1]).is_dir()):
        return argument
    return f"++{argument}"


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
    paths: list[str] = []
    for override in overrides:
        path, _, value = override.lstrip("+").partition("=")
        if path in PRESETS and value != "null":
            preset: Any = OmegaConf.to_container(OmegaConf.load(CONF / path / f"{value}.yaml"))
            for key, options in preset.items():
                paths += [f"{key}.{option}" for option in options] if isinstance(options, dict) else [key]
        elif path in ("model", "task"):
            named: Any = OmegaConf.to_container(OmegaConf.load(CONF / path / f"{value}.yaml"))
            # a file that builds on another one asks for what it changes
            paths += [f"{path}.{option}" for option in named] if "defaults" in named else [f"{path}.name"]
        else:
            paths.append(path)
    asked: dict[str, Any] = {}
    for path in paths:
        group, _, option = path.partition(".")
        if group in ("model", "task", "optim") and option and option != "defaults":
            asked.setdefault(group, {})[option] = config[group][option]
        elif group in config and not option and not isinstance(config[group], dict):
            asked[group] = config[group]
    return asked


class Reported(Exception):
    """A job of a sweep failed, which was said already; the next ones are run all the same."""


def failed(error: Exception, code: int, sweep: bool) -> NoReturn:
    """One line, and the end of this job."""
    if os.environ.get("HYDRA_FULL_ERROR"):
        raise error
    console.say(f"error: {error if code == 1 else console.describe(error)}", sys.stderr)
    if sweep:
        raise Reported from error
    sys.exit(code)


def train_alone(overrides: list[str], folder: str) -> dict[str, Any]:
    """One job of a sweep over several processes, in a process of its own: its ranks must not repeat the sweep."""
    subprocess.run([sys.executable, __file__, *overrides, f'hydra.run.dir="{folder}"'], check=True)
    return json.loads(Path(folder, "metrics.json").read_text(encoding="utf-8"))


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float | None:
    state = HydraConfig.get()
    folder, overrides = state.runtime.output_dir, list(state.overrides.task)
    sweep = state.mode == RunMode.MULTIRUN
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    trainer, logger = config.pop("trainer"), config.pop("logger")
    if sweep and trainer.get("devices", 1) not in (1, "1", "auto"):
        try:
            metrics = train_alone(overrides, folder)
        except subprocess.CalledProcessError as error:
            raise Reported from error
        return metrics["test"].get(metrics["headline"])

    from zoo.callbacks import Interrupted
    from zoo.memory import keep_freed_memory
    from zoo.training import Untested, run

    keep_freed_memory()
    try:
        config["out"] = folder
        if config["resume"]:
            config = {**asked_for(config, overrides), "resume": config["resume"]}
        # objects are made from conf/ alone, which belongs to whoever runs this; nothing of a checkpoint gets here
        arguments = hydra.utils.instantiate(trainer, _convert_="all")
        loggers = [hydra.utils.instantiate(logger, _convert_="all", save_dir=folder)] if logger else []
        metrics = run(config, arguments, loggers)
    except (ValueError, OSError) as error:
        if not config.get("resume") and Path(folder) != Path.cwd():
            with contextlib.suppress(OSError):  # Hydra made the folder before anything was checked; it stays if in use
                os.rmdir(folder)
        if not console.expected(error):
            raise
        failed(error, 2, sweep)
    except Untested as error:
        failed(error, error.code, sweep)
    except Interrupted as stop:
        console.say(f"\n{stop}", sys.stderr)
        sys.exit(stop.code)
    except Exception as error:
        if sweep:  # the next jobs are run before Hydra shows more of it
            console.say(f"error: {console.describe(error)}", sys.stderr)
        raise
    finally:
        if "wandb" in sys.modules:  # else the next job of a sweep would go on with this run
            try:
                sys.modules["wandb"].finish()
            except Exception as error:
                console.warn(f"wandb.finish failed: {console.describe(error)}")
    return metrics["test"].get(metrics["headline"])


@console.command
def start() -> int:
    try:
        main()
    except CompactHydraException as error:
        console.say(str(error), sys.stderr)
        if isinstance(error.__cause__, OmegaConfBaseException):
            console.say(str(error.__cause__), sys.stderr)
        return 1
    except Reported:
        return 1
    return 0


if __name__ == "__main__":
    OmegaConf.register_new_resolver("run_folder", run_folder)
    sys.argv[1:] = [added(argument) for argument in sys.argv[1:]]
    # Hydra's own way with an error, of a folder that cannot be made too, is a traceback and exit code 1
    hydra_utils.run_and_report = lambda func: func()
    sys.exit(start())
