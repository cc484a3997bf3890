"""The pages of docs/: links lead somewhere, commands compose, code runs, tables and messages are those of the code."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import hydra
import lightning as L
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import zoo
from test_readme import README, ROOT, blocks, tiny_run
from zoo.config import from_dict
from zoo.models import MODELS, flops
from zoo.models.base import ModelConfig
from zoo.models.optim import OptimConfig
from zoo.tasks import TASKS
from zoo.training.run import RunConfig, train

PAGES = {"README.md": README} | {f"docs/{p.name}": p.read_text() for p in sorted((ROOT / "docs").glob("*.md"))}
QUICKSTART = PAGES["docs/quickstart.md"]
MODEL_RECIPE, TASK_RECIPE = PAGES["docs/add-a-model.md"], PAGES["docs/add-a-task.md"]

SPEC = importlib.util.spec_from_file_location("train_script", ROOT / "train.py")
assert SPEC
assert SPEC.loader
train_script = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(train_script)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny run where the pages expect one."""
    folder = tmp_path_factory.mktemp("docs")
    tiny_run(folder)
    return folder


def composed(arguments: list[str]) -> dict[str, Any]:
    """What train.py makes of its arguments before it trains."""
    overrides = train_script.arguments_of(arguments)
    name = "resume" if "--config-name=resume" in overrides else "config"
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        cfg = compose(name, [override for override in overrides if not override.startswith("--")])
    return OmegaConf.to_container(cfg, resolve=True)  # type: ignore[return-value]


def jobs(arguments: list[str]) -> list[list[str]]:
    """Jobs of a sweep, -m a=1,2 b=3, that have each of its values once; a single job where there is no -m."""
    if "-m" not in arguments:
        return [arguments]
    choices = []
    # launchers are packages of their own
    options = [argument for argument in arguments if argument != "-m" and not argument.startswith("hydra")]
    for key, _, values in (argument.partition("=") for argument in options):
        choices.append([f"{key}={value}" for value in re.split(r",(?![^\[]*\])", values)])
    turns = max(map(len, choices))
    return [[values[turn % len(values)] for values in choices] for turn in range(turns)]


def commands() -> list[tuple[str, str]]:
    """Every `python train.py …` of every page but mistakes, but those of what recipes add."""
    found = []
    for page, text in PAGES.items():
        for line in re.findall(r"^(?!\$).*?(?<!\$ )\bpython train\.py ([^`\n]+)", text, re.M):
            if not re.search(r"--(help|hydra-help|cfg)|-sc|model=film|task=lookup", line):
                found.append((page, line.strip()))
    assert len(found) > 20
    return found


def table(text: str, mark: str) -> list[list[str]]:
    """The cells of the table after <!-- mark -->, without its header."""
    after = text.split(f"<!-- {mark} -->\n", 1)[1]
    rows = itertools.takewhile(lambda line: line.startswith("|"), after.splitlines())
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in itertools.islice(rows, 2, None)]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page: str) -> None:
    prose = re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.M | re.S)
    targets = re.findall(r"\]\(([^)#\s]+)", prose)
    assert targets
    missing = [t for t in targets if "://" not in t and not ((ROOT / page).parent / t).exists()]
    assert not missing


@functools.cache
def _made(model: str, task: str, optim: str) -> None:
    """Makes the model of these options, once: seeds of a sweep share it."""
    options = [json.loads(text) for text in (model, task, optim)]
    MODELS[options[0]["name"]](*options)


@pytest.mark.parametrize(("page", "line"), commands())
def test_commands_compose(page: str, line: str) -> None:
    for job in jobs(shlex.split(line)):
        config = composed(job)
        options = from_dict(RunConfig, {key: config[key] for key in config.keys() - {"trainer", "logger"}}, "")
        if not options.resume:
            _made(*map(json.dumps, (options.model, options.task, options.optim)))


def test_quickstart_runs(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    names: dict[str, Any] = {}
    for code in blocks(QUICKSTART, "python"):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, names)
        if "for mistake in" in code:
            assert printed.getvalue() in blocks(QUICKSTART, "")
    assert (names["patched"] - names["contextual"]).abs().max() < 1e-12
    assert (names["unpatched"] - names["contextual"]).abs().max() > 1e-3


def test_quickstart_names_the_keys_of_metrics_json(workplace: Path) -> None:
    named = [key for row in table(QUICKSTART, "keys of metrics.json") for key in re.findall(r"`(\w+)`", row[0])]
    path = workplace / "runs" / "hypernet-regression" / "ID" / "metrics.json"
    assert sorted(named) == sorted(yaml.safe_load(path.read_text()))


