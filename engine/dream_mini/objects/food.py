"""Things to eat."""

import math


def hamburger(b):
    r, bun = b.u(0.9, 1.05), b.u(0.22, 0.3)
    b.cone(0, -0.44, 0, 0.9 * r, r, bun * 0.6, round=0.1)
    b.cone(0, -0.17, 0, 1.04 * r, 1.04 * r, 0.12, "patty", round=0.08)
    b.box(0, -0.03, 0, 0.78 * r, 0.03, 0.78 * r, "yellow", round=0.025, tilt=(0, b.u(0, 90), 0))
    for k in range(12):
        turn = 2 * math.pi * k / 12
        b.ball(0.92 * r * math.cos(turn), 0.06 + 0.03 * (k % 2), 0.92 * r * math.sin(turn), 0.26, 0.06, 0.26, "lettuce")
    if b.chance(0.6):
        b.cone(0, 0.13, 0, 0.96 * r, 0.96 * r, 0.06, "red", round=0.05)
    top = b.u(0.5, 0.65)
    b.ball(0, 0.17, 0, r, top, r)
    b.cone(0, 0.2, 0, r, 0.98 * r, 0.08, round=0.06)
    for _ in range(14):
        turn, out = b.u(0, 2 * math.pi), b.u(0.05, 0.7)
        height = 0.17 + top * math.sqrt(1 - out**2)
        b.ball(
            r * out * math.cos(turn),
            height,
            r * out * math.sin(turn),
            0.055,
            0.03,
            0.04,
            "cream",
            tilt=(0, b.u(0, 180), 0),
        )
    b.pole = (0, 0.15 + top, 0)


def donut(b):
    thick = b.u(0.3, 0.36)
    tilt = (b.u(50, 75), 0, 0) if b.chance(0.3) else (0, 0, 0)
    b.ring(0, 0, 0, 0.7, thick, "tan", tilt)
    axis = (math.cos(math.radians(tilt[0])), math.sin(math.radians(tilt[0])))
    lift = 0.08
    b.ring(0, lift * axis[0], lift * axis[1], 0.7, thick * 0.95, "main", tilt)
    for k in range(16):
        turn, out = 2 * math.pi * k / 16 + b.u(-0.15, 0.15), 0.7 + b.u(-0.16, 0.16)
        up = lift + math.sqrt(max(0.0, (0.96 * thick) ** 2 - (out - 0.7) ** 2))
        x, z = out * math.cos(turn), out * math.sin(turn)
        lean = b.u(0, math.pi)
        ends = []
        for s in (-1, 1):
            px, pz = x + s * 0.05 * math.cos(lean), z + s * 0.05 * math.sin(lean)
            ends.append((px, up * axis[0] - pz * axis[1], up * axis[1] + pz * axis[0]))
        b.limb(*ends, 0.032, 0.032, b.one_of("red", "yellow", "cyan", "white", "lime"))


def ice_cream_cone(b):
    b.cone(0, -0.55, 0, 0.05, 0.42, 0.65, "tan", round=0.02)
    b.ring(0, 0.1, 0, 0.4, 0.07, "straw")
    b.blend = 0.03
    r = b.u(0.46, 0.52)
    b.ball(0, 0.38, 0, r)
    for k in range(9):
        turn = 2 * math.pi * k / 9
        b.ball(0.4 * math.cos(turn), 0.17, 0.4 * math.sin(turn), 0.12, 0.1, 0.12)
    top = 0.38 + r
    if b.chance(0.5):
        b.ball(0, 0.38 + 0.85 * r, 0, 0.75 * r)
        top = 0.38 + 1.6 * r
    if b.chance(0.5):
        b.ball(0, top + 0.06, 0, 0.12, color="red")


def cupcake(b):
    b.cone(0, -0.4, 0, 0.46, 0.66, 0.36, b.one_of("tan", "patty", "steel"), round=0.03)
    for k in range(14):
        turn = 2 * math.pi * k / 14
        b.limb(
            (0.45 * math.cos(turn), -0.74, 0.45 * math.sin(turn)),
            (0.65 * math.cos(turn), -0.08, 0.65 * math.sin(turn)),
            0.035,
            0.04,
            "cream",
        )
    b.blend = 0.03
    for y, radius, thick in ((0.05, 0.5, 0.24), (0.28, 0.32, 0.22), (0.48, 0.15, 0.2)):
        b.ring(0, y, 0, radius, thick)
    b.ball(0, 0.1, 0, 0.5, 0.3, 0.5)
    b.ball(0, 0.55, 0, 0.2, 0.25, 0.2)
    b.ball(0, 0.84, 0, 0.13, color="red")


