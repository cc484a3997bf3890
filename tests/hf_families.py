"""Tiny random language models of `transformers`, one of each architecture, and how well the law holds on each.

Weights are drawn anew, 1/√fan_in and norms 1 ± .2: at the library's own .02 contexts do nothing, nor do controls.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from zoo.core.patch import Patch
from zoo.hf import Wrapped, wrap

V, T = 99, 24
BASE: dict[str, Any] = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
HEAD = {"head_dim": 8}
WINDOW = {"sliding_window": 8}
GPT = {"vocab_size": V, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "eos_token_id": 2}
MOE = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
GROUPS = {"n_group": 2, "topk_group": 1, "n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1}
MAMBA = {"mamba_d_state": 4, "mamba_d_conv": 2, "mamba_expand": 1, "mamba_dt_rank": 4, "use_mamba_kernels": False}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama", {}),
    "Llama, tied, biases": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "Mistral": ("mistral", WINDOW),
    "Qwen2": ("qwen2", {}),
    "Qwen3": ("qwen3", HEAD),
    "StableLM": ("stablelm", {}),
    "Starcoder2": ("starcoder2", {}),
    "Phi3": ("phi3", {}),
    "GPT-2": ("gpt2", GPT),
    "Gemma": ("gemma", HEAD),
    "Granite": ("granite", {"residual_multiplier": 0.22}),
    "Phi": ("phi", {}),
    "GPT-J": ("gptj", {**GPT, "rotary_dim": 4}),
    "CodeGen": ("codegen", {**GPT, "rotary_dim": 4}),
    "GPT-Neo": ("gpt_neo", {"vocab_size": V, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 8,
                            "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64}),
    "GPT-BigCode": ("gpt_bigcode", GPT),
    "Cohere": ("cohere", {}),
    "Cohere2": ("cohere2", WINDOW),
    "GPT-NeoX": ("gpt_neox", {}),
    "Falcon": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "Falcon, old": ("falcon", {"multi_query": True, "parallel_attn": True, "new_decoder_architecture": False}),
    "Gemma 2": ("gemma2", HEAD | WINDOW),
    "Gemma 3": ("gemma3_text", HEAD | WINDOW),
    "OLMo": ("olmo", {}),
    "OLMo 2": ("olmo2", {}),
    "OLMo 3": ("olmo3", WINDOW),
    "Exaone4": ("exaone4", WINDOW),
    "GLM": ("glm", HEAD),
    "GLM4": ("glm4", HEAD),
    "SmolLM3": ("smollm3", {}),
    "Seed-OSS": ("seed_oss", HEAD),
    "Arcee": ("arcee", {}),
    "Apertus": ("apertus", {}),
    "BitNet": ("bitnet", {}),
    "Nemotron": ("nemotron", {}),
    "Helium": ("helium", HEAD),
    "Persimmon": ("persimmon", {}),
    "NanoChat": ("nanochat", {}),
    "HunYuan": ("hunyuan_v1_dense", HEAD),
    "Ernie 4.5": ("ernie4_5", HEAD),
    "InternLM3": ("internlm3", HEAD),
    "Mixtral": ("mixtral", {"num_local_experts": 4}),
    "PhiMoE": ("phimoe", {"num_local_experts": 4}),
    "MiniMax": ("minimax", {"num_local_experts": 4, **HEAD, "block_size": 8}),
    "Qwen2-MoE": ("qwen2_moe", {**MOE, "num_experts": 4, "shared_expert_intermediate_size": 24}),
    "Qwen3-MoE": ("qwen3_moe", {**MOE, **HEAD, "num_experts": 4}),
    "Qwen3-Next": ("qwen3_next", {
        **MOE, **HEAD, "num_experts": 4, "shared_expert_intermediate_size": 24, "linear_num_value_heads": 4,
        "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"]}),
    "OLMoE": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "FlexOlmo": ("flex_olmo", {"num_experts": 4, "num_experts_per_tok": 2}),
    "GraniteMoe": ("granitemoe", {"num_local_experts": 4, "residual_multiplier": 0.5}),
    "GPT-OSS": ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, **HEAD, **WINDOW}),
    "Ernie 4.5 MoE": ("ernie4_5_moe", {"moe_intermediate_size": 16, "moe_num_experts": 4, "moe_k": 2,
                                       "moe_num_shared_experts": 1, "moe_layer_start_index": 1}),
    "GLM4-MoE": ("glm4_moe", {**MOE, **GROUPS, **HEAD}),
    "dots1": ("dots1", {**MOE, **GROUPS, **HEAD}),
    "DeepSeek-V2": ("deepseek_v2", {**MOE, **GROUPS, **LATENT, "num_key_value_heads": 4}),
    "DeepSeek-V3": ("deepseek_v3", {**MOE, **GROUPS, **LATENT, "num_key_value_heads": 4}),
    "LFM2": ("lfm2", {"layer_types": ["conv", "full_attention", "conv"], "block_multiple_of": 8}),
    "Jamba": ("jamba", {**MAMBA, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2,
                        "num_experts_per_tok": 1, "expert_layer_period": 2, "expert_layer_offset": 1}),
    "RecurrentGemma": ("recurrent_gemma", {**HEAD, "attention_window_size": 16, "num_key_value_heads": 1,
                                           "block_types": ["recurrent", "attention", "recurrent"]}),
}  # fmt: skip
POST_NORM = {"Gemma 2", "Gemma 3", "OLMo 2", "OLMo 3", "Exaone4", "GLM4", "FlexOlmo"}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "OPT": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}, "layer 0: no part of self_attn"),
    "Bloom": ("bloom", {"n_layer": 3, "n_head": 4}, "layer 0: no part of input_layernorm"),
    "Mamba": ("mamba", {}, "layer 0: no part of norm, mixer"),
    "T5": ("t5", {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}, "an encoder and a decoder"),
}


def config_of(kind: str, options: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    own_sizes = "n_embd" in options or "num_layers" in options
    return AutoConfig.for_model(kind, **(options if own_sizes else BASE | options))


def build(kind: str, options: dict[str, Any], dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """A model in evaluation mode with weights of its own drawing."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config = config_of(kind, options)
    make = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    # the grouped kernel knows no float64 on a CPU
    model = make.from_config(config, experts_implementation="eager").double()
    generator = torch.Generator().manual_seed(seed)
    transposed = {id(m.weight) for m in model.modules() if type(m).__name__ == "Conv1D"}
    embedding = model.get_input_embeddings().weight
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        if p.dim() < 2:
            p.data = noise * 0.1 if "bias" in name else p.data + 0.2 * noise
        else:
            down = p.dim() == 3 and getattr(model.get_submodule(name.rpartition(".")[0]), "is_transposed", False)
            fan_in = 1 if p is embedding else p.shape[-2] if id(p) in transposed or down else p[0].numel()
            fan_in = p.shape[-1] if p.dim() == 3 and not down else fan_in
            p.data = noise * fan_in**-0.5
    return model.to(dtype).eval()


