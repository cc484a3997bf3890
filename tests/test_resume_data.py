"""A run goes on with the text it was begun with, wherever that lies now, or not at all."""

from __future__ import annotations

import json
import platform
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from runs import OFTEN, QUIET
from zoo.tasks import TASKS
from zoo.tasks.text import corpus
from zoo.tasks.text.domains import DOMAINS

SENTENCES = [f"Sentence {k} has no more than a few words, and one is {k * k}.\n" for k in range(60)]


def stories(path: Path, rows: list[str] = SENTENCES) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps({"text": r, "context": r, "query": "?", "target": r[9:11]}) + "\n" for r in rows)
    )
    return path


TEXT = {"name": "text", "tokens": 16}
PAIRS = {**TEXT, "tokenizer": "bpe", "vocabulary": 270}
PROMPTS = {"name": "prompts", "context": 32, "query": 4, "target": 4}


def run(**options: Any) -> dict[str, Any]:
    return zoo.train(trainer=QUIET, **options)


def begun(task: dict[str, Any]) -> str:
    """A run in the folder `run`."""
    model = {"name": "transformer", "dim": 8, "layers": 1, "heads": 1, "hidden": 8}
    run(model=model, task=task, optim={"steps": 2, "batch_size": 2, "warmup": 0}, out="run", **OFTEN)
    return str(Path("run").absolute())


@pytest.fixture(autouse=True)
def here(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


CHANGED = "the checkpoint was trained on other text than is found now for task.files: "


@pytest.mark.filterwarnings("ignore:the checkpoint was trained on other text")
@pytest.mark.parametrize("task", [PAIRS, pytest.param(PROMPTS, marks=pytest.mark.slow)], ids=["text", "prompts"])
def test_a_grown_glob_is_noticed_and_the_kept_text_goes_on(task: dict[str, Any], cache: Path) -> None:
    stories(Path("data/a.jsonl"))
    folder = begun({**task, "files": ["data/*.jsonl"]})
    stories(Path("data/b.jsonl"), [row.upper() for row in SENTENCES])
    run(resume=folder)  # with what is kept in the cache
    shutil.rmtree(cache)
    with pytest.raises(ValueError, match=rf"^{CHANGED}\S*data/\*\.jsonl; bring that text back"):
        run(resume=folder)
    Path("data/b.jsonl").unlink()
    run(resume=folder)


@pytest.mark.filterwarnings("ignore:the checkpoint was trained on other text")
@pytest.mark.parametrize("task", [TEXT, pytest.param(PROMPTS, marks=pytest.mark.slow)], ids=["text", "prompts"])
def test_a_moved_run_takes_the_same_text_at_another_place(
    task: dict[str, Any], here: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = begun({**task, "files": [str(stories(Path("a.jsonl")))]})
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    run(resume=folder)  # paths are absolute
    Path("../a.jsonl").rename("halves.jsonl")
    stories(Path("part/1.jsonl"), SENTENCES[30:])
    stories(Path("part/2.jsonl"), SENTENCES[:30])
    run(resume=folder)  # from the cache
    stories(Path("a.jsonl"), SENTENCES[1:])
    with pytest.raises(ValueError, match=f"^{CHANGED}.*a.jsonl; bring that text back"):
        run(resume=folder, task={**task, "files": ["a.jsonl"]})  # though the cache holds the text
    shutil.rmtree(cache)
    with pytest.raises(ValueError, match=r"a\.jsonl' matches no file .*; bring that text back, .*ZOO_CACHE"):
        run(resume=folder)
    metrics = run(resume=folder, task={**task, "files": ["part/*.jsonl"]})
    assert metrics["config"]["task"]["files"] == [str(here / "elsewhere/part/*.jsonl")]
    Path("part").rename("moved")
    metrics = run(resume=folder, task={**task, "files": ["moved/*.jsonl"]})
    assert Path(metrics["checkpoint"]).name == "best.ckpt"  # that of this run, though its text lay elsewhere
    with pytest.raises(ValueError, match=r"task\.hub"):
        run(resume=folder, task={**task, "name": "text", "hub": "data"})


@pytest.mark.filterwarnings("ignore:the checkpoint was trained on other text")
def test_the_text_of_another_python_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = [(f"{k}.py", row.encode()) for k, row in enumerate(SENTENCES)]
    monkeypatch.setitem(DOMAINS, "code", lambda: iter(modules))
    folder = begun({**TEXT, "domains": ["code"]})
    modules.append(("new.py", b"import this"))
    monkeypatch.setattr(platform, "python_version", lambda: "3.99.1")
    run(resume=folder)
    shutil.rmtree(cache)
    with pytest.raises(ValueError, match=r"than is found now for code \(Python 3\.99\.1 in .*\); bring that text back"):
        run(resume=folder)


@pytest.mark.parametrize("state", ["x", [3], ["../" * 21 + "x"], {"a": 1}, ["a" * 63 + "\n"]])
def test_a_corpus_of_a_checkpoint_is_a_list_of_hashes(state: Any) -> None:
    with pytest.raises(ValueError, match="the corpus of this task is a list of hashes of "):
        TASKS["text"](TEXT, 0).load_state_dict({"corpus": state})


def test_a_folder_of_another_kind_is_no_corpus(cache: Path) -> None:
    """The digest of what was encoded, of a tokenizer or of rows, twice the own one, and ever so many."""
    here = {"files": [str(stories(Path("a.jsonl")))]}
    made = {kind: TASKS[task["name"]](task | here, 0) for kind, task in (("bpe", PAIRS), ("rows", PROMPTS))}
    for task in made.values():
        task.prepare()
    digests = {folder.name.partition("-")[0]: corpus.digest(folder) for folder in cache.iterdir()}
    assert set(digests) == {"files", "bpe", "ids", "prompts"}
    expected = TASKS["text"](TEXT | here, 0).batch("train", 0, 2)
    for kind in ("bpe", "ids", "prompts"):
        task = TASKS["text"](TEXT | here, 0)
        task.load_state_dict({"corpus": [digests[kind]]})
        with pytest.warns(match="the checkpoint was trained on other text"):
            assert torch.equal(task.batch("train", 0, 2).tokens, expected.tokens)
    for several in ([digests["files"]] * 2, [digests["files"]] * 10**5):
        with pytest.raises(ValueError, match="is a list of hashes of"):
            TASKS["text"](TEXT | here, 0).load_state_dict({"corpus": several})


def test_a_model_needs_no_text_and_an_older_checkpoint_no_digest(cache: Path) -> None:
    folder = begun({**TEXT, "files": [str(stories(Path("a.jsonl")))]})
    last = Path(folder, "checkpoints/last.ckpt")
    content = torch.load(last, weights_only=True)
    assert zoo.load(folder).task.state_dict() == content["task"]
    content["task"] = {}
    torch.save(content, last)
    shutil.rmtree(cache)
    run(resume=folder)
    Path("a.jsonl").unlink()
    shutil.rmtree(cache)
    assert list(zoo.load(folder).task.state_dict()) == ["corpus"]
    assert not cache.exists()
