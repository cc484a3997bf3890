"""Prompts: where context, query and target come from, what is scored, which context is wrong, what files may say."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cases import CASES, build
from test_corpus import SPLITS, domains_are
from zoo.core.layers import FILLING
from zoo.tasks import Batch
from zoo.tasks.text import prompts as module
from zoo.tasks.text.corpus import START, Document, split_documents
from zoo.tasks.text.domains import DOMAINS
from zoo.tasks.text.ngram import Trigram
from zoo.tasks.text.prompts import IGNORE, Prompts

C, Q, A = 9, 3, 5  # bytes of context, query and target
SIZE = C + Q + A
SMALL = {"context": C, "query": Q, "target": A}


def drawn(domain: int) -> Iterator[Document]:
    """90 documents of 0 to 89 random bytes, those of domain d from 60 d on, so any three bytes tell the domain."""
    draw = np.random.default_rng(domain)
    for length in draw.permutation(90):
        yield f"part/{length}", draw.integers(60 * domain, 60 * domain + 60, length).astype(np.uint8).tobytes()


@pytest.fixture
def small(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    domains_are(drawn, monkeypatch)


def prompts(seed: int = 0, **options: Any) -> Prompts:
    return Prompts({**SMALL, **options}, seed)


def ids_of(domain: str, split: str) -> np.ndarray:
    return np.concatenate([ids for name, ids in split_documents(domain, DOMAINS[domain]()) if name == split])


def documents(domain: str, split: str) -> list[bytes]:
    """The documents of a split, cut at their starts."""
    ids = ids_of(domain, split)
    starts = np.flatnonzero(ids == START)
    return [part[1:].astype(np.uint8).tobytes() for part in np.split(ids, starts[1:])]


def blocks_of(domain: str, split: str) -> list[bytes]:
    """A context, a query and a target each, one after the other."""
    texts = documents(domain, split)
    return [text[i : i + SIZE] for text in texts for i in range(0, len(text) - SIZE + 1, SIZE)]


def said(batch: Batch, row: int) -> tuple[bytes, bytes, bytes]:
    """Context, query and target of one sequence."""
    n, tokens, targets = batch.n_context, batch.tokens[row].tolist(), batch.targets[row].tolist()
    scored = [place for place, target in enumerate(targets) if target not in (IGNORE, START)]
    first = scored[0]
    assert scored == list(range(first, first + len(scored)))
    assert tokens[n] == START
    query = tokens[n + 1 : n + 1 + first]
    # what is scored is what is read one place later
    assert tokens[n + 1 + first :][: len(scored) - 1] == [targets[place] for place in scored[:-1]]
    if len(targets) > scored[-1] + 1:  # files: the last byte is read, the end is scored unless the target was cut
        assert tokens[n + 1 + scored[-1]] == targets[scored[-1]]
        assert targets[scored[-1] + 1] in ((IGNORE, START) if len(scored) == A else (START,))
        assert set(targets[scored[-1] + 2 :]) <= {IGNORE}
        assert set(tokens[n + scored[-1] + 2 :]) <= {FILLING}
    context = tokens[:n]
    while context and context[0] == FILLING:
        context.pop(0)
    return bytes(context), bytes(query), bytes(targets[place] for place in scored)


# passages of documents


@pytest.mark.parametrize("split", SPLITS)
def test_an_epoch_reads_each_block_of_each_document_beside_a_context_of_another_one(small: None, split: str) -> None:
    made = prompts()
    for index, domain in enumerate(DOMAINS):
        texts, blocks = documents(domain, split), blocks_of(domain, split)
        assert any(len(text) < SIZE for text in texts) or split != "train"
        batch = made.at(split, 4 * np.arange(len(blocks)) + index)
        assert batch.wrong_context is not None
        found = [said(batch, row) for row in range(len(blocks))]
        assert Counter(b"".join(parts) for parts in found) == Counter(blocks)
        for parts, wrong in zip(found, batch.wrong_context.tolist(), strict=True):
            assert tuple(map(len, parts)) == (C, Q, A)
            (source,) = (text for text in texts if bytes(wrong) in text)
            assert parts[0] not in source


def test_a_wrong_context_is_found_where_one_document_has_nearly_all_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    texts = {name: letter * size for name, letter, size in (("a", b"a", 17), ("b", b"b", 17 * 400), ("c", b"c", 17))}
    ids = np.concatenate([[START, *text] for text in texts.values()]).astype(np.uint16)
    monkeypatch.setattr(module.corpus, "read", lambda folder: dict.fromkeys(SPLITS, ids))
    monkeypatch.setattr(Prompts, "folders", {"code": tmp_path})
    batch = prompts(domains=["code"]).batch("train", 0, 402)
    assert batch.wrong_context is not None
    pairs = Counter((chr(own[0]), chr(wrong[0])) for own, wrong in zip(batch.tokens, batch.wrong_context, strict=True))
    assert sum(pairs.values()) == 402
    assert all(own != wrong for own, wrong in pairs)
    assert pairs["b", "a"] + pairs["b", "c"] == 400


def test_documents_that_are_too_short_are_named(small: None) -> None:
    with pytest.raises(ValueError, match=r"^the train split of code has 0, but needs 2 documents of 98 tokens"):
        prompts(context=90).prepare()


# files


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def record(context: str, query: str, target: str) -> dict[str, str]:
    return {"context": context, "query": query, "target": target}


ROWS = [
    *(record(f"context {k:03}", f"{k:03}?", f"<{k:03}>") for k in range(60)),
    record("short", "", "1"),
    record("", "ab", "2345"),
    record("", "", "longer than five bytes"),
    record("a context that is too long", "a long query", "é̂"),
]


@pytest.fixture
def file(tmp_path: Path) -> str:
    return write(tmp_path / "a.jsonl", ROWS)


def everything(made: Prompts, split: str) -> list[tuple[bytes, bytes, bytes]]:
    size = len(made.examples[0][split].document)
    batch = made.batch(split, 0, size)
    return [said(batch, place) for place in range(size)]


def test_every_row_of_a_file_is_in_one_split(file: str) -> None:
    found = [everything(prompts(files=[file]), split) for split in SPLITS]
    expected = [
        (r["context"].encode()[-C:], r["query"].encode()[-Q:], r["target"].encode()[:A]) for r in ROWS
    ]  # longer parts are cut, shorter ones are whole
    assert Counter(itertools.chain(*found)) == Counter(expected)
    assert [len(part) for part in found] == [len(ROWS) - 8, 4, 4]  # 5 % of the bytes each


def test_splits_depend_on_rows_not_on_their_order_or_file(file: str, tmp_path: Path) -> None:
    files = [write(tmp_path / "b.jsonl", ROWS[40:][::-1]), write(tmp_path / "c.jsonl", ROWS[:40])]
    for split in SPLITS:
        assert set(everything(prompts(files=files), split)) == set(everything(prompts(files=[file]), split))


def test_rows_with_one_context_stay_together_and_are_no_wrong_context_of_each_other(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [record("x" * k + f"ends in {k % 8}", f"q{k}", f"t{k}") for k in range(80)])
    made, contexts = prompts(files=[path]), []
    for split in SPLITS:
        examples = everything(made, split)
        contexts.append({context for context, _, _ in examples})
        assert len(examples) == 10 * len(contexts[-1])
        batch = made.batch(split, 1, 30)
        assert batch.wrong_context is not None
        for place in range(30):
            wrong = bytes(b for b in batch.wrong_context[place].tolist() if b != START)
            assert wrong != said(batch, place)[0]
            assert wrong in contexts[-1]
    assert list(map(len, contexts)) == [4, 2, 2]
    assert len(set.union(*contexts)) == 8


def test_a_context_of_most_rows_trains_and_equal_rows_stay_together(tmp_path: Path) -> None:
    # its hash is a low one: it would be the first in the test
    rows = [record("prompt 70", f"{k}", "t" * 5) for k in range(100)] + [record(f"c{k}", "", "t") for k in range(99)]
    alone = [record("", f"{k}", "t" * 5) for k in range(40)]
    made = prompts(files=[write(tmp_path / "a.jsonl", [*rows, *alone, *alone])])
    found = [everything(made, split) for split in SPLITS]
    assert len([row for row in found[0] if row[0] == b"prompt 70"]) == 100
    sizes = [sum(len(part) for row in rows for part in row) for rows in found]
    assert all(0.05 <= size / sum(sizes) < 0.1 for size in sizes[1:])
    assert not any(set(a) & set(b) for a, b in itertools.combinations(found, 2))


def test_two_contexts_are_needed_in_each_split(tmp_path: Path) -> None:
    few = [record(f"text {k % 5}", "", "t") for k in range(80)]
    with pytest.raises(ValueError, match="5 different contexts are too few, each split needs 2"):
        prompts(files=[write(tmp_path / "a.jsonl", few)]).prepare()
    alone = prompts(files=[write(tmp_path / "b.jsonl", [record("", f"q{k}", "t") for k in range(6)])])
    assert [len(everything(alone, split)) for split in SPLITS] == [2, 2, 2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"context": "a", "query": "b", "target": ""}', "the target not empty, in {'context': 'a', 'query': 'b'"),
        ('{"context": "a", "query": "b"}', "context, query, target must be strings, the target not empty, in {'con"),
        ('{"context": "a", "query": 3, "target": "c"}', "the target not empty, in {'context': 'a', 'query': 3"),
        ('["a", "b", "c"]', "a row is an object, not list"),
        ('{"context": "\\ud800", "query": "b", "target": "c"}', "surrogates not allowed"),
    ],
    ids=lambda value: value[:45],
)
def test_mistakes_in_a_file_are_named_with_their_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    good = json.dumps(ROWS[0])
    path.write_text(f"{good}\n\n{line}\n{good}\n")
    with pytest.raises(ValueError, match=r"task\.files: .*a\.jsonl: line 3: ") as error:
        prompts(files=[str(path)]).prepare()
    assert message in str(error.value)


def test_a_text_file_is_no_table_of_prompts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=r"task\.files: .*a\.txt has an unknown extension; known: \.json, \.jsonl,"):
        prompts(files=[str(tmp_path / "a.txt")]).prepare()


# what is read and scored


def test_texts_become_the_tokens_of_batches(tmp_path: Path) -> None:
    rows = [record("né" * k + str(k), f"q{k}", "t" * A) for k in range(8)]
    made = prompts(files=[write(tmp_path / "a.jsonl", rows)], query=2)
    contexts = [made.encode_context(r["context"]) for r in rows]
    places = {
        (*[FILLING] * (C - len(context)), *context, *made.encode(r["query"] + r["target"]))
        for context, r in zip(contexts, rows, strict=True)
    }
    batches = [made.batch(split, 0, len(made.examples[0][split].document)) for split in SPLITS]
    assert {tuple(tokens) for batch in batches for tokens in batch.tokens.tolist()} == places
    assert (made.encode_context(""), made.encode_context("ab")) == ([], [97, 98])
    assert made.decode(made.encode("né")) == made.decode(made.encode_context("né")) == "né".encode()
    assert made.decode(made.encode_context("é" * C)) == ("é" * C).encode()[-C:]  # cut within a character


@pytest.mark.parametrize("case", [case for case in CASES if case.task == "prompts"], ids=lambda case: case.name)
@torch.no_grad()
def test_the_loss_does_not_depend_on_padding(case: Any, tmp_path: Path) -> None:
    rows = [record(f"con {k}", "q" * (k % 3), "t" * (1 + k % 4)) for k in range(40)]
    model = build(case)
    model.decoder.filled = True
    file = write(tmp_path / "a.jsonl", rows)
    losses = {}
    for context, target in ((C, A), (40, A), (C, 60)):
        made = prompts(files=[file], context=context, target=target)
        batch = made.batch("validation", 0, len(made.examples[0]["validation"].document))
        assert (batch.tokens == FILLING).any()
        losses[context, target] = made.loss(model(batch.tokens, context), batch).item()
        seen = torch.where(batch.tokens == FILLING, 1, batch.tokens)
        assert abs(made.loss(model(seen, context), batch).item() - losses[context, target]) > 1e-4 or context == C
    assert list(losses.values()) == pytest.approx([losses[C, A]] * 3, rel=1e-6)


def test_bits_are_those_of_the_model_with_three_contexts_by_domain(small: None) -> None:
    made, calls = prompts(), []
    batch = made.batch("test", 0, 10)

    def predict(tokens: torch.Tensor, n: int) -> torch.Tensor:
        calls.append((tokens, n, torch.randn(*tokens.shape, 257)))
        return calls[-1][2]

    values = made.evaluate(predict, batch)
    assert batch.wrong_context is not None
    (own, a, _), (bare, b, _), (wrong, c, _) = calls
    assert (a, b, c) == (C, 0, C)
    assert torch.equal(own, batch.tokens)
    assert torch.equal(bare, batch.tokens[:, C:])
    assert torch.equal(wrong, torch.cat([batch.wrong_context, bare], 1))
    names = ["bits_per_byte", "bits_per_byte_without_context", "bits_per_byte_wrong_context", "bits_per_byte_trigram"]
    assert list(values) == names + [f"{name}_{domain}" for domain in DOMAINS for name in names]
    for name, (_, _, output) in zip(names, calls, strict=False):
        logp = output[:, -A:].log_softmax(-1)
        bits = -logp.gather(-1, batch.targets[:, -A:, None])[..., 0] / math.log(2)
        torch.testing.assert_close(values[name], bits.flatten())
        for index, domain in enumerate(DOMAINS):
            torch.testing.assert_close(values[f"{name}_{domain}"], bits[torch.arange(10) % 4 == index].flatten())


def test_the_trigram_reads_the_same_bytes(small: None) -> None:
    made = prompts()
    batch = made.batch("test", 0, 8)
    trigram = Trigram(ids_of(domain, "train") for domain in DOMAINS)
    read = [np.array(list(b"".join(said(batch, row)[1:]))) for row in range(8)]
    expected = np.concatenate([trigram.bits(ids)[Q:] for ids in read])
    values = made.evaluate(lambda tokens, n: torch.zeros(*tokens.shape, 257), batch)
    assert values["bits_per_byte_trigram"].tolist() == pytest.approx(expected.tolist(), rel=1e-5)


def test_the_reference_is_the_entropy_of_the_bytes_of_targets(small: None, file: str) -> None:
    def frequencies(targets: list[list[int]]) -> dict[int, float]:
        counts = Counter(itertools.chain(*targets))
        return {byte: count / counts.total() for byte, count in counts.items()}

    def reference(p: dict[int, float]) -> dict[str, Any]:
        return {"best fixed byte distribution": pytest.approx(-sum(x * math.log(x) for x in p.values()))}

    made = prompts(files=[file], target=50)
    ended = [[*target, START] for _, _, target in everything(made, "train")]
    assert made.baselines() == reference(frequencies(ended))
    mixture: Counter[int] = Counter()
    for domain in DOMAINS:
        targets = [list(block[-A:]) for block in blocks_of(domain, "train")]
        mixture.update({byte: p / 4 for byte, p in frequencies(targets).items()})
    assert prompts().baselines() == reference(mixture)
