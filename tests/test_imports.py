"""Importing is cheap: what a command does not need, it does not load."""

import subprocess
import sys
from pathlib import Path

import pytest

import zoo

ROOT = Path(__file__).parents[1]


def modules(code: str) -> tuple[set[str], str]:
    """The modules that a fresh interpreter has at the end of `code`, and what it printed."""
    code = f"import atexit, sys\natexit.register(lambda: print('MODULES', *sys.modules))\n{code}"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert answer.returncode == 0, answer.stderr
    printed, _, names = answer.stdout.rpartition("MODULES")
    return set(names.split()), printed


def test_import_zoo_is_light() -> None:
    loaded, _ = modules("import zoo; print(zoo.__version__)")
    assert "zoo" in loaded
    assert not {"torch", "lightning", "numpy", "wandb", "datasets", "matplotlib", "hydra"} & loaded


@pytest.mark.slow
def test_load_and_train_are_there_when_asked_for() -> None:
    loaded, printed = modules(
        "import zoo; print(callable(zoo.load), 'zoo.training.run' in sys.modules, callable(zoo.train))"
    )
    assert printed.split() == ["True", "False", "True"]
    assert {"torch", "lightning"} <= loaded
    assert not {"wandb", "datasets", "hydra"} & loaded


def test_help_is_light_and_names_the_groups() -> None:
    code = "import runpy; sys.argv = ['train.py', '--help']; runpy.run_path('train.py', run_name='__main__')"
    loaded, printed = modules(code)
    assert "hydra" in loaded
    assert not {"torch", "lightning", "wandb", "datasets", "matplotlib"} & loaded
    for group in sorted(path for path in (ROOT / "conf").iterdir() if path.is_dir()):
        line = next(line for line in printed.splitlines() if line.startswith(f"{group.name}: "))
        assert {path.stem for path in group.iterdir()} == set(line.partition(": ")[2].split(", "))
    assert "python train.py model=hypernet" in printed
    assert "validate_every: 100" in printed


def test_unknown_attributes() -> None:
    with pytest.raises(AttributeError, match="module 'zoo' has no attribute 'lod'"):
        zoo.lod  # noqa: B018
    assert not hasattr(zoo, "wandb")
    assert set(zoo.__all__) == {"MODELS", "TASKS", "__version__", "load", "shipped", "train"}
