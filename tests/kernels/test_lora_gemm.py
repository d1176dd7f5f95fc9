"""The candidates behind lora_project and lora_grad_x, each by itself, against fp64 and next to the reference."""

import pytest
import torch

from fuselora.kernels import lora_ops, lora_samples
from fuselora.kernels.gpu import choices
from fuselora.kernels.gpu.launch import interpreting, record
from fuselora.kernels.lora_samples import Group
from fuselora.kernels.numerics import K_REDUCTION, rounding
from fuselora.kernels.registry import OPS, Sample
from fuselora.testing import assert_kernel_close, poisoned_empty

pytest.importorskip("triton")

from fuselora.kernels.gpu import lora_augmented, lora_gemm_launch, lora_matmul  # noqa: E402
from fuselora.kernels.gpu.lora_gemm import Config  # noqa: E402

runs = pytest.mark.skipif(
    not interpreting() and not torch.cuda.is_available(), reason="needs a GPU, or TRITON_INTERPRET=1"
)
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not interpreting() else "cpu")
META = torch.device("meta")
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE.type == "cuda" else [])
SMALL = Config(32, 32, 16, 2, 4, 2)  # several tiles in each direction of the samples, ragged ones at every edge
REFERENCES = {"lora_project": lora_ops._project, "lora_grad_x": lora_ops._grad_x}
CANDIDATES = {
    "lora_project": {
        "addmm": lora_matmul.project_addmm,
        "triton": lambda *args: lora_matmul.project_triton(*args, SMALL),
    },
    "lora_grad_x": {
        "addmm": lora_matmul.grad_x_addmm,
        "triton": lambda *args: lora_matmul.grad_x_triton(*args, SMALL),
    },
}
ids = {"ids": lambda x: str(x).removeprefix("torch.")}
each_op = pytest.mark.parametrize("op", list(CANDIDATES))
each_candidate = pytest.mark.parametrize("candidate", ["addmm", "triton"])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, **ids)


def listed(result):
    return [result] if isinstance(result, torch.Tensor) else result


def double(value):
    if isinstance(value, (list, tuple)):
        return [double(v) for v in value]
    floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.double() if floating else value


def check(op: str, candidate: str, sample: Sample) -> None:
    with poisoned_empty():
        actual = listed(CANDIDATES[op][candidate](*sample.args))
    eager, truth = (listed(REFERENCES[op](*args)) for args in (sample.args, double(sample.args)))
    for i, (ours, true, stock) in enumerate(zip(actual, truth, eager, strict=True)):
        assert ours.is_contiguous()
        assert_kernel_close(ours, true, stock, name=f"{op}[{sample.name}] by {candidate}, output {i}", k=K_REDUCTION)


@runs
@each_dtype
@each_candidate
@each_op
def test_candidates_obey_the_numerics_rule(op, candidate, dtype):
    for sample in OPS[op].samples(dtype, DEVICE):
        check(op, candidate, sample)


GROUPS = {
    "four-projections": Group(35, 40, (24, 33, 7, 16), tuple((i, 4, 0.0, True) for i in range(4)), bias=True),
    "many-on-one": Group(9, 48, (20,), tuple((0, r, p, True) for r, p in ((3, 0.0), (8, 0.4), (1, 0.0), (5, 0.0)))),
    "last-without": Group(34, 40, (16, 24), ((0, 2, 0.0, True), (0, 4, 0.0, True)), bias=True),
    **{f"rank{r}": Group(33, 72, (40,), ((0, r, 0.0, True),)) for r in (1, 2, 15, 16, 17, 64, 256)},
}


@runs
@each_candidate
@each_op
@pytest.mark.parametrize("name", GROUPS)
def test_more_projections_adapters_and_ranks_than_one_launch_takes(op, candidate, name):
    t = lora_samples.tensors(GROUPS[name], torch.float16, DEVICE, torch.float32)
    check(
        op, candidate, Sample(name, {"lora_project": lora_samples.project, "lora_grad_x": lora_samples.grad_x}[op](t))
    )


@runs
@each_candidate
def test_operands_of_any_strides(candidate):
    """Weights in wider buffers and transposed, inputs and gradients whose rows or elements repeat."""
    t = lora_samples.tensors(lora_samples.GROUPS["qkv"], torch.float32, DEVICE, torch.float32)
    m, k, widths = t.x.shape[0], t.x.shape[1], [w.shape[0] for w in t.weights]
    wide = [torch.randn(n, k + 24, device=DEVICE)[:, 8 : 8 + k] for n in widths]
    turned = [torch.randn(k, n, device=DEVICE).t() for n in widths]
    for weights in (wide, turned):
        strided = t._replace(
            x=torch.randn(1, k, device=DEVICE).expand(m, k),
            weights=weights,
            dys=[torch.randn((), device=DEVICE).expand(m, n) for n in widths],
            s=torch.randn(sum(r.shape[0] for r in t.a), m, device=DEVICE).t(),
            a=[a.t().contiguous().t() for a in t.a],
        )
        check("lora_project", candidate, Sample("strided", lora_samples.project(strided)))
        check("lora_grad_x", candidate, Sample("strided", lora_samples.grad_x(strided)))


@runs
@each_candidate
def test_split_adapters_apply_the_fp32_values(candidate):
    """With W = 0 the output is the low-rank part alone: fitted over many rows, rounding of Y averages out and an error
    of B stays."""
    group = Group(2048, 16, (24,), ((0, 4, 0.0, True),))
    t = lora_samples.tensors(group, torch.float16, DEVICE, torch.float32)
    t.weights[0].zero_()

    def error(split: bool) -> float:
        args = lora_samples.project(t._replace(splits=[split]))
        (y,) = CANDIDATES["lora_project"][candidate](*args)
        applied = torch.linalg.lstsq(t.s.double(), y.double()).solution.T
        truth = t.scalings[0] * t.b[0].double()
        return float((applied - truth).norm() / truth.norm())

    assert error(True) < rounding(torch.float16) / 4
    assert error(False) > 2 * error(True)