def start(arguments: list[str]) -> None:
    """What train.py does, with its errors still exceptions."""
    config = composed(arguments)
    trainer = hydra.utils.instantiate(config.pop("trainer", {}), _convert_="all")
    train(trainer=trainer, **config)


MISTAKES = re.findall(r"^\$ python train\.py (.+)\n(.+)", QUICKSTART, re.M)


@pytest.mark.parametrize(("line", "answer"), MISTAKES)
def test_mistakes_get_the_answer_of_the_page(
    line: str, answer: str, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"{line} starts a training")

    if "fsdp" in line and torch.cuda.is_available():
        pytest.skip("the answer of a machine without a GPU")
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(L.Trainer, "fit", fit)
    with pytest.raises((ValueError, hydra.errors.HydraException, OmegaConfBaseException)) as caught:
        start(shlex.split(line))
    message = f"error: {train_script.reason(caught.value)}"
    assert message.replace(str(workplace), "/home/you/zoo") == answer


def test_the_page_of_the_idea_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", sys.path)
    (code,) = blocks(PAGES["docs/idea.md"], "python")
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["worst"] < 1e-10
    assert names["control"] > 1e-2


def test_parameter_table_of_the_models_page() -> None:
    text = PAGES["docs/models.md"]
    header = text.split("<!-- parameters -->\n", 1)[1].splitlines()[0]
    families = [cell.strip() for cell in header.strip("|").split("|")][1:]
    rows = table(text, "parameters")
    assert set(families) <= set(MODELS)
    for column, family in enumerate(families, 1):
        model = MODELS[family](model={"name": family}, task={"name": "regression"}, optim={})
        count = flops.parameters(model) | {"FLOPs per token, forward": round(flops.flops_per_token(model))}
        assert {row[0]: int(row[column].replace(",", "")) for row in rows} == count


def documented(mark: str, cls: type, fixed: set[str]) -> None:
    """Asserts that a table names every option of `cls` but `fixed`, with its default and its choices."""
    hints = get_type_hints(cls)
    expected = {f.name: f.default for f in fields(cls) if f.name not in fixed}
    rows = {row[0].strip("`"): row for row in table(PAGES["docs/configuration.md"], f"table: {mark}")}
    assert list(rows) == list(expected)
    for name, default in expected.items():
        written = yaml.safe_load(rows[name][1].strip("`"))
        assert written == (list(default) if isinstance(default, tuple) else default), name
        choices = [hint for hint in (hints[name], *get_args(hints[name])) if get_origin(hint) is Literal]
        if choices:
            assert re.findall(r"`(\w+)`", rows[name][2]) == list(get_args(choices[0])), name
        assert rows[name][3]


def test_option_tables_are_complete() -> None:
    documented("RunConfig", RunConfig, {"model", "task", "optim"})
    documented("OptimConfig", OptimConfig, set())
    documented("ModelConfig", ModelConfig, {"name"})
    for cls in TASKS.values():
        documented(cls.Config.__name__, cls.Config, {"name"})
    shared = {f.name: f.default for f in fields(ModelConfig)}
    for model in MODELS.values():
        same = {f.name for f in fields(model.Config) if f.name in shared and f.default == shared[f.name]} | {"name"}
        if len(same) < len(fields(model.Config)):
            documented(model.Config.__name__, model.Config, same)


@pytest.mark.parametrize("group", ["trainer", "logger"])
def test_tables_of_files_are_those_of_conf(group: str) -> None:
    file, described = "", {}
    for name, option, value, _ in table(PAGES["docs/configuration.md"], f"table: {group}"):
        file = name.strip("`").removeprefix(f"{group}=") or file
        described[file, option.strip("`")] = value
    read = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "conf" / group).glob("*.yaml")}
    assert set(described) == {(file, option) for file, options in read.items() for option in options}
    for (file, option), value in described.items():
        if not isinstance(read[file][option], dict):
            assert yaml.safe_load(value.strip("`")) == read[file][option]


