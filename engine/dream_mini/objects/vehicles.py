"""Vehicles; they drive towards +z."""

import math


def wheels(b, y, dx, zs, radius, width):
    for side in (-1, 1):
        for z in zs:
            b.cone(side * dx, y, z, radius, radius, width, "dark", round=0.05, tilt=(0, 0, 90))
            b.cone(
                side * (dx + 0.6 * width),
                y,
                z,
                0.55 * radius,
                0.55 * radius,
                0.5 * width,
                "steel",
                round=0.02,
                tilt=(0, 0, 90),
            )


def rocket(b):
    nose = b.u(0.42, 0.5)
    b.cone(0, -0.1, 0, 0.24, 0.28, 0.5, round=0.02)
    accent = "red" if b.main[0] < 0.6 or b.main[1] > 0.5 else "white"
    b.ball(0, 0.38, 0, 0.28, nose + 0.1, 0.28, accent)
    b.cone(0, -0.45, 0, 0.262, 0.268, 0.05, accent, round=0.01)
    count = 3 if b.chance(0.5) else 4
    for k in range(count):
        turn = 90 + 360 * k / count
        x, z = math.cos(math.radians(turn)), math.sin(math.radians(turn))
        b.path(
            [(0.2 * x, -0.3, 0.2 * z), (0.5 * x, -0.68, 0.5 * z), (0.52 * x, -0.95, 0.52 * z)],
            [0.07, 0.07, 0.05],
            accent,
        )
        b.limb((0.2 * x, -0.55, 0.2 * z), (0.42 * x, -0.75, 0.42 * z), 0.07, 0.07, accent)
    b.cone(0, -0.66, 0, 0.22, 0.15, 0.08, "steel", round=0.02)
    b.limb((0, -0.76, 0), (0, -1.02, 0), 0.14, 0.02, "orange")
    b.ring(0, 0.14, 0.27, 0.12, 0.035, "steel", tilt=(90, 0, 0))
    b.ball(0, 0.14, 0.25, 0.11, 0.11, 0.05, "cyan")


def car(b):
    b.box(0, -0.14, 0, 0.44, 0.19, 0.92, round=0.14)
    cabin = b.u(0.4, 0.48)
    b.box(0, 0.2, -0.1, 0.38, 0.2, cabin, "glass", round=0.08, top=(0.82, 0.68))
    b.box(0, 0.38, -0.1, 0.31, 0.05, cabin * 0.7, round=0.045)
    for side in (-1, 1):
        for z in (-1, 1):
            b.limb((side * 0.37, 0.04, -0.1 + z * cabin), (side * 0.3, 0.38, -0.1 + z * cabin * 0.66), 0.03, 0.03)
        b.limb((side * 0.375, 0.04, -0.1), (side * 0.32, 0.38, -0.1), 0.025, 0.025)
        b.ball(side * 0.29, -0.08, 0.88, 0.1, 0.08, 0.06, "cream")
        b.box(side * 0.3, -0.08, -0.91, 0.09, 0.055, 0.025, "red", round=0.02)
    b.box(0, -0.2, 0.92, 0.2, 0.05, 0.02, "dark", round=0.02)
    b.box(0, -0.29, 0, 0.38, 0.04, 0.94, "dark", round=0.03)
    wheels(b, -0.31, 0.4, (-0.54, 0.54), 0.21, 0.08)
    b.seat = (0, 0.43, -0.1, 0.3)


def truck(b):
    b.box(0, 0.22, -0.32, 0.43, b.u(0.38, 0.45), 0.64, "white" if b.main.min() < 0.8 else "steel", round=0.03)
    b.box(0, 0.04, 0.62, 0.41, 0.32, 0.27, round=0.09)
    b.box(0, 0.18, 0.86, 0.34, 0.12, 0.04, "glass", round=0.03)
    for side in (-1, 1):
        b.box(side * 0.4, 0.16, 0.64, 0.03, 0.12, 0.14, "glass", round=0.02)
        b.ball(side * 0.29, -0.12, 0.88, 0.075, 0.075, 0.05, "cream")
    b.box(0, -0.14, 0.89, 0.16, 0.06, 0.02, "dark", round=0.01)
    b.box(0, -0.28, 0, 0.38, 0.06, 0.86, "dark", round=0.02)
    wheels(b, -0.4, 0.39, (-0.64, -0.2, 0.58), 0.2, 0.085)
    b.seat = (0, 0.63, -0.32, 0.38)


