"""A pretrained Llama as the W0 of a model: frozen, named in checkpoints by its SHA256, and never stored in them.

A folder of `transformers` is read as data, config.json, tokenizer.json and safetensors, without that package. Its ids
become those of zoo.tasks.text.tokenizer, so rows of its embedding and head change places: START has the row of the
token that begins its texts, and so has a byte that it lacks; other added tokens are left out.
Axes: V ids there, D model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from zoo.config import lookup, show
from zoo.core.decoder import Decoder, Sizes
from zoo.files import home
from zoo.models import MODELS, Model
from zoo.tasks import TASKS
from zoo.tasks.text import tokenizer
from zoo.tasks.text.corpus import START
from zoo.tasks.text.sources import named
from zoo.tasks.text.tokenizer import SIGNS, Tokenizer

NAMES = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
NAMES = {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in NAMES.items()}
BLOCK = {"norm1.weight": "input_layernorm.weight", "norm2.weight": "post_attention_layernorm.weight"}
BLOCK |= {f"attention.{name}.weight": f"self_attn.{name}_proj.weight" for name in "qkvo"}
FFN = {f"ffn.{name}": f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
OWN = "decoder.context_to_delta."


def import_llama(folder: str | Path, layers: int | None = None) -> Decoder:
    """The Llama model of a folder as a decoder of the zoo, which the lens reads, or its first `layers`: of safetensors,
    one or several, tied or not. Raises ValueError, naming it, for an option that the zoo's decoder does not have."""
    folder = home(folder)
    with named(str(folder)):
        return _decoder(folder, *_config(folder), layers)


def _decoder(folder: Path, config: dict[str, Any], sizes: dict[str, Any], layers: int | None) -> Decoder:
    kept, V = sizes["layers"] if layers is None else layers, config["vocab_size"]
    if not 0 < kept <= sizes["layers"]:
        raise ValueError(f"model.layers={kept} must be 1 to {sizes['layers']}, the layers it has")
    files = sorted(folder.glob("*.safetensors"))
    if sizes["layers"] > (held := sum(len([*safe_open(file, "pt").keys()]) for file in files)):
        raise ValueError(f"config.json names {sizes['layers']} layers, and the files hold {held} weights")
    tokens = {"vocabulary": V, "token_dim": None, "output_dim": V, "n_context": 0}
    tokens |= {"independent_queries": False, "filled": False}
    with torch.device("meta"):
        decoder = Decoder(Sizes(**sizes | {"layers": kept}), SimpleNamespace(**tokens))
    names = {theirs: ours for ours, theirs in NAMES.items()}
    for layer in range(sizes["layers"]):
        own = (BLOCK | FFN).items()
        names |= {f"model.layers.{layer}.{theirs}": f"blocks.{layer}.{ours}" for ours, theirs in own}
    shapes = {name: p.shape for name, p in decoder.named_parameters(remove_duplicate=False)}
    state: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                if name not in names:
                    raise ValueError(f"{file.name}: {show(name)} is no weight of a Llama of {sizes['layers']} layers")
                if names[name] in shapes:
                    tensor = opened.get_tensor(name)
                    state[names[name]] = (tensor.mT if name.endswith("down_proj.weight") else tensor).contiguous()
    if sizes["tied"]:
        state["head.weight"] = state.get("embedding.weight", torch.empty(0))
    for name, wanted in shapes.items():
        if name not in state or state[name].shape != wanted:
            shape = tuple(state[name].shape) if name in state else "missing"
            raise ValueError(f"{name} must be of shape {tuple(wanted)}, it is {shape}")
    decoder.load_state_dict(state, assign=True)
    if sizes["tied"]:
        decoder.head.weight = decoder.embedding.weight
    return decoder.requires_grad_(False).eval()


