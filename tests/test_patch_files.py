"""Patch files: what is written comes back bit for bit, to the model it was made for and to no other."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cases import CASES, Case, batch_of, build, length_of_context
from test_static import contexts, queries
from zoo.core.delta import Delta, InputShift, LowRank
from zoo.core.patch import Patch
from zoo.lens.patch_file import _tensors, describe, fingerprint, load_patch, save_patch
from zoo.lens.static import answer, fit
from zoo.models import Model

pytestmark = pytest.mark.numeric

BY_NAME = {case.name: case for case in CASES}
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def model_and_patch(name: str = "transformer-regression", form: str = "affine") -> tuple[Model, list[Patch]]:
    model = build(BY_NAME[name])
    tokens, n = queries(model, contexts(model)[0], 8)
    return model, fit(model.decoder, [tokens], n, form)


@every_case
@torch.no_grad()
def test_static_patches_come_back_bit_for_bit(case: Case, tmp_path: Path) -> None:
    model, equal = build(case), build(case)
    tokens, n = queries(model, contexts(model)[0], 8)
    for form in ("affine", "output"):  # matrices and biases of gate and up, a matrix of down
        patches = fit(model.decoder, [tokens], n, form)
        save_patch(tmp_path / "p.safetensors", patches, model, form=form)
        loaded, again = (load_patch(tmp_path / "p.safetensors", equal) for _ in range(2))
        stored = _tensors(patches)
        assert _tensors(loaded).keys() == stored.keys()
        assert all(torch.equal(tensor, stored[name]) for name, tensor in _tensors(loaded).items())
        outputs = [answer(model.decoder, tokens[:, n:], p) for p in (loaded, again, patches, [Patch()] * 2)]
        assert torch.equal(outputs[0], outputs[1])
        # what was fitted may lie transposed in memory, where products round in another way
        torch.testing.assert_close(outputs[2], outputs[0], rtol=0, atol=1e-12)
        assert (outputs[3] - outputs[0]).abs().max() > 1e-6
    assert [path.name for path in tmp_path.iterdir()] == ["p.safetensors"]


@every_case
@torch.no_grad()
def test_patches_of_each_token_too(case: Case, tmp_path: Path) -> None:
    model = build(case)
    tokens, n = batch_of(model).tokens, length_of_context(model)
    patches = model.deltas(tokens, n)
    save_patch(tmp_path / "p", patches, model)
    loaded = load_patch(tmp_path / "p", model)
    queries_only, positions = tokens[:, n:], torch.full((tokens.shape[1] - n,), n)
    expected = model(queries_only, patches=patches, positions=positions)
    torch.testing.assert_close(model(queries_only, patches=loaded, positions=positions), expected, rtol=0, atol=1e-12)
    assert [patch.chunk for patch in loaded] == [patch.chunk for patch in patches]


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


def change(model: Model) -> None:
    with torch.no_grad():
        model.decoder.head.weight[0, 0] += 1e-12


CHANGES: dict[str, Callable[[Model], Any]] = {
    "one number": change,
    "precision": lambda model: model.float(),
    "a buffer": lambda model: model.decoder.context_to_delta.routers[0].bias.add_(0.1),  # type: ignore[union-attr]
}


@pytest.mark.parametrize("what", CHANGES)
def test_the_fingerprint_is_of_all_that_a_model_is(what: str) -> None:
    model = build(BY_NAME["moe-token"])
    before = fingerprint(model)
    assert before == fingerprint(build(BY_NAME["moe-token"])) == fingerprint(copy.deepcopy(model).train())
    CHANGES[what](model)
    assert fingerprint(model) != before


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
    with pytest.raises(ValueError, match="kind Odd has no place in a file; kinds: LowRank, Scale, Full, Shear"):
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
    with pytest.raises(ValueError, match="no patch file at"):
        load_patch(tmp_path / "missing", model)
    with pytest.raises(ValueError, match="no patch file at"):
        load_patch(tmp_path, model)
    for name, content in {"short": whole[:-9], "header": whole[:40], "empty": b"", "text": b"not a patch" * 9}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="is damaged or no patch file"):
            load_patch(tmp_path / name, model)
    for metadata in (None, {"format": "pt"}, {"zoo": "["}, {"zoo": "[]"}, {"zoo": "{}"}):
        save_file({"a": torch.ones(2)}, tmp_path / "foreign", metadata)
        with pytest.raises(ValueError, match="is no patch file of this zoo"):
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


ONE = torch.ones(1, 24, 1).double()
CONTENTS: dict[str, dict[str, Any]] = {
    "unknown kind": {"0.weights.up.0.Module.u": ONE},
    "unknown matrix": {"0.weights.forward.0.LowRank.u": ONE, "0.weights.forward.0.LowRank.v": ONE},
    "unknown field": {"0.weights.up.0.LowRank.w": ONE},
    "unknown tensor": {"0.other": ONE},
    "layer too many": {"2.biases.up": torch.ones(1, 24).double()},
    "missing factor": {"0.weights.up.0.LowRank.v": None},
    "wrong outputs": {"0.weights.up.0.LowRank.u": torch.ones(1, 23, 8).double()},
    "wrong rank": {"0.weights.up.0.LowRank.u": torch.ones(1, 24, 3).double()},
    "no leading dim": {"0.biases.up": torch.tensor(1.0).double()},
    "wrong bias": {"0.biases.up": torch.ones(1, 16).double()},
    "wrong input": {"0.input.0.Shear.a": torch.ones(1, 24), "0.input.0.Shear.shift": torch.ones(1, 24)},
    "gap in a sum": {"0.weights.up.2.LowRank.u": ONE, "0.weights.up.2.LowRank.v": torch.ones(1, 16, 1).double()},
    "sum of scales": {"0.weights.up.1.Scale.rows": ONE[..., 0], "0.weights.up.1.Scale.columns": ONE[:, :16, 0]},
    "a block too many": {
        "0.routing.index": torch.ones(1, 1, 1).long(),
        "0.routing.weight": ONE[:, :1],
        "0.routing.logits": ONE[:, :1],
    },
    "an empty matrix": {"0.weights.up.0.LowRank.u": torch.ones(0).double()},
    "a choice that is no index": {
        "0.routing.index": torch.zeros(1, 1, 1),
        "0.routing.weight": ONE[:, :1],
        "0.routing.logits": ONE[:, :1],
    },
    "half a routing": {"0.routing.index": torch.zeros(1, 1, 1).long()},
}


@pytest.mark.parametrize("what", CONTENTS)
def test_files_with_other_contents_are_refused(what: str, tmp_path: Path) -> None:
    model, patches = model_and_patch()
    save_patch(tmp_path / "p", patches, model)
    load_patch(rewritten(tmp_path / "p", {}), model)  # the control: nothing replaced
    with pytest.raises(ValueError, match="does not hold patches of this zoo"):
        load_patch(rewritten(tmp_path / "p", CONTENTS[what]), model)


NAN = torch.full((1, 24), float("nan")).double()
MANY = {
    f"0.weights.up.{i}.LowRank.{f}": torch.ones(1, n, 1).double() for i in range(20) for f, n in (("u", 24), ("v", 16))
}
ROUTING = {f"0.routing.{field}": torch.zeros(1, 4, 1).double() for field in ("index", "weight", "logits")}
NAMED: dict[str, tuple[dict[str, Any], str]] = {
    "nan": ({"0.biases.up": NAN}, r"0\.biases\.up holds numbers that are not finite"),
    "dtype": ({"0.biases.up": NAN.float()}, r"0\.biases\.up must be of torch\.float64, got torch\.float32"),
    "input": (
        {"0.input.0.LowRank.u": ONE, "0.input.0.LowRank.v": ONE[:, :16]},
        r"0\.input is a LowRank; only a Shear",
    ),
    "leading dims": ({"0.weights.up.0.LowRank.u": ONE.expand(7, 24, 6)}, r"0\.weights\.up\.0\.LowRank .* leading dims"),
    "two batches": ({f"{i}.biases.up": ONE[..., 0].expand(3 - i, 24) for i in (0, 1)}, r"batches of \[2, 3\]"),
    "terms": (MANY, r"0\.weights\.up must hold the terms .* at most 16"),
    "scalar": ({"0.weights.up.0.LowRank.u": ONE[0, 0, 0]}, r"0\.weights\.up\.0\.LowRank\.u of shape \(\)"),
    "routing": (
        {**ROUTING, "0.routing.index": torch.zeros(1, 4, 2).long()},
        r"0\.routing\.weight of shape \(1, 4, 1\)",
    ),
    "zero": ({"0.input.0.Shear.a": NAN[:, :16] * 0, "0.input.0.Shear.shift": ONE[:, :16, 0]}, r"Shear\.a"),
}


@pytest.mark.parametrize("what", NAMED)
def test_what_would_not_work_is_refused_by_name(what: str, tmp_path: Path) -> None:
    model, patches = model_and_patch()
    save_patch(tmp_path / "p", patches, model)
    with pytest.raises(ValueError, match=rf"changed does not hold patches of this zoo: .*{NAMED[what][1]}"):
        load_patch(rewritten(tmp_path / "p", NAMED[what][0]), model)


@torch.no_grad()
def test_emitted_patches_come_back_with_their_cores(tmp_path: Path) -> None:
    for case in CASES:
        model = build(case)
        patches = model.decoder(batch_of(model).tokens, 7 if model.task.n_context else 0)[1]
        save_patch(tmp_path / "p", patches, model)
        stored, loaded = _tensors(patches), _tensors(load_patch(tmp_path / "p", model))
        assert loaded.keys() == stored.keys(), case.name
        assert all(torch.equal(loaded[name], stored[name]) for name in stored), case.name


def test_files_of_other_schemas_are_refused(tmp_path: Path) -> None:
    model, patches = model_and_patch()
    save_patch(tmp_path / "p", patches, model)
    with pytest.raises(ValueError, match=r"has schema 2, this zoo .* reads 1"):
        load_patch(rewritten(tmp_path / "p", {}, schema=2), model)
    with pytest.raises(ValueError, match="lacks chunks, layers in its description"):
        load_patch(rewritten(tmp_path / "p", {}, chunks=None, layers=None), model)
    for chunks in ([None], 3, [None, "1"], [None, 0]):
        with pytest.raises(ValueError, match="does not hold patches of this zoo"):
            load_patch(rewritten(tmp_path / "p", {}, chunks=chunks), model)


def test_an_input_and_a_sum_come_back(tmp_path: Path) -> None:
    """What static patches never hold: a shear, and more than two terms."""
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
