"""Linear cross-entropy beyond the contract: memory, dropped rows, chunks, reductions, mutations, errors."""

import pytest
import torch
import torch.nn.functional as F
from launches import counting
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.loss.loss_utils import ForCausalLMLoss

from fuselora.functional import linear_cross_entropy, linear_log_probs
from fuselora.kernels import chunked_head, cross_entropy_rows, head_chunks
from fuselora.kernels.cross_entropy_rows import TERMS, random_labels
from fuselora.kernels.linear_cross_entropy import eager_linear_cross_entropy
from fuselora.kernels.registry import FUNCTIONS, OPS
from fuselora.testing import assert_function_close, saved_bytes

CPU = torch.device("cpu")
N, H, V = 200, 24, 65


@pytest.fixture(autouse=True)
def on_the_reference(monkeypatch):
    monkeypatch.setenv("FUSELORA_IMPL", "*=reference")


def problem(dtype=torch.float32, trained=False, ignored=0.5):
    hidden = torch.randn(N, H).to(dtype).requires_grad_()
    weight = torch.randn(V, H).to(dtype).requires_grad_(trained)
    return hidden, weight, random_labels(N, V, CPU, ignored)


class Shapes(TorchDispatchMode):
    """Records the size of every tensor that operators return, also inside our ops, and the rows of matrix products."""

    def __init__(self):
        super().__init__()
        self.numels, self.mm_rows = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fuselora":
            with self:
                return OPS[func.overloadpacket._qualified_op_name.removeprefix("fuselora::")].reference(*args)
        result = func(*args, **(kwargs or {}))
        self.numels += [t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        if func.overloadpacket is torch.ops.aten.mm:
            self.mm_rows.append(args[0].shape[0])
        return result


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("trained", [False, True])
def test_logits_are_never_whole(reduction, trained):
    hidden, weight, labels = problem(trained=trained)
    with Shapes() as seen:
        linear_cross_entropy(hidden, weight, labels, reduction=reduction, chunk_tokens=4).sum().backward()
    assert 4 * V in seen.numels
    assert max(seen.numels) == N * H < (labels != -100).sum() * V


def test_ignored_rows_are_dropped_before_the_product():
    hidden, weight, labels = problem()
    with Shapes() as seen:
        linear_cross_entropy(hidden, weight, labels).backward()
    valid = (labels != -100).sum().item()
    assert seen.mm_rows == [valid, valid]


def test_ignored_rows_may_hold_anything():
    hidden, weight, labels = problem(trained=True)
    with torch.no_grad():
        hidden[labels == -100] = torch.nan
    for reduction in ("mean", "none"):
        loss = linear_cross_entropy(hidden, weight, labels, reduction=reduction).sum()
        for grad in (loss, *torch.autograd.grad(loss, (hidden, weight))):
            assert torch.isfinite(grad).all()


def uncounted(monkeypatch):
    """The path of devices where counting the valid tokens would cost a synchronisation."""
    right = head_chunks.computed_tokens
    monkeypatch.setattr(head_chunks, "computed_tokens", lambda *args: right(*args[:-1], False))


@pytest.mark.parametrize("slack", [None, 0, 3, N])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_where_tokens_cannot_be_counted_the_result_is_the_same(monkeypatch, reduction, slack):
    def run(slack):
        torch.manual_seed(3)
        hidden, weight, labels = problem(torch.float64, trained=True)
        with torch.no_grad():
            hidden[labels == -100] = 1e300  # logits overflow to infinity: must not leak
        bound = None if slack is None else int((labels != -100).sum()) + slack
        options = {"reduction": reduction, "chunk_tokens": 7, "max_valid": bound} | TERMS["all"]._asdict()
        loss = linear_cross_entropy(hidden, weight, labels, **options)
        return loss, *torch.autograd.grad(loss.sum(), (hidden, weight))

    dropped = run(None)
    uncounted(monkeypatch)
    for a, b in zip(dropped, run(slack), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("max_valid", "computed"), [(None, N), (150, 152), (N - 3, N), (N + 9, N)])
def test_as_many_tokens_are_computed_as_may_be_valid(monkeypatch, max_valid, computed):
    uncounted(monkeypatch)
    hidden, weight, labels = problem()
    with Shapes() as seen:
        linear_cross_entropy(hidden, weight, labels, max_valid=max_valid).backward()
    assert seen.mm_rows == [computed, computed]


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_bound_that_is_too_small_is_refused(monkeypatch, counted, reduction):
    hidden, weight, labels = problem()
    valid = int((labels != -100).sum())
    if not counted:
        uncounted(monkeypatch)
    linear_cross_entropy(hidden, weight, labels, max_valid=valid, reduction=reduction)
    message = f"max_valid: expected at most {valid - 1} labels that are not -100, got {valid}; "
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(hidden, weight, labels, max_valid=valid - 1, reduction=reduction)
    with pytest.raises(ValueError, match=message):
        linear_log_probs(hidden, weight, labels, max_valid=valid - 1)


@pytest.mark.parametrize("max_valid", [None, 1000])
def test_launches_of_a_chunk(max_valid):
    """GEMM, row pass, GEMM; as the Triton implementation launches them, on the meta device."""

    def events(tokens):
        hidden, weight = (torch.empty(n, 64, device="meta").bfloat16() for n in (tokens, 1 << 17))
        labels = torch.empty(tokens, dtype=torch.int64, device="meta")
        bound = None if max_valid is None else max_valid * tokens // 2048
        with counting() as counter:
            linear_cross_entropy(hidden.requires_grad_(), weight, labels, max_valid=bound)
        return [event.name for event in counter.events]

    once, twice = events(2048), events(4096)
    chunks = 4 if max_valid is None else 2  # of 512 tokens
    assert len(twice) - len(once) == 3 * chunks
    assert (
        once.count("cross_entropy_rows_kernel") == chunks and sum(name.startswith("mm") for name in once) == 2 * chunks
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_chunks_do_not_change_the_result(reduction):
    hidden, weight, labels = problem(torch.float64, trained=True)
    bias = torch.randn(V, dtype=torch.float64, requires_grad=True)

    def run(chunk):
        loss = linear_cross_entropy(hidden, weight, labels, bias=bias, reduction=reduction, chunk_tokens=chunk)
        return loss, *torch.autograd.grad(loss.sum(), (hidden, weight, bias))

    for chunk in (1, 3, 1000):
        for a, b in zip(run(None), run(chunk), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("count", [None, 7, torch.tensor(7)])
def test_is_the_loss_of_transformers(count):
    hidden, weight, _ = problem()
    labels = random_labels(N, V, CPU)
    theirs = ForCausalLMLoss(F.linear(hidden, weight)[None], labels[None], V, num_items_in_batch=count)
    shifted = F.pad(labels, (0, 1), value=-100)[1:]
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, shifted, num_items=count), theirs)


def test_reductions_save_the_gradient_of_hidden_and_nothing_else():
    hidden, weight, labels = problem(torch.bfloat16)
    assert saved_bytes(lambda: linear_cross_entropy(hidden, weight, labels)) == N * H * 2 + 4
    per_token = saved_bytes(lambda: linear_cross_entropy(hidden, weight, labels, reduction="none"))
    assert per_token == N * H * 2 + V * H * 2 + N * 8 + N * 4


def test_without_gradients_no_gradient_is_computed(monkeypatch):
    hidden, weight, labels = problem()
    expected = linear_cross_entropy(hidden, weight, labels).detach()
    monkeypatch.setattr(head_chunks.Gradients, "add", lambda *args: pytest.fail("computed a gradient"))
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden, weight, labels), expected)
    assert torch.equal(linear_cross_entropy(hidden.detach(), weight, labels), expected)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_valid_label_gives_a_differentiable_zero(reduction, trained):
    hidden, weight, labels = problem(trained=trained, ignored=1.1)
    loss = linear_cross_entropy(hidden, weight, labels, reduction=reduction)
    assert loss.requires_grad and not loss.any()
    for grad in torch.autograd.grad(loss.sum(), (hidden, weight) if trained else (hidden,)):
        assert not grad.any()


