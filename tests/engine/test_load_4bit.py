"""Models loaded straight to 4 bits: bitsandbytes' bytes both ways, PEFT on top, no second copy in memory."""

from __future__ import annotations

import copy
import hashlib
import json
import subprocess
import sys
import textwrap

import pytest
import torch
from tests.support.bnb import SIZES, import_bnb, qlora_model
from tests.support.models import add_lora, base_model, batch
from tests.support.parity import assert_all_fused, assert_close_to_truth, run, run_truth
from torch import nn

import fuselora
from fuselora.engine.kbit import dequantize_linears
from fuselora.engine.quantized_linear import Linear4bit, from_parts, state_parts
from fuselora.functional import quantize_4bit

KINDS = pytest.mark.parametrize("kind", ["nf4", "fp4"])
DOUBLE = pytest.mark.parametrize("double", [True, False], ids=["double", "single"])


@pytest.fixture(scope="module", params=["llama", "qwen2", "gemma2"])  # plain; with biases; with a tied head
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    head = {"head_dim": 16} if request.param == "gemma2" else {}
    base_model(request.param, torch.bfloat16, **SIZES, **head).save_pretrained(path)
    return path


def by_bitsandbytes(folder, kind="nf4", double=True, dtype=torch.bfloat16):
    import_bnb()
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
    )
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config)


def assert_same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


@KINDS
@DOUBLE
def test_state_is_that_of_bitsandbytes(folder, kind, double):
    ours = fuselora.load_4bit(str(folder), quant_type=kind, double=double, progress=False)
    assert_same_state(ours, by_bitsandbytes(folder, kind, double))
    assert not any(p.requires_grad for n, p in ours.named_parameters() if p.dtype == torch.uint8)
    assert type(ours.lm_head) is nn.Linear


def test_files_load_either_way(folder, tmp_path):
    from transformers import AutoModelForCausalLM

    ours, theirs = fuselora.load_4bit(str(folder), progress=False), by_bitsandbytes(folder)
    for name, model in (("ours", ours), ("theirs", theirs)):
        model.save_pretrained(tmp_path / name)
    digests = {hashlib.sha256((tmp_path / n / "model.safetensors").read_bytes()).digest() for n in ("ours", "theirs")}
    assert len(digests) == 1
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(back.model.layers[0].mlp.up_proj).__module__ == "bitsandbytes.nn.modules"
    assert_same_state(back, theirs)
    read = fuselora.load_4bit(str(tmp_path / "theirs"), progress=False)
    assert_same_state(read, ours)
    read.save_pretrained(tmp_path / "again")
    digests.add(hashlib.sha256((tmp_path / "again" / "model.safetensors").read_bytes()).digest())
    assert len(digests) == 1


def test_state_dict_loads_into_an_empty_model_and_names_what_is_wrong():
    q = quantize_4bit(torch.randn(32, 64), double=True)
    full = Linear4bit(64, 32, bias=True)
    full.set_quantized(q, "nf4", torch.float32)
    state = full.state_dict()
    empty = Linear4bit(64, 32, bias=True)
    empty.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(empty.state_dict().values(), state.values(), strict=True))
    assert empty.stored_dtype == torch.float32 and empty.quantized().blocksize2 == 256
    for broken, words in (
        ({k: v for k, v in state.items() if k != "weight.nested_absmax"}, "nested_absmax: .* truncated"),
        ({k: v for k, v in state.items() if "quant_state" not in k}, "quant_state: expected one of"),
        (state | {"weight": state["weight"][:-8]}, r"data: expected 1024 .* truncated"),
    ):
        with pytest.raises(RuntimeError, match=words):
            Linear4bit(64, 32, bias=True).load_state_dict(broken)
    with pytest.raises(RuntimeError, match=r"shape: expected \(64, 32\), got \(32, 64\)"):
        Linear4bit(32, 64).load_state_dict({k: v for k, v in state.items() if k != "bias"} | {"bias": torch.zeros(64)})
    with pytest.raises(ValueError, match="expected a quantised weight, got none"):
        Linear4bit(64, 32)(torch.zeros(1, 64))


