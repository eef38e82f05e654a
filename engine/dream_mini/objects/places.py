"""Plants and buildings."""

import math


def cactus(b):
    b.cone(0, -0.82, 0, 0.3, 0.42, 0.2, "brick", round=0.03)
    b.cone(0, -0.63, 0, 0.46, 0.46, 0.05, "brick", round=0.03)
    b.blend = 0.025
    b.limb((0, -0.65, 0), (0, 0.72, 0), b.u(0.22, 0.26), 0.2)
    for side, height in ((-1, b.u(-0.2, 0.1)), (1, b.u(0.0, 0.3))):
        b.path([(0, height, 0), (side * 0.46, height, 0), (side * 0.48, height + 0.42, 0)], [0.12, 0.13, 0.12])
    for k in range(18):
        turn, y = 2.39996 * k, -0.5 + 0.065 * k
        b.limb(
            (0.2 * math.cos(turn), y, 0.2 * math.sin(turn)),
            (0.3 * math.cos(turn), y + 0.03, 0.3 * math.sin(turn)),
            0.018,
            0.012,
            "cream",
        )
    if b.chance(0.5):
        for k in range(5):
            turn = 2 * math.pi * k / 5
            b.ball(0.1 * math.cos(turn), 0.95, 0.1 * math.sin(turn), 0.09, 0.07, 0.09, "pink")
        b.ball(0, 0.98, 0, 0.06, color="yellow")
    b.head = (0, 0.9, 0, 0.19)


def tree(b):
    b.limb((0, -0.95, 0), (0, -0.1, 0), 0.17, 0.12, "wood")
    b.limb((0, -0.4, 0), (0.3, 0.0, 0), 0.07, 0.05, "wood")
    b.blend = 0.035
    b.ball(0, 0.32, 0, 0.5, 0.46, 0.5)
    for k in range(8):
        turn = 2 * math.pi * k / 8 + b.u(0, 0.5)
        r = b.u(0.26, 0.34)
        b.ball(0.44 * math.cos(turn), 0.22 + b.u(-0.12, 0.35), 0.44 * math.sin(turn), r)
    if b.chance(0.35):
        for k in range(9):
            turn = 2.39996 * k
            b.ball(0.68 * math.cos(turn), 0.02 + 0.07 * k, 0.68 * math.sin(turn), 0.08, color="red")
    b.shelter = (0.52, -0.95, 0.05, 0.78)


def pine_tree(b):
    b.cone(0, -0.92, 0, 0.12, 0.1, 0.2, "wood")
    for k, y in enumerate((-0.5, -0.12, 0.24, 0.56)):
        r = b.u(0.64, 0.7) - 0.145 * k
        b.cone(0, y, 0, r, 0.02 if k == 3 else 0.1, 0.32, round=0.02)
    if b.chance(0.5):
        b.ball(0, 0.94, 0, 0.1, color="yellow")
        for k in range(12):
            turn, level = 2.39996 * k, k % 4
            out, y = 0.56 - 0.13 * level, -0.7 + 0.37 * level
            b.ball(out * math.cos(turn), y, out * math.sin(turn), 0.075, color=("red", "blue", "yellow")[k % 3])


def flower(b):
    b.limb((0, -1, 0), (0, 0.3, 0), 0.05, 0.05, "leaf")
    petals = int(b.u(5, 9))
    wide = 0.13 + 0.5 / petals
    for k in range(petals):
        turn = 2 * math.pi * k / petals
        x, y = 0.36 * math.cos(turn), 0.36 * math.sin(turn)
        b.ball(x, 0.4 + y, 0.07, 0.26, wide, 0.06, tilt=(0, 0, math.degrees(turn)))
    b.ball(0, 0.4, 0.1, 0.19, 0.19, 0.1, "yellow" if b.main[2] > 0.3 or b.main[1] < 0.6 else "patty")
    for side in (-1, 1):
        b.ball(side * 0.24, -0.5 + 0.1 * side, 0, 0.27, 0.045, 0.12, "leaf", tilt=(0, 0, side * 35))


