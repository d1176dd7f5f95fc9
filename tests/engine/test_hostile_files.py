"""Files that want to run code, point outside their folder or would keep a secret."""

import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file

from fuselora import cli
from fuselora.engine import checkpoint
from fuselora.engine.config_docs import config_yaml
from fuselora.engine.loop_callbacks import SilentLog

SECRETS = {
    name: f"canary-{name.lower()}"
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "MODELSCOPE_API_TOKEN", "OPENAI_API_KEY")
}


class Canary:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def canary(tmp_path):
    """canary(file) writes a pickle there, in torch's format and in the plain one; alive() says whether none ran."""
    sung = tmp_path / "sung"

    def lay(path, torch_format=True):
        if torch_format:
            torch.save({"weight": torch.zeros(2), "bird": Canary(sung)}, path)
        else:
            path.write_bytes(pickle.dumps(Canary(sung)))

    yield lay
    assert not sung.exists()


def test_the_canary_sings(tmp_path):
    torch.save(Canary(tmp_path / "sung"), tmp_path / "x.bin")
    torch.load(tmp_path / "x.bin", weights_only=False)
    assert (tmp_path / "sung").is_dir()


@pytest.fixture
def train(make_config, capsys, tmp_path):
    """train(**keys) is the command; returns its exit code and what it said."""

    def train(command="train", **keys):
        config = make_config()
        base = {name: getattr(config, name) for name in ("model_name_or_path", "dataset_dir", "output_dir")}
        base |= {"dataset": "rows", "tokenized_path": tmp_path / "tokens", "val_size": 4, "plot_loss": False}
        base |= {"use_cpu": True, "max_steps": 2, "save_steps": 1, "check_adapter": "false"}
        if command == "export":
            base = {"model_name_or_path": base["model_name_or_path"]}
        given = base | keys
        code = cli.main([command, *(f"{key}={value}" for key, value in given.items() if value is not None)])
        said = capsys.readouterr()
        return code, said.out + said.err

    return train


@pytest.fixture
def trained(make_trainer):
    trainer = make_trainer(max_steps=2, save_steps=1)
    trainer.fit()
    return trainer


@pytest.mark.parametrize("command", ["train", "export"])
@pytest.mark.parametrize("torch_format", [True, False], ids=["torch", "pickle"])
def test_an_adapter_that_is_a_pickle(train, trained, canary, tmp_path, command, torch_format):
    folder = shutil.copytree(trained.last_checkpoint, tmp_path / "adapter")
    (folder / "adapter_model.safetensors").unlink()
    canary(folder / "adapter_model.bin", torch_format)
    keys = {"export_dir": tmp_path / "merged"} if command == "export" else {"output_dir": tmp_path / "new"}
    code, said = train(command, adapter_name_or_path=folder, **keys)
    assert code == 2 and "got a pickle alone, which may run code" in said


@pytest.mark.parametrize("torch_format", [True, False], ids=["torch", "pickle"])
def test_a_base_that_is_a_pickle(train, canary, tiny_base, tmp_path, torch_format):
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    (folder / "model.safetensors").unlink()
    canary(folder / "pytorch_model.bin", torch_format)
    code, said = train(model_name_or_path=folder)
    assert code == 2 and "whose pickle holds more and may run code" in said, said


def test_pickles_of_transformers_trainer_beside_a_checkpoint(train, trained, canary, make_trainer):
    """They are not read; a folder with nothing else is no checkpoint."""
    for name in ("optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state.pth"):
        canary(trained.last_checkpoint / name)
        canary(trained.output_dir / name)
    again = make_trainer(max_steps=3, resume_from_checkpoint=True)
    again.resume()
    assert again.step == 2 and again.fit() == 0
    for name in ("manifest.json", "optimizer.safetensors"):
        (again.last_checkpoint / name).unlink()
    code, said = train(resume_from_checkpoint=again.last_checkpoint)
    assert code == 2 and "resume_from_checkpoint: expected a complete checkpoint" in said


SCRIPT = "import os\nos.mkdir({!r})\n"