def quant_state(**changes):
    """JSON as bytes; a change to None takes the entry away."""
    about = {"shape": [32, 64], "blocksize": 64, "dtype": "float32", "nested_blocksize": 256, "nested_offset": 0.1}
    text = json.dumps({key: value for key, value in (about | changes).items() if value is not None})
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weight": lambda t: t[:-1]}, "data: expected 1024 contiguous .* truncated"),
        ({"weight": lambda t: t.to(torch.int16).repeat(2, 1)}, "data: expected 1024 contiguous"),
        ({"absmax": lambda t: t[:-1]}, "absmax: expected 32 contiguous torch.uint8 values"),
        ({"absmax": lambda t: t.float()}, "absmax: expected 32 contiguous torch.uint8 values"),
        ({"nested_absmax": lambda t: t.repeat(2)}, "absmax2: expected 1 contiguous torch.float32 values"),
        ({"quant_map": lambda t: t[:8]}, "code: expected 16 contiguous"),
        ({"nested_quant_map": lambda t: t[:255]}, "code2: expected 256 contiguous"),
        ({"about": lambda t: t[:-9]}, "quant_state: expected JSON as bytes, got .* damaged"),
        ({"about": lambda t: quant_state(blocksize=48)}, "blocksize: expected one of 32, 64, .* got 48"),
        ({"about": lambda t: quant_state(blocksize=128)}, "absmax: expected 16 contiguous"),
        ({"about": lambda t: quant_state(blocksize="64")}, "quant_state: blocksize: expected a value of type int"),
        ({"about": lambda t: quant_state(shape=None)}, "quant_state: shape: expected a value of type list, got None"),
        ({"about": lambda t: quant_state(shape=[64, 32])}, r"shape: expected \(32, 64\), got \(64, 32\)"),
        (
            {"about": lambda t: quant_state(nested_offset=None)},
            "quant_state: nested_offset: expected a value of type n",
        ),
        ({"about": lambda t: quant_state(dtype="float33")}, "quant_state: dtype: expected a float .* got 'float33'"),
        ({"about": lambda t: quant_state(dtype="int8")}, "quant_state: dtype: expected a float of torch, got 'int8'"),
        ({"about": lambda t: torch.tensor([*b"[1]"], dtype=torch.uint8)}, "expected JSON .* of a state but of list"),
        ({"about": lambda t: quant_state(nested_blocksize=0)}, "blocksize2: expected one of 32, 64, .* got 0"),
        (
            {"about": lambda t: quant_state(nested_offset=float("nan"))},
            "nested_offset: expected a finite .* got nan",
        ),
        ({"about": lambda t: quant_state(nested_offset=1e39)}, "nested_offset: expected a finite .* got 1e.39"),
        ({"about": lambda t: quant_state(quant_type="fp4")}, "quant_type: expected nf4, as its key, got 'fp4'"),
        ({"about": lambda t: t.to("meta")}, "bitsandbytes__nf4: expected data, got a tensor on the meta device"),
        ({"weight": lambda t: t.to("meta")}, "weight: expected data, got a tensor on the meta device"),
        ({"weight": lambda t: t.bool()}, "weight: expected bytes or a float quant_storage, got torch.bool"),
        ({"kind": "int4"}, "quant_state: expected one of quant_state.bitsandbytes__nf4, .* got .*__int4"),
    ],
    ids=lambda change: next(iter(change)) if isinstance(change, dict) else "",
)
def test_a_damaged_state_is_refused_in_one_sentence(changes, words):
    q = quantize_4bit(torch.randn(32, 64), double=True)
    parts = state_parts(q, "nf4", torch.float32)
    about = parts.pop("quant_state.bitsandbytes__nf4")
    tensors = {"weight": q.data.view(-1, 1), "about": about} | parts
    tensors |= {key: change(tensors[key]) for key, change in changes.items() if key != "kind"}
    weight, about = tensors.pop("weight"), tensors.pop("about")
    tensors[f"quant_state.bitsandbytes__{changes.get('kind', 'nf4')}"] = about
    with pytest.raises(ValueError, match=words) as raised:
        from_parts(weight, tensors, (32, 64), torch.device("cpu"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("weight", lambda t: t[:-1], "data: expected 2048 contiguous"),
        ("weight.absmax", lambda t: t[:-1], "absmax: expected 64 contiguous"),
        ("weight.quant_state.bitsandbytes__nf4", lambda t: t[:-9], "quant_state: expected JSON as bytes"),
    ],
)
def test_a_damaged_file_is_refused(folder, tmp_path, name, change, words):
    from safetensors.torch import load_file, save_file

    if folder.name.startswith(("qwen2", "gemma2")):
        pytest.skip("one family shows it")
    fuselora.load_4bit(str(folder), progress=False).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    key = f"model.layers.1.self_attn.q_proj.{name}"
    save_file(tensors | {key: change(tensors[key]).contiguous()}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=f"load_4bit: .*layers.1.self_attn.q_proj.weight: .*{words}"):
        fuselora.load_4bit(str(tmp_path), progress=False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: setattr(state, "absmax", state.absmax[:-1]), "absmax: expected 64 contiguous torch.uint8"),
        (lambda state: setattr(state, "blocksize", 48), "blocksize: expected one of 32, 64"),
        (lambda state: setattr(state, "shape", torch.Size((64, 66))), "data: expected 2112 contiguous|weight.shape"),
        (lambda state: setattr(state, "code", state.code[:15]), "code: expected 16"),
        (lambda state: setattr(state.state2, "absmax", torch.zeros(3)), "absmax2: expected 1 contiguous"),
        (lambda state: setattr(state, "shape", None), r"shape: expected two sizes, .* got \(\)"),
        (lambda state: setattr(state, "offset", None), "offset: expected a tensor beside absmax2, got None"),
        (lambda state: setattr(state.state2, "blocksize", 0), "blocksize2: expected one of 32, 64"),
        (lambda state: setattr(state, "state2", None), "absmax: expected 64 contiguous torch.float32"),
    ],
)
def test_a_state_of_bitsandbytes_that_does_not_fit_is_refused_before_any_kernel(change, words):
    import_bnb()
    model = fuselora.patch_model(qlora_model("llama"))
    change(model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight.quant_state)
    with pytest.raises(ValueError, match=words):
        model(**batch())


