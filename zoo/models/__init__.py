"""The families by name. A new family is one file here, one line below and one file in conf/model."""

from zoo.models.base import Model
from zoo.models.hypernet import Hypernet
from zoo.models.moe import MoE
from zoo.models.transformer import Transformer

MODELS: dict[str, type[Model]] = {
    "transformer": Transformer,
    "hypernet": Hypernet,
    "moe": MoE,
}

__all__ = ["MODELS", "Model"]