def bus(b):
    b.box(0, 0.06, 0, 0.4, 0.42, 1.0, round=0.1)
    for side in (-1, 1):
        for k in range(5):
            b.box(side * 0.4, 0.22, -0.72 + 0.33 * k, 0.02, 0.14, 0.13, "glass", round=0.015)
        b.box(side * 0.4, -0.08, 0, 0.012, 0.035, 0.98, "dark", round=0.01)
        b.ball(side * 0.28, -0.14, 0.99, 0.075, 0.075, 0.04, "cream")
        b.box(side * 0.3, -0.14, -1.0, 0.06, 0.06, 0.02, "red", round=0.01)
    b.box(0, 0.22, 0.99, 0.33, 0.15, 0.025, "glass", round=0.02)
    b.box(0, 0.22, -0.99, 0.28, 0.13, 0.02, "glass", round=0.02)
    b.box(0, -0.27, 1.0, 0.36, 0.04, 0.03, "dark", round=0.02)
    wheels(b, -0.36, 0.36, (-0.6, 0.6), 0.18, 0.08)


def train(b):
    b.cone(0, 0.05, 0.2, 0.3, 0.3, 0.55, round=0.04, tilt=(90, 0, 0))
    b.cone(0, 0.05, 0.76, 0.31, 0.31, 0.04, "dark", round=0.02, tilt=(90, 0, 0))
    b.ball(0, 0.05, 0.8, 0.1, 0.1, 0.05, "yellow")
    b.box(0, 0.2, -0.6, 0.4, 0.5, 0.32, round=0.04)
    b.box(0, 0.72, -0.6, 0.48, 0.05, 0.4, "dark", round=0.04)
    for side in (-1, 1):
        b.box(side * 0.4, 0.38, -0.6, 0.02, 0.17, 0.17, "glass", round=0.02)
        b.cone(
            side * 0.36,
            -0.42,
            -0.6,
            0.26,
            0.26,
            0.05,
            "red" if b.main[0] < 0.6 else "dark",
            round=0.03,
            tilt=(0, 0, 90),
        )
        for z in (0.0, 0.42):
            b.cone(
                side * 0.36, -0.46, z, 0.2, 0.2, 0.05, "red" if b.main[0] < 0.6 else "dark", round=0.03, tilt=(0, 0, 90)
            )
            b.cone(side * 0.41, -0.46, z, 0.07, 0.07, 0.02, "steel", tilt=(0, 0, 90))
        b.limb((side * 0.43, -0.46, -0.6), (side * 0.43, -0.46, 0.42), 0.03, 0.03, "steel")
    b.box(0, 0.38, -0.28, 0.3, 0.13, 0.02, "glass", round=0.02)
    b.box(0, -0.28, 0.05, 0.34, 0.08, 0.85, "dark", round=0.03)
    b.box(0, -0.48, 0.92, 0.4, 0.15, 0.14, "dark", round=0.02, top=(1, 0.15))
    b.cone(0, 0.5, 0.52, 0.09, 0.14, 0.2, "dark", round=0.02)
    b.ball(0, 0.38, 0.1, 0.13, 0.13, 0.13, "yellow")


