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


@pytest.mark.parametrize(("machine", "said"), [("t4", "DOES NOT FIT"), ("h200", ": fits")])
def test_a_model_that_does_not_fit_the_card_is_said(machine, said):
    config, batch, seq = presets.load_config("llama-3-8b", None)
    line = predict.fits(config, batch, seq, predict.MACHINES[machine])
    assert said in line and 25 < float(line.split(": ")[1].split()[0]) < 45  # weights 16 GB, activations 12 by kernels


def test_the_floor_of_llama_3_8b_is_that_of_its_products_by_hand():
    """32 layers of q, o (4096 x 4096), k, v (1024), gate, up, down (14336), the head, causal attention: 2 x 2048."""
    config, batch, seq = presets.load_config("llama-3-8b", None)
    weights = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    flops = 32 * (4 * 4096 * weights + 7 * 2 * 32 * 2048**2 * 128) + 4 * 4096 * 4096 * 128256
    p = predict.predict(config, "fuselora", batch, seq, MACHINE, LoraShape())
    assert p.floor == pytest.approx(flops / MACHINE["matmul_flop_per_s"], rel=0.02)
    assert 1.0 < p.step / p.floor < 1.25


def test_a_family_is_predicted_as_that_family(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        predict, "predict", lambda config, *rest: seen.append(config.model_type) or predict.Prediction(1, 0, 1)
    )
    model = {"preset": "cpu", "model_type": "gemma2", "dtype": "bf16", "batch": 2, "seq": 512, "rank": 16}
    model |= {"quantize": None, "checkpointing": False, "layout": "full", "padding": 0.0}
    limits = {"copy_bytes_per_s": 2e10, "matmul_flop_per_s": 4e11}
    run = {"model": model, "limits": limits, "comparisons": [], "sides": [{"name": "peft", "step_s": {"median": 2.0}}]}
    packed = run | {"model": model | {"layout": "packed"}}
    (tmp_path / "cpu.json").write_text(json.dumps({"environment": {}, "runs": [run, packed]}))
    assert predict.calibrate(tmp_path).endswith("| -50% |") and seen == ["gemma2"]


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
