"""Whether a model's or an adapter's name can be found, before anything slow happens.

    a folder here                                   it must hold what makes it loadable
    the shape of a path (./x, /x, ~/x, a/b/c)       can only be a folder
    an id in the hub's cache                        is taken from there
    folder/name, of which only the folder exists    a mistyped path: the hub is not asked
    another id                                      the hub is asked once, for a few seconds at most

transformers asks six times for every file, with pauses between: 47 s until a mistyped path is called one.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import TYPE_CHECKING

from fuselora.engine.data_info import use_modelscope
from fuselora.engine.errors import UserError, expected, first_line

if TYPE_CHECKING:
    from fuselora.engine.config import Config

QUICKSTART = "quickstart"  # a base that is built here
HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")
MAIN = "main"  # the revision of an id that names none
SECONDS = 5  # for the hub's answer
MODEL_FILE, ADAPTER_FILE = "config.json", "adapter_config.json"


def check_names(config: Config) -> None:
    """Raise ``UserError`` for a base or an adapter that is neither here nor on the hub. Imports no torch."""
    if config.model_name_or_path != QUICKSTART:
        check_name("model_name_or_path", config.model_name_or_path, MODEL_FILE, config.cache_dir, config.model_revision)
    if config.model_revision != MAIN and Path(config.model_name_or_path).expanduser().is_dir():
        raise expected(
            "model_revision", f"{MAIN} with a folder", repr(config.model_revision), "drop it or name a hub id"
        )
    for name in config.adapter_name_or_path:
        check_name("adapter_name_or_path", name, ADAPTER_FILE)


def check_name(key: str, name: str, file: str, cache_dir: str | None = None, revision: str = MAIN) -> None:
    """Raise ``UserError`` unless ``name`` is a folder with ``file`` or the id of a repository with it. Of ids that
    ModelScope is to serve (USE_MODELSCOPE_HUB) only the shape is checked.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / file).is_file():
            raise expected(key, f"a folder with {file}", repr(name), "name a saved one")
        return
    if path.exists():
        raise expected(key, "a folder or a hub id", f"{name!r}, which is a file", "name the folder it lies in")
    if not HUB_ID.fullmatch(name):
        raise _absent(key, name, "neither", path)
    if _cached(name, file, cache_dir, revision):
        return
    if "/" in name and path.parent.is_dir():
        raise _absent(key, name, f"not in the folder {str(path.parent)!r}", path)
    problem = "" if file == MODEL_FILE and use_modelscope() else _ask_hub(name, file, revision)
    if problem:
        raise _absent(key, name, f"no folder here; {problem}", path)


def _absent(key: str, name: str, what: str, path: Path) -> UserError:
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=1)
    remedy = f"did you mean {str(path.parent / near[0])!r}?" if near else "check the path"
    if HUB_ID.fullmatch(name) and not near:
        remedy += f", or for an id of the hub run first: hf download {name}"
    return expected(key, "a folder or a hub id", f"{name!r}, which is {what}", remedy)


def _cached(name: str, file: str, cache_dir: str | None, revision: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, file, cache_dir=cache_dir, revision=revision), str)


def _ask_hub(name: str, file: str, revision: str) -> str:
    """What is wrong with ``name`` as an id; nothing if the hub has it."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, is_offline_mode
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if is_offline_mode():
        return "it is not in the hub's cache, and the hub is not asked in offline mode"
    try:
        get_hf_file_metadata(hf_hub_url(name, file, revision=revision), timeout=SECONDS)
    except GatedRepoError:
        return "the hub wants its licence accepted and a token in HF_TOKEN"
    except RepositoryNotFoundError:
        return "the hub has no such repository, or none that may be seen without a token"
    except RevisionNotFoundError:
        return f"its repository has no model_revision {revision!r}"
    except EntryNotFoundError:
        return f"its repository has no {file}"
    except (HTTPError, OSError) as error:
        return f"the hub can't be asked ({first_line(error)})"
    return ""
