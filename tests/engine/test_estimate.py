"""The memory estimator against what is there: weights exactly, peaks of training within 10 %."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.models import FAMILIES, SIZES, lora_model
from tests.support.peak import DTYPES, config
from transformers import AutoConfig

import fuselora
from fuselora.engine.config import load_config
from fuselora.engine.errors import UserError
from fuselora.engine.estimate import Run, estimate_run, longest
from fuselora.engine.memory_plan import GB
from fuselora.engine.memory_run import announce, run_of
from fuselora.engine.memory_shapes import LayerShape

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "vocab_size": 512}
WINDOW = {"head_dim": 16, "sliding_window": 4096}
GRID: list[dict[str, Any]] = [
    {"family": "llama", "dtype": "bf16", "batch": 16, "length": 512, "policy": "off", "sizes": SMALL},
    {"family": "llama", "dtype": "fp32", "batch": 24, "length": 256, "policy": "full", "sizes": SMALL},
    {
        "family": "qwen3",
        "dtype": "bf16",
        "batch": 1,
        "length": 4096,
        "policy": "mlp",
        "sizes": SMALL | {"head_dim": 16},
    },
    {"family": "gemma3_text", "dtype": "fp32", "batch": 16, "length": 256, "policy": "off", "sizes": SMALL | WINDOW},
    {"family": "olmo2", "dtype": "fp32", "batch": 16, "length": 256, "policy": "mlp", "sizes": SMALL},
    {"family": "gemma2", "dtype": "fp32", "batch": 40, "length": 64, "policy": "full", "sizes": SMALL | WINDOW},
]
WHOLE: list[dict[str, Any]] = [
    {"family": "llama", "policy": "mlp", "dtype": "bf16", "batch": 2, "length": 2048},
    {"family": "llama", "policy": "full", "dtype": "bf16", "batch": 4, "length": 1024, "keys": {"quantization_bit": 4}},
    {"family": "gemma2", "policy": "off", "dtype": "bf16", "batch": 2, "length": 1024, "rows": "short"},
    {"family": "qwen2", "policy": "full", "dtype": "fp32", "batch": 2, "length": 1024}
    | {"keys": {"finetuning_type": "full"}},
]
LLAMA_3_8B = AutoConfig.for_model(
    "llama",
    **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    **{"num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False},
)


def test_peaks_are_within_a_tenth() -> None:
    """VmHWM above the model, each point in a process of its own; glibc gives freed blocks back at once, as its default
    does not, whose peaks depend on the order of sizes before."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.peak"],
        input=json.dumps(GRID),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = []
    for point, peak in zip(GRID, json.loads(done.stdout), strict=True):
        shape = config(point["family"], **point["sizes"])
        shape._attn_implementation = "eager" if point["family"] == "gemma2" else "sdpa"
        run = Run(shape, point["batch"], point["length"], point["policy"], DTYPES[point["dtype"]], rank=8)
        rows.append((point, peak, estimate_run(run).above))
    wrong = [(p["family"], p["policy"], peak, guess) for p, peak, guess in rows if not 0.9 < guess / peak < 1.1]
    assert not wrong, wrong


