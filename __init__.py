"""dream-fast: a 3D object from a prompt, by score distillation."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dream_fast.engine.guidance.distillation import Distillation as Distillation

__version__ = "0.4.0"


def __getattr__(name: str) -> Any:
    """Load `Distillation` when it is used, so that `import dream_fast` stays quick."""
    if name != "Distillation":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dream_fast.engine.guidance.distillation import Distillation

    return Distillation