def family(name: str, dtype: torch.dtype = torch.float64) -> Any:
    return build(*FAMILIES[name], dtype)


class Kept64(TorchFunctionMode):
    """float32 inside of a float64 model, of norms, softmaxes and routers, is float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = dict(kwargs or {})
        if func is torch.Tensor.float:
            return args[0].double()
        swap = [torch.float64 if a is torch.float32 or a is torch.float else a for a in args]
        named = {k: torch.float64 if v is torch.float32 else v for k, v in named.items()}
        return func(*swap, **named)


def ids(rows: int = 1, tokens: int = T, seed: int = 3) -> Tensor:
    return torch.randint(3, V, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def relative(y: Tensor, goal: Tensor) -> float:
    return float((y.double() - goal.double()).abs().max() / goal.double().abs().max())


@torch.no_grad()
def plain(wrapped: Wrapped, patches: list[Patch], query: Tensor, position: int) -> Tensor:
    """The logits of a fresh copy of the model that holds W + ΔW and knows of no patches: its own forward pass."""
    with wrapped.patched(patches) as model:
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        biases = [name for name, module in model.named_modules() if getattr(module, "bias", None) is not None]
    copied = copy.deepcopy(wrapped.model)
    assert set(biases) == {n for n, m in copied.named_modules() if getattr(m, "bias", None) is not None}
    copied.load_state_dict(weights)
    named = wrapped.decoder.inputs(query, None, torch.tensor([[position]]))
    return copied(**named, use_cache=False).logits


class Residuals(NamedTuple):
    """Distances relative to the largest logit: float64 with its casts kept, as it is, float32, bfloat16 (how many of
    its queries keep their first choice, how many chose other experts), and without the patch."""

    kept: float
    as_it_is: float
    float32: float
    bfloat16: float
    top1: int
    flips: int
    control: float


def residual(wrapped: Wrapped, tokens: Tensor) -> tuple[float, float]:
    """The error at the last token, all others removed, and what it is without the patch."""
    n = tokens.shape[1] - 1
    goal = wrapped(tokens)[:, -1:]
    found = plain(wrapped, wrapped.deltas(tokens, n), tokens[:, n:], n)
    alone = wrapped(tokens[:, n:], positions=torch.tensor([n]))
    return relative(found, goal), relative(alone, goal)


def experts_of(patches: list[Patch]) -> Any:
    return [sorted(p.routing.index.flatten().tolist()) for p in patches if p.routing]


def residuals(name: str, queries: int = 30) -> Residuals:
    exact = wrap(family(name))
    with Kept64():
        kept, _ = residual(exact, ids())
    as_it_is, control = residual(exact, ids())
    single, _ = residual(wrap(family(name, torch.float32)), ids())
    low = wrap(family(name, torch.bfloat16))
    worst, same, flips = 0.0, 0, 0
    for seed in range(queries):
        tokens = ids(seed=100 + seed)
        goal = low(tokens)[:, -1:]
        patches = low.deltas(tokens, T - 1)
        found = plain(low, patches, tokens[:, -1:], T - 1)
        worst, same = max(worst, relative(found, goal)), same + int((found.argmax(-1) == goal.argmax(-1)).item())
        with low.patched([Patch(input=p.input, weights=p.weights, biases=p.biases, chunk=1) for p in patches]):
            used = low.decoder(tokens[:, -1:], positions=torch.tensor([T - 1]))[1]
        flips += experts_of(used) != experts_of(patches)
    return Residuals(kept, as_it_is, single, worst, same, flips, control)


def module_state(model: nn.Module) -> dict[str, Any]:
    """All that a call might leave behind: hooks, replaced functions, modes and weights."""
    return {
        name: (len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m), m.training,
               [(n, id(p), p._version) for n, p in m.named_parameters(recurse=False)])
        for name, m in model.named_modules()
    }  # fmt: skip
