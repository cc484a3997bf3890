"""Splits of documents, and their ids on disk: built once, whole or not at all, by any number of processes."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from zoo.tasks.text import corpus, domains
from zoo.tasks.text.corpus import START, Document, byte_ids, split_documents, texts
from zoo.tasks.text.domains import DOMAINS

SPLITS = ("train", "validation", "test")


def letters(first: int) -> Iterator[Document]:
    """60 documents, each of one letter, 4170 bytes in all."""
    return ((f"part/{k}", bytes([first + k]) * (40 + k)) for k in range(60))


def split(name: str, documents: Iterable[Document]) -> dict[str, np.ndarray]:
    """The ids of each split."""
    found: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    for part, ids in split_documents(name, documents):
        found[part].append(ids)
    return {split: np.concatenate(ids) for split, ids in found.items()}


def domains_are(source: Callable[[int], Iterator[Document]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Domain d is source(d)."""
    for index, domain in enumerate(DOMAINS):
        monkeypatch.setitem(DOMAINS, domain, partial(source, index))
    monkeypatch.setattr(domains, "origin", lambda domain: source.__name__)


def prepare(name: str, origin: str, documents: Callable[[], Iterable[Document]]) -> dict[str, np.ndarray]:
    return corpus.read(corpus.prepare(name, origin, split_documents(name, documents())))


# splits


def test_splits_are_disjoint_documents() -> None:
    splits = split("toy", letters(65))
    found = {name: set(ids.tolist()) - {START} for name, ids in splits.items()}
    assert set.union(*found.values()) == set(range(65, 125))
    assert sum(map(len, found.values())) == 60
    total = sum(map(len, splits.values()))
    assert total == 4170 + 60
    for name, ids in splits.items():
        assert ids.dtype == np.uint16
        assert int((ids == START).sum()) == len(found[name])
        if name != "train":
            assert 0.05 <= len(ids) / total < 0.05 + 100 / total  # one document more at most


def test_splits_do_not_depend_on_the_order_of_documents() -> None:
    forth, back = split("toy", letters(0)), split("toy", reversed(list(letters(0))))
    assert all(np.array_equal(forth[name], back[name]) for name in SPLITS)


def test_every_split_gets_a_document() -> None:
    splits = split("toy", [("a", b""), ("b", b"x" * 99), ("c", b"y")])
    assert all(ids[0] == START for ids in splits.values())
    assert sum(map(len, splits.values())) == 103
    assert not list(split_documents("toy", [("a", b"")]))


def share(splits: dict[str, np.ndarray], name: str) -> float:
    return len(splits[name]) / sum(map(len, splits.values()))


@pytest.mark.parametrize("book", [6_000, 1_000_000])
@pytest.mark.parametrize("trial", range(4))
def test_a_book_among_short_documents_goes_into_every_split_in_passages(book: int, trial: int) -> None:
    texts_of = np.random.default_rng(trial).bytes(book).translate(bytes(range(255)) + b"z")
    documents = [("a", b"a" * 360), ("b", b"b" * 361), (f"book {trial}", texts_of)]
    splits = split("toy", documents)
    assert all(0.05 <= share(splits, name) < 0.1 for name in ("validation", "test"))
    passages = [text for ids in splits.values() for text in texts(ids) if len(set(text)) > 1]
    # each byte of the book once, in passages that do not touch where they stand in one split
    places = sorted((texts_of.index(text), len(text)) for text in passages)
    assert [first for first, _ in places] == [sum(length for _, length in places[:k]) for k in range(len(places))]
    assert sum(length for _, length in places) == book
    assert len(list(texts(splits["train"]))) < 25


def test_equal_documents_are_in_one_split_whatever_their_names_and_share() -> None:
    rows = [f"row {k % 300}, which comes three times".encode() for k in range(900)] + [b"the same" * 9] * 900
    splits = split("toy", [(str(k), row) for k, row in enumerate(rows)])
    found = [set(texts(splits[name])) for name in SPLITS]
    assert sum(map(len, found)) == 301
    assert len(set.union(*found)) == 301
    assert all(0.05 <= share(splits, name) < 0.1 for name in ("validation", "test"))
    assert b"the same" * 9 in found[0]
    few = split("toy", [(str(k), b"ab"[k % 2 : k % 2 + 1] * 100) for k in range(90)])  # no more than two to cut
    assert [b"".join(texts(few[name])) for name in SPLITS] == [b"a" * 100 + b"b" * 80, b"b" * 10, b"b" * 10]


def test_a_few_small_things_among_large_ones_are_shared_by_the_held_out_splits() -> None:
    """What is above 5 % by itself is not held out as long as each split can have something smaller."""
    splits = corpus.fill(np.array([1000, 3, 900, 4, 950, 5]), ("test", "validation"))
    assert splits.tolist() == [2, 0, 2, 0, 2, 1]


