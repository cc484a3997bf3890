"""The same computations in other libraries, where they are installed (extra [peers]), at the same sizes."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def mixtures(D: int, F: int, experts: int, top_k: int, z: Tensor, router: nn.Module) -> dict[str, Callable[[], Any]]:
    """Blocks of experts, with the weights of our router where the block has one of that form."""
    from zoo.bench.seats import backward

    found: dict[str, Callable[[], Any]] = {}
    if installed("transformers"):
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

        for way in ("grouped_mm", "eager") if experts <= 16 else ("grouped_mm",):  # eager is quadratic in experts
            config = MixtralConfig(
                hidden_size=D, intermediate_size=F, num_local_experts=experts, num_experts_per_tok=top_k
            )
            config._experts_implementation = way
            block = MixtralSparseMoeBlock(config).to(z.device)
            found[f"transformers Mixtral, {way}"] = backward(block, z)
    if installed("st_moe_pytorch"):
        from st_moe_pytorch import MoE

        block = MoE(dim=D, num_experts=experts, gating_top_n=max(top_k, 2), expert_hidden_mult=F / D)
        found["st-moe-pytorch, top 2"] = backward(_First(block.to(z.device)), z)
    return found


class _First(nn.Module):
    """A module that gives a tuple, as one that gives its first entry."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, z: Tensor) -> Tensor:
        return self.module(z)[0]


def decoders(
    *, vocabulary: int, dim: int, layers: int, heads: int, hidden: int, tokens: int
) -> dict[str, tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor]]]:
    """Decoders of the size of ours, each with the call that gives logits."""
    found: dict[str, tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor]]] = {}
    if installed("transformers"):
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=dim,
            intermediate_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=tokens,
            use_cache=False,
        )
        config._attn_implementation = "sdpa"
        found["transformers Llama"] = (LlamaForCausalLM(config), lambda model, ids: model(ids).logits)
    if installed("x_transformers"):
        from x_transformers import Decoder, TransformerWrapper

        layers_ = Decoder(
            dim=dim,
            depth=layers,
            heads=heads,
            attn_dim_head=dim // heads,
            rotary_pos_emb=True,
            use_rmsnorm=True,
            ff_glu=True,
            ff_swish=True,
            ff_no_bias=True,
            ff_mult=hidden / dim,
            attn_flash=True,
        )
        wrapped = TransformerWrapper(num_tokens=vocabulary, max_seq_len=tokens, attn_layers=layers_)
        found["x-transformers"] = (wrapped, lambda model, ids: model(ids))
    return found
