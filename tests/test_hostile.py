"""Hostile files end in one line: none is executed, hangs, fills the memory or touches another folder."""

from __future__ import annotations

import os
import time
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

import hostile
import zoo
from cases import batch_of
from runs import QUIET, one_line, saved, small
from test_patch_files import model_and_patch
from zoo.lens.patch_file import load_patch, save_patch
from zoo.lens.static import answer
from zoo.training.checkpoint import AtomicCheckpointIO

SIZES = {"dim": 4, "layers": 1, "heads": 1, "hidden": 4}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the smallest model."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("genuine") / "run"
    few = {"optim": {"steps": 3, "batch_size": 4, "warmup": 1}, "validate_every": 1, "test_batches": 1, "seed": 3}
    small(folder, model_options=SIZES, **few)
    return folder


@pytest.fixture
def last(run: Path, tmp_path: Path) -> Path:
    """Where hostile files are written: a run folder without a best checkpoint."""
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    return tmp_path / "run/checkpoints/last.ckpt"


def memory(name: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most since clear_refs; 0 where there is no /proc."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(name)), 0)


def refused(files: Iterable[hostile.File], read: Callable[[Path], Any]) -> tuple[list[str], list[str]]:
    """What was refused, and what was read; every other end, and every file that costs too much, fails."""
    ends: tuple[list[str], list[str]] = [], []
    for what, path in files:
        if os.access("/proc/self/clear_refs", os.W_OK):
            Path("/proc/self/clear_refs").write_text("5")
        before, start = memory("VmRSS"), time.process_time()  # what else runs here does not count
        error = None
        try:
            read(path)
        except Exception as raised:
            error = raised
        seconds, grown = time.process_time() - start, memory("VmHWM") - before
        assert error is None or type(error) is ValueError, f"{what}: {error!r:.200}"
        assert len(str(error).splitlines()) == 1, what
        assert len(str(error)) < 1000, what
        assert seconds < 5, f"{what} takes {seconds} s"
        assert grown < 1 << 30, f"{what} takes {grown} bytes"
        ends[error is None].append(what)
    return ends


LOADED = ("hyper_parameters", "task")
RESUMED = ("optimizer_states", "global_step")
# what zoo.load takes: options that nothing in the weights speaks of
FREE = ("left out", "'points'", "'queries'", "'theta'", "'eps'", "'optim'", "'seed'", "is None")


def test_archives_that_torch_does_not_write(run: Path, last: Path, tmp_path: Path) -> None:
    genuine, proof = (run / "checkpoints/last.ckpt").read_bytes(), tmp_path / "proof"
    read = refused(hostile.archives(saved(run), last, proof), zoo.load)[1]
    assert read == ["a dict with attributes at task"]  # which are not copied
    assert not proof.exists()
    read = refused(hostile.damaged(genuine, last), zoo.load)[1]
    assert all(what.startswith(("flipped", "two")) for what in read)  # some bytes matter to nobody
    torch.save(saved(run), last, _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(run / "checkpoints/last.ckpt") as archive, zipfile.ZipFile(last, "a") as behind:
        for name in archive.namelist():  # torch would read what is before it, its reader of archives this
            behind.writestr(name, archive.read(name))
    assert "is damaged" in one_line(lambda: zoo.load(last))
    hostile.rewritten({"64 MB": torch.zeros(1 << 24)}, last, lambda old: old, compression=zipfile.ZIP_DEFLATED)
    assert "is damaged" in one_line(lambda: zoo.load(last))
    # the archives are refused for what is in them, not for how they were written
    hostile.rewritten(saved(run), last, lambda old: old)
    zoo.load(last)


def test_weights_of_other_names_dtypes_numbers_and_shapes(run: Path, last: Path) -> None:
    content = saved(run)
    _, read = refused(hostile.checkpoints(content, last, hostile.weights(content)), zoo.load)
    assert all("Parameter" in what or "float64" in what for what in read)
    torch.save(hostile.changed(content, ("state_dict", "decoder.head.weight"), torch.ones(1, 4) * 1j), last)
    assert (
        "must be a finite Tensor of shape (1, 4), torch.float32, got Tensor of shape (1, 4), torch.complex64"
        in one_line(lambda: zoo.load(last))
    )
    bfloat16 = {name: t.bfloat16() for name, t in content["state_dict"].items()}
    torch.save({**content, "state_dict": bfloat16}, last)
    assert torch.equal(zoo.load(last).decoder.head.weight.bfloat16(), bfloat16["decoder.head.weight"])


def test_sizes_are_bounded_by_the_weights(run: Path, last: Path) -> None:
    no, read = refused(hostile.checkpoints(saved(run), last, hostile.sizes(saved(run))), zoo.load)
    assert read == []
    assert len(no) >= 25


@pytest.mark.parametrize("share", [12, pytest.param(1, marks=pytest.mark.slow)])
def test_every_field_of_a_checkpoint(run: Path, last: Path, share: int) -> None:
    content, resume = saved(run), AtomicCheckpointIO().load_checkpoint

    def tried(tops: tuple[str, ...], share: int, read: Callable[[Path], Any]) -> tuple[list[str], list[str]]:
        return refused(hostile.checkpoints(content, last, hostile.fields(content, tops, share)), read)

    no, read = tried(LOADED, share, zoo.load)
    assert [what for what in read if not any(free in what for free in FREE)] == []
    content["zoo"]["config"] = {}  # its groups come from the options, the rest is tried below
    no += tried(("zoo",), share, resume)[0] + tried(RESUMED, 4 * share, resume)[0]
    assert len(no) >= 500 // share


@torch.no_grad()
def test_patch_files(tmp_path: Path) -> None:
    """What is read can be used."""
    model, patches = model_and_patch()
    save_patch(tmp_path / "genuine", patches, model, form="affine")
    query = batch_of(model).tokens[:1, 7:]
    no, read = refused(
        hostile.patches(tmp_path / "genuine", tmp_path / "hostile"),
        lambda path: answer(model.decoder, query, load_patch(path, model)),
    )
    assert len(no) >= 150
    # one bias for all sequences or several, fewer of them, other chunks of one update for all: as good as the genuine
    assert [what for what in read if "biases" not in what and "chunks" not in what and "version" not in what] == []


def test_no_path_that_is_removed_or_written_comes_out_of_a_file(run: Path, last: Path) -> None:
    """Of a file as they were, with the state of Lightning's ModelCheckpoint, which removes what it takes for worse."""
    content = saved(run, "best")
    (victim := last.parent.parent.parent / "victim").mkdir()
    (victim / "thesis.txt").write_text("all of it")
    evil, score = f"{last.parent}/../../victim", torch.tensor(9e9)  # that every step beats
    state = dict.fromkeys(("kth_best_model_path", "best_model_path", "last_model_path", "dirpath"), evil)
    state.update(best_k_models={evil: score}, best_model_score=score, kth_value=score)
    assert content["global_step"] < 3
    content["callbacks"] = {"ModelCheckpoint{'monitor': 'validation_loss'}": state}
    content["zoo"].update(schema=3, out=evil)
    torch.save(content, last)
    last.with_name("best.ckpt").write_bytes((run / "checkpoints/best.ckpt").read_bytes())
    zoo.train(resume=last.parent.parent, trainer=QUIET)
    assert [file.name for file in victim.iterdir()] == ["thesis.txt"]
    assert sorted(file.name for file in last.parent.iterdir()) == ["best.ckpt", "last.ckpt"]


def moment(content: Any) -> dict[str, torch.Tensor]:
    return content["optimizer_states"][0]["state"][0]


RESUMES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "no options": (lambda c: c["zoo"].pop("config"), "zoo lacks 'config'"),
    "no time": (lambda c: c["zoo"].update(seconds=None), "zoo.seconds must be a finite number, got None"),
    "no command": (lambda c: c["zoo"].update(command=3), "zoo.command must be text, got 3"),
    "a trainer": (lambda c: c["zoo"].update(trainer=["devices"]), r"zoo.trainer must be a dict, got \['devices'\]"),
    "a score": (lambda c: c["zoo"].update(best="x"), "zoo.best must be a finite number, got 'x'"),
    "no optimizer": (lambda c: c.update(optimizer_states=[]), r"optimizer_states must be a finite \[.*, got \[\]"),
    "a moment": (lambda c: moment(c).update(exp_avg=torch.ones(3)), r"state.0.exp_avg must be .*, got .*\(3,\)"),
    "no moment": (lambda c: c["optimizer_states"][0]["state"].pop(0), "optimizer_states.0.state lacks 0"),
    "other moments": (
        lambda c: c["optimizer_states"][0]["param_groups"][0]["params"].sort(key=lambda k: -k),
        "param_groups names other parameters",
    ),
    "steps of a moment": (lambda c: moment(c)["step"].neg_(), r"state.0.step is -\d.0, the run stands at \d"),
    "a family": (lambda c: c.update(family=[1]), "family must be a dict"),
    "another step": (lambda c: c.update(global_step=0), r"step is \d.0, the run stands at 0"),
    "a far step": (lambda c: c.update(global_step=9), "global_step is 9, beyond optim.steps=3"),
    "an option": (lambda c: c["zoo"]["config"].update(validate_every=torch.ones(2)), "validate_every=.* of type int"),
    "sizes": (
        lambda c: c["hyper_parameters"]["model"].update(layers=10**6),
        "model.layers=1000000 is more than its 12 weights",
    ),
    "weights": (lambda c: c["state_dict"].pop("decoder.head.weight"), "state_dict lacks 'decoder.head.weight'"),
}


@pytest.mark.parametrize("what", RESUMES)
def test_damaged_runs_do_not_go_on(run: Path, last: Path, what: str) -> None:
    content = saved(run, "best")
    RESUMES[what][0](content)
    torch.save(content, last)
    with pytest.raises(ValueError, match=RESUMES[what][1]):
        zoo.train(resume=last.parent.parent, trainer=QUIET)


def test_only_moments_and_the_step_are_taken_from_a_file(run: Path, last: Path) -> None:
    """All else is as the options say, and no two moments share memory."""
    content = saved(run, "best")
    for group in content["optimizer_states"][0]["param_groups"]:
        group.update(fused=True, capturable=True, maximize=True, betas="x", weight_decay=None, junk=1, lr=-1.0)
    content["lr_schedulers"][0].update(base_lrs="x", optimizer=5, lr_lambdas=[{"__code__": 5}] * 2, _last_lr=[9.0, 9.0])
    content["loops"] = {"fit_loop": 5}
    content.update({"pytorch-lightning_version": "2.1", "callbacks": [1]})
    states = [state for state in content["optimizer_states"][0]["state"].values() if "step" in state]
    for state in states:
        state["step"] = states[0]["step"]
    torch.save(content, last)
    last.with_name("best.ckpt").write_bytes(b"damaged")
    zoo.train(resume=last.parent.parent, trainer=QUIET)
    whole = saved(run)["state_dict"]
    resumed = torch.load(last, weights_only=True)["state_dict"]
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    zoo.load(last.with_name("best.ckpt"))  # which was damaged: the next validation is the best


def test_a_damaged_last_checkpoint_names_the_best_one(run: Path, last: Path) -> None:
    best = last.with_name("best.ckpt")
    last.write_bytes((run / "checkpoints/last.ckpt").read_bytes()[:-99])
    assert "best.ckpt" not in one_line(lambda: zoo.train(resume=last))
    best.write_bytes(last.read_bytes())
    assert "best.ckpt" not in one_line(lambda: zoo.train(resume=last))
    best.write_bytes((run / "checkpoints/best.ckpt").read_bytes())
    assert one_line(lambda: zoo.train(resume=last)).endswith(f"what can still be loaded: {best}")
    zoo.load(best)


@pytest.mark.parametrize("path", [5, None, "x" * 5000, "a\0b", "~nobody-of-that-name/x", b"x", ["x"], "/dev/zero", "."])
def test_paths_that_are_none(path: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "no checkpoint at" in one_line(lambda: zoo.load(path))
    assert "no patch file at" in one_line(lambda: load_patch(path, None))  # type: ignore[arg-type]
    if path is not None:
        message = one_line(lambda: zoo.train(resume=path))
        assert any(words in message for words in ("no checkpoint at", "cannot be stored", "must be of type str"))