def test_no_item_to_divide_by_gives_zero():
    hidden, weight, labels = problem(ignored=1.1)
    for count in (0, torch.tensor(0)):
        assert linear_cross_entropy(hidden, weight, labels, num_items=count) == 0


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_same_bits_again_and_after_a_second_backward(reduction):
    hidden, weight, labels = problem(torch.bfloat16, trained=True)
    results = []
    for _ in range(2):
        loss = linear_cross_entropy(hidden, weight, labels, reduction=reduction, chunk_tokens=3).sum()
        results.append((loss, *torch.autograd.grad(loss, (hidden, weight), retain_graph=True)))
        results.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_fp16_gradients_survive_the_division_by_many_tokens():
    """A mean over 2^15 tokens: p / count is far below fp16's range, the loss scale only comes in backward."""
    tokens, scale = 1 << 15, 65536.0
    hidden, weight = torch.randn(tokens, 8).half().requires_grad_(), torch.randn(512, 8).half()
    labels = torch.randint(0, 512, (tokens,))
    (grad,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels) * scale, hidden)
    exact = hidden.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(eager_linear_cross_entropy(exact, weight.double(), labels) * scale, exact)
    assert (grad - truth).norm() < 2e-3 * truth.norm()


def test_autocast_casts_as_stock_does():
    hidden, weight, labels = problem(trained=True)
    bias = torch.randn(V, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels, bias=bias)
        grads = torch.autograd.grad(loss, (hidden, weight, bias))
    low = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), labels, bias=bias.bfloat16())
    assert torch.equal(loss, low)
    assert all(g.dtype == torch.float32 for g in grads)


