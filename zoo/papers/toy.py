"""The single block in which a context is exactly a weight update, and its training.

    y = readout(relu(W a + b)),   a = A(C, x)      no skip, no norm, no positions

A is any layer that reads a context C of pairs (x, y) of a linear function and a query x. Taking C away is undone by
ΔW = W (A(C,x) − A(x)) A(x)ᵀ / |A(x)|² (Dherin et al. 2025, arXiv 2507.16003).
Axes: B functions, C context pairs, Q queries, T = C + Q, P numbers of a token, D state, F hidden units.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from tqdm import trange

from zoo.core.delta import InputShift
from zoo.core.layers import Attention, Layout
from zoo.tasks.regression import Regression

WIDTH, DIM, HEADS, HIDDEN = 3, 32, 8, 128
LR, BATCH_SIZE = 2e-3, 128


class SoftmaxAttention(nn.Module):
    """Every query attends to the context and to itself, without positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.attention = nn.Linear(WIDTH, DIM), Attention(DIM, HEADS, HEADS, theta=1.0)

    def forward(self, context_BCP: Tensor, query_BQP: Tensor) -> Tensor:
        C, T = context_BCP.shape[1], context_BCP.shape[1] + query_BQP.shape[1]
        mask_TT = (torch.arange(T) < C) | torch.eye(T, dtype=torch.bool)
        x_BTD = self.embedding(torch.cat([context_BCP, query_BQP], 1))
        return self.attention(x_BTD, Layout(torch.zeros(T), mask_TT))[:, C:]


class MeanPooling(nn.Module):
    """The mean of the embedded context and query: averaging without anything to learn about which token matters."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(WIDTH, DIM)

    def forward(self, context_BCP: Tensor, query_BQP: Tensor) -> Tensor:
        total_BD = self.embedding(context_BCP).sum(1)
        return (total_BD[:, None] + self.embedding(query_BQP)) / (context_BCP.shape[1] + 1)


class Recurrent(nn.Module):
    """A gated recurrent unit that reads the context, then the query (Cho et al. 2014, arXiv 1406.1078)."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(WIDTH, DIM, batch_first=True)

    def forward(self, context_BCP: Tensor, query_BQP: Tensor) -> Tensor:
        B, Q, P = query_BQP.shape
        state_1BD = self.gru(context_BCP)[1] if context_BCP.shape[1] else query_BQP.new_zeros(1, B, DIM)
        return self.gru(query_BQP.reshape(B * Q, 1, P), state_1BD.repeat_interleave(Q, 1))[0].view(B, Q, DIM)


LAYERS: dict[str, type[nn.Module]] = {"attention": SoftmaxAttention, "mean": MeanPooling, "recurrent": Recurrent}


class Toy(nn.Module):
    """One block over a contextual layer of LAYERS, weights drawn; without skip and norm, W is the only reader of a."""

    def __init__(self, layer: str, seed: int):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.contextual = LAYERS[layer]()
            self.inner, self.readout = nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, 1)

    def read(self, a_BQD: Tensor, dW_BQFD: Tensor | None = None) -> Tensor:
        """The prediction from the state, (B,Q); dW: a dense update of W for each query."""
        W = self.inner.weight if dW_BQFD is None else self.inner.weight + dW_BQFD
        hidden_BQF = torch.relu((W @ a_BQD[..., None]).squeeze(-1) + self.inner.bias)
        return self.readout(hidden_BQF).squeeze(-1)

    def forward(self, context_BCP: Tensor, query_BQP: Tensor) -> Tensor:
        """Predictions with the context, (B,Q)."""
        return self.read(self.contextual(context_BCP, query_BQP))

    def delta(self, context_BCP: Tensor, query_BQP: Tensor) -> InputShift:
        """The update of W that stands for the context, one per query."""
        a_BQD = self.contextual(context_BCP[:, :0], query_BQP)
        return InputShift(a_BQD, self.contextual(context_BCP, query_BQP) - a_BQD)

    def through_delta(self, context_BCP: Tensor, query_BQP: Tensor) -> Tensor:
        """Predictions from the queries alone with the dense weights W + ΔW, (B,Q)."""
        delta = self.delta(context_BCP, query_BQP)
        return self.read(delta.a, delta.dense(self.inner.weight))


def data(seed: int, split: str, k: int, functions: int, points: int, queries: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Batch k of linear functions of two numbers, w, x ~ N(0, I), y = w·x: context (B,C,P), queries (B,Q,P), targets
    (B,Q); tokens (x, y), queries (x, 0)."""
    task = Regression({"dimension": WIDTH - 1, "points": points, "queries": queries}, seed)
    batch = task.batch(split, k, functions)
    return batch.tokens[:, :points], batch.tokens[:, points:], batch.targets


def loss(prediction: Tensor, target: Tensor) -> Tensor:
    """½(ŷ − y)² of each prediction; predicting zero has mean 1."""
    return 0.5 * (prediction - target).square()


@torch.enable_grad()
def training(model: Toy, seed: int, steps: int, points: int, lr: float = LR) -> Iterator[float]:
    """Adam, each step on new functions: gives the training loss before each step, and after the last one."""
    optimizer = torch.optim.Adam(model.parameters(), lr)
    for step in trange(steps + 1, desc="training", leave=False, disable=None):
        context, query, target = data(seed, "train", step, BATCH_SIZE, points)
        value = loss(model(context, query), target).mean()
        yield value.item()
        optimizer.zero_grad()
        value.backward()
        if step < steps:
            optimizer.step()


def trained(layer: str, seed: int, steps: int, points: int, lr: float = LR) -> Toy:
    """A block after `steps` steps of training."""
    model = Toy(layer, seed)
    for _ in training(model, seed, steps, points, lr):
        pass
    return model
