"""Each kind of update acts as its matrix does, whoever shares it: a sequence, a chunk or one token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from zoo.core.delta import Delta, Full, InputShift, LowRank, Scale, Sum
from zoo.core.layers import FeedForward
from zoo.core.patch import Patch, Routing
from zoo.lens.exact import Replaced

pytestmark = pytest.mark.numeric

B, S, C, T, OUT, IN, R = 3, 2, 4, 7, 6, 5, 2  # T is no whole number of chunks: S = ceil(T / C)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


Make = Callable[[tuple[int, ...]], Delta]  # from the leading dims *
KINDS: dict[str, Make] = {
    "low-rank": lambda dims: low_rank(dims),
    "scale": lambda dims: Scale(draw(*dims, OUT), draw(*dims, IN)),
    "full": lambda dims: Full(draw(*dims, OUT, IN)),
    "replaced": lambda dims: Replaced(draw(*dims, OUT, IN)),
    "input shift": lambda dims: InputShift(draw(*dims, IN), draw(*dims, IN)),
    "low-rank + low-rank": lambda dims: low_rank(dims) + low_rank(dims),
    "scale + low-rank": lambda dims: KINDS["scale"](dims) + low_rank(dims),
    "full + low-rank + low-rank": lambda dims: KINDS["full"](dims) + low_rank(dims) + low_rank(dims),
}
# leading dims of an update, and tokens that share one: None for all
LEADS = {"sequence": ((B,), None), "chunk": ((B, S), C), "token": ((B, T), 1)}
every_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
every_lead = pytest.mark.parametrize(("dims", "chunk"), LEADS.values(), ids=LEADS)


def low_rank(dims: tuple[int, ...]) -> LowRank:
    return LowRank(draw(*dims, OUT, R), draw(*dims, IN, R))


def multiplied(W: Tensor, dense: Tensor, x: Tensor) -> Tensor:
    """(W + ΔW) x, one matrix and one row of x (*,c,i) after the other."""
    pairs = zip(dense.flatten(0, -3), x.flatten(0, -3), strict=True)
    return torch.stack([x_i @ (W + delta).T for delta, rows in pairs for x_i in rows]).view(*x.shape[:-1], -1)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@every_kind
@every_lead
def test_linear_equals_the_dense_matrix(make: Make, dims: tuple[int, ...], chunk: int | None) -> None:
    delta, W, x = make(dims), draw(OUT, IN), draw(*dims, T if chunk is None else chunk, IN)
    assert delta.dense(W).shape == (*dims, OUT, IN)
    close(delta.linear(W, x), multiplied(W, delta.dense(W), x))
    assert (delta.linear(W, x) - x @ W.T).abs().amin(-1).max() > 1e-2
    close(delta.norm(W), torch.linalg.matrix_norm(delta.dense(W)))


@every_kind
@every_lead
def test_at_repeats_the_matrix_of_the_sequence_or_chunk(make: Make, dims: tuple[int, ...], chunk: int | None) -> None:
    delta, W, tokens = make(dims), draw(OUT, IN), torch.tensor([0, 3, 4, 6])
    dense = delta.dense(W)
    expected = torch.stack([dense if chunk is None else dense[:, t // chunk] for t in tokens], 1)
    close(delta.per_token(tokens, chunk).dense(W), expected)


every_shared = pytest.mark.parametrize(("dims", "chunk"), list(LEADS.values())[:2], ids=list(LEADS)[:2])


def act_token_by_token(delta: Delta, dims: tuple[int, ...], chunk: int | None, served: Tensor | None) -> Delta:
    """Asserts that per_token gives the matrices by which `delta` acts on each token; returns it."""
    W, x = draw(OUT, IN), draw(*dims, T if chunk is None else C, IN)
    each = Patch(weights={"gate": delta}, chunk=chunk, served=served).per_token(torch.arange(T)).weights["gate"]
    x_BTi, y_BTo = (t.flatten(1, -2)[:, :T] for t in (x, delta.linear(W, x, served)))
    close(multiplied(W, each.dense(W), x_BTi.unsqueeze(2)).squeeze(2), y_BTo)
    return each


@every_shared
def test_a_gate_weighs_the_factors_of_each_token(dims: tuple[int, ...], chunk: int | None) -> None:
    plain, W, gate = low_rank(dims), draw(OUT, IN), draw(*dims, T if chunk is None else C, R)
    gate[..., 1, :] = 0
    delta = LowRank(plain.u, plain.v, gate)
    each = act_token_by_token(delta, dims, chunk, None)
    assert not each.dense(W)[:, 1].any()
    for refused in (delta.dense, delta.svdvals):
        with pytest.raises(ValueError, match=r"differs from token to token: take delta\.per_token\(tokens\) first"):
            refused(W)
    for total in (delta + plain, plain + delta):
        of_plain = plain.per_token(torch.arange(T), chunk)
        close(act_token_by_token(total, dims, chunk, None).dense(W), each.dense(W) + of_plain.dense(W))


@pytest.mark.parametrize("name", [name for name in KINDS if name != "replaced"])
@every_shared
def test_a_mask_keeps_an_update_off_tokens(name: str, dims: tuple[int, ...], chunk: int | None) -> None:
    delta, W, served = KINDS[name](dims), draw(OUT, IN), torch.ones(*dims, T if chunk is None else C, 1).double()
    served[..., 1, :] = 0
    each, whole = act_token_by_token(delta, dims, chunk, served), delta.per_token(torch.arange(T), chunk)
    off = torch.arange(T) % (chunk or T) == 1
    assert not each.dense(W)[:, off].any()
    close(each.dense(W)[:, ~off], whole.dense(W)[:, ~off])


def test_what_is_added_to_a_patch_serves_all_tokens() -> None:
    """Leading dims broadcast; a patch that does not serve all tokens is not added to."""
    own, more, bias, W, x = low_rank((B,)), low_rank((1,)), draw(1, OUT), draw(OUT, IN), draw(B, T, IN)
    total = Patch(weights={"gate": own}).merged_with(Patch(weights={"gate": more, "up": more}, biases={"gate": bias}))
    close(total.weights["gate"].linear(W, x), own.linear(W, x) + more.extra(x))
    assert total.weights["up"] is more
    assert torch.equal(total.merged_with(Patch(biases={"gate": bias})).biases["gate"], 2 * bias)
    served = (torch.arange(T) > 2).double()[None, :, None].expand(B, T, 1)
    masked = Patch(biases={"gate": draw(B, OUT)}, served=served)
    close(masked.per_token(torch.arange(T)).biases["gate"], masked.biases["gate"][:, None] * served)
    with pytest.raises(ValueError, match="pass the queries alone"):
        masked.merged_with(Patch())


@pytest.mark.parametrize("name", ["low-rank", "scale", "full"])
def test_a_sum_is_relative_to_the_same_matrix(name: str) -> None:
    first, second, W = KINDS[name]((B,)), low_rank((B,)), draw(OUT, IN)
    total = first + second
    close(total.dense(W), first.dense(W) + second.dense(W))
    assert total.u.shape[-1] == 2 * R if isinstance(total, LowRank) else isinstance(total, Sum)


def test_a_shear_moves_its_own_token_exactly_and_orthogonal_ones_not_at_all() -> None:
    a, shift, W = draw(B, IN), draw(B, IN), draw(OUT, IN)
    shear = InputShift(a, shift)
    close(shear.apply(a[:, None]), (a + shift)[:, None])
    orthogonal = draw(B, IN)
    orthogonal = orthogonal - a * (orthogonal * a).sum(-1, keepdim=True) / a.square().sum(-1, keepdim=True)
    close(shear.apply(orthogonal[:, None]), orthogonal[:, None])
    close(W @ (a + shift).unsqueeze(-1), (W + shear.dense(W)) @ a.unsqueeze(-1))


def test_routing_scatters_weights_to_blocks() -> None:
    routing = Routing(torch.tensor([[[2, 0], [1, 3]]]), torch.tensor([[[0.25, 0.75], [1.0, -2.0]]]), draw(1, 2, 4))
    assert routing.scales(4).tolist() == [[[0.75, 0, 0.25, 0], [0, 1, 0, -2]]]
    at = routing.per_token(torch.tensor([1]))
    assert at.index.tolist() == [[[[1, 3]]]]
    assert at.scales(4).tolist() == [[[[0, 1, 0, -2]]]]


def test_a_dense_routing_must_be_of_one_token() -> None:
    ffn = FeedForward(IN, OUT, blocks=4)
    patch = Patch(routing=Routing(torch.zeros(B, T, 1, dtype=torch.long), torch.ones(B, T, 1), torch.ones(B, T, 4)))
    with pytest.raises(ValueError, match=r"take patch\.per_token\(tokens\) first"):
        ffn.dense(patch)
    assert ffn.dense(patch.per_token(torch.arange(T)))["down"].shape == (B, T, IN, 4 * OUT)


class LargestTensor(TorchDispatchMode):
    """Remembers how many numbers the largest output of any operation has."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, tuple | list) else [result]:
            if torch.is_tensor(part):
                self.numel = max(self.numel, part.numel())
        return result


