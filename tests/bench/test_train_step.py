"""bench/train_step.py end to end on the tiny preset: the record it writes; without parity nothing is measured."""

from __future__ import annotations

import importlib
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parents[2] / "bench"
SCRIPTS = (
    "energy",
    "gemms",
    "ladder",
    "layer",
    "machine",
    "memory",
    "models",
    "parity",
    "presets",
    "report",
    "step_options",
    "timing",
    "train_step",
)
QUICK = ["--preset", "tiny", "--rounds", "3", "--warmup", "1", "--baseline", "peft"]


@pytest.fixture(scope="module")
def bench():
    """The scripts by name, imported as ``python bench/train_step.py`` would: from their own folder."""
    sys.path.insert(0, str(BENCH))
    try:
        yield {name: importlib.import_module(name) for name in SCRIPTS}
    finally:
        sys.path.remove(str(BENCH))
        for name in SCRIPTS:
            sys.modules.pop(name, None)


def test_tiny_preset_end_to_end(bench, tmp_path, capsys):
    path = tmp_path / "out.json"
    assert bench["train_step"].main([*QUICK, "--no-memory", "--json", str(path)]) == 0
    record = json.loads(path.read_text())
    assert record["schema"] == bench["report"].SCHEMA
    assert {"command", "git", "cpu", "threads", "packages", "allocator", "date"} <= record["environment"].keys()
    (run,) = record["runs"]
    assert [gate["ok"] for gate in run["parity"]] == [True]
    assert run["parity"][0]["gradients"] == 28 and len(run["parity"][0]["curve"]["ours"]) == 20
    assert any(statuses.get("fused") for statuses in run["patched"].values())
    assert [side["name"] for side in run["sides"]] == ["peft", "fuselora"]
    for side in run["sides"]:
        step = side["step_s"]
        assert len(side["steps_s"]) == step["rounds"] == 3
        assert 0 < step["p5"] <= step["median"] <= step["p95"]
        assert side["tokens_per_s"] == pytest.approx(2 * 24 / step["median"])
        assert side["over_gemms"]["median"] == pytest.approx(step["median"] / run["gemms"]["step_s"]["median"], rel=0.9)
    assert run["model"]["heap"] == "kept" and run["missing"] == {} and run["gemms"]["products"] == 15
    (pair,) = run["comparisons"]
    assert pair["speed_up"]["low"] <= pair["speed_up"]["median"] <= pair["speed_up"]["high"]
    assert "fuselora against peft:" in capsys.readouterr().out


def test_int8_bases_pass_the_gate_and_share_their_codes(bench, tmp_path):
    pytest.importorskip("bitsandbytes")
    path = tmp_path / "out.json"
    assert bench["train_step"].main([*QUICK, "--quantize", "int8", "--no-memory", "--json", str(path)]) == 0
    (run,) = json.loads(path.read_text())["runs"]
    assert run["model"]["quantize"] == "int8" and run["parity"][0]["ok"] and run["parity"][0]["gradients"] == 28
    assert run["patched"]["lora_linear"] == {"fused": 14}
    config, _, _ = bench["presets"].load_config("tiny", None)
    base = bench["models"].build_base(config, torch.bfloat16, torch.device("cpu"), 0, "int8")
    copies = [bench["models"].share_copy(base).model.layers[0].mlp.up_proj for _ in range(2)]
    assert copies[0].weight.dtype is torch.int8
    assert len({layer.state.CB.data_ptr() for layer in copies} | {copies[0].weight.data_ptr()}) == 1


def test_memory_of_a_side_in_its_own_process(bench):
    used = bench["memory"].measure(["--preset", "tiny", "--seq", "128", "--device", "cpu"], "fuselora")
    assert used["peak"] - used["model"] == used["above"] > 0
    assert 0 < used["weights"] < used["model"]
    assert used["meter"].startswith("VmHWM")