def tractor(b):
    b.box(0, -0.02, 0.38, 0.24, 0.2, 0.5, round=0.06)
    b.box(0, -0.02, 0.88, 0.19, 0.14, 0.02, "dark", round=0.02)
    b.box(0, 0.32, -0.35, 0.32, 0.36, 0.3, "glass", round=0.04)
    b.box(0, 0.7, -0.35, 0.38, 0.05, 0.36, round=0.04)
    b.box(0, -0.05, -0.3, 0.34, 0.16, 0.4, round=0.06)
    for side in (-1, 1):
        for z in (-0.63, -0.07):
            b.limb((side * 0.3, 0.05, z), (side * 0.3, 0.7, z), 0.03, 0.03)
        b.cone(side * 0.48, -0.25, -0.42, 0.46, 0.46, 0.13, "dark", round=0.07, tilt=(0, 0, 90))
        b.cone(
            side * 0.56,
            -0.25,
            -0.42,
            0.26,
            0.26,
            0.08,
            "yellow" if b.main[1] < 0.7 or b.main[0] < 0.7 else "red",
            round=0.03,
            tilt=(0, 0, 90),
        )
        b.cone(side * 0.34, -0.46, 0.6, 0.25, 0.25, 0.09, "dark", round=0.05, tilt=(0, 0, 90))
        b.cone(
            side * 0.39,
            -0.46,
            0.6,
            0.13,
            0.13,
            0.06,
            "yellow" if b.main[1] < 0.7 or b.main[0] < 0.7 else "red",
            round=0.02,
            tilt=(0, 0, 90),
        )
        b.ball(side * 0.16, 0.1, 0.88, 0.06, 0.06, 0.04, "cream")
    b.cone(0.12, 0.36, 0.5, 0.035, 0.045, 0.22, "dark")


def bicycle(b):
    for z in (-0.62, 0.62):
        b.ring(0, -0.35, z, 0.42, 0.045, "dark", tilt=(0, 0, 90))
        for k in range(3):
            a = math.pi * k / 3
            b.limb(
                (0, -0.35 - 0.4 * math.cos(a), z - 0.4 * math.sin(a)),
                (0, -0.35 + 0.4 * math.cos(a), z + 0.4 * math.sin(a)),
                0.014,
                0.014,
                "steel",
            )
        b.cone(0, -0.35, z, 0.06, 0.06, 0.06, "steel", tilt=(0, 0, 90))
    joints = {
        "seat": (0, 0.25, -0.25),
        "crank": (0, -0.38, -0.05),
        "head": (0, 0.28, 0.42),
        "rear": (0, -0.35, -0.62),
        "front": (0, -0.35, 0.62),
    }
    for one, other in (
        ("seat", "crank"),
        ("seat", "head"),
        ("crank", "head"),
        ("crank", "rear"),
        ("seat", "rear"),
        ("head", "front"),
    ):
        b.limb(joints[one], joints[other], 0.045, 0.045)
    b.limb((0, 0.25, -0.25), (0, 0.4, -0.3), 0.035, 0.035, "steel")
    b.limb((0, 0.42, -0.42), (0, 0.43, -0.14), 0.09, 0.05, "dark")
    b.limb((0, 0.28, 0.42), (0, 0.5, 0.36), 0.04, 0.04)
    for side in (-1, 1):
        b.path([(0, 0.5, 0.36), (side * 0.24, 0.54, 0.36), (side * 0.3, 0.5, 0.18)], [0.03, 0.03, 0.03], "steel")
        b.limb((side * 0.3, 0.5, 0.2), (side * 0.31, 0.48, 0.08), 0.05, 0.05, "dark")
        b.limb(
            (side * 0.06, -0.38, -0.05), (side * 0.08, -0.38 - side * 0.18, -0.05 + side * 0.1), 0.025, 0.025, "steel"
        )
        b.box(side * 0.14, -0.38 - side * 0.19, -0.05 + side * 0.11, 0.08, 0.02, 0.05, "dark", round=0.01)


def skateboard(b):
    b.box(0, 0, 0, 0.27, 0.04, 0.7, round=0.035)
    for side in (-1, 1):
        b.box(0, 0.075, side * 0.82, 0.25, 0.035, 0.2, round=0.035, tilt=(-side * 22, 0, 0))
        b.cone(0, -0.1, side * 0.5, 0.04, 0.04, 0.24, "steel", tilt=(0, 0, 90))
        b.box(0, -0.06, side * 0.5, 0.1, 0.05, 0.07, "steel", round=0.02)
        for x in (-0.22, 0.22):
            b.cone(
                x,
                -0.14,
                side * 0.5,
                0.11,
                0.11,
                0.07,
                "cream" if b.main.mean() < 0.7 else "red",
                round=0.04,
                tilt=(0, 0, 90),
            )
    b.seat = (0, 0.04, 0, 0.4)


