"""A pretrained Llama as the frozen W0 of a family: read, trained on, named by its hash, and put back."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

pytest.importorskip("transformers")

import zoo
from cases import plain_forward
from hf_families import build, relative
from runs import QUIET, one_line, same_weights, saved, signalled
from test_cli import command  # noqa: F401
from zoo import analyze, evaluate, generate
from zoo.compare.__main__ import main as compare
from zoo.console import Interrupted
from zoo.records import pretrained
from zoo.tasks.text.tokenizer import SIGNS
from zoo.training import validate
from zoo.training.options import of_run

pytestmark = pytest.mark.filterwarnings("ignore")
ROWS = str(Path(__file__).with_name("prompts.jsonl"))
TASK: dict[str, Any] = {"name": "prompts", "files": [ROWS], "context": 12, "query": 6, "target": 4}
OPTIM = {"name": "adamw", "steps": 3, "batch_size": 4, "lr": 0.05, "warmup": 0}
FAMILIES: dict[str, dict[str, Any]] = {
    "hypernet": {"code_dim": 8},
    "constant": {"name": "hypernet", "code": "constant"},
    "hyper_moe": {"code_dim": 8},
    "merged_experts": {},
    "fast_weights": {},
}


class Seen(L.Callback):
    """The decoder's weights at both ends of a training."""

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.before = {name: p.detach().clone() for name, p in pl_module.decoder.named_parameters()}

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.after = {name: p.detach().clone() for name, p in pl_module.decoder.named_parameters()}


def tokenizer_json() -> dict[str, Any]:
    """Byte pairs of other ids than ours: specials first, bytes from behind, and none of the bytes beyond 0xF4."""
    letters = [chr(SIGNS.get(byte, byte)) for byte in reversed(range(0xF5))]
    merges = [["t", "h"], ["th", "e"], ["Ġ", "the"], ["o", "x"], ["Ġ", "k"]]
    texts = ["<|unk|>", "<|begin|>", "<|end|>", *(a + b for a, b in merges), *letters]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": {text: k for k, text in enumerate(texts)}, "merges": merges}
    own = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": k, "content": text, **own} for k, text in enumerate(texts[:3])]
    return {"added_tokens": added, "pre_tokenizer": level, "decoder": level, "model": model}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random Llama of three layers, in several files."""
    folder = tmp_path_factory.mktemp("base") / "llama"
    options = {"vocab_size": 260, "tie_word_embeddings": True, "rms_norm_eps": 1e-3}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e3}}
    build("llama", options | rope, torch.float32).save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    return folder


def train(out: Path | None, base: Path | None, model: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    often = {"validate_every": 1, "log_every": 1, "validation_batches": 1, "test_batches": 1}
    given = {"name": "hypernet", "code_dim": 8, **({"base": str(base)} if base else {}), **(model or {})}
    return zoo.train(given, options.pop("task", TASK), OPTIM, QUIET, **{**often, **options, "out": out and str(out)})


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("on-base") / "run"
    train(folder, base)
    return folder


def other(base: Path, folder: Path, change: float = 1.0, *dtypes: torch.dtype) -> Path:
    """The same base at another place, in one file of another name; one of its numbers changed, all of them rounded."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    for dtype in dtypes:
        model.to(dtype)
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] *= change
    model.save_pretrained(folder)
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    shutil.copy(base / "tokenizer.json", folder)
    return folder


def outputs(model: Any) -> torch.Tensor:
    batch = model.task.batch("test", 0, 4)
    with torch.no_grad():
        return model(batch.tokens, batch.n_context)


