"""``set_checkpointing``: no bit of a gradient changes, no attention and no down product runs twice, and what is kept is
as planned."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.support.memory import saved_activations
from tests.support.models import FAMILIES, batch, lora_model
from tests.support.parity import run
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments

import fuselora
import fuselora.testing
from fuselora.engine.memory_plan import choose
from fuselora.engine.memory_shapes import LayerShape, adapter_ranks, layer_shape
from fuselora.engine.patch import checkpointing
from fuselora.kernels import mlp_block

RECOMPUTING = ("mlp", "full", "offload")
LLAMA_3_8B = LayerShape(4096, 14336, 32, 8, 128, attention_ranks=64, mlp_ranks=48)


def patched(family: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    return fuselora.patch_model(lora_model(family, dtype, **options), strict=True)


def assert_same_bits(ours: Any, theirs: Any) -> None:
    assert torch.equal(ours.losses, theirs.losses)
    for name, grad in theirs.grads.items():
        assert torch.equal(ours.grads[name], grad), name


class Calls(TorchDispatchMode):
    """Counts the ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops[func.name()] += 1
        return func(*args, **(kwargs or {}))


def step_calls(model: nn.Module) -> Counter[str]:
    with Calls() as calls:
        model(**batch()).loss.backward()
    return calls.ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_bit_changes(family: str, dtype: torch.dtype) -> None:
    """Policies agree bit for bit, with adapters that drop their inputs, on a padded batch."""
    model, inputs = patched(family, dtype, lora={"lora_dropout": 0.1}), batch(pad="right")
    plain = run(model, inputs)
    for policy in RECOMPUTING:
        fuselora.set_checkpointing(model, policy)
        assert_same_bits(run(model, inputs), plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_is_not_run_twice(family: str) -> None:
    model = patched(family)
    once = step_calls(model)
    fuselora.set_checkpointing(model, "full")
    again = step_calls(model)
    attention = [name for name in once if name in checkpointing.ATTENTION_KERNELS]
    assert attention and all(again[name] == once[name] for name in attention)


@pytest.mark.parametrize(
    ("family", "policy", "products"),
    [("llama", "off", 4), ("llama", "mlp", 5), ("llama", "full", 7), ("olmo2", "full", 8)],
)
def test_products_of_a_layer(family: str, policy: str, products: int) -> None:
    """qkv, o, gate and up, down; `mlp` makes gate and up again, `full` all but down, unless a norm stands behind it."""
    model = patched(family)
    fuselora.set_checkpointing(model, policy)
    assert step_calls(model)["fuselora::lora_project"] == 2 * products


@pytest.mark.parametrize("policy", ["mlp", "full", "offload"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_keeps_what_the_plan_says(family: str, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, window = batch(2, 32), {"sliding_window": 64} if "sliding_window" in FAMILIES[family] else {}
    totals = []
    for layers in (2, 3):
        model = patched(family, torch.bfloat16, num_hidden_layers=layers, **window)
        fuselora.set_checkpointing(model, policy)
        noted: dict[int, torch.Tensor] = {}

        def note(tensor: torch.Tensor, noted: dict[int, torch.Tensor] = noted) -> torch.Tensor:
            noted[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        monkeypatch.setattr(checkpointing, "_itself", note)
        monkeypatch.setattr(checkpointing, "park", note)
        seen = saved_activations(model, lambda model=model: model(**inputs).loss) | noted
        totals.append(sum(t.untyped_storage().nbytes() for t in seen.values()))
    kept = layer_shape(model.config, adapter_ranks(model)).kept("full" if policy == "offload" else policy, 32)
    assert totals[1] - totals[0] == kept * 64


@pytest.mark.parametrize("policy", RECOMPUTING)
def test_attention_dropout_runs_again(policy: str) -> None:
    model = patched(lora={"lora_dropout": 0.2}, attention_dropout=0.3)
    plain = run(model, batch())
    fuselora.set_checkpointing(model, policy)
    assert_same_bits(run(model, batch()), plain)


@pytest.mark.parametrize("policy", RECOMPUTING)
def test_dora(policy: str) -> None:
    """MLPs that are not one fused function recompute too."""
    model = patched(lora={"use_dora": True})
    plain, kept = run(model, batch()), fuselora.testing.saved_bytes(lambda: model(**batch()).loss)
    fuselora.set_checkpointing(model, policy)
    assert_same_bits(run(model, batch()), plain)
    assert fuselora.testing.saved_bytes(lambda: model(**batch()).loss) < 0.8 * kept


@pytest.mark.parametrize("policy", RECOMPUTING)
def test_second_backward_over_a_retained_graph(policy: str) -> None:
    model = patched()
    fuselora.set_checkpointing(model, policy)
    loss = model(**batch()).loss
    loss.backward(retain_graph=True)
    first = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, 2 * first[name])


def test_the_graph_frees_what_was_kept() -> None:
    """The noted attention outputs hold no reference to the graph that holds them."""
    import gc
    import weakref

    model = patched()
    fuselora.set_checkpointing(model, "full")
    alive: list[weakref.ref[torch.Tensor]] = []
    original = checkpointing._itself
    gc.disable()
    try:
        checkpointing._itself = lambda t: alive.append(weakref.ref(t)) or t  # type: ignore[func-returns-value]
        model(**batch()).loss.backward()
    finally:
        checkpointing._itself = original
        gc.enable()
    assert alive and all(ref() is None for ref in alive)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlp_block, "TILE_ROWS", 4)
    monkeypatch.setattr(mlp_block, "TILE_ELEMENTS", 1)


@pytest.mark.parametrize("policy", ["mlp", "full"])
@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2"])
def test_tiles_change_only_the_rounding_of_sums(family: str, policy: str, small_tiles: None) -> None:
    model = patched(family)
    plain = run(model, batch())
    fuselora.set_checkpointing(model, policy)
    tiled = run(model, batch())
    torch.testing.assert_close(tiled.losses, plain.losses)
    for name, grad in plain.grads.items():
        torch.testing.assert_close(tiled.grads[name], grad, rtol=2e-4, atol=2e-5, msg=name)


def test_tiles_are_even_and_few() -> None:
    assert mlp_block.tiles(0, 14336) == [slice(0, 0)] and mlp_block.tiles(4608, 14336) == [slice(0, 4608)]
    cut = mlp_block.tiles(300_001, 14336)
    assert cut[0].start == 0 and cut[-1].stop == 300_001
    assert all(a.stop == b.start for a, b in zip(cut, cut[1:], strict=False))
    assert max(s.stop - s.start for s in cut) <= 4608 and len(cut) == 66


def test_tiles_with_dropout_agree_between_forward_and_backward(small_tiles: None) -> None:
    """A directional derivative along every adapter weight: wrong masks in backward would show."""
    model = patched(lora={"lora_dropout": 0.3}, num_hidden_layers=1).double()
    fuselora.set_checkpointing(model, "mlp")
    names = [n for n, p in model.named_parameters() if p.requires_grad and ".mlp." in n]
    weights = {n: p for n, p in model.named_parameters() if n in names}
    step = {n: torch.randn_like(p) * 1e-6 for n, p in weights.items()}

    def loss(sign: int) -> torch.Tensor:
        torch.manual_seed(3)
        with torch.no_grad():
            for n, p in weights.items():
                p.add_(step[n], alpha=sign)
        return model(**batch()).loss

    slope = (loss(1) - loss(-2)).item() / 2
    loss(1).backward()
    expected = sum((weights[n].grad * step[n]).sum().item() for n in names)
    assert slope == pytest.approx(expected, rel=1e-4)


def layers_of(model: nn.Module) -> list[Any]:
    return [layer for _, layer in checkpointing.decoder_layers(model)]


def switch(model: nn.Module, on: bool) -> None:
    """transformers' checkpointing switch, by the name of its version."""
    base, word = model.get_base_model(), "enable" if on else "disable"
    flip = getattr(base, f"activation_checkpointing_{word}", None) or getattr(base, f"gradient_checkpointing_{word}")
    flip(*[{"use_reentrant": False}] * on)


def policies_of(model: nn.Module) -> list[str]:
    funcs = [vars(layer).get("_gradient_checkpointing_func") for layer in layers_of(model)]
    return [func.policy if isinstance(func, checkpointing.LayerPolicy) else "torch's" for func in funcs]


def test_switches_of_transformers_turn_a_policy_off_and_on(caplog: pytest.LogCaptureFixture) -> None:
    model = patched()
    plain = run(model, batch())
    fuselora.set_checkpointing(model, "mlp")
    assert all(layer.gradient_checkpointing for layer in layers_of(model))
    switch(model, False)
    assert step_calls(model)["fuselora::lora_project"] == 2 * 4
    switch(model, True)
    assert "set_checkpointing chose mlp, which stays" in caplog.text and policies_of(model) == ["mlp"] * 2
    assert step_calls(model)["fuselora::lora_project"] == 2 * 5
    assert_same_bits(run(model, batch()), plain)


def test_under_off_the_switches_are_transformers_own() -> None:
    model = patched()
    plain = run(model, batch())
    fuselora.set_checkpointing(model, "off")
    switch(model, True)
    assert policies_of(model) == ["torch's"] * 2
    assert step_calls(model)["fuselora::lora_project"] == 2 * 7  # torch's checkpointing stops before the down product
    assert_same_bits(run(model, batch()), plain)


def test_unpatching_puts_everything_back() -> None:
    model = lora_model("llama")
    before = [dict(vars(layer)) for layer in layers_of(model)]
    fuselora.patch_model(model)
    for policy in ("full", "mlp", "off"):
        fuselora.set_checkpointing(model, policy)
    fuselora.unpatch_model(model)
    assert [dict(vars(layer)) for layer in layers_of(model)] == before


def test_offload_on_a_cpu_is_full_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    assert "2 offload" in str(fuselora.set_checkpointing(model := patched(), "offload"))
    assert caplog.text.count("offload on a CPU is full: what it keeps is in the host's memory already") == 1
    assert step_calls(model)["fuselora::lora_project"] == 2 * 7


def test_off_is_off_and_eval_recomputes_nothing() -> None:
    model = patched()
    fuselora.set_checkpointing(model, "full")
    model.eval()
    assert step_calls(model)["fuselora::lora_project"] == 2 * 4
    model.train()
    fuselora.set_checkpointing(model, "off")
    assert not any(layer.gradient_checkpointing for layer in layers_of(model))


def test_copies_keep_the_policy() -> None:
    model = patched()
    fuselora.set_checkpointing(model, "full")
    plain = run(model, batch())
    twin = copy.deepcopy(model)
    assert step_calls(twin) == step_calls(model)
    assert_same_bits(run(twin, batch()), plain)
    pickle.loads(pickle.dumps(layers_of(model)[0]._gradient_checkpointing_func))


def test_policies_of_layers_mix() -> None:
    model = patched(num_hidden_layers=4)
    plain = run(model, batch())
    kept = fuselora.set_checkpointing(model, "off").kept
    tokens = 26
    budget = (kept["full"] + kept["mlp"] + 2 * kept["off"]) * tokens / 1e9
    plan = fuselora.set_checkpointing(model, "auto", activation_budget_gb=budget, tokens=tokens)
    assert plan.layers == ("full", "mlp", "off", "off") or plan.bytes_per_token * tokens <= budget * 1e9
    assert len(set(plan.layers)) > 1
    assert "tokens keep" in str(plan)
    assert_same_bits(run(model, batch()), plain)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.9, 1.0])
def test_a_plan_uses_its_budget(share: float) -> None:
    """The least recomputation that fits: one layer less of it would not. Offloading is the last resort."""
    kept = {p: LLAMA_3_8B.kept(p, 4096) for p in ("off", "mlp", "full", "offload")}
    budget = int(32 * (share * kept["off"] + (1 - share) * kept["full"]))
    plan = choose(LLAMA_3_8B, kept, 32, budget)
    assert plan is not None and plan == choose(LLAMA_3_8B, kept, 32, budget)
    assert sum(kept[p] for p in plan) <= budget and "offload" not in plan
    order = [("offload", "full", "mlp", "off").index(p) for p in plan]
    assert order == sorted(order)
    costs = [sum(LLAMA_3_8B.recompute_macs(p) for p in plan)]
    for a in range(33):
        for b in range(33 - a):
            if a * kept["off"] + b * kept["mlp"] + (32 - a - b) * kept["full"] <= budget:
                other = b * LLAMA_3_8B.recompute_macs("mlp") + (32 - a - b) * LLAMA_3_8B.recompute_macs("full")
                costs.append(other)
    assert costs[0] == min(costs)
    assert choose(LLAMA_3_8B, kept, 32, 31 * kept["full"]).count("offload") == 1
    assert choose(LLAMA_3_8B, kept, 32, 31 * kept["full"], ("off", "mlp", "full")) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "selective"}, "policy: expected one of off, mlp, full, offload, auto, got 'selective'"),
        ({"policy": "auto"}, "activation_budget_gb: expected a number with auto"),
        ({"policy": "auto", "activation_budget_gb": 1.0}, "tokens: expected a number with auto"),
        ({"policy": "full", "activation_budget_gb": 1.0}, "activation_budget_gb: expected nothing with full"),
        ({"policy": "auto", "activation_budget_gb": 1e-6, "tokens": 1000}, "or more for 1000 tokens in 2 layers"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="set_checkpointing: ") as error:
        fuselora.set_checkpointing(patched(), **options)
    assert message in str(error.value)


