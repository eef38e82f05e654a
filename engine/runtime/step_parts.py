"""Parts of a step, marked by the code of the step so that a benchmark can time them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

PARTS = ("render", "encode", "unet", "backward", "optimiser")  # in their order; "start" is marked before the first

_hooks: list[Callable[[str], None]] = []


def end_part(name: str) -> None:
    """Mark the end of a part of a step. Marks inside a CUDA graph are made when it is captured."""
    for hook in _hooks:
        hook(name)


@contextmanager
def on_part_end(hook: Callable[[str], None]) -> Iterator[None]:
    """Inside the `with` block, call `hook` with the name of each part that ends."""
    _hooks.append(hook)
    try:
        yield
    finally:
        _hooks.remove(hook)
