"""Tables and plots from records; the tables in README.md and docs/ say what the committed records say."""

from __future__ import annotations

import json

import plots
import pytest
import report
import tables
import torch
import write_report
from matplotlib import image


def run_record(seq=512, candidate="fuselora", quantize=None):
    step = {"median": 1.0, "p5": 0.9, "p95": 1.1, "forward": 0.4, "backward": 0.6, "optimizer": 0.0, "rounds": 8}
    sides = [
        {
            "name": name,
            "warm_up_s": [2.0],
            "step_s": step | {"median": seconds},
            "tokens_per_s": seq / seconds,
            "memory": {"above": above << 20},
        }
        for name, seconds, above in (("peft", 1.5, 400), (candidate, 1.0, 100))
    ]
    model = {"preset": "cpu", "model_type": "llama", "quantize": quantize, "dtype": "bf16", "batch": 2, "seq": seq}
    return {
        "model": model | {"checkpointing": False, "layout": "padded"},
        "parity": [],
        "sides": sides,
        "comparisons": [
            {
                "baseline": "peft",
                "candidate": candidate,
                "speed_up": {"median": 1.5, "low": 1.4, "high": 1.6},
                "memory_ratio": 0.25,
            }
        ],
    }


@pytest.fixture
def folder(tmp_path):
    environment = {"packages": dict.fromkeys(("torch", "transformers", "peft"), "1"), "git": {"commit": "a" * 40}}
    environment["git"]["dirty"] = False
    environment |= {"gpu": None, "cpu": "some cpu", "threads": 2, "command": "python bench/train_step.py"}
    for name, runs in {
        "cpu-2026-01-01": [run_record(candidate="peft")],  # superseded by the next
        "cpu-2026-02-01": [run_record()],
        "lengths": [run_record(seq) for seq in (128, 512, 2048)],
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"environment": environment, "runs": runs}))
    entries = [
        {"name": f"op rms_norm [layer] {tag}", "seconds": 1e-3, "bytes": 4e6, "flops": 1e6}
        for tag in ("cpu", "reference")
    ]
    entries[0] |= {"share_of_copy": 0.5, "share_of_matmul": 0.01}
    kernels = {"stage": "kernels", "environment": environment, "entries": entries}
    kernels["machine"] = {"copy_bytes_per_s": 2e10, "matmul_flop_per_s": 5e11}
    (tmp_path / "kernels.json").write_text(json.dumps(kernels))
    return tmp_path


def test_only_the_newest_record_of_a_name_counts(folder):
    assert tables.newest(folder)["cpu"].name == "cpu-2026-02-01.json"
    assert "**1.50x** [1.40, 1.60]" in tables.headline(folder)
    assert "twice" not in tables.noise(folder)


def test_the_roofline_names_all_ops_within_the_picture(monkeypatch, tmp_path):
    entries = [{"name": f"op op{i} [layer] cpu", "seconds": 1e-3, "bytes": 4e6, "flops": 1e6 + i} for i in range(45)]
    shown = []
    monkeypatch.setattr(plots, "_finish", lambda figure, axes, path: shown.append(figure))
    record = {"machine": {"copy_bytes_per_s": 2e10, "matmul_flop_per_s": 5e11}, "entries": entries, "smoke": True}
    plots.roofline(record, tmp_path / "roofline.png")
    (figure,) = shown
    figure.canvas.draw()
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 46 and legend.get_window_extent().y0 >= 0
    assert figure.axes[0].get_title().startswith("SMOKE RUN")


def test_other_files_of_a_suite_are_no_records(folder):
    before = tables.newest(folder)
    (folder / "choice_table.json").write_text('[{"op": "lora_project"}]')
    (folder / "suite.json").write_text('{"build": {"runs": []}}')
    assert tables.newest(folder) == before
    assert write_report.main([str(folder), "--out", str(folder / "out")]) == 0


def test_report_holds_tables_and_readable_plots(folder):
    assert write_report.main([str(folder), "--out", str(folder / "out")]) == 0
    report = (folder / "out" / "report.md").read_text()
    for name in ("speed-up", "memory", "length-0", "roofline"):
        assert f"![{name}]({name}.png)" in report
        height, width, _ = image.imread(folder / "out" / f"{name}.png").shape
        assert width > 800 and height > 150
    assert "| `op rms_norm [layer] cpu` | 1.000 ms | 50% | 1% |" in report
    assert "aaaaaaa" in report and "`python bench/train_step.py`" in report


def test_an_empty_folder_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        write_report.main([str(tmp_path)])
    assert stop.value.code == 2 and "expected a folder with .json records" in capsys.readouterr().err


def test_sweeps_group_what_differs_in_length_only(folder):
    runs = [run for _, _, run in tables.step_runs(folder)]
    (group,) = plots.sweeps(runs).values()
    assert [run["model"]["seq"] for run in group] == [128, 512, 2048]


def test_sweeps_are_named_by_all_but_the_size_and_keep_the_baseline():
    """Checkpointing belongs to the name; a toggle run of one length must not take the place of one with stock in it."""
    full, long, toggle = run_record(), run_record(2048), run_record()
    toggle["sides"] = [{**side, "name": "fuselora/no-loss"} for side in toggle["sides"][:1]] + toggle["sides"][1:]
    for run in (full, long, toggle):
        run["model"]["checkpointing"] = True
    (name,), (group,) = zip(*plots.sweeps([full, long, toggle]).items(), strict=True)
    assert name == "cpu, bf16, checkpointing"
    assert [[side["name"] for side in run["sides"]] for run in group] == [["peft", "fuselora"]] * 2


def test_documents_hold_the_tables_of_the_committed_records(capsys):
    assert tables.main([]) == 0, capsys.readouterr().out


def test_every_machine_with_records_has_a_table(monkeypatch, tmp_path):
    assert tables.undocumented() == []
    (tmp_path / "nvidia-h100-80gb-hbm3").mkdir()
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.undocumented() == ["nvidia-h100-80gb-hbm3"]


def test_a_changed_figure_in_a_document_is_found(monkeypatch, tmp_path):
    text = (tables.ROOT / "docs" / "benchmarks.md").read_text()
    assert tables.MARKED.search(text), "no marked table in docs/benchmarks.md"
    wrong = tables.MARKED.sub(lambda m: f"{m[1]}| 9.99x |\n{m[4]}", text)
    assert tables.filled(wrong, tables.ROOT / "docs" / "benchmarks.md") == text != wrong


def test_a_record_s_command_names_no_machine_path(monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench/x.py", "--json", str(report.ROOT / "build/bench/x.json")])
    assert report.environment(torch.device("cpu"))["command"] == "python bench/x.py --json build/bench/x.json"
