"""Seeds: drawn for a run, derived for each step, and set in libraries."""

import os
import random

import numpy as np
import torch


def step_seed(seed: int, step: int) -> int:
    """Derive the seed of a step: a 63-bit mix (splitmix64) of the run's seed and the number of the step.

    Every step reseeds its generators, so a resumed run draws what the uninterrupted run would have drawn, without a
    saved generator state.
    """
    mask = (1 << 64) - 1
    z = (seed * 0x9E3779B97F4A7C15 + (step + 1) * 0xD1B54A32D192ED03) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) >> 1


def seed_libraries(seed: int) -> None:
    """Seed the global generators of torch, numpy and Python, from which a library may draw.

    Of torch only those of the CPU and of a GPU in use: torch.manual_seed also seeds other kinds of devices and records
    its caller, which takes 0.14 ms of every step.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)
    np.random.seed(seed % (1 << 32))
    random.seed(seed)


def draw_seed() -> int:
    """Draw a seed for a run without --seed: small enough to type."""
    return int.from_bytes(os.urandom(4), "little") >> 1
