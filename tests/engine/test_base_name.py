"""Names of models and adapters: folders, ids in the hub's cache, ids the hub is asked about once, mistyped paths."""

import json
import socket
import sys
import threading
import time
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from fuselora.engine.base_name import ADAPTER_FILE, MODEL_FILE, check_name, check_names
from fuselora.engine.config import Config
from fuselora.engine.errors import UserError
from fuselora.engine.model import resolve_base

KEY = "model_name_or_path"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub on this machine that has `org/there` and counts what it is asked; its cache is empty."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            there = self.path.startswith("/org/there/") and self.path.endswith(f"/{MODEL_FILE}")
            self.send_response(200 if there else 404)
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("ETag", '"x"')
            if not there:
                kind = "EntryNotFound" if self.path.startswith("/org/there/") else "RepoNotFound"
                self.send_header("X-Error-Code", kind)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    point_at(monkeypatch, f"http://127.0.0.1:{server.server_port}", tmp_path)
    yield asked
    server.shutdown()
    server.server_close()


def point_at(monkeypatch, endpoint, tmp_path):
    from huggingface_hub import constants

    address = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def sentence(name, file=MODEL_FILE, **options):
    with pytest.raises(UserError) as caught:
        check_name(KEY, name, file, **options)
    text = str(caught.value)
    assert text.startswith(f"{KEY}: expected ") and "\n" not in text
    return text


def test_folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    check_name(KEY, str(tmp_path), MODEL_FILE)
    assert ADAPTER_FILE in sentence(str(tmp_path), ADAPTER_FILE)
    assert "which is a file" in sentence(str(tmp_path / "config.json"))


@pytest.mark.parametrize("name", ["./no", "/no/such", "~/no_such", "a/b/c", "a b", "data\\x", ".hidden"])
def test_shape_of_a_path_asks_no_hub(name, hub):
    assert "check the path" in sentence(name)
    assert hub == []


def test_mistyped_path_in_a_folder_that_is_there(hub, tmp_path, monkeypatch):
    (tmp_path / "saves" / "qwen-lora").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "not in the folder 'saves'; did you mean 'saves/qwen-lora'?" in sentence("saves/qwen-lro")
    assert "hf download saves/other" in sentence("saves/other")
    assert hub == []


def test_id_of_the_hub(hub):
    check_name(KEY, "org/there", MODEL_FILE)
    assert len(hub) == 1
    assert "no such repository" in sentence("org/absent")
    assert f"has no {ADAPTER_FILE}" in sentence("org/there", ADAPTER_FILE)
    assert len(hub) == 3


def test_revision(hub):
    keys = {"model_name_or_path": "org/there", "dataset": "d", "output_dir": "o", "model_revision": "v1.0"}
    check_names(Config(**keys))
    assert hub == [f"/org/there/resolve/v1.0/{MODEL_FILE}"]


def test_a_folder_has_no_revisions(tmp_path):
    (tmp_path / MODEL_FILE).write_text("{}")
    keys = {"model_name_or_path": str(tmp_path), "dataset": "d", "output_dir": "o", "model_revision": "v1.0"}
    with pytest.raises(UserError, match="^model_revision: expected main with a folder"):
        check_names(Config(**keys))


@pytest.mark.parametrize("modelscope", [False, True])
def test_another_revision_or_hub_comes_as_a_folder(modelscope, monkeypatch, tmp_path, hub):
    """The library of either hub downloads; here it says what it was asked."""
    import huggingface_hub

    asked = []
    snapshot = lambda name, **options: asked.append((name, options["revision"])) or str(tmp_path)  # noqa: E731
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setitem(sys.modules, "modelscope", types.SimpleNamespace(snapshot_download=snapshot))
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "1" if modelscope else "0")
    keys = {"model_name_or_path": "org/there", "dataset": "d", "output_dir": "o"}
    config = Config(**keys | ({} if modelscope else {"model_revision": "v1.0"}))
    assert resolve_base(config) == str(tmp_path)
    assert asked == [("org/there", "master" if modelscope else "v1.0")] and bool(hub) != modelscope


def test_id_in_the_cache(hub, tmp_path, monkeypatch):
    (tmp_path / "org").mkdir()
    monkeypatch.chdir(tmp_path)
    repository = tmp_path / "hub" / "models--org--cached"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("c0ffee")
    (repository / "snapshots" / "c0ffee").mkdir(parents=True)
    (repository / "snapshots" / "c0ffee" / MODEL_FILE).write_text(json.dumps({}))
    check_name(KEY, "org/cached", MODEL_FILE, str(tmp_path / "hub"))
    assert hub == []


def test_offline_mode_asks_nobody(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "offline mode" in sentence("org/there")
    assert hub == []


def test_a_hub_that_is_not_there_is_asked_once(monkeypatch, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    point_at(monkeypatch, f"http://127.0.0.1:{port}", tmp_path)
    began = time.monotonic()
    assert "can't be asked" in sentence("org/there")
    assert time.monotonic() - began < 2


def test_adapters_are_checked_too(tmp_path):
    config = Config(
        model_name_or_path="quickstart", dataset="d", output_dir="o", adapter_name_or_path=str(tmp_path / "none")
    )
    with pytest.raises(UserError, match="^adapter_name_or_path: expected a folder or a hub id"):
        check_names(config)