def cake(b):
    b.cone(0, -0.62, 0, 1.15, 1.15, 0.03, "white")
    b.cone(0, -0.3, 0, 0.95, 0.95, 0.3, round=0.06)
    b.cone(0, -0.02, 0, 0.97, 0.97, 0.06, "white", round=0.05)
    for k in range(14):
        turn = 2 * math.pi * k / 14
        b.ball(0.94 * math.cos(turn), -0.1, 0.94 * math.sin(turn), 0.1, 0.16, 0.1, "white")
    top, ring = 0.05, 0.62
    if b.chance(0.6):
        b.cone(0, 0.2, 0, 0.62, 0.62, 0.24, round=0.06)
        b.cone(0, 0.43, 0, 0.64, 0.64, 0.05, "white", round=0.04)
        top, ring = 0.46, 0.38
    for k in range(5):
        turn = 2 * math.pi * (k + 0.25) / 5
        x, z = ring * math.cos(turn), ring * math.sin(turn)
        b.cone(x, top + 0.18, z, 0.05, 0.05, 0.18, "cyan")
        b.ball(x, top + 0.44, z, 0.055, 0.1, 0.055, "orange")


def apple(b):
    b.blend = 0.06
    r = b.u(0.6, 0.66)
    b.ball(0, 0.1, 0, r, 0.82 * r, r)
    b.ball(0, -0.22, 0, 0.76 * r, 0.66 * r, 0.76 * r)
    b.ball(0, 0.1 + 0.95 * r, 0, 0.26, 0.2, 0.26, "dark", cut=True)
    b.limb((0, 0.35, 0), (b.u(-0.12, 0.12), 0.92, 0), 0.04, 0.055, "wood")
    b.ball(0.24, 0.82, 0, 0.24, 0.04, 0.13, "leaf", tilt=(0, 0, 25))


def pear(b):
    b.blend = 0.05
    b.ball(0, -0.32, 0, 0.58, 0.52, 0.58)
    b.limb((0, -0.2, 0), (0, 0.42, 0), 0.46, 0.26)
    b.limb((0, 0.6, 0), (b.u(-0.1, 0.1), 0.95, 0), 0.04, 0.05, "wood")
    b.ball(0.2, 0.82, 0, 0.22, 0.04, 0.12, "leaf", tilt=(0, 0, 25))


def carrot(b):
    r = b.u(0.26, 0.32)
    b.limb((0, -0.95, 0), (0, 0.4, 0), 0.05, r)
    for y, share in ((0.3, 1.0), (0.05, 0.82), (-0.25, 0.62)):
        b.ring(0, y, 0, r * share - 0.005, 0.02, "patty")
    for k in range(6):
        turn = 2 * math.pi * k / 6
        x, z = math.cos(turn), math.sin(turn)
        b.path(
            [(0.05 * x, 0.6, 0.05 * z), (0.16 * x, 0.9, 0.16 * z), (0.34 * x, 1.1, 0.34 * z)],
            [0.05, 0.08, 0.05],
            "leaf",
        )
    b.limb((0, 0.6, 0), (0, 1.2, 0), 0.06, 0.07, "leaf")


def mushroom(b):
    b.limb((0, -0.72, 0), (0, 0.1, 0), b.u(0.28, 0.33), 0.22, "cream")
    r = b.u(0.74, 0.85)
    b.ball(0, 0.08, 0, r, 0.62, r)
    b.ball(0, -0.38, 0, 0.97 * r, 0.44, 0.97 * r, "cream", cut=True)
    b.cone(0, 0.06, 0, 0.8 * r, 0.86 * r, 0.03, "straw")
    for k in range(11):
        turn, out = 2.39996 * k, math.sqrt((k + 0.2) / 12)
        height = 0.08 + 0.62 * math.sqrt(max(0.0, 1 - out**2))
        b.ball(
            r * out * math.cos(turn),
            height,
            r * out * math.sin(turn),
            0.13,
            0.08,
            0.13,
            "white",
            tilt=(60 * out * math.sin(turn), 0, -60 * out * math.cos(turn)),
        )


def pumpkin(b):
    b.blend = 0.02
    for k in range(9):
        turn = 2 * math.pi * k / 9
        b.ball(0.36 * math.cos(turn), 0, 0.36 * math.sin(turn), 0.36, b.u(0.5, 0.55), 0.36)
    b.path([(0, 0.35, 0), (0.02, 0.66, 0), (0.14, 0.82, 0)], [0.13, 0.09, 0.1], "leaf")