@contextmanager
def at_most(numel: int) -> Iterator[None]:
    with LargestTensor() as largest:
        yield
    assert largest.numel <= numel


LARGE = {"sequence": ((2,), None, 16), "chunk": ((2, 4), 4, 4), "token": ((2, 16), 1, 1)}


@pytest.mark.parametrize(("dims", "chunk", "width"), LARGE.values(), ids=LARGE)
def test_no_update_is_formed_in_a_forward_pass(dims: tuple[int, ...], chunk: int | None, width: int) -> None:
    """Neither one matrix per token (B·T·o·i) nor one per update: nothing is larger than the factors or the states."""
    tokens, rank, o, i = 32, 2, 64, 48
    x, W = torch.randn(*dims, width, i), torch.randn(o, i)
    delta = LowRank(torch.randn(*dims, o, rank), torch.randn(*dims, i, rank))
    shear = InputShift(torch.randn(*dims, i), torch.randn(*dims, i))
    limit = max(tokens * o, delta.u.numel(), W.numel())
    with at_most(limit):
        delta.linear(W, x)
        shear.apply(x)
        delta.norm(W)
    with pytest.raises(AssertionError), at_most(2 * o * i - 1):  # the recorder sees what it should
        delta.dense(W)
    ffn = FeedForward(i, o)
    torch.nn.init.normal_(ffn.gate)
    down = LowRank(torch.randn(*dims, i, rank), torch.randn(*dims, o, rank))
    with at_most(limit):
        ffn(torch.randn(2, 16, i), Patch(shear, {"gate": delta, "up": delta, "down": down}, chunk=chunk))


def test_one_update_for_all_rows_is_masked_row_by_row() -> None:
    served_BT1 = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).unsqueeze(-1)
    each = Full(torch.ones(1, 4, 3)).per_token(torch.arange(2), None, served_BT1)
    assert torch.equal(each.matrix, served_BT1[..., None].expand(2, 2, 4, 3))  # type: ignore[attr-defined]
