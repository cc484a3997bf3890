"""Tokenizers of files: the library's own cuts, exact round trips, runs that carry them, and foreign files refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import models, pre_tokenizers, trainers

import zoo
from runs import one_line
from test_prompts import record, write
from test_resume_data import SENTENCES, begun, here, run, stories  # noqa: F401
from test_text import bits_one_by_one, sentences, text, written  # noqa: F401
from test_tokenizer import PROSE, TEXTS
from zoo.core.layers import FILLING
from zoo.tasks import TASKS, Batch
from zoo.tasks.base import IGNORE
from zoo.tasks.text import tokenizer
from zoo.tasks.text.corpus import START
from zoo.tasks.text.ngram import Trigram
from zoo.tasks.text.tokenizer import SIGNS, Tokenizer, read

CASES = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
BYTE_LEVEL: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
SPLIT = {"type": "Split", "pattern": {"Regex": CASES}, "behavior": "Isolated", "invert": False}
LLAMA = {"type": "Sequence", "pretokenizers": [SPLIT, {**BYTE_LEVEL, "use_regex": False}]}
SLOW = {**SPLIT, "pattern": {"Regex": "(a+)+$"}}  # the library gives up, and panics
LETTERS = [chr(SIGNS.get(byte, byte)) for byte in range(256)]


def trained(path: Path, texts: list[str], words: dict[str, Any] = BYTE_LEVEL, **model: Any) -> tokenizers.Tokenizer:
    """Writes a file as the library does, and gives its own reader of it."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<|endoftext|>"]
    made.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=LETTERS, show_progress=False),
    )
    content = json.loads(made.to_str())
    content["model"] |= model
    path.write_text(json.dumps({**content, "pre_tokenizer": words}))
    return tokenizers.Tokenizer.from_file(str(path))


@pytest.fixture(params=["gpt2", "llama"])
def pair(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[tokenizers.Tokenizer, Tokenizer]:
    """The library's reader of a file, and ours."""
    changes = {"gpt2": {}, "llama": {"words": LLAMA, "ignore_merges": True}}[request.param]
    texts = [document.decode() for _, document in sentences(0)] + [PROSE[:150].decode()] * 3
    return trained(tmp_path / "t.json", texts, **changes), read(str(tmp_path / "t.json"))


def ids_of(made: Tokenizer, text: bytes) -> list[int]:
    return np.concatenate([*made.encode([text])]).tolist()


def test_text_is_cut_as_the_library_cuts_it(pair: tuple[tokenizers.Tokenizer, Tokenizer]) -> None:
    library, ours = pair
    assert len(ours.spelled) == library.get_vocab_size() == 400  # the end of texts is the start of documents
    for prose in [
        *(document.decode() for _, document in sentences(0)),
        PROSE[:150].decode(),
        "It's  1234 don't\r\n\n x",
    ]:
        expected = [bytes(LETTERS.index(sign) for sign in token) for token in library.encode(prose).tokens]
        ids = ids_of(ours, prose.encode())
        assert [ours.spelled[i] for i in ids] == [b"", *expected]
        assert len(ids) <= len(prose.encode())


@pytest.mark.parametrize(("whole", "expected"), [(True, ["abc"]), (False, ["a", "bc"])])
def test_a_word_that_is_a_token_stays_one_where_the_file_says_so(
    tmp_path: Path, whole: bool, expected: list[str]
) -> None:
    vocab = {sign: k for k, sign in enumerate([*LETTERS, "bc", "ab", "abc"])}
    model = {"type": "BPE", "vocab": vocab, "merges": ["b c", "a b", "ab c"], "ignore_merges": whole}
    (tmp_path / "t.json").write_text(json.dumps({"added_tokens": [], "pre_tokenizer": BYTE_LEVEL, "model": model}))
    assert tokenizers.Tokenizer.from_file(str(tmp_path / "t.json")).encode("abc").tokens == expected
    ours = read(str(tmp_path / "t.json"))
    assert [ours.spelled[i].decode() for i in ids_of(ours, b"abc")[1:]] == expected


def test_any_bytes_come_back(pair: tuple[tokenizers.Tokenizer, Tokenizer]) -> None:
    ours = pair[1]
    draw = np.random.default_rng(0)
    texts = [*TEXTS, draw.bytes(5000), "é日".encode()[:-1], b"\xed\xa0\x80\xff", b"<|endoftext|>\x00", b"a" * 40_000]
    assert [ours.decode(ids_of(ours, text)) for text in texts] == texts
    assert all(ids_of(ours, text).count(START) == 1 for text in texts)
    assert Tokenizer(**json.loads(ours.content)).content == ours.content


@pytest.mark.parametrize(
    "words",
    [
        {**BYTE_LEVEL, "add_prefix_space": True},
        {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, BYTE_LEVEL]},
        {"type": "Whitespace"},
    ],
)
def test_words_that_lose_or_add_text_are_refused(tmp_path: Path, words: dict[str, Any]) -> None:
    trained(tmp_path / "t.json", SENTENCES, words)
    made = read(str(tmp_path / "t.json"))
    assert "task.tokenizer loses or adds text: it does not spell b'two words'" in one_line(
        lambda: ids_of(made, b"two words")
    )


