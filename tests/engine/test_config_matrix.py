"""Wrong configurations, one per line: each is one sentence and exit code 2, before torch is imported, writing nothing.

All are run by one process, whose processor time is that of a command plus that of reading fifty files.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILE = "model_name_or_path: quickstart\ndataset: quickstart\noutput_dir: out\n"
HELD = "val_size: 0.1\neval_strategy: steps\n"
# what is wrong: (text of the file after FILE, arguments after it, words of the sentence)
OVERRIDES = {
    "unknown key": (["lora_rnak=4"], "lora_rnak"),
    "unknown key without a likeness": (["qqq=1"], "qqq"),
    "no equals sign": (["seed"], "'seed'"),
    "broken YAML value": (["lora_target=[q_proj"], "lora_target"),
    "an override of nothing": (["=3"], "''"),
    "a list for a number": (["lora_rank=[1, 2]"], "lora_rank: expected an integer"),
    "text for a number": (["learning_rate=fast"], "learning_rate: expected a number"),
    "a fraction for an integer": (["max_steps=1.5"], "max_steps: expected an integer"),
    "a number for a switch": (["bf16=1"], "bf16: expected true or false"),
    "a number for a name": (["dataset=3"], "dataset"),
    "a mapping for a name": (["output_dir={a: 1}"], "output_dir: expected text"),
    "a list for a mapping": (["lr_scheduler_kwargs=[1]"], "lr_scheduler_kwargs: expected a mapping"),
    "not a choice": (["optim=adm"], "optim: expected one of"),
    "not a schedule": (["lr_scheduler_type=cosin"], "lr_scheduler_type: expected one of"),
    "null where there must be a value": (["lora_rank=null"], "lora_rank"),
    "infinite rate": (["learning_rate=.inf"], "learning_rate"),
    "not a number": (["weight_decay=.nan"], "weight_decay"),
    "zero sequences": (["per_device_train_batch_size=0"], "per_device_train_batch_size: expected 1 or more"),
    "negative seed": (["seed=-1"], "seed"),
    "a share above one": (["warmup_ratio=1.5"], "warmup_ratio"),
    "a step count below -1": (["max_steps=-2"], "max_steps"),
    "a split that is no number of rows": (["val_size=1.5"], "val_size"),
    "an objective to come": (["stage=dpo"], "stage: expected sft or pt"),
    "bits that do not exist": (["quantization_bit=3"], "quantization_bit"),
    "a library that is not used": (["quantization_method=hqq"], "quantization_method"),
    "full on a quantised base": (["finetuning_type=full", "quantization_bit=4"], "finetuning_type"),
    "DoRA without LoRA": (["finetuning_type=freeze", "use_dora=true"], "use_dora"),
    "two precisions": (["bf16=true", "fp16=true"], "bf16: expected only one"),
    "no layer to train": (["finetuning_type=freeze", "freeze_trainable_layers=0"], "freeze_trainable_layers"),
    "PiSSA on 4 bits": (["pissa_init=true", "quantization_bit=4"], "pissa_init"),
    "LoftQ on a dense base": (["loftq_init=true"], "loftq_init"),
    "a fresh adapter after none": (["create_new_adapter=true"], "create_new_adapter"),
    "warmup of a constant": (["lr_scheduler_type=constant", "warmup_steps=3"], "lr_scheduler_type"),
    "a plateau of nothing": (["lr_scheduler_type=reduce_lr_on_plateau"], "lr_scheduler_type"),
    "evaluation of nothing": (["eval_strategy=steps"], "eval_strategy: expected no"),
    "prediction of nothing": (["do_predict=true", "predict_with_generate=true"], "do_predict"),
    "patience without evaluations": (["early_stopping_steps=3"], "early_stopping_steps"),
    "two held-out sets": (["eval_dataset=quickstart", "val_size=4"], "val_size"),
    "a stream without steps": (["streaming=true"], "max_steps"),
    "a packed stream": (["streaming=true", "max_steps=4", "packing=true"], "streaming"),
    "probabilities of no mixture": (["interleave_probs=0.5,0.5"], "interleave_probs"),
    "masks against each other": (["train_on_prompt=true", "mask_history=true"], "mask_history"),
    "a budget that nothing uses": (["activation_budget_gb=3"], "activation_budget_gb"),
    "graphs of unequal rows": (["cuda_graphs=true", "packing=true"], "cuda_graphs"),
    "a refused key": (["use_galore=true"], "use_galore"),
    "a secret in the file": (["hub_token=hf_abc"], "hub_token: expected false, got a secret"),
    "keys against each other": (["use_unsloth=true", "fuse=false"], "use_unsloth"),
    "LLaMA-Factory's second format": (["train_dataset=x"], "second format"),
    "Megatron's keys": (["tensor_model_parallel_size=2"], "Megatron"),
    "an optimizer's own key": (["optim_args=lr=3"], "optim_args"),
    "a base that is not there": (["model_name_or_path=./nowhere"], "model_name_or_path"),
    "an adapter that is not there": (["adapter_name_or_path=./nowhere"], "adapter_name_or_path"),
    "a set that is not there": (["dataset=nowhere"], "dataset"),
    "a sharding file that is not there": (["fsdp=full_shard", "fsdp_config=./nowhere.json"], "fsdp_config"),
    "a DeepSpeed file that is not there": (["deepspeed=./nowhere.json"], "deepspeed"),
    "a template that is not there": (["template=./nowhere.jinja"], "template"),
}
FILES = {
    "no such file": (None, "nowhere.yaml"),
    "YAML that breaks off": (FILE + "lora_target: [q_proj\n", ".yaml:5: expected YAML"),
    "a tab in YAML": (FILE + "a:\n\tb: 1\n", ".yaml:5: expected YAML"),
    "a key twice": (FILE + "seed: 1\nlora_rank: 8\nseed: 2\n", ".yaml:6: expected YAML, got key 'seed' given twice"),
    "a list of keys": ("- seed\n", "key: value lines"),
    "a sentence": ("train my model\n", "key: value lines"),
    "an empty file": ("", "model_name_or_path"),
    "not text": (b"\xff\xfe\x00seed", "expected YAML"),
    "an object of Python": (FILE + "seed: !!python/object/apply:os.getcwd []\n", ".yaml:4: expected YAML"),
    "a key that is no text": (FILE + "3: 4\n", "unknown key '3'"),
    "a missing key": ("model_name_or_path: quickstart\noutput_dir: out\n", "dataset: expected"),
    "an unhashable key": (FILE + "? [a]\n: 1\n", ".yaml:4: expected YAML"),
    "a merge that is none": (FILE + "<<: 3\n", ".yaml:4: expected YAML"),
}
RUN = """
import contextlib, io, json, os, sys, time
from fuselora import cli
for name, arguments in json.load(open(sys.argv[1])).items():
    said, began = io.StringIO(), time.process_time()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = cli.main(["train", *arguments])
    seconds = time.process_time() - began
    heavy = sorted({"torch", "transformers", "peft"} & set(sys.modules))
    print(json.dumps([name, code, said.getvalue(), seconds, heavy, sorted(os.listdir("."))]), flush=True)
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """(exit code, words, seconds, heavy imports, files) of every wrong configuration, by name."""
    folder = tmp_path_factory.mktemp("wrong")
    runs = {}
    for name, (extra, _) in OVERRIDES.items():
        path = folder / "good.yaml"
        path.write_text(FILE)
        runs[name] = [str(path), *extra]
    for number, (name, (text, _)) in enumerate(FILES.items()):
        path = folder / (f"{number}.yaml" if text is not None else "nowhere.yaml")
        if text is not None:
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
        runs[name] = [str(path)]
    (folder / "runs.json").write_text(json.dumps(runs))
    (folder / "empty").mkdir()
    environment = os.environ | {"PYTHONPATH": str(ROOT / "python"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(folder / "runs.json")],
        cwd=folder / "empty",
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return {name: rest for name, *rest in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", [*OVERRIDES, *FILES])
def test_one_sentence(outcomes, name):
    code, said, seconds, heavy, files = outcomes[name]
    words = (OVERRIDES | FILES)[name][1]
    assert code == 2 and said.startswith("error: ") and said.count("\n") == 1, said
    assert words in said, said
    assert heavy == [] and files == [] and seconds < 0.5


def test_a_command_that_is_wrong_takes_little(tmp_path):
    """Processor time of the whole command: the interpreter, the imports, the reading."""
    before = os.times()
    command = [sys.executable, "-m", "fuselora", "train", "model_name_or_path=quickstart", "lora_rnak=4"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT / "python")}, timeout=300)
    after = os.times()
    assert done.returncode == 2 and not any(tmp_path.iterdir())
    used = after.children_user + after.children_system - before.children_user - before.children_system
    assert used < 1.5
