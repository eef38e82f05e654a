"""Parts that a thing can wear or carry, in any colour: they go to the anchors that its recipe names."""

import math

from dream_fast.engine.dream_mini.scenes import Builder

PARTS = ("hat", "crown", "scarf", "bow", "glasses", "backpack", "flag")
_ANCHORS = {
    "hat": "head",
    "crown": "head",
    "bow": "head",
    "scarf": "neck",
    "glasses": "gaze",
    "backpack": "back",
    "flag": "pole",
}


def can_have(builder: Builder, part: str) -> bool:
    """True: the thing has the anchor that a part needs."""
    return getattr(builder, _ANCHORS[part]) is not None


def add_part(builder: Builder, part: str, color: str) -> None:
    """Add a part in a colour of the catalogue.

    Raises ValueError: when the thing has no place for it.
    """
    anchor = getattr(builder, _ANCHORS[part])
    if anchor is None:
        raise ValueError(f"it has no place for a {part}")
    globals()[f"_{part}"](builder, color, *anchor)


def _hat(b, color, x, y, z, r):
    b.cone(x, y, z, 1.3 * r, 1.3 * r, 0.07 * r, color, round=0.05 * r)
    b.cone(x, y + 0.5 * r, z, 0.8 * r, 0.72 * r, 0.5 * r, color, round=0.06 * r)


def _crown(b, color, x, y, z, r):
    b.cone(x, y + 0.16 * r, z, 0.82 * r, 0.9 * r, 0.26 * r, color, round=0.03 * r)
    for k in range(7):
        turn = 2 * math.pi * k / 7 + math.pi / 2
        b.limb(
            (x + 0.72 * r * math.cos(turn), y + 0.3 * r, z + 0.72 * r * math.sin(turn)),
            (x + 0.84 * r * math.cos(turn), y + 0.85 * r, z + 0.84 * r * math.sin(turn)), 0.2 * r, 0.06 * r, color,
        )  # fmt: skip


def _bow(b, color, x, y, z, r):
    y = y - 0.02 * r
    for side in (-1, 1):
        b.cone(
            x + side * 0.55 * r,
            y + 0.2 * r,
            z + 0.25 * r,
            0.14 * r,
            0.5 * r,
            0.42 * r,
            color,
            round=0.12 * r,
            tilt=(0, 0, -side * 90),
        )
    b.ball(x, y + 0.2 * r, z + 0.3 * r, 0.24 * r, color=color)


def _scarf(b, color, x, y, z, r, lean):
    thick = 0.26 * r
    b.ring(x, y, z, r, thick, color, tilt=(lean, 0, 0))
    drop = y - 0.25 * r - 0.4 * r * math.sin(math.radians(lean))
    front = z + (r + 0.12 * r) * math.cos(math.radians(lean))
    b.box(
        x + 0.45 * r,
        drop - 0.5 * r,
        front - 0.06 * r,
        0.24 * r,
        0.6 * r,
        0.11 * r,
        color,
        round=0.08 * r,
        tilt=(-6, 0, 6),
    )


def _glasses(b, color, y, z, dx, r):
    ring = min(1.25 * r, 0.98 * dx)
    for side in (-1, 1):
        b.ring(side * dx, y, z + 0.45 * r, ring, 0.3 * r, color, tilt=(90, 0, 0))
        b.limb(
            (side * (dx + ring), y, z + 0.35 * r), (side * (dx + 1.25 * ring), y, z - 1.9 * r), 0.2 * r, 0.2 * r, color
        )
    if dx - ring > 0.1 * r:
        b.limb((ring - dx, y, z + 0.45 * r), (dx - ring, y, z + 0.45 * r), 0.22 * r, 0.22 * r, color)


def _backpack(b, color, x, y, z, half):
    b.box(x, y, z - 0.35 * half, 0.8 * half, 0.95 * half, 0.45 * half, color, round=0.22 * half)
    b.box(x, y - 0.3 * half, z - 0.82 * half, 0.55 * half, 0.45 * half, 0.14 * half, color, round=0.1 * half)
    b.limb(
        (x - 0.5 * half, y + 0.25 * half, z - 0.82 * half),
        (x + 0.5 * half, y + 0.25 * half, z - 0.82 * half),
        0.07 * half,
        0.07 * half,
        "dark",
    )
    for side in (-1, 1):
        b.arc(
            x + side * 0.62 * half, y + 0.1 * half, z + 0.5 * half, 0.85 * half, 0.12 * half, 95, color, tilt=(0, 90, 0)
        )


def _flag(b, color, x, y, z):
    b.limb((x, y - 0.05, z), (x, y + 0.62, z), 0.03, 0.025, "wood")
    b.box(x + 0.24, y + 0.46, z, 0.23, 0.15, 0.02, color, round=0.01)
