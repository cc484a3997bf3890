"""The baseline is the Llama of `transformers`, and the mixture is its Mixtral, weight for weight."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

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


@torch.no_grad()
def test_logits_equal_mixtral() -> None:
    options = {"experts": 4, "top_k": 2, "heads": 4, "kv_heads": 2}
    model = build(Case("mixtral", "moe", "noise", options)).float()
    draw_norms(model)
    state, context_to_delta = peers.without_ffn(model), cast(Any, model.decoder.context_to_delta)
    for layer, block in enumerate(model.decoder.blocks):
        experts = peers.experts(block.ffn, context_to_delta.routers[layer])
        state |= {f"model.layers.{layer}.mlp.{name}": weight for name, weight in experts.items()}
    theirs = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
    mixtral = MixtralForCausalLM(MixtralConfig(**peers.config_of(model, **theirs))).eval()
    mixtral.load_state_dict(state)
    tokens = batch_of(model).tokens
    torch.testing.assert_close(model(tokens), mixtral(tokens).logits, rtol=0, atol=1e-5)
