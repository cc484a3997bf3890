"""From options to numbers: what a run is, from the check of its options to the folder it leaves."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from zoo.config import one_line, plain, show
from zoo.console import Untested, command_line, describe, quiet, say, warn
from zoo.devices.faults import explained
from zoo.files import write
from zoo.models import Model
from zoo.records import results, summary
from zoo.records.budget import fitted
from zoo.records.card import card
from zoo.records.loggers import guarded, of_logger
from zoo.records.start import take_weights
from zoo.training import checkpoint, validate
from zoo.training.callbacks import Keeper
from zoo.training.data import Stream
from zoo.training.options import RunConfig, of_run, of_trainer, stored
from zoo.training.run_folder import place, taken
from zoo.training.trainer import make, placement


def train(
    model: str | Mapping[str, Any] | None = None,
    task: str | Mapping[str, Any] | None = None,
    optim: Mapping[str, Any] | None = None,
    trainer: Mapping[str, Any] | None = None,
    logger: str | Mapping[str, Any] | list[Logger] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Trains, tests and writes a run folder; returns what metrics.json holds; e.g. train(model="moe").

    model, task: a name, or a dict of options with the key `name` (default: transformer and regression, or what the run
    to resume was begun with); optim: options of OptimConfig; trainer: keyword arguments of lightning.Trainer; logger:
    as model, of LoggerConfig, or Lightning's own objects; further options: those of RunConfig. Raises ValueError before
    anything starts if options are wrong, Interrupted if a signal stopped the run after its checkpoint was written."""
    if options.get("resume") is None:
        model, task = model or "transformer", task or "regression"
    for group, given in (("model", model), ("task", task), ("optim", optim)):
        if given:
            options[group] = {"name": given} if isinstance(given, str) else given
    config, saved = of_run(plain(options))
    before, news = saved.get("zoo", {"trainer": {}, "logger": {}, "placement": {}}), list[str]()
    if config.budget and not saved:
        fit, line = fitted(vars(config), config.budget, config.budget_of)
        config, news = replace(config, model=fit), [line]
    arguments = of_trainer(trainer or {}, before["trainer"])
    own = logger if isinstance(logger, list) else None
    named = {"name": logger} if isinstance(logger, str) else {} if own else logger or {}
    log = of_logger(named, before["logger"])  # type: ignore[arg-type]
    quiet()
    L.seed_everything(config.seed, workers=True, verbose=False)
    network = _model(config, saved, options.get("model", {}).get("base"))
    if config.shuffle_context and not network.task.n_context:
        raise ValueError(f"shuffle_context=true needs a separate context: task={network.task.config.name} has none")
    if config.init and not saved:
        news.append(take_weights(network, config.init))
    folder = place(config.out, f"{network.config.name}-{network.task.config.name}")
    keeper = Keeper(folder, {**asdict(config), "resume": None, "out": None}, command_line())
    engine = make(network, config, arguments, keeper)
    keeper.begun_with = {
        "trainer": {**stored(arguments), "precision": engine.precision},
        "logger": asdict(log),
        "placement": placement(engine),
    }
    with ExitStack() as stack:  # the folder and the logger, given back however the run ends
        stack.enter_context(taken(folder, bool(saved)))
        engine.loggers = [*map(guarded, log.begun(folder, stack) if own is None else own)]
        if engine.is_global_zero:
            say("\n".join([summary.opening(network, engine, folder), *news]))
            if saved:
                more = ", its last; optim.steps=N trains it longer" * (saved["global_step"] == network.optim.steps)
                say(f"continues at step {saved['global_step']} of {network.optim.steps}{more}")
            for name, value in placement(engine).items():
                if (then := before["placement"].get(name, value)) != value:
                    say(f"this run goes on with {name} {value} (was {show(then)})")
        size, where = network.optim.batch_size, {"rank": engine.global_rank, "world": engine.world_size}
        training = Stream(network.task, "train", size, network.optim.steps, network.optim.accumulate, **where)
        training.start, training.repeat = saved.get("global_step", 0), config.overfit
        validation = Stream(network.task, "validation", size, config.validation_batches, **where)
        test = Stream(network.task, "test", size, config.test_batches, **where)
        for stream in (training, validation, test):
            stream.shuffled = config.shuffle_context
        # before Lightning restores weights, which is before it does the same: those of 64-true would be rounded
        engine.precision_plugin.convert_module(network)
        try:
            with explained(engine.strategy, keeper.left):
                engine.fit(network, training, validation, ckpt_path=config.resume, weights_only=True)
        except MisconfigurationException as error:  # which some arguments of the trainer meet here alone
            raise ValueError(f"trainer: {one_line(error, 300)}") from error
        if not engine.global_step:
            raise ValueError(f"trainer.max_time={show(arguments.get('max_time'))} was over before the first step")
        with explained(engine.strategy, lambda: keeper.safe):
            return _test(network, test, engine, keeper)


def _model(options: RunConfig, saved: dict[str, Any], base: Any) -> Model:
    """The model before training, and its task: of a run that goes on with the data it was begun with, or not at all."""
    model = validate.build({name: getattr(options, name) for name in validate.OPTIONS}, base)
    if saved:
        if options.task == saved["zoo"]["config"]["task"]:  # else what lies at the new place must be the same
            model.task.load_state_dict(saved["task"])
        with warnings.catch_warnings(action="ignore"):  # what prepare() warns of, load_state_dict() refuses
            model.task.prepare()
        model.task.load_state_dict(saved["task"])
    model.task.prepare()
    if options.init_frozen:
        model.freeze_decoder()
    model.decoder.activation_checkpointing = options.activation_checkpointing
    if options.compile:
        torch.compiler.reset()  # what earlier runs of this process compiled counts against a limit
        model.decoder.compile(fullgraph=True)  # in place: the names of the weights stay
    return model


def _test(model: Model, test: Stream, engine: L.Trainer, keeper: Keeper) -> dict[str, Any]:
    """Tests the best checkpoint and writes what came out."""
    if engine.is_global_zero and engine.global_step < model.optim.steps:
        say(f"stopped at step {engine.global_step}; {keeper.left()}")
    try:
        tested = checkpoint.find(keeper.folder, "last" if keeper.best is None else "best")
        model.load_state_dict(checkpoint.read(tested)["state_dict"])
        engine.test(model, test, verbose=False)
        where = {**placement(engine), "memory_bytes": results.peak_memory(engine.strategy.root_device)}
        config = {**keeper.config, **model.hparams, **keeper.begun_with}
        said = {"checkpoint": str(tested), "command": keeper.command, "config": config}
        metrics = results.numbers(engine, model, test, engine.global_step, keeper.seconds, where, **said)
        sequences = results.by_sequence(model, test)
        if engine.is_global_zero:
            results.save(keeper.folder / "metrics.json", metrics, sequences, keeper.folder / "test.npz")
            write(keeper.folder / "card.md", card(metrics, model.task))
            try:
                summary.curve(keeper.folder, summary.title(metrics), model.task.unit, model.task.baselines())
            except Exception as error:
                warn(f"curve.png failed: {describe(error)}")
            say(summary.closing(metrics))
    except Exception as error:
        raise Untested(f"the test failed, {describe(error)}; {keeper.safe}") from error
    return metrics
