"""The class swap: what patching leaves alone, how it is undone, copied and stored, and when a module declines."""

from __future__ import annotations

import copy
import importlib
import inspect
import io
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.support.models import FAMILIES, add_lora, base_model, batch, lora_model
from tests.support.parity import assert_all_fused, assert_same_results, run
from tests.support.twins import SMALL, Twins, small_twins, twins_of
from torch import nn

import fuselora
from fuselora.engine.patch import KINDS

LAYER = "base_model.model.model.layers.0"


def classes(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def test_returns_the_same_object_and_is_idempotent() -> None:
    model = lora_model("llama")
    assert fuselora.patch_model(model) is model
    once = classes(model)
    assert fuselora.patch_model(model, strict=True) is model and classes(model) == once
    assert fuselora.unpatch_model(model) is model and fuselora.unpatch_model(model) is model


@pytest.mark.parametrize("family", FAMILIES)
def test_unpatch_restores_everything(family: str) -> None:
    model = lora_model(family)
    before, kinds, attributes = copy.deepcopy(model.state_dict()), classes(model), instance_state(model)
    ids = {name: id(p) for name, p in model.named_parameters()}
    expected = run(model, batch())
    fuselora.patch_model(model, strict=True)
    run(model, batch())
    assert [*model.state_dict()] == [*before]
    fuselora.unpatch_model(model)
    assert classes(model) == kinds and instance_state(model) == attributes
    assert {name: id(p) for name, p in model.named_parameters()} == ids
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(module.forward.__func__ is type(module).forward for module in model.modules())
    assert_same_results(run(model, batch()), expected, rtol=0.0)


def instance_state(model: nn.Module) -> dict[str, list[str]]:
    """Names of the attributes on each instance, hooks included."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")
    return {
        name: sorted(vars(module)) + [f"{hook}={len(getattr(module, hook))}" for hook in hooks]
        for name, module in model.named_modules()
    }


def test_class_names_signatures_and_isinstance_stay() -> None:
    stock = lora_model("gemma3_text")
    ours = fuselora.patch_model(copy.deepcopy(stock), strict=True)
    swapped = 0
    for (name, before), after in zip(stock.named_modules(), ours.modules(), strict=True):
        swapped += type(after) is not type(before)
        assert isinstance(after, type(before)), name
        for attribute in ("__name__", "__qualname__", "__module__", "__doc__"):
            assert getattr(type(after), attribute) == getattr(type(before), attribute), (name, attribute)
        assert inspect.signature(after.forward) == inspect.signature(before.forward), name
        assert str(after) == str(before)
    assert swapped == 36
    assert instance_state(ours) == instance_state(stock)


def test_other_models_and_modules_are_untouched() -> None:
    """A stock model beside a patched one computes what it computed; no class or function of the libraries changed."""
    names = ["transformers.models.llama.modeling_llama", "peft.tuners.lora.layer", "torch.nn.modules.linear"]
    modules = [importlib.import_module(name) for name in names]

    def snapshot() -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for module in modules:
            for name, value in vars(module).items():
                seen[f"{module.__name__}.{name}"] = value
                if inspect.isclass(value):
                    seen.update({f"{module.__name__}.{name}.{k}": v for k, v in vars(value).items() if callable(v)})
        return seen

    other = lora_model("llama")
    before, expected = snapshot(), run(other, batch())
    patched = fuselora.patch_model(lora_model("llama"), strict=True)
    run(patched, batch())
    after = snapshot()
    assert before.keys() == after.keys() and all(before[key] is after[key] for key in before)
    assert_same_results(run(other, batch()), expected, rtol=0.0)
    assert not any(row.status == "fused" for row in fuselora.patch_report(other).rows)


def test_importing_and_patching_changes_nothing_global() -> None:
    """In a fresh process: functions and classes of transformers, PEFT and torch are the same objects afterwards."""
    program = """
import importlib, inspect, sys
sys.path.insert(0, sys.argv[1])
import torch, transformers, peft, accelerate
from tests.support.models import lora_model
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
model = lora_model("llama")
prefixes = ("transformers.", "peft.", "torch.nn.")
def snapshot():
    seen = {}
    for name, module in list(sys.modules.items()):
        if name.startswith(prefixes):
            for key, value in list(vars(module).items()):
                if inspect.isfunction(value):
                    seen[name, key] = value
                if inspect.isclass(value):
                    seen[name, key] = value
                    seen.update({(name, key, k): v for k, v in vars(value).items() if inspect.isfunction(v)})
    seen["attention"] = sorted(ALL_ATTENTION_FUNCTIONS.keys())
    seen["call"] = torch.nn.Module.__call__
    return seen
before = snapshot()
import fuselora
fuselora.patch_model(model, strict=True)
model(input_ids=torch.arange(5)[None], labels=torch.arange(5)[None]).loss.backward()
after = snapshot()
changed = [key for key in before if before[key] is not after[key] and before[key] != after[key]]
assert not changed, changed
"""
    subprocess.run([sys.executable, "-c", program, str(Path(__file__).parents[3])], check=True, timeout=120)


def test_deepcopy_stays_patched_and_is_independent() -> None:
    stock = lora_model("llama", torch.float64, **SMALL)
    original = fuselora.patch_model(copy.deepcopy(stock), strict=True)
    duplicate = copy.deepcopy(original)
    assert classes(duplicate) == classes(original)
    with torch.no_grad():
        for model in (duplicate, stock):
            for parameter in model.parameters():
                parameter.mul_(1.1)
    Twins(stock, duplicate).check()
    fuselora.unpatch_model(original)
    assert_all_fused(duplicate)
    shallow = copy.copy(duplicate.get_submodule(f"{LAYER}.mlp"))
    assert type(shallow) is type(duplicate.get_submodule(f"{LAYER}.mlp"))


def test_saved_models_load_without_fuselora(tmp_path: Path) -> None:
    """torch.save and pickle of a patched model store stock classes."""
    stock = lora_model("llama")
    expected = run(stock, batch()).logits
    ours = fuselora.patch_model(stock, strict=True)
    run(ours, batch())
    torch.save(ours, tmp_path / "model.pt")
    torch.save({"inputs": batch(), "logits": expected}, tmp_path / "expected.pt")
    program = """
import sys, torch
model = torch.load(sys.argv[1] + "/model.pt", weights_only=False)
expected = torch.load(sys.argv[1] + "/expected.pt")
assert torch.equal(model(**expected["inputs"]).logits.flatten(), expected["logits"])
assert not any(name.partition(".")[0] == "fuselora" for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, timeout=120)
    assert_all_fused(ours)
    loaded = pickle.loads(pickle.dumps(ours))
    assert classes(loaded) == classes(fuselora.unpatch_model(ours))


def test_adapter_round_trips_through_stock_peft(tmp_path: Path) -> None:
    """save_pretrained of a patched model writes PEFT's own files; what a patched model loads is what stock loads."""
    ours = fuselora.patch_model(lora_model("llama", lora={"lora_bias": True}), strict=True)
    optimizer = torch.optim.SGD([p for p in ours.parameters() if p.requires_grad], lr=0.5)
    ours(**batch()).loss.backward()
    optimizer.step()
    ours.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model("llama"), tmp_path).eval()
    stock = fuselora.unpatch_model(copy.deepcopy(ours)).eval()
    assert torch.equal(loaded(**batch()).logits, stock(**batch()).logits)
    patched = PeftModel.from_pretrained(fuselora.patch_model(base_model("llama")), tmp_path).eval()
    fuselora.patch_model(patched, strict=True)
    assert torch.equal(patched(**batch()).logits, ours.eval()(**batch()).logits)