def airplane(b):
    b.blend = 0.02
    b.limb((0, 0.02, -0.85), (0, 0, -0.2), 0.07, 0.19)
    b.limb((0, 0, -0.2), (0, 0, 0.5), 0.19, 0.19)
    b.limb((0, 0, 0.5), (0, -0.02, 0.78), 0.19, 0.12)
    sweep = b.u(8, 20)
    for side in (-1, 1):
        b.box(
            side * 0.58,
            -0.03,
            -0.02 - 0.004 * sweep,
            0.5,
            0.028,
            0.17,
            "steel" if b.main.mean() > 0.35 else "white",
            round=0.025,
            tilt=(0, side * sweep, side * 3),
        )
        b.box(
            side * 0.25,
            0.08,
            -0.8,
            0.24,
            0.022,
            0.1,
            "steel" if b.main.mean() > 0.35 else "white",
            round=0.02,
            tilt=(0, side * sweep, 0),
        )
        b.limb((side * 0.45, -0.14, -0.05), (side * 0.45, -0.14, 0.25), 0.085, 0.085, "dark")
        for k in range(6):
            b.ball(side * 0.185, 0.05, -0.35 + 0.16 * k, 0.03, 0.04, 0.04, "dark")
    b.box(0, 0.27, -0.82, 0.022, 0.22, 0.16, round=0.02, top=(1, 0.55), tilt=(-20, 0, 0))
    b.ball(0, 0.12, 0.62, 0.14, 0.08, 0.14, "glass")


def helicopter(b):
    b.blend = 0.03
    b.ball(0, 0, 0.25, 0.36, 0.36, 0.5)
    b.limb((0, 0.1, -0.1), (0, 0.2, -1.0), 0.16, 0.05)
    b.ball(0, 0.05, 0.45, 0.32, 0.28, 0.34, "glass")
    b.box(0, 0.38, -0.98, 0.025, 0.2, 0.1, round=0.02, tilt=(-20, 0, 0))
    b.ring(0.06, 0.24, -1.02, 0.17, 0.02, "dark", tilt=(0, 0, 90))
    b.box(0.07, 0.24, -1.02, 0.015, 0.17, 0.03, "dark", round=0.01, tilt=(30, 0, 0))
    b.limb((0, 0.3, 0.15), (0, 0.5, 0.15), 0.06, 0.04, "dark")
    turn = b.u(20, 70)
    for k in range(2):
        b.box(0, 0.52, 0.15, 1.0, 0.018, 0.055, "dark", round=0.015, tilt=(0, turn + 90 * k, 0))
    for side in (-1, 1):
        b.path(
            [(side * 0.3, -0.52, -0.3), (side * 0.3, -0.52, 0.6), (side * 0.3, -0.44, 0.74)],
            [0.035, 0.035, 0.035],
            "steel",
        )
        for z in (0.05, 0.42):
            b.limb((side * 0.2, -0.25, z), (side * 0.3, -0.52, z), 0.025, 0.025, "steel")
    b.neck = None


def boat(b):
    b.blend = 0.02
    for k, (z, half) in enumerate(((-0.55, 0.24), (-0.2, 0.3), (0.15, 0.29), (0.45, 0.2))):
        b.ball(0, -0.4, z, half, 0.28 - 0.01 * k, 0.36)
    b.limb((0, -0.36, 0.5), (0, -0.2, 0.88), 0.2, 0.05)
    b.box(0, 0.08, 0, 1.0, 0.3, 1.5, "dark", round=0.0, cut=True)
    b.box(0, -0.26, -0.1, 0.26, 0.045, 0.7, "wood", round=0.03, top=(1, 1))
    b.box(0, -0.15, -0.55, 0.17, 0.1, 0.14, "white", round=0.03)
    b.limb((0, -0.4, 0.1), (0, 1.0, 0.1), 0.035, 0.025, "wood")
    b.limb((0, -0.05, 0.1), (0, -0.05, -0.72), 0.025, 0.02, "wood")
    b.box(0, 0.44, -0.3, 0.012, 0.46, 0.4, "white", round=0.01, top=(1, 0.02), tilt=(0, 0, 0))
    b.box(0, 0.36, 0.42, 0.012, 0.36, 0.26, "cream", round=0.01, top=(1, 0.02))
    b.box(0, 1.0, 0.01, 0.01, 0.06, 0.09, "red", round=0.005)


