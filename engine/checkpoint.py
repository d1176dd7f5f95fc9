"""Checkpoints: complete or absent, verified on load, enough to continue bit for bit.

    checkpoint-<step>/
        adapter_model.safetensors, adapter_config.json   the adapter as PEFT saves it, usable on its own
        optimizer.safetensors, rng.safetensors           see checkpoint_state.py
        trainer_state.json                               step, log window, best evaluation, data position, run identity
        manifest.json                                    sha256 of every file above, written last

The folder is written under a temporary name, every file and the folder are fsynced, and one rename makes it visible. A
reader trusts only folders whose manifest matches every byte. No pickle is written or read.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import load_file, save, save_file

from fuselora.engine import checkpoint_state as states
from fuselora.engine.checkpoint_weights import load_weights, save_weights, weights_to_save
from fuselora.engine.distributed import World
from fuselora.engine.errors import UserError, expected, first_line

MANIFEST = "manifest.json"
PREFIX = "checkpoint-"
ALWAYS_THERE = ("optimizer.safetensors", "rng.safetensors", "trainer_state.json")
MARGIN = 1 << 20  # bytes beyond the tensors that a checkpoint may take: configuration, headers, folders


def save_checkpoint(
    output_dir: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    *,
    world: World = World(),  # noqa: B008 - frozen
    keep: int | None = None,
    protect: Collection[int] = (),
) -> Path:
    """Write ``checkpoint-<state["step"]>`` and return it. Then older ones beyond ``keep`` go, never this one.

    All processes call it together; the main one writes.

    Args:
        protect: steps whose checkpoints stay whatever ``keep`` says, the best one's for example.

    Raises:
        UserError: no room or no right to write; what was there before is as it was.
    """
    device = next(model.parameters()).device
    folder = output_dir / f"{PREFIX}{state['step']}"
    weights = weights_to_save(model)
    rng = world.gather(save(states.generators(device)))
    problem = ""
    if world.main or states.is_sharded(model):
        tensors, numbers = states.optimizer_state(model, optimizer)
    if world.main:
        named = {f"{rank}/{key}": t for rank, part in enumerate(rng) for key, t in load_bytes(part).items()}
        try:
            staging = _staging(output_dir, folder.name, _size(model, weights, tensors))
            save_weights(model, staging, weights)
            save_file(tensors, staging / "optimizer.safetensors")
            save_file(named, staging / "rng.safetensors")
            text = json.dumps(state | {"optimizer": numbers}, indent=1)
            (staging / "trainer_state.json").write_text(text, encoding="utf-8")
            write_manifest(staging)
            _publish(staging, folder)
        except (OSError, SafetensorError) as error:
            problem = first_line(error)
            _clean(output_dir)
    problem = world.gather(problem.encode())[0].decode()
    if problem:
        raise expected(
            "output_dir",
            f"room and the right to write {folder}",
            problem,
            "make room and go on with resume_from_checkpoint: auto; older checkpoints are as they were",
        )
    if world.main and keep is not None:
        _delete_old(output_dir, folder, keep, protect)
    return folder


def load_checkpoint(
    folder: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    run: dict[str, Any],
    world: World = World(),  # noqa: B008 - frozen
) -> dict[str, Any]:
    """Restore weights, optimizer and generators in place; returns the saved ``state``.

    ``folder`` must be verified (``find_resume`` does). ``run`` identifies the present run: its data, batch geometry,
    adapter and base; a checkpoint of another one is refused before anything changes. A process that the saved run
    didn't have seeds its generators by rank and step.
    """
    device = next(model.parameters()).device
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    _check_same_run(state["run"], run, folder)
    load_weights(folder, model)
    tensors = load_file(folder / "optimizer.safetensors")
    states.restore_optimizer(model, optimizer, tensors, state.pop("optimizer"))
    rng = load_file(folder / "rng.safetensors")
    own = {key.partition("/")[2]: t for key, t in rng.items() if key.startswith(f"{world.rank}/")}
    if own:
        states.restore_generators(own, device)
    else:
        torch.manual_seed(state["step"] * 1_000_003 + world.rank)
    return state


def _staging(output_dir: Path, name: str, size: int) -> Path:
    """A fresh folder to write into, after a look at the room; leftovers of killed writers go."""
    output_dir.mkdir(parents=True, exist_ok=True)
    _clean(output_dir)
    free = shutil.disk_usage(output_dir).free
    if free < size:
        raise OSError(f"No space left on device: {free >> 20} MiB free, {size >> 20} MiB needed")
    staging = output_dir / f".{name}.tmp"
    staging.mkdir()
    return staging


def _clean(output_dir: Path) -> None:
    for left in (*output_dir.glob(f".{PREFIX}*.tmp"), *output_dir.glob(f".{PREFIX}*.old")):
        shutil.rmtree(left, ignore_errors=True)


def _size(model: torch.nn.Module, weights: dict[str, torch.Tensor] | None, tensors: dict[str, torch.Tensor]) -> int:
    trained = weights.values() if weights is not None else (p for p in model.parameters() if p.requires_grad)
    return MARGIN + sum(t.numel() * t.element_size() for t in (*trained, *tensors.values()))


def _delete_old(output_dir: Path, newest: Path, keep: int, protect: Collection[int]) -> None:
    kept = {newest, *(output_dir / f"{PREFIX}{step}" for step in protect)}
    others = [path for path in _by_step(output_dir) if path not in kept]
    for old in others[max(0, keep - len([path for path in kept if path.is_dir()])) :]:
        try:
            shutil.rmtree(old)
        except OSError as error:  # an older checkpoint too many is no reason to end a run
            print(f"save_total_limit: {old} stays: {first_line(error)}", flush=True)


def write_manifest(folder: Path) -> None:
    files = {path.name: _sha256(path) for path in sorted(folder.iterdir()) if path.is_file()}
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder; None if it is complete and every byte is as written."""
    try:
        files = dict(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} is missing or unreadable"
    for name in ALWAYS_THERE:
        if name not in files:
            return f"{MANIFEST} doesn't list {name}"
    if not any(name.endswith(".safetensors") and name not in ALWAYS_THERE for name in files):
        return f"{MANIFEST} lists no weights"
    for name, digest in files.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            return f"{name} is missing"
        if _sha256(path) != digest:
            return f"{name} doesn't match its sha256"
    return None


