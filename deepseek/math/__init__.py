"""``ds.math``: elementwise functions under the names the source documents use."""

from torch import cos, erf, exp, log, relu, rsqrt, sigmoid, sin, softmax, sqrt, tanh
from torch.nn.functional import gelu, silu, softplus

__all__ = [
    "cos", "erf", "exp", "gelu", "log", "relu", "rsqrt", "sigmoid", "silu", "sin", "softmax", "softplus", "sqrt",
    "tanh",
]  # fmt: skip
