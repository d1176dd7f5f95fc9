"""bench/predict.py: the cost of a step without running it."""

from __future__ import annotations

import json

import predict
import presets
import pytest
from models import LoraShape

from fuselora.kernels.gpu.launch import interpreting

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(interpreting(), reason="meta tensors are not interpreted")

MACHINE = predict.MACHINES["h200"]


def test_products_of_a_step_are_counted_once():
    """Two products per base weight (forward, dX), the head's two, attention's seven half squares."""
    config, batch, seq = presets.load_config("cpu", None)
    tokens, h, i, kv, vocab = batch * seq, 1024, 2816, 256, 32000
    layer = 2 * tokens * (2 * h * h + 2 * h * kv + 3 * h * i)
    attention = 7 * batch * 16 * seq * seq * 64  # two forward, five backward, each 2 x half of seq^2 x 64
    expected = 8 * (2 * layer + attention) + 2 * 2 * tokens * h * vocab
    for side in ("peft-bf16", "fuselora"):
        p = predict.predict(config, side, batch, seq, MACHINE, LoraShape(rank=1))
        assert p.floor * MACHINE["matmul_flop_per_s"] == pytest.approx(expected, rel=0.02), side


def test_every_machine_predicts_a_gain_and_says_that_it_is_a_prediction(capsys):
    for name in predict.MACHINES:
        assert predict.main(["--gpu", name, "--preset", "cpu"]) == 0
        printed = capsys.readouterr().out
        assert printed.startswith("PREDICTION, not measured") and predict.MACHINES[name]["source"] in printed
        gain = float(printed.split("`fuselora`")[1].splitlines()[0].split("|")[-2].strip(" x"))
        assert gain > 1.2, printed


def test_calibration_shows_the_error_of_measured_steps(tmp_path, capsys):
    config, batch, seq = presets.load_config("cpu", None)
    limits = {"copy_bytes_per_s": 2e10, "matmul_flop_per_s": 4e11, "matmul_fp32_flop_per_s": 1e11}
    model = {"preset": "cpu", "model_type": "llama", "dtype": "bf16", "batch": batch, "seq": seq, "rank": 16}
    model |= {"quantize": None, "checkpointing": False, "layout": "padded"}
    machine = limits | {"fp32_flop_per_s": 1e11, "dtype": "bf16", "capability": 90, "multiprocessors": 132}
    machine |= {"gap_s": 0.0, "host_s": 0.0}
    exact = predict.predict(config, "peft", batch, seq, machine, LoraShape(16)).step
    run = {
        "model": model,
        "limits": limits,
        "comparisons": [],
        "sides": [{"name": "peft", "step_s": {"median": exact * 2}}],
    }
    (tmp_path / "cpu.json").write_text(json.dumps({"environment": {}, "runs": [run]}))
    assert predict.main(["--calibrate", str(tmp_path)]) == 0
    assert "| -50% |" in capsys.readouterr().out
