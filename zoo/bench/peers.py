"""The same computations in `transformers`, where it is installed (extra [peers]).

It gets our weights, under the names they have there: it computes the same numbers.
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


def installed() -> bool:
    return importlib.util.find_spec("transformers") is not None


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


def llama(model: Model, **options: Any) -> nn.Module:
    """A transformer of ours as LlamaForCausalLM, weight for weight."""
    from transformers import LlamaConfig, LlamaForCausalLM

    state = without_ffn(model)
    for layer, block in enumerate(model.decoder.blocks):
        mlp = {"gate": block.ffn.gate, "up": block.ffn.up, "down": block.ffn.down.mT}
        state |= {f"model.layers.{layer}.mlp.{name}_proj.weight": weight for name, weight in mlp.items()}
    theirs: Any = LlamaForCausalLM(LlamaConfig(**config_of(model, **options)))
    theirs.to(model.decoder.norm.weight.dtype).load_state_dict(state)
    return theirs


def new_tokens(theirs: nn.Module, ids: Tensor, count: int) -> Callable[[], Any]:
    """`count` new tokens of a model of `transformers`, greedy, with its default cache."""
    generator: Any = theirs.to(ids.device).eval()
    generator.generation_config.eos_token_id = None
    chosen = {"do_sample": False, "min_new_tokens": count, "max_new_tokens": count, "pad_token_id": 0}
    return lambda: generator.generate(ids, attention_mask=torch.ones_like(ids), **chosen)


def experts(ffn: FeedForward, router: nn.Module) -> dict[str, Tensor]:
    """The weights of a routed FFN, by their names in a Mixtral block."""
    gate, up, down = (w.unflatten(0, (ffn.blocks, -1)) for w in (ffn.gate, ffn.up, ffn.down))
    weights: Any = {"experts.gate_up_proj": torch.cat([gate, up], 1), "experts.down_proj": down.mT}
    return {"gate.weight": router.weight, **weights}


def mixtral(ffn: FeedForward, router: nn.Module, top_k: int) -> nn.Module:
    """A routed FFN of ours as MixtralSparseMoeBlock, weight for weight."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    sizes: dict[str, Any] = {"hidden_size": ffn.dim, "intermediate_size": ffn.hidden_per_block}
    config = MixtralConfig(**sizes, num_local_experts=ffn.blocks, num_experts_per_tok=top_k)
    config._experts_implementation = "grouped_mm"
    block = MixtralSparseMoeBlock(config)
    block.load_state_dict(experts(ffn, router))
    return block
