"""The task text: its batches and what is scored, with bytes and with byte pairs."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from test_corpus import SPLITS, domains_are, letters
from zoo.models import MODELS, Model
from zoo.tasks import Batch
from zoo.tasks.text import corpus, tokenizer
from zoo.tasks.text import language as module
from zoo.tasks.text.corpus import START, Document
from zoo.tasks.text.domains import DOMAINS
from zoo.tasks.text.language import Text
from zoo.tasks.text.ngram import Trigram


@pytest.fixture
def small(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each domain is of 60 letters of its own; domain d has the bytes from 60 d on."""
    domains_are(lambda index: letters(60 * index), monkeypatch)


def text(seed: int = 0, **options: Any) -> Text:
    return Text({"tokens": 16, **options}, seed)


# batches


@pytest.mark.parametrize(("split", "size"), [("train", 3), ("validation", 4), ("test", 7)])
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


@pytest.mark.parametrize(("split", "domain"), [("train", 0), ("train", 3), ("validation", 1), ("test", 2)])
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


def test_too_little_text_says_so(small: None) -> None:
    made = text(tokens=1000)
    with pytest.raises(ValueError, match=r"task\.tokens=1000 must be below 2\d\d, the tokens of the shortest split"):
        made.prepare()


# what is scored


def test_ends_of_documents_are_learned_but_are_no_bytes(small: None) -> None:
    made, batch = text(), text().batch("train", 0, 40)
    ends = int((batch.targets == START).sum())
    assert ends > 0
    output = torch.zeros(40, 16, 257, requires_grad=True)
    (gradient,) = torch.autograd.grad(made.loss(output, batch), output)
    assert (gradient[batch.targets == START][:, START] < 0).all()
    assert len(made.evaluate(lambda tokens, n: output, batch)["bits_per_byte"]) == 640 - ends


def test_a_process_without_sequences_of_a_domain_has_the_same_metrics(small: None) -> None:
    # else the processes of a run would wait for each other's means in vain
    whole, part = text().batch("test", 0, 8), text().batch("test", 0, 8).rows(0, 2)
    names = [list(text().evaluate(lambda t, n: torch.zeros(*t.shape, 257), batch)) for batch in (whole, part)]
    assert names[0] == names[1]


def test_the_group_of_a_sequence_does_not_reach_the_model(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Model, "log", lambda *args, **options: None)  # there is no trainer
    model = MODELS["moe"]({"name": "moe", "dim": 16, "layers": 1}, {"name": "text", "tokens": 40}, {}).eval()
    batch = model.task.batch("train", 0, 8)
    assert batch.group is not None
    moved = batch._replace(group=(batch.group + 1) % 4)
    losses = [model.training_step(other, 0).item() for other in (batch, moved, batch._replace(group=None))]
    assert len(set(losses)) == 1
    a, b = (model.task.evaluate(lambda tokens, n: model(tokens, n), other) for other in (batch, moved))
    assert torch.equal(a["bits_per_byte"], b["bits_per_byte"])
    assert torch.equal(a["bits_per_byte_code"], b["bits_per_byte_medicine"])


# byte pairs


def sentences(seed: int) -> Iterator[Document]:
    """60 documents of words of their own."""
    draw = np.random.default_rng(seed)
    lexicon = ["".join(map(chr, draw.integers(97, 123, draw.integers(2, 9)))) for _ in range(50)]
    return ((str(k), (" ".join(draw.choice(lexicon, 80 + k)) + " é\n").encode()) for k in range(60))


