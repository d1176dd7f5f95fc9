"""Public differentiable ops. Each is a plain function on tensors; its docstring gives shapes, dtypes and source."""

from fuselora.kernels.rms_norm import add_rms_norm, rms_norm

__all__ = ["add_rms_norm", "rms_norm"]
