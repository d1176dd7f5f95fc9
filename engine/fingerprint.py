"""A base model's fingerprint: which weights these are, whatever the dtype they are loaded in or how they are sharded.

    sha256 over (name, shape, dtype, sample) of every tensor in the safetensors files, in the order of names

The sample is up to 4 x 64 stored values, from 4 rows spread over the tensor. Fine-tuning changes every value of the
weights it trains, so a sample tells two models apart at a thousandth of the reading: 0.1 s for 8 B weights on disk.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import safe_open

from fuselora.engine.errors import expected

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ROWS, VALUES = 4, 64


def weight_files(base: str, cache_dir: str | None = None) -> list[Path]:
    """The safetensors files of a model folder or of a hub id that is in the cache; none if it has others.

    Raises:
        UserError: the folder's index names a file outside it.
    """
    folder = Path(base)
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        found = [try_to_load_from_cache(base, name, cache_dir=cache_dir) for name in (SINGLE, INDEX)]
        paths = [Path(path) for path in found if isinstance(path, str)]
        if not paths:
            return []
        folder = paths[0].parent
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]
        if outside:
            want = "files of the model's own folder"
            raise expected(str(folder / INDEX), want, repr(outside[0]), "don't load a model whose files name others")
        return [folder / name for name in names]
    return []


def base_fingerprint(base: str, cache_dir: str | None = None) -> str | None:
    """The fingerprint as hex; None for weights that aren't safetensors."""
    parts: dict[str, bytes] = {}
    for path in weight_files(base, cache_dir):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                view = file.get_slice(name)
                shape = tuple(view.get_shape())
                rows = sorted({i * (shape[0] - 1) // (ROWS - 1) for i in range(ROWS)}) if shape and shape[0] else []
                sample = [_bytes(view[row : row + 1]) for row in rows]
                parts[name] = repr((shape, view.get_dtype())).encode() + b"".join(sample)
    if not parts:
        return None
    digest = hashlib.sha256()
    for name in sorted(parts):
        digest.update(name.encode() + parts[name])
    return digest.hexdigest()


def _bytes(row: torch.Tensor) -> bytes:
    return row.reshape(-1)[:VALUES].contiguous().view(torch.uint8).numpy().tobytes()


def chain(fingerprint: str, adapter: Path) -> str:
    """The fingerprint of a base into which an adapter was merged."""
    with adapter.open("rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(f"{fingerprint}+{weights}".encode()).hexdigest()