def test_whole_runs_are_within_a_tenth(tmp_path: Path) -> None:
    """``train.py``'s main from the prediction on: loading, patching, all steps, saving."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.train_peak"],
        input=json.dumps({"folder": str(tmp_path), "points": WHOLE}),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [(p["family"], p["policy"], *row) for p, row in zip(WHOLE, json.loads(done.stdout), strict=True)]
    assert not [row for row in rows if not 0.9 < row[3] / max(row[2], 1) < 1.1], rows


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_exact(family: str) -> None:
    model = lora_model(family, torch.bfloat16, num_hidden_layers=5, lora={"r": 3})
    made = estimate_run(Run(model.config, 1, 32, rank=3))
    by_training: dict[bool, int] = {True: 0, False: 0}
    for parameter in model.parameters():
        by_training[parameter.requires_grad] += parameter.numel() * parameter.element_size()
    assert (made.trained, made.weights) == (by_training[True], by_training[False])
    assert made.gradients == made.trained and made.optimizer == 2 * made.trained


@pytest.mark.parametrize("policy", ["off", "mlp", "full"])
def test_what_layers_keep_is_the_formula(policy: str) -> None:
    """The 8B shape, counted on fake tensors: layers keep what memory_shapes.py says, to the byte."""
    shape = LayerShape(4096, 14336, 32, 8, 128, attention_ranks=4 * 16, mlp_ranks=3 * 16)
    few, more = (
        estimate_run(Run(_with_layers(LLAMA_3_8B, layers), 2, 2048, policy, rank=16)).kept for layers in (2, 12)
    )
    assert more - few == 10 * 4096 * shape.kept(policy, 2048)


def _with_layers(made: Any, layers: int) -> Any:
    fewer = copy.deepcopy(made)
    fewer.num_hidden_layers = layers
    return fewer


def test_nf4_weights_of_the_8b_shape() -> None:
    """5.7 GB: 6.98e9 weights in 4 bits and scales, embeddings and head in bf16."""
    linears = 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    rest = 2 * (2 * 128256 * 4096 + 65 * 4096)
    made = estimate_run(Run(LLAMA_3_8B, 1, 64, bits=4, rank=16))
    assert made.weights == pytest.approx(linears * (0.5 + (1 + 4 / 256) / 64) + rest, rel=1e-6)
    assert estimate_run(Run(LLAMA_3_8B, 1, 64, bits=4, rank=16, double_quant=False)).weights > made.weights


def test_the_longest_context_fits_and_one_step_more_does_not() -> None:
    run = Run(LLAMA_3_8B, 1, 64, "full", bits=4, rank=16, device="cuda")
    found = longest(run, 24 * 10**9)
    assert found is not None and found.total <= 24 * 10**9
    assert estimate_run(replace(found.run, length=found.run.length + 256)).total > 24 * 10**9
    assert longest(run, 5 * 10**9) is None


ARGUMENTS = ["model_name_or_path=quickstart", "dataset=quickstart", "output_dir=out", "use_cpu=true"]


@pytest.fixture
def base(tmp_path: Path) -> str:
    AutoConfig.for_model("llama", **SIZES).save_pretrained(tmp_path)
    return f"model_name_or_path={tmp_path}"


def test_a_report_of_a_configuration(base: str) -> None:
    budget = fuselora.estimate([*ARGUMENTS, base, "cutoff_len=128"]).estimates[2].total / GB + 0.1
    report = fuselora.estimate([*ARGUMENTS, base, "cutoff_len=128", f"memory_budget_gb={budget}"])
    assert [e.run.policy for e in report.estimates] == ["off", "mlp", "full"]
    assert report.estimates[0].kept > report.estimates[1].kept > report.estimates[2].kept
    assert report.contexts[0] < report.contexts[2]
    assert "full: contexts up to" in str(report) and "weights" in str(report)


def test_a_run_that_does_not_fit_ends_before_loading(base: str) -> None:
    arguments = [*ARGUMENTS, base, "cutoff_len=4096", "disable_gradient_checkpointing=true"]
    assert "GB predicted for rows of 4096 tokens" in announce(load_config(arguments))
    short = announce(load_config([*arguments, "cutoff_len=64"]))
    budget = round(float(short.split()[1]) + 0.02, 3)
    with pytest.raises(
        UserError, match=rf"memory_budget_gb: expected .* most {budget} GB, got .*; cutoff_len: \d+ fits"
    ):
        announce(load_config([*arguments, f"memory_budget_gb={budget}"]))


def test_what_is_not_estimated_is_said(base: str, tmp_path: Path) -> None:
    assert "not estimated, as fuse is false" in announce(load_config([*ARGUMENTS, base, "fuse=false"]))
    AutoConfig.for_model("gpt2").save_pretrained(tmp_path)
    config = load_config([*ARGUMENTS, f"model_name_or_path={tmp_path}"])
    assert "gpt2 is no family with fused layers" in announce(config)
    with pytest.raises(UserError, match="estimate: gpt2"):
        run_of(config)


def test_auto_keeps_its_budget(base: str) -> None:
    arguments = [*ARGUMENTS, base, "gradient_checkpointing=auto", "cutoff_len=4096"]
    tight, wide = (estimate_run(run_of(load_config([*arguments, f"activation_budget_gb={gb}"]))) for gb in (0.06, 50))
    stream = 8 * tight.run.batch * 4096 * SIZES["hidden_size"]
    assert tight.kept <= 60_000_000 + stream and wide.kept > tight.kept


def test_a_real_run_that_does_not_fit_ends_before_loading(tiny_base: Path, dataset_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [f"model_name_or_path={tiny_base}", "dataset=rows", f"dataset_dir={dataset_dir}", f"output_dir={out}"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *arguments, "use_cpu=true", "memory_budget_gb=0.1"],
        capture_output=True,
        text=True,
        check=False,
    )
    text = done.stdout + done.stderr
    assert done.returncode == 2 and "memory_budget_gb: expected a predicted peak of at most 0.1 GB" in text, text
    assert not out.exists() and "trained weights" not in text
