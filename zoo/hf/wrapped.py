"""wrap(model): the zoo's two calls on a causal language model of `transformers`, whose law has been checked.

Axes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from zoo.console import warn
from zoo.core.exact import replace_context
from zoo.core.patch import Patch
from zoo.hf.ffn import first, hooks, wide
from zoo.hf.network import Network

LAW = {torch.float64: 1e-5, torch.float32: 1e-2}
"""How far the check may miss, relative to the largest logit; types of 16 bits: .3."""


class Wrapped:
    """A model under the zoo's calls; `model`, which it was made of, stays as it was between them."""

    def __init__(self, model: nn.Module, tokenizer: Any = None):
        self.decoder, self.tokenizer = Network(model), tokenizer
        with torch.no_grad():
            self.decoder.probe()
            self.check()

    @property
    def model(self) -> Any:
        return self.decoder.model

    @property
    def device(self) -> torch.device:
        return self.decoder.device

    def state_dict(self) -> dict[str, Tensor]:
        return self.model.state_dict()

    def __call__(self, tokens: Tensor, *args: Any, **options: Any) -> Tensor:
        """Logits (B,T,V) for tokens (B,T), without gradients; patches: one per layer, of deltas or static; positions
        (T,) or (B,T): where the tokens stand, default as if nothing else but a cache came before; attention_mask (B,T):
        0 for padding; further arguments, as past_key_values, go to the model."""
        with torch.no_grad():
            return self.decoder(tokens, *args, **options)[0]

    def deltas(
        self, tokens: Tensor, removed: Tensor | int, n_context: int | None = None, attention_mask: Tensor | None = None
    ) -> list[Patch]:
        """The total weight update of each layer that stands for the removed tokens, one per kept token.

        removed: a boolean mask (T,), or (B,T) with as many kept in each row, or the first so many; attention_mask: 0
        for padding on either side. model(tokens[:, ~removed], patches=…, positions=…) then equals model(tokens) there.
        Of a trained model keep the first token, its sink of attention: the patch is exact without it, but large. Raises
        ValueError where no patch exists.
        """
        name = self.model.config.name_or_path
        if name and (removed > 1 if isinstance(removed, int) else bool(removed[..., 0].any())):
            _say_sink(name)
        return replace_context(self.decoder, tokens, removed, attention_mask=attention_mask)  # type: ignore[call-arg]

    @contextmanager
    def patched(self, patches: Sequence[Patch], merged: bool = True) -> Iterator[Any]:
        """The model itself under patches, until the context ends: merged, with W + ΔW in the place of its weights, or
        by hooks. For its own generate, pipelines, and many calls."""
        with self.decoder.patched(patches, merged):
            yield self.model

    def check(self) -> None:
        """Raises ValueError, naming the layer, unless the law holds on four random tokens."""
        network = self.decoder
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(network.vocabulary, (1, 4), generator=generator).to(self.device)

        def outputs(*args: Any) -> list[Tensor]:
            found: list[Tensor] = []
            with hooks(
                layer.register_forward_hook(lambda layer, args, out: found.append(wide(first(out))[:, -1:]))
                for layer in network.layers
            ):
                network(*args)
            return found

        goal = outputs(tokens)
        patches = replace_context(network, tokens, 3)
        precise = self.model.dtype in LAW  # else a router near a tie may choose anew
        with network.patched(patches, merged=precise):
            found = outputs(tokens[:, 3:], 0, None, torch.tensor([3], device=self.device))
        for index, (a, b) in enumerate(zip(found, goal, strict=True)):
            error = float((a - b).abs().max() / b.abs().max())
            if not error <= LAW.get(self.model.dtype, 0.3):
                raise ValueError(
                    f"layer {index}: with its context as weights it is off by {error:.2g} of the largest entry: "
                    "something else in this model carries the context"
                )


@cache
def _say_sink(name: str) -> None:
    advice = "keep it by a mask that is False there, and patches are smaller and hold in bfloat16"
    warn(f"{name}: the first token, where trained models rest their attention, is removed too; {advice}")


def wrap(model: nn.Module, tokenizer: Any = None) -> Wrapped:
    """The model under the zoo's two calls; raises ValueError for one that the law does not hold on, naming the layer
    and the part that is not understood."""
    return Wrapped(model, tokenizer)
