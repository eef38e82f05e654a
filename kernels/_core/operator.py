"""Custom operators that torch.compile takes, and that cost an eager call nothing.

A call of `torch.library.custom_op` takes 165 us on an H200's host, more than most kernels do: it passes through torch's
dispatcher and Python several times. Where nothing traces the call and every tensor holds data, `Operator` calls the
function itself, or a `torch.autograd.Function` of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn import Parameter

# Not public: where torch lacks one of them, every call goes through the custom operator.
_count_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", None)
_transforms_active = getattr(torch._C, "_are_functorch_transforms_active", None)

# Types of arguments that hold data: no subclass, such as a fake tensor, and no symbolic number.
_PLAIN = frozenset({Tensor, Parameter, NoneType, bool, int, float, str, list, tuple})


def _is_traced() -> bool:
    """True where a compiler, a dispatch mode or a transform of `torch.func` must see the operator."""
    if torch.compiler.is_compiling() or _count_dispatch_modes is None or _transforms_active is None:
        return True
    return bool(_count_dispatch_modes() or _transforms_active())


class _Function(torch.autograd.Function):
    @classmethod
    def apply(cls, *arguments: Any) -> Any:
        """As `Function.apply`, without its preparations for transforms of torch.func, under which nothing gets here."""
        return super(torch.autograd.Function, cls).apply(*arguments)  # type: ignore[misc]  # of its base in C++


class Operator:
    """A function of tensors as an operator of torch; made by `operator`.

    custom: the operator that compilers see, `torch.ops.<name>`.
    """

    def __init__(self, name: str, function: Callable[..., Any], mutates: Sequence[str]) -> None:
        self.custom = torch.library.custom_op(name, function, mutates_args=mutates)
        self.register_fake = self.custom.register_fake
        self._function = function
        self._with_gradient: Callable[..., Any] | None = None
        self._mutated = [
            number for number, argument in enumerate(signature(function).parameters) if argument in mutates
        ]

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """Set the gradient, as for `torch.library.custom_op`."""
        self.custom.register_autograd(backward, setup_context=setup_context)
        function = self._function

        def forward(ctx, *inputs):
            output = function(*inputs)
            setup_context(ctx, inputs, output)
            return output

        members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        with_gradient: Any = type(function.__name__, (_Function,), members)
        self._with_gradient = with_gradient.apply

    def __call__(self, *arguments: Any) -> Any:
        if _is_traced() or not _PLAIN.issuperset(map(type, arguments)):
            return self.custom(*arguments)
        if torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in arguments):
            # Without a gradient of its own, the custom operator raises in the backward.
            return (self._with_gradient or self.custom)(*arguments)
        results = self._function(*arguments)
        for number in self._mutated:
            increment_version(arguments[number])
        return results


def operator(name: str, mutates: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Operator]:
    """Make an operator `name` ("dream_fast::composite") of a function; mutates: names of arguments that it changes."""
    return lambda function: Operator(name, function, mutates)
