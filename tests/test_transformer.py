"""The baseline is the Llama of `transformers`, and the routed block is its Mixtral block, weight for weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Case, batch_of, build
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from zoo.models import Model

LLAMA = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
LAYER = {
    "norm1.weight": "input_layernorm.weight",
    "norm2.weight": "post_attention_layernorm.weight",
    **{f"attention.{name}.weight": f"self_attn.{name}_proj.weight" for name in "qkvo"},
}


def config_of(model: Model, **options: Any) -> dict[str, Any]:
    config = model.config
    return {
        "vocab_size": model.task.config.vocabulary,
        "hidden_size": config.dim,
        "intermediate_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "tie_word_embeddings": config.tied,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "pad_token_id": None,
        **options,
    }


def body(model: Model) -> dict[str, Tensor]:
    """All weights but those of the FFNs, by their names in `transformers`."""
    weights = dict(model.decoder.named_parameters(remove_duplicate=False))
    state: dict[str, Tensor] = {theirs: weights[ours] for ours, theirs in LLAMA.items()}
    for layer in range(model.config.layers):
        state |= {f"model.layers.{layer}.{theirs}": weights[f"blocks.{layer}.{ours}"] for ours, theirs in LAYER.items()}
    return state


def moe_weights(model: Model, layer: int) -> dict[str, Tensor]:
    seat: Any = model.decoder.context_to_delta
    ffn, router = model.decoder.blocks[layer].ffn, seat.routers[layer]
    gate, up, down = (w.unflatten(0, (ffn.blocks, -1)) for w in (ffn.gate, ffn.up, ffn.down))
    experts = {"experts.gate_up_proj": torch.cat([gate, up], 1), "experts.down_proj": down.mT}
    return {"gate.weight": router.weight, **experts}


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
    state = body(model)
    for layer, block in enumerate(model.decoder.blocks):
        mlp = {"gate": block.ffn.gate, "up": block.ffn.up, "down": block.ffn.down.mT}
        state |= {f"model.layers.{layer}.mlp.{name}_proj.weight": weight for name, weight in mlp.items()}
    llama: Any = LlamaForCausalLM(LlamaConfig(**config_of(model)))
    llama.to(dtype).eval().load_state_dict(state)
    tokens = batch_of(model).tokens
    torch.testing.assert_close(model(tokens), llama(tokens).logits, rtol=0, atol=tolerance)


def mixtral_case() -> Case:
    return Case("mixtral", "moe", "noise", {"experts": 4, "top_k": 2, "heads": 4, "kv_heads": 2})


def mixtral_config(model: Model) -> MixtralConfig:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
    return MixtralConfig(**config_of(model, **experts))


@torch.no_grad()
def test_routed_block_equals_mixtral() -> None:
    model = build(mixtral_case()).float()
    block = MixtralSparseMoeBlock(mixtral_config(model)).eval()
    block.load_state_dict(moe_weights(model, 1))
    z = torch.randn(3, 12, 16)
    ours = model.decoder.blocks[1].ffn(z, model.decoder.emit(z, 1, 0))
    torch.testing.assert_close(ours, block(z), rtol=0, atol=1e-5)


@torch.no_grad()
def test_logits_equal_mixtral() -> None:
    model = build(mixtral_case()).float()
    draw_norms(model)
    state = body(model)
    for layer in range(model.config.layers):
        state |= {f"model.layers.{layer}.mlp.{name}": weight for name, weight in moe_weights(model, layer).items()}
    mixtral = MixtralForCausalLM(mixtral_config(model)).eval()
    mixtral.load_state_dict(state)
    tokens = batch_of(model).tokens
    torch.testing.assert_close(model(tokens), mixtral(tokens).logits, rtol=0, atol=1e-5)
