"""The weights that a new run begins with: those of another, whose one FFN may become the experts of a mixture."""

from __future__ import annotations

import torch

from zoo.config import show
from zoo.models import Model
from zoo.records.pretrained import trained_part
from zoo.training import checkpoint, validate


def take_weights(model: Model, path: str) -> str:
    """Gives a new model the weights of the run or checkpoint `path` and returns one line on that.

    The family's own weights stay new where the run has none. The FFN of a run without experts becomes every expert of a
    mixture, which is the same function then (Komatsuzaki et al. 2022, arXiv 2212.05055). Raises ValueError where names
    or shapes do not fit, and for a mixture whose weights do not sum to 1.
    """
    file = checkpoint.find(path, "best")
    saved = checkpoint.read(file)
    with torch.device("meta"):
        source = validate.build(saved["hyper_parameters"])
    given, ours = saved["state_dict"], model.state_dict()
    experts, said = model.decoder.blocks[0].ffn.blocks, ""
    if experts > source.decoder.blocks[0].ffn.blocks == 1:
        given = {name: w.repeat(experts, 1) if ".ffn." in name else w for name, w in given.items()}
        said = f"; each of {experts} experts begins as its FFN"
    new = [name for name in ours if name not in given]
    wrong = [
        f"{name} {_shape(given[name])}, here {_shape(ours.get(name))}" for name in given if _unlike(given, ours, name)
    ]
    wrong += [f"{name}, which it lacks" for name in new if not name.startswith("decoder.context_to_delta.")]
    if wrong:
        more = f" and {len(wrong) - 1} more" if wrong[1:] else ""
        if said and source.config.hidden != model.config.hidden:
            more += f"; its FFN has model.hidden={source.config.hidden}"
        raise ValueError(f"init={show(path)} does not fit model={model.config.name}: {wrong[0]}{more}")
    model.load_state_dict({**ours, **given})
    if said:
        _check_sum(model, path)
    own = f"; the {len(new)} weights of {model.config.name} alone are new" if new else ""
    return f"begins with the weights of {file}{said}{own}{trained_part(model)}"


def _shape(weight: torch.Tensor | None) -> str:
    return "none" if weight is None else str(tuple(weight.shape))


def _unlike(given: dict[str, torch.Tensor], ours: dict[str, torch.Tensor], name: str) -> bool:
    return name not in ours or ours[name].shape != given[name].shape


def _check_sum(model: Model, path: str) -> None:
    """Raises ValueError if the weights of a token's experts do not sum to 1."""
    batch = model.task.batch("train", 0, 2)
    with torch.no_grad():
        patches = model.decoder(batch.tokens, batch.n_context)[1]
    sums = torch.cat([patch.routing.weight.sum(-1).flatten() for patch in patches if patch.routing])
    if (sums - 1).abs().max() > 1e-3:
        advice = "take model.renormalise=true and model.shared=0"
        raise ValueError(
            f"init={show(path)} as experts needs weights that sum to 1, not to {float(sums[0]):.3g}: {advice}"
        )
