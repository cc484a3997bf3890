"""An open zoo of networks whose weights depend on their context."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zoo.config import VERSION

if TYPE_CHECKING:
    from zoo.training.checkpoint import load
    from zoo.training.run import train

__version__ = VERSION
__all__ = ["__version__", "load", "train"]


def __getattr__(name: str) -> Any:
    """Loads torch and lightning at the first use of zoo.load or zoo.train, not at import."""
    if name == "load":
        from zoo.training.checkpoint import load

        return load
    if name == "train":
        from zoo.training.run import train

        return train
    raise AttributeError(f"module 'zoo' has no attribute {name!r}")
