"""Tasks whose best answer is known: oracles read what models read and are right, those who ignore it are not."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from test_tasks import task
from zoo.models import MODELS
from zoo.tasks import TASKS, Batch
from zoo.tasks.markov import Markov
from zoo.tasks.modules import Modules, ModulesConfig
from zoo.tasks.regression import _lasso


def means(made: Any, batch: Batch) -> dict[str, float]:
    """The metrics of a model that answers zeros, and of all baselines."""
    values = made.evaluate(lambda tokens, n: torch.zeros(*tokens.shape[:2], made.output_dim), batch)
    return {name: value.mean().item() for name, value in values.items()}


def modules(**options: Any) -> Modules:
    made = task("modules", **options)
    assert isinstance(made, Modules)
    return made


def chosen(context: Tensor) -> list[tuple[int, ...]]:
    """The combinations that codes (B,1,…) of six modules tell, of which the numbers are checked."""
    code_B6 = context[:, 0, :6]
    assert code_B6.norm(dim=-1).tolist() == pytest.approx([1.0] * len(code_B6))
    assert all(len({*row[row > 0].tolist()}) == 1 for row in code_B6)
    return [tuple(row.nonzero().flatten().tolist()) for row in code_B6]


def test_half_of_the_combinations_are_in_the_test_alone() -> None:
    made = modules()
    training, validation, test = (made.batch(split, 0, 2000) for split in ("train", "validation", "test"))
    assert test.group is not None
    trained, tested = {*chosen(training.tokens)}, chosen(test.tokens)
    seen, unseen = {*tested[::2]}, {*tested[1::2]}
    assert trained == {*chosen(validation.tokens)} == seen
    assert (len(seen), len(unseen), len(seen & unseen)) == (21, 20, 0)
    assert {len(each) for each in unseen} == {2, 3}
    assert {(k,) for k in range(6)} < seen
    assert test.group.tolist() == [0, 1] * 1000
    assert len({*chosen(modules(held_out=0.2).batch("train", 0, 2000).tokens)}) == 33
    assert len({*chosen(task("modules", seed=1).batch("train", 0, 2000).tokens)} & trained) < 21  # drawn anew


def test_answers_are_those_of_the_stated_formulas() -> None:
    made = modules()
    batch, teacher = made.batch("test", 0, 6), made.teacher
    for z, tokens, targets in zip(chosen(batch.tokens), batch.tokens[:, 1:], batch.targets, strict=True):
        for token, y in zip(tokens, targets, strict=True):
            hidden = sum(teacher.parts_KUd[k] @ token[6:14] for k in z) / len(z) ** 0.5
            torch.testing.assert_close(teacher.readout_OU @ hidden.relu(), y, rtol=1e-4, atol=1e-5)
            assert token[:6].any().item() is False
            assert token[14] == 1
    made = modules(variant="routed", modules=3)
    batch, teacher = made.batch("test", 0, 6), made.teacher
    for token, y in zip(batch.tokens.flatten(0, 1), batch.targets.flatten(0, 1), strict=True):
        nearest = (teacher.centres_Kd - token[:8]).norm(dim=-1).argmin()
        torch.testing.assert_close(teacher.parts_KUd[nearest] @ token[:8], y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"context": "pairs", "pairs": 12}, {"variant": "routed"}], ids=str)
def test_the_teacher_reads_the_tokens_and_the_mean_is_worth_one(options: dict[str, Any]) -> None:
    made = modules(**options)
    batch = made.batch("test", 0, 2000)
    found = means(made, batch)
    parts = [""] if "variant" in options else ["", "_unseen"]
    assert set(found) == {f"{name}{part}" for name in found if not name.endswith("_unseen") for part in parts}
    for part in parts:
        assert found[f"nmse_teacher{part}"] < 1e-9
        assert found[f"nmse_mean{part}"] == pytest.approx(1, abs=0.05)
        if made.n_context:  # control: the teacher believes a wrong context
            assert batch.wrong_context is not None
            wrong = torch.cat([batch.wrong_context, batch.tokens[:, made.n_context :]], 1)
            assert means(made, batch._replace(tokens=wrong))[f"nmse_teacher{part}"] > 0.3
            assert (wrong != batch.tokens).any(-1).any(-1).all()


def test_options_of_a_file_cost_nothing_before_a_batch_is_asked_for() -> None:
    """A checkpoint may be somebody else's: its sizes are compared with its weights before the modules are drawn."""
    made = modules(modules=10**6)
    assert made.token_dim == 10**6 + 9
    assert "teacher" not in made.__dict__
    assert ModulesConfig(modules=10**6).resolve().held() > 10**16