@torch.no_grad()
def test_a_new_hypernetwork_answers_as_its_base_does(base: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    asked = vars(of_run({"model": {"name": "hypernet", "base": str(base)}, "task": TASK})[0])
    model = validate.build({name: asked[name] for name in validate.OPTIONS}, base).eval()
    theirs, library = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    text, context = "the box, naïve → 42", "the oxen the box"
    ours, before = model.task.encode(text), model.task.encode_context(context)
    ids = library.convert_tokens_to_ids
    there = [1, *ids(library.tokenize(text))]
    assert len(ours) == len(there)
    names = [token.decode("latin-1").translate(SIGNS) for token in model.task.tokenizer.spelled]
    rows = torch.tensor([ids(name) if ids(name) else 1 for name in names])  # START and bytes it lacks: the first token
    assert rows[256] == rows[0xFF] == 1
    goal = theirs(torch.tensor([there])).logits[..., rows]
    assert relative(model(torch.tensor([ours])), goal) <= 1e-5
    assert relative(model(torch.tensor([before + ours]), len(before))[:, len(before) :], goal) <= 1e-5  # ΔW = 0
    assert relative(model(torch.tensor([ours])), goal.roll(1, -1)) > 1e-2
    whole, first = pretrained.read(base), pretrained.read(base, 2)
    assert whole.weights.keys() - first.weights.keys() == {name for name in whole.weights if "blocks.2." in name}
    theirs.model.layers = theirs.model.layers[:2]
    found = pretrained.import_llama(base, 2)(torch.tensor([there]))[0]
    assert relative(found, theirs(torch.tensor([there]), use_cache=False).logits) <= 1e-5


def test_a_checkpoint_names_the_base_and_does_not_hold_it(base: Path, run: Path) -> None:
    state, wanted = saved(run)["state_dict"], pretrained.read(base)
    assert {name.partition("context_to_delta")[0] for name in state} == {"decoder."}
    heads = [weight for name, weight in state.items() if name.endswith("_u.weight")]
    assert all(head.abs().sum() > 0 for head in heads)  # which begin at zero
    content = (run / "checkpoints/last.ckpt").read_bytes()
    assert wanted.sha256.encode() in content
    options = saved(run)["hyper_parameters"]
    assert options["model"]["base"] == wanted.sha256
    assert {name: options["model"][name] for name in wanted.sizes} == wanted.sizes
    assert (options["task"]["tokenizer"], options["task"]["vocabulary"]) == ("base", 262)


@torch.no_grad()
def test_the_law_holds_on_it(base: Path, run: Path) -> None:
    model = zoo.load(run, base=base).double()
    batch = model.task.batch("test", 0, 3)
    tokens, n = batch.tokens, batch.n_context
    goal = model(tokens, n)[:, n:]
    layout = model.decoder.layout(tokens.shape[1], n, real=model.decoder.real(tokens))
    kept = torch.arange(tokens.shape[1]) >= n
    assert relative(plain_forward(model, tokens[:, n:], model.deltas(tokens, n), layout.keep(kept)), goal) <= 1e-12
    assert relative(model(tokens[:, n:]), goal) > 1e-2


def test_an_equal_base_elsewhere_and_another_one(base: Path, run: Path, tmp_path: Path) -> None:
    equal, changed = other(base, tmp_path / "equal"), other(base, tmp_path / "changed", 1.001)
    assert torch.equal(outputs(zoo.load(run, base=base)), outputs(zoo.load(run, base=equal)))
    hashes = [pretrained.read(folder).sha256 for folder in (base, changed)]
    said = one_line(lambda: zoo.load(run, base=changed))
    assert all(sha in said for sha in hashes)
    assert hashes[0] in one_line(lambda: zoo.load(run))
    file = equal / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rms_norm_eps": 2e-3}))
    assert hashes[0] in one_line(lambda: zoo.load(run, base=equal))
    half = other(base, tmp_path / "half", 1.0, torch.bfloat16)
    wide = other(base, tmp_path / "wide", 1.0, torch.bfloat16, torch.float32)
    assert pretrained.read(half).sha256 == pretrained.read(wide).sha256 != hashes[0]


def test_a_run_goes_on_with_its_base(base: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signalled(monkeypatch, 1)
    with pytest.raises(Interrupted):
        train(tmp_path / "cut", base)
    again: Any = {"resume": tmp_path / "cut", "trainer": QUIET}
    assert "model.base=DIR" in one_line(lambda: zoo.train(**again))
    changed = other(base, tmp_path / "changed", 2.0)
    said = one_line(lambda: zoo.train(model={"base": str(changed)}, **again))
    assert all(pretrained.read(folder).sha256 in said for folder in (base, changed))
    zoo.train(model={"base": str(other(base, tmp_path / "equal"))}, **again)
    same_weights(run, tmp_path / "cut")


@pytest.mark.parametrize("family", FAMILIES)
def test_families_on_a_base(family: str, base: Path, tmp_path: Path) -> None:
    options = {"name": family, **FAMILIES[family], "base": str(base), "layers": 2}
    short: Any = {"out": str(tmp_path / "run"), "validation_batches": 1, "test_batches": 1}
    seen = Seen()
    trainer = {**QUIET, "callbacks": [seen]}
    metrics = zoo.train(options, TASK, OPTIM, trainer, shuffle_context=family == "hypernet", **short)
    assert metrics["params"]["context_to_delta"]
    assert all(torch.equal(seen.after[name], weight) for name, weight in pretrained.read(base, 2).weights.items())
    assert any(not torch.equal(weight, seen.before[name]) for name, weight in seen.after.items())
    model = zoo.load(tmp_path / "run", base=base)
    assert len(model.decoder.blocks) == 2
    assert torch.isfinite(outputs(model)).all()


NUMBERS = [
    ({"dim": 64}, {}, {}, "model.dim=64, but model.base=BASE has 32"),
    ({"theta": 1e4}, {}, {}, "model.theta=10000.0, but model.base=BASE has 5000.0"),
    ({"layers": 4}, {}, {}, "model.layers=4 must be 1 to 3"),
    ({"name": "moe"}, {}, {}, "model=moe adds nothing to it"),
    ({"name": "transformer"}, {}, {}, "model=transformer adds nothing to it"),
    ({}, {"tokenizer": "bytes"}, {}, "task.tokenizer='bytes' of 257 ids is not that of model.base=BASE, of 262"),
    ({}, {"vocabulary": 300}, {}, "task.vocabulary=300, but model.base=BASE has 262"),
    ({}, {}, {"task": "regression"}, "not task.name=regression"),
    ({}, {}, {"budget": "flops"}, "budget=null"),
    ({"base": "nowhere"}, {}, {}, "nowhere: no config.json"),
    ({"base": 5}, {}, {}, "5: no config.json"),
]


@pytest.mark.parametrize(("model", "task", "options", "words"), NUMBERS, ids=[row[3] for row in NUMBERS])
def test_what_differs_from_the_base_is_named(
    model: dict[str, Any], task: dict[str, Any], options: dict[str, Any], words: str, base: Path, tmp_path: Path
) -> None:
    given: Any = {"model": {"name": "hypernet", "base": str(base), **model}, "task": TASK | task, **options}
    said = one_line(lambda: zoo.train(**given, out=str(tmp_path / "run")))
    assert words.replace("BASE", str(base)) in said
    assert not (tmp_path / "run").exists()


def test_the_tokenizer_of_the_base(base: Path, tmp_path: Path) -> None:
    folder = other(base, tmp_path / "base")
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    for change, words in (
        ({"<|end|>": 2, "the": 900}, "has ids up to 900, the model has 260"),
        ({"<|end|>": 2, "the": 7.0}, "has no id for 'the'"),
        ({"thx": content["model"]["vocab"].pop("the")}, "has no id for 'the'"),
    ):
        model = content["model"] | {"vocab": content["model"]["vocab"] | change}
        file.write_text(json.dumps(content | {"model": model}))
        assert words in one_line(lambda: pretrained.read(folder))
    file.unlink()
    (folder / "config.json").write_text("{}")
    assert f"{folder} cannot be read: KeyError: 'hidden_size'" in one_line(lambda: pretrained.read(folder))
    config = json.loads((base / "config.json").read_text()) | {"num_hidden_layers": 10**9}
    (folder / "config.json").write_text(json.dumps(config))
    assert "names 1000000000 layers, and the files hold 29 weights" in one_line(lambda: pretrained.read(folder))
    shutil.copy(base / "config.json", folder)
    assert "give a tokenizer.json" in one_line(lambda: pretrained.read(folder))
    task = TASK | {"tokenizer": "base"}
    assert "give a tokenizer.json, or model.base" in one_line(lambda: train(tmp_path / "run", None, task=task))
    named: Any = {"model": {"name": "hypernet", "base": str(base)}}
    named["task"] = TASK | {"tokenizer": str(base / "tokenizer.json")}  # its own
    assert of_run(named)[0].task["tokenizer"] == "base"


def test_commands_want_the_base(base: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "context.txt").write_text("the red box")
    out = str(tmp_path / "p.safetensors")
    ask = [
        (generate.main, [str(run), "the", "--context", "the box", "--count", "3"]),
        (evaluate.main, [str(run), "--name", "again", "test_batches=1"]),
        (analyze.main, ["patch", str(run), "--context", str(tmp_path / "context.txt"), "--out", out, "--samples", "2"]),
        (analyze.main, ["apply", str(run), "--patch", out, "--query", str(tmp_path / "context.txt")]),
        (analyze.main, ["report", str(run), "--out", str(tmp_path / "report")]),
    ]
    for main, words in ask:
        assert main(words) == 2
        assert "--base DIR" in capsys.readouterr().err
        assert main([*words, "--base", str(base)]) == 0, words
    assert compare([str(run), "--out", str(tmp_path / "compared")]) == 0  # reads no weights


def test_the_command_line(base: Path, tmp_path: Path, command: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Sizes and tokenizer of conf/ are nobody's wish; where the base lies is not kept."""
    words = ["model=hypernet", "model.code_dim=8", f"model.base={base}", "task=prompts", f"task.files=[{ROWS}]"]
    words += ["task.context=12", "optim.steps=2", "optim.batch_size=4", "validation_batches=1", "test_batches=1"]
    words += [f"out={tmp_path / 'run'}", "trainer.accelerator=cpu"]
    monkeypatch.setattr(sys, "orig_argv", ["python", "train.py", *words])
    done = command(*words)
    assert done.code == 0, done.err
    assert "W0 is pretrained, SHA256" in done.out
    assert ", base=DIR)" in done.out
    assert "base=DIR" in (tmp_path / "run/card.md").read_text()
    for file in (tmp_path / "run/checkpoints/last.ckpt", tmp_path / "run/metrics.json"):
        assert str(base).encode() not in file.read_bytes()
    done = command(*words, "model.dim=64")
    assert done.code == 2
    assert "model.dim=64, but model.base=" in done.err


def test_a_strange_checkpoint(base: Path, run: Path, tmp_path: Path) -> None:
    for name, value in (("layers", 2000), ("eps", 0.5)):
        content = saved(run)
        content["hyper_parameters"]["model"][name] = value
        torch.save(content, tmp_path / "strange.ckpt")
        said = one_line(lambda: zoo.load(tmp_path / "strange.ckpt", base=base))
        assert ("layers=2000" in said) == (name == "layers")
    content = saved(run)
    for name in ("theta", "eps", "base"):
        del content["hyper_parameters"]["model"][name]  # its own weights alone are no model
    torch.save(content, tmp_path / "strange.ckpt")
    said = one_line(lambda: zoo.load(tmp_path / "strange.ckpt", base=base))
    assert "model.layers=3 is more than its 10 weights" in said
