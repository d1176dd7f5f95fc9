"""A patched model inside the machinery of training: checkpointing, compile, HF Trainer, accelerate, DDP, recording."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft.tuners.lora.layer import LoraLayer
from tests.support.models import FAMILIES, VOCAB, batch, lora_model
from tests.support.parity import assert_all_fused, assert_close_to_truth, assert_same_results, run, run_truth
from tests.support.twins import SMALL, Twins
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

import fuselora
from fuselora.engine.patch.loss import LazyLogits


def pair(family: str = "llama", **options: Any) -> tuple[nn.Module, nn.Module]:
    stock = lora_model(family, **options)
    return stock, fuselora.patch_model(copy.deepcopy(stock), strict=True)


def enable_checkpointing(model: nn.Module, reentrant: bool) -> None:
    """transformers 5.2x renamed the method."""
    model.enable_input_require_grads()
    base = model.get_base_model()
    name = "activation_checkpointing_enable"
    getattr(base, name if hasattr(base, name) else "gradient_checkpointing_enable")({"use_reentrant": reentrant})


def count_calls(model: nn.Module) -> dict[str, int]:
    """Calls of attention and MLP. Pre-hooks: a non-reentrant recompute stops inside the last block that saves."""
    calls: dict[str, int] = {}
    for name, module in model.named_modules():
        if name.endswith((".mlp", ".self_attn")):

            def hook(*_: Any, name: str = name) -> None:
                calls[name] = calls.get(name, 0) + 1

            module.register_forward_pre_hook(hook)
    return calls


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_recomputes_every_layer(family: str, reentrant: bool) -> None:
    """Each attention and MLP runs twice per step, and the gradients are bit for bit those without checkpointing."""
    _, ours = pair(family)
    plain = run(ours, batch(pad="right"))
    enable_checkpointing(ours, reentrant)
    calls = count_calls(ours)
    again = run(ours, batch(pad="right"))
    assert len(calls) == 4 and set(calls.values()) == {2}, calls
    assert torch.equal(plain.losses, again.losses)
    for name, grad in plain.grads.items():
        assert torch.equal(grad, again.grads[name]), name
    assert_all_fused(ours)
    ours.eval()
    calls.clear()
    with torch.no_grad():
        ours(**batch())
    assert set(calls.values()) == {1}


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointing_of_a_layer_that_declines(reentrant: bool) -> None:
    """A fused layer that calls the stock forward must not checkpoint twice."""
    models = pair()
    name = "base_model.model.model.layers.0.post_attention_layernorm"
    for model in models:
        enable_checkpointing(model, reentrant)
        model.get_submodule(name).register_forward_hook(lambda *_: None)
    calls = [count_calls(model) for model in models]
    theirs, mine = (run(model, batch()) for model in models)
    assert calls[0] == calls[1] and set(calls[1].values()) == {2}
    assert_same_results(mine, theirs, rtol=1e-4)
    assert {row.kind for row in fuselora.patch_report(models[1]).rows if row.calls_declined} == {"layer"}


def test_checkpointing_keeps_less() -> None:
    from fuselora.testing import saved_bytes

    _, ours = pair(num_hidden_layers=3)
    full = saved_bytes(lambda: ours(**batch(2, 40)).loss)
    enable_checkpointing(ours, False)
    assert saved_bytes(lambda: ours(**batch(2, 40)).loss) < 0.5 * full


def test_compiled_model_trains_alike() -> None:
    stock, ours = pair(num_hidden_layers=1)
    inputs = [batch(seed=seed) for seed in range(4)]
    truth, theirs = run_truth(stock, inputs), run(stock, inputs)
    torch._dynamo.reset()
    mine = run_compiled(torch.compile(ours, backend="aot_eager"), ours, inputs)
    assert_close_to_truth(mine, truth, theirs, torch.float32)


def run_compiled(compiled: Callable[..., Any], model: nn.Module, inputs: list[dict[str, Tensor]]) -> Any:
    """``run`` with the parameter names of the model behind ``torch.compile``."""

    class Named(nn.Module):
        forward = staticmethod(compiled)

        def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
            return model.named_parameters(*args, **kwargs)

        def zero_grad(self, set_to_none: bool = True) -> None:
            model.zero_grad(set_to_none)

    return run(Named(), inputs)


def test_compiled_decoder_layers_are_traced_without_a_break() -> None:
    _, ours = pair(num_hidden_layers=1)
    torch._dynamo.reset()
    ids = batch()["input_ids"]
    explained = torch._dynamo.explain(lambda: ours(input_ids=ids, use_cache=False).logits)()
    assert explained.graph_break_count == 0, explained.break_reasons


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2"])
def test_hidden_states_and_attentions_are_recorded(family: str) -> None:
    stock, ours = pair(family, attn_implementation="eager")
    options = {"output_hidden_states": True, "output_attentions": True}
    theirs, mine = (model(**batch(pad="right"), **options) for model in (stock, ours))
    assert (
        len(mine.hidden_states) == len(theirs.hidden_states) == 3
        and len(mine.attentions) == len(theirs.attentions) == 2
    )
    for actual, expected in zip(
        (*mine.hidden_states, *mine.attentions), (*theirs.hidden_states, *theirs.attentions), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert_all_fused(ours)


def examples(count: int) -> list[dict[str, list[int]]]:
    made = batch(count, 9)
    return [{k: v[i].tolist() for k, v in made.items()} for i in range(count)]


def collate(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    return {k: torch.tensor([row[k] for row in rows]) for k in rows[0]}


def trainer(model: nn.Module, folder: Path, **options: Any) -> Trainer:
    compute_metrics = options.pop("compute_metrics", None)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=3,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
        **options,
    )
    return Trainer(
        model,
        arguments,
        train_dataset=examples(8),
        eval_dataset=examples(5),
        data_collator=collate,
        compute_metrics=compute_metrics,
    )


def losses(made: Trainer) -> list[float]:
    return [
        entry[key] for entry in made.state.log_history for key in ("loss", "eval_loss", "grad_norm") if key in entry
    ]


@pytest.mark.parametrize("smoothing", [0.0, 0.1], ids=["", "label-smoothing"])
def test_hf_trainer_with_accumulation(tmp_path: Path, smoothing: float) -> None:
    seen = []
    for model in pair():
        made = trainer(model, tmp_path, label_smoothing_factor=smoothing)
        made.train()
        made.evaluate()
        seen.append(losses(made))
        assert made.model_accepts_loss_kwargs
    assert len(seen[0]) == 5
    torch.testing.assert_close(torch.tensor(seen[1]), torch.tensor(seen[0]), rtol=1e-3, atol=1e-4)
    assert_all_fused(made.model)


def test_hf_trainer_evaluates_with_metrics(tmp_path: Path) -> None:
    """Predictions reach compute_metrics as numpy arrays of all rows."""

    def metrics(prediction: Any) -> dict[str, float]:
        assert prediction.predictions.shape == (5, 9, VOCAB)
        return {"sum": float(abs(prediction.predictions).sum()), "top": float(prediction.predictions.argmax(-1).sum())}

    results = [trainer(model, tmp_path, compute_metrics=metrics).evaluate() for model in pair()]
    for key in ("eval_loss", "eval_sum", "eval_top"):
        assert results[1][key] == pytest.approx(results[0][key], rel=1e-5), key


def test_hf_trainer_that_only_wants_the_loss_computes_no_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock, ours = pair()
    expected = trainer(stock, tmp_path, prediction_loss_only=True).evaluate()
    monkeypatch.setattr(LazyLogits, "compute", lambda self: pytest.fail("logits were computed"))
    made = trainer(ours, tmp_path, prediction_loss_only=True)
    assert made.evaluate()["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
    made.train()


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """accelerate keeps the precision of the first Accelerator of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_accelerate_mixed_precision(fresh_accelerate: None) -> None:
    """accelerate wraps the instance's forward in autocast and casts outputs to fp32; logits stay a promise."""
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    stock, ours = pair()
    inputs = [batch(seed=seed) for seed in range(4)]
    truth = run_truth(stock, inputs)
    prepared = [accelerator.prepare(model) for model in (stock, ours)]
    outputs = prepared[1](**batch())
    assert (
        isinstance(outputs.logits, LazyLogits)
        and outputs.logits.value is None
        and outputs.logits.dtype == torch.float32
    )
    theirs, mine = (run(model, inputs) for model in prepared)
    assert mine.logits.dtype == torch.float32
    assert_close_to_truth(mine, truth, theirs, torch.bfloat16)
    assert_all_fused(ours)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("unused", [False, True], ids=["", "find-unused"])
