"""Calls of torch's operators that a generated token takes: each family, and Llama of `transformers`.

python docs/calls.py          # a minute; the table of docs/performance.md
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from zoo.bench import peers
from zoo.bench.generation import FASTER, PEER, SMALL, new_tokens, of_family, prompts

SEQUENCES, FEW, MANY = (1, 8), 64, 96
"""Sequences of a batch, and the tokens of the two runs whose difference is taken: prompts and start-up fall out."""


class Calls(TorchDispatchMode):
    """Counts every operator, views included."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def per_token(generate: Callable[[int], Any]) -> float:
    counts = []
    for tokens in (FEW, MANY):
        with Calls() as calls:
            generate(tokens)
        counts.append(calls.count)
    return (counts[1] - counts[0]) / (MANY - FEW)


def main() -> None:
    device = torch.device("cpu")
    llama = of_family("transformer", SMALL, device)
    peer = peers.llama(llama, use_cache=True)
    print(f"| calls per token | {' | '.join(f'B={B}' for B in SEQUENCES)} |\n|---|{'---|' * len(SEQUENCES)}")
    for name in (*FASTER, PEER):
        model = llama if name == PEER else of_family(name, SMALL, device)

        def generate(tokens: int, B: int, name: str = name, model: Any = model) -> None:
            (peers.new_tokens(peer, prompts(model, B), tokens) if name == PEER else new_tokens(model, B, tokens))()

        found = [per_token(lambda tokens, B=B: generate(tokens, B)) for B in SEQUENCES]
        print(f"| {name} | {' | '.join(f'{count:.0f}' for count in found)} |")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with torch.no_grad():
        main()