def sunflower(b):
    b.limb((0, -1.1, 0), (0, 0.3, 0), 0.055, 0.05, "leaf")
    for level, (count, out, long) in enumerate(((15, 0.47, 0.24), (12, 0.42, 0.2))):
        for k in range(count):
            turn = 2 * math.pi * (k + 0.5 * level) / count
            b.ball(
                out * math.cos(turn),
                0.4 + out * math.sin(turn),
                0.05 + 0.05 * level,
                long,
                0.075,
                0.035,
                tilt=(0, 0, math.degrees(turn)),
            )
    b.ball(0, 0.4, 0.08, 0.31, 0.31, 0.1, "patty")
    b.ring(0, 0.4, 0.13, 0.2, 0.04, "wood", tilt=(90, 0, 0))
    b.ball(0, 0.4, -0.02, 0.26, 0.26, 0.07, "leaf")
    for side in (-1, 1):
        b.ball(side * 0.27, -0.5 + 0.12 * side, 0, 0.3, 0.045, 0.16, "leaf", tilt=(0, 0, side * 30))


def tulip(b):
    b.limb((0, -1.1, 0), (0, 0.15, 0), 0.05, 0.05, "leaf")
    b.blend = 0.015
    for k in range(6):
        turn = 2 * math.pi * k / 6
        x, z = math.sin(turn), math.cos(turn)
        b.limb((0.13 * x, 0.3, 0.13 * z), (0.24 * x, 0.78 + 0.06 * (k % 2), 0.24 * z), 0.19, 0.07)
    b.ball(0, 0.62, 0, 0.14, 0.16, 0.14, "yellow")
    for side in (-1, 1):
        b.path([(0, -0.95, 0), (side * 0.28, -0.55, 0.05), (side * 0.42, -0.02, 0.1)], [0.06, 0.1, 0.02], "leaf")


def palm_tree(b):
    points = [(0.0, -1.0, 0), (0.1, -0.5, 0), (0.12, 0.05, 0), (0.02, 0.55, 0)]
    b.path(points, [0.13, 0.1, 0.085, 0.08], "wood")
    for k in range(6):
        s = k / 6
        b.ring(0.04 + 0.1 * math.sin(2.2 * s), -0.85 + 0.22 * k, 0, 0.1 - 0.02 * s, 0.022, "patty")
    for k in range(8):
        turn = 2 * math.pi * k / 8
        x, z = math.cos(turn), math.sin(turn)
        b.path(
            [
                (0.02, 0.58, 0),
                (0.02 + 0.4 * x, 0.76, 0.4 * z),
                (0.02 + 0.75 * x, 0.5, 0.75 * z),
                (0.02 + 0.9 * x, 0.16, 0.9 * z),
            ],
            [0.09, 0.11, 0.09, 0.02],
        )
    for k in range(3):
        turn = 2 * math.pi * k / 3
        b.ball(0.02 + 0.14 * math.cos(turn), 0.46, 0.14 * math.sin(turn), 0.1, color="patty")
    b.shelter = (0.5, -1.0, 0.05, 1.1)


def _window(b, x, y, z, half, side=False):
    """A pane with a white frame and cross, on a front wall, or on a side wall."""
    w, d = (0.025, half) if side else (half, 0.025)
    b.box(x, y, z, w + (0 if side else 0.03), half + 0.03, d + (0.03 if side else 0), "white", round=0.01)
    b.box(x, y, z, w if not side else 0.035, half, d if side else 0.035, "glass", round=0)
    b.box(x, y, z, 0.018 if not side else 0.045, half, 0.045 if not side else 0.018, "white", round=0)
    b.box(x, y, z, w if not side else 0.045, 0.018, d if side else 0.045, "white", round=0)


def house(b):
    w, d, h = b.u(0.55, 0.66), b.u(0.5, 0.58), b.u(0.32, 0.38)
    roof = b.one_of("brick", "wood", "dark")
    b.box(0, -h, 0, w, h, d, round=0.01)
    rise = b.u(0.26, 0.32)
    b.box(0, rise * 0.94, 0, w * 0.94, rise * 0.94, d * 0.98, round=0.005, top=(0.02, 1))
    slope = math.degrees(math.atan2(2 * rise, w))
    length = math.hypot(w, 2 * rise) / 2 + 0.1
    for side in (-1, 1):
        b.box(
            side * (w / 2 + 0.05), rise - 0.03, 0, length, 0.045, d * 1.16, roof, round=0.01, tilt=(0, 0, -side * slope)
        )
    b.box(0, -2 * h - 0.02, 0, w * 1.08, 0.04, d * 1.08, "stone", round=0.01)
    b.box(0, -h - 0.1, d, 0.13, h - 0.1, 0.035, "wood", round=0.01)
    b.ball(0.08, -h - 0.1, d + 0.05, 0.03, color="yellow")
    b.box(0, -2 * h + 0.02, d + 0.12, 0.2, 0.035, 0.1, "stone", round=0.01)
    for side in (-1, 1):
        _window(b, side * 0.36, -h + 0.05, d, 0.105)
        _window(b, side * 0.3, -h + 0.05, -d, 0.105)
        _window(b, side * w, -h + 0.05, 0.0, 0.12, side=True)
    b.cone(0, rise * 0.7, d * 0.98, 0.1, 0.1, 0.025, "glass", tilt=(90, 0, 0))
    b.box(0.6 * w, rise + 0.14, -0.2, 0.09, 0.26, 0.09, "brick", round=0.01)
    b.box(0.6 * w, rise + 0.4, -0.2, 0.115, 0.035, 0.115, "stone", round=0.01)
    b.pole = (0, 2 * rise - 0.05, 0)


