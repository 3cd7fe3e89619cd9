"""What our compiler passes do to a graph, beyond what TorchInductor does by itself (F06).

* **Projections of one input become one.** ``q, k, v = x Wq, x Wk, x Wv`` (gate and up, likewise) run as one matrix
  product over the concatenated weights: fewer launches, fuller waves, and backward has one product for the input's
  gradient instead of three and two sums. Done before differentiation, so training has it, too. Left alone when there
  are fewer rows than input features: copying the weights would cost more than it saves.
* **Bias, activation and matrix product become one** where cuBLASLt has the epilogue: ``relu``, and ``gelu`` in its
  tanh form, in inference (training keeps the sum before the activation).

Folding a norm's weight into the next matrix is not here: Inductor already fuses the multiplication into the norm's
kernel, so nothing is saved. Folding the norm's 1/rms past the product would save one write and one read of ``x``, and
cost them again on the wider result unless the product has a row-scaling epilogue.

Everything private of torch that this needs is in this file. Without it, ``options`` is empty and ``ds.jit`` is
``torch.compile``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

LINEAR = (F.linear, torch._C._nn.linear)
EPILOGUES = ("cuda",)  #: devices whose matrix product has an activation built in
AUTOCAST = (torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast)


class Pass:
    """A pass of TorchInductor whose identity is this file, so that compiled graphs can be cached.

    It lies at the top of a module, and is made known to torch only when asked for: torch pickles it into the key of
    its cache, and importing torch's compiler takes a second.
    """

    def __init__(self, change: Callable[[fx.Graph], None]) -> None:
        self.change = change

    def __call__(self, graph: fx.Graph) -> None:
        self.change(graph)

    def uuid(self) -> bytes:
        from torch._inductor.custom_graph_pass import get_hash_for_files

        return get_hash_for_files((__file__,), self.change.__name__)


def options(patterns: bool = True) -> dict[str, Any]:
    """Options of TorchInductor that switch our passes on; empty where torch lacks the hooks."""
    try:
        from torch._inductor import config
        from torch._inductor.custom_graph_pass import CustomGraphPass
    except ImportError:  # pragma: no cover - a torch without these private names
        return {}
    CustomGraphPass.register(Pass)
    passes = {"pre_grad_custom_pass": merge_linears, "post_grad_custom_pre_pass": fuse_activations}
    return {name: Pass(change) for name, change in passes.items() if patterns and hasattr(config, name)}


def merge_linears(graph: fx.Graph) -> None:
    """Replace linear layers of the same input by one over the concatenated weights (in place)."""
    groups: dict[tuple[fx.Node, int, bool], list[fx.Node]] = defaultdict(list)
    region = 0  # linear layers in different autocast regions compute in different formats
    for node in graph.nodes:
        region += node.op == "call_function" and node.target in AUTOCAST
        if node.op == "call_function" and node.target in LINEAR and _plain(node):
            x, _, bias = _operands(node)
            groups[x, region, bias is not None].append(node)
    for nodes in groups.values():
        if len(nodes) > 1 and _pays(nodes):
            _merge(graph, nodes)
    graph.lint()


def _operands(node: fx.Node) -> tuple[Any, Any, Any]:
    """Input, weight, bias of a linear layer."""
    names = dict(zip(("input", "weight", "bias"), node.args))
    given = {**names, **node.kwargs}
    return given.get("input"), given.get("weight"), given.get("bias")


def _plain(node: fx.Node) -> bool:
    """Whether weight and bias are there from the start: nothing between could have changed them."""
    x, *weights = _operands(node)
    known = [w for w in weights if w is not None]
    return isinstance(x, fx.Node) and all(
        isinstance(w, fx.Node) and w.op in ("placeholder", "get_attr") and _value(w) is not None
        for w in known
    )


def _value(node: fx.Node) -> Tensor | None:
    value = node.meta.get("example_value", node.meta.get("val"))
    return value if isinstance(value, Tensor) else None


def _pays(nodes: list[fx.Node]) -> bool:
    """As many rows as input features, weights of one format, sizes known."""
    x = _value(_operands(nodes[0])[0])
    weights = [_value(_operands(n)[1]) for n in nodes]
    if x is None or any(w is None or w.dtype != weights[0].dtype for w in weights):  # type: ignore[union-attr]
        return False
    rows, features = x.numel() // x.shape[-1], x.shape[-1]
    return isinstance(rows, int) and rows >= features


def _merge(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    first = nodes[0]
    parts = [_operands(n) for n in nodes]
    sizes = [weight.meta["example_value"].shape[0] for _, weight, _ in parts]
    with graph.inserting_before(first):
        weight = graph.call_function(torch.cat, ([w for _, w, _ in parts],))
        bias = (
            graph.call_function(torch.cat, ([b for _, _, b in parts],)) if parts[0][2] is not None else None
        )
        whole = graph.call_function(F.linear, (parts[0][0], weight, bias))
        split = graph.call_function(torch.split, (whole, sizes), {"dim": -1})
        for place, node in enumerate(nodes):
            part = graph.call_function(_getitem, (split, place))
            part.meta.update(node.meta)
            node.replace_all_uses_with(part)
    for node in nodes:
        graph.erase_node(node)


def _getitem(parts: Any, place: int) -> Tensor:
    return parts[place]


def fuse_activations(graph: fx.Graph) -> None:
    """Replace ``addmm`` and the activation after it by one operation with an epilogue (in place)."""
    patterns = _activation_patterns()
    if patterns is not None:
        patterns.apply(graph)


@cache
def _activation_patterns() -> Any:
    try:
        from torch._inductor.pattern_matcher import PatternMatcherPass, fwd_only, register_replacement
    except ImportError:  # pragma: no cover
        return None

    def relu(bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return F.relu(torch.addmm(bias, x, weight))

    def relu_fused(bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return torch.ops.aten._addmm_activation(bias, x, weight, use_gelu=False)

    def gelu(bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return F.gelu(torch.addmm(bias, x, weight), approximate="tanh")

    def gelu_fused(bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return torch.ops.aten._addmm_activation(bias, x, weight, use_gelu=True)

    patterns = PatternMatcherPass()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        inputs = [torch.empty(s, dtype=dtype) for s in ((4,), (2, 3), (3, 4))]
        register_replacement(gelu, gelu_fused, inputs, fwd_only, patterns, extra_check=_has_epilogue)
    register_replacement(relu, relu_fused, inputs, fwd_only, patterns, extra_check=_has_epilogue)
    return patterns


def _has_epilogue(match: Any) -> bool:
    """Off a GPU the operation is two steps again, and its gelu another one (erf)."""
    value = match.kwargs["x"].meta.get("val")
    return isinstance(value, Tensor) and value.device.type in EPILOGUES
