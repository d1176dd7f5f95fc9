"""Longer contexts than a model was trained on, by the frequencies of its rotary embedding.

With theta_i = b ** (-2 i / d), L the length the model was trained on and s the factor:

    linear    theta_i / s                                                                        arXiv 2306.15595
    dynamic   theta of base b (s n / L - (s - 1)) ** (d / (d - 2)) for a batch n > L long       "NTK-aware", bloc97 2023
    yarn      theta_i (1 - g_i) + theta_i / s g_i; cos and sin times 0.1 ln s + 1                arXiv 2309.00071
              g_i rises from 0 to 1 in i between the channels that turn 32 times and once within L
    llama3    theta_i where it turns over 4 times within L, theta_i / s where under once, and    arXiv 2407.21783
              in between by turns
    longrope  theta_i / lambda_i, one list up to L and one beyond; cos and sin times             arXiv 2402.13753
              sqrt(1 + ln s / ln L)

The formulas are transformers'; this file edits the configuration before the model is built, and nothing else, so the
rotary module, its dtype and its place on a device are transformers' own and the fused attention, which takes cos and
sin, has a fused path for each. As in LLaMA-Factory s = ceil(cutoff_len / L), and a length that fits changes nothing.

What transformers 5 expects, and older editing code gets wrong: ``rope_theta`` lies in ``rope_parameters`` and must stay
there; lengths are integers; yarn, llama3 and longrope keep L in ``original_max_position_embeddings``, and like linear
raise ``max_position_embeddings``, whereas dynamic reads L from ``max_position_embeddings``, which therefore stays.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from fuselora.engine.errors import expected, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

KINDS = ("linear", "dynamic", "yarn", "llama3")  # longrope needs two searched lists, which a file of keys can't give


def scale_rope(
    config: PreTrainedConfig,
    kind: str,
    length: int,
    *,
    short_factor: Sequence[float] | None = None,
    long_factor: Sequence[float] | None = None,
) -> float | None:
    """Edit ``config`` so that a model built from it reads ``length`` tokens. Returns the factor, None if they fit.

    ``longrope`` takes its two lists of d / 2 divisors. A model that is scaled already can be scaled further in the same
    way. Layers with a window of their own keep their frequencies: they see no distance beyond it. Raises UserError.
    """
    config = config.get_text_config()
    trained = getattr(config, "max_position_embeddings", None)
    present = getattr(config, "rope_parameters", None)
    if not present or not trained:
        raise expected("rope_scaling", "a model with rotary positions", config.model_type, "drop the key")
    if length <= trained:
        return None
    factor = float(math.ceil(length / trained))
    lists = _longrope_lists(kind, short_factor, long_factor)
    parameters = copy.deepcopy(present)
    for entry in _global_entries(parameters):
        _scale_entry(entry, kind, factor, trained, lists)
    config.rope_parameters = parameters
    if kind != "dynamic":
        config.max_position_embeddings = trained * int(factor)
    try:
        config.validate_rope()
    except ValueError as error:  # of a family that knows one kind only: it would train and then could not be saved
        config.rope_parameters, config.max_position_embeddings = present, trained
        raise expected("rope_scaling", f"a kind that {config.model_type} has", first_line(error), "drop it") from error
    return factor


def _longrope_lists(kind: str, short: Sequence[float] | None, long: Sequence[float] | None) -> dict[str, list[float]]:
    if kind == "longrope" and short and long:
        return {"short_factor": list(short), "long_factor": list(long)}
    if kind not in KINDS:
        got = "longrope without them" if kind == "longrope" else repr(kind)
        raise expected("rope_scaling", ", ".join(KINDS) + ", or longrope with its two lists", got, "choose one")
    return {}


def _global_entries(parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of ``rope_parameters`` to scale: the whole, or of one entry per layer type those without a window."""
    if "rope_theta" in parameters or "rope_type" in parameters:
        return [parameters]
    return [entry for layers, entry in parameters.items() if entry is not None and "sliding" not in layers]


def _scale_entry(entry: dict[str, Any], kind: str, factor: float, trained: int, lists: dict[str, list[float]]) -> None:
    before = entry.get("rope_type", "default")
    if before == "default":
        entry.update(rope_type=kind, factor=factor, **lists)
        if kind in ("yarn", "llama3", "longrope"):
            entry["original_max_position_embeddings"] = trained
        if kind == "llama3":
            entry.update(low_freq_factor=1.0, high_freq_factor=4.0)
    elif before == kind == "dynamic":
        entry["factor"] = max(float(entry["factor"]), factor)
    elif before == kind != "longrope":
        entry["factor"] = float(entry["factor"]) * factor
    else:
        raise expected(
            "rope_scaling",
            f"{before}, as the model is scaled already" if before in KINDS else f"no key for a model with {before}",
            kind,
            f"choose {before} or a cutoff_len of at most {trained}" if before in KINDS else "lower cutoff_len",
        )


def describe(config: PreTrainedConfig, kind: str, length: int) -> str:
    """One line on what a model built from ``config`` does, after ``scale_rope(config, kind, length)``."""
    config = config.get_text_config()
    entries = _global_entries(config.rope_parameters)
    if any(entry.get("rope_type") == kind for entry in entries):
        return f"rope_scaling: {entries[0]}"
    return (
        f"rope_scaling: {length} tokens fit the model's {config.max_position_embeddings} positions; nothing is scaled"
    )


def follow_length(model: nn.Module) -> int:
    """Make dynamic NTK a function of the batch alone; returns how many rotary modules had to be told.

    transformers keeps the frequencies of the longest batch so far until one fits the trained length: in training a
    batch's loss would depend on those before it, and a resumed run would differ. With this, each forward begins anew
    from the trained length. Generation, whose length only grows, computes what it did before. Inside a batch the
    longest document decides for all.
    """
    modules = [module for module in model.modules() if "dynamic" in _rope_types(module)]
    for module in modules:
        module.register_forward_pre_hook(_forget_length, with_kwargs=True)
    return len(modules)


def _rope_types(module: nn.Module) -> set[str]:
    kinds = getattr(module, "rope_type", None)
    return set(kinds.values()) if isinstance(kinds, dict) else {kinds} if isinstance(kinds, str) else set()


def _forget_length(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    layer_type = kwargs.get("layer_type", args[2] if len(args) > 2 else None)
    prefix = "" if layer_type is None else f"{layer_type}_"
    kind = module.rope_type if layer_type is None else module.rope_type[layer_type]
    if kind == "dynamic":
        module.register_buffer(f"{prefix}inv_freq", getattr(module, f"{prefix}original_inv_freq"), persistent=False)
        setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
