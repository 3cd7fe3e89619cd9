"""Number formats: which are used where, and how that is decided."""

from deepseek.precision.masters import lower
from deepseek.precision.policy import Policy, choose, matmul_flops

__all__ = ["Policy", "choose", "lower", "matmul_flops"]
