"""The shape of a hash grid: levels, features, entries and resolutions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache


@dataclass(frozen=True, kw_only=True)
class HashGridSpec:
    """Shape of a hash grid.

    levels, features: L and F. log2_entries: a level has at most 2^log2_entries rows. base_resolution, max_resolution:
    vertices a side of the first and of the last level. interpolation: "smoothstep" or "linear".
    Raises ValueError: for a number out of range or an unknown interpolation.
    """

    levels: int = 16
    features: int = 2
    log2_entries: int = 19
    base_resolution: int = 16
    max_resolution: int = 2048
    interpolation: str = "smoothstep"

    def __post_init__(self) -> None:
        if self.levels < 1:
            raise ValueError(f"levels must be at least 1, got {self.levels}")
        if self.features < 1:
            raise ValueError(f"features must be at least 1, got {self.features}")
        if not 3 <= self.log2_entries <= 28:
            raise ValueError(f"log2_entries must be from 3 to 28, got {self.log2_entries}")
        if self.base_resolution < 2:
            raise ValueError(f"base_resolution must be at least 2, got {self.base_resolution}")
        if self.max_resolution < self.base_resolution:
            raise ValueError(
                f"max_resolution must be at least base_resolution = {self.base_resolution}, got {self.max_resolution}"
            )
        if self.interpolation not in ("smoothstep", "linear"):
            raise ValueError(f'interpolation must be "smoothstep" or "linear", got "{self.interpolation}"')

    @cached_property
    def resolutions(self) -> tuple[int, ...]:
        """Vertices a side, a level each."""
        growth = math.log(self.max_resolution / self.base_resolution) / max(self.levels - 1, 1)
        # The small number keeps an integer resolution from being rounded up to the next.
        return tuple(math.ceil(self.base_resolution * math.exp(growth * level) - 1e-6) for level in range(self.levels))

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """First row of each level, then the total: levels + 1 numbers, all multiples of 8."""
        offsets = [0]
        for resolution in self.resolutions:
            offsets.append(offsets[-1] + min(1 << self.log2_entries, math.ceil(resolution**3 / 8) * 8))
        return tuple(offsets)

    @property
    def rows(self) -> int:
        """Rows of the table."""
        return self.offsets[-1]

    @property
    def channels(self) -> int:
        """Features of a point: levels * features."""
        return self.levels * self.features

    def dense(self, level: int) -> bool:
        """True where every vertex of the level has a row of its own."""
        return self.resolutions[level] ** 3 <= 1 << self.log2_entries


def encode_spec(spec: HashGridSpec) -> list[int]:
    """Numbers of a spec, as a custom operator takes it: its schema knows lists of numbers and no classes."""
    smooth = int(spec.interpolation == "smoothstep")
    return [spec.levels, spec.features, spec.log2_entries, spec.base_resolution, spec.max_resolution, smooth]


def decode_spec(numbers: Sequence[int]) -> HashGridSpec:
    """The spec that `encode_spec` gave these numbers for."""
    return _decode(*numbers)


@lru_cache(maxsize=64)
def _decode(levels: int, features: int, log2_entries: int, base: int, largest: int, smooth: int) -> HashGridSpec:
    return HashGridSpec(
        levels=levels,
        features=features,
        log2_entries=log2_entries,
        base_resolution=base,
        max_resolution=largest,
        interpolation="smoothstep" if smooth else "linear",
    )