def test_ids_beyond_sixteen_bits(cache: Path, tmp_path: Path) -> None:
    made = Tokenizer([[a, b] for a in range(256) for b in range(256)])
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xff\xfe " * 500)
    task: Any = TASKS["text"]({"name": "text", "tokens": 4, "files": [str(file)]}, 0)
    stored = tokenizer.encoded(*task.folders.values(), made)["train"]
    assert made.decode(stored) == b"\xff\xfe " * 450
    assert max(stored) == made.spelled.index(b"\xff\xfe") == 257 + 255 * 256 + 254 > 1 << 16


# bits


def test_bits_are_those_of_bytes(written: None, tmp_path: Path) -> None:  # noqa: F811
    trained(tmp_path / "t.json", [document.decode() for _, document in sentences(0)])
    made = text(tokenizer=str(tmp_path / "t.json"), tokens=70)
    assert (made.vocabulary, made.config.vocabulary) == (400, 400)
    batch = made.batch("train", 1, 30)
    assert (batch.targets == START).any()
    output = np.random.default_rng(0).normal(size=(30, 70, 400)).astype(np.float32)
    values = made.evaluate(lambda tokens, n: torch.from_numpy(output), batch)
    model, counted = bits_one_by_one(made, torch.from_numpy(output), batch)
    assert values["bits_per_byte"].tolist() == pytest.approx(model, rel=1e-5)
    assert values["bits_per_byte_trigram"].tolist() == pytest.approx(counted, rel=1e-5)
    assert all(np.array_equal(a, b) for a, b in zip(made.trigram.counts, text().trigram.counts, strict=True))


# prompts


def parts_of(task: Any, batch: Batch, row: int) -> tuple[bytes, bytes, bytes]:
    """Context, query and target of a sequence as text."""
    n, tokens, targets = batch.n_context, batch.tokens[row].tolist(), batch.targets[row].tolist()
    scored = [place for place, target in enumerate(targets) if target != IGNORE]
    context = [token for token in tokens[:n] if token != FILLING]
    query, target = tokens[n + 1 : n + 1 + scored[0]], [targets[place] for place in scored]
    return task.decode(context), task.decode(query), task.decode(target)


