"""bench/gate.py: a planted slow-down and a planted wrong gradient are caught, noise alone is not."""

from __future__ import annotations

import itertools
import json
import random
import re
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import gate
import gate_rates
import gate_worker
import pytest

ROOT = Path(gate.ROOT)


class Synthetic:
    """A version whose steps take ``factor`` times 0.9 s, with noise of steps and of whole processes."""

    started: list[str] = []

    def __init__(self, name, tree, options):
        self.name = name
        self.factor = float(tree.name) if name == "head" else 1.0
        if "--plant" in options:
            self.factor *= 1 + float(options[options.index("--plant") + 1].removeprefix("sleep:"))
        self.started.append(name)
        self.draw = random.Random(len(self.started))
        self.factor *= self.draw.gauss(1.0, 0.004)
        self.above = 400 << 20 if tree.name == "9.0" else 300 << 20

    def start(self):
        pass

    def ask(self, what):
        if what == "step":
            return {"seconds": 0.9 * self.factor * self.draw.gauss(1.0, 0.01)}
        return {"ok": True, "problems": []} if what == "parity" else {"above": self.above}

    def close(self):
        pass


@pytest.fixture
def synthetic(monkeypatch):
    monkeypatch.setattr(gate, "Version", Synthetic)
    monkeypatch.setattr(Synthetic, "started", [])
    return Synthetic


@pytest.mark.parametrize(("factor", "slower"), [(1.05, True), (1.0, False), (0.9, False), (1.01, False)])
def test_five_percent_is_slower_and_noise_is_not(synthetic, factor, slower):
    result = gate.compare(Path("base"), Path(str(factor)), [], rounds=8)
    assert result["slower"] is slower and result["band"] < 0.03
    assert bool(gate.problems(result)) is slower
    assert result["launches"] >= (gate.CONFIRM if slower else gate.LEAST)


def test_launches_are_added_until_five_percent_can_be_seen(synthetic, monkeypatch, capsys):
    noisy = random.Random(3)
    monkeypatch.setattr(Synthetic, "ask", lambda self, what, quiet=Synthetic.ask: (
        {"seconds": noisy.gauss(1.0, 0.06)} if what == "step" else quiet(self, what)
    ))  # fmt: skip
    sure = gate.compare(Path("base"), Path("1.0"), [], rounds=8)
    assert sure["launches"] > gate.LEAST and sure["seen"] <= gate.SURE
    unsure = gate.compare(Path("base"), Path("1.0"), [], rounds=8, limit=0.0)
    assert unsure["launches"] == gate.LEAST and unsure["seen"] > gate.SURE
    assert gate.report_problems(unsure) == []
    assert "the machine is too busy to see less than" in capsys.readouterr().err


def test_no_version_steps_twice_in_a_row_and_each_follows_each_equally_often(synthetic, monkeypatch):
    steps = []
    monkeypatch.setattr(Synthetic, "ask", lambda self, what: steps.append(self.name) or {"seconds": 1.0, "above": 0})
    gate.launch([(name, Path("1.0"), []) for name in "abc"], rounds=4)
    followed = Counter(itertools.pairwise(steps[3:]))  # the first three are warm-ups
    assert all(a != b for a, b in followed) and len(followed) == 6
    assert max(followed.values()) - min(followed.values()) <= 1


def test_launches_start_their_processes_in_another_order(synthetic):
    gate.compare(Path("base"), Path("1.05"), [], rounds=8)
    assert synthetic.started[0] == "head"  # judged for parity, in a process of its own
    assert [synthetic.started[i] for i in (1, 4, 7)] == ["head", "base", "base again"]


def test_planted_errors_are_told_from_those_that_are_missed(synthetic, capsys):
    arguments = ["--head", "1.0", "--plant"]
    assert gate.main([*arguments, "sleep:0.05"]) == 0 and "caught: sleep:0.05" in capsys.readouterr().out
    assert gate.main([*arguments, "sleep:0.001"]) == 1 and "NOT caught: sleep:0.001" in capsys.readouterr().out


def test_a_planted_sleep_lasts_its_share_of_the_step():
    worker = gate_worker.Worker("tiny", "fuselora", "sleep:0.5")
    worker.trainer = SimpleNamespace(step=lambda: SimpleNamespace(total=0.2))
    assert 0.1 <= worker.step()["seconds"] < 0.2


def test_more_memory_is_a_problem(synthetic):
    assert any("larger: 400 MiB" in text for text in gate.problems(gate.compare(Path("base"), Path("9.0"), [], 2)))


@pytest.fixture
def planted(tmp_path):
    """A checkout of this package, to plant an error in."""
    for name in ("python", "engine", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))

    def plant(old, new):
        path = tmp_path / "engine" / "patch" / "loss.py"
        text = path.read_text()
        assert text.count(old) == 1
        path.write_text(text.replace(old, new))
        return tmp_path

    return plant


def test_a_planted_sleep_is_in_the_step_of_that_version_only(planted):
    tree = planted("token = _LABELS_GIVEN.set(True)", "__import__('time').sleep(3.0); token = _LABELS_GIVEN.set(True)")
    for directory, slept in ((tree, True), (ROOT, False)):
        version = gate.Version("any", directory, ["--preset", "tiny", "--side", "fuselora"])
        try:
            version.start()
            version.ask("warm up")
            assert (version.ask("step")["seconds"] >= 3.0) is slept
        finally:
            version.close()


def test_a_planted_wrong_gradient_gets_no_figure(planted, capsys):
    """The loss is right and the gradient behind the head five percent too large."""
    tree = planted("LazyLogits.make(x,", "LazyLogits.make(x + 0.05 * (x - x.detach()),")
    assert gate.main(["--base", str(ROOT), "--head", str(tree), "--preset", "tiny"]) == 1
    printed = capsys.readouterr()
    assert "gate: wrong: a gradient" in printed.err and "no parity, no figures" in printed.out


def test_the_gradient_that_the_gate_plants_itself_is_caught(capsys):
    assert gate.main(["--preset", "tiny", "--plant", "gradient"]) == 0
    printed = capsys.readouterr()
    assert "gate: wrong: a gradient" in printed.err and "caught: gradient" in printed.out


def test_simulated_rates_of_false_alarms_and_findings(capsys, tmp_path):
    steps = [1.0 + 0.01 * (i % 5 - 2) for i in range(20)]
    record = {"comparisons": [], "sides": [{"name": "fuselora", "step_s": {"median": 0.6}}]}
    record["sides"][0]["steps_s"] = [0.6 * ratio for ratio in steps]
    (tmp_path / "cpu.json").write_text(json.dumps({"environment": {}, "runs": [record]}))
    assert gate_rates.deviations(tmp_path) == pytest.approx(steps)
    assert gate_rates.main(["--records", str(tmp_path), "--trials", "6", "--launches", "5"]) == 0
    found = dict(re.findall(r"slow-down (\d)%: found in (\d) of 6", capsys.readouterr().out))
    assert found["0"] == "0" and found["5"] == found["8"] == "6"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--base", "no-such-commit"], "expected a commit or a checkout, got 'no-such-commit'"),
        (["--plant", "sleep"], "--plant: expected gradient or sleep:FRACTION, got 'sleep'"),
        (["--rounds", "0"], "--rounds: expected at least 1, got 0"),
    ],
)
def test_bad_arguments_are_one_line(capsys, arguments, said):
    try:
        code = gate.main(arguments)
    except SystemExit as stop:
        code = stop.code
    err = capsys.readouterr().err
    assert code == 2 and said in err and err.count("\n") == 1
