"""RoPE beyond the contract: the transformers conventions, what is saved, mutations, errors."""

import importlib

import pytest
import torch

from fuselora.functional import rope
from fuselora.kernels import rope as module
from fuselora.kernels.registry import FUNCTIONS
from fuselora.testing import assert_function_close, saved_bytes

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(21)


def angles(rotary, length=6):
    return torch.arange(length)[:, None] * 10_000.0 ** (-torch.arange(0, rotary, 2) / rotary)


@pytest.mark.parametrize(
    ("family", "interleaved", "columns", "rotary"),
    [
        ("llama", False, lambda c: torch.cat((c, c), -1), 24),
        ("gpt_neox", False, lambda c: torch.cat((c, c), -1), 8),  # partial: 16 channels pass through
        ("cohere", True, lambda c: c.repeat_interleave(2, -1), 24),
    ],
)
def test_follows_transformers(family, interleaved, columns, rotary):
    """The same tensors through the family's own apply_rotary_pos_emb, which works on [B, H, S, D]."""
    stock = importlib.import_module(f"transformers.models.{family}.modeling_{family}").apply_rotary_pos_emb
    q, k = torch.randn(2, 6, 4, 24), torch.randn(2, 6, 2, 24)
    cos, sin = columns(angles(rotary).cos())[None], columns(angles(rotary).sin())[None]
    expected = [x.transpose(1, 2) for x in stock(q.transpose(1, 2), k.transpose(1, 2), cos, sin)]
    for ours, theirs in zip(rope(q, k, cos, sin, interleaved=interleaved), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_glm_repeats_the_first_half_of_its_tables():
    from transformers.models.glm.modeling_glm import apply_rotary_pos_emb

    q, k = torch.randn(1, 6, 2, 24), torch.randn(1, 6, 1, 24)
    cos, sin = (torch.cat((c, c), -1)[None] for c in (angles(16).cos(), angles(16).sin()))
    expected = [x.transpose(1, 2) for x in apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)]
    repeated = [x[..., :8].repeat_interleave(2, -1) for x in (cos, sin)]
    for ours, theirs in zip(rope(q, k, *repeated, interleaved=True), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_rotates_bf16_in_fp32_and_rounds_once():
    q, k = torch.randn(1, 6, 2, 24).bfloat16(), torch.randn(1, 6, 1, 24).bfloat16()
    cos, sin = module.tables(1, 6, 24, False, torch.float32, CPU)
    for ours, exact in zip(rope(q, k, cos, sin), rope(q.float(), k.float(), cos, sin), strict=True):
        assert torch.equal(ours, exact.bfloat16())


def test_saves_only_the_tables():
    q, k = (torch.randn(2, 6, h, 16, requires_grad=True) for h in (4, 2))
    cos, sin = module.tables(1, 6, 16, False, torch.float32, CPU)
    assert saved_bytes(lambda: rope(q, k, cos, sin)) == 2 * cos.numel() * 4


def test_outputs_are_contiguous_and_new():
    packed = torch.randn(2, 6, 3 * 16).unflatten(-1, (3, 16))
    before = packed.clone()
    cos, sin = module.tables(1, 6, 8, True, torch.float32, CPU)
    q, k = rope(packed[:, :, :2], packed[:, :, 2:], cos, sin, interleaved=True)
    assert q.is_contiguous() and k.is_contiguous()
    assert torch.equal(packed, before)


def adjoint_with_the_sign_of_sin_flipped(q, k, cos, sin, interleaved, adjoint):
    return RIGHT(q, k, cos, -sin if adjoint else sin, interleaved, adjoint)


def adjoint_by_negated_sin(q, k, cos, sin, interleaved, adjoint):
    """The usual shortcut, wrong as soon as the two halves of sin differ."""
    return RIGHT(q, k, cos, -sin if adjoint else sin, interleaved, False)


def rest_left_out(q, k, cos, sin, interleaved, adjoint):
    q, k = RIGHT(q, k, cos, sin, interleaved, adjoint)
    q[..., cos.shape[-1] :] = 0
    return q, k


RIGHT = module.ROPE.reference


@pytest.mark.parametrize("wrong", [adjoint_with_the_sign_of_sin_flipped, adjoint_by_negated_sin, rest_left_out])
def test_a_wrong_rotation_is_caught(monkeypatch, wrong):
    monkeypatch.setenv("FUSELORA_IMPL", "*=reference")
    monkeypatch.setattr(module.ROPE, "reference", wrong)
    failed = 0
    for sample in FUNCTIONS["rope"].samples(torch.bfloat16, CPU):
        try:
            assert_function_close(FUNCTIONS["rope"], sample)
        except AssertionError:
            failed += 1
    assert failed


GOOD = {"q": (2, 6, 4, 16), "k": (2, 6, 2, 16), "cos": (1, 6, 16), "sin": (1, 6, 16)}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"q": (2, 6, 64)}, "rope: q.dim"),
        ({"k": (2, 5, 2, 16)}, "rope: k: expected"),
        ({"cos": (3, 6, 16)}, "rope: cos.shape: expected"),
        ({"cos": (1, 6, 18)}, "an even size <= 16"),
        ({"cos": (1, 6, 7)}, "an even size <= 16"),
        ({"sin": (1, 6, 8)}, "rope: sin: expected"),
    ],
)
def test_bad_input_is_named(bad, message):
    with pytest.raises(ValueError, match=message) as error:
        rope(**{name: torch.zeros(shape) for name, shape in (GOOD | bad).items()})
    assert "got" in str(error.value) and ";" in str(error.value)