def test_prompts_of_files_in_tokens(cache: Path, tmp_path: Path) -> None:
    trained(tmp_path / "t.json", SENTENCES)
    rows = [record(SENTENCES[k], f"and {k}?", SENTENCES[k][9:30]) for k in range(60)]
    options = {"name": "prompts", "context": 40, "query": 8, "target": 30, "files": [write(tmp_path / "a.jsonl", rows)]}
    task: Any = TASKS["prompts"]({**options, "tokenizer": str(tmp_path / "t.json")}, 0)
    found: Counter[tuple[bytes, ...]] = Counter()
    for split in ("train", "validation", "test"):
        batch = task.batch(split, 0, task.sizes(split)[0])
        found.update(parts_of(task, batch, row) for row in range(len(batch.tokens)))
    assert found == Counter(tuple(part.encode() for part in row.values()) for row in rows)
    assert (batch.tokens[:, : task.n_context] == FILLING).sum(1).min() > 10  # tokens are fewer than bytes
    batch = task.batch("train", 0, task.sizes("train")[0])
    expected = Trigram(
        np.array([START, *b"".join(parts_of(task, batch, row))], np.uint16) for row in range(len(batch.tokens))
    )
    assert all(np.array_equal(a, b) for a, b in zip(task.trigram.counts, expected.counts, strict=True))
    said = one_line(lambda: TASKS["prompts"]({**options, "tokenizer": "bpe"}, 0))
    assert said.startswith("task.tokenizer=bpe is learned from task.domains: take bytes, or a file")


@pytest.mark.parametrize("kind", ["bpe", "file"])
def test_prompts_of_documents_in_tokens(written: None, tmp_path: Path, kind: str) -> None:  # noqa: F811
    trained(tmp_path / "t.json", [document.decode() for _, document in sentences(0)])
    choice = str(tmp_path / "t.json") if kind == "file" else kind
    sizes = {"context": 20, "query": 5, "target": 9}
    task: Any = TASKS["prompts"]({"name": "prompts", **sizes, "tokenizer": choice, "vocabulary": 400}, 0)
    batch = task.batch("train", 0, 40)
    documents = [document for k in range(4) for _, document in sentences(k)]
    for row in range(40):
        joined = b"".join(parts_of(task, batch, row))
        assert len(joined) > 34  # the tokens of a row
        assert any(joined in document for document in documents)
    bytewise = TASKS["prompts"]({"name": "prompts", **sizes}, 0)
    for a, b in zip(task.trigram.counts, bytewise.trigram.counts, strict=True):  # type: ignore[attr-defined]
        assert np.array_equal(a, b)


# runs


def test_a_run_carries_its_tokenizer(here: Path, cache: Path) -> None:  # noqa: F811
    trained(here / "t.json", SENTENCES)
    task: dict[str, Any] = {"name": "text", "tokens": 16, "files": [str(stories(Path("a.jsonl")))]}
    folder = begun({**task, "tokenizer": "t.json"})
    sentence = "Sentence 3 has ☂ words.\n"
    expected = zoo.load(folder).task.encode(sentence)
    digest = hashlib.sha256(zoo.load(folder).task.tokenizer.content.encode()).hexdigest()
    run(resume=folder)
    (here / "t.json").rename("moved.json")
    run(resume=folder)  # with what the checkpoint holds
    metrics = run(resume=folder, task={**task, "tokenizer": "moved.json"})
    assert (metrics["config"]["task"]["tokenizer"], metrics["tokenizer"]) == (str(here / "moved.json"), digest)
    trained(here / "other.json", ["nothing but this " * 9])
    for wrong, what in (
        ("other.json", "is another one than the checkpoint"),
        ("bytes", "'bytes' asked"),
        ("absent.json", "give a tokenizer.json"),
    ):
        assert what in one_line(lambda wrong=wrong: run(resume=folder, task={**task, "tokenizer": wrong}))
    shutil.copy("other.json", "t.json")
    assert "t.json is another one than the checkpoint was trained with" in one_line(lambda: run(resume=folder))
    for gone in (*here.glob("*.json*"), *cache.rglob("*.*")):
        os.remove(gone)
    loaded = zoo.load(folder)
    assert loaded.task.encode(sentence) == expected
    assert loaded.task.decode(expected).decode() == sentence
    assert len(expected) < 0.6 * len(sentence)


