"""Tests trained models again, on other data, lengths or seeds: python -m zoo.evaluate RUN task.points=40."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from zoo import console
from zoo.config import from_dict, one_line, plain, show
from zoo.console import say

EPILOG = """Words with = are options of the test: task.NAME, seed, test_batches or optim.batch_size, as of train.py; the
others are as in training. The result lies in RUN/evaluations/NAME.json, which python -m zoo.compare reads."""
OPTIONS = ("task", "optim", "seed", "test_batches")


@console.command
def main(argv: list[str] | None = None) -> int:
    parser = console.Parser("python -m zoo.evaluate", description=__doc__, epilog=EPILOG)
    parser.add_argument("words", nargs="+", metavar="RUN|OPTION=VALUE", help="runs, checkpoints or sweeps, and options")
    parser.add_argument("--name", help="of the result (default: made of the options)")
    parser.add_argument("--base", metavar="DIR", help="the pretrained model that is the W0 of runs with model.base")
    arguments = parser.parse_intermixed_args(argv)
    words = [word for word in arguments.words if re.match(r"[\w.]+=", word) and not Path(word).exists()]
    runs = [word for word in arguments.words if word not in words]
    if not runs:
        parser.error("no run is named")
    name = arguments.name or re.sub(r"[^\w.=,-]+", "_", ",".join(sorted(words))) or "test"
    if not re.fullmatch(r"[\w=,-][\w.=,-]{0,150}", name):
        parser.error(f"--name {show(name)} must be letters, digits and . = , - _: give a short one")
    from omegaconf import OmegaConf

    try:
        asked = plain(OmegaConf.to_container(OmegaConf.from_dotlist(words)))
    except Exception as error:  # those of OmegaConf and of YAML have no common kind
        raise ValueError(f"{' '.join(words)} cannot be read: {one_line(error, 200)}") from None
    sweeps = [sorted(path.parent for path in Path(run).glob("*/checkpoints")) or [run] for run in runs]
    for job in (job for jobs in sweeps for job in jobs):
        metrics = evaluate(str(job), asked, name, arguments.base)
        say(f"{metrics['checkpoint']}: {metrics['main_metric']} {metrics['test'][metrics['main_metric']]:.5g}")
    return 0


def evaluate(run: str, asked: dict[str, Any], name: str, base: str | None = None) -> dict[str, Any]:
    """Tests one run under the options asked; writes evaluations/`name`.json and .npz beside its checkpoints and returns
    what the former holds. Raises ValueError for options that are none of a test, or that the weights do not fit."""
    import lightning as L

    from zoo.console import quiet
    from zoo.records import results, shipped
    from zoo.training import checkpoint, validate
    from zoo.training.data import Stream
    from zoo.training.options import RunConfig

    own = from_dict(RunConfig, {key: asked[key] for key in asked.keys() & {*OPTIONS}}, "")
    others = [*(asked.keys() - {*OPTIONS}), *(f"optim.{key}" for key in own.optim.keys() - {"batch_size"})]
    if others or "name" in own.task:
        known = "task.OPTION, seed, test_batches and optim.batch_size"
        raise ValueError(f"{show(others[0] if others else 'task.name')} is no option of a test, which has {known}")
    file = checkpoint.find(run, "best")
    saved = checkpoint.read(file)
    options, run_options = saved["hyper_parameters"], saved["zoo"].get("config", {})
    if own.task:  # other data than those of training, maybe
        saved["task"].pop("corpus", None)
    of_test = {
        "model": options["model"],
        "task": {**options["task"], **own.task},
        "optim": {**options["optim"], **own.optim},
        "seed": own.seed if "seed" in asked else options["seed"],
    }
    try:
        model = validate.build(of_test, base)
        model.on_load_checkpoint(saved)
        model.load_state_dict(validate.like(saved["state_dict"], model.state_dict(), "state_dict"))
    except ValueError as error:
        raise ValueError(f"{file} cannot be tested so: {error}") from None
    batches = own.test_batches if "test_batches" in asked else run_options.get("test_batches", 20)
    quiet()
    model.task.prepare()
    test = Stream(model.task, "test", model.optim.batch_size, batches)
    test.shuffled = bool(run_options.get("shuffle_context"))
    silent: Any = dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary"), False)
    engine = L.Trainer(devices=1, enable_progress_bar=sys.stderr.isatty(), **silent)
    engine.test(model, test, verbose=False)
    seconds, where = (saved["zoo"].get(name) for name in ("seconds", "placement"))
    config = {**run_options, **options, "task": model.hparams["task"]}
    said = {"checkpoint": str(file), "command": console.command_line(), "config": config}
    metrics = results.numbers(engine, model, test, saved.get("global_step", 0), seconds or 0.0, where or {}, **said)
    folder = (file.parent.parent if file.parent.name == "checkpoints" else file.parent) / "evaluations"
    if shipped.WEIGHTS in file.parents:  # a package is not written to
        folder = Path("evaluations", file.parent.name, file.stem)
    folder.mkdir(parents=True, exist_ok=True)
    say(f"writes {folder / name}.json and .npz")
    results.save(folder / f"{name}.json", metrics, results.by_sequence(model, test), folder / f"{name}.npz")
    return metrics


if __name__ == "__main__":
    sys.exit(main())
