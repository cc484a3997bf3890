"""Checkpoints of the zoo as folders of `transformers`, weight for weight; the way back is in zoo.records.pretrained.

transformer becomes Llama; mixtures of experts become Mixtral, Qwen2-MoE or GLM4-MoE, by how their router weighs.
Axes: D model, F hidden units of an expert, E routed experts, S shared ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import zoo
from zoo.config import show
from zoo.core.layers import FeedForward
from zoo.records.pretrained import BLOCK, NAMES, import_llama
from zoo.tasks.text.tokenizer import PATTERN, SIGNS, START, WORDS, Tokenizer, pipeline

__all__ = ["converted", "export", "import_llama", "tokenizer_of"]
BEGIN = "<|start|>"


def export(path: Any, folder: str | Path) -> None:
    """Writes the model of a checkpoint or run, as zoo.load takes it, and its tokenizer as a folder that
    AutoModelForCausalLM and AutoTokenizer read; raises ValueError, naming the option, for what they cannot hold."""
    model: Any = zoo.load(path)
    theirs, tokenizer = converted(model), tokenizer_of(model.task.tokenizer)
    theirs.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def converted(model: Any) -> Any:
    """The model as one of `transformers`, on the CPU."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config, task = model.config, model.task
    if not task.has_text or task.n_context or task.independent_queries or model.decoder.filled:
        raise ValueError(f"task.name={task.config.name} is not running text: there is no such model in transformers")
    sizes: dict[str, Any] = {
        "vocab_size": task.vocabulary,
        "hidden_size": config.dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "tie_word_embeddings": config.tied,
        "max_position_embeddings": task.tokens,
        "rms_norm_eps": config.eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.theta},
        "bos_token_id": START,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    kind, options = _kind(config)
    made: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **options))
    ours = dict(model.decoder.named_parameters(remove_duplicate=False))
    state: dict[str, Tensor] = {theirs: ours[name] for name, theirs in NAMES.items()}
    for layer, block in enumerate(model.decoder.blocks):
        own = {theirs: ours[f"blocks.{layer}.{name}"] for name, theirs in BLOCK.items()}
        router = model.decoder.context_to_delta.routers[layer] if kind != "llama" else None
        own |= {f"mlp.{name}": tensor for name, tensor in _ffn(kind, config, block.ffn, router).items()}
        state |= {f"model.layers.{layer}.{name}": tensor for name, tensor in own.items()}
    made.to(model.decoder.norm.weight.dtype).load_state_dict(state)
    return made.eval()


def _kind(config: Any) -> tuple[str, dict[str, Any]]:
    """Which architecture holds a family, and its further options."""
    if config.name == "transformer":
        return "llama", {"intermediate_size": config.hidden}
    if config.name != "moe":
        raise ValueError(f"model={config.name} makes its weights from a context: no architecture of transformers does")
    wrong = {"score": config.score == "linear", "route_on": config.route_on == "context"}
    wrong |= {"router": config.router == "uniform", "bias_rate": config.score == "softmax" and config.bias_rate > 0}
    if found := [f"model.{name}={show(getattr(config, name))}" for name, refused in wrong.items() if refused]:
        raise ValueError(f"{', '.join(found)} has no place in Mixtral, Qwen2-MoE or GLM4-MoE")
    routed = {"num_experts_per_tok": config.top_k, "norm_topk_prob": config.renormalise}
    inner = {"moe_intermediate_size": config.hidden, "intermediate_size": config.hidden}
    shared = max(config.shared, 1)  # both of the next two must have one
    if config.score == "sigmoid":
        groups = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "routed_scaling_factor": 1.0}
        own = {"use_qk_norm": False, "partial_rotary_factor": 1.0, "attention_bias": False}
        experts = {"n_routed_experts": config.experts, "n_shared_experts": shared}
        return "glm4_moe", {**routed, **inner, **groups, **own, **experts, "head_dim": config.dim // config.heads}
    if config.shared or not config.renormalise:
        experts = {"num_experts": config.experts, "shared_expert_intermediate_size": config.hidden * shared}
        return "qwen2_moe", {**routed, **inner, **experts, "qkv_bias": False, "decoder_sparse_step": 1}
    sizes = {"intermediate_size": config.hidden, "num_local_experts": config.experts}
    return "mixtral", {**sizes, "num_experts_per_tok": config.top_k}


def _ffn(kind: str, config: Any, ffn: FeedForward, router: Any) -> dict[str, Tensor]:
    """The weights of one network by their names there."""
    if kind == "llama":
        return {"gate_proj.weight": ffn.gate, "up_proj.weight": ffn.up, "down_proj.weight": ffn.down.mT}
    E, F = config.experts, config.hidden
    gate, up, down = (W.unflatten(0, (ffn.blocks, -1))[:E] for W in (ffn.gate, ffn.up, ffn.down))
    weights = {"experts.gate_up_proj": torch.cat([gate, up], 1), "experts.down_proj": down.mT}
    weights["gate.weight"] = router.weight
    if kind != "glm4_moe" and router.bias.any():
        raise ValueError("model.score=softmax with a selection bias has no place in Mixtral or Qwen2-MoE")
    if kind == "mixtral":
        return weights
    # those that a model without shared experts must have give nothing
    gate, up, down = (W[E * F :] if config.shared else torch.zeros_like(W[:F]) for W in (ffn.gate, ffn.up, ffn.down))
    own = {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": down.mT}
    if kind == "glm4_moe":
        weights["gate.e_score_correction_bias"], name = router.bias, "shared_experts"
    else:
        weights["shared_expert_gate.weight"], name = torch.zeros(1, config.dim), "shared_expert"
        own["down_proj.weight"] = 2 * down.mT  # a gate of zero gives one half
    return weights | {f"{name}.{matrix}": W for matrix, W in own.items()}


def tokenizer_of(ours: Tokenizer) -> Any:
    """The tokenizer as a fast one of `transformers`, with the start of a document before each text."""
    from tokenizers import decoders, processors
    from transformers import PreTrainedTokenizerFast

    texts = [token.decode("latin-1").translate(SIGNS) for token in ours.spelled]
    vocabulary = {text: index for index, text in enumerate(texts) if text} | {BEGIN: START}
    # what bytes of more than one letter are to us, letters from 128 on are here
    split = WORDS | {"pattern": {"Regex": PATTERN.replace(r"\x80-\xff", r"\x{80}-\x{10ffff}")}}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    made = pipeline(
        ours.words or {"type": "Sequence", "pretokenizers": [split, level]},
        vocab=vocabulary,
        merges=[(texts[a], texts[b]) for a, b in ours.merges],
        ignore_merges=ours.whole,
    )
    made.add_special_tokens([BEGIN])
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(f"{BEGIN} $A", f"{BEGIN} $A $B", [(BEGIN, START)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=BEGIN, clean_up_tokenization_spaces=False)
