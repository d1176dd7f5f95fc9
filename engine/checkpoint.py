"""Checkpoints: complete or absent, verified on load, enough to continue bit for bit.

    checkpoint-<step>/
        adapter_model.safetensors, adapter_config.json   the adapter as PEFT saves it, usable on its own
        optimizer.safetensors                            "<parameter>/<state>" tensors
        rng.safetensors                                  torch's CPU and CUDA generators
        trainer_state.json                               step, log window, run identity, other generators
        manifest.json                                    sha256 of every file above, written last

The folder is written under a temporary name, every file and the folder are fsynced, and one rename makes it visible. A
reader trusts only folders whose manifest matches every byte. No pickle is written or read.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fuselora.engine.errors import UserError, expected

MANIFEST = "manifest.json"
PREFIX = "checkpoint-"


def save_checkpoint(
    output_dir: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    *,
    keep: int | None = None,
) -> Path:
    """Write ``checkpoint-<state["step"]>`` and return it. Then older ones beyond ``keep`` go, never this one."""
    folder = output_dir / f"{PREFIX}{state['step']}"
    staging = output_dir / f".{folder.name}.tmp"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    model.save_pretrained(staging, save_embedding_layers=False)
    save_file(_optimizer_state(model, optimizer), staging / "optimizer.safetensors")
    generators, other = _rng_state()
    save_file(generators, staging / "rng.safetensors")
    (staging / "trainer_state.json").write_text(json.dumps(state | {"rng": other}, indent=1), encoding="utf-8")
    write_manifest(staging)
    _publish(staging, folder)
    if keep is not None:
        others = [path for path in _by_step(output_dir) if path != folder]
        for old in others[keep - 1 :]:
            shutil.rmtree(old)
    return folder


def load_checkpoint(
    folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, run: dict[str, Any]
) -> dict[str, Any]:
    """Restore weights, optimizer and generators in place; returns the saved ``state``.

    ``folder`` must be verified (``find_resume`` does). ``run`` identifies the present run: its data, batch geometry,
    adapter and base; a checkpoint of another one is refused before anything changes.
    """
    from peft import set_peft_model_state_dict

    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    _check_same_run(state["run"], run, folder)
    device = next(model.parameters()).device
    adapter = load_file(folder / "adapter_model.safetensors", device=str(device))
    result = set_peft_model_state_dict(model, adapter)
    if result.unexpected_keys:
        raise expected(
            str(folder), "an adapter of this model", f"weight {result.unexpected_keys[0]!r}", "check lora_target"
        )
    _restore_optimizer(model, optimizer, load_file(folder / "optimizer.safetensors"))
    _restore_rng(load_file(folder / "rng.safetensors"), state.pop("rng"))
    return state


def write_manifest(folder: Path) -> None:
    files = {path.name: _sha256(path) for path in sorted(folder.iterdir()) if path.is_file()}
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder; None if it is complete and every byte is as written."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} is missing or unreadable"
    for name in ("adapter_model.safetensors", "optimizer.safetensors", "rng.safetensors", "trainer_state.json"):
        if name not in files:
            return f"{MANIFEST} doesn't list {name}"
    for name, digest in files.items():
        path = folder / name
        if path.parent != folder or not path.is_file():
            return f"{name} is missing"
        if _sha256(path) != digest:
            return f"{name} doesn't match its sha256"
    return None


def find_resume(output_dir: Path, wish: bool | str | None) -> Path | None:
    """The checkpoint to continue from: a named folder, or the newest good one in ``output_dir`` if ``wish`` is True."""
    if not wish:
        return None
    if isinstance(wish, str):
        folder = Path(wish).expanduser()
        damage = find_damage(folder) if folder.is_dir() else "it is not a folder"
        if damage:
            raise expected("resume_from_checkpoint", "a complete checkpoint", f"{wish!r}: {damage}", "name another one")
        return folder
    for folder in _by_step(output_dir):
        damage = find_damage(folder)
        if damage is None:
            return folder
        print(f"skipping {folder}: {damage}", flush=True)
    raise expected(
        "resume_from_checkpoint", f"a complete checkpoint in {output_dir}", "none", "drop the key to start anew"
    )


def _check_same_run(saved: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    for key, value in now.items():
        if saved.get(key) != value:
            raise UserError(
                f"resume_from_checkpoint: expected {key} = {saved.get(key)} as in {folder}, got {value}; "
                "restore the old value or start a new output_dir"
            )


def _by_step(output_dir: Path) -> Iterator[Path]:
    """Checkpoint folders, newest first."""
    if not output_dir.is_dir():
        return
    found = [p for p in output_dir.glob(f"{PREFIX}*") if p.is_dir() and p.name.removeprefix(PREFIX).isdigit()]
    yield from sorted(found, key=lambda p: -int(p.name.removeprefix(PREFIX)))


def _publish(staging: Path, folder: Path) -> None:
    for path in staging.iterdir():
        _fsync(path)
    _fsync(staging)
    replaced = folder.parent / f".{folder.name}.old"
    if folder.exists():  # the same step again, after a resume from an earlier one
        folder.rename(replaced)
    staging.rename(folder)
    _fsync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _optimizer_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        f"{names[id(p)]}/{key}": value.detach().cpu().contiguous()
        for p, values in optimizer.state.items()
        for key, value in values.items()
    }


def _restore_optimizer(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]
) -> None:
    names = {id(p): name for name, p in model.named_parameters()}
    saved: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, what = key.rpartition("/")
        saved.setdefault(name, {})[what] = tensor
    current = optimizer.state_dict()  # hyper-parameters stay those of the configuration
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    current["state"] = {i: saved[name] for i, name in enumerate(order) if name in saved}
    optimizer.load_state_dict(current)


def _rng_state() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    import numpy

    generators = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        generators |= {f"cuda:{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    kind, keys, position, has_gauss, gauss = numpy.random.get_state()
    return generators, {
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), position, has_gauss, gauss],
    }


def _restore_rng(generators: dict[str, torch.Tensor], other: dict[str, Any]) -> None:
    import numpy

    torch.set_rng_state(generators["cpu"])
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if f"cuda:{i}" in generators:
                torch.cuda.set_rng_state(generators[f"cuda:{i}"], i)
    version, values, gauss = other["python"]
    random.setstate((version, tuple(values), gauss))
    kind, keys, position, has_gauss, cached = other["numpy"]
    numpy.random.set_state((kind, numpy.array(keys, dtype="uint32"), position, has_gauss, cached))
