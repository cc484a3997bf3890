"""Prints how a trained model continues a text: python -m zoo.generate runs/transformer-text/ID "The people"."""

from __future__ import annotations

import argparse
import codecs
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import zoo
from zoo.console import Parser, command


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m zoo.generate",
        description="Continue a text with a trained model. The text ends after --count tokens, or earlier where the "
        "model begins a new document.",
        epilog="Example: python -m zoo.generate runs/transformer-text/ID 'The people of' --count 400 --temperature 0.5",
    )
    parser.add_argument("checkpoint", help="a .ckpt file, or a run folder: its best checkpoint")
    parser.add_argument("prompt", help="how the text begins; may be empty, ''")
    parser.add_argument("--context", metavar="TEXT", help="a separate context, for tasks that have one; @FILE reads it")
    parser.add_argument("--count", type=int, default=200, help="how many tokens to add at most (default: %(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0: always the likeliest token (default: %(default)s)"
    )
    parser.add_argument(
        "--top-k", type=int, default=40, help="draw among this many likeliest tokens (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: %(default)s)")
    return parser.parse_args(argv)


@command
def main(argv: list[str] | None = None) -> int:
    """Prints prompt and continuation as it comes; returns the exit code: 2, with one line on stderr, for mistakes."""
    options = parse(argv)
    for piece in pieces(options):
        print("".join(map(visible, piece)), end="", flush=True)
    print()
    return 0


def pieces(options: argparse.Namespace) -> Iterator[str]:
    """The prompt, then what each token adds; a character of several tokens comes with its last one."""
    import torch  # after the options are read: --help is quick

    model = zoo.load(options.checkpoint)
    task, name = model.task, model.task.config.name
    for given in (options.prompt, options.context or ""):
        try:
            given.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{given!r:.80} is no UTF-8 text: {error.reason}") from None
    ids = task.encode(options.prompt)
    start, context = ids[0], []
    if task.n_context:
        if options.context is None:
            raise ValueError(f"the model was trained on task.name={name} with a separate context: give --context")
        context = task.encode_context(read(options.context))
    elif options.context is not None:
        raise ValueError(f"the model was trained on task.name={name} without a separate context: leave out --context")
    if not 0 <= options.seed < 2**63:
        raise ValueError(f"--seed={options.seed} must lie between 0 and 2^63 - 1")
    following = model.generate(
        torch.tensor([context + ids]),
        options.count,
        len(context),
        options.temperature,
        options.top_k,
        torch.Generator().manual_seed(options.seed),
    )
    yield options.prompt
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in following:
        if int(token) == start:
            break
        yield decoder.decode(task.decode([int(token)]))
    yield decoder.decode(b"", final=True)


def read(text: str) -> str:
    """`text`, or the content of FILE for @FILE."""
    if not text.startswith("@"):
        return text
    try:
        return Path(text[1:]).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--context={text} is no UTF-8 text: {error.reason} at byte {error.start}") from None


def visible(character: str) -> str:
    """The character, a mark in place of those that command a terminal: models emit any byte."""
    return character if character in "\n\t" or unicodedata.category(character) != "Cc" else "\N{REPLACEMENT CHARACTER}"


if __name__ == "__main__":
    sys.exit(main())