def test_a_baseline_whose_process_runs_out_of_memory_is_named_and_the_others_go_on(bench, tmp_path, monkeypatch):
    failed = bench["memory"].Failed

    def measure(arguments, side):
        if side == "peft-bf16":
            raise failed("torch.OutOfMemoryError: CUDA out of memory")
        return {"above": 1 << 20, "peak": 2 << 20, "model": 1 << 20}

    monkeypatch.setattr(bench["memory"], "measure", measure)
    path = tmp_path / "out.json"
    assert bench["train_step"].main([*QUICK, "peft-bf16", "--json", str(path)]) == 0
    (run,) = json.loads(path.read_text())["runs"]
    assert run["missing"] == {"peft-bf16": "torch.OutOfMemoryError: CUDA out of memory"}
    assert [side["name"] for side in run["sides"]] == ["peft", "fuselora"] and run["sides"][0]["memory"]["above"]


def test_a_baseline_that_fails_at_its_first_step_is_named(bench, tmp_path, monkeypatch, capsys):
    build = bench["models"].build_side
    error = RuntimeError("inductor: no C++ compiler\nand a trace")

    def broken(base, side, *rest, **options):
        if side.name == "peft-bf16":
            raise error
        return build(base, side, *rest, **options)

    monkeypatch.setattr(bench["models"], "build_side", broken)
    path = tmp_path / "out.json"
    arguments = ["--no-memory", "--json", str(path)]
    assert bench["train_step"].main([*QUICK, "peft-bf16", *arguments]) == 0
    (run,) = json.loads(path.read_text())["runs"]
    assert run["missing"] == {"peft-bf16": "RuntimeError: inductor: no C++ compiler"} and len(run["comparisons"]) == 1
    assert "peft-bf16: not run: RuntimeError: inductor" in capsys.readouterr().out


@pytest.mark.parametrize(("error", "raised"), [(torch.OutOfMemoryError("too long"), False), (TypeError("bug"), True)])
def test_a_candidate_may_lack_memory_but_not_fail(bench, monkeypatch, error, raised):
    step, base = bench["train_step"], object()
    monkeypatch.setattr(step, "build_trainer", lambda *args: (_ for _ in ()).throw(error))
    args = step.parse_arguments(QUICK)
    if raised:
        with pytest.raises(TypeError, match="bug"):
            step.ready_trainers(args, base, ["fuselora"], {})
    else:
        assert step.ready_trainers(args, base, ["fuselora"], {})[2] == {"fuselora": "OutOfMemoryError: too long"}


def test_a_killed_process_is_told_from_an_error(bench, monkeypatch):
    memory = bench["memory"]
    for code, stderr, said in (
        (-9, "", "ended by SIGKILL; SIGKILL: no memory was left"),
        (1, "Traceback\n  x = 1\ntorch.OutOfMemoryError: CUDA out of memory. Tried 2 GiB\n\n", "CUDA out of memory"),
    ):
        done = type("Done", (), {"returncode": code, "stderr": stderr, "stdout": ""})
        monkeypatch.setattr(memory.subprocess, "run", lambda *args, done=done, **options: done)
        with pytest.raises(memory.Failed, match=said):
            memory.measure([], "peft")


def test_padding_is_masked_ignored_and_not_counted(bench):
    models = bench["models"]
    config, _, _ = bench["presets"].load_config("tiny", None)
    data = models.random_batch(config, 4, 64, torch.device("cpu"), 0, "padded")
    mask, real = data["attention_mask"], models.real_tokens(data)
    assert real == int(mask.sum()) < 4 * 64 and mask[0].all() and (mask.diff(dim=1) <= 0).all()
    assert (data["labels"][mask == 0] == -100).all() and (data["labels"] != -100).any(dim=1).all()
    full = models.random_batch(config, 4, 64, torch.device("cpu"), 0)
    assert models.real_tokens(full) == 256 and torch.equal(full["input_ids"], data["input_ids"])


def test_padded_rows_pass_the_gate_and_count_real_tokens(bench, tmp_path):
    path = tmp_path / "out.json"
    assert bench["train_step"].main([*QUICK, "--padded", "--no-memory", "--json", str(path)]) == 0
    (run,) = json.loads(path.read_text())["runs"]
    assert run["parity"][0]["ok"] and run["model"]["layout"] == "padded" and 0 < run["model"]["padding"] < 1
    real = 48 * (1 - run["model"]["padding"])
    assert run["sides"][0]["tokens_per_s"] == pytest.approx(real / run["sides"][0]["step_s"]["median"])