def _config(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What config.json says of a Llama, and its sizes by our names."""
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise ValueError("no config.json with *.safetensors lies there: other formats are not read")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    D, heads = config["hidden_size"], config["num_attention_heads"]
    plain: dict[str, Any] = {"model_type": ("llama",), "hidden_act": ("silu", None), "head_dim": (D // heads, None)}
    plain |= {"attention_bias": (False, None), "mlp_bias": (False, None)}
    found = {name: config.get(name) for name, values in plain.items() if config.get(name) not in values}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        found["rope_scaling"] = rope
    if found:
        differs = ", ".join(f"{name}={show(value)}" for name, value in found.items())
        raise ValueError(f"{differs} is not of the zoo's decoder")
    return config, {
        "dim": D,
        "layers": config["num_hidden_layers"],
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "hidden": config["intermediate_size"],
        "tied": bool(config.get("tie_word_embeddings")),
        "theta": float(rope.get("rope_theta", config.get("rope_theta", 1e4))),
        "eps": float(config.get("rms_norm_eps", 1e-6)),
    }


class Base(NamedTuple):
    """A W0. sizes: options of a model; weights: of its decoder, in float32; sha256: of all that; tokenizer: its own."""

    sizes: dict[str, Any]
    weights: dict[str, Tensor]
    sha256: str
    tokenizer: Tokenizer


def read(folder: str | Path, layers: int | None = None) -> Base:
    """The model of a folder, or its first layers, with rows by our ids; raises ValueError where it has another form."""
    folder = home(str(folder))  # a folder may be called 5
    with named(str(folder)):
        config, sizes = _config(folder)
        decoder, words = _decoder(folder, config, sizes, layers), tokenizer.read(str(folder / "tokenizer.json"))
        ids_V = torch.tensor(_ids(folder, words, config), dtype=torch.int64)
    sizes["layers"] = len(decoder.blocks)
    weights = {name: tensor.detach().float() for name, tensor in decoder.named_parameters()}  # a tied head once
    weights |= {name: weights[name][ids_V] for name in ("embedding.weight", "head.weight") if name in weights}
    digest = hashlib.sha256(json.dumps(sizes, sort_keys=True).encode())
    for name in sorted(weights):
        digest.update(f"{name} {tuple(weights[name].shape)}\n".encode())
        digest.update(weights[name].contiguous().view(-1).numpy().data)
    return Base(sizes, weights, digest.hexdigest(), words)


def _ids(folder: Path, words: Tokenizer, config: dict[str, Any]) -> list[int]:
    """The id there of each of ours."""
    theirs = json.loads((folder / "tokenizer.json").read_bytes())["model"]["vocab"]
    texts = [token.decode("latin-1").translate(SIGNS) for token in words.spelled]
    start = next((config[name] for name in ("bos_token_id", "eos_token_id") if type(config.get(name)) is int), None)
    if start is None:
        raise ValueError("config.json has no bos_token_id, which texts begin with")
    if lost := [text for text in texts[START + 1 :] if type(theirs.get(text)) is not int]:
        raise ValueError(f"tokenizer.json has no id for {show(lost[0])}")
    ids = [theirs.get(text, start) for text in texts]
    if (highest := max(ids)) >= config["vocab_size"] or min(ids) < 0:
        raise ValueError(f"tokenizer.json has ids up to {highest}, the model has {config['vocab_size']}")
    return ids


def decided(asked: Any, saved: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The options model and task of a run with what model.base=DIR decides, which becomes its SHA256; saved: options of
    the model that the run goes on with. Raises ValueError, naming both, for what was given besides and differs."""
    given, task = dict(asked.model), dict(asked.task)
    folder = given.get("base")
    if saved is not None:  # its options are written down
        if saved.get("base") and not folder:
            raise ValueError(_missing(saved["base"]))
        return {"model": given | {"base": read(folder, saved["layers"]).sha256} if folder else given}
    if not folder:
        return {}
    if asked.budget:
        raise ValueError(f"budget={asked.budget} decides model.hidden, and so does model.base: give budget=null")
    if not lookup(task.get("name"), TASKS, "task").has_text:
        raise ValueError(f"model.base needs a task of text, as text or prompts, not task.name={task['name']}")
    base = read(folder, given.get("layers"))
    own = {"tokenizer": "base", "vocabulary": len(base.tokenizer.spelled)}
    if (kind := task.get("tokenizer")) not in (None, "base"):
        other = tokenizer.read(kind) if str(kind).endswith(".json") else Tokenizer()
        if other.content != base.tokenizer.content:
            size = task.get("vocabulary") or len(other.spelled)
            wanted = f"that of model.base={folder}, of {own['vocabulary']}"
            raise ValueError(f"task.tokenizer={show(kind)} of {size} ids is not {wanted}: leave it away")
        task["tokenizer"] = None
    _fits(given, base.sizes, "model", folder)
    _fits(task, own, "task", folder)
    return {"model": given | base.sizes | {"base": base.sha256}, "task": task | own}


def _fits(given: Mapping[str, Any], own: Mapping[str, Any], group: str, folder: Any) -> None:
    for name, value in own.items():
        if given.get(name) not in (None, value):
            wanted = f"model.base={folder} has {show(value)}"
            raise ValueError(f"{group}.{name}={show(given[name])}, but {wanted}: leave {group}.{name} away")


def _missing(sha256: str) -> str:
    wants = f"W0 is a pretrained model that no checkpoint holds, SHA256 {show(sha256)}"
    return f"{wants}: name its folder, by model.base=DIR in train.py, --base DIR in other commands, base=DIR in Python"


def built(family: type[Model], options: dict[str, Any], folder: str | Path | None) -> Model:
    """The model of the options model, task, optim and seed. On a base, which `folder` must hold where weights take
    memory, its decoder is frozen and no part of its state dict. Raises ValueError for another base, or none, and for a
    family that adds nothing to it."""
    own = options["model"]
    if (sha256 := own.get("base")) is None:
        return family(**options)
    base = None
    if torch.get_default_device().type != "meta":
        if folder is None:
            raise ValueError(_missing(sha256))
        base = read(folder, own.get("layers"))
        if base.sha256 != sha256 or any(own.get(name) != value for name, value in base.sizes.items()):
            raise ValueError(f"W0 is the pretrained model of SHA256 {show(sha256)}; {folder} holds {base.sha256}")
    model = family(**options)
    if model.decoder.context_to_delta is None or model.decoder.blocks[0].ffn.blocks > 1:
        others = ", ".join(name for name in MODELS if name not in ("transformer", "moe"))
        raise ValueError(f"model.base stays as it is, and model={own['name']} adds nothing to it: take {others}")
    model.freeze_decoder()
    model.register_state_dict_post_hook(_leave_out)
    model.register_load_state_dict_post_hook(_not_missed)
    if base:
        model.decoder.load_state_dict(base.weights, strict=False)
        model.task.tokenizer = base.tokenizer  # type: ignore[attr-defined]
    return model


def _leave_out(model: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name in [name for name in state if not name.startswith(prefix + OWN)]:
        del state[name]


def _not_missed(model: Any, keys: Any) -> None:
    keys.missing_keys[:] = [name for name in keys.missing_keys if name.startswith(OWN)]


def trained_part(model: Model) -> str:
    """How much of a model is trained, "" where all of it is."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    total, trained = sum(size for size, _ in sizes), sum(size for size, free in sizes if free)
    return f"; {trained:,} of {total:,} parameters are trained" if trained < total else ""


def begun_on(model: Model) -> str:
    """A line on the base of a model, "" for one that has none."""
    base = model.config.base
    return f"\nW0 is pretrained, SHA256 {show(base)}{trained_part(model)}" if base else ""


def use(metrics: dict[str, Any]) -> str:
    """What zoo.load takes beside a checkpoint."""
    return ", base=DIR" if metrics["config"]["model"].get("base") else ""
