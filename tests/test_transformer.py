"""The baseline is the Llama of `transformers`, and the routed block is its Mixtral block, weight for weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from cases import Case, batch_of, build
from zoo.bench import peers
from zoo.models import Model

pytestmark = pytest.mark.numeric


def draw_norms(model: Model) -> None:
    """Norm weights start at one, which would hide a norm that is mapped to the wrong place."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)


# their rotary tables are float32 in any dtype
PRECISION = [(torch.float32, 1e-5), (torch.float64, 1e-6)]


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISION, ids=["float32", "float64"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kv_heads", [4, 2], ids=["mha", "gqa"])
@torch.no_grad()
def test_logits_equal_llama(kv_heads: int, tied: bool, dtype: torch.dtype, tolerance: float) -> None:
    model = build(Case("llama", "transformer", "noise", {"heads": 4, "kv_heads": kv_heads, "tied": tied})).to(dtype)
    draw_norms(model)
    llama = peers.llama(model).eval()
    tokens = batch_of(model).tokens
    torch.testing.assert_close(model(tokens), llama(tokens).logits, rtol=0, atol=tolerance)


def mixtral_case() -> Case:
    return Case("mixtral", "moe", "noise", {"experts": 4, "top_k": 2, "heads": 4, "kv_heads": 2})


def experts(model: Model, layer: int) -> dict[str, Tensor]:
    context_to_delta: Any = model.decoder.context_to_delta
    return peers.experts(model.decoder.blocks[layer].ffn, context_to_delta.routers[layer])


def mixtral_config(model: Model) -> MixtralConfig:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
    return MixtralConfig(**peers.config_of(model, **experts))


@torch.no_grad()
def test_routed_block_equals_mixtral() -> None:
    model = build(mixtral_case()).float()
    block = MixtralSparseMoeBlock(mixtral_config(model)).eval()
    block.load_state_dict(experts(model, 1))
    z = torch.randn(3, 12, 16)
    ours = model.decoder.blocks[1].ffn(z, model.decoder.emit(z, 1, 0))
    torch.testing.assert_close(ours, block(z), rtol=0, atol=1e-5)


@torch.no_grad()
def test_logits_equal_mixtral() -> None:
    model = build(mixtral_case()).float()
    draw_norms(model)
    state = peers.without_ffn(model)
    for layer in range(model.config.layers):
        state |= {f"model.layers.{layer}.mlp.{name}": weight for name, weight in experts(model, layer).items()}
    mixtral = MixtralForCausalLM(mixtral_config(model)).eval()
    mixtral.load_state_dict(state)
    tokens = batch_of(model).tokens
    torch.testing.assert_close(model(tokens), mixtral(tokens).logits, rtol=0, atol=1e-5)
