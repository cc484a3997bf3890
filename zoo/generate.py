"""Prints how a trained model continues a text: python -m zoo.generate runs/transformer-text/ID "The people"."""

from __future__ import annotations

import argparse
import codecs
import sys
import unicodedata
from collections.abc import Iterator

import zoo
from zoo.console import Parser, command, read


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m zoo.generate",
        description="Continue a text with a trained model. The text ends after --count tokens, or earlier where the "
        "model begins a new document.",
        epilog="Example: python -m zoo.generate runs/transformer-text/ID 'The people of' --count 400 --temperature 0.5",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("checkpoint", help="a .ckpt file, or a run folder: its best checkpoint")
    parser.add_argument("prompt", type=utf8, help="how the text begins; may be empty, ''")
    parser.add_argument("--context", type=utf8, help="a separate context, for tasks that have one, or @FILE")
    parser.add_argument("--count", type=int, default=200, help="how many tokens to add at most")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    parser.add_argument("--top-k", type=int, default=40, help="draw among this many likeliest tokens")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
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

    if options.seed.bit_length() > 63:
        raise ValueError(f"--seed {options.seed} must be a number of 64 bits")
    model = zoo.load(options.checkpoint)
    task, name = model.task, model.task.config.name
    ids = task.encode(options.prompt)
    start, context = ids[0], []
    if task.n_context:
        if options.context is None:
            raise ValueError(f"the model was trained on task.name={name} with a separate context: give --context")
        file = options.context.startswith("@")
        context = task.encode_context(read(options.context[1:]) if file else options.context)
    elif options.context is not None:
        raise ValueError(f"the model was trained on task.name={name} without a separate context: leave out --context")
    generator, tokens = torch.Generator().manual_seed(options.seed), torch.tensor([context + ids])
    following = model.generate(tokens, options.count, len(context), options.temperature, options.top_k, generator)
    yield options.prompt
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in following:
        if int(token) == start:
            break
        yield decoder.decode(task.decode([int(token)]))
    yield decoder.decode(b"", final=True)


def utf8(text: str) -> str:
    """`text`; raises ValueError where the shell gave bytes that are no UTF-8."""
    text.encode()
    return text


def visible(character: str) -> str:
    """The character, a mark in place of those that command a terminal: models emit any byte."""
    return character if character in "\n\t" or unicodedata.category(character) != "Cc" else "\N{REPLACEMENT CHARACTER}"


if __name__ == "__main__":
    sys.exit(main())
