"""Trains one model of the zoo: python train.py model=hypernet. All options: python train.py --help."""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import hydra
from hydra._internal import utils as internal
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from zoo import console
from zoo.config import did_you_mean, one_line, show
from zoo.files import home

CONF = Path(__file__).parent / "conf"
HYDRAS = (HydraException, OmegaConfBaseException)
FAILED: set[str] = set()
"""The names of the jobs of this sweep that ended with a mistake, which was said."""


def parsed(word: str) -> Override | None:
    """A word of the command line as Hydra understands it, None for what is no option=value."""
    with suppress(HydraException):
        return OverridesParser.create().parse_override(word)
    return None


def added(argument: str) -> str:
    """`argument` such that Hydra reads it: an unknown option is passed on to zoo.config, which says "did you mean", and
    a text with signs that Hydra keeps for itself, as in out=runs/lr=0.1, is quoted."""
    key, equals, value = argument.partition("=")
    if argument.startswith("-") or not equals:
        return argument
    option = re.fullmatch(r"(\w+)(\..*)?", key)
    if option and option[1] != "hydra" and (option[2] or not (CONF / option[1]).is_dir()):
        key = f"++{key}"
    if key in ("hydra.sweep.dir", "hydra.run.dir") and value.startswith("~"):  # which shells leave as it is there
        value = str(home(value))
    if not parsed(f"{key}={value}") and not value.startswith(("[", "{", "'", '"')):
        value = quoted(value)
    return f"{key}={value}"


def quoted(text: str) -> str:
    return QuotedString(text, Quote.double).with_quotes()