def test_merged_base_round_trips_through_stock_transformers(tmp_path: Path) -> None:
    ours = fuselora.patch_model(lora_model("llama"), strict=True)
    merged = ours.merge_and_unload().eval()
    merged.save_pretrained(tmp_path)
    loaded = type(base_model("llama")).from_pretrained(tmp_path).eval()
    assert type(loaded).__module__.startswith("transformers.")
    assert torch.equal(loaded(**batch()).logits, fuselora.unpatch_model(merged)(**batch()).logits)


def test_bad_arguments_get_one_sentence() -> None:
    for function in (fuselora.patch_model, fuselora.unpatch_model, fuselora.patch_report):
        with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got NoneType; pass the model itself"):
            function(None)
    with pytest.raises(ValueError, match=r"disable: expected kinds from attention, .*, got speed; remove them"):
        fuselora.patch_model(lora_model("llama"), disable=["mlp", "speed"])


def test_strict_raises_and_leaves_the_model_as_it_was() -> None:
    on_head = {"target_modules": ["q_proj", "lm_head"]}  # a head with an adapter computes logits
    model = add_lora(base_model("llama"), **on_head)
    before = classes(model)
    with pytest.raises(
        ValueError, match=r"strict=True: expected every module fused, got \d+ that are not, first "
    ) as info:
        fuselora.patch_model(model, strict=True)
    assert "\n" not in str(info.value) and classes(model) == before
    half = fuselora.patch_model(add_lora(base_model("llama"), **on_head), disable=["mlp", "norm", "layer"])
    before = classes(half)
    with pytest.raises(ValueError, match="strict=True"):
        fuselora.patch_model(half, strict=True)
    assert classes(half) == before