def test_storage_of_another_dtype_is_read():
    q = quantize_4bit(torch.randn(32, 64))
    parts = state_parts(q, "nf4", torch.bfloat16)
    stored = q.data.view(torch.bfloat16).view(-1, 1)
    back, kind, dtype = from_parts(stored, parts, (32, 64), torch.device("cpu"))
    assert torch.equal(back.data, q.data) and (kind, dtype) == ("nf4", torch.bfloat16)


def test_changing_the_dtype_leaves_scales_and_codes(folder):
    model = fuselora.load_4bit(str(folder), progress=False)
    layer = model.model.layers[0].mlp.up_proj
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    nn.Module.half(model)
    assert model.lm_head.weight.dtype == torch.float16
    assert all(torch.equal(v, before[k]) and v.dtype == before[k].dtype for k, v in layer.state_dict().items())
    moved = copy.deepcopy(layer).to("meta")
    assert moved.absmax.is_meta and moved.absmax.dtype == before["weight.absmax"].dtype


def test_lora_on_top_is_fused_and_as_exact(folder, tmp_path):
    stock = add_lora(fuselora.prepare_kbit(fuselora.load_4bit(str(folder), progress=False), False))
    assert {type(m.base_layer) for m in stock.modules() if hasattr(m, "base_layer")} == {Linear4bit}
    twin = dequantize_linears(copy.deepcopy(stock), torch.bfloat16)
    ours = fuselora.patch_model(copy.deepcopy(stock), strict=True)
    many = [batch(seed=seed, pad="right" if seed % 2 else None) for seed in range(4)]
    theirs = run(stock, many)
    assert_close_to_truth(run(ours, many), run_truth(twin, many), theirs, torch.bfloat16)
    assert_all_fused(ours)

    ours.save_pretrained(tmp_path)
    import peft

    base = peft.PeftModel.from_pretrained(by_bitsandbytes(folder), tmp_path)  # where others load the adapter
    for name, value in ours.state_dict().items():
        if "lora_" in name:
            assert torch.equal(base.state_dict()[name], value)


