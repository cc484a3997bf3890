"""Travel: checkpoints of the zoo as folders of transformers, with their tokenizer, and Llama folders as decoders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import zoo
from hf_families import build, ids, relative
from zoo.core.exact import replace_context
from zoo.hf import export, import_llama, wrap
from zoo.hf.export import converted, tokenizer_of
from zoo.models import MODELS
from zoo.tasks.text.tokenizer import Tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")
TASK = {"name": "text", "tokens": 32, "domains": ["law"]}
SIZES = {"dim": 16, "layers": 2, "heads": 2, "hidden": 12}
MOE = {"experts": 4, "top_k": 2, "balance_weight": 0.0}
EXPORTED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "grouped heads": ("transformer", "llama", {"kv_heads": 1}),
    "tied": ("transformer", "llama", {"tied": True, "theta": 500.0, "eps": 0.01}),
    "renormalised": ("moe", "mixtral", MOE),
    "softmax": ("moe", "qwen2_moe", {**MOE, "renormalise": False}),
    "softmax, shared": ("moe", "qwen2_moe", {**MOE, "shared": 2}),
    "sigmoid, bias": ("moe", "glm4_moe", {**MOE, "score": "sigmoid", "bias_rate": 0.1}),
    "sigmoid, shared": ("moe", "glm4_moe", {**MOE, "score": "sigmoid", "shared": 1, "renormalise": False}),
    "one of softmax": ("moe", "qwen2_moe", {**MOE, "top_k": 1}),
}
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "model.score='linear'": ("moe", {**MOE, "score": "linear"}),
    "model.route_on='context'": ("moe", {**MOE, "route_on": "context"}),
    "model.bias_rate=0.1": ("moe", {**MOE, "bias_rate": 0.1}),
    "model.router='uniform'": ("moe", {**MOE, "router": "uniform"}),
    "model=hypernet": ("hypernet", {}),
}


def ours(name: str, options: dict[str, Any]) -> Any:
    model = MODELS[name]({"name": name, **SIZES, **options}, dict(TASK), {"steps": 1})
    biases = [b for name, b in model.named_buffers() if options.get("bias_rate") and name.endswith("bias")]
    with torch.no_grad():
        for tensor in (*model.parameters(), *biases):
            tensor.normal_(0, tensor.shape[-1] ** -0.5 if tensor.dim() > 1 else 0.3)
    return model.requires_grad_(False).eval()


@pytest.mark.parametrize("case", EXPORTED)
@torch.no_grad()
def test_logits_are_the_same_there(case: str) -> None:
    name, kind, options = EXPORTED[case]
    model, tokens = ours(name, options), ids(4, 32)
    theirs = converted(model)
    assert theirs.config.model_type == kind
    assert relative(theirs(tokens).logits, model(tokens)) <= 1e-5
    key = "model.layers.0.self_attn.v_proj.weight"
    theirs.state_dict()[key].mul_(1.1)
    assert relative(theirs(tokens).logits, model(tokens)) > 1e-3


@pytest.mark.parametrize("option", REFUSED)
def test_what_no_architecture_holds_is_named(option: str) -> None:
    with pytest.raises(ValueError, match=option):
        converted(ours(*REFUSED[option]))
    model = ours("moe", MOE)
    model.decoder.context_to_delta.routers[0].bias += 0.1
    with pytest.raises(ValueError, match="softmax with a selection bias"):
        converted(model)
    model = MODELS["transformer"]({"name": "transformer", **SIZES}, {"name": "regression"}, {"steps": 1})
    with pytest.raises(ValueError, match=r"task\.name=regression is not running text"):
        converted(model)


@torch.no_grad()
def test_a_checkpoint_speaks_there(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    export("text/transformer", tmp_path / "dir")
    model, theirs = zoo.load("text/transformer"), AutoModelForCausalLM.from_pretrained(tmp_path / "dir")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "dir")
    text = "The people of the United States, naïve as ever → 42 times.\n\tNew  line"
    tokens = model.task.encode(text)
    assert tokenizer(text)["input_ids"] == tokens
    assert tokenizer.decode(tokens, skip_special_tokens=True) == text
    goal = model(torch.tensor([tokens]))
    assert relative(theirs(torch.tensor([tokens])).logits, goal) <= 1e-5
    said = pipeline("text-generation", model=theirs, tokenizer=tokenizer)(text, max_new_tokens=8, do_sample=False)
    expected = [int(new) for new in model.generate(torch.tensor([tokens]), 8)]
    assert said[0]["generated_text"] == text + model.task.decode(expected).decode("utf-8", "replace")

    decoder, query = import_llama(tmp_path / "dir"), torch.tensor([tokens])
    assert relative(decoder(query)[0], goal) <= 1e-6
    patches = replace_context(decoder, query, query.shape[1] - 1)
    found = decoder(query[:, -1:], patches=patches, positions=torch.tensor([query.shape[1] - 1]))[0]
    assert relative(found, goal[:, -1:]) <= 1e-5
    wrapped = wrap(theirs)
    assert relative(wrapped(query[:, -1:], patches=wrapped.deltas(query, query.shape[1] - 1)), goal[:, -1:]) <= 1e-5


def test_merges_cut_text_as_ours_do() -> None:
    merges = [[116, 104], [257, 101], [32, 258], [195, 169], [101, 114], [46, 10]]
    mine = Tokenizer(merges)
    theirs = tokenizer_of(mine)
    for text in ("the other thé", "é→the.\n\nthe", "  the\tthere 12the", "\x7f\x00the"):
        assert theirs(text)["input_ids"] == [int(i) for part in mine.encode([text.encode()]) for i in part]
        assert theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True) == text


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}, {"rope_theta": 5e5, "rms_norm_eps": 1e-5}])
@torch.no_grad()
def test_a_llama_comes_home(options: dict[str, Any], tmp_path: Path) -> None:
    model = build("llama", options, torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    tokens = ids(2)
    decoder = import_llama(tmp_path)
    assert relative(decoder(tokens)[0], model(tokens).logits) <= 1e-6
    decoder.blocks[0].attention.theta *= 2
    assert relative(decoder(tokens)[0], model(tokens).logits) > 1e-3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"attention_bias": True}, "attention_bias=True"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling=.*llama3"),
        ({"model_type": "qwen2"}, "model_type='qwen2'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"head_dim": 16}, "head_dim=16"),
        ({"intermediate_size": 40}, r"ffn.gate must be of shape \(40, 32\), it is \(48, 32\)"),
        ({"num_hidden_layers": 2}, "model.layers.2.*is no weight of a Llama of 2 layers"),
    ],
)
def test_other_llamas_are_refused_by_name(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    build("llama", {}, torch.float32).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=words):
        import_llama(tmp_path)


def test_pickles_are_never_read(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (tmp_path / "opened").touch, ()

    model = build("llama", {}, torch.float32)
    model.save_pretrained(tmp_path)
    torch.save({"model.norm.weight": Evil()}, tmp_path / "pytorch_model.bin")
    assert torch.equal(import_llama(tmp_path).norm.weight, model.model.norm.weight)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="other formats are not read"):
        import_llama(tmp_path)
    assert not (tmp_path / "opened").exists()