def lighthouse(b):
    b.cone(0, -0.98, 0, 0.6, 0.46, 0.09, "stone", round=0.03)
    for k in range(5):
        low, high = 0.36 - 0.035 * k, 0.325 - 0.035 * k
        b.cone(
            0,
            -0.76 + 0.27 * k,
            0,
            low,
            high,
            0.137,
            "main" if k % 2 == 0 else "white" if b.main.min() < 0.8 else "red",
            round=0,
        )
    b.cone(0, 0.5, 0, 0.29, 0.29, 0.035, "dark")
    for k in range(8):
        turn = 2 * math.pi * k / 8
        b.limb(
            (0.26 * math.cos(turn), 0.53, 0.26 * math.sin(turn)),
            (0.26 * math.cos(turn), 0.64, 0.26 * math.sin(turn)),
            0.018,
            0.018,
            "dark",
        )
    b.ring(0, 0.65, 0, 0.26, 0.018, "dark")
    b.cone(0, 0.66, 0, 0.15, 0.15, 0.14, "yellow")
    b.cone(0, 0.9, 0, 0.23, 0.02, 0.12, round=0.02)
    b.ball(0, 1.04, 0, 0.045, color="dark")
    b.box(0, -0.8, 0.34, 0.1, 0.15, 0.05, "wood", round=0.02)
    for y in (-0.35, 0.1):
        b.box(0, y, 0.29 - 0.12 * (y + 0.35), 0.055, 0.075, 0.05, "dark", round=0.02)


def castle(b):
    b.box(0, -0.4, 0, 0.55, 0.34, 0.5, round=0.01)
    roof = b.one_of("red", "blue", "purple", "brick")
    tall = b.u(0.46, 0.54)
    for sx in (-1, 1):
        for sz in (-1, 1):
            b.cone(sx * 0.56, tall - 0.74, sz * 0.5, 0.2, 0.19, tall, round=0.01)
            b.cone(sx * 0.56, 2 * tall - 0.74, sz * 0.5, 0.235, 0.235, 0.05, round=0.01)
            b.cone(sx * 0.56, 2 * tall - 0.47, sz * 0.5, 0.26, 0.015, 0.23, roof, round=0.01)
            b.box(sx * 0.56, tall - 0.4, sz * 0.68, 0.035, 0.09, 0.03, "dark", round=0.01)
    b.box(0, 0.12, -0.05, 0.27, 0.36, 0.25, round=0.01)
    b.cone(0, 0.7, -0.05, 0.36, 0.02, 0.24, roof, round=0.01)
    b.box(0, 0.22, 0.2, 0.05, 0.1, 0.02, "dark", round=0.01)
    b.box(0, -0.52, 0.5, 0.15, 0.2, 0.04, "wood", round=0.01)
    b.cone(0, -0.33, 0.5, 0.15, 0.15, 0.04, "wood", tilt=(90, 0, 0))
    for k in range(3):
        b.box(-0.1 + 0.1 * k, -0.46, 0.545, 0.012, 0.24, 0.01, "dark", round=0)
    for x in (-0.28, -0.14, 0.0, 0.14, 0.28):
        for z in (-0.46, 0.46):
            b.box(x, -0.02, z, 0.045, 0.06, 0.04, round=0.005)
        b.box(0.51, -0.02, x, 0.04, 0.06, 0.045, round=0.005)
        b.box(-0.51, -0.02, x, 0.04, 0.06, 0.045, round=0.005)
    b.pole = (0, 0.92, -0.05)


