"""GLU beyond the contract: the two raw entry points, what is saved, mutations, errors."""

import pytest
import torch

from fuselora.functional import glu, glu_packed
from fuselora.kernels import glu as module
from fuselora.kernels.glu import ACTIVATIONS, glu_backward, glu_forward
from fuselora.kernels.registry import FUNCTIONS
from fuselora.testing import assert_function_close, saved_bytes

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(22)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_gradcheck(act):
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.autograd.gradcheck(lambda g, u: glu(g, u, act), (gate, up))
    torch.autograd.gradcheck(lambda x: glu_packed(x, act), torch.cat((gate, up), -1).detach().requires_grad_()[:, :8])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_raw_entry_points_give_the_bits_of_the_function(act, dtype):
    gate, up, dh = (torch.randn(5, 24, dtype=dtype) for _ in range(3))
    leaves = [x.clone().requires_grad_() for x in (gate, up)]
    h = glu(*leaves, act)
    grads = torch.autograd.grad(h, leaves, dh)
    dgate, dup, again = glu_backward(dh, gate, up, act, True)
    assert torch.equal(h, glu_forward(gate, up, act))
    assert torch.equal(h, again)
    assert torch.equal(grads[0], dgate) and torch.equal(grads[1], dup)
    assert glu_backward(dh, gate, up, act, False)[2].numel() == 0


def test_rounds_bf16_once():
    gate, up = (torch.randn(7, 24).bfloat16() for _ in range(2))
    assert torch.equal(glu(gate, up), glu(gate.float(), up.float()).bfloat16())


def test_saves_gate_and_up_only():
    gate, up = (torch.randn(4, 24, requires_grad=True) for _ in range(2))
    assert saved_bytes(lambda: glu(gate, up)) == 2 * 4 * 24 * 4
    packed = torch.randn(4, 48, requires_grad=True)
    assert saved_bytes(lambda: glu_packed(packed)) == 4 * 48 * 4


def test_inputs_survive_and_a_second_backward_agrees():
    gate, up = (torch.randn(4, 24, requires_grad=True) for _ in range(2))
    before = gate.detach().clone(), up.detach().clone()
    h = glu(gate, up)
    first = torch.autograd.grad(h.sum(), (gate, up), retain_graph=True)
    second = torch.autograd.grad(h.sum(), (gate, up))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(gate, before[0]) and torch.equal(up, before[1])


def up_dropped(dgate, dup, h, dh, gate, up, act):
    RIGHT(dgate, dup, h, dh, gate, torch.ones_like(up), act)


def derivative_dropped(dgate, dup, h, dh, gate, up, act):
    RIGHT(dgate, dup, h, dh, gate, up, act)
    dgate.copy_(dh * up)


def halves_swapped(dgate, dup, h, dh, gate, up, act):
    RIGHT(dup, dgate, h, dh, gate, up, act)


RIGHT = module._backward_into


@pytest.mark.parametrize("name", ["glu", "glu_packed"])
@pytest.mark.parametrize("wrong", [up_dropped, derivative_dropped, halves_swapped])
def test_a_wrong_backward_is_caught(monkeypatch, wrong, name):
    monkeypatch.setenv("FUSELORA_IMPL", "*=reference")
    monkeypatch.setattr(module, "_backward_into", wrong)
    sample = next(iter(FUNCTIONS[name].samples(torch.bfloat16, CPU)))
    with pytest.raises(AssertionError, match="gradient of input"):
        assert_function_close(FUNCTIONS[name], sample)


def test_the_tanh_form_is_not_the_erf_form():
    gate, up = torch.linspace(-3, 3, 64), torch.ones(64)
    assert not torch.equal(glu(gate, up, "gelu"), glu(gate, up, "gelu_tanh"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: glu(torch.zeros(2, 4), torch.zeros(2, 5)), r"glu: up: expected \(2, 4\)"),
        (lambda: glu(torch.zeros(2, 4), torch.zeros(2, 4).half()), "glu: up: expected"),
        (lambda: glu(torch.zeros(2, 4), torch.zeros(2, 4), "relu"), "one of 'silu', 'gelu', 'gelu_tanh'"),
        (lambda: glu(torch.zeros(2, 4).int(), torch.zeros(2, 4).int()), "glu: gate.dtype"),
        (lambda: glu_packed(torch.zeros(2, 5)), "an even size"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
