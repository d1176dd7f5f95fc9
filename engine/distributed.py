"""Several processes: torchrun's, accelerate's or DeepSpeed's launcher starts them; DDP, FSDP2 or ZeRO joins them.

    DDP      every process holds the model; after backward the gradients of all processes are summed
    FSDP2    every process holds a part of each weight; a layer's weights are gathered while it runs
    ZeRO     the same by DeepSpeed's engine, given its configuration: loop_zero.py

Gradients are summed, not averaged: each process's loss is already divided by the trained tokens of *all* processes'
micro-batches, so the sum is the gradient of the mean over tokens, whatever share of them a process got. Loss and
gradients therefore equal those of one process to rounding.

``control`` is a second group, over the CPU (gloo): the processes agree on stopping without a device waiting for it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fuselora.engine import zero_config
from fuselora.engine.config import Config
from fuselora.engine.config_types import json_mapping
from fuselora.engine.errors import expected

SHARDING = {"full_shard": True, "shard_grad_op": False}  # whether weights are given back between forward and backward


@dataclass(frozen=True)
class World:
    """This process among ``size``. One process needs no group, and every method is then a no-op."""

    rank: int = 0
    size: int = 1
    control: Any = None

    @property
    def main(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add up ``tensor`` over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def agree(self, value: int) -> int:
        """The largest of the processes' values; waits for the slowest process, not for a device."""
        if self.size == 1:
            return value
        box = torch.tensor(value)
        dist.all_reduce(box, dist.ReduceOp.MAX, group=self.control)
        return int(box)

    def gather(self, data: bytes) -> list[bytes]:
        """Every process's ``data``, by rank, in every process."""
        if self.size == 1:
            return [data]
        length = self.agree(len(data))
        padded = torch.frombuffer(bytearray(len(data).to_bytes(8, "little") + data.ljust(length)), dtype=torch.uint8)
        boxes = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(boxes, padded, group=self.control)
        raw = [bytes(box.numpy()) for box in boxes]
        return [part[8 : 8 + int.from_bytes(part[:8], "little")] for part in raw]


def start(config: Config) -> World:
    """Join the group that the launcher's environment variables describe; without them, one process."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    zero = zero_config.read(config)
    if config.deepspeed and zero is None and os.environ.get("RANK", "0") == "0":
        print("deepspeed: stage 0 shards nothing: every process holds a replica (DDP)")
    if size == 1 and config.fsdp:
        raise expected("fsdp", "several processes", "one", "start with torchrun, or drop the key")
    cuda = torch.cuda.is_available() and not config.use_cpu
    backend, timeout = config.ddp_backend or ("nccl" if cuda else "gloo"), timedelta(seconds=config.ddp_timeout)
    if size == 1:
        if zero is not None:  # DeepSpeed wants a group, of one if need be
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return World()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(backend, timeout=timeout)
    world = World(dist.get_rank(), size, dist.new_group(backend="gloo", timeout=timeout))
    if not world.main:  # one voice; errors still reach standard error
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the rest of the process
    return world


@contextmanager
def main_first(world: World) -> Iterator[None]:
    """The main process runs the block before the others do."""
    if not world.main:
        try:
            world.agree(0)
        except RuntimeError as error:
            raise expected("processes", "the main one to get ready", "its end", "see its error") from error
    yield
    if world.main:
        world.agree(0)


def stop(world: World) -> None:
    """Leave the group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another process is gone."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in ("gloo/", "Connection ", "NCCL"))


class LossOf(nn.Module):
    """The model as a module whose output is the loss alone: what DDP wraps."""

    def __init__(self, model: nn.Module, objective: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: dict[str, Any], tokens: int) -> Tensor:
        return self.objective(self.model, batch, tokens)


def replicate(module: LossOf, config: Config) -> nn.parallel.DistributedDataParallel:
    """DDP that sums gradients. The frozen weights are those of one file and aren't compared."""
    for p in module.parameters():
        if p.requires_grad:
            dist.broadcast(p.data, 0)
    wrapped = nn.parallel.DistributedDataParallel(
        module,
        broadcast_buffers=False,
        init_sync=False,
        find_unused_parameters=config.ddp_find_unused_parameters,
    )
    wrapped.register_comm_hook(None, _sum_bucket)
    return wrapped


