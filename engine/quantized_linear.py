"""A frozen 4-bit linear without bitsandbytes: its format in memory and in files, our kernels in forward.

    y = linear(x.to(compute dtype), dequantise(weight), bias).to(x.dtype)

State-dict keys and bytes are those of ``bitsandbytes.nn.Linear4bit``, so files written with either load in the other:
    weight                                     uint8 [N K / 2, 1]
    weight.absmax, weight.quant_map            scales (fp32, or uint8 where they are quantised too) and the 16 values
    weight.nested_absmax, .nested_quant_map    only with double quantisation
    weight.quant_state.bitsandbytes__nf4       JSON as bytes: shape, block sizes, dtype before quantisation, offset
It is an ``nn.Linear`` to whoever asks for one by class, so PEFT puts its plain LoRA layer on it.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn

from fuselora.kernels.lora_linear import lora_linear
from fuselora.kernels.nf4 import QUANT_TYPES, Quantized4bit, check_quantized

TABLES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
STATE = "quant_state.bitsandbytes__"


class Linear4bit(nn.Linear):
    """Empty until ``set_quantized`` or ``load_state_dict``."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.compute_dtype = compute_dtype
        data = torch.empty(-(-in_features * out_features // 2), 1, dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(data, requires_grad=False)
        zeros = nn.Parameter(torch.zeros(out_features, dtype=compute_dtype, device=device), requires_grad=False)
        self.register_parameter("bias", zeros if bias else None)
        for name in (*TABLES, "nested_offset"):
            self.register_buffer(name, None)
        self.blocksize, self.blocksize2, self.quant_type, self.stored_dtype = 64, 256, "nf4", compute_dtype

    def set_quantized(self, q: Quantized4bit, quant_type: str, stored_dtype: torch.dtype) -> None:
        """Take over a quantised weight; ``stored_dtype`` is the one it had before, as files record it."""
        check_quantized("Linear4bit", q)
        self.weight = nn.Parameter(q.data.view(-1, 1), requires_grad=False)
        self.absmax, self.quant_map = q.absmax, q.code
        self.nested_absmax, self.nested_quant_map, self.nested_offset = q.absmax2, q.code2, q.offset
        self.blocksize, self.blocksize2 = q.blocksize, q.blocksize2
        self.quant_type, self.stored_dtype = quant_type, stored_dtype

    def quantized(self) -> Quantized4bit:
        """The weight as the kernels take it.

        Raises:
            ValueError: nothing has been loaded yet.
        """
        if self.absmax is None:
            raise ValueError("Linear4bit: weight: expected a quantised weight, got none; load one first")
        nested = (self.nested_absmax, self.nested_quant_map, self.nested_offset)
        shape = (self.out_features, self.in_features)
        return Quantized4bit(
            self.weight.data.view(-1), self.absmax, self.quant_map, shape, self.blocksize, *nested, self.blocksize2
        )

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        with torch.autocast(x.device.type, enabled=False):
            return lora_linear(x.to(self.compute_dtype), self.quantized(), bias).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, quant_type={self.quant_type}, compute_dtype={self.compute_dtype}"

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move with the model, but keep fp32 scales and tables fp32 whatever dtype the model is turned to."""
        before = {name: getattr(self, name) for name in (*TABLES, "nested_offset")}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            if new is not None and new.dtype != old.dtype:
                setattr(self, name, old.to(new.device))
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name in ("weight", "bias"):
            value = getattr(self, name)
            if value is not None:
                destination[prefix + name] = value if keep_vars else value.detach()
        if self.absmax is not None:
            for name, value in state_parts(self.quantized(), self.quant_type, self.stored_dtype).items():
                destination[f"{prefix}weight.{name}"] = value

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        start = f"{prefix}weight."
        parts = {key.removeprefix(start): value for key, value in state_dict.items() if key.startswith(start)}
        weight, bias = state_dict.get(prefix + "weight"), state_dict.get(prefix + "bias")
        if weight is None or (bias is None) != (self.bias is None):
            missing_keys.append(prefix + ("weight" if weight is None else "bias"))
            return
        device = weight.device if self.weight.is_meta else self.weight.device
        try:
            q, quant_type, stored = from_parts(weight, parts, (self.out_features, self.in_features), device)
        except ValueError as error:
            error_msgs.append(f"{prefix}weight: {error}")
            return
        self.set_quantized(q, quant_type, stored)
        if bias is not None:
            self.bias = nn.Parameter(bias.to(device, self.compute_dtype), requires_grad=False)


def state_parts(q: Quantized4bit, quant_type: str, stored_dtype: torch.dtype) -> dict[str, Tensor]:
    """What bitsandbytes' files hold beside ``weight``, by the name behind ``weight.``."""
    about: dict[str, Any] = {"quant_type": quant_type, "blocksize": q.blocksize}
    about |= {"dtype": str(stored_dtype).removeprefix("torch."), "shape": list(q.shape)}
    parts = {"absmax": q.absmax, "quant_map": q.code}
    if q.absmax2 is not None and q.code2 is not None and q.offset is not None:
        parts |= {"nested_absmax": q.absmax2, "nested_quant_map": q.code2.clone()}  # safetensors refuses shared storage
        about |= {"nested_blocksize": q.blocksize2, "nested_dtype": "float32", "nested_offset": q.offset.item()}
    parts["quant_map"] = q.code.clone()
    text = torch.frombuffer(bytearray(json.dumps(about).encode()), dtype=torch.uint8)
    return parts | {STATE + quant_type: text}


def _about(text: Tensor) -> dict[str, Any]:
    """The JSON of a quantisation state, with the entries that are needed and of their kinds."""
    damaged = f"quant_state: expected JSON as bytes, got {text.numel()} values of {text.dtype} that are none"
    try:
        about = json.loads(bytes(text.flatten().tolist()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{damaged}; the file is damaged") from error
    if not isinstance(about, dict):
        raise ValueError(f"{damaged} of a state but of {type(about).__name__}; the file is damaged")
    kinds: dict[str, Any] = {"shape": list, "blocksize": int, "dtype": str}
    if "nested_blocksize" in about:
        kinds |= {"nested_blocksize": int, "nested_offset": (int, float)}
    for key, kind in kinds.items():
        if not isinstance(about.get(key), kind):
            want = kind.__name__ if isinstance(kind, type) else "number"
            raise ValueError(
                f"quant_state: {key}: expected a value of type {want}, got {about.get(key)!r}; the file is damaged"
            )
    stored = getattr(torch, about["dtype"], None)
    if not isinstance(stored, torch.dtype) or not stored.is_floating_point:
        raise ValueError(f"quant_state: dtype: expected a float of torch, got {about['dtype']!r}; the file is damaged")
    if not abs(about.get("nested_offset", 0.0)) <= torch.finfo(torch.float32).max:
        got = about["nested_offset"]
        raise ValueError(f"quant_state: nested_offset: expected a finite fp32, got {got}; the file is damaged")
    return about


def from_parts(
    weight: Tensor, parts: dict[str, Tensor], shape: tuple[int, int], device: torch.device
) -> tuple[Quantized4bit, str, torch.dtype]:
    """Inverse of ``state_parts``: (the weight, its quant_type, its dtype before quantisation).

    Raises:
        ValueError: parts are missing, of another shape than the layer's, or do not fit each other.
    """
    kinds = [name.removeprefix(STATE) for name in parts if name.startswith(STATE)]
    if len(kinds) != 1 or kinds[0] not in QUANT_TYPES:
        raise ValueError(
            f"quant_state: expected one of {', '.join(STATE + kind for kind in QUANT_TYPES)}, got {sorted(parts)}; "
            "the file holds no 4-bit weight of bitsandbytes"
        )
    for name, part in (("weight", weight), *parts.items()):
        if part.is_meta and device.type != "meta":
            raise ValueError(f"{name}: expected data, got a tensor on the meta device; read the file first")
    if weight.dtype == torch.bool:
        raise ValueError(f"weight: expected bytes or a float quant_storage, got {weight.dtype}; the file is damaged")
    about = _about(parts[STATE + kinds[0]])
    if (kind := about.get("quant_type", kinds[0])) != kinds[0]:
        raise ValueError(f"quant_state: quant_type: expected {kinds[0]}, as its key, got {kind!r}; the file is damaged")
    nested = "nested_blocksize" in about
    needed = TABLES if nested else TABLES[:2]
    if missing := [name for name in needed if name not in parts]:
        raise ValueError(f"{missing[0]}: expected beside the weight, got {sorted(parts)}; the file is truncated")
    if tuple(about["shape"]) != shape:
        raise ValueError(f"shape: expected {shape}, got {tuple(about['shape'])}; the file belongs to another model")
    tables = {name: parts[name].to(device) for name in needed}
    data = weight.to(device).contiguous().view(-1).view(torch.uint8)
    q = Quantized4bit(data, tables["absmax"], tables["quant_map"], shape, about["blocksize"])
    if nested:
        q = q._replace(
            absmax2=tables["nested_absmax"],
            code2=tables["nested_quant_map"],
            offset=torch.tensor(about["nested_offset"], dtype=torch.float32, device=device),
            blocksize2=about["nested_blocksize"],
        )
    check_quantized("Linear4bit", q)
    return q, kinds[0], getattr(torch, about["dtype"])