def test_few_rounds_have_a_range_and_no_interval(bench):
    report, ratio = bench["report"], {"median": 2.0, "low": 1.5, "high": 2.5}
    for rounds, text in ((5, "(1.50 to 2.50)"), (6, "[1.50, 2.50]")):
        assert report.spread(ratio, {"sides": [{"step_s": {"rounds": rounds}}]}) == text


def test_peak_meter_sees_what_was_freed_again(bench):
    meter = bench["memory"].PeakMeter(torch.device("cpu"))
    meter.start()
    block = torch.ones(64 << 20, dtype=torch.uint8)
    del block
    assert 60 << 20 < meter.record()["above"] < 160 << 20


def test_wrong_gradient_stops_before_any_figure(bench, tmp_path, capsys, monkeypatch):
    def plant(model, side):
        next(p for name, p in model.named_parameters() if "v_proj.lora_A" in name).register_hook(
            lambda grad: grad * 1.1
        )
        return model

    monkeypatch.setattr(bench["models"], "patch", plant)
    path = tmp_path / "out.json"
    assert bench["train_step"].main([*QUICK, "--no-memory", "--json", str(path)]) == 1
    (run,) = json.loads(path.read_text())["runs"]
    assert not run["parity"][0]["ok"] and "sides" not in run and "comparisons" not in run
    printed = capsys.readouterr()
    assert "v_proj.lora_A" in printed.out and "parity of fuselora: FAILED" in printed.out
    assert "tokens/s" not in printed.out and "no parity, no figures" in printed.err


def test_wrong_learning_is_caught_where_gradients_are_right(bench):
    losses = tuple(5.0 - 0.02 * step for step in range(20))
    result = type("Ok", (), {"ok": True, "rows": (1,), "zero_gradients": 0})()
    gate = bench["parity"].Gate
    assert gate("fuselora", result, losses, losses, losses, bound=0.01).ok
    drifting = tuple(loss + 0.002 * step for step, loss in enumerate(losses))
    (problem,) = gate("fuselora", result, drifting, losses, losses, bound=0.01).problems
    assert "losses of 20 steps" in problem
    (problem,) = gate("fuselora", result, losses, losses, losses, bound=0.1).problems
    assert "loss fell by" in problem


def test_zero_gradients_stop_the_gate(bench):
    losses = tuple(5.0 - 0.02 * step for step in range(20))
    result = type("Zero", (), {"ok": True, "rows": (1, 1), "zero_gradients": 1})()
    (problem,) = bench["parity"].Gate("fuselora", result, losses, losses, losses, bound=0.01).problems
    assert "1 of 2 adapter gradients are zero" in problem


def test_sides_share_frozen_tensors_and_start_alike(bench):
    models = bench["models"]
    config, _, _ = bench["presets"].load_config("tiny", None)
    base = models.build_base(config, torch.bfloat16, torch.device("cpu"), 0)
    sides = [models.parse_side(name) for name in ("peft", "peft-bf16", "fuselora/no-loss")]
    built = [models.build_side(base, side, models.LoraShape(), checkpointing=False, seed=0) for side in sides]
    stock, low, ours = (dict(model.named_parameters()) for model in built)
    assert sides[2].disable == ("loss",) and sides[2].stock().name == "peft"
    for name, p in stock.items():
        if p.requires_grad:
            assert p is not ours[name] and torch.equal(p, ours[name]) and p.abs().min() < p.abs().max()
            assert (p.dtype, low[name].dtype) == (torch.float32, torch.bfloat16) and torch.equal(p, low[name].float())
        else:
            assert p is ours[name] and p is low[name]


def test_paired_ratio_and_order(bench):
    timing = bench["timing"]
    times = [timing.StepTime(total, 0.0, 0.0, 0.0) for total in (2.0, 4.0, 6.0)]
    halves = [timing.StepTime(t.total / 2, 0.0, 0.0, 0.0) for t in times]
    assert timing.speed_up(times, halves) == {"median": 2.0, "low": 2.0, "high": 2.0}
    order = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def step(self):
            order.append(self.name)
            return times[0]

    timing.interleave([Recorder("a"), Recorder("b")], 2)
    assert order == ["a", "b", "b", "a"]
    order.clear()
    timing.interleave([Recorder(name) for name in "abc"], 3)
    assert "".join(order) == "abcbcacab"
    assert all(a != b for a, b in itertools.pairwise(order)), "a side that steps twice in a row finds its caches warm"


