"""A model of the zoo: a decoder, what a family adds to it, its losses, metrics and optimiser.

Axes: B sequences, T tokens, V output numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal, Self

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from zoo.config import from_dict, lookup, plain, require_positive
from zoo.core import sampling
from zoo.core.context import Source
from zoo.core.decoder import Decoder, Sizes
from zoo.core.exact import replace_context
from zoo.core.layers import FILLING
from zoo.core.patch import Patch
from zoo.models.decoding import joined
from zoo.models.optim import OptimConfig, optimizer_of
from zoo.tasks import TASKS, Batch, Task


@dataclass(frozen=True)
class ModelConfig(Sizes):
    """The sizes of the decoder, all there is of a plain one, and the family's name; base: SHA256 of a pretrained W0."""

    name: str = "transformer"
    base: str | None = None

    def resolve(self, task: Task) -> Self:
        """This with every open default written down; raises ValueError for sizes that do not fit each other."""
        names = ("dim", "layers", "heads", "hidden", "theta", "eps")
        require_positive("model", **{name: getattr(self, name) for name in names})
        kv_heads = self.heads if self.kv_heads is None else self.kv_heads
        if self.dim % (2 * self.heads):
            raise ValueError(f"model.dim={self.dim} must be a multiple of 2·model.heads={2 * self.heads}")
        if kv_heads < 1 or self.heads % kv_heads:
            raise ValueError(f"model.heads={self.heads} must be a multiple of model.kv_heads={kv_heads}")
        if self.tied and not task.vocabulary:
            raise ValueError(f"model.tied=true needs token ids, but task.name={task.config.name} has continuous tokens")
        return replace(self, kv_heads=kv_heads)


