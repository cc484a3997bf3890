"""Prompts as patches of foreign models: the stream against all samples at once, the sink, adapters that peft loads."""

from __future__ import annotations

import json
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from hf_families import Kept64, build, family, ids, relative
from zoo import analyze
from zoo.bench import __main__ as bench
from zoo.core.patch import Patch
from zoo.hf import commands, distil, wrap
from zoo.hf.export import tokenizer_of
from zoo.hf.lora import save_lora, truncated
from zoo.hf.prompt import FORMS, Prompt, batches, choose, judged, score
from zoo.lens import static
from zoo.lens.patch_file import describe, load_patch, save_patch
from zoo.tasks.text.tokenizer import Tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")
N = 10
FILES = "--context context.txt --queries queries.txt --out P"


def sentences(rows: int, tokens: int = 3, seed: int = 5) -> Tensor:
    return ids(rows, tokens, seed)


@pytest.mark.parametrize("form", static.STATIC_FORMS)
def test_moments_hold_all_that_a_fit_needs(form: str) -> None:
    what, generator = static.STATIC_FORMS[form], torch.Generator().manual_seed(0)
    a, y = (torch.randn(50, size, generator=generator, dtype=torch.float64) + 1 for size in (12, 7))
    moments = static.Moments()
    for part_a, part_y in zip(a.split(17), y.split(17), strict=True):
        moments.add(part_a, part_y)
    low_rank, bias = moments.solve(what, 0.01)
    expected, expected_bias = static.solve(a, y, what, 0.01)
    W = torch.zeros(7, 12, dtype=torch.float64)
    torch.testing.assert_close(low_rank.dense(W), expected.dense(W), rtol=0, atol=1e-10)
    torch.testing.assert_close(bias, expected_bias, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["Llama, tied, biases", "OLMo 2", "Mixtral", "GPT-2"])
@pytest.mark.parametrize("form", ["matrix", "output"])
@torch.no_grad()
def test_a_stream_of_samples_fits_what_all_at_once_do(name: str, form: str) -> None:
    """The twin holds every state of every layer, and knows no caches."""
    model, context, queries = wrap(family(name)), ids(1, N), sentences(40)
    with Kept64():
        together = torch.cat([context.expand(40, -1), queries], 1)
        expected = static.fit(model.decoder, together, N, form, 0.01)
        prompt = Prompt(model, context[0], keep=0)
        found = prompt.fit(list(queries.split(16)), form, 0.01)
        other = sentences(8, seed=6)
        goal = model(other, added=expected, positions=prompt.places(other))[:, -1]
        assert relative(prompt.logits(other, found), goal) <= 1e-8
        assert relative(prompt.logits(other, [Patch()] * 3), goal) > 0.03


@torch.no_grad()
def test_ten_thousand_samples_leave_sums_alone() -> None:
    """Beside the sums there are a few states of each query token, none of them by layer."""
    model, layers = wrap(build("llama", {"num_hidden_layers": 6, "intermediate_size": 256}, torch.float32)), 6
    prompt = Prompt(model, ids(1, N)[0])

    def grown(rows: int) -> int:
        samples = list(sentences(rows, 4).split(250))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        prompt.fit(samples, "output", 0.1)
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024

    grown(500)
    held = 10_000 * 4 * layers * (3 * 32 + 256) * 4  # z, v, out and h of all samples
    assert grown(10_000) < held / 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["affine", "output", "sink-null"])
def test_a_prompt_of_a_model_of_16_bits(form: str, dtype: torch.dtype) -> None:
    model, queries = wrap(family("Llama", dtype)), [sentences(40)]
    prompt = Prompt(model, ids(1, N)[0])
    patches = prompt.fit(queries, form, 0.03)
    nothing, found = (commands.judged(prompt, queries, under, form).kl for under in ([Patch()] * 3, patches))
    assert found < 0.5 * nothing


@torch.no_grad()
def test_a_patch_that_is_null_at_the_sink_leaves_it_alone_as_plain_weights() -> None:
    model, context = wrap(family("Llama")), ids(1, N)[0]
    prompt, queries = Prompt(model, context), list(sentences(40).split(16))
    first = context[None, :1]
    alone = model(first)
    for form, least, most in (("sink-null", 0.0, 1e-10), ("matrix", 1e-3, 9.0)):
        with model.patched(prompt.fit(queries, form, 0.1)) as plain:
            changed = plain(input_ids=first, attention_mask=torch.ones(1, 1)).logits
        assert least <= relative(changed, alone) <= most