def test_bare_products_are_those_of_the_frozen_linears(bench):
    """Forward and dX of 14 linears on all tokens, no dX behind the frozen embedding, the head on the trained rows."""
    models, gemms = bench["models"], bench["gemms"]
    config, batch, seq = bench["presets"].load_config("tiny", None)
    device, h, i, kv = torch.device("cpu"), 48, 88, 24
    data = models.random_batch(config, batch, seq, device, 0)
    for quantize in (None, "nf4"):
        if quantize:
            pytest.importorskip("bitsandbytes")
        base = models.build_base(config, torch.bfloat16, device, 0, quantize)
        model = models.build_side(base, models.parse_side("peft"), models.LoraShape(), checkpointing=False, seed=0)
        bare = gemms.BareGemms(gemms.products(model, data, torch.bfloat16), torch.bfloat16, device)
        layer, first = 2 * h * h + 2 * h * kv + 3 * h * i, h * h + 2 * h * kv
        trained = 2 * (24 - 6)
        assert bare.flops == 2 * 48 * (4 * layer - first) + 4 * trained * 211 * h
        assert bare.step().total > 0


def test_rungs_of_the_ladder_compute_the_loss_of_stock(bench):
    models, ladder = bench["models"], bench["ladder"]
    config, batch, seq = bench["presets"].load_config("tiny", None)
    device, losses = torch.device("cpu"), {}
    base = models.build_base(config, torch.float32, device, 0)
    data = models.random_batch(config, batch, seq, device, 0)
    for name in ("peft", "peft-trl", "peft-lce"):
        side = models.parse_side(name)
        if side.rung and ladder.unavailable(side.rung, config, device):
            continue
        model = models.build_side(base, side, models.LoraShape(), checkpointing=False, seed=0)
        losses[name] = model(**data, **ladder.INPUTS.get(side.rung or "", {})).loss.item()
    assert len(losses) > 1 and list(losses.values()) == pytest.approx([losses["peft"]] * len(losses), rel=1e-5)


def test_a_rung_that_is_not_installed_is_named_with_the_reason(bench, tmp_path, capsys):
    path = tmp_path / "out.json"
    arguments = ["--no-memory", "--rounds", "1", "--json", str(path)]
    assert bench["train_step"].main([*QUICK, "unsloth", "peft-liger", *arguments]) == 0
    (run,) = json.loads(path.read_text())["runs"]
    assert set(run["missing"]) == {"unsloth", "peft-liger"} and [s["name"] for s in run["sides"]] == [
        "peft",
        "fuselora",
    ]
    assert "unsloth: not run: unsloth is not installed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--baseline", "liger"], "side: expected peft or fuselora"),
        (["--config", "nowhere.json"], "--config: expected a Hugging Face config.json, got 'nowhere.json'"),
        (["--dropout", "1"], "--dropout: expected 0 <= p < 1, got 1.0"),
        (["--baseline", "--rounds", "1"], "--baseline: expected a side to compare with, got none"),
        (["--baseline", "fuselora-trl"], "side: expected peft or fuselora"),
        (["--rounds", "0"], "--rounds: expected at least 1, got 0"),
        (["--candidate", "fuselora/no-lunch"], "side: expected one of"),
    ],
)
def test_bad_arguments_exit_with_2_and_one_line(bench, capsys, arguments, said):
    with pytest.raises(SystemExit) as stop:
        bench["train_step"].main(arguments)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and said in err and err.count("\n") == 1


def test_energy_is_read_where_the_processor_shows_it(bench, tmp_path, monkeypatch):
    energy = bench["energy"]
    monkeypatch.setattr(energy, "RAPL", tmp_path)
    assert energy.meter(torch.device("cpu")) is None
    for package, microjoules in ((0, 3_000_000), (1, 4_500_000)):
        folder = tmp_path / f"intel-rapl:{package}"
        folder.mkdir()
        (folder / "energy_uj").write_text(f"{microjoules}\n")
    assert energy.meter(torch.device("cpu"))() == pytest.approx(7.5)