def test_ddp(process_group: None, unused: bool) -> None:
    """Wrapped before or after patching, the gradients are those of the bare model."""
    _, ours = pair()
    expected = run(ours, batch())
    patched_first = DistributedDataParallel(copy.deepcopy(ours), find_unused_parameters=unused)
    patched_last = fuselora.patch_model(
        DistributedDataParallel(fuselora.unpatch_model(ours), find_unused_parameters=unused), strict=True
    )
    for wrapped in (patched_first, patched_last):
        result = run(wrapped, batch())
        assert torch.equal(result.losses, expected.losses)
        for name, grad in expected.grads.items():
            torch.testing.assert_close(result.grads[f"module.{name}"], grad)
        assert_all_fused(wrapped)


def test_kbit_style_preparation() -> None:
    """What prepare_model_for_kbit_training does to a model: fp32 norms and head over a bf16 base."""
    stock = lora_model("llama", torch.bfloat16)
    for name, parameter in stock.named_parameters():
        if parameter.ndim == 1 or "lm_head" in name or "embed" in name:
            parameter.data = parameter.data.float()
    ours = fuselora.patch_model(copy.deepcopy(stock))
    inputs = [batch(seed=seed) for seed in range(4)]
    truth = run_truth(stock, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs, mine = run(stock, inputs), run(ours, inputs)
    assert_close_to_truth(mine, truth, theirs, torch.bfloat16)


def test_second_backward_over_a_retained_graph() -> None:
    _, ours = pair()
    loss = ours(**batch()).loss
    loss.backward(retain_graph=True)
    first = [p.grad.clone() for p in ours.parameters() if p.requires_grad]
    loss.backward()
    for grad, once in zip([p.grad for p in ours.parameters() if p.requires_grad], first, strict=True):
        torch.testing.assert_close(grad, 2 * once)


def test_no_warning_of_torch_in_a_step() -> None:
    """Patching adds no warning to a training step."""
    _, ours = pair(lora={"lora_dropout": 0.1})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("default", category=FutureWarning)
        ours(**batch()).loss.backward()
    assert sum(isinstance(m, LoraLayer) for m in ours.modules()) == 14


def test_frozen_first_layers_stop_the_backward() -> None:
    """Adapters in the last layer only: nothing below them may be differentiated, or memory is wasted."""
    last = {"layers_to_transform": [1], "target_modules": ["q_proj", "o_proj", "up_proj", "down_proj"]}
    stock = lora_model("llama", torch.float64, lora=last, **{**SMALL, "num_hidden_layers": 2})
    twins = Twins(stock, fuselora.patch_model(copy.deepcopy(stock)))
    twins.check()
    seen: list[Tensor] = []
    twins.ours.get_submodule("base_model.model.model.layers.0").register_forward_hook(
        lambda m, a, out: seen.append(out)
    )
    twins.ours(**batch())
    assert not seen[0].requires_grad