def submarine(b):
    b.blend = 0.03
    b.limb((0, 0, -0.6), (0, 0, 0.55), 0.3, 0.36)
    b.limb((0, 0, -0.6), (0, 0, -0.95), 0.28, 0.1)
    b.limb((0, 0.3, 0.05), (0, 0.5, 0.05), 0.2, 0.17)
    b.path([(0, 0.55, 0.05), (0, 0.88, 0.05), (0, 0.9, 0.22)], [0.045, 0.045, 0.055], "dark")
    for side in (-1, 1):
        for z in (-0.35, 0.05, 0.45):
            b.ring(side * 0.335, 0.05, z, 0.1, 0.03, "steel", tilt=(0, 0, 90))
            b.ball(side * 0.31, 0.05, z, 0.05, 0.09, 0.09, "cyan")
        b.box(
            side * 0.32,
            0,
            -0.85,
            0.17,
            0.025,
            0.12,
            "red" if b.main[0] < 0.6 or b.main[1] > 0.5 else "dark",
            round=0.02,
        )
        b.box(
            0, side * 0.3, -0.85, 0.025, 0.15, 0.12, "red" if b.main[0] < 0.6 or b.main[1] > 0.5 else "dark", round=0.02
        )
        b.ball(side * 0.13, 0, -1.08, 0.15, 0.07, 0.03, "steel", tilt=(0, 0, 30))
    b.cone(0, 0, -1.02, 0.05, 0.05, 0.1, "steel", tilt=(90, 0, 0))
    b.ball(0, 0.05, 0.82, 0.16, 0.16, 0.12, "cyan")


def hot_air_balloon(b):
    b.blend = 0.05
    b.ball(0, 0.35, 0, 0.62, 0.62, 0.62)
    b.limb((0, 0.1, 0), (0, -0.38, 0), 0.5, 0.14)
    accent = "white" if b.main.min() < 0.7 else "red"
    for k in range(4):
        b.ring(0, 0.35, 0, 0.618, 0.022, accent, tilt=(90, 45 * k, 0))
    for sx in (-1, 1):
        for sz in (-1, 1):
            b.limb((sx * 0.13, -0.45, sz * 0.13), (sx * 0.17, -0.82, sz * 0.17), 0.016, 0.016, "dark")
    b.box(0, -0.94, 0, 0.18, 0.14, 0.18, "wood", round=0.04)
    b.box(0, -0.8, 0, 0.2, 0.03, 0.2, "tan", round=0.025)
    b.shelter = (0, -1.9, 0, 0.8)


def ufo(b):
    b.ball(0, -0.05, 0, 1.0, 0.22, 1.0)
    b.ball(0, -0.1, 0, 0.55, 0.26, 0.55, "dark")
    b.ball(0, 0.12, 0, 0.45, 0.42, 0.45, "glass")
    b.ring(0, 0.12, 0, 0.46, 0.045, "steel" if b.main.mean() < 0.55 else "dark")
    for k in range(10):
        turn = 2 * math.pi * k / 10
        b.ball(0.82 * math.sin(turn), -0.02, 0.82 * math.cos(turn), 0.1, 0.1, 0.1, ("yellow", "red", "lime")[k % 3])
    b.limb((0, 0.5, 0), (0, 0.68, 0), 0.025, 0.02, "steel")
    b.ball(0, 0.72, 0, 0.06, color="red")
    for k in range(3):
        turn = 2 * math.pi * k / 3
        b.limb(
            (0.45 * math.sin(turn), -0.2, 0.45 * math.cos(turn)),
            (0.62 * math.sin(turn), -0.55, 0.62 * math.cos(turn)),
            0.04,
            0.035,
            "steel",
        )
        b.ball(0.62 * math.sin(turn), -0.57, 0.62 * math.cos(turn), 0.1, 0.045, 0.1, "steel")


RECIPES = (
    rocket, car, truck, bus, train, tractor, bicycle, skateboard, airplane, helicopter, boat, submarine,
    hot_air_balloon, ufo,
)  # fmt: skip