@runs
@each_candidate
@each_op
def test_same_inputs_give_the_same_bits(op, candidate):
    for name in ("qkv", "dropout"):
        t = lora_samples.tensors(lora_samples.GROUPS[name], torch.float16, DEVICE, torch.float32)
        args = {"lora_project": lora_samples.project, "lora_grad_x": lora_samples.grad_x}[op](t)
        first, second = (listed(CANDIDATES[op][candidate](*args)) for _ in range(2))
        assert all(map(torch.equal, first, second))


def llama(pick, dtype=torch.bfloat16, name="llama3-8b-qkv"):
    return pick(lora_samples.tensors(lora_samples.WORKLOADS[name], dtype, META, torch.float32))


def recorded(run, args, capability=90):
    with record(capability) as launches:
        run(*args)
    return launches


def test_one_launch_for_all_projections():
    """The low-rank part of all projections under library GEMMs, or one GEMM; as the switch says."""
    for candidate, gemm in (("addmm", False), ("triton", True)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(choices.ENV_GEMM, candidate)
            for run, pick in ((lora_matmul.project, lora_samples.project), (lora_matmul.grad_x, lora_samples.grad_x)):
                (launch,) = recorded(run, llama(pick))
                assert launch.args["GEMM"] is gemm


def test_dropout_is_drawn_outside_the_gemm():
    args = llama(lora_samples.grad_x, name="llama3-8b-qkv-dropout")
    expand, gemm = recorded(CANDIDATES["lora_grad_x"]["triton"], args)
    assert (expand.args["DROPPED"], expand.args["GEMM"]) == (0b111, False)
    assert (gemm.args["ADAPTERS"], gemm.args["ACCUMULATE"]) == (0, True)


def test_an_unknown_candidate_is_refused(monkeypatch):
    monkeypatch.setenv(choices.ENV_GEMM, "fastest")
    with pytest.raises(ValueError, match="FUSELORA_LORA_GEMM: expected addmm or triton, got 'fastest'; choose"):
        recorded(lora_matmul.project, llama(lora_samples.project))


def test_the_table_decides(monkeypatch):
    """By architecture and shape; its config reaches the launch, and unaligned rows never do."""
    monkeypatch.delenv(choices.ENV_GEMM, raising=False)
    config = Config(64, 128, 32, 4, 4, 3)

    def choose(op, capability, dtype, m, n, k):
        asked.append((op, capability, dtype, m, n, k))
        return choices.Choice("triton", config._asdict(), "measured")

    asked: list[tuple] = []
    monkeypatch.setattr(choices, "choose", choose)
    (launch,) = recorded(lora_matmul.project, llama(lora_samples.project))
    assert asked == [("lora_project", 90, torch.bfloat16, 4096, 6144, 4096)]
    assert launch.args["GEMM"] and launch.options == dict(num_warps=4, num_stages=3)
    assert (launch.args["BLOCK_M"], launch.args["BLOCK_N"], launch.args["BLOCK_K"]) == (64, 128, 32)
    (launch,) = recorded(lora_matmul.project, llama(lora_samples.project, name="awkward"))
    assert not launch.args["GEMM"] and len(asked) == 1


@runs
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("ranks, widths", [((8, 4, 16), (40, 20, 24)), ((7,), (33,)), ((3, 5), (16, 130))], **ids)
def test_augmented_gemm(ranks, widths, split):
    """The spare columns arrive as NaN: every one must be written."""
    m, k, n, dtype = 70, 48, sum(widths), torch.float16
    spare = lora_augmented.room(ranks, split)
    x, w = (torch.full((rows, k + spare), torch.nan, dtype=dtype, device=DEVICE) for rows in (m, n))
    x[:, :k], w[:, :k] = torch.randn(m, k), torch.randn(n, k) * k**-0.5
    group = Group(m, k, widths, tuple((i, r, 0.0, True) for i, r in enumerate(ranks)))
    t = lora_samples.tensors(group, dtype, DEVICE, torch.float32 if split else dtype)
    t = t._replace(x=x[:, :k], weights=list(w[:, :k].split(widths)), biases=list(torch.randn(n).to(x).split(widths)))
    bias = torch.cat(t.biases)
    ys = lora_augmented.project_augmented(x, w, k, widths, t.s, t.b, t.scalings, split, bias)
    args = lora_samples.project(t)
    for y, true, stock in zip(ys, lora_ops._project(*double(args)), lora_ops._project(*args), strict=True):
        assert_kernel_close(y, true, stock, k=K_REDUCTION)


def test_alignment_comes_from_rows_and_offsets():
    def matrix(rows, columns, begin=0, width=None):
        return torch.empty(rows, width or columns, dtype=torch.bfloat16, device=META)[:, begin : begin + columns]

    assert lora_gemm_launch.aligned([matrix(4, 64)], [8])
    assert lora_gemm_launch.aligned([matrix(4, 40, 8, 72)])
    assert not lora_gemm_launch.aligned([matrix(4, 63)])
    assert not lora_gemm_launch.aligned([matrix(4, 32, 4, 64)])
    assert not lora_gemm_launch.aligned([matrix(4, 64)], [9])
    assert [lora_gemm_launch.unit(matrix(4, n)) for n in (64, 48, 24, 20, 6, 7)] == [1, 1, 8, 4, 2, 1]