@pytest.mark.parametrize(
    ("pairs", "overwritten", "haystack"), [(4, 0.5, None), (5, 1.0, None), (5, 0.0, None), (4, 0.5, [33, 65])]
)
def test_recall_asks_for_what_was_written_last(pairs: int, overwritten: float, haystack: list[int] | None) -> None:
    made = task("recall", pairs=pairs, overwritten=overwritten, haystack=haystack)
    batch, places = made.batch("test", 0, 50), set()
    assert batch.wrong_context is not None
    assert batch.n_context == batch.wrong_context.shape[1] == batch.tokens.shape[1] - made.config.queries
    lengths = {made.batch("test", k, 1).n_context for k in range(40)}
    assert {*range(32, 65, 2)} >= lengths if haystack else lengths == {made.n_context}
    assert len(lengths) > 8 * bool(haystack)
    rows = map(Tensor.tolist, (batch.tokens, batch.wrong_context, batch.targets))
    for tokens, wrong, answers in zip(*rows, strict=True):
        hay = [name >= 16 for name in tokens[: batch.n_context]]
        assert hay == [name >= 16 for name in wrong]
        assert hay[::2] == hay[1::2]
        tokens, wrong = ([name for name in row if name < 16] for row in (tokens, wrong))
        n = len(wrong)
        keys, values = tokens[:n:2], tokens[1:n:2]
        memory, other = dict(zip(keys, values, strict=True)), dict(zip(wrong[::2], wrong[1::2], strict=True))
        assert (len(keys), len(memory)) == (pairs + round(pairs * overwritten), pairs)
        assert max(memory) < 8 <= min(values)
        assert [memory[key] for key in tokens[n:]] == answers
        assert not any(other[key] == memory[key] for key in memory)  # the control's answers are all wrong
        for key in memory:
            written = [value for name, value in zip(keys, values, strict=True) if name == key]
            assert len({*written}) == len(written) <= 2
            places |= {keys.index(key)} if len(written) == 2 else set()
    assert len(places) >= bool(overwritten) * pairs  # old values stand anywhere
    assert means(made, batch)["error_last"] == 0


def test_errors_of_recall_are_told_apart() -> None:
    """By who knows everything but what was overwritten."""
    made = task("recall")

    def old(tokens: Tensor, n: int) -> Tensor:
        answers = torch.zeros(*tokens.shape, made.output_dim)
        for row, one in zip(tokens.tolist(), answers, strict=True):
            for place in range(n, len(row)):
                one[place, row[row[:n:2].index(row[place]) * 2 + 1] if n else 8] = 1
        return answers

    found = {name: value.mean().item() for name, value in made.evaluate(old, made.batch("test", 0, 100)).items()}
    assert (found["error_overwritten"], found["error_once"], found["error_chance"]) == (1, 0, 1 - 1 / 8)
    assert found["error"] == found["error_first"] == pytest.approx(0.5, abs=0.1)


def markov(**options: Any) -> Markov:
    made = task("markov", **options)
    assert isinstance(made, Markov)
    return made


def test_the_filter_is_bayes_rule_written_out() -> None:
    made = markov(domains=3, letters=5)
    batch = made.batch("test", 0, 40)
    assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    assert batch.group is not None
    found = made.readers(batch.targets, batch.group)["bits_filter"]
    for s, bits in zip(batch.targets.tolist(), found.tolist(), strict=True):
        belief = [1 / 3] * 3
        assert bits[0] == pytest.approx(math.log2(5))
        for t in range(1, len(s)):
            chances = [float(made.chains[d, s[t - 1], s[t]]) for d in range(3)]
            predicted = sum(b * c for b, c in zip(belief, chances, strict=True))
            assert bits[t] == pytest.approx(-math.log2(predicted), rel=1e-9)
            belief = [b * c / predicted for b, c in zip(belief, chances, strict=True)]
    assert max(belief) > 0.99


def test_letters_follow_their_chains_and_readers_stand_in_order() -> None:
    made = markov(domains=2, letters=4, tokens=100)
    batch = made.batch("train", 0, 2000)
    assert batch.group is not None
    for domain in range(2):
        s_BT = batch.targets[batch.group == domain]
        counts = torch.bincount((s_BT[:, :-1] * 4 + s_BT[:, 1:]).flatten(), minlength=16).view(4, 4).double()
        torch.testing.assert_close(counts / counts.sum(1, keepdim=True), made.chains[domain], atol=0.02, rtol=0)
        torch.testing.assert_close(counts / counts.sum(), made.pairs[domain], atol=0.02, rtol=0)
    found = means(made, batch)
    order = ["bits_told", "bits_filter", "bits_bigram", "bits_unigram", "bits"]
    assert [*sorted(order, key=found.__getitem__)] == order
    assert found["bits"] == pytest.approx(math.log2(5))
    assert found["bits_excess"] == pytest.approx(found["bits"] - found["bits_filter"], rel=1e-5)
    swapped = {name: x.mean().item() for name, x in made.readers(batch.targets, 1 - batch.group).items()}
    assert swapped["bits_told"] > found["bits_unigram"] > found["bits_told"]  # control: told the wrong domain