def test_log_probs_are_the_negated_losses():
    hidden, weight, labels = problem()
    losses = linear_cross_entropy(hidden, weight, labels, reduction="none", softcap=5.0)
    assert torch.equal(linear_log_probs(hidden, weight, labels, softcap=5.0), -losses)


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_gradcheck_of_log_probs_and_entropy(softcap):
    hidden, weight = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((5, 4), (6, 4)))
    labels = torch.tensor([0, 3, -100, 5, 1])

    def fn(h, w):
        return linear_log_probs(h, w, labels, softcap=softcap, logit_scale=0.7, return_entropy=True)

    torch.autograd.gradcheck(fn, (hidden, weight))


@pytest.mark.parametrize(
    "options", [{"reduction": "none"}, {"token_weights": torch.rand(N), "num_items": torch.tensor(9)}]
)
def test_compiles_without_graph_breaks(options):
    def step(hidden, weight, labels):
        return linear_cross_entropy(hidden, weight, labels, chunk_tokens=16, **options).sum()

    hidden, weight, labels = problem(trained=True)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    losses = [fn(hidden, weight, labels) for fn in (step, compiled)]
    torch.testing.assert_close(*losses)
    for a, b in zip(*(torch.autograd.grad(loss, (hidden, weight)) for loss in losses), strict=True):
        torch.testing.assert_close(a, b)


def test_chunk_size_is_a_function_of_shapes():
    assert head_chunks.chunk_size(32_000, torch.bfloat16, CPU) == 256
    assert head_chunks.chunk_size(32_000, torch.float32, CPU) == 128
    assert head_chunks.chunk_size(256_000, torch.bfloat16, CPU) == 128
    assert head_chunks.chunk_size(32_000, torch.bfloat16, torch.device("cuda")) == 1024
    assert head_chunks.chunk_size(152_064, torch.bfloat16, torch.device("cuda")) == 512


def scale_forgotten(monkeypatch):
    monkeypatch.setattr(cross_entropy_rows, "_transform", lambda x, terms, out: out.copy_(x))


def gradient_misplaced(monkeypatch):
    right = head_chunks.Gradients.result

    def result(self):
        dh, *rest = right(self)
        return dh.flip(0), *rest

    monkeypatch.setattr(head_chunks.Gradients, "result", result)


def last_chunk_only(monkeypatch):
    def add(self, part, dx):
        self.dw.zero_()
        right(self, part, dx)

    right = head_chunks.Gradients.add
    monkeypatch.setattr(head_chunks.Gradients, "add", add)


def bias_forgotten(monkeypatch):
    right = head_chunks.Tokens.chunks
    monkeypatch.setattr(head_chunks.Tokens, "chunks", lambda self, w, b, n: right(self, w, None, n))


def weights_not_in_the_gradient(monkeypatch):
    right = chunked_head.process_rows

    def process(x, labels, terms, *, upstream, **rest):
        return right(x, labels, terms, upstream=torch.ones_like(upstream), **rest)

    monkeypatch.setattr(chunked_head, "process_rows", process)


@pytest.mark.parametrize(
    ("break_it", "sample_name"),
    [
        (scale_forgotten, "scale-mean-trained1"),
        (gradient_misplaced, "plain-mean-trained0"),
        (last_chunk_only, "plain-mean-trained1"),
        (bias_forgotten, "plain-none-trained1"),
        (weights_not_in_the_gradient, "weights-sum"),
    ],
)
def test_a_wrong_piece_is_caught(monkeypatch, break_it, sample_name):
    record = FUNCTIONS["linear_cross_entropy"]
    sample = next(s for s in record.samples(torch.bfloat16, CPU) if s.name == sample_name)
    assert_function_close(record, sample)
    break_it(monkeypatch)
    with pytest.raises(AssertionError, match="error"):
        assert_function_close(record, sample)


LABELS = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.tensor([0, 9])}, r"linear_cross_entropy: labels: expected 0 <= label < 9 or .*, got 9; "),
        ({"labels": LABELS[:1]}, r"linear_cross_entropy: labels.shape: expected \(2,\)"),
        ({"weight": torch.zeros(9, 5)}, r"linear_cross_entropy: hidden.shape\[-1\]: expected 5"),
        ({"weight": torch.zeros(9, 4).half()}, "linear_cross_entropy: weight.dtype: expected torch.float32, as hidden"),
        ({"bias": torch.zeros(4)}, r"linear_cross_entropy: bias.shape\[0\]: expected 9"),
        ({"reduction": "sum", "num_items": 3}, "linear_cross_entropy: num_items: expected None unless"),
        ({"chunk_tokens": 0}, "linear_cross_entropy: chunk_tokens"),
        ({"max_valid": -1}, "linear_cross_entropy: max_valid: expected None or a count"),
    ],
)
@pytest.mark.parametrize("differentiable", [False, True])
def test_bad_input_is_named(change, message, differentiable):
    good = {"hidden": torch.zeros(2, 4, requires_grad=differentiable), "weight": torch.zeros(9, 4), "labels": LABELS}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**(good | change))
