"""torch.optim.AdamW for all parameters at once, clipping included: three launches on a GPU, one native call on a CPU.

The maths and the kernels are ``kernels/adamw.py``. This class is torch's AdamW in everything that others see: parameter
groups, ``state_dict`` (``step``, ``exp_avg``, ``exp_avg_sq`` per parameter, each a view into one flat buffer),
``load_state_dict``, schedulers. What the op cannot take (parameters that have stepped unequally often, ``amsgrad``)
runs torch's own step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fuselora.kernels import adamw
from fuselora.kernels.checks import fail


class FusedAdamW(torch.optim.AdamW):
    """AdamW for many small tensors; ``clip_and_step`` also clips the gradient's norm, at no extra launch.

    Args:
        params: parameters or groups; lr and weight_decay may differ by group, betas and eps may not.

    Raises:
        ValueError: groups with different betas or eps.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        for key in ("betas", "eps"):
            if len({group[key] for group in self.param_groups}) > 1:
                got = ", ".join(str(group[key]) for group in self.param_groups)
                raise fail("FusedAdamW", key, "the same in all groups", got, "use torch.optim.AdamW")
        self._bound: list[Tensor] = []
        self._flat: tuple[Tensor, Tensor, Tensor] | None = None  # exp_avg, exp_avg_sq, steps

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update with the gradients as they are; as torch's ``step``."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.clip_and_step(math.inf)
        return loss

    @torch.no_grad()
    def clip_and_step(self, max_norm: float, ok: Tensor | None = None) -> Tensor:
        """Scale the gradients so that their joint norm is at most ``max_norm`` and update. Returns the norm before.

        ``.grad`` stays as it is: the scaled gradients exist in registers only. A norm that is not finite updates
        nothing, without waiting for the device; so does a false ``ok`` (0-d bool), and the norm is then NaN.
        """
        groups = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        params = [p for p, _ in groups]
        if not params:
            return torch.zeros(())
        if not self._bind(params):
            return self._stock_step(params, max_norm, ok)
        assert self._flat is not None
        scale = None if ok is None else torch.where(ok, 1.0, math.nan).to(self._flat[2])  # NaN gradients update nothing
        first = groups[0][1]
        return torch.ops.fuselora.adamw_(
            params,
            [p.grad for p in params],
            *self._flat,
            [float(group["lr"]) for _, group in groups],
            [float(group["weight_decay"]) for _, group in groups],
            *map(float, first["betas"]),
            float(first["eps"]),
            float(max_norm),
            scale,
            [],
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._bound, self._flat = [], None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._bound, self._flat = [], None

    def _bind(self, params: list[Tensor]) -> bool:
        """Give exactly these parameters moments in flat buffers and one step counter; False if that is impossible."""
        if len(params) == len(self._bound) and all(a is b for a, b in zip(params, self._bound, strict=True)):
            return True
        if any(group["amsgrad"] or group["maximize"] for group in self.param_groups):
            return False
        steps = {float(self.state[p]["step"]) if p in self.state else 0.0 for p in params}
        if len(steps) > 1 or len({(p.dtype, p.device) for p in params}) > 1:
            return False
        at = adamw.offsets(params)
        exp_avg, exp_avg_sq = torch.zeros(2, at[-1], dtype=params[0].dtype, device=params[0].device).unbind()
        counts = torch.full((len(params),), steps.pop(), dtype=torch.float32, device=params[0].device)
        for p, start, step in zip(params, at[:-1], counts, strict=True):
            views = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
            views = {key: flat[start : start + p.numel()].view(p.shape) for key, flat in views.items()}
            for key, old in self.state.get(p, {}).items():
                if key in views:
                    views[key].copy_(old)
            self.state[p] = {"step": step, **views}
        self._bound, self._flat = params, (exp_avg, exp_avg_sq, counts)
        return True

    def _stock_step(self, params: list[Tensor], max_norm: float, ok: Tensor | None) -> Tensor:
        norm = torch.nn.utils.clip_grad_norm_(params, max_norm)
        if bool(torch.isfinite(norm) if ok is None else ok & torch.isfinite(norm)):
            super().step()
        self._bound, self._flat = [], None
        return norm