def windmill(b):
    b.cone(0, -0.3, 0, 0.44, 0.27, 0.62, round=0.02)
    b.cone(0, 0.48, 0, 0.33, 0.03, 0.2, b.one_of("brick", "wood", "dark"), round=0.02)
    b.limb((0, 0.3, 0.1), (0, 0.3, 0.46), 0.06, 0.06, "wood")
    b.ball(0, 0.3, 0.48, 0.09, color="dark")
    start = b.u(0, 90)
    for k in range(4):
        degrees = start + 90 * k
        x, y = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        b.limb((0, 0.3, 0.42), (0.85 * x, 0.3 + 0.85 * y, 0.42), 0.035, 0.025, "wood")
        b.box(
            0.5 * x - 0.09 * y,
            0.3 + 0.5 * y + 0.09 * x,
            0.41,
            0.32,
            0.09,
            0.015,
            "cream",
            round=0.005,
            tilt=(0, 0, degrees),
        )
    b.box(0, -0.72, 0.42, 0.12, 0.2, 0.04, "wood", round=0.02)
    b.box(0, -0.2, 0.36, 0.08, 0.1, 0.03, "glass", round=0.01, tilt=(-8, 0, 0))
    b.cone(0, -0.94, 0, 0.52, 0.5, 0.04, "stone", round=0.02)


def tent(b):
    """A ridge tent, open to the front."""
    b.box(0, 0, 0, 0.75, 0.6, 0.8, round=0.01, top=(0.02, 1))
    b.box(0, -0.1, 0.85, 0.38, 0.46, 0.25, "dark", round=0.0, top=(0.02, 1), cut=True)
    b.box(0, -0.1, 0.62, 0.37, 0.45, 0.03, "dark", round=0.0, top=(0.02, 1))
    for side in (-1, 1):
        b.box(side * 0.3, -0.15, 0.82, 0.16, 0.43, 0.02, "cream", round=0.01, top=(0.2, 1), tilt=(0, 0, side * 20))
        for z in (-0.8, 0.8):
            b.limb((side * 0.02, 0.56, z), (side * 0.98, -0.56, z + 0.25 * (1 if z > 0 else -1)), 0.016, 0.016, "straw")
            b.limb(
                (side * 0.98, -0.62, z + 0.25 * (1 if z > 0 else -1)),
                (side * 1.0, -0.48, z + 0.27 * (1 if z > 0 else -1)),
                0.03,
                0.03,
                "wood",
            )
    b.limb((0, 0.5, -0.82), (0, 0.66, -0.82), 0.03, 0.03, "wood")
    b.limb((0, 0.5, 0.82), (0, 0.66, 0.82), 0.03, 0.03, "wood")
    b.pole = (0, 0.58, 0)


def igloo(b):
    b.ball(0, -0.35, -0.1, 0.8, 0.78, 0.8)
    b.limb((0, -0.3, 0.4), (0, -0.3, 0.85), 0.36, 0.36)
    b.box(0, -0.85, 0, 1.5, 0.4, 1.5, "dark", cut=True)
    b.ball(0, -0.36, 1.2, 0.25, 0.27, 0.2, "dark")
    b.cone(0, -0.47, 0.1, 0.95, 0.92, 0.03, "glass", round=0.02)
    joint = "steel" if b.main.mean() > 0.6 else "white"
    for k, y in enumerate((-0.22, 0.0, 0.2)):
        r = math.sqrt(0.8**2 - (y + 0.35) ** 2 * (0.8 / 0.78) ** 2)
        b.ring(0, y, -0.1, r - 0.004, 0.018, joint)
        for j in range(9 - 2 * k):
            turn = 2 * math.pi * (j + 0.5 * (k % 2)) / (9 - 2 * k)
            low = math.sqrt(max(0.0, 0.8**2 - (y + 0.15) ** 2))
            b.limb(
                (r * math.sin(turn), y, -0.1 + r * math.cos(turn)),
                (0.98 * low * math.sin(turn) * 0.96, y - 0.19, -0.1 + 0.98 * low * math.cos(turn)),
                0.016,
                0.016,
                joint,
            )
    b.pole = (0, 0.42, -0.1)


RECIPES = (
    cactus, tree, pine_tree, flower, sunflower, tulip, palm_tree, house, lighthouse, castle, windmill, tent, igloo,
)  # fmt: skip
