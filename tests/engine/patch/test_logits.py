"""The loss without logits: ``outputs.logits`` is a promise that behaves like stock's tensor, computed if looked at."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.support.memory import activation_bytes
from tests.support.models import FAMILIES, VOCAB, batch, lora_model
from tests.support.parity import run
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fuselora
from fuselora.engine.patch.loss import LazyLogits


def pair(family: str = "llama", dtype: torch.dtype = torch.float32, **config: Any) -> tuple[nn.Module, nn.Module]:
    stock = lora_model(family, dtype, **config)
    return stock, fuselora.patch_model(copy.deepcopy(stock), strict=True)


def lazy_logits(family: str = "llama", dtype: torch.dtype = torch.float32) -> LazyLogits:
    logits = pair(family, dtype)[1](**batch()).logits
    assert isinstance(logits, LazyLogits)
    return logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_computed_logits_are_the_bits_of_stocks_head(family: str, dtype: torch.dtype) -> None:
    """Scaling and soft-capping included: with the labels left out, the very same model computes them eagerly."""
    _, ours = pair(family, dtype)
    inputs = batch(pad="right")
    promised = ours(**inputs).logits
    assert isinstance(promised, LazyLogits)
    del inputs["labels"]
    eager = ours(**inputs).logits
    assert type(eager) is Tensor and eager.dtype == promised.dtype
    assert torch.equal(promised, eager)


def test_nothing_is_computed_for_metadata() -> None:
    logits = lazy_logits(dtype=torch.bfloat16)
    assert logits.shape == (2, 13, VOCAB) and logits.size(-1) == VOCAB and logits.ndim == logits.dim() == 3
    assert (
        logits.dtype == torch.bfloat16
        and logits.device.type == "cpu"
        and logits.numel() == 26 * VOCAB
        and len(logits) == 2
    )
    assert (
        isinstance(logits, Tensor) and torch.is_tensor(logits) and logits.is_floating_point() and not logits.is_sparse
    )
    assert logits.value is None


def test_recorded_operations_compute_nothing_either() -> None:
    """What transformers and accelerate do to outputs on their way: mixed-precision casts and detach."""
    logits = lazy_logits(dtype=torch.bfloat16)
    chain = logits.float().detach()
    assert isinstance(chain, LazyLogits) and chain.dtype == torch.float32 and chain.value is None
    assert torch.equal(chain, logits.compute().float()) and not chain.requires_grad


def test_training_never_computes_logits() -> None:
    _, ours = pair()
    outputs = ours(**batch())
    outputs.loss.backward()
    assert outputs.logits.value is None


ACCESS: dict[str, Callable[[Any], Any]] = {
    "attribute": lambda out: out.logits,
    "index": lambda out: out[1],
    "key": lambda out: out["logits"],
    "to_tuple": lambda out: out.to_tuple()[1],
    "slice": lambda out: out[:2][1],
    "dict": lambda out: dict(out)["logits"],
}


@pytest.mark.parametrize("how", ACCESS)
def test_every_way_to_the_logits(how: str) -> None:
    stock, ours = pair()
    theirs, mine = (ACCESS[how](model(**batch())) for model in (stock, ours))
    torch.testing.assert_close(mine + 0.0, theirs)


def test_return_dict_false() -> None:
    stock, ours = pair()
    theirs, mine = (model(**batch(), return_dict=False) for model in (stock, ours))
    assert type(mine) is type(theirs) is tuple and len(mine) == len(theirs)
    torch.testing.assert_close(mine[1] + 0.0, theirs[1])
    torch.testing.assert_close(mine[0], theirs[0])


class SumOfSquares(torch.autograd.Function):
    """Somebody's own loss on logits: autograd.Function.apply is C++ and asks no tensor subclass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square().sum()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return 2 * dy * ctx.saved_tensors[0]