@pytest.mark.parametrize("kind", KINDS)
def test_disable_leaves_a_kind_stock(kind: str) -> None:
    stock = lora_model("llama", torch.float64, **SMALL)
    twins = twins_of(stock, disable=[kind])
    twins.check()
    assert not twins.rows(status="fused", kind=kind) and twins.rows(status="fused")
    assert fuselora.patch_model(copy.deepcopy(stock), disable=kind, strict=kind != "norm") is not None


def test_unknown_models_are_reported_not_touched() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    before = classes(model)
    fuselora.patch_model(model, strict=True)
    assert classes(model) == before and fuselora.patch_report(model).rows == ()


def test_report_is_data_and_a_table() -> None:
    model = lora_model("llama")
    stock = fuselora.patch_report(model)
    assert stock.counts().keys() == {"stock"} and all(row.reason for row in stock.rows)
    report = fuselora.patch_report(fuselora.patch_model(model))
    assert report.counts() == {"fused": 28}
    assert str(report).endswith("28 modules: 28 fused, 0 partial, 0 stock")


def test_threads_with_models_of_their_own() -> None:
    """Eight threads patch, run and unpatch; none sees another's state."""
    twins = [small_twins("llama" if i % 2 else "qwen3", lora={"r": 2 + i}) for i in range(8)]
    errors: list[BaseException] = []

    def work(pair: Twins) -> None:
        try:
            for _ in range(3):
                fuselora.unpatch_model(pair.ours)
                fuselora.patch_model(pair.ours, strict=True)
                pair.check()
                assert_all_fused(pair.ours)
        except BaseException as error:  # a thread can't fail a test by itself
            errors.append(error)

    run_threads([lambda pair=pair: work(pair) for pair in twins])
    assert not errors, errors[0]


def test_threads_that_share_a_model() -> None:
    pair = small_twins().ours.eval()
    with torch.no_grad():
        expected = pair(**batch()).logits.clone()
        results: list[torch.Tensor] = []
        run_threads([lambda: results.extend(pair(**batch()).logits for _ in range(5))] * 8)
    assert len(results) == 40 and all(torch.equal(r, expected) for r in results)


def run_threads(targets: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=target) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_state_dict_bytes_are_those_of_stock() -> None:
    stock, ours = lora_model("phi3"), fuselora.patch_model(lora_model("phi3"), strict=True)
    files = [io.BytesIO(), io.BytesIO()]
    for model, file in zip((stock, ours), files, strict=True):
        torch.save(model.state_dict(), file)
    assert files[0].getvalue() == files[1].getvalue()


def test_saved_hidden_states_are_plain_tensors() -> None:
    """What a norm's output remembers for backward is not written with it."""
    hidden = fuselora.patch_model(lora_model("llama"))(**batch(), output_hidden_states=True).hidden_states[-1]
    assert hidden.requires_grad
    file = io.BytesIO()
    torch.save(hidden, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), hidden)
