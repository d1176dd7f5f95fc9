"""The longest context that fits a memory budget, predicted per checkpointing policy, beside a published table.

    python bench/context.py --preset llama-3-8b --budget-gb 24,40,80 --quant nf4

Batch 1, LoRA of rank 32 on every linear, AdamW, logits in chunks: the setting of the published figures, which are
measurements of others and not ours. Predictions are those of ``fuselora estimate`` for a GPU: they count tensors, op by
op, and assume 0.6 GB for the CUDA context; what the caching allocator adds is not in them. ``offload`` needs host
memory, which is printed. A budget is in 10^9 bytes where cards of that name have more (24 GB: 25.3e9), so predictions
err to the low side by 5 to 7 %.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import presets
import torch
from transformers import AutoConfig

from fuselora.engine.estimate import PARTS, Run, longest
from fuselora.engine.memory_plan import GB
from fuselora.engine.memory_shapes import layer_shape

POLICIES = ("off", "mlp", "full", "offload")
# Unsloth's context table for Llama-3.1-8B QLoRA, batch 1, rank 32 (its benchmark page): {GB: (Unsloth, HF + FA2)}.
PUBLISHED = {24: (78_475, 5_789), 40: (153_977, 12_264), 48: (191_728, 15_502), 80: (342_733, 28_454)}
NAMES = {"llama3-8b": "llama-3-8b"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="llama-3-8b", choices=[*presets.PRESETS, *NAMES])
    parser.add_argument("--budget-gb", default="24,40,80", help="comma-separated, in 10^9 bytes")
    parser.add_argument("--quant", default="nf4", choices=["nf4", "none"])
    parser.add_argument("--rank", type=int, default=32)
    args = parser.parse_args()
    preset = presets.PRESETS[NAMES.get(args.preset, args.preset)]
    config = AutoConfig.for_model(preset.model_type, **preset.fields)
    bits = 4 if args.quant == "nf4" else None
    run = Run(config, 1, 64, dtype=torch.bfloat16, bits=bits, rank=args.rank, device="cuda")
    print(f"predicted: {args.preset}, batch 1, {args.quant} base, rank {args.rank}, adapters and AdamW in fp32")
    for budget in [float(text) for text in args.budget_gb.split(",")]:
        report(run, budget)


def report(run: Run, budget: float) -> None:
    """The table of one budget."""
    print(f"\n{budget:g} GB  " + "".join(f"{part:>11}" for part in (*PARTS, "tokens", "host GB")))
    for policy in POLICIES:
        made = longest(replace(run, policy=policy), int(budget * GB))
        if made is None:
            print(f"{policy:<8}  does not fit")
            continue
        shape = layer_shape(run.config, {}, eager=False)
        host = run.layers * made.run.length * shape.on_host() / GB if policy == "offload" else 0.0
        numbers = "".join(f"{getattr(made, part) / GB:>11.2f}" for part in PARTS)
        print(f"{policy:<8}{numbers}{made.run.length:>11,}{host:>11.1f}")
    if known := PUBLISHED.get(int(budget)):
        print(f"published (measured by others, Llama-3.1-8B QLoRA): Unsloth {known[0]:,}; HF + FA2 {known[1]:,}")


if __name__ == "__main__":
    main()