USES: dict[str, Callable[[Tensor], Any]] = {
    "argmax": lambda x: x.argmax(-1),
    "torch.argmax": lambda x: torch.argmax(x, dim=-1),
    "slice": lambda x: x[:, :-1],
    "last": lambda x: x[:, -1, :],
    "mask": lambda x: x[torch.ones(x.shape[:2], dtype=torch.bool)],
    "float": lambda x: x.float() + 0,
    "double": lambda x: x.double(),
    "to": lambda x: x.to(torch.float64),
    "detach": lambda x: x.detach() + 0,
    "clone": lambda x: x.clone(),
    "cpu": lambda x: x.cpu() + 0,
    "contiguous": lambda x: x.contiguous() + 0,
    "view": lambda x: x.view(-1, x.size(-1)),
    "log_softmax": lambda x: nn.functional.log_softmax(x, dim=-1),
    "cross_entropy": lambda x: nn.functional.cross_entropy(x.transpose(1, 2), batch()["input_ids"]),
    "gather": lambda x: x.gather(-1, batch()["input_ids"][..., None]),
    "add": lambda x: 1 + x,
    "sub": lambda x: x - 1,
    "compare": lambda x: x > 0,
    "scale": lambda x: 0.5 * x / 3 + 0,
    "cat": lambda x: torch.cat([x, x]),
    "stack": lambda x: torch.stack([x, x * 2]),
    "einsum": lambda x: torch.einsum("bsv,v->bs", x, torch.ones(VOCAB)),
    "tolist": lambda x: torch.tensor(x.tolist()),
    "numpy": lambda x: torch.from_numpy(x.detach().numpy()),
    "isnan": lambda x: x.isnan().any(),
    "iterate": lambda x: torch.stack([row for row in x]),
    "unsqueeze": lambda x: x[None].squeeze(0),
    "autograd-function": lambda x: SumOfSquares.apply(x),
    "reentrant-checkpoint": lambda x: checkpoint(torch.square, x, use_reentrant=True),
    "checkpoint": lambda x: checkpoint(torch.square, x, use_reentrant=False),
    "vmap": lambda x: torch.vmap(lambda row: row.sum(-1))(x),
    "out": lambda x: torch.add(x.detach(), 1, out=torch.empty(x.shape)),
    "deepcopy": lambda x: copy.deepcopy(x.detach()) + 0,
    "requires_grad": lambda x: torch.tensor(x.requires_grad),
    "grad_fn": lambda x: torch.tensor(x.grad_fn is not None),
    "is_leaf": lambda x: torch.tensor(x.is_leaf),
    "data": lambda x: x.data + 0,
    "stride": lambda x: torch.tensor(x.stride()),
}


@pytest.mark.parametrize("name", USES)
def test_uses_of_logits(name: str) -> None:
    """The same value, type and differentiability as from the eager logits of the same model without labels."""
    ours = pair()[1]
    promised, eager = ours(**batch()).logits, ours(input_ids=batch()["input_ids"]).logits
    assert isinstance(promised, LazyLogits) and type(eager) is Tensor
    expected, actual = USES[name](eager), USES[name](promised)
    assert type(actual) is Tensor and actual.requires_grad == expected.requires_grad
    assert actual.dtype == expected.dtype and torch.equal(actual, expected)
    if not expected.requires_grad:
        return
    grads = []
    for result in (expected, actual):
        ours.zero_grad()
        result.sum().backward()
        grads.append([p.grad.clone() for p in ours.parameters() if p.requires_grad])
    for theirs, mine in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


def test_in_place_writes_are_kept() -> None:
    stock, ours = pair()
    with torch.no_grad():
        theirs, mine = (model(**batch()).logits for model in (stock, ours))
        for logits in (theirs, mine):
            logits[..., 3] = -1.0
            logits.mul_(2.0)
            logits += 1.0
    torch.testing.assert_close(mine + 0.0, theirs)


