"""Where the rows of a set come from: files, a hub, or the built-in pairs; rows with places, from any row on."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fuselora.engine import quickstart
from fuselora.engine.data_formats import Dialogue, Sample, check_stage, to_sample
from fuselora.engine.data_info import DatasetInfo, dataset_info
from fuselora.engine.data_rows import BadRow, Row, read_rows
from fuselora.engine.errors import UserError, expected, first_line


@dataclass(frozen=True)
class Source:
    """One name of ``dataset``. ``held_out`` picks the side of the built-in pairs."""

    info: DatasetInfo
    held_out: bool = False
    streaming: bool = False
    cache_dir: str | None = None

    @classmethod
    def of(cls, name: str, dataset_dir: str, stage: str, **options: Any) -> Source:
        """Look ``name`` up; ``UserError`` if it can't serve ``stage``."""
        if name == quickstart.NAME:
            if stage not in ("sft", "ppo"):
                raise expected("dataset", f"rows for stage {stage}", "quickstart, which has dialogues", "name a set")
            return cls(DatasetInfo(quickstart.NAME), **options)
        info = dataset_info(name, dataset_dir)
        check_stage(info, stage)
        return cls(info, **options)

    def samples(self, stage: str, default_system: str | None, start: int = 0) -> Iterator[tuple[str, Sample | BadRow]]:
        """(place, sample) of every row from row ``start`` on."""
        if self.info.name == quickstart.NAME:
            pairs = quickstart.conversations(held_out=self.held_out)
            for number, messages in enumerate(pairs[start:], start + 1):
                yield f"{quickstart.NAME}:{number}", Dialogue(messages)
            return
        for place, row in itertools.islice(self._rows(), start, None):
            if isinstance(row, BadRow):
                yield place, row
                continue
            try:
                sample: Sample | BadRow = to_sample(row, self.info, stage, place, default_system)
            except BadRow as error:
                sample = error
            yield place, sample

    def _rows(self) -> Iterator[tuple[str, Row | BadRow]]:
        if self.info.files:
            for path in self.info.files:
                yield from read_rows(path)
            return
        for number, row in enumerate(self._hub_rows, 1):
            yield f"{self.info.hub_id}:{number}", row

    @cached_property
    def _hub_rows(self) -> Any:
        return load_hub(self.info, self.cache_dir, self.streaming)

    def digest(self) -> str:
        """Changes with the rows and with how they are read."""
        reading = {key: value for key, value in asdict(self.info).items() if key not in ("files", "num_samples")}
        digest = hashlib.sha256(json.dumps(reading, sort_keys=True).encode())
        for path in self.info.files:
            with path.open("rb") as file:
                digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
        if self.info.hub:
            digest.update(
                self._hub_rows._fingerprint.encode()  # of its data files and what was done to them
            )
        if self.info.name == quickstart.NAME:
            digest.update(f"{quickstart.RECIPE.key} {self.held_out}".encode())
        return digest.hexdigest()


def load_hub(info: DatasetInfo, cache_dir: str | None, streaming: bool) -> Any:
    """The rows of a hub's data repository, by the library of that hub. Loading scripts are not run."""
    try:
        if info.hub == "ms":
            from modelscope import MsDataset

            rows = MsDataset.load(
                info.hub_id,
                subset_name=info.subset or "default",
                data_dir=info.folder,
                split=info.split,
                cache_dir=cache_dir,
                use_streaming=streaming,
            )
            return rows.to_hf_dataset() if hasattr(rows, "to_hf_dataset") else rows
        from datasets import load_dataset

        return load_dataset(
            info.hub_id, info.subset, data_dir=info.folder, split=info.split, cache_dir=cache_dir, streaming=streaming
        )
    except ImportError as error:
        package = "modelscope" if info.hub == "ms" else "fuselora[data]"
        raise expected(
            f"dataset {info.name}", "the library of its hub", first_line(error), f"pip install '{package}'"
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"dataset {info.name}: expected to load {info.hub_id!r} from the hub, got {first_line(error)}; check the "
            "name, subset, split and the network, or name a local file in file_name"
        ) from error


def default_root(cache_dir: str | None) -> Path:
    """Where tokenised sets are kept unless ``tokenized_path`` says otherwise."""
    return (Path(cache_dir).expanduser() if cache_dir else quickstart.default_cache()) / "tokens"