def pineapple(b):
    height = b.u(0.64, 0.72)
    b.ball(0, -0.25, 0, 0.46, height, 0.46)
    for level in range(7):
        up = -0.75 + 0.25 * level
        radius = 0.46 * math.sqrt(max(0.05, 1 - up * up))
        for k in range(7):
            turn = 2 * math.pi * (k + 0.5 * (level % 2)) / 7
            b.ball(
                radius * math.cos(turn),
                -0.25 + height * up,
                radius * math.sin(turn),
                0.075,
                0.075,
                0.075,
                "orange" if b.main[0] > 0.7 and b.main[2] < 0.4 else "straw",
            )
    for level in range(3):
        for k in range(6):
            turn = 2 * math.pi * (k + 0.5 * level) / 6
            out, up = 0.5 - 0.17 * level, 0.72 + 0.2 * level
            b.path(
                [
                    (0.05 * math.cos(turn), 0.36, 0.05 * math.sin(turn)),
                    (0.55 * out * math.cos(turn), 0.5 * up + 0.24, 0.55 * out * math.sin(turn)),
                    (out * math.cos(turn), up, out * math.sin(turn)),
                ],
                [0.1, 0.085, 0.02],
                "leaf",
            )


def banana(b):
    b.blend = 0.02
    angles = [math.radians(a) for a in (-72, -50, -25, 0, 25, 50, 72)]
    points = [(0.95 * math.sin(a), 0.75 - 0.95 * math.cos(a), 0) for a in angles]
    b.path(points, [0.1, 0.18, 0.22, 0.23, 0.22, 0.18, 0.1])
    for end, nxt in ((points[0], points[1]), (points[-1], points[-2])):
        away = tuple(e + 0.55 * (e - n) for e, n in zip(end, nxt, strict=True))
        b.limb(end, away, 0.07, 0.055, "patty" if end is points[0] else "leaf")


def strawberry(b):
    b.blend = 0.05
    b.limb((0, 0.22, 0), (0, -0.55, 0), 0.52, 0.16)
    for level in range(5):
        y = 0.38 - 0.24 * level
        radius = 0.55 - 0.085 * level - (0.08 if level == 0 else 0)
        count = 9 - level
        for k in range(count):
            turn = 2 * math.pi * (k + 0.5 * (level % 2)) / count
            b.ball(radius * math.cos(turn), y, radius * math.sin(turn), 0.035, 0.055, 0.035, "yellow")
    for k in range(7):
        turn = 2 * math.pi * k / 7
        x, z = math.cos(turn), math.sin(turn)
        b.ball(0.3 * x, 0.68, 0.3 * z, 0.28, 0.05, 0.11, "leaf", tilt=(0, -math.degrees(turn), 0))
    b.limb((0, 0.66, 0), (0.05, 0.95, 0), 0.05, 0.05, "leaf")


def cherry(b):
    for side in (-1, 1):
        b.ball(side * 0.42, -0.42, 0, 0.38, 0.36, 0.38)
        b.path([(side * 0.42, -0.1, 0), (side * 0.28, 0.35, 0), (0.05, 0.8, 0)], [0.04, 0.038, 0.045], "leaf")
    b.ball(0.32, 0.72, 0, 0.3, 0.045, 0.16, "lettuce", tilt=(0, 0, -20))


def watermelon(b):
    """A slice: a wedge of a disc with a green rind."""
    b.cone(0, 0.35, 0, 1.0, 1.0, 0.2, round=0.04, tilt=(90, 0, 0))
    b.box(0, 1.1, 0, 1.3, 0.75, 0.6, "dark", cut=True)
    # the flesh is a half disc of limbs that stands out of the rind
    for k in range(9):
        a = math.radians(180 + 20 * (k + 0.5))
        b.limb(
            (0.1 * math.cos(a), 0.16 + 0.1 * math.sin(a), 0),
            (0.62 * math.cos(a), 0.3 + 0.62 * math.sin(a), 0),
            0.22,
            0.23,
            "red" if b.main[0] < 0.6 or b.main[1] > 0.4 else "yellow",
        )
    for k in range(6):
        a = math.radians(195 + 30 * k)
        for side in (-1, 1):
            b.ball(
                0.48 * math.cos(a),
                0.22 + 0.46 * math.sin(a),
                side * 0.225,
                0.035,
                0.06,
                0.03,
                "dark",
                tilt=(0, 0, math.degrees(a) + 90),
            )


