"""The same computations in other libraries, where they are installed (extra [peers]), at the same sizes.

Those of `transformers` get our weights, under the names they have there: they compute the same numbers.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zoo.core.layers import FeedForward
from zoo.models import Model

NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
LAYER = {
    "norm1.weight": "input_layernorm.weight",
    "norm2.weight": "post_attention_layernorm.weight",
    **{f"attention.{name}.weight": f"self_attn.{name}_proj.weight" for name in "qkvo"},
}


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def config_of(model: Model, **options: Any) -> dict[str, Any]:
    """The sizes of our decoder as options of a configuration of `transformers`."""
    config = model.config
    return {
        "vocab_size": model.task.vocabulary,
        "hidden_size": config.dim,
        "intermediate_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "tie_word_embeddings": config.tied,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "pad_token_id": None,
        "use_cache": False,
        **options,
    }


def without_ffn(model: Model) -> dict[str, Tensor]:
    """All weights but those of the FFNs, by their names in `transformers`."""
    weights = dict(model.decoder.named_parameters(remove_duplicate=False))
    state: dict[str, Tensor] = {theirs: weights[ours] for ours, theirs in NAMES.items()}
    for layer in range(model.config.layers):
        state |= {f"model.layers.{layer}.{theirs}": weights[f"blocks.{layer}.{ours}"] for ours, theirs in LAYER.items()}
    return state


def llama(model: Model) -> nn.Module:
    """A transformer of ours as LlamaForCausalLM, weight for weight."""
    from transformers import LlamaConfig, LlamaForCausalLM

    state = without_ffn(model)
    for layer, block in enumerate(model.decoder.blocks):
        mlp = {"gate": block.ffn.gate, "up": block.ffn.up, "down": block.ffn.down.mT}
        state |= {f"model.layers.{layer}.mlp.{name}_proj.weight": weight for name, weight in mlp.items()}
    theirs: Any = LlamaForCausalLM(LlamaConfig(**config_of(model)))
    theirs.to(model.decoder.norm.weight.dtype).load_state_dict(state)
    return theirs


def experts(ffn: FeedForward, router: nn.Module) -> dict[str, Tensor]:
    """The weights of a routed FFN, by their names in a Mixtral block."""
    gate, up, down = (w.unflatten(0, (ffn.blocks, -1)) for w in (ffn.gate, ffn.up, ffn.down))
    weights: Any = {"experts.gate_up_proj": torch.cat([gate, up], 1), "experts.down_proj": down.mT}
    return {"gate.weight": router.weight, **weights}


def mixtures(ffn: FeedForward, router: Any, top_k: int) -> dict[str, nn.Module]:
    """Other libraries' blocks of experts."""
    found: dict[str, nn.Module] = {}
    if installed("transformers"):
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

        sizes: dict[str, Any] = {"hidden_size": ffn.dim, "intermediate_size": ffn.hidden_per_block}
        for way in ("grouped_mm", "eager") if ffn.blocks <= 16 else ("grouped_mm",):  # eager is quadratic in experts
            config = MixtralConfig(**sizes, num_local_experts=ffn.blocks, num_experts_per_tok=top_k)
            config._experts_implementation = way
            block = found[f"transformers Mixtral, {way}"] = MixtralSparseMoeBlock(config)
            block.load_state_dict(experts(ffn, router))
    if installed("st_moe_pytorch") and top_k == 2:
        from st_moe_pytorch import MoE

        block = MoE(dim=ffn.dim, num_experts=ffn.blocks, expert_hidden_mult=ffn.hidden_per_block / ffn.dim)
        found["st-moe-pytorch"] = _First(block)
    return found


class _First(nn.Module):
    """A module that gives a tuple, as one that gives its first entry."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, z: Tensor) -> Tensor:
        return self.module(z)[0]


def decoders(model: Model) -> dict[str, tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor]]]:
    """Decoders of the size of ours, each with the call that gives logits."""
    config, found = model.config, {}
    if installed("transformers"):
        found["transformers Llama"] = (llama(model), lambda module, ids: module(ids).logits)
    if installed("x_transformers"):
        from x_transformers import Decoder, TransformerWrapper

        layers = Decoder(
            dim=config.dim,
            depth=config.layers,
            heads=config.heads,
            attn_dim_head=config.dim // config.heads,
            rotary_pos_emb=True,
            use_rmsnorm=True,
            ff_glu=True,
            ff_swish=True,
            ff_no_bias=True,
            ff_mult=config.hidden / config.dim,
            attn_flash=True,
        )
        wrapped = TransformerWrapper(
            num_tokens=model.task.vocabulary, max_seq_len=model.task.tokens, use_abs_pos_emb=False, attn_layers=layers
        )
        found["x-transformers"] = (wrapped, lambda module, ids: module(ids))
    return found