def test_a_stock_model_is_refused() -> None:
    with pytest.raises(ValueError, match="call patch_model first"):
        fuselora.set_checkpointing(lora_model("llama"), "full")


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("policy", RECOMPUTING)
def test_ddp(process_group: None, policy: str) -> None:
    model = patched()
    expected = run(model, batch())
    fuselora.set_checkpointing(model, policy)
    result = run(DistributedDataParallel(model), batch())
    for name, grad in expected.grads.items():
        torch.testing.assert_close(result.grads[f"module.{name}"], grad)


@pytest.mark.parametrize("asked", [False, True], ids=["told nothing", "gradient_checkpointing=True"])
def test_trainer(tmp_path: Path, asked: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Hugging Face's Trainer: the curve is that without checkpointing, and the policy that was chosen by name is in
    force whether or not its arguments ask for checkpointing too, which it says."""
    rows = [{k: v[0] for k, v in batch(1, seed=s).items()} for s in range(4)]
    options: dict[str, Any] = {"use_cpu": True, "max_steps": 3, "per_device_train_batch_size": 2, "logging_steps": 1}
    options |= {"output_dir": str(tmp_path), "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    curves = []
    for policy in ("off", "mlp"):
        model = patched()
        fuselora.set_checkpointing(model, policy)
        args = TrainingArguments(**options, gradient_checkpointing=asked)
        trainer = Trainer(model, args, train_dataset=rows)
        trainer.train()
        assert all(layer.gradient_checkpointing is (asked or policy != "off") for layer in layers_of(model))
        curves.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(curves[0]) == 3 and curves[0] == curves[1]
    assert policies_of(model) == ["mlp"] * 2 and ("chose mlp, which stays" in caplog.text) is asked


def test_an_attention_output_changed_in_place_is_refused() -> None:
    """The recomputation would find it changed and change it again; torch's own checkpointing gives wrong gradients."""
    model = patched()
    halve = model.base_model.model.model.layers[0].self_attn.o_proj.register_forward_pre_hook
    handle = halve(lambda module, args: (args[0].mul_(0.5),))
    fuselora.set_checkpointing(model, "full")
    with pytest.raises(RuntimeError, match="got aten::mul_.Tensor that changes it in place"):
        model(**batch())
    handle.remove()
    model(**batch()).loss.backward()


def test_a_pickled_model_knows_torch_s_checkpointing_only() -> None:
    model = patched()
    fuselora.set_checkpointing(model, "full")
    written = pickle.dumps(model)
    assert b"LayerPolicy" not in written and b"fuselora" not in written
    read = pickle.loads(written)
    assert not isinstance(read.base_model.model.model.layers[0]._gradient_checkpointing_func, checkpointing.LayerPolicy)
    assert_same_bits(run(fuselora.unpatch_model(model), batch()), run(read, batch()))