def lemon(b):
    b.blend = 0.05
    b.ball(0, 0, 0, 0.7, 0.48, 0.48)
    b.limb((0.5, 0, 0), (0.86, 0, 0), 0.22, 0.07)
    b.limb((-0.5, 0, 0), (-0.8, 0, 0), 0.22, 0.07)
    b.limb((-0.8, 0, 0), (-0.92, 0.04, 0), 0.05, 0.045, "wood")
    b.ball(-0.86, 0.2, 0, 0.22, 0.04, 0.12, "leaf", tilt=(0, 0, 40))


def grapes(b):
    for level, count in enumerate((6, 6, 5, 4, 3, 1)):
        radius = 0.42 - 0.075 * level if count > 1 else 0.0
        for k in range(count):
            turn = 2 * math.pi * (k + 0.5 * (level % 2)) / count
            b.ball(radius * math.cos(turn), 0.4 - 0.27 * level, radius * math.sin(turn), 0.22)
    b.ball(0, 0.5, 0, 0.24)
    b.path([(0, 0.6, 0), (0.02, 0.85, 0), (0.14, 1.02, 0)], [0.055, 0.05, 0.05], "wood")
    b.ball(0.3, 0.78, 0.1, 0.3, 0.05, 0.22, "leaf", tilt=(10, 0, -15))


def corn(b):
    b.limb((0, -0.6, 0), (0, 0.8, 0), 0.36, 0.16)
    for level in range(8):
        y = -0.5 + 0.18 * level
        radius = 0.345 - 0.023 * level
        for k in range(9):
            turn = 2 * math.pi * (k + 0.5 * (level % 2)) / 9
            b.ball(radius * math.cos(turn), y, radius * math.sin(turn), 0.11, 0.09, 0.11)
    for k in range(4):
        turn = math.pi / 4 + math.pi * k / 2
        x, z = math.cos(turn), math.sin(turn)
        b.path(
            [(0.1 * x, -0.9, 0.1 * z), (0.42 * x, -0.45, 0.42 * z), (0.58 * x, 0.25, 0.58 * z)],
            [0.12, 0.16, 0.03],
            "lettuce",
        )
    b.limb((0, -0.85, 0), (0, -1.05, 0), 0.13, 0.1, "leaf")


def hot_dog(b):
    b.limb((-0.75, 0.1, 0), (0.75, 0.1, 0), 0.2, 0.2, "brick")
    for side in (-1, 1):
        b.limb((-0.62, 0, side * 0.22), (0.62, 0, side * 0.22), 0.24, 0.24)
    b.limb((-0.6, -0.1, 0), (0.6, -0.1, 0), 0.22, 0.22)
    points = [(-0.6 + 0.15 * k, 0.31, 0.075 * (-1) ** k) for k in range(9)]
    b.path(points, [0.045] * 9, "yellow")


def pizza(b):
    """A slice, its tip to the front."""
    b.box(0, 0, 0, 0.62, 0.85, 0.075, round=0.04, top=(0.08, 1), tilt=(90, 0, 0))
    b.limb((-0.6, 0.03, -0.85), (0.6, 0.03, -0.85), 0.15, 0.15, "tan")
    for x, z in ((0.22, -0.5), (-0.24, -0.45), (0.02, -0.1), (0.14, 0.28), (-0.12, 0.2)):
        b.cone(x, 0.085, z, 0.135, 0.13, 0.025, "red", round=0.02)
    for x, z in ((0.0, -0.68), (-0.35, -0.7), (0.1, 0.52), (0.36, -0.2)):
        b.ball(x, 0.08, z, 0.07, 0.03, 0.05, "leaf")
    b.box(0, -0.07, 0, 0.6, 0.82, 0.03, "tan", round=0.02, top=(0.08, 1), tilt=(90, 0, 0))


def cookie(b):
    b.cone(0, 0, 0, 0.9, 0.85, 0.15, round=0.13)
    for k in range(14):
        turn, out = 2.39996 * k, 0.78 * math.sqrt((k + 0.3) / 14)
        b.ball(out * math.cos(turn), 0.13, out * math.sin(turn), 0.1, 0.075, 0.1, "patty")
    for k in range(6):
        turn = 2.39996 * k
        b.ball(0.55 * math.cos(turn), -0.12, 0.55 * math.sin(turn), 0.1, 0.06, 0.1, "patty")


def lollipop(b):
    b.limb((0, -1.1, 0), (0, 0.0, 0), 0.045, 0.045, "white")
    b.cone(0, 0.4, 0, 0.52, 0.52, 0.15, round=0.12, tilt=(90, 0, 0))
    for side in (-1, 1):
        points = []
        for k in range(15):
            turn, out = 0.75 * k, 0.03 + 0.03 * k
            points.append((out * math.cos(turn), 0.4 + out * math.sin(turn), side * 0.15))
        b.path(points, [0.032] * 15, "white" if b.main.min() < 0.7 else "red")


