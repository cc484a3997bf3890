"""python -m zoo.analyze on a folder of a `transformers` model: a prompt as a patch and a LoRA, and answers under it.

Axes: B queries, T tokens, n tokens of the prompt, V vocabulary.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.config import lookup, show
from zoo.console import read, say
from zoo.core.patch import Patch
from zoo.files import named
from zoo.hf.distil import distil
from zoo.hf.lora import save_lora, truncated
from zoo.hf.prompt import FORMS, RIDGES, Prompt, Score, batches, choose, judged, score
from zoo.hf.wrapped import Wrapped
from zoo.lens import report as pages
from zoo.lens.patch_file import describe, load_patch, save_patch
from zoo.tasks.text.sources import named as readable

SAY = 8
"""Tokens of an answer."""
HOW = ("with the patch", "without")


def load(folder: str | Path, kind: type[Wrapped] = Wrapped) -> Any:
    """The model of a folder, wrapped, and its tokenizer: nothing is fetched, no code in it runs, no pickle is read."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise ValueError("models of transformers need: python -m pip install -c constraints.txt -e '.[hf]'") from None
    own: Any = {"local_files_only": True, "trust_remote_code": False}
    how: Any = {"use_safetensors": True, "dtype": "auto", "output_loading_info": True}
    with readable(str(folder)):
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, **how, **own)
        model, found = loaded
        if lost := sorted(found["missing_keys"]):  # which the library draws at random
            raise ValueError(f"{len(lost)} weights of the model of its config.json are missing, as {lost[0]}")
        tokenizer = AutoTokenizer.from_pretrained(folder, **own)
    return kind(model.requires_grad_(False).eval(), tokenizer)


def ids(model: Wrapped, text: str, first: bool = False) -> list[int]:
    """The tokens of a text; first: with those that the tokenizer puts in front of all."""
    tokens: list[int] = model.tokenizer(text, add_special_tokens=first)["input_ids"]
    if (highest := max(tokens, default=0)) >= model.decoder.vocabulary:
        raise ValueError(f"the tokenizer has ids up to {highest}, the model has {model.decoder.vocabulary}")
    return tokens


def lines(path: Path) -> list[str]:
    """The lines of a file that are not blank."""
    return [line for line in read(path).splitlines() if line.strip()]


