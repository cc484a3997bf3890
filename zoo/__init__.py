"""An open zoo of networks whose weights depend on their context."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from zoo.config import VERSION

if TYPE_CHECKING:
    from zoo.models import MODELS
    from zoo.records.shipped import names as shipped
    from zoo.tasks import TASKS
    from zoo.training.checkpoint import load
    from zoo.training.run import train

__version__ = VERSION
__all__ = ["MODELS", "TASKS", "__version__", "load", "shipped", "train"]
PLACES = {
    "MODELS": "zoo.models",
    "TASKS": "zoo.tasks",
    "load": "zoo.training.checkpoint",
    "train": "zoo.training.run",
    "shipped": "zoo.records.shipped",
}


def __getattr__(name: str) -> Any:
    """Loads torch and lightning when something that needs them is first used, not at import."""
    if name in PLACES:
        return getattr(import_module(PLACES[name]), {"shipped": "names"}.get(name, name))
    raise AttributeError(f"module 'zoo' has no attribute {name!r}")