def test_a_model_is_built_without_its_file(tmp_path: Path, cache: Path) -> None:
    options = {"name": "text", "tokenizer": str(tmp_path / "t.json"), "vocabulary": 512, "domains": ["code"]}
    assert TASKS["text"](options, 0).vocabulary == 512
    assert "t.json: this is no file of" in one_line(lambda: TASKS["text"]({**options, "vocabulary": None}, 0))
    trained(tmp_path / "t.json", SENTENCES)
    task = TASKS["text"]({**options, "vocabulary": 399}, 0)
    assert one_line(lambda: task.encode("a")) == "a tokenizer of 400 ids exceeds task.vocabulary=399"
    assert "task.tokenizer 'bpee' does not exist; did you mean bpe?" in one_line(
        lambda: TASKS["text"]({"name": "text", "tokenizer": "bpee"}, 0)
    )


# foreign files

GOOD = {"pre_tokenizer": BYTE_LEVEL, "model": {"type": "BPE", "merges": ["a b", ["ab", "c"]]}}


def with_model(**changes: Any) -> bytes:
    return json.dumps({**GOOD, "model": {**GOOD["model"], **changes}}).encode()


def test_both_ways_to_write_merges_are_read(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps(GOOD))
    assert read(str(tmp_path / "t.json")).spelled[START:] == [b"", b"ab", b"abc"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Expecting value"),
        (b"\x80\x02}", "t.json"),
        (b"[" * 100_000, "RecursionError"),
        (b"[]", "its tokens do not spell bytes, TypeError"),
        (b'{"model": {"type": "WordPiece", "vocab": {"a": 0}}}', "do not spell bytes, KeyError('merges')"),
        (b'{"model": {"type": "Unigram", "vocab": [["a", 0.1]]}}', "do not spell bytes, KeyError('merges')"),
        (with_model(merges=["\u2581 a"]), "do not spell bytes"),
        (with_model(merges=["a b</w>"]), "KeyError('b</w>'): give one of byte-level BPE, as of GPT-2, Llama 3, Qwen"),
        (with_model(merges=["a b c"]), "do not spell bytes"),
        (with_model(merges=[7]), "do not spell bytes"),
    ],
)
def test_foreign_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "t.json").write_bytes(content)
    said = one_line(lambda: read(str(tmp_path / "t.json")))
    assert said.startswith(f"task.tokenizer={tmp_path}/t.json")
    assert message in said


def test_only_files_of_a_bounded_size_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    with (tmp_path / "huge.json").open("wb") as file:
        file.truncate(tokenizer.LARGEST + 1)
    for name in ("huge.json", "pipe.json", "absent.json", ""):
        said = one_line(lambda name=name: read(str(tmp_path / name)))
        assert "this is no file of 67,108,864 bytes at most: give a tokenizer.json" in said


@pytest.mark.parametrize(
    "words", [None, {}, [1], "x", {"type": "Nothing"}, *({**SPLIT, "pattern": x} for x in (3, {"Regex": "("})), SLOW]
)
def test_words_that_the_library_refuses(tmp_path: Path, words: Any) -> None:
    (tmp_path / "t.json").write_text(json.dumps({**GOOD, "pre_tokenizer": words}))
    assert one_line(lambda: ids_of(read(str(tmp_path / "t.json")), b"a" * 3000 + b"!")).startswith("task.tokenizer")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "a tokenizer of a file: Expecting value"),
        ({"tokenizer": [[97, 98]]}, "a tokenizer of a file cannot be read: TypeError"),
        (
            {"tokenizer": '{"merges": [[97, 300]]}'},
            "a tokenizer of a file: merge 0 of a tokenizer must be two earlier ids",
        ),
        ({"tokenizer": '{"code": 1}'}, "a tokenizer of a file cannot be read: TypeError"),
        ({"tokenizer": '{"merges": []}', "merges": []}, "task.name=text has no state merges"),
    ],
)
def test_foreign_states_are_refused(state: Any, message: str) -> None:
    task = TASKS["text"]({"name": "text", "tokenizer": "t.json", "vocabulary": 300}, 0)
    said: Callable[[], Any] = lambda: task.load_state_dict(state)  # noqa: E731
    assert one_line(said).startswith(message)
