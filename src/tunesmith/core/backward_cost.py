"""What the backward pass costs, parameter by parameter, read off one traced forward pass.

Two FLOPs per multiply-add. In the backward pass a product costs as much as forward for each of its two operands that a
gradient goes to; what else reads a parameter (a bias, a normalisation, a look-up) costs a multiply-add per number of
its output for each, as in GreenTrainer; softmax, activations, residuals and the like count nothing. An operand gets a
gradient if one of the parameters that it was computed from trains, which the trace knows of every tensor: so `exact` is
what autograd will do, whatever the model.

For a choice among many sets that is too much to ask. Parameters are put in the order in which they are first read, and
the cost of an operand's gradient is laid on the last parameter that it was computed from:

    cost(S) <= bound(S) = sum over k in S of own_k  +  sum over k >= min(S) of passing_k

with equality where the model is a chain; beside each other stand only q, k and v, gate and up, the two stacks of an
encoder-decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import conv_flop_count

_ATTENTION = {
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_cudnn_attention",
}


@dataclass
class BackwardCosts:
    """FLOPs of training a model on the batches of a trace.

    Attributes:
        names: The parameters that were read, in the order in which they were first.
        own: Of the gradient of each.
        passing: Of bringing the gradient to each one's output from the next one's.
        forward: Of the forward pass.
        products: The same as `own` and `passing` without loss: `{bits of parameters: FLOPs if one of them trains}` of
            the products.
        others: Of all else that counts.
    """

    names: list[str] = field(default_factory=list)
    own: list[int] = field(default_factory=list)
    passing: list[int] = field(default_factory=list)
    forward: int = 0
    products: dict[int, int] = field(default_factory=dict)
    others: dict[int, int] = field(default_factory=dict)

    @property
    def full(self) -> int:
        """Of the backward pass if all parameters train."""
        return sum(self.own) + sum(self.passing)

    def bound(self, trained: Collection[str]) -> int:
        """Of the backward pass if these train: never below `exact`."""
        at = [i for i, name in enumerate(self.names) if name in trained]
        return sum(self.own[i] for i in at) + sum(self.passing[min(at) :]) if at else 0

    def exact(self, trained: Collection[str], *, products_only: bool = False) -> int:
        """Of the backward pass if these train; `products_only` is what `core.meters.flops` counts."""
        bits = sum(1 << i for i, name in enumerate(self.names) if name in trained)
        counted = [self.products] if products_only else [self.products, self.others]
        return sum(cost for parts in counted for which, cost in parts.items() if which & bits)


def trace(run: Callable[[], Any], parameters: Mapping[str, nn.Parameter]) -> BackwardCosts:
    """The costs of training these parameters on what `run` computes.

    Args:
        run: A forward pass, or several; without gradients, since a backward pass in it would be traced as well.
        parameters: That may train, by name; no others count.
    """
    tracer = _Tracer(parameters)
    with tracer:
        run()
    costs = tracer.costs
    costs.own, costs.passing = [0] * len(costs.names), [0] * len(costs.names)
    for parts in (costs.products, costs.others):
        for bits, flops in parts.items():
            alone = bits.bit_count() == 1
            (costs.own if alone else costs.passing)[bits.bit_length() - 1] += flops
    return costs


class _Tracer(TorchDispatchMode):
    """Follows which parameters each storage was computed from, and counts operations."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.costs = BackwardCosts()
        self.unread = {_key(p): name for name, p in parameters.items()}
        # A weak reference keeps a storage's address from being given out again, but not its memory.
        self.origins: dict[int, tuple[StorageWeakRef, int]] = {}
        # Storages of a parameter, its cast or its scaling: what reads one of them reads the parameter.
        self.plain: set[int] = set()
        self.used = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:
            out = func.decompose(*args, **kwargs)  # in inference mode what is made of other operations arrives whole
        if out is not NotImplemented:
            return out
        out = func(*args, **kwargs)
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if outputs:
            self._count(func.overloadpacket.__name__, args, inputs, outputs[0])
            self._follow(inputs, outputs)
        return out

    def _count(self, name: str, args: Any, inputs: Sequence[Tensor], out: Tensor) -> None:
        products = list(_products(name, args, inputs, out))
        for operands, flops in products:
            self._add(self.costs.products, operands, flops)
        self.costs.forward += sum(flops for _, flops in products) // 2
        if products:
            added = {"addmm": 0, "baddbmm": 0, "convolution": 2}.get(name)
            inputs = [] if added is None or args[added] is None else [args[added]]
        reads = any(self._of(t) and _key(t) in self.plain for t in inputs)
        if reads and (products or len(inputs) > 1):
            for t in inputs:
                self._add(self.costs.others, [t], 2 * out.numel())
            self.costs.forward += 2 * out.numel()

    def _add(self, where: dict[int, int], operands: Sequence[Tensor], flops: int) -> None:
        origin = 0
        for t in operands:
            origin |= self._of(t)
        if not origin:
            return
        where[origin] = where.get(origin, 0) + flops
        if len(operands) == 1 and _key(operands[0]) in self.plain:
            if origin & self.used:  # read again: the two gradients are added
                self.costs.others[origin] = self.costs.others.get(origin, 0) + 2 * operands[0].numel()
            self.used |= origin

    def _follow(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        origin, alone = 0, {_key(t) for t in inputs}
        for t in inputs:
            origin |= self._of(t)
        for t in outputs:
            if t.is_floating_point():
                key = _key(t)
                self.origins[key] = (StorageWeakRef(t.untyped_storage()), origin)
                if len(alone) == 1 and alone <= self.plain:
                    self.plain.add(key)

    def _of(self, t: Tensor) -> int:
        """The parameters that a tensor was computed from, as bits; one that is met for the first time gets the next."""
        key = _key(t)
        if not t.is_floating_point():
            return 0
        if key in self.unread:
            self.origins[key] = (StorageWeakRef(t.untyped_storage()), 1 << len(self.costs.names))
            self.plain.add(key)
            self.costs.names.append(self.unread.pop(key))
        return self.origins[key][1] if key in self.origins else 0


def _key(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _products(name: str, args: Any, inputs: Sequence[Tensor], out: Tensor) -> Iterator[tuple[list[Tensor], int]]:
    """The gradients that a product needs: where each goes to and its FLOPs; nothing for any other operation."""
    if name in ("mm", "bmm", "mv", "dot", "addmm", "baddbmm"):
        a, b = args[1:3] if name.startswith(("addmm", "baddbmm")) else args[:2]
        flops = 2 * out.numel() * a.shape[-1]
        yield from (([a], flops), ([b], flops))
    elif name == "convolution":
        x, w, transposed = args[0], args[1], args[6]
        flops = conv_flop_count(list(x.shape), list(w.shape), list(out.shape), transposed=transposed)
        yield from (([x], flops), ([w], flops))
    elif name in _ATTENTION:
        q, k, v = args[:3]
        pairs = q.shape[:-1].numel() * k.shape[-2]
        scores, mixed = 2 * pairs * q.shape[-1], 2 * pairs * v.shape[-1]
        weighed = [t for t in inputs if t is not v]  # a bias on the scores as well
        yield from (([q], scores), ([k], scores), ([v], mixed), (weighed, mixed))