def open_chunk(chunk: int | None, task: Task, needs: str | None) -> int | None:
    """How many tokens share an update; open: 32, or half of a short sequence. Raises ValueError where one is given and
    `needs`, what it would take, is not None, or where it does not fit."""
    if needs is None:
        chunk = max(1, min(32, task.tokens // 2)) if chunk is None else chunk
        if not 0 < chunk < task.tokens:
            raise ValueError(f"model.chunk={chunk} must lie between 1 and task.tokens={task.tokens} - 1")
    elif chunk is not None:
        raise ValueError(f"model.chunk={chunk} needs {needs}")
    return chunk


def open_attend(attend: bool | None, task: Task) -> bool | None:
    """Whether queries attend to a separate context; open: no. Raises ValueError where it is given and there is none."""
    if attend is not None and not task.n_context:
        raise ValueError(f"model.attend_context={str(attend).lower()} needs a separate context")
    return bool(attend) if task.n_context else None


@dataclass(frozen=True)
class ContextConfig(ModelConfig):
    """context, chunk: what a token's update is made from, see Source; null: segment where the task has a separate
    context, else chunk. attend_context: queries also attend to it; null: no, the update is its only way in."""

    context: Literal["segment", "chunk", "running", "token"] | None = None
    chunk: int | None = None
    attend_context: bool | None = None  # type: ignore[assignment]

    def resolve(self, task: Task) -> Self:
        kind = self.context or ("segment" if task.n_context else "chunk")
        if (kind == "segment") != bool(task.n_context):
            which, choice = ("with", "segment") if task.n_context else ("without", "chunk, running or token")
            raise ValueError(f"model.context={kind} does not fit a task {which} a separate context: take {choice}")
        chunk = open_chunk(self.chunk, task, None if kind == "chunk" else f"model.context=chunk, not {kind}")
        attend = open_attend(self.attend_context, task)
        return replace(super().resolve(task), context=kind, chunk=chunk, attend_context=attend)

    @property
    def source(self) -> Source:
        """Where the context of an update comes from, once resolved."""
        return Source(str(self.context), self.chunk)


class Model(L.LightningModule):
    """A decoder and its training; families differ in Config and Family, their ContextToDelta if any, alone.

    All options come as plain dicts and are written back with every default, so a checkpoint rebuilds the model.
    losses: sums over the parts of the last training step: loss, the task's, and aux_loss, where a family adds one;
    tested: the sum of the main metric over each test sequence, and of how many values, (2,B) by batch.
    """

    Config: ClassVar[type[ModelConfig]]
    Family: ClassVar[type | None] = None

    def __init__(self, model: dict[str, Any], task: dict[str, Any], optim: dict[str, Any], seed: int = 0):
        super().__init__()
        self.task = lookup(task.get("name"), TASKS, "task")(task, seed)
        self.config: Any = from_dict(self.Config, model, "model").resolve(self.task)
        self.optim = from_dict(OptimConfig, optim, "optim").resolve(self.task)
        groups = {"model": self.config, "task": self.task.config, "optim": self.optim}
        self.save_hyperparameters({name: plain(asdict(config)) for name, config in groups.items()} | {"seed": seed})
        # the decoder draws its weights first: families start from the same decoder at the same seed
        self.decoder = Decoder(self.config, self.task)
        self.decoder.context_to_delta = self.Family(self.config) if self.Family else None
        self.decoder.token_alone = joined
        self.losses: dict[str, Tensor] = {}
        self.tested: list[Tensor] = []
        self.summaries: dict[str, Metric] = nn.ModuleDict()  # type: ignore[assignment]

    def freeze_decoder(self) -> None:
        """Leaves the weights of the family alone to be trained; raises ValueError for one without any."""
        if self.decoder.context_to_delta is None:
            raise ValueError(f"init_frozen=true trains the family's own weights, and model={self.config.name} has none")
        self.decoder.requires_grad_(False).context_to_delta.requires_grad_(True)  # type: ignore[union-attr]

    def forward(self, *args: Any, **options: Any) -> Tensor:
        """Output (B,T,V); arguments as of Decoder.forward."""
        return self.decoder(*args, **options)[0]

    def deltas(self, tokens: Tensor, removed: Tensor | int, n_context: int | None = None) -> list[Patch]:
        """The total weight update that stands for the removed tokens; see zoo.core.exact.replace_context."""
        return replace_context(self.decoder, tokens, removed, n_context=n_context)

    def generate(self, tokens: Tensor, count: int, *args: Any, **options: Any) -> Iterator[Tensor]:
        """The `count` ids (B) that follow the prompts `tokens` (B,T), one at a time; arguments as of
        zoo.core.sampling.generate. Raises ValueError for tasks whose tokens are no ids in sequence."""
        task = self.task
        if not task.vocabulary or task.output_dim != task.vocabulary or task.independent_queries:
            raise ValueError(f"task.name={task.config.name} has no next token: generate needs a task of token ids")
        return sampling.generate(self.decoder, tokens, count, *args, **options)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        output, patches = self.decoder(batch.tokens, batch.n_context)
        loss = self.task.loss(output, batch)
        context_to_delta = self.decoder.context_to_delta
        aux = context_to_delta.aux_loss(patches, batch.part) if context_to_delta else 0.0
        if batch.read:  # a part with more real tokens weighs more
            aux = aux * (batch.tokens != FILLING).sum() / batch.read
        losses = {"loss": loss.detach(), **({"aux_loss": aux.detach()} if torch.is_tensor(aux) else {})}
        self.losses = {name: self.losses[name] + value for name, value in losses.items()} if batch.part else losses
        return loss + aux

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        output, patches = self.decoder(batch.tokens, batch.n_context)
        # picked, not weighted: MeanMetric ignores weights where it must not hide nan (torchmetrics 1.9)
        losses = self.task.token_losses(output, batch)[self.task.scored(batch)]
        self._log("validation_loss", losses, prog_bar=True, logger=False)
        if family := self.decoder.context_to_delta:
            for layer, (block, patch) in enumerate(zip(self.decoder.blocks, patches, strict=True)):
                for name, values in family.metrics(patch, block.ffn).items():
                    self._log(f"layer{layer}/{name}", values, family.summaries.get(name), logger=False)

    def on_test_start(self) -> None:
        self.tested = []  # those of an earlier test

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        found = self.task.evaluate(self, batch)
        for name, values in found.items():
            self._log(name, values)
        row_N, main_N = self.task.rows(batch), found[self.task.main_metric].flatten()
        sums = main_N.new_zeros(2, len(batch.tokens), dtype=torch.float64)
        self.tested.append(sums.index_add(1, row_N, torch.stack([main_N, torch.ones_like(main_N)]).double()).cpu())

    def _log(self, name: str, values: Tensor, summary: Callable[[], Metric] | None = None, **options: Any) -> None:
        """Logs, at the end of the epoch, the mean of the values of all batches and processes, or their `summary`."""
        if name not in self.summaries:
            metric = summary() if summary else MeanMetric(nan_strategy="disable")
            self.summaries[name] = metric.to(self.device)
        self.summaries[name].update(values)
        self.log(name, self.summaries[name], metric_attribute=f"summaries.{name}", **options)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.decoder.context_to_delta:
            self.decoder.context_to_delta.after_step()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["task"] = self.task.state_dict()
        state = self.decoder.context_to_delta.state if self.decoder.context_to_delta else {}
        checkpoint["family"] = {name: values.tolist() for name, values in state.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.task.load_state_dict(checkpoint.get("task", {}))
        state = self.decoder.context_to_delta.state if self.decoder.context_to_delta else {}
        for name, old in state.items():
            if values := checkpoint.get("family", {}).get(name):  # else of a run that did not keep it
                state[name] = torch.tensor(values, dtype=old.dtype)
                if state[name].shape != old.shape or not state[name].isfinite().all():
                    raise ValueError(f"family.{name} must be finite numbers of shape {tuple(old.shape)}")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer, schedule = optimizer_of(self.decoder, self.optim)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
