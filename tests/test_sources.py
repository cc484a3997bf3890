"""Local files and hub sets: what becomes a document, which split it goes to, and what cannot be read."""

from __future__ import annotations

import csv
import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
import torch

from runs import one_line
from zoo.tasks.text import corpus, sources
from zoo.tasks.text.corpus import texts
from zoo.tasks.text.language import Text

ROOT = Path(__file__).parents[1]
SPLITS = ("train", "validation", "test")
STORIES = ["2020-01-01", "12", *(f"Story {k}.\nSecond “line” of {k}.\n" + "x" * k for k in range(98))]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, empty; neither prepared text nor a cache of `datasets` is there."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def write(path: str, rows: list[Any], column: str = "text") -> str:
    """A table of the kind that its name says, with the columns `number` and `column`."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    table = [{"number": k, column: row} for k, row in enumerate(rows)]
    lines = "".join(json.dumps(row) + "\n" for row in table)
    if path.endswith(".parquet"):
        datasets.Dataset.from_list(table).to_parquet(path)
    elif path.endswith(".csv"):
        with Path(path).open("w", encoding="utf-8-sig", newline="") as file:
            csv.writer(file).writerows([["number", column], *enumerate(rows)])
    else:
        text = json.dumps(table) if path.endswith(".json") else lines
        Path(path).write_bytes(gzip.compress(text.encode()) if path.endswith(".gz") else text.encode())
    return path


def made(**options: Any) -> Text:
    return Text({"tokens": 16, **options}, 0)


def found(**options: Any) -> dict[str, list[str]]:
    """The documents of each split."""
    (splits,) = map(corpus.read, made(**options).folders.values())
    return {split: [text.decode() for text in texts(splits[split])] for split in SPLITS}


def everything(splits: dict[str, list[str]]) -> list[str]:
    return sorted(text for documents in splits.values() for text in documents)


# files


@pytest.mark.parametrize("name", ["a.jsonl", "A.JSONL", "a.json", "a.parquet", "a.csv", "a.jsonl.gz"])
@pytest.mark.parametrize("column", ["text", "content"])
def test_a_row_is_a_document(name: str, column: str) -> None:
    path = write(name, [*STORIES, None, ""], column)
    splits = found(files=[path], **({} if column == "text" else {"column": column}))
    assert everything(splits) == sorted(STORIES)  # rows without text are none
    size = sum(len(text.encode()) + 1 for text in STORIES)
    for split in ("validation", "test"):
        assert 0.05 <= sum(len(text.encode()) + 1 for text in splits[split]) / size < 0.08
    with pytest.raises(ValueError, match=f"{name}: has no column body: choose one of number, {column} with"):
        found(files=[path], column="body")


def test_a_field_may_be_as_long_as_a_book() -> None:
    assert sum(map(len, everything(found(files=[write("a.csv", ["x" * 200_000, "y"])])))) == 200_001


def test_a_text_file_is_a_document_byte_for_byte() -> None:
    contents = [b"a\r\n\nb", b"\xff\x00", "é".encode(), b"no newline"]
    for k, content in enumerate(contents):
        Path(f"{k}.txt").write_bytes(content)
    (splits,) = map(corpus.read, made(files=["*.txt"]).folders.values())
    assert sorted(text for ids in splits.values() for text in texts(ids)) == sorted(contents)


def test_globs_reach_into_folders_and_name_each_file_once() -> None:
    for k in range(9):
        write(f"logs/{k % 3}/{k}.jsonl", [STORIES[k]])
    write("odd[1].jsonl", [STORIES[10]])
    write("odd1.jsonl", [STORIES[11]])
    splits = found(files=["logs/**/*.jsonl", "logs/0/*.jsonl", "odd[1].jsonl", str(Path.cwd() / "logs/0/0.jsonl")])
    assert everything(splits) == sorted([*STORIES[:9], STORIES[10]])


def test_a_link_is_read_by_its_own_name_and_once(folder: Path) -> None:
    write("blobs/0a1b", STORIES)
    for name in ("train.jsonl", "again.jsonl"):
        Path(name).symlink_to("blobs/0a1b")
    assert everything(found(files=["train.jsonl", "*.jsonl"])) == sorted(STORIES)


def test_other_columns_of_json_are_nobodys_business() -> None:
    rows: list[dict[str, Any]] = [
        {"text": "2020-01-01", "a": None},
        {"text": "2020-01-01T00:00:00Z", "a": {"b": 1}},
        {"a": "no text"},
        {"text": "a", "new": [[1], "x"]},
        {"text": None},
    ]
    Path("a.jsonl").write_text("\ufeff" + "".join(json.dumps(row) + "\r\n" for row in rows))
    assert everything(found(files=["a.jsonl"])) == ["2020-01-01", "2020-01-01T00:00:00Z", "a"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "'none.txt' matches no file (looked in HERE)"),
        (".", None, "'.' is a folder; name the files in it, such as FOLDER/**/*.txt (looked in HERE)"),
        ("a\0b.txt", None, r"'a\x00b.txt' matches no file"),
        ("~nobody-here/a", None, "'~nobody-here/a': nobody of that name has a home folder here"),
        ("x" * 5000, None, "xxx' matches no file"),
        ("pipe.txt", None, "'pipe.txt' matches no file"),
        ("a.bin", b"", "HERE/a.bin has an unknown extension; known: .json, .jsonl, .csv, .parquet, "),
        ("a.txt", b"", "a.txt holds no text"),
        ("a.txt", b"ab", "a.txt holds no text for validation and test"),
        ("a.jsonl", b'{"text": ""}', "a.jsonl holds no text"),
        ("a.jsonl", b'{"text": 3}', "HERE/a.jsonl: line 1: column text holds int, not text"),
        ("a.jsonl", b'{"text": "a"}\n\x00\xff\x00', "a.jsonl: line 2: 'utf-8' codec can't decode"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}', "a.jsonl: line 2: 'utf-8' codec can't encode"),
        ("a.jsonl", b'{"text": "a"}\n' + b"[" * 100_000, "a.jsonl: line 2 cannot be read: RecursionError"),
        ("a.jsonl", b'\n{"text": "a"', "a.jsonl: line 2: Expecting ',' delimiter"),
        ("a.json", b'[{"text": "a"}, 3]', "a.json: row 2: a row is an object, not int"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-9], "a.jsonl.gz cannot be read: EOFError"),
        ("a.csv", b'text\na\n"a', "a.csv cannot be read: Error: unexpected end of data"),
        ("a.parquet", b"no parquet", "a.parquet: Parquet magic bytes not found"),
    ],
    ids=lambda value: str(value)[:20].replace("\0", "0"),
)
def test_what_is_wrong_with_a_file_is_said_with_its_name(name: str, content: bytes | None, message: str) -> None:
    os.mkfifo("pipe.txt")
    if content is not None:
        Path(name).write_bytes(content)
    error = one_line(lambda: made(files=[name]).prepare())
    assert message.replace("HERE", str(Path.cwd())) in error


def test_what_has_changed_is_read_again() -> None:
    for source, name in (("files", "a.jsonl"), ("hub", "set/data/train-00000-of-00001.parquet")):
        for rows in (STORIES, [text.upper() for text in STORIES]):
            write(name, rows)
            assert everything(found(**{source: "set" if source == "hub" else [name]})) == sorted(rows)


# sets laid out like those of the hub


def hub(path: str = "set", **splits: list[str]) -> str:
    """A folder with a Parquet file per split."""
    for split, rows in splits.items():
        write(f"{path}/data/{split}-00000-of-00001.parquet", rows)
    return path


@pytest.mark.parametrize("documents", [None, 1000])
def test_the_splits_of_a_set_are_its_own(documents: int | None) -> None:
    rows = {"train": STORIES[:80], "validation": STORIES[80:87], "test": STORIES[87:]}
    assert found(hub=hub(**rows), documents=documents) == rows
    # what is streamed leaves no copy
    assert any(Path(datasets.config.HF_DATASETS_CACHE).rglob("*.arrow")) == (documents is None)


@pytest.mark.parametrize(("own", "documents"), [([], None), (["validation"], 1000), (["test"], None)])
def test_a_split_that_is_missing_is_taken_from_train(own: list[str], documents: int | None) -> None:
    repeated = [text for text in STORIES for _ in range(2)]
    splits = found(hub=hub(train=repeated, **{split: ["own"] for split in own}), documents=documents)
    missing = [split for split in ("validation", "test") if split not in own]
    assert all(splits[split] == ["own"] for split in own)
    assert everything({split: splits[split] for split in ("train", *missing)}) == sorted(repeated)
    for split in missing:
        assert 0.05 <= sum(map(len, splits[split])) / sum(map(len, repeated)) < 0.1
        assert not set(splits[split]) & set(splits["train"])


def test_only_the_first_documents_are_read() -> None:
    path = hub(train=STORIES, test=STORIES[90:])
    for shard in range(1, 4):  # reading these would fail
        Path(path, f"data/train-{shard:05}-of-00004.parquet").write_text("no parquet")
    Path(path, "data/train-00000-of-00001.parquet").rename(f"{path}/data/train-00000-of-00004.parquet")
    splits = found(hub=path, documents=40)
    assert everything(splits) == sorted([*STORIES[:40], *STORIES[90:]])
    with pytest.raises(ValueError, match=r"task\.hub=set cannot be read: ArrowInvalid"):
        found(hub=path)


def test_text_files_of_a_set_are_whole() -> None:
    Path("set").mkdir()
    for k, text in enumerate(STORIES):
        Path(f"set/{k}.txt").write_text(text)
    assert everything(found(hub="set")) == sorted(STORIES)  # with their newlines


def test_subsets() -> None:
    write("set/a/x.jsonl", STORIES[:50], "body")
    write("set/b/x.jsonl", STORIES[50:])
    Path("set/README.md").write_text(
        "---\nconfigs:\n- config_name: a\n  data_files: a/*.jsonl\n- config_name: b\n  data_files: b/*.jsonl\n---\n"
    )
    assert everything(found(hub="set", subset="a", column="body")) == sorted(STORIES[:50])
    assert everything(found(hub="set", subset="b")) == sorted(STORIES[50:])
    with pytest.raises(ValueError, match=r"task\.hub=set: .*'c' not found.*'a', 'b'"):
        found(hub="set", subset="c")
    with pytest.raises(ValueError, match=r"task\.hub=set: Config name is missing.*'a', 'b'"):
        found(hub="set")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"column": "body"}, "task.hub=set: has no column body: choose one of number, text with task.column="),
        ({"column": "number"}, "task.hub=set: row 1: column number holds int, not text"),
        ({"hub": "evaluated"}, "task.hub=evaluated: has the splits test, but none named train"),
        ({"hub": "empty"}, "task.hub=empty cannot be read"),
        ({"hub": "none/of/these"}, "task.hub='none/of/these' is neither a folder nor OWNER/NAME"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_sets_that_cannot_be_read_say_why(options: dict[str, Any], message: str) -> None:
    hub(train=STORIES)
    hub("evaluated", test=STORIES)
    Path("empty").mkdir()
    assert message in one_line(lambda: found(**{"hub": "set", **options}))


def test_a_script_in_a_set_is_not_run(folder: Path) -> None:
    Path("set").mkdir()
    for name in ("set/set.py", "set/dataset.py"):
        Path(name).write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    with pytest.raises(ValueError, match=r"task\.hub=set"):
        found(hub="set")
    hub(train=STORIES)
    with pytest.raises(ValueError, match=r"task\.hub=set cannot be read: .*scripts are no longer supported"):
        found(hub="set")
    Path("set/set.py").unlink()
    assert everything(found(hub="set")) == sorted(STORIES)
    assert not Path("ran").exists()


@pytest.mark.parametrize("name", ["set/data/train.pkl", "set/train.pickle"])
def test_a_pickle_in_a_set_is_not_opened(name: str, folder: Path) -> None:
    class Harmful:
        def __reduce__(self) -> Any:
            return open, (str(folder / "ran"), "w")

    import pickle

    Path(name).parent.mkdir(parents=True)
    Path(name).write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(ValueError, match=r"task\.hub=set"):
        found(hub="set")
    assert not Path("ran").exists()


def test_the_second_start_opens_no_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        yield from ()
        raise AssertionError("the set is read again")

    options: list[dict[str, Any]] = [{"files": [write("a.jsonl", STORIES)]}, {"hub": hub(train=STORIES)}]
    before = [made(**each).batch("train", 3, 5) for each in options]
    for name in ("read_files", "read_hub"):
        monkeypatch.setattr(sources, name, refuse)
    for each, batch in zip(options, before, strict=True):
        assert torch.equal(made(**each).batch("train", 3, 5).tokens, batch.tokens)


# the hub itself


def test_offline_fails_at_once_with_advice() -> None:
    begin = time.monotonic()
    with pytest.raises(ValueError, match=r"^task\.hub=owner/name cannot be read: .*; connect once") as error:
        found(hub="owner/name")
    assert time.monotonic() - begin < 5
    assert all(advice in str(error.value) for advice in ("task.files=", "task.hub=FOLDER", "ZOO_CACHE"))
    assert "OfflineModeIsEnabled" in str(error.value)


@pytest.mark.slow
def test_without_network_it_fails_at_once(tmp_path: Path) -> None:
    # a process of its own: HF_HUB_OFFLINE is read at import; nothing listens at port 9
    code = "from zoo.tasks.text.language import Text; Text({'hub': 'owner/name'}, 0).prepare()"
    environment = {
        key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE" and "proxy" not in key.lower()
    }
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert "ValueError: task.hub=owner/name cannot be read: ConnectError" in run.stderr
    assert "; connect once" in run.stderr
    assert "Retrying" not in run.stderr


@pytest.mark.parametrize("revision", [None, "refs/convert/parquet"])
def test_what_is_asked_of_the_hub(revision: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    given = f"owner/name@{revision}" if revision else "owner/name"
    path, load = hub(train=STORIES), datasets.load_dataset_builder

    def local(name: str, subset: str | None, **options: Any) -> Any:
        asked.append((name, subset, options))
        return load(path)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, **o: asked.append((name, o)))
    monkeypatch.setattr(datasets, "load_dataset_builder", local)
    for _ in range(2):  # later starts do not ask
        assert everything(found(hub=given, subset="part")) == sorted(STORIES)
        probe = {"revision": revision, "timeout": sources.TIMEOUT}
        assert asked == [("owner/name", probe), ("owner/name", "part", {"revision": revision})]
