"""Bits per byte against seconds: the families beside GPT-2 of `transformers` and a decoder of x-transformers.

    pip install -c constraints.txt -e '.[peers,text]' x-transformers
    python docs/quality.py           # about half an hour on two cores; draws docs/figures/time-to-quality.png

The peers are families of one's own file, see docs/add-a-model.md: they train, are logged and tested as all others. They
have the transformer's parameters (their FFN is as wide as that takes), data and steps, and each the best, on
validation data, of the same learning rates. Axes: B sequences, T tokens.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor, nn

import zoo
from zoo.core.layers import Layout
from zoo.core.patch import Patch
from zoo.lens.draw import save
from zoo.lens.figure import Figure, Lines, Series
from zoo.memory import keep_freed_memory
from zoo.models import Model
from zoo.models.base import ModelConfig

OPTIM: dict[str, Any] = {"steps": 500, "batch_size": 32}
RATES = (0.003, 0.006, 0.012)
RUNS = Path("runs/quality")
HERE = Path(__file__).parent


class Foreign(nn.Module):
    """Another library's network where the zoo has its Decoder: no blocks to look into, no patches."""

    blocks: ClassVar[list[Any]] = []
    context_to_delta = None
    activation_checkpointing = False

    def __init__(self, network: nn.Module, logits: Callable[[Any], Tensor]):
        super().__init__()
        self.ffn, self.logits = network, logits  # by this name all its parameters are counted as those of an FFN

    def forward(self, tokens: Tensor, n_context: int = 0) -> tuple[Tensor, list[Patch]]:
        return self.logits(self.ffn(tokens)), []

    def layout(self, tokens: int, n_context: int) -> Layout:
        return Layout(torch.arange(tokens), None)


def gpt2(model: Model, hidden: int) -> Foreign:
    from transformers import GPT2Config, GPT2LMHeadModel

    config, task = model.config, model.task
    sizes: dict[str, Any] = {"n_embd": config.dim, "n_layer": config.layers, "n_head": config.heads, "n_inner": hidden}
    none = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    where = {"vocab_size": task.vocabulary, "n_positions": task.tokens, "bos_token_id": None, "eos_token_id": None}
    network = GPT2LMHeadModel(GPT2Config(**sizes, **none, **where, tie_word_embeddings=False, use_cache=False))
    return Foreign(network, lambda out: out.logits)


def x_transformers(model: Model, hidden: int) -> Foreign:
    from x_transformers import Decoder, TransformerWrapper

    config, task = model.config, model.task
    layers = Decoder(
        dim=config.dim,
        depth=config.layers,
        heads=config.heads,
        attn_dim_head=config.dim // config.heads,
        attn_flash=True,
        rotary_pos_emb=True,
        use_rmsnorm=True,
        ff_glu=True,
        ff_swish=True,
        ff_no_bias=True,
        ff_mult=hidden / config.dim,
    )
    sizes: Any = {"num_tokens": task.vocabulary, "max_seq_len": task.tokens, "use_abs_pos_emb": False}
    return Foreign(TransformerWrapper(**sizes, attn_layers=layers), lambda out: out)


PEERS = {"gpt2": gpt2, "x-transformers": x_transformers}


@dataclass(frozen=True)
class PeerConfig(ModelConfig):
    """network: which one."""

    network: str = "gpt2"


class Peer(Model):
    """The network of another library with as many parameters as the zoo's transformer of the same sizes."""

    Config = PeerConfig

    def __init__(self, model: dict[str, Any], task: dict[str, Any], optim: dict[str, Any], seed: int = 0):
        super().__init__(model, task, optim, seed)

        def size(network: nn.Module) -> int:
            return sum(p.numel() for p in network.parameters())

        wanted, make = size(self.decoder), PEERS[self.config.network]
        few, many = (size(make(self, hidden)) for hidden in (8, 16))
        torch.manual_seed(seed)
        self.decoder = make(self, round(8 + 8 * (wanted - few) / (many - few)))  # type: ignore[assignment]
        assert abs(size(self.decoder) - wanted) < 0.01 * wanted


zoo.MODELS["peer"] = Peer


def run(model: str, seed: int = 0, **optim: Any) -> dict[str, Any]:
    """What a run of a model with these options of its optimiser gave, from its folder where it is there."""
    options = {"name": "peer", "network": model} if model in PEERS else {"name": model}
    words = "-".join([model, *(f"{key}={value}" for key, value in optim.items()), str(seed)])
    out = RUNS / words
    if not (out / "metrics.json").exists():
        zoo.train(options, "text", {**OPTIM, **optim}, seed=seed, out=str(out), validate_every=25)
    metrics = json.loads((out / "metrics.json").read_text())
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    curve = [(row["step"], row["validation_loss"] / math.log(2)) for row in rows if "validation_loss" in row]
    return {**metrics, "curve": curve, "best": min(loss for _, loss in curve)}


def main() -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    swept = {model: [run(model, name="adamw", lr=rate) for rate in RATES] for model in ("transformer", *PEERS)}
    shown = {f"{name}, AdamW": min(runs, key=lambda one: one["best"]) for name, runs in swept.items()}
    shown |= {f"{model}, default": run(model) for model in ("transformer", "hypernet", "moe")}
    print("| run | parameters | lr | CPU seconds | bits per byte |\n|---|---|---|---|---|")
    for label, one in shown.items():
        rate, value = one["config"]["optim"]["lr"], one["test"][one["main_metric"]]
        print(f"| {label} | {one['params_total']:,} | {rate:g} | {one['seconds']:.0f} | {value:.2f} |")
    series = []
    for label, one in shown.items():
        seconds = [step * one["seconds"] / one["steps"] for step, _ in one["curve"]]
        series.append(Series(label, seconds, [loss for _, loss in one["curve"]], control=label.endswith("AdamW")))
    title = f"Text, {OPTIM['steps']} steps of {OPTIM['batch_size']} sequences"
    panel = Lines(title, "CPU seconds of training, one thread", "validation loss, bits per token", tuple(series))
    figure = Figure(
        "time-to-quality",
        "What a second of training buys",
        (panel,),
        "The families by default, and, in grey, the transformer and peers of its size by AdamW, each with the best of "
        f"the learning rates {', '.join(map(str, RATES))} on validation data. Seed 0.",
        "an order of architectures: one size, one seed, and peers whose rates alone were tuned.",
        {"command": "python docs/quality.py"},
    )
    print(save(figure, HERE / "figures"))


if __name__ == "__main__":
    with mock.patch("zoo.training.callbacks.monotonic", time.thread_time):  # other work on the machine does not count
        main()