@pytest.mark.parametrize("sizes", [(100,), (1000, 0), (0, 1000), (893, 107), (960, 40), (1, 999)])
def test_fewer_than_three_documents_are_cut(sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "STEP", 7)
    whole = np.random.default_rng(0).bytes(sum(sizes))
    documents = [(str(sum(sizes[:k])), whole[sum(sizes[:k]) :][:size]) for k, size in enumerate(sizes)]
    splits = split("toy", documents)
    held, total = len(whole) // 20, len(whole)
    cuts = {
        "train": (0, total - 2 * held),
        "validation": (total - 2 * held, total - held),
        "test": (total - held, total),
    }
    for name, (first, last) in cuts.items():
        assert bytes(splits[name][splits[name] != START].tolist()) == whole[first:last]
        ends = {first, *(place for place in (sizes[0],) if first < place < last)}
        starts = np.flatnonzero(splits[name] == START)
        assert {first + int(start) - k for k, start in enumerate(starts)} == ends


def test_documents_come_back_from_their_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "STEP", 7)
    documents = [b"", b"a" * 6, b"", bytes(range(256)), b"b" * 13, b""]
    assert list(texts(np.concatenate([byte_ids(text) for text in documents]))) == documents


@pytest.mark.parametrize("domain", DOMAINS)
def test_real_held_out_splits_are_five_per_cent_of_several_documents(domain: str) -> None:
    (folder,) = domains.prepare([domain]).values()
    splits = corpus.read(folder)
    for name in ("validation", "test"):
        assert len(splits[name]) / sum(map(len, splits.values())) == pytest.approx(0.05, abs=0.01)
        documents = np.diff(np.append(np.flatnonzero(splits[name] == START), len(splits[name])))
        assert documents.max() < len(splits[name]) / 2


def test_documents_are_written_as_they_come(cache: Path) -> None:
    def documents() -> Iterator[Document]:
        return ((str(k), os.urandom(1 << 16)) for k in range(320))  # 20 MB

    tracemalloc.start()
    made = prepare("toy", "1", documents)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(map(len, made.values())) == 320 * ((1 << 16) + 1)
    assert peak < 4e6


# the cache


def same(made: dict[str, np.ndarray], first: int = 0, domain: str = "toy") -> bool:
    return all(np.array_equal(made[name], ids) for name, ids in split(domain, letters(first)).items())


def content(cache: Path) -> set[str]:
    """Everything below the cache, folders by their domain."""
    return {re.sub(r"-\w{16}", "", str(path.relative_to(cache))) for path in cache.rglob("*")}


WHOLE = {"toy", *(f"toy/{name}" for name in ("train.bin", "validation.bin", "test.bin", "manifest.json"))}


def refuse() -> Iterator[Document]:
    yield from ()
    raise AssertionError("the documents are read again")


def test_the_second_call_reads_files_another_origin_or_domain_is_another_folder(cache: Path) -> None:
    assert same(prepare("toy", "1", partial(letters, 0)))
    assert content(cache) == WHOLE
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


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (cut, "train.bin"),
        (edit, "test.bin"),
        (Path.unlink, "validation.bin"),
        *((damage, "manifest.json") for damage in (cut, edit, Path.unlink, empty_manifest)),
    ],
)
def test_damage_is_noticed_and_repaired_while_others_read(
    cache: Path, damage: Callable[[Path], object], name: str
) -> None:
    prepare("toy", "1", partial(letters, 0))
    (folder,) = cache.iterdir()
    damage(folder / name)
    reader = prepare("toy", "1", partial(letters, 0))
    assert same(reader)
    (folder / "manifest.json").unlink()
    assert same(prepare("toy", "1", partial(letters, 0)))
    assert same(reader)
    assert content(cache) == WHOLE
    assert same(prepare("toy", "1", refuse))


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


def test_a_source_that_fails_leaves_nothing(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Iterator[Document]:
        yield from letters(0)
        raise OSError("disk on fire")

    with pytest.raises(ValueError, match="cannot prepare toy: disk on fire; ZOO_CACHE names another folder"):
        prepare("toy", "1", broken)
    with pytest.raises(ValueError, match="toy holds no text"):
        prepare("toy", "1", lambda: [])
    with pytest.raises(ValueError, match="toy holds no text for validation and test"):
        corpus.prepare("toy", "1", [("train", b"ab")])
    assert not list(cache.iterdir())
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"cannot prepare toy: .*file.*; ZOO_CACHE names another folder"):
        prepare("toy", "1", partial(letters, 0))


def test_a_digest_is_of_the_content_alone(cache: Path) -> None:
    made = [
        corpus.digest(corpus.prepare(name, origin, split_documents("toy", letters(k))))
        for name, origin, k in [("toy", "1", 0), ("joy", "2", 0), ("toy", "3", 50)]
    ]
    assert made[0] == made[1] != made[2]
