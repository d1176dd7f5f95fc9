"""bench/gate.py: a planted slow-down and a planted wrong gradient are caught, noise alone is not."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import gate
import pytest

ROOT = Path(gate.ROOT)


class Synthetic:
    """A version whose steps take ``factor`` times 0.9 s, with noise."""

    def __init__(self, name, tree, options):
        self.name = name
        self.factor = float(str(tree)) if name == "head" else 1.0
        self.draw = random.Random(name)
        self.above = 400 << 20 if tree == Path("9.0") else 300 << 20

    def ask(self, what):
        if what == "step":
            return {"seconds": 0.9 * self.factor * self.draw.gauss(1.0, 0.01)}
        return {"ok": True, "problems": []} if what == "parity" else {"above": self.above}

    def close(self):
        pass


@pytest.mark.parametrize(("factor", "slower"), [(1.05, True), (1.0, False), (0.9, False), (1.01, False)])
def test_five_percent_is_slower_and_noise_is_not(monkeypatch, factor, slower):
    monkeypatch.setattr(gate, "Version", Synthetic)
    result = gate.compare(Path("base"), Path(str(factor)), [], rounds=15)
    assert result["slower"] is slower and result["band"] < 0.03
    assert bool(gate.problems(result)) is slower


def test_more_memory_is_a_problem(monkeypatch):
    monkeypatch.setattr(gate, "Version", Synthetic)
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


def test_an_unknown_commit_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        gate.main(["--base", "no-such-commit"])
    assert stop.value.code == 2 and "expected a commit or a checkout, got 'no-such-commit'" in capsys.readouterr().err