def find_resume(output_dir: Path, wish: bool | str | None, *, overwrite: bool = False) -> Path | None:
    """The checkpoint to continue from, None for a start from the beginning.

    Args:
        wish: a folder; True: the newest complete one in ``output_dir``; "auto": the same, or None without one; None:
            as True if there are any, unless ``overwrite``; False: None.

    Raises:
        UserError: the named folder is damaged, or True finds no complete one.
    """
    if isinstance(wish, str) and wish != "auto":
        folder = Path(wish).expanduser()
        damage = find_damage(folder) if folder.is_dir() else "it is not a folder"
        if damage:
            raise expected("resume_from_checkpoint", "a complete checkpoint", f"{wish!r}: {damage}", "name another one")
        return folder
    if wish is False or (wish is None and (overwrite or not has_checkpoints(output_dir))):
        return None
    for old in output_dir.glob(f".{PREFIX}*.old"):  # a writer was killed between its two renames
        place = output_dir / old.name[1:].removesuffix(".old")
        if not place.exists():
            old.rename(place)
    newest = newest_complete(output_dir)
    if newest is not None:
        return newest
    if wish == "auto":
        print(f"resume_from_checkpoint: auto found no complete checkpoint in {output_dir}: from the start", flush=True)
        return None
    raise expected(
        "resume_from_checkpoint", f"a complete checkpoint in {output_dir}", "none", "set it to false or auto"
    )


def newest_complete(output_dir: Path) -> Path | None:
    """The checkpoint of the latest step with every byte as written; what is wrong with later ones is said."""
    for folder in _by_step(output_dir):
        damage = find_damage(folder)
        if damage is None:
            return folder
        print(f"skipping {folder}: {damage}", flush=True)
    return None


def set_aside(output_dir: Path, step: int) -> list[Path]:
    """Rename checkpoints of later steps than the one that a run goes on from, and return their new names: the run is
    another branch, and one that looks for the newest checkpoint must not end on the branch that was left.

    Raises:
        UserError: no right to rename.
    """
    renamed = []
    for path in _by_step(output_dir):
        if int(path.name.removeprefix(PREFIX)) > step:
            name = f"abandoned-{path.name}"
            taken = sum(1 for other in output_dir.glob(f"{name}*"))
            new = output_dir / (f"{name}-{taken + 1}" if taken else name)
            try:
                path.rename(new)
            except OSError as error:
                want = f"the right to rename {path}, which is of a later step than {step}"
                raise expected("output_dir", want, first_line(error), "move it away") from error
            renamed.append(new)
    return renamed


def has_checkpoints(output_dir: Path) -> bool:
    """Whether there are checkpoint folders, complete or not."""
    return next(_by_step(output_dir), None) is not None


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
    found = [p for p in output_dir.glob(f"{PREFIX}*") if p.is_dir() and p.name.removeprefix(PREFIX).isdecimal()]
    yield from sorted(found, key=lambda p: -int(p.name.removeprefix(PREFIX)))


def _publish(staging: Path, folder: Path) -> None:
    for path in staging.iterdir():
        fsync(path)
    fsync(staging)
    replaced = folder.parent / f".{folder.name}.old"
    if folder.exists():  # the same step again, after a resume from an earlier one
        folder.rename(replaced)
    staging.rename(folder)
    fsync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def fsync(path: Path) -> None:
    """Have a file or folder on the disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
