"""Plants, buildings and vehicles; vehicles drive towards +z."""

import math


def cactus(b):
    b.cone(0, -0.85, 0, 0.3, 0.4, 0.2, "brick", round=0.02)
    b.limb((0, -0.75, 0), (0, 0.75, 0), b.u(0.2, 0.25), 0.2)
    b.ball(0, 0.74, 0, 0.21)
    for side, height in ((-1, b.u(-0.2, 0.1)), (1, b.u(0.0, 0.3))):
        b.limb((0, height, 0), (side * 0.48, height, 0), 0.12, 0.12)
        b.limb((side * 0.48, height - 0.06, 0), (side * 0.48, height + 0.42, 0), 0.13, 0.12)
    if b.u(0, 1) < 0.5:
        b.ball(0, 0.95, 0, 0.12, 0.08, 0.12, "pink")


def tree(b):
    b.cone(0, -0.6, 0, 0.17, 0.12, 0.42, "wood")
    b.ball(0, 0.25, 0, 0.55, 0.5, 0.55)
    for k in range(6):
        turn = 2 * math.pi * k / 6 + b.u(0, 0.6)
        r = b.u(0.28, 0.38)
        b.ball(0.4 * math.cos(turn), 0.2 + b.u(-0.15, 0.35), 0.4 * math.sin(turn), r)


def pine_tree(b):
    b.cone(0, -0.9, 0, 0.12, 0.12, 0.2, "wood")
    for k, y in enumerate((-0.45, 0.0, 0.42)):
        r = b.u(0.62, 0.7) - 0.15 * k
        b.cone(0, y, 0, r, 0.1 if k < 2 else 0.02, 0.34)
    if b.u(0, 1) < 0.5:
        b.ball(0, 0.82, 0, 0.1, color="yellow")
        for k in range(8):
            turn, level = 2.4 * k, k % 3
            out, y = 0.5 - 0.13 * level, -0.62 + 0.45 * level
            b.ball(out * math.cos(turn), y, out * math.sin(turn), 0.07, color=("red", "blue", "yellow")[k % 3])


def flower(b):
    b.limb((0, -1, 0), (0, 0.25, 0), 0.05, 0.05, "leaf")
    petals = int(b.u(5, 9))
    for k in range(petals):
        turn = 2 * math.pi * k / petals
        x, y = 0.36 * math.cos(turn), 0.36 * math.sin(turn)
        b.ball(x, 0.35 + y, 0.06, 0.25, 0.15, 0.07, tilt=(0, 0, math.degrees(turn)))
    b.ball(0, 0.35, 0.1, 0.2, 0.2, 0.1, "yellow" if b.main[2] > 0.3 or b.main[1] < 0.6 else "brown")
    for side in (-1, 1):
        b.ball(side * 0.22, -0.55, 0, 0.24, 0.05, 0.1, "leaf", tilt=(0, 0, side * 35))


def house(b):
    w, d, h = b.u(0.55, 0.68), b.u(0.5, 0.6), b.u(0.32, 0.4)
    roof = ("brick", "wood", "dark")[int(b.u(0, 3))]
    b.box(0, -h, 0, w, h, d, round=0)
    rise = b.u(0.22, 0.3)
    b.box(0, rise - 0.02, 0, w * 1.12, rise, d * 1.12, roof, round=0.01, top=(0.03, 1))
    b.box(0, -h - 0.1, d, 0.12, h - 0.1, 0.03, "wood", round=0)
    for side in (-1, 1):
        b.box(side * 0.36, -h + 0.06, d, 0.12, 0.12, 0.03, "glass", round=0)
        b.box(side * w, -h + 0.06, 0, 0.03, 0.12, 0.14, "glass", round=0)
    b.box(0.3, 0.36, -0.1, 0.09, 0.24, 0.09, "brick", round=0)


def lighthouse(b):
    b.cone(0, -0.95, 0, 0.5, 0.46, 0.08, "stone")
    for k in range(5):
        low, high = 0.36 - 0.035 * k, 0.325 - 0.035 * k
        b.cone(0, -0.73 + 0.27 * k, 0, low, high, 0.137, "main" if k % 2 == 0 else "white", round=0)
    b.cone(0, 0.52, 0, 0.27, 0.27, 0.03, "dark")
    b.cone(0, 0.66, 0, 0.15, 0.15, 0.13, "yellow")
    b.cone(0, 0.9, 0, 0.22, 0.02, 0.13)
    b.box(0, -0.78, 0.34, 0.09, 0.14, 0.06, "wood", round=0)


def castle(b):
    b.box(0, -0.35, 0, 0.55, 0.32, 0.5, round=0)
    roof = ("red", "blue", "purple", "brown")[int(b.u(0, 4))]
    tall = b.u(0.5, 0.6)
    for sx in (-1, 1):
        for sz in (-1, 1):
            b.cone(sx * 0.55, tall - 0.67, sz * 0.5, 0.2, 0.2, tall, round=0)
            b.cone(sx * 0.55, 2 * tall - 0.5, sz * 0.5, 0.27, 0.02, 0.18, roof)
    b.box(0, -0.4, 0.5, 0.14, 0.22, 0.05, "wood", round=0.02)
    for x in (-0.3, -0.1, 0.1, 0.3):
        b.box(x, 0.02, 0.46, 0.06, 0.06, 0.04, round=0)
        b.box(x, 0.02, -0.46, 0.06, 0.06, 0.04, round=0)


