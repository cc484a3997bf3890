"""Trains one model of the zoo: python train.py model=hypernet. All options: python train.py --help."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import hydra
from hydra._internal import utils as internal
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from zoo import console
from zoo.config import did_you_mean, one_line, show
from zoo.files import home
from zoo.training.run_folder import fresh

CONF = Path(__file__).parent / "conf"
PRESETS = ("experiment", "debug")
HYDRAS = (HydraException, OmegaConfBaseException)


FAILED: list[str] = []
"""Folders of the jobs of this sweep that ended with a mistake, which was said."""


class JobFailed(Exception):
    """A job of a sweep ended with a mistake, which was said."""


def added(argument: str) -> str:
    """`argument` such that Hydra reads it: an unknown option is passed on to zoo.config, which says "did you mean", and
    words with signs that Hydra keeps for itself, as in out=runs/lr=0.1, are quoted."""
    option = re.match(r"(\w+)(\.[^=]*)?=", argument)
    if "=" not in argument:
        return argument
    if option and option[1] != "hydra" and (option[2] or not (CONF / option[1]).is_dir()):
        argument = f"++{argument}"
    key, _, value = argument.partition("=")
    for attempt in (argument, f"{key}={re.sub(r'[^][,]+', _quoted, value)}"):
        with contextlib.suppress(HydraException):
            OverridesParser.create().parse_override(attempt)
            return attempt
    return argument


def _quoted(word: re.Match[str]) -> str:
    text = word[0].strip()
    return text if not text or text[0] in "'\"" else QuotedString(text, Quote.double).with_quotes()


def checked(arguments: list[str]) -> list[str]:
    """The arguments as Hydra reads them; raises ValueError for those that it would take for another thing or ignore."""
    if "-sc" in arguments or "--shell-completion" in arguments:
        return arguments  # install=bash is no option of ours
    arguments = [argument if argument.startswith("-") else added(argument) for argument in arguments]
    parser = internal.get_args_parser()
    parser.error = MethodType(console.Parser.error, parser)  # type: ignore[method-assign]
    known = parser.parse_args(arguments)
    for word in known.overrides:
        if "=" not in word and not word.startswith("~"):
            groups = [
                f"{folder.name}={word}" for folder in sorted(CONF.iterdir()) if (folder / f"{word}.yaml").exists()
            ]
            hint = f"did you mean {groups[0]}?" if groups else "python train.py --help shows them"
            raise ValueError(f"{show(word)} is no option: options are written name=value; {hint}")
    options = {parsed.key_or_group: parsed for parsed in OverridesParser.create().parse_overrides(known.overrides)}
    if known.multirun and "out" in options:
        raise ValueError("out= names one run folder, -m starts many: hydra.sweep.dir=FOLDER is that of all of them")
    if "hydra.run.dir" in options and options["hydra.run.dir"].value() != ".":
        raise ValueError("hydra.run.dir is decided by the option out")
    return arguments


def reason(error: Exception) -> str:
    """One line on a mistake in the command line."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return f"{group} {show(name)} does not exist{did_you_mean(name, error.options)}"
    if not isinstance(error, HYDRAS):
        return one_line(error) if isinstance(error, RuntimeError) else console.describe(error)
    text = one_line(f"{error} {error.__cause__ or ''}")
    if "--multirun" in text:
        return f"{text.partition(' 1. ')[0]}; several values of one option are runs of a sweep: python train.py -m …"
    if isinstance(error, OverrideParseException):
        signs = '; a text with signs beyond letters, digits and /.-_ is quoted: \'option="text"\', \'option=["a","b"]\''
        return f"{error.override.lstrip('+')} cannot be read: {text.partition(' See http')[0]}{signs}"
    return text.replace("'++", "'")


def as_command(main: Callable[..., Any]) -> Callable[..., int]:
    return console.command(main, HYDRAS, reason)


def asked_for(config: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """The part of `config` that the command line named: a resumed run takes all else from its checkpoint."""
    asked: dict[str, Any] = {}
    for override in OverridesParser.create().parse_overrides(overrides):
        group, _, option = override.key_or_group.partition(".")
        named: Any = {group: [option.partition(".")[0]]}
        file = CONF / group / f"{override.value()}.yaml"
        if (
            group in (*PRESETS, "model", "task", "trainer", "logger")
            and isinstance(override.value(), str)
            and not option
        ):
            named = OmegaConf.to_container(OmegaConf.load(file))
            if group in ("model", "task") and "defaults" not in named:  # a file that builds on another is its changes
                named = ["name"]
            named = named if group in PRESETS else {group: named}
        for key, options in named.items():
            if isinstance(config.get(key), dict):
                found = {name: config[key][name] for name in options or () if name in config[key]}
                asked[key] = {**asked.get(key, {}), **found}
            elif key in config:
                asked[key] = config[key]
    return asked


def train_alone(overrides: list[str], folder: str, resume: str | None) -> dict[str, Any]:
    """One job of a sweep over several processes, in a process of its own: its ranks must not repeat the sweep."""
    out = [] if resume else [f"out={QuotedString(folder, Quote.double).with_quotes()}"]
    if subprocess.run([sys.executable, __file__, *overrides, *out]).returncode:
        raise JobFailed
    path = home(resume or folder)
    return json.loads(((path if path.is_dir() else path.parent.parent) / "metrics.json").read_text(encoding="utf-8"))


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float | None:
    state = HydraConfig.get()
    if state.mode != RunMode.MULTIRUN:
        sys.exit(
            as_command(job)(cfg, list(state.overrides.task), None)
        )  # an error that got to Hydra is more than a line
    folder = state.runtime.output_dir
    try:
        return job(cfg, list(state.overrides.task), folder)
    except BrokenPipeError:
        raise
    except JobFailed:  # of which Hydra would say more
        pass
    except Exception as error:  # the next jobs are run before Hydra shows more of one that is not expected
        console.say(f"error: {reason(error)}", sys.stderr)
        if not console.expected(error, *HYDRAS):
            raise
    finally:
        with contextlib.suppress(OSError):  # Hydra made the folder of the job; what is in use stays
            os.rmdir(folder)
    FAILED.append(folder)
    return None


def job(cfg: DictConfig, overrides: list[str], folder: str | None) -> float | None:
    """Trains what Hydra composed, in `folder` if it is a job of a sweep; returns the main metric."""
    from zoo.training.memory import keep_freed_memory
    from zoo.training.run import run

    keep_freed_memory()
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    if folder and (config["resume"] or str(config.get("trainer", {}).get("devices", 1)) != "1"):
        metrics = train_alone(overrides, folder, config["resume"])
    else:
        config["out"] = folder or config["out"]
        if config["resume"]:
            config = asked_for(config, overrides)
        # objects are made from conf/ alone, which belongs to whoever runs this; nothing of a checkpoint gets here
        trainer = hydra.utils.instantiate(config.pop("trainer", {}), _convert_="all")
        metrics = run(config, trainer, config.pop("logger", {}))
    return metrics["test"].get(metrics["main_metric"])


def start() -> int:
    sys.argv[1:] = checked(sys.argv[1:])
    main()
    return 1 if FAILED else 0


if __name__ == "__main__":
    OmegaConf.register_new_resolver("fresh_folder", lambda path: str(fresh(path)), use_cache=True, replace=True)
    internal.run_and_report = lambda func: func()  # Hydra's own takes many lines and says 1
    sys.exit(as_command(start)())
