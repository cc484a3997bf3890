"""The parts of a block: rotary attention, and one feed-forward network whose backends all agree."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cases import Calls
from zoo.core.delta import InputShift
from zoo.core.layers import Attention, FeedForward, Layout, rotary, split_chunks
from zoo.core.patch import Patch, Routing

pytestmark = pytest.mark.numeric

B, T, D, HIDDEN, E = 2, 9, 8, 16, 4


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def causal(tokens: int) -> Layout:
    return Layout(torch.arange(tokens), None)


@torch.no_grad()
def test_rotary_products_depend_on_distance_alone() -> None:
    attention, x = Attention(D, 2, 2, theta=100.0).double(), draw(B, T, D)
    positions = torch.tensor([0, 1, 2, 5, 6, 7, 11, 12, 20])
    output = attention(x, Layout(positions, None))
    torch.testing.assert_close(attention(x, Layout(positions + 31, None)), output, rtol=0, atol=1e-12)
    assert (attention(x, Layout(positions * 2, None)) - output).abs().max() > 1e-3


def test_rotary_tables() -> None:
    cos, sin = rotary(torch.tensor([0, 3]), 4, 100.0, torch.bfloat16)
    assert cos.dtype == torch.float32
    angle = torch.tensor([[[0.0, 0, 0, 0]], [[3, 0.3, 3, 0.3]]])  # rates 1 and 100^(-2/4)
    sign = torch.tensor([-1.0, -1, 1, 1])
    torch.testing.assert_close((cos, sin), (angle.cos(), sign * angle.sin()))
    assert rotary(torch.tensor([3]), 4, 100.0, torch.float64)[0].dtype == torch.float64


@torch.no_grad()
def test_attention_is_softmax_over_the_tokens_that_the_mask_shows() -> None:
    attention, x = Attention(D, 2, 2, theta=10000.0).double(), draw(B, T, D)
    still = torch.zeros(T, dtype=torch.long)  # all at position 0: rotation is the identity
    mask = torch.rand(T, T) < 0.5
    mask.fill_diagonal_(True)
    q, k, v = (linear(x).unflatten(-1, (2, -1)) for linear in (attention.q, attention.k, attention.v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(D / 2)
    probability = scores.masked_fill(~mask, -math.inf).softmax(-1)
    expected = attention.o(torch.einsum("bhqk,bkhd->bqhd", probability, v).flatten(2))
    torch.testing.assert_close(attention(x, Layout(still, mask)), expected)
    lower = Layout(torch.arange(T), torch.ones(T, T, dtype=torch.bool).tril())
    torch.testing.assert_close(attention(x, causal(T)), attention(x, lower))


@torch.no_grad()
def test_grouped_query_attention_is_attention_with_repeated_heads() -> None:
    grouped, full = Attention(16, 4, 2, 100.0).double(), Attention(16, 4, 4, 100.0).double()
    for name in ("q", "k", "v", "o"):
        weight = getattr(grouped, name).weight
        if name in "kv":  # query heads 0 and 1 read key head 0, 2 and 3 read key head 1
            weight = weight.unflatten(0, (2, 4)).repeat_interleave(2, 0).flatten(0, 1)
        getattr(full, name).weight.copy_(weight)
    x = draw(B, T, 16)
    torch.testing.assert_close(grouped(x, causal(T)), full(x, causal(T)))


def test_fold_fills_the_last_chunk_with_zeros() -> None:
    x = draw(B, 7, D)
    folded = split_chunks(x, 3)
    assert folded.shape == (B, 3, 3, D)
    assert torch.equal(folded.flatten(1, 2)[:, :7], x)
    assert not folded[:, 2, 1:].any()
    assert torch.equal(split_chunks(x, 100), x[:, None])  # a lone chunk is as long as it is
    assert split_chunks(x, None) is x


def choose(name: str) -> tuple[Tensor, Tensor]:
    """States and the index of the chosen blocks of a routing situation."""
    tokens, chosen = {"fewer tokens than blocks": (1, 2), "no token": (0, 2), "all blocks": (T, E)}.get(name, (T, 2))
    index = torch.rand(B, tokens, E).argsort(-1)[..., :chosen]
    if name == "empty block":
        index = (torch.rand(B, tokens, E - 1).argsort(-1)[..., :chosen] + 2) % E  # 2, 3, 0: block 1 stays empty
    if name == "one block":
        index = torch.full((B, tokens, 1), 2)
    z = draw(B, tokens, D)
    return z.mT.contiguous().mT if name == "strided" else z, index


def results(backend: str, dtype: torch.dtype, z: Tensor, index: Tensor, weight: Tensor) -> list[Tensor]:
    """Output and all gradients of a routed network, always the same one."""
    torch.manual_seed(1)
    ffn = FeedForward(D, HIDDEN, E, backend)
    for parameter in ffn.parameters():
        torch.nn.init.normal_(parameter, std=D**-0.5)
    leaves = [t.detach().to(dtype).requires_grad_() for t in (z, weight)]
    output = ffn.to(dtype)(leaves[0], Patch(routing=Routing(index, leaves[1], leaves[1])))
    torch.manual_seed(2)
    output.backward(draw(*output.shape, dtype=dtype))
    return [output.detach(), *(t.grad for t in [*leaves, *ffn.parameters()] if t.grad is not None)]


SITUATIONS = ["any", "empty block", "one block", "fewer tokens than blocks", "all blocks", "strided", "no token"]
BACKENDS = [("loop", torch.float64, 1e-12), ("grouped", torch.float32, 1e-6), ("grouped", torch.bfloat16, 2e-2)]
BACKENDS += [("grouped_op", torch.float32, 1e-6), ("grouped_op", torch.bfloat16, 2e-2)]
BACKENDS += [("auto", torch.float64, 1e-12), ("auto", torch.float32, 1e-6), ("loop", torch.float32, 1e-6)]


@pytest.mark.parametrize(("backend", "dtype", "tolerance"), BACKENDS, ids=lambda value: str(value))
@pytest.mark.parametrize("situation", SITUATIONS)
def test_backends_agree(situation: str, backend: str, dtype: torch.dtype, tolerance: float) -> None:
    z, index = choose(situation)
    weight = draw(*index.shape)
    expected = results("reference", torch.float64, z.to(dtype).double(), index, weight.to(dtype).double())
    actual = results(backend, dtype, z.to(dtype), index, weight.to(dtype))
    assert len(actual) == len(expected) == 6
    for got, want in zip(actual, expected, strict=True):
        assert got.shape == want.shape
        assert (got.double() - want).norm() <= tolerance * want.norm()


@torch.no_grad()
def test_a_patched_input_moves_what_chosen_blocks_read() -> None:
    z, index = choose("any")
    patch = Patch(input=InputShift(draw(B, D), draw(B, D)), routing=Routing(index, draw(*index.shape), draw(B, T, E)))
    outputs = []
    for backend in ("loop", "reference"):
        torch.manual_seed(1)
        ffn = FeedForward(D, HIDDEN, E, backend).double()
        for parameter in ffn.parameters():
            torch.nn.init.normal_(parameter)
        outputs.append(ffn(z, patch))
    torch.testing.assert_close(*outputs)
    assert (outputs[0] - ffn(z, Patch(routing=patch.routing))).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("dim", "hidden", "dtype", "autocast", "grouped"),
    [
        (8, 12, torch.float32, False, True),
        (8, 12, torch.float64, False, False),  # grouped_mm knows no float64
        (8, 10, torch.float32, False, False),  # rows of 40 bytes are not aligned to 16
        (6, 12, torch.float32, False, False),
        (8, 16, torch.bfloat16, False, True),
        (8, 12, torch.bfloat16, False, False),
        (8, 16, torch.float32, True, True),
        (8, 12, torch.float32, True, False),  # under autocast the product is in bfloat16
    ],
)
def test_auto_takes_grouped_products_where_they_exist(
    dim: int, hidden: int, dtype: torch.dtype, autocast: bool, grouped: bool
) -> None:
    ffn = FeedForward(dim, hidden, E).to(dtype)
    index = torch.rand(B, T, E).argsort(-1)[..., :2]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), Calls() as seen:
        output = ffn(draw(B, T, dim, dtype=dtype), Patch(routing=Routing(index, torch.ones(B, T, 2), index)))
    assert seen.count["_grouped_mm"] == (3 if grouped else 0)
    assert output.shape == (B, T, dim)