@torch.no_grad()
def test_the_form_is_chosen_on_other_queries() -> None:
    model, context = wrap(family("Llama", torch.float32)), ids(1, N)[0]
    prompt = Prompt(model, context)
    queries = batches(ids(240, 2, seed=8).tolist())[0]
    assert queries.shape == (64, 2)
    samples, others, held_out = (list(part.split(64)) for part in ids(240, 2, seed=8).split([160, 40, 40]))
    form, _, patches = choose(prompt, samples, others, FORMS, (0.03, 0.3))
    assert form in FORMS
    goals = [prompt.logits(tokens) for tokens in held_out]
    found = judged(prompt, held_out, patches, form)
    assert found.kl < 0.5 * judged(prompt, held_out, [Patch()] * 3).kl
    assert score(goals, goals) == (0.0, 1.0)
    wrong = Prompt(model, context.flip(0))
    assert found.kl < score(goals, [wrong.logits(tokens) for tokens in held_out]).kl


def test_mistakes_are_named() -> None:
    model, context = wrap(family("Llama")), ids(1, N)[0]
    prompt, experts = Prompt(model, context), Prompt(wrap(family("Mixtral")), context)
    for call, words in (
        (lambda: Prompt(model, context, keep=N), "keep_first=10 must lie between 0 and the 10 tokens"),
        (lambda: prompt.fit([sentences(4)], "afine"), "form of a patch of a prompt 'afine' .* did you mean affine"),
        (lambda: prompt.fit([sentences(4)], "matrix", 0), "ridge=0 must be above 0"),
        (lambda: prompt.fit([]), "no sample queries"),
        (lambda: Prompt(wrap(family("LFM2")), context), "in the cache of every layer.* LinearAttentionLayer"),
        (lambda: experts.fit([sentences(4)], "affine"), "has no bias in this model: take the form matrix or output"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    equal = prompt.fit([sentences(1, 1).expand(20, 1)], "vector", 1.0)
    assert all(bias.isfinite().all() for patch in equal for bias in patch.biases.values())


@pytest.mark.parametrize("name", ["Llama", "Phi3", "GPT-2", "GPT-NeoX", "Falcon"])
@pytest.mark.parametrize("merged", [False, True])
@torch.no_grad()
def test_a_patch_of_one_token_is_a_lora_of_rank_1(name: str, merged: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, tokens = wrap(family(name)), ids()
    goal = model(tokens)[:, -1:]
    patches = model.deltas(tokens, 23)
    save_lora(tmp_path / "lora", model, patches, 1)
    adapted = peft.PeftModel.from_pretrained(family(name), tmp_path / "lora", autocast_adapter_dtype=False)
    adapted = adapted.merge_and_unload() if merged else adapted
    named = model.decoder.inputs(tokens[:, 23:], None, torch.tensor([[23]]))
    assert relative(adapted(**named, use_cache=False).logits, goal) <= 1e-12
    assert relative(model(tokens[:, 23:], positions=torch.tensor([23])), goal) > 0.05


@torch.no_grad()
def test_a_chat_is_text_as_other_text_is(folder: Path) -> None:
    model = commands.load(folder)
    model.tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<bot>"
    chat = [{"role": "system", "content": "Say it backwards."}, {"role": "user", "content": "abc"}]
    text = model.tokenizer.apply_chat_template(chat, tokenize=False)
    tokens = torch.tensor([commands.ids(model, text)])
    assert tokens[0].tolist() == model.tokenizer.apply_chat_template(chat, tokenize=True)["input_ids"]
    removed = torch.arange(tokens.shape[1]) < len("<system>Say it backwards.\n")
    goal, query, at = model(tokens)[:, ~removed], tokens[:, ~removed], torch.where(~removed)[0]
    assert relative(model(query, patches=model.deltas(tokens, removed), positions=at), goal) <= 1e-5
    assert relative(model(query, positions=at), goal) > 0.05


@torch.no_grad()
def test_truncation_is_the_best_of_its_rank() -> None:
    model, prompt_tokens = wrap(family("Llama")), ids(1, N)[0]
    patches = Prompt(model, prompt_tokens).fit(list(sentences(60).split(32)), "sink-null", 0.03)
    full = [p.weights["down_proj"].dense(torch.zeros(())) for p in truncated(model, patches, 32)]
    for rank in (1, 4, 16):
        for whole, part in zip(full, truncated(model, patches, rank), strict=True):
            error = torch.linalg.matrix_norm(part.weights["down_proj"].dense(whole) - whole)
            expected = torch.linalg.svdvals(whole)[..., rank:].norm(dim=-1)
            torch.testing.assert_close(error, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_distillation_trains_a_lora_on_until_other_queries_suffer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrap(family(name, torch.float32))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    prompt, queries = Prompt(model, ids(1, N)[0]), ids(240, 2, seed=8).split([160, 40, 40])
    samples, others, held_out = ([part] for part in queries)
    lora = truncated(model, prompt.fit(samples, "sink-null", 0.3), 4)
    monkeypatch.setattr(distil, "RATE", 0.01)
    after = distil.distil(prompt, samples, others, lora, 60)
    old, new = (commands.judged(prompt, held_out, patches, "sink-null").kl for patches in (lora, after))
    assert new < 0.8 * old
    monkeypatch.setattr(distil, "RATE", 10.0)  # from the first step on it is worse
    for kept, start in zip(distil.distil(prompt, samples, others, lora, 20), lora, strict=True):
        for what, delta in start.weights.items():
            torch.testing.assert_close(kept.weights[what].dense(delta.u), delta.dense(delta.u))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.model.parameters())
    with pytest.raises(ValueError, match="steps=0 must be above 0"):
        distil.distil(prompt, samples, others, lora, 0)
    with pytest.raises(ValueError, match="no queries to train on"):
        distil.distil(prompt, [], others, lora, 1)


def test_what_is_no_lora_is_refused(tmp_path: Path) -> None:
    tokens = ids()
    for name, words in (("Gemma 3", "scale of the norm behind"), ("Mixtral", "experts")):
        model = wrap(family(name))
        with pytest.raises(ValueError, match=f"layer 0: a LoRA does not hold .*{words}"):
            save_lora(tmp_path / "lora", model, model.deltas(tokens, 23), 1)
    model = wrap(family("Llama"))
    with pytest.raises(ValueError, match="one for each of many tokens"):
        save_lora(tmp_path / "lora", model, model.deltas(tokens, 20), 1)
    with pytest.raises(ValueError, match="biases"):
        save_lora(tmp_path / "lora", model, [Patch(biases={"down_proj": torch.ones(1, 32)})] * 3, 1)
    with pytest.raises(ValueError, match="layer 0 has no c_proj: the patch is of another model"):
        save_lora(tmp_path / "lora", model, wrap(family("GPT-2")).deltas(tokens, 23), 1)
    assert not (tmp_path / "lora").exists()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of bytes with its tokenizer, a prompt, queries, and a text."""
    place = tmp_path_factory.mktemp("model")
    build("llama", {"vocab_size": 257}, torch.float32).save_pretrained(place)
    tokenizer_of(Tokenizer()).save_pretrained(place)
    (place / "context.txt").write_text("ab -> ba\ncd -> dc\n")
    (place / "queries.txt").write_text("".join(f"{a}{b} ->\n\n" for a in "abcdefgh" for b in "ijklm"))
    (place / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 4)
    return place


def command(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = analyze.main([*map(str, words)])
    return code, *capsys.readouterr()


def test_a_prompt_becomes_a_patch_and_a_lora_on_the_command_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peft = pytest.importorskip("peft")
    context, queries, out = folder / "context.txt", folder / "queries.txt", tmp_path / "p.safetensors"
    files = "--context", context, "--queries", queries, "--out", out
    code, said, _ = command(capsys, "patch", folder, *files, "--lora", tmp_path / "lora", "--rank", 32)
    assert code == 0
    kl = {line.split("  ")[0]: float(line.split()[-2]) for line in said.splitlines()[2:]}
    nulled = next(value for name, value in kl.items() if name.startswith("sink-null, ridge"))
    lora = next(value for name, value in kl.items() if name.startswith("LoRA of rank 32"))
    assert kl["the prompt"] == 0
    assert nulled < 0.7 * kl["no prompt"]
    assert nulled <= lora < kl["no prompt"]
    _, said, _ = command(capsys, "patch", folder, *files, "--lora", tmp_path / "more", "--rank", 32, "--distil", 20)
    assert 0 < float(said.split()[-2]) != lora

    model = commands.load(folder)
    patches = load_patch(out, model)
    about = describe(out)["about"]
    assert (about["form"], about["kept"], about["tokens"]) == ("sink-null", [256], 19)
    assert "whose position_ids begin at 19" in (tmp_path / "lora/README.md").read_text()
    adapted = peft.PeftModel.from_pretrained(commands.load(folder).model, tmp_path / "lora")
    tokens = torch.tensor([commands.ids(model, "xy ->", first=True)])
    with model.patched(truncated(model, patches, 32)) as plain, torch.no_grad():
        goal = plain(tokens).logits
    assert relative(adapted(tokens).logits, goal) <= 1e-5
    assert relative(model(tokens), goal) > 1e-2

    (tmp_path / "query.txt").write_text("xy ->\n\nab\n")
    code, said, _ = command(capsys, "apply", folder, "--patch", out, "--query", tmp_path / "query.txt")
    assert code == 0
    assert len(said.splitlines()) == 2
    assert all(line.startswith("with the patch '") and "\twithout '" in line for line in said.splitlines())


def test_a_patch_file_that_names_strange_tokens(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, file = commands.load(folder), tmp_path / "p.safetensors"
    for kept in ("a", 257, -1, 256):
        words = "a prompt of 100000 tokens" if kept == 256 else "it is no patch of a prompt"
        save_patch(file, [Patch(chunk=1)] * 3, model, kept=[kept], tokens=100_000, context="\x1b[2J")
        code, _, error = command(capsys, "apply", folder, "--patch", file, "--query", folder / "context.txt")
        assert code == 2
        assert words in error
        assert "\x1b" not in error


def test_weights_that_are_missing_are_not_drawn(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, tmp_path / "model")
    file = tmp_path / "model/model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"model: 1 weights .* are missing, as model.layers.1.mlp.up_proj.weight"):
        commands.load(tmp_path / "model")
    file.write_bytes(file.read_bytes()[:900])
    with pytest.raises(ValueError, match="model cannot be read: SafetensorError"):
        commands.load(tmp_path / "model")


def test_the_benchmark_times_patches_of_a_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench.main(["hf", "--quick", "--rounds", "1", "--model", str(folder)])
    said = capsys.readouterr().out
    for row, bar in (("deltas", "1.60"), ("by hooks", "1.20"), ("W + ΔW formed before", "1.05")):
        assert re.search(rf"LlamaForCausalLM, d=32, 3 layers, .* \| {re.escape(row)} / .*≤ {bar}", said)


def test_a_report_on_a_folder(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said, _ = command(capsys, "report", folder, "--text", folder / "text.txt", "--out", tmp_path / "report")
    assert code == 0
    assert "| effective rank of ΔW, last layer, down_proj | 1 |" in said
    law = json.loads((tmp_path / "report" / "law-residuals.json").read_text())
    values = {one["label"]: one["y"][0] for one in law["panels"][0]["series"]}
    assert values["float64"] <= 1e-12
    assert values["float32"] <= 5e-6
    assert values["control: no patch"] > 0.05 < values["control: another context"]
    strip = json.loads((tmp_path / "report" / "generation-strip.json").read_text())
    assert "W + ΔW: 64 of 64" in strip["caption"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("patch . --context context.txt --out P", "--queries FILE is missing"),
        ("patch . --context context.txt --queries context.txt --out P", "context.txt holds 2 queries: 20 at least"),
        (f"patch . {FILES} --rank 3", "--lora DIR and --rank R come together"),
        (f"patch . {FILES} --distil 3", "--distil STEPS, at least 1, trains"),
        (f"patch . {FILES} --lora P --rank 2 --distil 0", "--distil STEPS, at least 1, trains"),
        (f"patch . {FILES} --lora config.json --rank 2", "--lora DIR is a folder"),
        (f"patch . {FILES} --lora lora --rank 0", "of --rank 1 or more"),
        (f"patch . {FILES} --lora lora --rank 2 --form affine", "a --form without biases"),
        (f"patch . {FILES} --ridge 0", "ridge=0.0 must be above 0, and finite"),
        (f"patch . {FILES} --form matrix --ridge inf", "ridge=inf must be above 0, and finite"),
        (f"patch . {FILES.replace('context.', 'text.')}", "a prompt of 181 tokens and a query of 5: the model has 64"),
        (f"patch . {FILES[:-1]}.", "is a folder"),
        (f"patch . {FILES} --keep-first 19", "keep_first=19 must lie between 0 and the 19"),
        ("report .", "takes one MODEL_DIR and --text FILE"),
    ],
)
def test_mistakes_on_the_command_line(
    words: str, message: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    code, _, error = command(capsys, *words.split())
    assert code == 2
    assert message in error
    assert not (folder / "P").exists()
