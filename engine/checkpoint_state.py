"""What a checkpoint holds besides the weights, as named tensors: optimizer, random generators.

    optimizer.safetensors     "<parameter>/<state>"
    rng.safetensors           "<rank>/torch", "/cuda", "/python", "/numpy", and "/python_gauss", "/numpy_gauss"

States that are plain numbers (bitsandbytes counts steps in one) go to trainer_state.json under the same names. Weights
and states that FSDP2 or ZeRO shards are gathered, so that a checkpoint doesn't depend on the number of processes.
"""

from __future__ import annotations

import math
import random
from typing import Any

import torch
from torch import Tensor, nn

from fuselora.engine.distributed import in_parts, whole

Numbers = dict[str, int | float | bool | None]


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 or ZeRO holds the trained weights or their states in parts."""
    return any(in_parts(p) for p in model.parameters() if p.requires_grad)


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], Numbers]:
    """(tensors, numbers) by "<parameter>/<state>"."""
    if hasattr(optimizer, "whole_state"):  # DeepSpeed's
        return optimizer.whole_state(model)
    names = {id(p): name for name, p in model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    numbers: Numbers = {}
    for p, values in optimizer.state.items():
        for key, value in values.items():
            name = f"{names[id(p)]}/{key}"
            if isinstance(value, Tensor):
                tensors[name] = whole(value).contiguous()
                if key.startswith("qmap"):  # bitsandbytes' code, one tensor for all weights, which safetensors refuses
                    tensors[name] = tensors[name].clone()
            else:
                numbers[name] = value
    return tensors, numbers


def restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], numbers: Numbers
) -> None:
    """Put ``optimizer_state`` back. Hyper-parameters stay those of the configuration."""
    if hasattr(optimizer, "restore_whole"):
        optimizer.restore_whole(model, tensors)
        return
    names = {id(p): name for name, p in model.named_parameters()}
    saved: dict[str, dict[str, Any]] = {}
    for name, value in (*tensors.items(), *numbers.items()):
        parameter, _, key = name.rpartition("/")
        saved.setdefault(parameter, {})[key] = value
    params = [p for group in optimizer.param_groups for p in group["params"]]
    current = optimizer.state_dict()
    current["state"] = {i: dict(saved[names[id(p)]]) for i, p in enumerate(params) if names[id(p)] in saved}
    optimizer.load_state_dict(current)
    for p in params:  # torch casts states to their parameter's dtype and knows no shards
        state = optimizer.state.get(p, {})
        for key, value in state.items():
            original = saved[names[id(p)]][key]
            if not isinstance(value, Tensor):
                continue
            if hasattr(p, "full_tensor") and value.shape == p.shape:
                from torch.distributed.tensor import distribute_tensor

                state[key] = distribute_tensor(original.to(p.device), p.device_mesh, p.placements)
            elif value.dtype != original.dtype:
                state[key] = original.to(value.device)


def torch_generators(device: torch.device) -> dict[str, Tensor]:
    """The states that a training step may change; on a GPU they are read without waiting for it."""
    states = {"torch": torch.get_rng_state()}
    return states | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else states


def restore_torch_generators(states: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def generators(device: torch.device) -> dict[str, Tensor]:
    """The states of this process's generators: torch's, Python's, NumPy's."""
    import numpy

    _, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = numpy.random.get_state()
    return torch_generators(device) | {
        "python": torch.tensor(words),
        "python_gauss": torch.tensor(math.nan if gauss is None else gauss, dtype=torch.float64),
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss]),
        "numpy_gauss": torch.tensor(cached, dtype=torch.float64),
    }


def restore_generators(states: dict[str, Tensor], device: torch.device) -> None:
    import numpy

    restore_torch_generators(states, device)
    gauss = states["python_gauss"].item()
    random.setstate((3, tuple(states["python"].tolist()), None if math.isnan(gauss) else gauss))
    *keys, position, has_gauss = states["numpy"].tolist()
    words = numpy.array(keys, dtype="uint32")
    numpy.random.set_state(("MT19937", words, position, has_gauss, states["numpy_gauss"].item()))