def copied(folder: Path) -> Callable[..., str]:
    """A command that runs Python, for its output, in a copy of the repository."""
    for name in ("zoo", "conf", "tests", "docs", ".ci"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train.py", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)

    def do(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, *command], cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert done.returncode == 0, done.stdout[-3000:]
        return done.stdout

    return do


def follow(recipe: str, folder: Path) -> None:
    """Adds to the copy in `folder` what a recipe says."""
    for name, code in re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)^```$", recipe, re.M | re.S):
        assert not (folder / name).exists()
        (folder / name).write_text(code)
    ((name, line),) = re.findall(r"<!-- among the imports: (\S+) -->\n```python\n(.*?)^```$", recipe, re.M | re.S)
    before = (folder / name).read_text()
    later = next(other for other in re.findall(r"^from .*\n", before, re.M) if other > line)
    (folder / name).write_text(before.replace(later, line + later))
    places = r"<!-- in the (?:list|dict) (\w+): (\S+) -->\n```text\n(.*?)^```$"
    for table, name, lines in re.findall(places, recipe, re.M | re.S):
        before = (folder / name).read_text()
        begin = re.search(rf"^{table}\b.* = [\[{{]$", before, re.M)
        assert begin
        end = re.compile(r"^[\]}]$", re.M).search(before, begin.end())
        assert end
        (folder / name).write_text(before[: end.start()] + lines + before[end.start() :])
    ((name, options),) = re.findall(r"<!-- at the end: (\S+) -->\n```markdown\n(.*?)^```$", recipe, re.M | re.S)
    (folder / name).write_text((folder / name).read_text() + "\n" + options)


@pytest.mark.slow
def test_the_recipes_followed_literally(tmp_path: Path) -> None:
    """A new model and a new task, one after the other in one copy; what is parametrised over them is green."""
    do = copied(tmp_path)
    follow(MODEL_RECIPE, tmp_path)
    (line,) = re.findall(r"^python (train\.py .*)$", MODEL_RECIPE, re.M)
    small = "model.dim=16 model.layers=2 model.heads=2 model.hidden=24 optim.batch_size=8"
    assert "film on regression" in do(*shlex.split(line), *small.split(), "out=runs/film")
    assert do("check_film.py").count("with the patch") == 2
    loaded = do("-c", "import zoo; model = zoo.load('runs/film'); print(model.config, zoo.__file__)")
    assert "FilmConfig" in loaded
    assert str(tmp_path) in loaded

    assert "| film |" in do("-m", "zoo.analyze", "report", "runs/film")

    follow(TASK_RECIPE, tmp_path)
    (line,) = re.findall(r"^python (train\.py .*)$", TASK_RECIPE, re.M)
    printed = do(*shlex.split(line), *small.split(), "out=runs/transformer-lookup/ID")
    assert "\nshare of wrong answers " in printed
    assert "\n  looking the key up  " in printed
    (line,) = re.findall(r"^python (-m zoo\.analyze report .*)$", TASK_RECIPE, re.M)
    assert "error with a wrong context minus right" in do(*shlex.split(line))
    assert {path.name for path in (tmp_path / "runs/transformer-lookup/ID/report").glob("*.png")} == {
        f"{name}.png" for name in ("law-residuals", "norms-and-alignment", "static-error")
    }
    of_them = "film or lookup or option_tables or tables_cover or lists_every_option"
    assert " passed" in do("-m", "pytest", "-k", of_them, "-p", "no:cacheprovider")


@pytest.mark.full
def test_all_tests_are_green_after_the_recipes(tmp_path: Path) -> None:
    do = copied(tmp_path)
    for recipe in (MODEL_RECIPE, TASK_RECIPE):
        follow(recipe, tmp_path)
        (line,) = re.findall(r"^python (-m pytest .*)$", recipe, re.M)
    assert " passed" in do(*shlex.split(line), "-p", "no:cacheprovider")


def test_a_family_outside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe's family, in a file of somebody else's, trains and loads; that it obeys the law is tested above."""
    (code,) = re.findall(r"<!-- file: zoo/models/film.py -->\n```\w+\n(.*?)^```$", MODEL_RECIPE, re.M | re.S)
    (tmp_path / "own.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(zoo.MODELS, "film", importlib.import_module("own").Film)
    tiny = {"name": "film", "dim": 16, "layers": 2, "heads": 2, "hidden": 24}
    assert zoo.train(tiny, optim={"steps": 3, "batch_size": 8}, out=str(tmp_path / "run"))["model"] == "film"
    assert zoo.load(tmp_path / "run").config.name == "film"


def test_guarantees_name_tests_that_exist() -> None:
    named = re.findall(r"`(test_\w+)::(test_\w+)`", PAGES["docs/guarantees.md"])
    assert len(named) > 30
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests" / f"{file}.py").read_text(), f"{file}::{test}"