def test_markov_chains_are_text() -> None:
    made = markov(letters=3)
    assert made.encode("abca") == [3, 0, 1, 2, 0]
    assert made.decode([3, 0, 1, 2, 0]) == b"abca"
    with pytest.raises(ValueError, match="letters of this task are abc, not 'dz'"):
        made.encode("zad")
    model = MODELS["transformer"]({"name": "transformer"}, {"name": "markov", "letters": 3}, {})
    assert len([*model.generate(torch.tensor([made.encode("ab")]), 4)]) == 4


def test_lasso_finds_what_ridge_does_not() -> None:
    """Of 16 weights one is not zero, ten pairs: the conditions of optimality hold, and few pairs are enough."""
    made = task("regression", function="sparse", dimension=16, points=10)
    batch = made.batch("test", 0, 200)
    found = means(made, batch)
    assert found["nmse_lasso"] < 0.01 < 0.2 < found["nmse_ridge"]
    # the weights themselves are the answers to unit vectors
    unit = torch.cat([torch.eye(16), torch.zeros(16, 1)], -1).expand(200, -1, -1)
    w = _lasso(batch._replace(tokens=torch.cat([batch.tokens[:, :10], unit], 1)))[..., None]
    x, y = batch.tokens[:, :10, :-1].double(), batch.tokens[:, :10, -1:].double()
    slope = x.mT @ (y - x @ w) / 10
    assert slope.abs().max() < 0.01 * (1 + 1e-3)
    on = w.abs() > 1e-6
    torch.testing.assert_close(slope[on], 0.01 * w[on].sign(), atol=1e-5, rtol=0)
    assert "nmse_lasso" not in means(task("regression"), task("regression").batch("test", 0, 2))


def test_neighbours_and_first_pairs_are_what_they_say() -> None:
    made = task("regression", points=8, queries=2)
    batch = made.batch("test", 0, 30)
    seen: list[tuple[tuple[int, ...], int]] = []

    def predict(tokens: Tensor, n: int) -> Tensor:
        seen.append((tuple(tokens.shape[:2]), n))
        return tokens[:, :n, -1:].sum(1, keepdim=True).expand(-1, tokens.shape[1], 1)

    values = made.evaluate(predict, batch)
    assert seen == [((30, 10), 8), ((30, 2), 0), ((30, 10), 8), ((30, 4), 2), ((30, 6), 4)]
    for count in (2, 4):
        error = (batch.tokens[:, :count, -1].sum(1, keepdim=True) - batch.targets).square() / 3
        torch.testing.assert_close(values[f"nmse_first_{count}"], error)
    assert values["nmse_ridge_first_2"].mean() > 0.1 > values["nmse_ridge_first_4"].mean()
    for b, tokens in enumerate(batch.tokens):
        for q, query in enumerate(tokens[8:]):
            nearest = min(tokens[:8], key=lambda pair: float((pair[:3] - query[:3]).norm()))
            assert values["nmse_nearest"][b, q] == pytest.approx(
                float((nearest[3] - batch.targets[b, q]) ** 2 / 3), rel=1e-4, abs=1e-6
            )


@pytest.mark.parametrize("name", TASKS)
def test_each_value_of_the_main_metric_has_its_sequence(name: str) -> None:
    one = TASKS[name]({"name": name}, 0)
    if one.has_text:
        return  # tests/test_evaluate.py has text, which must be prepared
    batch = one.batch("test", 0, 8)
    output = torch.zeros(*batch.tokens.shape[:2], one.output_dim)
    values = one.evaluate(lambda tokens, n_context: output[:, : tokens.shape[1]], batch)[one.main_metric]
    row_N = one.rows(batch)
    assert row_N.shape == values.flatten().shape
    for row in row_N.unique().tolist():
        alone = batch.rows(row, 1)
        alone_values = one.evaluate(lambda tokens, n_context: output[:1, : tokens.shape[1]], alone)[one.main_metric]
        torch.testing.assert_close(values.flatten()[row_N == row], alone_values.flatten())
