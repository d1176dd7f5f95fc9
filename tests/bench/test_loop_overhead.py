"""The overhead benchmark runs, and both of its sides do the same work."""

import json

import loop_overhead
import torch


def test_both_sides_take_the_same_steps(tmp_path):
    args = loop_overhead.argparse.Namespace(preset="tiny", layers=1, logging_steps=10)
    bare, trainer = loop_overhead.build(args, tmp_path)
    trainer.schedule.factor = lambda step: 1.0
    trainer.config.__dict__["max_grad_norm"] = 0.0  # the bare step doesn't clip
    for _ in range(3):
        bare.step()
        trainer.training_step()
    for a, b in zip(bare.model.parameters(), trainer.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_report(capsys):
    loop_overhead.main(["--preset", "tiny", "--layers", "1", "--rounds", "2"])
    out = capsys.readouterr().out
    assert set(json.loads(out[out.index("{") :])) == {
        f"{w} {s}" for w in ("wall", "processor") for s in ("median", "minimum")
    }