def test_merging_in_place_is_refused_by_peft(folder):
    """PEFT takes the layer for a dense one; what matters is that it can't change its bytes."""
    model = add_lora(fuselora.load_4bit(str(folder), progress=False))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(RuntimeError):
        model.merge_adapter()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"quant_type": "int4"}, "load_4bit: quant_type: .* got 'int4'"),
        ({"blocksize": 48}, "load_4bit: blocksize: .* got 48"),
        ({"dtype": torch.float64}, "load_4bit: dtype: .* got torch.float64"),
    ],
)
def test_bad_arguments(folder, keys, words):
    with pytest.raises(ValueError, match=words):
        fuselora.load_4bit(str(folder), **keys)


@DOUBLE
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_weights_that_are_not_finite_are_refused(folder, tmp_path, bad, double):
    from safetensors.torch import load_file, save_file

    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    tensors[name][5, 7] = bad
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(
        ValueError, match=f"load_4bit: .*{name}: expected finite weights, got NaN or infinite"
    ) as raised:
        fuselora.load_4bit(str(tmp_path), double=double, progress=False)
    assert "\n" not in str(raised.value)


def test_files_of_another_method_are_refused(folder, tmp_path):
    import shutil

    other = shutil.copytree(folder, tmp_path / "gptq")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    with pytest.raises(ValueError, match=r"expected dense or 4-bit files of bitsandbytes, got gptq"):
        fuselora.load_4bit(str(other))


SCRIPT = """
import importlib.util, sys
find = importlib.util.find_spec
hidden = ("bitsandbytes",)
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] in hidden else find(name, *rest)
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in hidden:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
"""


def script(body, *arguments):
    return subprocess.run(
        [sys.executable, "-c", SCRIPT + textwrap.dedent(body), *map(str, arguments)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_works_without_bitsandbytes(folder, tmp_path):
    done = script(
        """
        import torch, fuselora, peft
        model = fuselora.prepare_kbit(fuselora.load_4bit(sys.argv[1], progress=False))
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
        model = fuselora.patch_model(model, strict=True)
        ids = torch.arange(12).view(1, 12)
        model(input_ids=ids, labels=ids).loss.backward()
        fuselora.unpatch_model(model).unload().save_pretrained(sys.argv[2])
        fuselora.load_4bit(sys.argv[2], progress=False)
        assert "bitsandbytes" not in sys.modules
        """,
        folder,
        tmp_path / "saved",
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_memory_is_the_result_and_one_weight(folder, tmp_path):
    """Anonymous memory: pages of the file are the system's to drop."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "vocab_size": 64}
    config = LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=8)
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    done = script(
        """
        import threading, time, torch, fuselora
        fuselora.load_4bit(sys.argv[2], progress=False)  # libraries and threads are there
        anonymous = lambda: int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) / 1024
        peak, stop = [0.0], threading.Event()
        def watch():
            while not stop.wait(0.001):
                peak[0] = max(peak[0], anonymous())
        start = anonymous()
        thread = threading.Thread(target=watch); thread.start()
        model = fuselora.load_4bit(sys.argv[1], progress=False)
        stop.set(); thread.join()
        held = sum(t.nbytes for t in (*model.parameters(), *model.buffers())) / 2**20
        print(peak[0] - start, held)
        """,
        tmp_path,
        folder,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    grown, held = map(float, done.stdout.split())
    dense = sum(p.numel() for p in LlamaForCausalLM(config).parameters()) * 2 / 2**20
    print(f"grew {grown:.0f} MiB, holds {held:.0f} MiB, dense {dense:.0f} MiB")
    assert grown < held + 0.1 * dense