def _sum_bucket(state, bucket):  # unannotated: DDP compares annotations with classes, and here they are text
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


def sharding(config: Config) -> bool | None:
    """None without FSDP, else whether to give weights back after forward. ``accelerate launch`` asks by environment.

    Raises:
        UserError: a strategy that doesn't exist here.
    """
    if not config.fsdp:
        return True if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" else None
    words = ["full_shard"] if config.fsdp is True else str(config.fsdp).split()
    for word in words:
        if word not in (*SHARDING, "auto_wrap"):
            raise expected("fsdp", "full_shard or shard_grad_op", repr(word), "choose one of those")
    reshard = next((SHARDING[word] for word in words if word in SHARDING), True)
    return bool(json_mapping("fsdp_config", config.fsdp_config).get("reshard_after_forward", reshard))


def shard(model: nn.Module, world: World, reshard: bool) -> None:
    """FSDP2 in place: one unit per decoder layer and one for the rest, gradients summed."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    device = next(model.parameters()).device.type
    mesh = init_device_mesh(device, (world.size,))
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows sums only


def give_back(model: nn.Module) -> None:
    """After forward passes without backward: weights that FSDP2 still holds whole become shards again."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The modules that transformers names as not to be split over devices."""
    names = {name for m in model.modules() for name in (getattr(m, "_no_split_modules", None) or ())}
    layers = [m for m in model.modules() if type(m).__name__ in names]
    if not layers:
        raise expected("fsdp", "a model that names its layers (_no_split_modules)", type(model).__name__, "use DDP")
    return layers


def in_parts(tensor: Tensor) -> bool:
    """Whether FSDP2 or ZeRO holds this weight, or its fp32 master, in parts."""
    return hasattr(tensor, "full_tensor") or _zero(tensor)


def _zero(tensor: Tensor) -> bool:
    """Marks of DeepSpeed's stage 3, and of stages 1 and 2 on what is trained."""
    return hasattr(tensor, "ds_id") or hasattr(tensor, "_hp_mapping")


def whole(tensor: Tensor) -> Tensor:
    """A weight or state in full, on the CPU; all processes have to ask together where it is sharded. Of a weight that
    ZeRO trains in bf16, the fp32 master.
    """
    if _zero(tensor):
        import deepspeed

        if tensor.requires_grad:
            return deepspeed.utils.safe_get_full_fp32_param(tensor).detach().cpu()
        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().to("cpu", copy=True)
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).cpu()


def copy_whole_(target: Tensor, source: Tensor) -> None:
    """Write ``source``, in full, into a weight or state that may be sharded."""
    with torch.no_grad():
        if hasattr(target, "full_tensor"):
            from torch.distributed.tensor import distribute_tensor

            source = distribute_tensor(source.to(target.device), target.device_mesh, target.placements)
        if not _zero(target):
            target.copy_(source)
            return
        import deepspeed

        deepspeed.utils.safe_set_full_fp32_param(target, source.to(target.device, torch.float32))
        with deepspeed.zero.GatheredParameters([target], modifier_rank=0):
            target.data.copy_(source)


def relaunch(arguments: Sequence[str]) -> None:
    """With several GPUs, or FORCE_TORCHRUN set, run the same command under torchrun; returns if there is no need.

    NPROC_PER_NODE, NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT are passed on.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    forced = os.environ.get("FORCE_TORCHRUN", "0").lower() in ("1", "true")
    if "LOCAL_RANK" in os.environ or not (forced or gpus > 1):
        return
    options = ["--nproc_per_node", os.environ.get("NPROC_PER_NODE", str(max(gpus, 1)))]
    if int(os.environ.get("NNODES", "1")) > 1:
        for name, default in (("NNODES", "1"), ("NODE_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
            options += [f"--{name.lower()}", os.environ.get(name, default)]
        options += ["--master_port", os.environ.get("MASTER_PORT", "29500")]
    else:
        options.append("--standalone")
    command = [sys.executable, "-m", "torch.distributed.run", *options, "-m", "fuselora", "train", *arguments]
    sys.stdout.flush()
    os.execv(sys.executable, command)
