"""Patch files: what is written comes back bit for bit, to the model it was made for and to no other."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from cases import BY_NAME, CASES, Case, batch_of, build, length_of_context
from test_static import contexts, queries
from zoo.core.delta import Delta, InputShift, LowRank
from zoo.core.patch import Patch
from zoo.lens.patch_file import _tensors, describe, fingerprint, load_patch, save_patch
from zoo.lens.static import answer, fit
from zoo.models import Model

pytestmark = pytest.mark.numeric

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def model_and_patch(name: str = "transformer-regression", form: str = "affine") -> tuple[Model, list[Patch]]:
    model = build(BY_NAME[name])
    tokens, n = queries(model, contexts(model)[0], 8)
    return model, fit(model.decoder, tokens, n, form)


@every_case
@torch.no_grad()
def test_patches_come_back_bit_for_bit(case: Case, tmp_path: Path) -> None:
    """Static ones, with matrices and biases; those that the family emits; and one for each token."""
    model, equal = build(case), build(case)
    samples, n = queries(model, contexts(model)[0], 8)
    tokens, length = batch_of(model).tokens, length_of_context(model)
    query, positions = tokens[:, length:], torch.full((tokens.shape[1] - length,), length)
    for what, patches in {
        "affine": fit(model.decoder, samples, n, "affine"),
        "output": fit(model.decoder, samples, n, "output"),
        "emitted": model.decoder(tokens, model.task.n_context)[1],
        "total": model.deltas(tokens, length),
    }.items():
        save_patch(tmp_path / "p.safetensors", patches, model)
        loaded, stored = load_patch(tmp_path / "p.safetensors", equal), _tensors(patches)
        assert _tensors(loaded).keys() == stored.keys()
        assert all(torch.equal(tensor, stored[name]) for name, tensor in _tensors(loaded).items())
        assert [patch.chunk for patch in loaded] == [patch.chunk for patch in patches]
        if what == "emitted":
            continue  # for all tokens, not for the queries alone
        # what was made may lie transposed in memory, where products round in another way
        outputs = [
            model(query, patches=p, positions=positions)
            if what == "total"
            else answer(model.decoder, samples[:, n:], p)
            for p in (loaded, patches, [Patch()] * 2)
        ]
        torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-12)
        assert (outputs[2] - outputs[0]).abs().max() > 1e-6
    assert [path.name for path in tmp_path.iterdir()] == ["p.safetensors"]


def test_a_file_describes_itself(tmp_path: Path) -> None:
    model, patches = model_and_patch()
    save_patch(tmp_path / "new" / "p", patches, model, form="affine", context={"split": "test", "row": 3})
    description = describe(tmp_path / "new" / "p")
    assert description == {
        "schema": 1,
        "version": "0.1.0",
        "fingerprint": fingerprint(model),
        "layers": 2,
        "chunks": [None, None],
        "about": {"form": "affine", "context": {"split": "test", "row": 3}},
    }
    with safe_open(tmp_path / "new" / "p", "pt") as file:
        assert set(file.metadata()) == {"zoo"}
        assert "1.weights.down.0.LowRank.u" in file.keys()  # noqa: SIM118
        assert "0.biases.gate" in file.keys()  # noqa: SIM118


def test_the_fingerprint_is_of_all_that_a_model_is() -> None:
    model = build(BY_NAME["moe-token"])
    before = fingerprint(model)
    assert before == fingerprint(build(BY_NAME["moe-token"])) == fingerprint(copy.deepcopy(model).train())
    one_number, a_buffer = copy.deepcopy(model), copy.deepcopy(model)
    one_number.decoder.head.weight.data[0, 0] += 1e-12
    a_buffer.decoder.context_to_delta.routers[0].bias += 0.1  # type: ignore[union-attr]
    assert len({before, *map(fingerprint, (one_number, a_buffer, model.float()))}) == 4


def test_another_model_is_refused_with_both_fingerprints(tmp_path: Path) -> None:
    model, patches = model_and_patch()
    other = build(BY_NAME["transformer-regression"], seed=1)
    save_patch(tmp_path / "p", patches, model)
    with pytest.raises(ValueError, match="was made for another model") as error:
        load_patch(tmp_path / "p", other)
    assert fingerprint(model) in str(error.value)
    assert fingerprint(other) in str(error.value)


def test_what_has_no_place_in_a_file_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    class Odd(LowRank):
        pass

    model, patches = model_and_patch()
    with pytest.raises(ValueError, match="1 patches for 2 layers"):
        save_patch(tmp_path / "p", patches[:1], model)
    with pytest.raises(ValueError, match="must be plain JSON values"):
        save_patch(tmp_path / "p", patches, model, context=torch.ones(2))
    odd: dict[str, Delta] = {"up": Odd(torch.ones(1, 24, 1), torch.ones(1, 16, 1))}
    with pytest.raises(
        ValueError, match=r"weights\.up\.0, a Odd, has no place in a file; kinds: LowRank, Scale, Full, Shear"
    ):
        save_patch(tmp_path / "p", [Patch(weights=odd), Patch()], model)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, patches = model_and_patch()
    save_patch(tmp_path / "p", patches, model, form="old")

    def cut(path: Path, content: bytes) -> None:
        path.touch()
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", cut)
    with pytest.raises(OSError, match="disk full"):
        save_patch(tmp_path / "p", patches, model, form="new")
    assert [file.name for file in tmp_path.iterdir()] == ["p"]
    assert describe(tmp_path / "p")["about"] == {"form": "old"}
    load_patch(tmp_path / "p", model)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    model, patches = model_and_patch()
    save_patch(tmp_path / "p", patches, model)
    whole = (tmp_path / "p").read_bytes()
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(ValueError, match="no patch file at"):
            load_patch(path, model)
    for content in (whole[:-9], whole[:40], b"", b"not a patch" * 9):
        (tmp_path / "damaged").write_bytes(content)
        with pytest.raises(ValueError, match="is damaged or no patch file"):
            load_patch(tmp_path / "damaged", model)
    for metadata in (None, {"format": "pt"}, {"zoo": "["}, {"zoo": "[]"}, {"zoo": "{}"}):
        save_file({"a": torch.ones(2)}, tmp_path / "foreign", metadata)
        with pytest.raises(ValueError, match="or no patch file of this zoo"):
            load_patch(tmp_path / "foreign", model)


def rewritten(path: Path, tensors: dict[str, Any], **description: Any) -> Path:
    """The file with tensors (None: without) and entries of its description replaced."""
    with safe_open(path, "pt") as file:
        old = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        known = json.loads(file.metadata()["zoo"])
    new = {name: tensor.clone() for name, tensor in {**old, **tensors}.items() if tensor is not None}
    entries = {name: value for name, value in {**known, **description}.items() if value is not None}
    target = path.with_name("changed")
    save_file(new, target, {"zoo": json.dumps(entries)})
    return target


def low_rank(place: int, rank: int = 1) -> dict[str, Tensor]:
    sides = {"u": 24, "v": 16}
    return {f"0.weights.up.{place}.LowRank.{f}": torch.ones(1, n, rank).double() for f, n in sides.items()}


def routing(index: Tensor, tokens: int = 1) -> dict[str, Tensor]:
    ones = torch.ones(1, tokens, 1).double()
    return {"0.routing.index": index, "0.routing.weight": ones, "0.routing.logits": ones}


UP, BIAS, FIRST = torch.ones(1, 24, 1).double(), torch.ones(1, 24).double(), "0.weights.up.0.LowRank"
ROWS = {"rows": BIAS, "columns": BIAS[:, :16]}
SHEAR = {"0.input.0.Shear.a": BIAS[:, :16] * 0, "0.input.0.Shear.shift": BIAS[:, :16]}
CONTENTS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown kind": ({"0.weights.up.1.Module.u": UP}, r"unknown tensors at 0\.weights\.up\.1\.Module"),
    "unknown matrix": ({f"0.weights.forward.0.LowRank.{f}": UP for f in "uv"}, "unknown tensors"),
    "unknown field": ({f"{FIRST}.w": UP}, rf"{FIRST} must hold u, v, core, got \['u', 'v', 'w'\]"),
    "layer too many": ({"2.biases.up": BIAS}, "layer '2' does not exist"),
    "too many terms": ({k: v for place in range(20) for k, v in low_rank(place).items()}, r"unknown .*up\.16\."),
    "sum of scales": (
        {f"0.weights.up.{k}.Scale.{f}": t for k in (1, 2) for f, t in ROWS.items()},
        "only low-rank updates are added",
    ),
    "no shear": ({f"0.input.0.LowRank.{f}": UP[:, :16] for f in "uv"}, r"unknown tensors .*0\.input\.0\.LowRank"),
    "missing factor": ({f"{FIRST}.v": None}, rf"{FIRST} must hold u, v, core, got \['u'\]"),
    "half a routing": ({"0.routing.index": torch.zeros(1, 1, 1).long()}, r"0\.routing must hold index, weight, logits"),
    "outputs": ({f"{FIRST}.u": torch.ones(1, 23, 8).double()}, rf"{FIRST}\.u of shape .* end in \(24, r\)"),
    "rank": ({f"{FIRST}.u": torch.ones(1, 24, 3).double()}, rf"{FIRST}\.v of shape .* end in \(16, 3\)"),
    "scalar": ({f"{FIRST}.u": UP[0, 0, 0]}, rf"{FIRST}\.u of shape \(\)"),
    "empty": ({f"{FIRST}.u": torch.ones(0).double()}, rf"{FIRST}\.u of shape \(0,\)"),
    "bias": ({"0.biases.up": BIAS[:, :16]}, r"0\.biases\.up of shape \(1, 16\) must have 1 leading dims"),
    "leading dims": ({f"{FIRST}.u": UP.expand(7, 24, 6)}, rf"{FIRST}\.v of shape .* those of the other fields"),
    "two batches": ({f"{i}.biases.up": BIAS.expand(3 - i, 24) for i in (0, 1)}, "is of 2 sequences, others of 3"),
    "routing": (routing(torch.zeros(1, 4, 2).long()), r"0\.routing\.weight of shape \(1, 1, 1\)"),
    "block": (routing(torch.ones(1, 1, 1).long()), "to others than the blocks 0 to 0"),
    "index": (routing(torch.zeros(1, 1, 1)), r"0\.routing\.index is of torch\.float32"),
    "nan": ({"0.biases.up": BIAS * torch.nan}, r"0\.biases\.up holds numbers that are not finite"),
    "dtype": ({"0.biases.up": BIAS.float()}, r"0\.biases\.up is of torch\.float32, the model of torch\.float64"),
    "zero": (SHEAR, r"Shear\.a is zero"),
}


@pytest.mark.parametrize("what", CONTENTS)
def test_what_would_not_work_is_refused_by_name(what: str, tmp_path: Path) -> None:
    model, patches = model_and_patch()
    save_patch(tmp_path / "p", patches, model)
    load_patch(rewritten(tmp_path / "p", {}), model)  # the control: nothing replaced
    tensors, message = CONTENTS[what]
    with pytest.raises(ValueError, match=rf"changed does not hold patches of this zoo: .*{message}"):
        load_patch(rewritten(tmp_path / "p", tensors), model)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"schema": 2}, r"has schema 2, this zoo .* reads 1"),
        ({"chunks": None}, "no patch file of this zoo: it lacks 'chunks'"),
        ({"layers": "2"}, "no patch file of this zoo: layers must be a whole number"),
        *(({"chunks": chunks}, "does not hold patches") for chunks in ([None], 3, [None, "1"], [None, 0])),
    ],
)
def test_other_descriptions_are_refused(entries: dict[str, Any], message: str, tmp_path: Path) -> None:
    model, patches = model_and_patch()
    save_patch(tmp_path / "p", patches, model)
    with pytest.raises(ValueError, match=message):
        load_patch(rewritten(tmp_path / "p", {}, **entries), model)


def test_an_input_and_a_sum_come_back(tmp_path: Path) -> None:
    """More than two terms."""
    model, _ = model_and_patch()
    low_rank = LowRank(torch.randn(1, 24, 2).double(), torch.randn(1, 16, 2).double())
    scale = build(BY_NAME["hypernet-segment-scale-gqa"]).decoder(torch.randn(1, 9, 4).double(), 7)[1][0].weights["up"]
    shear = InputShift(torch.randn(1, 16).double(), torch.randn(1, 16).double())
    patch = Patch(input=shear, weights={"up": scale + low_rank + low_rank})
    save_patch(tmp_path / "p", [patch, Patch()], model)
    first, second = load_patch(tmp_path / "p", model)
    z = torch.randn(1, 9, 16).double()
    ffn = model.decoder.blocks[0].ffn
    assert torch.equal(ffn(z, first), ffn(z, patch))
    assert second == Patch()