def test_scripts_beside_data_and_models_are_not_run(train, canary, tiny_base, dataset_dir, tmp_path):
    """A loading script in the folder of a set, one named by it, and model code without ``trust_remote_code``."""
    script = SCRIPT.format(str(tmp_path / "sung"))
    folder = dataset_dir / "folder"
    folder.mkdir()
    shutil.copy(dataset_dir / "rows.json", folder)
    (folder / "folder.py").write_text(script)
    named = {"rows": {"file_name": "folder"}, "script": {"file_name": "folder/folder.py"}}
    named |= {"url": {"script_url": "folder"}, "hub": {"hf_hub_url": str(folder / "folder.py")}}
    (dataset_dir / "dataset_info.json").write_text(json.dumps(named))
    assert train()[0] == 0
    for name in ("script", "url", "hub"):
        code, said = train(dataset=name, output_dir=tmp_path / "other")
        assert code == 2 and said.strip().splitlines()[-1].startswith("error: "), said
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (base / "own.py").write_text(script)
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (base / "config.json").write_text(json.dumps(config))
    code, said = train(model_name_or_path=base, output_dir=tmp_path / "other")
    assert code == 2 and "model_name_or_path: " in said, said


@pytest.mark.parametrize("name", ["../{}", "/{}", "sub/../../{}", ".."])
def test_a_manifest_names_files_of_its_own_folder_only(trained, name, tmp_path):
    outside = trained.output_dir / "outside"
    outside.write_text("x")
    name = name.format(str(outside).lstrip("/") if name.startswith("/") else "outside")
    manifest = trained.last_checkpoint / "manifest.json"
    content = json.loads(manifest.read_text())
    content["files"][name] = checkpoint._sha256(outside)
    manifest.write_text(json.dumps(content))
    assert name in checkpoint.find_damage(trained.last_checkpoint)
    assert checkpoint.newest_complete(trained.output_dir).name == "checkpoint-1"


@pytest.mark.parametrize(
    "text", ["[]", '{"files": []}', '{"files": [1]}', '{"files": null}', "\xff", '{"files": {"a": 1}}']
)
def test_a_manifest_of_another_shape_is_damage(trained, text):
    (trained.last_checkpoint / "manifest.json").write_text(text, encoding="latin-1")
    (trained.output_dir / "checkpoint-²").mkdir()
    assert "manifest.json" in checkpoint.find_damage(trained.last_checkpoint)
    assert checkpoint.newest_complete(trained.output_dir).name == "checkpoint-1"


@pytest.mark.parametrize("place", ["../outside.safetensors", "/absolute"])
def test_an_index_names_files_of_its_own_folder_only(train, tiny_base, tmp_path, place):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    outside = tmp_path / "outside.safetensors"
    (base / "model.safetensors").rename(outside)
    name = str(outside) if place == "/absolute" else place
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(outside), name)}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    code, said = train(model_name_or_path=base)
    assert code == 2 and "expected files of the model's own folder" in said, said


@pytest.mark.parametrize("good", [True, False], ids=["a run", "an error"])
def test_secrets_of_the_environment_are_in_no_file_and_no_line(train, monkeypatch, tmp_path, good):
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, said = train(report_to="tensorboard" if good else None, model_revision=None if good else "v2")
    assert code == (0 if good else 2), said
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert (tmp_path / "out" / "training_args.yaml") in files or not good
    for text in (said.encode(), *(path.read_bytes() for path in files)):
        assert b"canary-" not in text


def test_secrets_inside_mappings_are_not_saved(make_config):
    given = {
        "comet": {"enabled": True, "api_key": "canary-1", "auth": {"Password": "canary-2", "user_token": "canary-3"}}
    }
    text = config_yaml(make_config(lr_scheduler_kwargs=given))
    assert (
        "canary" not in text
        and "enabled: true" in text
        and "max_new_tokens" in config_yaml(make_config(max_new_tokens=9))
    )


def test_retention_leaves_a_good_checkpoint_wherever_it_stops(trained, monkeypatch, capsys):
    """Deleting fails after each number of files, or at once for want of the right: the new one is complete."""
    trained.log = SilentLog(9)
    unlink = os.unlink
    for allowed in range(8):
        left = [allowed]

        def limited(*args, left=left, **keys):
            if left[0] == 0:
                raise PermissionError(13, "Permission denied")
            left[0] -= 1
            return unlink(*args, **keys)

        trained.step += 1
        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", limited)
            checkpoint.save_checkpoint(
                trained.output_dir, trained.model, trained.optimizer, trained._state(), world=trained.world, keep=1
            )
        assert checkpoint.newest_complete(trained.output_dir).name == f"checkpoint-{trained.step}"
    assert "save_total_limit: " in capsys.readouterr().out
    checkpoint.save_checkpoint(trained.output_dir, trained.model, trained.optimizer, trained._state(), keep=1)
    assert [path.name for path in trained.output_dir.glob("checkpoint-*")] == [f"checkpoint-{trained.step}"]