def reason(error: Exception) -> str:
    """One line on a mistake in the command line."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, name = error.missing_cfg_file.rpartition("/")
        extra = {"joblib": "parallel", "submitit_slurm": "slurm", "submitit_local": "slurm"}.get(name, "")
        install = f"; it comes with python -m pip install -c constraints.txt -e '.[{extra}]'" if extra else ""
        return f"{group} {show(name)} does not exist{install or did_you_mean(name, error.options)}"
    if not isinstance(error, HYDRAS):
        return console.describe(error)
    text = one_line(f"{error} {error.__cause__ or ''}").partition(" See http")[0].replace("'++", "'")
    if "--multirun" in text:
        return f"{text.partition(' 1. ')[0]}; several values of one option are runs of a sweep: python train.py -m …"
    if isinstance(error, OverrideParseException):
        word = error.override.lstrip("+")
        if "=" not in word:
            return f"{show(word)} is no option: options are written name=value; python train.py --help shows them"
        return f'{word} cannot be read: {text}; texts in a list are quoted where they have signs: \'option=["a","b"]\''
    return text


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float | None:
    state = HydraConfig.get()
    folder = Path(state.runtime.output_dir)  # made by Hydra: of a job of a sweep, or hydra.run.dir
    own = folder != Path.cwd()
    scores: list[float | None] = []
    code = console.command(job, HYDRAS, reason)(cfg, str(place_of(state, folder)) if own else None, scores)
    if own:
        with suppress(OSError):  # what is in use stays
            folder.rmdir()
    if state.mode == RunMode.RUN or code > 2:  # stopped: no further job
        sys.exit(code)
    if code:
        name = place_of(state, folder).name
        FAILED.add(name)
        console.say(f"this was {name}", sys.stderr)
        return None
    return scores[0] if scores and scores[0] is not None else math.nan  # which sweepers of Hydra can search by


def place_of(state: Any, folder: Path) -> Path:
    """The run folder of a job: in a sweep that names none it is called by what varies, by name, as model=moe,seed=1."""
    if state.mode == RunMode.RUN or state.sweep.subdir != str(state.job.num):
        return folder
    words, fixed = state.overrides.task, {*state.job.config.override_dirname.exclude_keys}
    pairs = [word.lstrip("+").partition("=") for word in words]
    pairs = [pair for pair in pairs if pair[0] not in fixed]
    by_name = sorted(pairs, key=lambda pair: pair[0])
    given, place = (folder.with_name(name_of(those) or folder.name) for those in (pairs, by_name))
    return given if (given / "checkpoints").exists() else place  # older sweeps kept the order of the command line


def name_of(pairs: list[tuple[str, str, str]]) -> str:
    """What a folder is called that has these options."""
    name = re.sub(r"[^\w.,=+-]+", "_", ",".join(map("".join, pairs)))
    # file systems take 255 bytes
    return name if len(name) <= 150 else f"{name[:130]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def job(cfg: DictConfig, folder: str | None, scores: list[float | None]) -> int:
    """Trains what Hydra composed, in `folder` unless it says another, and puts its main metric into `scores`; returns
    the exit code."""
    from zoo.compare.sweep import finished
    from zoo.memory import keep_freed_memory
    from zoo.training.run import train

    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    asked = [word.lstrip("+").partition("=")[0] for word in HydraConfig.get().overrides.task]
    decided: dict[str, tuple[str, ...]] = {"model": ("hidden",) if config.get("budget") else ()}
    if config.get("model", {}).get("base"):
        sizes = ("dim", "layers", "heads", "kv_heads", "hidden", "tied", "theta", "eps")
        decided = {"model": sizes, "task": ("tokenizer", "vocabulary")}
    for group, name in ((group, name) for group, names in decided.items() for name in names):
        if f"{group}.{name}" not in asked:  # that of conf/ is nobody's wish
            config.get(group, {}).pop(name, None)
    place: list[str] = []  # what tells a process of this job where it works
    if config["resume"] is None:
        config["out"] = out = config["out"] or folder
        place = [f"out={quoted(out)}"] if out else []
        if out and HydraConfig.get().mode == RunMode.MULTIRUN:  # maybe this sweep was started before
            if metrics := finished(config):
                console.say(f"{out} is complete")
                scores.append(metrics["test"].get(metrics["main_metric"]))
                return 0
            if (home(out) / "checkpoints/last.ckpt").is_file():
                config["resume"], place = out, [f"resume={quoted(out)}"]
    given = config.get("trainer", {})
    alone = str(given.get("devices", 1)) == "1" and given.get("strategy", "auto") == "auto"
    if folder and (not alone or (config["resume"] and not place)):
        # the processes of a job repeat its command line, which must not be the sweep, and find each other by variables
        # of the environment that stay
        code = elsewhere([*HydraConfig.get().overrides.task, *place])
        if not code and place:
            metrics = json.loads(Path(config["out"], "metrics.json").read_text(encoding="utf-8"))
            scores.append(metrics["test"].get(metrics["main_metric"]))
        return code
    keep_freed_memory()
    gc.collect()  # trainers of a sweep's earlier jobs hold each other: one gigabyte after ten jobs, not two
    # objects are made from conf/ alone, which belongs to whoever runs this; nothing of a checkpoint gets here
    trainer = hydra.utils.instantiate(config.pop("trainer", {}), _convert_="all")
    metrics = train(trainer=trainer, **config)
    scores.append(metrics["test"].get(metrics["main_metric"]))
    return 0


def elsewhere(words: list[str]) -> int:
    """The exit code of this command with other words, in a process of its own; what stops the sweep waits for its
    checkpoint."""
    process = subprocess.Popen([sys.executable, __file__, *words])
    try:
        return process.wait()
    except (KeyboardInterrupt, console.Interrupted) as stop:
        if isinstance(stop, console.Interrupted):  # a terminal sends Ctrl-C to both
            process.terminate()
        process.wait()
        raise


def arguments_of(line: list[str]) -> list[str]:
    """The arguments that Hydra reads for those of the command line: a resumed run has no defaults."""
    if {"-sc", "--shell-completion"} & {*line}:
        return line
    line = sorted(line, key=lambda word: word not in ("-m", "--multirun"))  # argparse wants them before the options
    arguments = [added(argument) for argument in line]
    if any(argument.startswith("++resume=") and argument != "++resume=null" for argument in arguments):
        # first: Lightning puts words behind the line for its other processes, and argparse wants them together
        arguments = ["--config-name=resume", *arguments]
    if {"-m", "--multirun"} & {*line}:
        arguments += sweep_of(arguments)
    return arguments


def sweep_of(arguments: list[str]) -> list[str]:
    """Where a sweep works, by the name of its experiment or else by the time, and which options are the same in all of
    its jobs, so that the others name them."""
    words = [word for word in map(parsed, arguments) if word]
    fixed = [word.key_or_group.lstrip("+") for word in words if not word.is_sweep_override()]
    given = {word.key_or_group.lstrip("+"): word.value() for word in words}
    if "out" in fixed and "${" not in str(given["out"]):
        advice = "leave it away: hydra.sweep.dir=FOLDER is that of all"
        raise ValueError(f"out={given['out']} is one folder, and each job of a sweep needs its own; {advice}")
    name = given.get("experiment", "null")
    place = name if isinstance(name, str) and name != "null" else f"{datetime.now():%Y-%m-%d/%H-%M-%S}"
    own = [] if "hydra.sweep.dir" in given else [f"hydra.sweep.dir=multirun/{place}"]
    return [*own, f"hydra.job.config.override_dirname.exclude_keys=[{','.join(fixed)}]"]


def start() -> int:
    sys.argv[1:] = arguments = arguments_of(sys.argv[1:])
    try:
        main()
    finally:
        if {"-m", "--multirun"} & {*arguments}:
            dirs = [argument.partition("=")[2] for argument in arguments if argument.startswith("hydra.sweep.dir=")]
            for folder in dirs[-1:]:
                end_of_sweep(Path(folder.strip("\"'")))
    return int(bool(FAILED))


def reported(func: Callable[[], Any]) -> Any:
    """What `func` of Hydra gives, in place of its own way, which takes many lines on a mistake and says 1."""
    result = func()
    FAILED.update(failed(result))
    return result


def failed(result: Any) -> Iterator[str]:
    """The names of jobs that came to nothing, out of what a sweep gives: they may have run in other processes."""
    for batch in result if isinstance(result, list) else ():
        for done in batch:
            if done.return_value is None:
                state = done.hydra_cfg.hydra
                yield place_of(state, Path(state.runtime.output_dir)).name


def end_of_sweep(folder: Path) -> None:
    """Says what the jobs of a sweep came to."""
    if FAILED or any(folder.glob("*/metrics.json")):
        from zoo.compare.sweep import table

        console.say(table(folder, FAILED))


if __name__ == "__main__":
    internal.run_and_report = reported
    argparse.ArgumentParser.error = console.Parser.error  # type: ignore[assignment,method-assign]
    sys.exit(console.command(start, HYDRAS, reason)())
