"""The families by name. A new family is one file here, one line below and one file in conf/model."""

from zoo.models.base import Model
from zoo.models.fast_weights import FastWeights
from zoo.models.hyper_moe import HyperMoE
from zoo.models.hypernet import Hypernet
from zoo.models.merged_experts import MergedExperts
from zoo.models.moe import MoE
from zoo.models.transformer import Transformer

MODELS: dict[str, type[Model]] = {
    "transformer": Transformer,
    "hypernet": Hypernet,
    "moe": MoE,
    "hyper_moe": HyperMoE,
    "merged_experts": MergedExperts,
    "fast_weights": FastWeights,
}

__all__ = ["MODELS", "Model"]