def windmill(b):
    b.cone(0, -0.3, 0, 0.42, 0.26, 0.6)
    b.cone(0, 0.45, 0, 0.3, 0.03, 0.18, ("brick", "wood", "dark")[int(b.u(0, 3))])
    b.limb((0, 0.3, 0.1), (0, 0.3, 0.42), 0.06, 0.06, "wood")
    start = b.u(0, 90)
    for k in range(4):
        turn = math.radians(start + 90 * k)
        x, y = math.cos(turn), math.sin(turn)
        b.box(0.42 * x, 0.3 + 0.42 * y, 0.4, 0.36, 0.11, 0.02, "wood", round=0, tilt=(0, 0, math.degrees(turn)))
    b.box(0, -0.7, 0.38, 0.1, 0.18, 0.05, "patty", round=0)


def rocket(b):
    b.cone(0, -0.1, 0, 0.26, 0.28, 0.5, round=0.02)
    b.ball(0, 0.38, 0, 0.28, b.u(0.5, 0.62), 0.28, "red" if b.main[0] < 0.6 or b.main[1] > 0.5 else "white")
    for k in range(3 if b.u(0, 1) < 0.5 else 4):
        turn = 90 + 360 * k / 4
        x, z = math.cos(math.radians(turn)), math.sin(math.radians(turn))
        b.box(0.36 * x, -0.6, 0.36 * z, 0.18, 0.26, 0.03, "dark", round=0.01, top=(0.3, 1), tilt=(0, -turn, 0))
    b.cone(0, -0.68, 0, 0.2, 0.14, 0.1, "steel")
    b.ball(0, 0.12, 0.25, 0.12, 0.12, 0.06, "cyan")


def _wheels(b, y, dx, zs, radius, width):
    for side in (-1, 1):
        for z in zs:
            b.cone(side * dx, y, z, radius, radius, width, "dark", round=0.02, tilt=(0, 0, 90))
            b.cone(side * (dx + 0.6 * width), y, z, 0.5 * radius, 0.5 * radius, 0.5 * width, "steel", tilt=(0, 0, 90))


def car(b):
    b.box(0, -0.12, 0, 0.42, 0.17, 0.9, round=0.06)
    cabin = b.u(0.4, 0.5)
    b.box(0, 0.2, -0.08, 0.37, 0.18, cabin, "glass", round=0.03, top=(0.85, 0.7))
    b.box(0, 0.39, -0.08, 0.31, 0.03, cabin * 0.7, round=0.02)
    _wheels(b, -0.3, 0.38, (-0.52, 0.52), 0.2, 0.08)
    for side in (-1, 1):
        b.ball(side * 0.27, -0.08, 0.9, 0.09, 0.07, 0.05, "cream")
        b.box(side * 0.27, -0.08, -0.9, 0.08, 0.05, 0.02, "red", round=0)


def truck(b):
    b.box(0, 0.2, -0.3, 0.42, b.u(0.4, 0.48), 0.62, "white", round=0.02)
    b.box(0, 0.02, 0.6, 0.4, 0.3, 0.26, round=0.05)
    b.box(0, 0.16, 0.85, 0.34, 0.12, 0.03, "glass", round=0)
    for side in (-1, 1):
        b.box(side * 0.41, 0.14, 0.62, 0.02, 0.12, 0.14, "glass", round=0)
        b.ball(side * 0.28, -0.14, 0.86, 0.07, color="cream")
    b.box(0, -0.28, 0, 0.38, 0.06, 0.84, "dark", round=0)
    _wheels(b, -0.4, 0.38, (-0.62, -0.3, 0.55), 0.19, 0.08)


def airplane(b):
    b.ball(0, 0, 0, 0.19, 0.19, 0.95)
    b.limb((0, 0, -0.4), (0, 0.03, 0.6), 0.17, 0.19)
    sweep = b.u(8, 20)
    for side in (-1, 1):
        b.ball(side * 0.55, -0.02, -0.02, 0.55, 0.04, 0.17, "steel", tilt=(0, side * sweep, 0))
        b.ball(side * 0.24, 0.08, -0.8, 0.26, 0.03, 0.11, "steel", tilt=(0, side * sweep, 0))
        b.limb((side * 0.45, -0.12, -0.05), (side * 0.45, -0.12, 0.25), 0.08, 0.08, "dark")
    b.ball(0, 0.26, -0.82, 0.03, 0.26, 0.14, tilt=(-25, 0, 0))
    b.ball(0, 0.12, 0.68, 0.12, 0.09, 0.17, "glass")


def boat(b):
    b.box(0, -0.42, 0, 0.26, 0.2, 0.6, round=0.06, top=(1.3, 1.3))
    b.ball(0, -0.3, 0.62, 0.3, 0.2, 0.36)
    b.box(0, -0.2, 0, 0.3, 0.02, 0.7, "wood", round=0.02)
    b.limb((0, -0.4, 0.05), (0, 0.95, 0.05), 0.04, 0.03, "wood")
    b.box(0, 0.33, -0.28, 0.015, 0.5, 0.3, "white", round=0.01, top=(1, 0.05))
    b.box(0, 0.25, 0.32, 0.015, 0.4, 0.2, "white", round=0.01, top=(1, 0.05))


RECIPES = (
    cactus, tree, pine_tree, flower, house, lighthouse, castle, windmill, rocket, car, truck, airplane, boat,
)  # fmt: skip