def test_gradient_through_logits_is_stocks() -> None:
    """A loss on the logits, and one on the logits together with the model's own."""
    for combine in (lambda out: out.logits.square().mean(), lambda out: out.loss + out.logits.square().mean()):
        grads = []
        for model in pair():
            combine(model(**batch())).backward()
            grads.append([p.grad for p in model.parameters() if p.requires_grad])
        for theirs, mine in zip(*grads, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_logits_can_be_read_after_backward() -> None:
    """As metrics do. The graph is gone, the values are not."""
    stock, ours = pair()
    theirs, mine = stock(**batch()), ours(**batch())
    for outputs in (theirs, mine):
        outputs.loss.backward()
    torch.testing.assert_close(mine.logits.detach() + 0.0, theirs.logits.detach())


def test_logits_of_a_head_that_has_changed_are_refused() -> None:
    """With a trained head the weights have moved when somebody looks too late: an error, never other logits."""
    ours = fuselora.patch_model(lora_model("llama", lora={"modules_to_save": ["lm_head"]}), strict=True)
    outputs = ours(**batch())
    outputs.loss.backward()
    optimizer = torch.optim.SGD([p for p in ours.parameters() if p.requires_grad], lr=0.5)
    optimizer.step()
    with pytest.raises(
        RuntimeError, match="outputs.logits: expected the head of the forward pass, got one that was chang"
    ):
        outputs.logits.argmax(-1)
    outputs = ours(**batch())
    before = (outputs.logits + 0.0).detach()
    optimizer.step()
    assert torch.equal(outputs.logits.detach(), before)


def test_no_grad_and_inference_mode() -> None:
    stock, ours = pair()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            theirs, mine = stock(**batch()), ours(**batch())
            assert not mine.loss.requires_grad and not mine.logits.requires_grad
            torch.testing.assert_close(mine.loss, theirs.loss)
            torch.testing.assert_close(mine.logits + 0.0, theirs.logits + 0.0)
    with torch.inference_mode():
        mine = ours(**batch())
    torch.testing.assert_close(mine.logits.argmax(-1), theirs.logits.argmax(-1))


def test_copies_and_pickles_are_plain_tensors() -> None:
    logits = lazy_logits().detach()
    for duplicate in (copy.deepcopy(logits), pickle.loads(pickle.dumps(logits)), saved_and_loaded(logits)):
        assert type(duplicate) is Tensor and torch.equal(duplicate, logits)


def saved_and_loaded(tensor: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(tensor, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_repr_shows_values() -> None:
    logits = lazy_logits()
    assert repr(logits) == repr(logits.compute()) and "tensor(" in f"{logits}"


def test_a_custom_loss_function_gets_real_logits() -> None:
    """transformers lets a user set ``model.loss_function``."""
    stock, ours = pair()
    for model in (stock, ours):
        model.base_model.model.loss_function = lambda logits, labels, **_: logits.float().logsumexp(-1).mean()
    theirs, mine = run(stock, batch()), run(ours, batch())
    torch.testing.assert_close(mine.losses, theirs.losses)
    rows = {row.module: row for row in fuselora.patch_report(ours).rows}
    assert rows["base_model.model"].status != "fused" and "loss" in rows["base_model.model"].reason


def test_a_forward_hook_on_the_model_may_replace_the_logits() -> None:
    stock, ours = pair()

    def double(module: nn.Module, args: Any, output: Any) -> Any:
        output.logits = output.logits * 2
        return output

    for model in (stock, ours):
        model.base_model.model.register_forward_hook(double)
    torch.testing.assert_close(ours(**batch()).logits + 0.0, stock(**batch()).logits)


@pytest.mark.parametrize("positional", [False, True])
def test_labels_by_position(positional: bool) -> None:
    stock, ours = pair()
    inputs = batch(pad="right")
    order = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "labels")
    args = [inputs.get(name) for name in order] if positional else []
    kwargs = {} if positional else inputs
    base = [model.base_model.model for model in (stock, ours)]
    theirs, mine = (model(*args, **kwargs) for model in base)
    assert isinstance(mine.logits, LazyLogits)
    torch.testing.assert_close(mine.loss, theirs.loss)


def test_whole_model_keeps_less_than_stock() -> None:
    """No logits and few activations: with a vocabulary of 4001 and 2 x 64 tokens, below 0.2 of stock's bytes."""
    config = {"vocab_size": 4001, "hidden_size": 96, "intermediate_size": 264, "max_position_embeddings": 64}
    inputs = batch(2, 64)
    theirs, mine = (activation_bytes(m, lambda m=m: m(**inputs).loss) for m in pair(dtype=torch.bfloat16, **config))
    assert mine < 0.2 * theirs, f"{mine} bytes, stock {theirs}: {mine / theirs:.3f}"


def test_derived_promises_share_one_head(monkeypatch):
    """detach() and scaling record on one promise: one head GEMM, and a head that changes later no longer matters."""
    model = fuselora.patch_model(lora_model("llama", lora={"modules_to_save": ["lm_head"]}))
    out = model(**batch())
    detached = out.logits.detach()
    first = (detached + 0).clone()
    with torch.no_grad():
        for parameter in model.get_output_embeddings().parameters():
            parameter.add_(1.0)
    assert torch.equal(out.logits + 0, first)
