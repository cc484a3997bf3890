"""Prints how a trained model continues a text: python -m zoo.generate runs/transformer-text/ID "The people"."""

from __future__ import annotations

import argparse
import codecs
import sys
import unicodedata
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import zoo
from zoo.console import Parser, command, read, say
from zoo.files import named, to_json, whole

if TYPE_CHECKING:
    from zoo.models import Model

ROWS = 32  # of --prompts at once
KEYS = ("prompt", "context")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m zoo.generate",
        description="Continue a text with a trained model. The text ends after --count tokens, or earlier where the "
        "model begins a new document.",
        epilog="Example: python -m zoo.generate runs/transformer-text/ID 'The people of' --count 400 --temperature 0.5",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("checkpoint", help="a .ckpt file, or a run folder: its best checkpoint")
    parser.add_argument("prompt", nargs="?", type=utf8, help="how the text begins; may be empty, ''")
    parser.add_argument("--context", type=utf8, help="a separate context, for tasks that have one, or @FILE")
    parser.add_argument("--prompts", help="a file: a table (.jsonl, .csv, …) with prompt and context, or lines")
    parser.add_argument("--out", help="of --prompts: a file of JSON lines, as the prompts stand: prompt, context, text")
    parser.add_argument("--count", type=int, default=200, help="how many tokens to add at most")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    parser.add_argument("--top-k", type=int, default=40, help="draw among this many likeliest tokens")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--base", metavar="DIR", help="the pretrained model that is its W0, where model.base names one")
    options = parser.parse_args(argv)
    if (options.prompts is None) == (options.prompt is None) or (options.prompts is None) != (options.out is None):
        parser.error("give a prompt, or --prompts FILE and --out FILE")
    if options.prompts is not None and options.context is not None:
        parser.error("--context is that of one prompt: give it in each row of --prompts")
    if options.prompts is not None and Path(options.prompts).resolve() == Path(options.out).resolve():
        parser.error(f"--out {options.out} holds the prompts: give another file")
    if options.seed.bit_length() > 63:
        parser.error(f"--seed {options.seed} must be a number of 64 bits")
    return options


@command
def main(argv: list[str] | None = None) -> int:
    """Prints prompt and continuation as it comes, or writes those of a file, and how fast on stderr; returns the exit
    code: 2, with one line on stderr, for mistakes."""
    options = parse(argv)
    model = zoo.load(options.checkpoint, options.base)
    began, tokens = perf_counter(), of_one(model, options) if options.prompts is None else of_file(model, options)
    seconds = perf_counter() - began
    say(f"{tokens} tokens in {seconds:.1f} s, {tokens / seconds:,.0f} tokens/s", sys.stderr)
    return 0


def encoded(model: Model, prompt: str, context: str | None, what: str = "--context") -> tuple[list[int], int]:
    """The ids of a prompt after those of its context, and how many these are; raises ValueError for a context too many,
    or none where there must be one: `what` it is."""
    task, name, ids = model.task, model.task.config.name, model.task.encode(prompt)
    if task.n_context and context is None:
        raise ValueError(f"the model was trained on task.name={name} with a separate context: give {what}")
    if not task.n_context and context:
        raise ValueError(f"the model was trained on task.name={name} without a separate context: leave out {what}")
    before = [] if context is None else task.encode_context(context)
    return before + ids, len(before)


def continued(model: Model, rows: list[list[int]], n_context: int, options: argparse.Namespace) -> Iterator[list[int]]:
    """The ids that follow rows of one length, one of each row at a time, until all have begun a new document; of a row
    that has, the id that begins one."""
    import torch  # after the options are read: --help is quick

    generator = torch.Generator().manual_seed(options.seed)
    chosen = options.count, n_context, options.temperature, options.top_k, generator
    following, start = model.generate(torch.tensor(rows), *chosen), model.task.encode("")[0]

    def until_all_begin() -> Iterator[list[int]]:
        ids = [start - 1] * len(rows)
        for new_B in following:
            ids = [new if old != start else start for old, new in zip(ids, new_B.tolist(), strict=True)]
            if {*ids} == {start}:
                return
            yield ids

    return until_all_begin()


def of_one(model: Model, options: argparse.Namespace) -> int:
    """Prints the prompt and what each token adds, a character of several tokens with its last one; how many tokens."""
    context = options.context
    if context and context.startswith("@") and model.task.n_context:
        context = read(context[1:])
    ids, n_context = encoded(model, options.prompt, context)
    following = continued(model, [ids], n_context, options)
    decoder, tokens = codecs.getincrementaldecoder("utf-8")("replace"), 0

    def show(text: bytes, final: bool = False) -> None:
        print("".join(map(visible, decoder.decode(text, final))), end="\n" if final else "", flush=True)

    show(options.prompt.encode())
    for row in following:
        show(model.task.decode(row))
        tokens += 1
    show(b"", final=True)
    return tokens


def of_file(model: Model, options: argparse.Namespace) -> int:
    """Writes the continuations of all prompts of a file, those of one length together; how many tokens."""
    from tqdm import tqdm

    out = named(options.out)
    prompts: list[dict[str, str]] = []
    ids, start, total = [], model.task.encode("")[0], 0
    for place, row in prompts_of(Path(options.prompts)):
        ids.append(encoded(model, row["prompt"], row.get("context"), f"context in {options.prompts}, {place}"))
        prompts.append(row)
    lengths = [(len(row), n_context) for row, n_context in ids]
    with whole(out) as temporary, tqdm(total=len(prompts), unit="prompt", disable=None) as bar:
        temporary.touch()  # a place that cannot be written is known before the work
        longest_first = sorted(range(len(ids)), key=lengths.__getitem__, reverse=True)  # what takes most memory
        for (_, n_context), group in groupby(longest_first, lengths.__getitem__):
            same = [*group]
            for batch in (same[i : i + ROWS] for i in range(0, len(same), ROWS)):
                steps = [*continued(model, [ids[number][0] for number in batch], n_context, options)]
                for column, number in enumerate(batch):
                    tokens = [step[column] for step in steps if step[column] != start]
                    prompts[number]["text"] = model.task.decode(tokens).decode(errors="replace")
                    total += len(tokens)
                bar.update(len(batch))
        temporary.write_text("".join(to_json(row) + "\n" for row in prompts), encoding="utf-8")
    return total


def prompts_of(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """The prompts of a file, and their contexts, with their places in it; raises ValueError for rows without."""
    from zoo.tasks.text import sources

    with sources.named(str(path)):
        if sources.kind(path) not in sources.TABLES:
            with sources.opened(path) as file:
                lines = file.read().decode("utf-8-sig").removesuffix("\n").split("\n")
            yield from ((f"line {number}", {"prompt": line.rstrip("\r")}) for number, line in enumerate(lines, 1))
            return
        for place, row in sources.rows(path, KEYS):
            texts = {key: row[key] for key in KEYS if row.get(key) is not None}
            if "prompt" not in texts or not all(isinstance(text, str) for text in texts.values()):
                raise ValueError(f"{place}: give a text as prompt, and as context where the task has one")
            yield place, {key: utf8(text) for key, text in texts.items()}


def utf8(text: str) -> str:
    """`text`; raises ValueError where the shell gave bytes that are no UTF-8."""
    text.encode()
    return text


def visible(character: str) -> str:
    """The character, a mark in place of those that command a terminal: models emit any byte."""
    return character if character in "\n\t" or unicodedata.category(character) != "Cc" else "\N{REPLACEMENT CHARACTER}"


if __name__ == "__main__":
    sys.exit(main())
