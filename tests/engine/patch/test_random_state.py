"""Patching and reporting draw no random numbers: a seeded script draws the same ones patched."""

from __future__ import annotations

import torch
from tests.support.models import lora_model

import fuselora


def test_patching_and_reporting_leave_the_random_state():
    model = lora_model("llama", torch.bfloat16)
    before = torch.get_rng_state()
    fuselora.patch_model(model, strict=True)
    str(fuselora.patch_report(model))
    fuselora.unpatch_model(model)
    assert torch.equal(torch.get_rng_state(), before)