@pytest.fixture
def written(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each domain is of 60 documents with words of its own."""
    domains_are(sentences, monkeypatch)


PAIRS = {"tokenizer": "bpe", "vocabulary": 400}


def test_ids_stand_for_the_same_documents_in_the_same_splits(written: None) -> None:
    bytewise, pairwise = text(), text(**PAIRS)
    assert len(pairwise.tokenizer.merges) >= 400 - 257
    for expected, ids in zip(bytewise.ids, pairwise.ids, strict=True):
        for split in SPLITS:
            one_by_one = [pairwise.encode(document.decode()) for document in corpus.texts(expected[split])]
            assert ids[split].tolist() == [token for document in one_by_one for token in document]
            assert [pairwise.decode(document) for document in one_by_one] == list(corpus.texts(expected[split]))
            assert len(ids[split]) < 0.7 * len(expected[split])


def test_each_domain_teaches_an_equal_share(written: None, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[bytes] = []
    monkeypatch.setattr(tokenizer, "train", lambda texts, vocabulary: given.extend(texts) or [[97, 98]])
    monkeypatch.setattr(tokenizer, "TRAINED", 8000)
    made = text(**PAIRS)
    assert made.tokenizer.merges == [[97, 98]]
    sample = np.concatenate([corpus.byte_ids(document) for document in given])
    assert np.array_equal(
        sample, np.concatenate([corpus.read(folder)["train"][:2000] for folder in made.folders.values()])
    )


def test_the_second_start_neither_trains_nor_encodes(written: None, monkeypatch: pytest.MonkeyPatch) -> None:
    first = text(**PAIRS)
    expected = first.batch("train", 3, 8)

    def refuse(*args: Any) -> Any:
        yield from ()
        raise AssertionError("work that was done before")

    monkeypatch.setattr(tokenizer, "train", refuse)
    monkeypatch.setattr(tokenizer.Tokenizer, "encode", refuse)
    for domain in DOMAINS:
        monkeypatch.setitem(DOMAINS, domain, refuse)
    again = text(**PAIRS)
    assert torch.equal(again.batch("train", 3, 8).tokens, expected.tokens)
    assert again.state_dict() == first.state_dict()


def test_another_tokenizer_has_ids_of_its_own(written: None, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text(**PAIRS).prepare()
    folders = len(list(cache.iterdir()))
    assert folders == 4 + 1 + 4  # bytes, a tokenizer, its ids
    text(**PAIRS, domains=["law"]).prepare()
    text(**{**PAIRS, "vocabulary": 300}).prepare()
    assert len(list(cache.iterdir())) == folders + 2 + 5


def bits_one_by_one(made: Text, output: torch.Tensor, batch: Batch) -> tuple[list[float], list[float]]:
    """Bits of each byte by the definition: a token's are spread over its bytes; the trigram reads bytes one by one."""
    model, counted = [], []
    for row in range(len(batch.tokens)):
        window = [*batch.tokens[row].tolist(), int(batch.targets[row, -1])]
        read = list(made.tokenizer.spelled[window[0]]) or [START]
        for place, target in enumerate(window[1:]):
            if target == START:
                read.append(START)
                continue
            spelled = made.tokenizer.spelled[target]
            nats = -output[row, place].log_softmax(-1)[target].item()
            model += [nats / len(spelled) / math.log(2)] * len(spelled)
            for byte in spelled:
                counted.append(made.trigram.bits(np.array([*read[-2:], byte]))[-1])
                read.append(byte)
    return model, counted


@pytest.mark.parametrize("options", [{}, PAIRS])
def test_bits_are_those_of_bytes_whatever_the_tokens(written: None, options: dict[str, Any]) -> None:
    made = text(**options, tokens=70)
    batch = made.batch("train", 1, 30)
    assert (batch.targets == START).any()
    output = torch.randn(30, 70, made.output_dim)
    values = made.evaluate(lambda tokens, n: output, batch)
    model, counted = bits_one_by_one(made, output, batch)
    assert values["bits_per_byte"].tolist() == pytest.approx(model, rel=1e-5)
    assert values["bits_per_byte_trigram"].tolist() == pytest.approx(counted, rel=1e-5)
    for index, domain in enumerate(DOMAINS):
        own = batch.targets[batch.group == index].flatten().tolist()
        assert len(values[f"bits_per_byte_{domain}"]) == len(made.decode(own))


def test_the_trigram_counts_bytes_whatever_the_tokens(written: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in (module.COUNTED, 1000):
        monkeypatch.setattr(module, "COUNTED", limit)
        expected = Trigram(splits["train"][:limit] for splits in text().ids)
        for options in ({}, PAIRS):
            counts = text(**options).trigram.counts
            assert all(np.array_equal(a, b) for a, b in zip(counts, expected.counts, strict=True))


@pytest.mark.parametrize("options", [{}, PAIRS], ids=["byte", "token"])
def test_the_reference_is_the_entropy_of_the_even_mixture(
    written: None, options: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    made = text(**options)
    counts = [np.bincount(splits["train"], minlength=400) for splits in made.ids]
    p = np.mean([count / count.sum() for count in counts], 0)
    name = f"best fixed {request.node.callspec.id} distribution"
    assert made.baselines() == {name: pytest.approx(-sum(x * math.log(x) for x in p if x))}


def test_a_restored_tokenizer_encodes_the_text(written: None) -> None:
    made, law = text(**PAIRS), text(**PAIRS, domains=["law"])
    batch, predict = made.batch("test", 0, 4), lambda tokens, n: torch.zeros(*tokens.shape, 400)
    made.evaluate(predict, batch)
    made.load_state_dict({"merges": law.tokenizer.merges})
    place = list(DOMAINS).index("law")
    assert all(np.array_equal(made.ids[place][split], law.ids[0][split]) for split in SPLITS)
    batch = made.batch("test", 0, 4)
    assert len(made.evaluate(predict, batch)["bits_per_byte"]) == len(made.decode(batch.targets.flatten().tolist()))


@pytest.mark.parametrize(
    ("options", "state", "message"),
    [
        ({}, {"merges": []}, "task.name=text has no state merges"),
        (PAIRS, {}, "a tokenizer is a list of 524288 merges at most, got None"),
        (PAIRS, {"merges": [], "code": "x"}, "task.name=text has no state code"),
        (PAIRS, {"merges": [[97, k] for k in range(256)]}, "a tokenizer of 513 ids exceeds task.vocabulary=400"),
    ],
)
def test_a_foreign_state_is_refused(options: dict[str, Any], state: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        text(**options).load_state_dict(state)
