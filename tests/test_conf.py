"""conf/ says what the code says: every option with its default, every name, and every choice composes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from zoo.config import from_dict
from zoo.models import MODELS, flops
from zoo.models.optim import OptimConfig
from zoo.tasks import TASKS
from zoo.training import validate
from zoo.training.run import RunConfig

CONF = Path(__file__).parent.parent / "conf"


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def read(path: str) -> dict[str, Any]:
    return yaml.safe_load((CONF / path).read_text()) or {}


def composed(*overrides: str) -> dict[str, Any]:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        config = OmegaConf.to_container(compose("config", [*overrides, "out=somewhere"]), resolve=True)
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items()}


def defaults(config: type) -> dict[str, Any]:
    """The defaults of a dataclass as YAML writes them."""
    values = {field.name: field.default for field in fields(config)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


GROUPS = [(f"model/{name}.yaml", MODELS[name].Config) for name in MODELS]
GROUPS += [(f"task/{name}.yaml", TASKS[name].Config) for name in TASKS]
GROUPS += [("optim/muon.yaml", OptimConfig)]


PRESETS = ["fineweb_edu", "tinystories", "wikitext103"]  # task=PRESET is task=text with other options


@pytest.mark.parametrize(("group", "table"), [("model", MODELS), ("task", TASKS)])
def test_files_and_tables_name_the_same(group: str, table: dict[str, type]) -> None:
    assert choices(group) == sorted([*table, *(PRESETS if group == "task" else [])])
    for name in table:
        assert read(f"{group}/{name}.yaml")["name"] == name


@pytest.mark.parametrize(("path", "config"), GROUPS, ids=[path for path, _ in GROUPS])
def test_each_file_lists_every_option_with_its_default(path: str, config: type) -> None:
    values = read(path)
    assert values == defaults(config)
    for name, value in values.items():
        assert type(value) is type(defaults(config)[name]), name
    assert from_dict(config, values, "options") == config(**{f.name: f.default for f in fields(config)})


def test_top_level_is_run_config() -> None:
    values = {key: value for key, value in read("config.yaml").items() if key not in ("defaults", "hydra")}
    assert values == {f.name: f.default for f in fields(RunConfig) if f.default is not MISSING}
    groups = {f.name for f in fields(RunConfig) if f.default is MISSING}
    assert groups == {"model", "task", "optim"}
    assert set(composed()) - {"trainer", "logger"} == groups | set(values)


def every_choice() -> Iterator[str]:
    for folder in sorted(path.name for path in CONF.iterdir() if path.is_dir()):
        yield from (f"{folder}={name}" for name in choices(folder))


@pytest.mark.parametrize("choice", list(every_choice()))
def test_every_choice_composes_into_valid_options(choice: str) -> None:
    config = composed(choice)
    trainer, logger = config.pop("trainer"), config.pop("logger")
    options = from_dict(RunConfig, config, "config")
    assert isinstance(trainer, dict)
    assert isinstance(logger, dict)
    MODELS[options.model["name"]](options.model, options.task, options.optim, options.seed)
    group, name = choice.split("=")
    if group in ("model", "task"):
        assert config[group]["name"] == ("text" if name in PRESETS else name)


@pytest.mark.parametrize("name", choices("debug"))
def test_debugging_overrides_what_it_names(name: str) -> None:
    def check(asked: dict[str, Any], before: dict[str, Any], after: dict[str, Any]) -> None:
        for key, value in asked.items():
            if isinstance(value, dict):
                check(value, before[key], after[key])
            else:
                assert after[key] == value
                assert before.get(key) != value or value is None, f"{key} does not change anything"

    check(read(f"debug/{name}.yaml"), composed(), composed(f"debug={name}"))
    for arguments in (["optim.steps=1"], ["experiment=incontext"]):  # a warm-up of their own would not fit
        from_dict(OptimConfig, composed(f"debug={name}", *arguments)["optim"], "optim")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_its_task_but_for_what_it_names(name: str) -> None:
    values = read(f"task/{name}.yaml")
    assert values.pop("defaults") == ["text"]
    assert composed(f"task={name}")["task"] == {**defaults(TASKS["text"].Config), **values}


def test_the_command_line_beats_an_experiment() -> None:
    assert composed("experiment=incontext")["task"]["name"] == "regression"
    assert composed("experiment=incontext", "task=noise")["task"]["name"] == "noise"
    assert composed("debug=fast", "optim.steps=7")["optim"]["steps"] == 7


def test_objects_are_made_from_trainer_and_logger_alone() -> None:
    for path in CONF.rglob("*.yaml"):
        assert "_target_" not in path.read_text() or path.parent.name in ("trainer", "logger"), path


@pytest.mark.parametrize("family", ["transformer", "hypernet", "moe"])
def test_experiments_of_gpu_size_are_built_without_memory(family: str) -> None:
    config = composed(f"experiment=gpu_124m_{family}")
    assert (config["trainer"]["devices"], config["trainer"]["precision"]) == (8, "bf16-mixed")
    with torch.device("meta"):
        model = validate.build({name: config[name] for name in validate.OPTIONS})
    assert 1.2e8 < flops.parameters(model)["active"] - flops.parameters(model)["context_to_delta"] < 1.28e8
    assert flops.step_cost(model)["tokens"] == 512 * 1024
