"""Markov chains: letters of one of a few domains, each a chain of its own; which one, a sequence shows bit by bit.

    token     0      1    2   ...  T-1
    carries   START  s_1  s_2 ...  s_{T-1}        to be predicted: s_1 ... s_T

What the best reader loses is known exactly: that of a filter over domains, which knows all chains but not the domain.
Axes: B sequences, T letters, D domains, V letters of the alphabet.
"""

from __future__ import annotations

import functools
import math
import string
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from zoo.tasks.base import Batch, Predict, Task, TaskConfig

ALPHABET = string.ascii_letters + string.digits


@dataclass(frozen=True)
class MarkovConfig(TaskConfig):
    """`domains` chains of `letters` letters, their rows softmax(sharpness·N(0,1)): sharp ones have few likely letters;
    `tokens` letters are predicted."""

    name: str = "markov"
    domains: int = 4
    letters: int = 16
    sharpness: float = 2.0
    tokens: int = 64

    def resolve(self) -> Self:
        if self.letters > len(ALPHABET):
            raise ValueError(f"task.letters={self.letters} exceeds the {len(ALPHABET)} of the alphabet: a-z, A-Z, 0-9")
        return super().resolve()


class Markov(Task):
    """The next letter, in bits; the bound is the exact filter over domains."""

    Config = MarkovConfig
    main_metric = "bits"
    labels: ClassVar = {
        "bits": "test loss in bits per letter",
        "bits_excess": "  of it above the exact filter",
        "bits_filter": "  of the exact filter over domains, the bound",
        "bits_told": "  of who is told the domain",
        "bits_bigram": "  of pairs of letters, over all domains",
        "bits_unigram": "  of single letters",
    }
    unit = "nats per letter"
    has_text = True

    def __init__(self, options: dict[str, Any], seed: int):
        super().__init__(options, seed)
        self.start = self.config.letters  # the id after all letters
        self.vocabulary = self.output_dim = self.config.letters + 1

    @functools.cached_property
    def chains(self) -> Tensor:
        """The chance of each letter after each in each domain, (D,V,V) in float64; drawn from the seed."""
        config, generator = self.config, self.generator("fixed")
        sizes = config.domains, config.letters, config.letters
        normal_DVV = torch.randn(sizes, generator=generator, dtype=torch.float64)
        return (config.sharpness * normal_DVV).softmax(-1)

    @functools.cached_property
    def pairs(self) -> Tensor:
        """The frequency of each pair of letters in each domain in the long run, (D,V,V)."""
        return torch.linalg.matrix_power(self.chains, 1024)[:, 0, :, None] * self.chains

    def batch(self, split: str, k: int, size: int) -> Batch:
        config, generator = self.config, self.generator(split, k)
        domain_B = torch.randint(config.domains, (size,), generator=generator)
        letters = [torch.randint(config.letters, (size,), generator=generator)]
        below_DVV = self.chains.cumsum(-1)[..., :-1].contiguous()
        for chance_B1 in torch.rand(config.tokens - 1, size, 1, generator=generator, dtype=torch.float64):
            letters.append((below_DVV[domain_B, letters[-1]] < chance_B1).sum(-1))
        s_BT = torch.stack(letters, 1)
        tokens = torch.cat([torch.full((size, 1), self.start), s_BT[:, :-1]], 1)
        return Batch(tokens, s_BT, 0, group=domain_B)

    def baselines(self) -> dict[str, float]:
        p_V = self.pairs.mean(0).sum(0)
        return {"best fixed distribution of letters": float(-(p_V * p_V.log()).sum())}

    def evaluate(self, predict: Predict, batch: Batch) -> dict[str, Tensor]:
        bits = self.errors(predict, batch)["bits"] / math.log(2)
        s_BT, group = batch.targets.cpu(), batch.group
        assert group is not None
        readers = {name: reader.float().to(bits.device) for name, reader in self.readers(s_BT, group.cpu()).items()}
        return {"bits": bits, "bits_excess": bits - readers["bits_filter"], **readers}

    def readers(self, s_BT: Tensor, domain_B: Tensor) -> dict[str, Tensor]:
        """Bits (B,T) that those who know the chains need for each letter, in float64; nobody knows the first."""
        before, after = s_BT[:, :-1], s_BT[:, 1:]
        first_B1 = torch.full((len(s_BT), 1), -math.log2(self.config.letters), dtype=torch.float64)

        def of(log_BT: Tensor) -> Tensor:
            return -torch.cat([first_B1, log_BT], 1)

        pairs_VV = self.pairs.mean(0)
        each_DBT = self.chains.log2()[:, before, after]
        evidence_DBT = torch.cat([torch.zeros_like(each_DBT[..., :1]), each_DBT.cumsum(-1)], -1) * math.log(2)
        known_BT = evidence_DBT.logsumexp(0) / math.log(2)
        return {
            "bits_filter": of(known_BT.diff(dim=1)),
            "bits_told": of(each_DBT[domain_B, torch.arange(len(s_BT))]),
            "bits_bigram": of((pairs_VV / pairs_VV.sum(-1, keepdim=True)).log2()[before, after]),
            "bits_unigram": of(pairs_VV.sum(0).log2()[after]),
        }

    def encode(self, text: str) -> list[int]:
        known = ALPHABET[: self.config.letters]
        if strange := sorted(set(text) - set(known)):
            raise ValueError(f"the letters of this task are {known}, not {''.join(strange)!r}")
        return [self.start, *map(known.index, text)]

    def decode(self, ids: Iterable[int]) -> bytes:
        return "".join(ALPHABET[i] for i in ids if i < self.start).encode()