def cheese(b):
    """A wedge with holes."""
    b.box(0, 0, 0, 0.55, 0.9, 0.38, round=0.03, top=(0.05, 1), tilt=(90, 0, 0))
    for x, y, z, r in (
        (0.55, 0.1, -0.5, 0.16),
        (0.42, -0.15, -0.05, 0.13),
        (0.24, 0.14, 0.35, 0.1),
        (-0.5, -0.1, -0.55, 0.17),
        (-0.38, 0.14, -0.05, 0.14),
        (-0.2, -0.12, 0.3, 0.09),
        (0.1, 0.38, -0.45, 0.17),
        (-0.15, 0.38, 0.05, 0.12),
        (0.2, 0.0, -0.9, 0.17),
        (-0.2, 0.15, -0.9, 0.11),
    ):
        b.ball(x, y, z, r, cut=True, color="dark")


def pancake(b):
    for k in range(4):
        b.cone(b.u(-0.05, 0.05), -0.4 + 0.2 * k, b.u(-0.05, 0.05), 0.78, 0.78, 0.1, round=0.09)
    b.cone(0, -0.55, 0, 1.05, 1.1, 0.04, "white", round=0.03)
    b.cone(0, 0.31, 0, 0.55, 0.5, 0.02, "patty", round=0.02)
    for k in range(5):
        turn = 2 * math.pi * k / 5 + 0.4
        b.limb(
            (0.5 * math.cos(turn), 0.3, 0.5 * math.sin(turn)),
            (0.81 * math.cos(turn), 0.0 - 0.1 * (k % 2), 0.81 * math.sin(turn)),
            0.07,
            0.075,
            "patty",
        )
    b.box(0.03, 0.4, 0, 0.17, 0.085, 0.17, "yellow", round=0.04, tilt=(0, 25, 0))


def eggplant(b):
    b.blend = 0.05
    b.limb((0, -0.42, 0), (0.03, 0.1, 0), 0.46, 0.36)
    b.limb((0.03, 0.1, 0), (0.08, 0.52, 0), 0.34, 0.24)
    for k in range(5):
        turn = 2 * math.pi * k / 5
        b.limb((0.08, 0.74, 0), (0.08 + 0.29 * math.cos(turn), 0.5, 0.29 * math.sin(turn)), 0.12, 0.05, "leaf")
    b.path([(0.08, 0.75, 0), (0.1, 0.95, 0), (0.2, 1.08, 0)], [0.09, 0.07, 0.075], "leaf")


def tomato(b):
    b.blend = 0.05
    for k in range(5):
        turn = 2 * math.pi * k / 5
        b.ball(0.2 * math.cos(turn), 0, 0.2 * math.sin(turn), 0.46, 0.46, 0.46)
    for k in range(6):
        turn = 2 * math.pi * k / 6
        b.path(
            [
                (0, 0.5, 0),
                (0.2 * math.cos(turn), 0.53, 0.2 * math.sin(turn)),
                (0.42 * math.cos(turn), 0.46, 0.42 * math.sin(turn)),
            ],
            [0.07, 0.065, 0.025],
            "leaf",
        )
    b.limb((0, 0.5, 0), (0.03, 0.72, 0), 0.055, 0.05, "leaf")


def fries(b):
    b.box(0, -0.4, 0, 0.36, 0.48, 0.22, round=0.04, top=(1.35, 1.35))
    b.box(0, 0.14, 0.32, 0.3, 0.16, 0.1, "dark", cut=True)
    for k in range(5):
        for row in range(3):
            x, z = -0.36 + 0.18 * k + b.u(-0.03, 0.03), -0.16 + 0.16 * row
            b.box(
                x,
                0.18 + b.u(-0.05, 0.22),
                z,
                0.065,
                0.5,
                0.065,
                "yellow" if b.main[1] < 0.7 or b.main[0] < 0.7 else "cream",
                round=0.015,
                tilt=(6 * (row - 1), 0, -6 * (k - 2)),
            )


RECIPES = (
    hamburger, donut, ice_cream_cone, cupcake, cake, apple, pear, carrot, mushroom, pumpkin, pineapple, banana,
    strawberry, cherry, watermelon, lemon, grapes, corn, hot_dog, pizza, cookie, lollipop, cheese, pancake, eggplant,
    tomato, fries,
)  # fmt: skip
