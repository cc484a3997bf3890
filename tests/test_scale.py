"""What two processes hold, keep and send is what the plan says; docs/scale.md is what docs/scale.py makes of it."""

from __future__ import annotations

import re
import runpy
import weakref
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zoo.bench import processes, steps
from zoo.bench.pair import SIZE, TASK, WAYS
from zoo.devices import plan, strategies
from zoo.models import MODELS, Model
from zoo.models.optim import Muon
from zoo.training.data import Stream

ROOT = Path(__file__).parents[1]
PAGE: dict[str, Any] = runpy.run_path(str(ROOT / "docs/scale.py"), run_name="scale")
JOBS = [(family, way) for family, ways in WAYS.items() for way in ways[1:]]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return processes.pair(1)["families"]


def planned(family: str) -> Model:
    with torch.device("meta"):
        return steps.build(family, {}, TASK)


@pytest.mark.processes
@pytest.mark.xdist_group("scale")
@pytest.mark.parametrize(("family", "way"), JOBS)
def test_two_processes_hold_and_send_what_is_planned(family: str, way: str, found: dict[str, Any]) -> None:
    model, one = planned(family), found[family][way]
    held, sent = plan.held(model, way, 2), plan.sent(model, way, 2, SIZE // 2 * model.task.tokens)
    assert one["held"] == {name: held[name] for name in one["held"]}
    assert one["held"] != {name: plan.held(model, way if way != "ddp" else "fsdp", 3)[name] for name in one["held"]}
    for name, count in sent.items():
        if name == "rows":  # a router does not choose evenly
            assert one["sent"].get(name, 0) == pytest.approx(count, rel=0.1)
        else:
            assert one["sent"].get(name, 0) == count
    assert one["rows"]["wide"] == one["sent"].get("rows", 0)
    assert one["rows"]["narrow"] == pytest.approx(one["rows"]["wide"] / 2, rel=0.1)
    assert one["sent"]["few"] < 1e-3 * sum(sent.values())
    assert plan.sent(model, way, 3)["gradients"] > 1.2 * sent["gradients"]
    # what goes over the network besides: headers, and by gloo a sum of gradients twice before it is cut
    if one["network"]:
        assert one["network"] >= sum(one["sent"].values())


@pytest.mark.processes
@pytest.mark.xdist_group("scale")
@pytest.mark.parametrize(("family", "way"), JOBS)
def test_two_processes_keep_what_is_planned(family: str, way: str, found: dict[str, Any]) -> None:
    model, kept = planned(family), found[family][way]["kept"]
    batch = next(iter(Stream(steps.build(family, {}, TASK).task, "train", SIZE, 1, world=2)))
    for narrow in (False, True):
        count = kept["narrow" if narrow else "wide"]
        if way == "experts":  # other rows arrive than leave, and where they stood is kept
            assert 1 < count / plan.activations(model, batch, narrow) < 1.2
        else:
            assert count == plan.activations(model, batch, narrow)


def test_a_run_says_what_each_of_its_processes_and_of_eight_would_hold_and_do() -> None:
    model, default = (MODELS["moe"]({"name": "moe"}, {"name": "regression"}, x) for x in ({"accumulate": 2}, {}))

    def told(way: str, W: int, precision: str = "32-true", model: Model = model) -> str:
        strategy = strategies.Processes() if way == "ddp" else strategies.Sharded(way, timedelta(1), model, False)
        return plan.told(model, SimpleNamespace(strategy=strategy, world_size=W, precision=precision))

    held = plan.held(model, "ddp", 2)
    whole = sum(held[name] for name in ("weights", "gradients", "moments")) / 1e6
    said = re.findall(r"each holds 1/(\d+) of .*, (\S+) MB, reads (\d+) of 64 sequences and", told("fsdp", 2))
    assert [(int(W), int(size)) for W, _, size in said] == [(2, 32), (8, 8)]
    assert [float(part) for _, part, _ in said] == pytest.approx([whole / 2, whole / 8], rel=0.02)  # 8 divides not all
    assert "all weights, gradients and moments" in told("ddp", 2)
    assert told("ddp", 1) == ""
    assert "each holds 2 of 4 experts and 1/2 of all else" in told("experts", 2)
    assert told("experts", 2).endswith("experts, 8 processes: they cannot divide model.experts + model.shared=4\n")
    assert told("experts", 2, "bf16-mixed") != told("experts", 2)
    page = (ROOT / "docs/devices.md").read_text()
    assert all(told(way, 2, model=default) in page for way in ("fsdp", "experts"))
    assert "24 processes: they cannot divide 64 sequences, in parts of 2" in told("ddp", 24)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", MODELS)
def test_tensors_without_memory_keep_as_much(family: str, checkpointing: bool) -> None:
    size = {"layers": 2, **({"shared": 1} if family == "moe" else {})}
    model = steps.build(family, size, {"name": "noise"}).train()
    model.decoder.activation_checkpointing = checkpointing
    batch = model.task.batch("train", 0, 4)
    for narrow in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            real = plan.saved_bytes(lambda: model.training_step(batch, 0))
        assert plan.activations(model, batch, narrow) == real
        assert plan.activations(model, batch.rows(0, 3), narrow) < 0.9 * real


class Living(TorchDispatchMode):
    """The most bytes of storages that were made and live at once."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
        for storage in (t.untyped_storage() for t in tree_leaves(out) if torch.is_tensor(t)):
            if (key := storage._cdata) not in self.sizes and key not in given:
                self.sizes[key] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, key, None)
        self.most = max(self.most, sum(self.sizes.values()))
        return out


@pytest.mark.parametrize("family", MODELS)
def test_a_step_of_muon_takes_what_is_planned(family: str) -> None:
    model = steps.build(family, {}, {"name": "noise"})
    optimizer: Any = model.configure_optimizers()["optimizer"]  # type: ignore[index,call-overload]
    (muon,) = (part for part in optimizer.parts if isinstance(part, Muon))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    muon.step()
    with Living() as seen:
        muon.step()
    assert plan.held(model, "ddp", 2)["muon"] == pytest.approx(seen.most, rel=0.01)


@pytest.mark.parametrize("again", [False, True])
def test_what_is_kept_grows_by_as_much_with_each_layer_and_sequence(again: bool) -> None:
    model = PAGE["built"]("hypernet", "124M", layers=4, again=again)
    always, each = PAGE["kept"]("hypernet", "124M", again, layers=4)
    count = plan.activations(model, model.task.batch("train", 0, 3), narrow=True)
    layer = [grown for _, grown in PAGE["growth"]("hypernet", "124M", False)] if again else [0, 0]  # one runs again
    assert always - layer[0] + 3 * (each - layer[1]) == pytest.approx(count, rel=1e-4)
    assert always + 2 * each != pytest.approx(count, rel=0.1)


def test_a_way_that_fits_is_no_larger_than_a_gpu_and_one_that_does_not_is_told() -> None:
    one, fits = PAGE["chosen"]("transformer", "124M", 8)
    assert fits
    assert one.total <= 64e9
    assert one.name == "ddp"
    assert not PAGE["chosen"]("merged_experts", "7B", 512)[1]


@pytest.mark.slow
def test_the_page_is_what_its_script_makes() -> None:
    text = (ROOT / "docs/scale.md").read_text()
    assert PAGE["page"](text) == text
    assert PAGE["page"](text.replace("| 8 | ddp |", "| 8 | fsdp |")) == text