def split(queries: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """Three fifths to fit on, one to choose on, one to report on, in an order drawn from seed 0."""
    order = torch.randperm(len(queries), generator=torch.Generator().manual_seed(0)).tolist()
    fifth = len(queries) // 5
    drawn = [queries[k] for k in order]
    return drawn[: -2 * fifth], drawn[-2 * fifth : -fifth], drawn[-fifth:]


def patch(options: argparse.Namespace) -> None:
    if options.queries is None:
        raise ValueError("--queries FILE is missing: sample queries of the prompt, one on each line")
    queries = lines(options.queries)
    if len(queries) < 20:
        raise ValueError(f"{options.queries} holds {len(queries)} queries: 20 at least are split into three parts")
    if (options.lora is None) != (options.rank is None):
        raise ValueError("--lora DIR and --rank R come together")
    plain = not options.form or not lookup(options.form, FORMS, "form of a patch of a prompt").bias
    if options.lora and (options.rank < 1 or not plain or options.lora.is_file()):  # said before the fit
        raise ValueError("--lora DIR is a folder, of --rank 1 or more, and takes a --form without biases")
    named(options.out)
    if options.distil is not None and (options.lora is None or options.distil < 1):
        raise ValueError("--distil STEPS, at least 1, trains the adapter of --lora DIR: name both")
    forms = [options.form] if options.form else ["sink-null"] if options.lora else [*FORMS]
    model = load(options.checkpoint)
    if options.lora:
        truncated(model, [Patch()] * len(model.decoder.blocks), options.rank)  # refused before the fit
    prompt = Prompt(model, torch.tensor(ids(model, read(options.context), first=True)), options.keep_first)
    samples, others, held_out = (batches(part) for part in split([ids(model, line) for line in queries]))
    form, ridge, patches = choose(prompt, samples, others, forms, RIDGES if options.ridge is None else [options.ridge])
    rows = compare(prompt, samples, held_out) | {f"{form}, ridge {ridge:g}": judged(prompt, held_out, patches, form)}
    about = {"form": form, "ridge": ridge, "context": options.context.name, "tokens": len(prompt.tokens)}
    save_patch(options.out, patches, model, **about, kept=prompt.tokens[: prompt.keep].tolist())
    if options.lora:
        if options.distil is not None:
            patches = distil(prompt, samples, others, truncated(model, patches, options.rank), options.distil)
        held = save_lora(options.lora, model, patches, options.rank, prompt)
        rows[f"LoRA of rank {options.rank}, {options.lora}"] = judged(prompt, held_out, held, "sink-null")
    say(f"{options.out}: stands for {len(prompt.tokens) - prompt.keep} tokens, {prompt.keep} stay in front of queries")
    width = max(map(len, rows))
    say(f"{f'on {sum(map(len, held_out))} held-out queries':{width}}  KL, nats  same first token")
    for name, (kl, top1) in rows.items():
        say(f"{name:{width}}  {kl:8.3f}  {top1:.2f}")


def compare(prompt: Prompt, samples: Sequence[Tensor], queries: Sequence[Tensor]) -> dict[str, Score]:
    """What a patch is measured by: nothing, the same words in disorder, a vector, and the prompt."""
    goals = [prompt.logits(tokens) for tokens in queries]
    kept, rest = prompt.tokens[: prompt.keep], prompt.tokens[prompt.keep :]
    order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(0)).to(rest.device)
    wrong = Prompt(prompt.model, torch.cat([kept, rest[order]]), prompt.keep)
    rows = {
        "the prompt": score(goals, goals),
        "no prompt": judged(prompt, queries, [Patch()] * len(prompt.model.decoder.blocks)),
        "wrong prompt, its tokens in another order": score(goals, [wrong.logits(tokens) for tokens in queries]),
    }
    if all(block.ffn.experts is None for block in prompt.model.decoder.blocks):  # which have no place for biases
        rows["steering vector"] = judged(prompt, queries, prompt.fit(samples, "vector", 1.0))
    return rows


def report(options: argparse.Namespace) -> None:
    from zoo.hf.reading import FIGURES, Reading

    if options.text is None or len(options.runs) > 1:
        raise ValueError("a report on a model of transformers takes one MODEL_DIR and --text FILE")
    source = Path(options.runs[0])
    model = load(source, Reading)
    model.about(ids(model, read(options.text)), options.text.name)
    folder = options.out or source / "report"
    content = pages.write({source.resolve().name: model}, folder, {source.resolve().name: source}, FIGURES)
    say(pages.table(content["numbers"]))
    say(f"\n{len(content['figures'])} figures, report.md and report.json in {folder}")


def apply(options: argparse.Namespace) -> None:
    model = load(options.checkpoint)
    about, patches = describe(options.patch)["about"], load_patch(options.patch, model)
    kept, places = about.get("kept"), about.get("tokens")
    known = isinstance(kept, list) and all(type(k) is int and 0 <= k < model.decoder.vocabulary for k in kept)
    if not known or type(places) is not int:
        raise ValueError(f"{options.patch} does not say which tokens stay in front: it is no patch of a prompt")
    say(f"patch of {show(about.get('context'))}, after {model.tokenizer.decode(kept)!r}", sys.stderr)
    prompt = Prompt(model, torch.tensor([*kept, *[kept[0] if kept else 0] * (places - len(kept))]), len(kept))
    nothing = [Patch()] * len(patches)
    for line in lines(options.query):
        query = torch.tensor([ids(model, line)])
        answers = [greedy(partial(prompt.logits, patches=under), query)[0] for under in (patches, nothing)]
        say("\t".join(f"{how} {model.tokenizer.decode(answer)!r}" for how, answer in zip(HOW, answers, strict=True)))


def greedy(logits: Callable[[Tensor], Tensor], queries_BT: Tensor) -> Tensor:
    """The next tokens (B,SAY) of queries, each the likeliest; logits: of the token after queries, as Prompt's."""
    tokens = queries_BT
    for _ in range(SAY):
        tokens = torch.cat([tokens, logits(tokens).argmax(-1, keepdim=True)], 1)
    return tokens[:, queries_BT.shape[1] :]
