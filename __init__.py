"""dream-fast: a 3D object from a prompt, by score distillation."""

__version__ = "0.4.0"
