"""Tools, toys and signs."""

import math


def drum(b):
    r, h = b.u(0.6, 0.7), b.u(0.35, 0.45)
    b.cone(0, 0, 0, r, r, h, round=0.01)
    for side in (-1, 1):
        b.cone(0, side * h, 0, 1.05 * r, 1.05 * r, 0.07, "steel", round=0.04)
    for k in range(12):
        one, two = 2 * math.pi * k / 12, 2 * math.pi * (k + 1) / 12
        s = 1 if k % 2 else -1
        b.limb(
            (r * math.cos(one), s * h, r * math.sin(one)),
            (r * math.cos(two), -s * h, r * math.sin(two)),
            0.025,
            0.025,
            "white" if b.main.min() < 0.7 else "blue",
        )
    b.cone(0, h + 0.06, 0, 0.97 * r, 0.97 * r, 0.03, "cream", round=0.02)
    for side in (-1, 1):
        b.limb((side * 0.5, h + 0.15, -0.3), (side * -0.1, h + 0.14, 0.4), 0.035, 0.035, "wood")
        b.ball(side * -0.1, h + 0.15, 0.42, 0.075, color="wood")
    b.seat = (0, h + 0.1, 0, 0.85 * r)


def hat(b):
    b.cone(0, -0.4, 0, 0.9, 0.9, 0.045, round=0.04)
    b.ring(0, -0.36, 0, 0.86, 0.05)
    b.cone(0, 0.1, 0, 0.5, b.u(0.48, 0.56), b.u(0.46, 0.55), round=0.06)
    b.cone(0, -0.22, 0, 0.525, 0.53, 0.11, "red" if b.main[0] < 0.6 or b.main[1] > 0.5 else "white", round=0.01)


def book(b):
    b.box(0, 0.13, 0, 0.6, 0.025, 0.78, round=0.02)
    b.box(0, -0.13, 0, 0.6, 0.025, 0.78, round=0.02)
    b.cone(-0.58, 0, 0, 0.155, 0.155, 0.78, round=0.03, tilt=(90, 0, 0))
    b.box(0.0, 0, 0, 0.56, 0.12, 0.73, "cream", round=0.01)
    b.box(0.02, 0.155, 0.3, 0.35, 0.012, 0.07, "yellow" if b.main[1] < 0.7 else "navy", round=0.01)
    b.box(0.02, 0.155, -0.2, 0.25, 0.012, 0.25, "yellow" if b.main[1] < 0.7 else "navy", round=0.01)
    b.box(0.36, 0.0, 0.8, 0.05, 0.01, 0.14, "red", round=0.01)
    b.seat = (0, 0.165, 0, 0.55)


def clock(b):
    b.cone(0, 0, 0, 0.62, 0.62, 0.2, round=0.08, tilt=(90, 0, 0))
    b.cone(0, 0, 0.17, 0.52, 0.52, 0.05, "white", round=0.02, tilt=(90, 0, 0))
    for k in range(12):
        turn = 2 * math.pi * k / 12
        b.ball(0.43 * math.sin(turn), 0.43 * math.cos(turn), 0.22, 0.05 if k % 3 == 0 else 0.03, color="dark")
    hour = b.u(0, 2 * math.pi)
    b.limb((0, 0, 0.25), (0.24 * math.sin(hour), 0.24 * math.cos(hour), 0.25), 0.04, 0.03, "dark")
    minute = 12 * hour
    b.limb((0, 0, 0.25), (0.36 * math.sin(minute), 0.36 * math.cos(minute), 0.25), 0.03, 0.022, "dark")
    for side in (-1, 1):
        b.ball(
            side * 0.38, 0.62, 0, 0.22, 0.16, 0.2, "steel" if b.main.std() > 0.05 else "yellow", tilt=(0, 0, -side * 35)
        )
        b.limb((side * 0.38, -0.45, 0), (side * 0.52, -0.74, 0), 0.06, 0.075, "dark")
    b.arc(0, 0.6, 0, 0.2, 0.035, 80, "dark")


def camera(b):
    b.box(0, 0, 0, 0.78, 0.48, 0.26, round=0.09)
    b.box(0, 0.02, 0, 0.785, 0.17, 0.265, "patty" if b.main.mean() > 0.25 else "steel", round=0.05)
    b.box(0, 0.5, 0, 0.26, 0.12, 0.2, round=0.06)
    b.cone(0, -0.02, 0.36, 0.38, 0.36, 0.18, "dark", round=0.04, tilt=(90, 0, 0))
    b.cone(0, -0.02, 0.52, 0.3, 0.3, 0.03, "steel", round=0.02, tilt=(90, 0, 0))
    b.ball(0, -0.02, 0.5, 0.24, 0.24, 0.1, "navy")
    b.ball(-0.07, 0.06, 0.58, 0.05, 0.05, 0.03, "white")
    b.box(0.56, 0.3, 0.26, 0.12, 0.08, 0.03, "cream", round=0.02)
    b.cone(-0.52, 0.52, 0, 0.12, 0.12, 0.06, "red", round=0.03)


def guitar(b):
    b.blend = 0.02
    b.cone(0, -0.62, 0, 0.44, 0.44, 0.13, round=0.05, tilt=(90, 0, 0))
    b.cone(0, -0.16, 0, 0.32, 0.32, 0.13, round=0.05, tilt=(90, 0, 0))
    b.cone(0, -0.4, 0, 0.29, 0.29, 0.13, round=0.05, tilt=(90, 0, 0))
    b.cone(0, -0.3, 0.13, 0.13, 0.13, 0.012, "dark", round=0.01, tilt=(90, 0, 0))
    b.box(0, -0.72, 0.15, 0.18, 0.04, 0.03, "dark", round=0.02)
    b.box(0, 0.45, 0.1, 0.065, 0.62, 0.05, "patty", round=0.03)
    b.box(0, 1.1, 0.08, 0.12, 0.17, 0.045, "patty", round=0.03)
    for k in (-1, 0, 1):
        b.limb((0.035 * k, -0.72, 0.185), (0.035 * k, 1.1, 0.155), 0.009, 0.009, "steel")
    for side in (-1, 1):
        for y in (1.0, 1.1, 1.2):
            b.ball(side * 0.15, y, 0.08, 0.05, 0.035, 0.035, "cream")


def bell(b):
    b.blend = 0.03
    b.ball(0, 0.25, 0, 0.36, 0.36, 0.36)
    b.cone(0, 0.0, 0, 0.5, 0.35, 0.32, round=0.03)
    b.cone(0, -0.4, 0, 0.72, 0.5, 0.12, round=0.04)
    b.cone(0, -0.42, 0, 0.56, 0.4, 0.22, "dark", cut=True)
    b.ball(0, -0.52, 0, 0.15, color="dark")
    b.ring(0, 0.7, 0, 0.12, 0.045, tilt=(90, 0, 0))
    b.ring(0, -0.24, 0, 0.525, 0.025, "red" if b.main[0] < 0.6 or b.main[1] > 0.5 else "white")


def key(b):
    b.ring(0, 0.62, 0, 0.32, 0.09, tilt=(90, 0, 0))
    b.limb((0, 0.26, 0), (0, -0.98, 0), 0.085, 0.085)
    b.ring(0, 0.2, 0, 0.085, 0.06)
    for y, long in ((-0.62, 0.3), (-0.86, 0.36)):
        b.box(0.5 * long, y, 0, 0.5 * long, 0.07, 0.06, round=0.02)
    b.box(0.32, -0.74, 0, 0.045, 0.12, 0.06, round=0.02)


def crown(b):
    b.cone(0, -0.25, 0, 0.62, 0.68, 0.24, round=0.02)
    b.cone(0, 0.0, 0, 0.56, 0.62, 0.42, "dark", cut=True)
    for k in range(6):
        turn = 2 * math.pi * (k + 0.5) / 6
        x, z = math.sin(turn), math.cos(turn)
        b.limb((0.62 * x, -0.1, 0.62 * z), (0.74 * x, 0.48, 0.74 * z), 0.16, 0.05)
        b.ball(0.75 * x, 0.55, 0.75 * z, 0.1, color="red" if b.main[0] < 0.6 or b.main[1] > 0.5 else "white")
        b.ball(0.66 * x, -0.24, 0.66 * z, 0.09, 0.09, 0.09, ("cyan", "purple")[k % 2])
    b.ring(0, -0.46, 0, 0.62, 0.06, "white" if b.main.min() < 0.7 else "red")


def boot(b):
    b.blend = 0.05
    b.cone(0, 0.3, -0.2, 0.28, 0.33, 0.5, round=0.04)
    b.limb((0, -0.35, -0.2), (0, -0.42, 0.48), 0.3, 0.24)
    b.cone(0, 0.5, -0.2, 0.25, 0.28, 0.45, "dark", cut=True)
    b.box(0, -0.66, 0.12, 0.27, 0.07, 0.62, "dark", round=0.06)
    b.box(0, -0.76, -0.3, 0.25, 0.09, 0.2, "dark", round=0.04)
    b.ring(0, 0.76, -0.2, 0.32, 0.06, "cream" if b.main.mean() < 0.7 else "wood")
    for k in range(4):
        y, z = -0.12 + 0.17 * k, 0.14 - 0.05 * k
        b.limb((-0.13, y, z), (0.13, y + 0.04, z), 0.028, 0.028, "white" if b.main.min() < 0.7 else "red")
    b.mouth = (0.78, 0.26, 0.3)


def sword(b):
    b.box(0, 0.35, 0, 0.11, 0.72, 0.035, round=0.015)
    b.limb((0, 1.02, 0), (0, 1.26, 0), 0.075, 0.015)
    b.box(0, 0.3, 0, 0.025, 0.66, 0.045, "steel" if b.main.std() > 0.05 else "dark", round=0.01)
    b.limb(
        (-0.36, -0.42, 0), (0.36, -0.42, 0), 0.075, 0.075, "yellow" if b.main[1] < 0.7 or b.main[2] > 0.5 else "dark"
    )
    b.limb((0, -0.45, 0), (0, -0.85, 0), 0.07, 0.07, "patty")
    b.ball(0, -0.95, 0, 0.12, color="yellow" if b.main[1] < 0.7 or b.main[2] > 0.5 else "dark")


def hammer(b):
    b.limb((0, -1.0, 0), (0, 0.5, 0), 0.09, 0.07, "wood" if b.main[0] < 0.45 or b.main[1] > 0.4 else "dark")
    b.cone(0.28, 0.55, 0, 0.16, 0.19, 0.16, round=0.04, tilt=(0, 0, -90))
    b.box(0, 0.55, 0, 0.2, 0.14, 0.13, round=0.04)
    b.box(-0.36, 0.55, 0, 0.22, 0.12, 0.11, round=0.03, top=(1, 1), tilt=(0, 0, 10))
    b.limb((-0.5, 0.52, 0), (-0.68, 0.4, 0), 0.09, 0.03)


def pencil(b):
    b.cone(0, 0.05, 0, 0.16, 0.16, 0.68, round=0.01)
    for k in range(6):
        turn = 2 * math.pi * k / 6
        b.limb(
            (0.13 * math.cos(turn), -0.6, 0.13 * math.sin(turn)),
            (0.13 * math.cos(turn), 0.7, 0.13 * math.sin(turn)),
            0.05,
            0.05,
        )
    b.cone(0, -0.8, 0, 0.04, 0.165, 0.19, "skin", round=0.005)
    b.cone(0, -0.98, 0, 0.005, 0.055, 0.07, "dark", round=0.002)
    b.cone(0, 0.78, 0, 0.175, 0.175, 0.09, "steel", round=0.02)
    b.cone(0, 0.95, 0, 0.165, 0.16, 0.12, "rose", round=0.06)


def ball(b):
    b.ball(0, 0, 0, 0.8)
    other = "white" if b.main.min() < 0.7 else "red"
    for k in range(3):
        b.ring(0, 0, 0, 0.775, 0.055, other, tilt=(90, 60 * k, 0))
    for side in (-1, 1):
        b.cone(0, side * 0.77, 0, 0.16, 0.16, 0.04, other, round=0.03)


def dice(b):
    b.box(0, 0, 0, 0.6, 0.6, 0.6, round=0.1)
    dot = "dark" if b.main.mean() > 0.35 else "white"
    faces = {
        1: ("z", 1), 6: ("z", -1), 2: ("x", 1), 5: ("x", -1), 3: ("y", 1), 4: ("y", -1),
    }  # fmt: skip
    spots = {1: [(0, 0)], 2: [(-1, -1), (1, 1)], 3: [(-1, -1), (0, 0), (1, 1)], 4: [(-1, -1), (-1, 1), (1, -1), (1, 1)]}
    spots[5] = spots[4] + [(0, 0)]
    spots[6] = spots[4] + [(-1, 0), (1, 0)]
    for number, (axis, side) in faces.items():
        for u, v in spots[number]:
            p, q = 0.28 * u, 0.28 * v
            at = {"x": (side * 0.59, p, q), "y": (p, side * 0.59, q), "z": (p, q, side * 0.59)}[axis]
            flat = {"x": (0.035, 0.11, 0.11), "y": (0.11, 0.035, 0.11), "z": (0.11, 0.11, 0.035)}[axis]
            b.ball(*at, *flat, dot)


def gift(b):
    w, h = b.u(0.55, 0.65), b.u(0.42, 0.55)
    ribbon = b.one_of("yellow", "white") if b.main[1] < 0.6 or b.main[0] < 0.6 else b.one_of("red", "purple")
    b.box(0, -0.1, 0, w, h, w, round=0.03)
    b.box(0, h - 0.12, 0, w + 0.05, 0.12, w + 0.05, round=0.03)
    b.box(0, -0.1, 0, w + 0.012, h + 0.01, 0.1, ribbon, round=0.01)
    b.box(0, -0.1, 0, 0.1, h + 0.01, w + 0.012, ribbon, round=0.01)
    b.box(0, h - 0.12, 0, w + 0.065, 0.13, 0.1, ribbon, round=0.01)
    b.box(0, h - 0.12, 0, 0.1, 0.13, w + 0.065, ribbon, round=0.01)
    for side in (-1, 1):
        b.ring(side * 0.2, h + 0.14, 0.02, 0.16, 0.07, ribbon, tilt=(90, 0, side * 25))
        b.limb((side * 0.05, h + 0.05, 0.08), (side * 0.26, h + 0.04, 0.3), 0.05, 0.05, ribbon)
    b.ball(0, h + 0.08, 0.02, 0.11, color=ribbon)
    b.seat = (0, h + 0.01, 0, 0.6)


def balloon(b):
    b.blend = 0.05
    b.ball(0, 0.45, 0, 0.52, 0.56, 0.52)
    b.limb((0, 0.3, 0), (0, -0.12, 0), 0.4, 0.1)
    b.cone(0, -0.24, 0, 0.1, 0.04, 0.05, round=0.02)
    b.path(
        [(0, -0.26, 0), (0.08, -0.5, 0.02), (-0.05, -0.78, 0), (0.05, -1.05, 0)],
        [0.02, 0.02, 0.02, 0.02],
        "white" if b.main.min() < 0.7 else "dark",
    )
    b.ball(-0.2, 0.68, 0.38, 0.08, 0.12, 0.04, "white", tilt=(-20, -20, 25))
    b.shelter = (0, -1.9, 0, 0.8)


def star(b):
    b.blend = 0.02
    for k in range(5):
        turn = math.pi / 2 + 2 * math.pi * k / 5
        x, y = math.cos(turn), math.sin(turn)
        b.box(
            0.42 * x, 0.42 * y, 0, 0.34, 0.45, 0.17, round=0.03, top=(0.06, 0.4), tilt=(0, 0, math.degrees(turn) - 90)
        )
    b.ball(0, 0, 0, 0.36, 0.36, 0.24)


def heart(b):
    b.blend = 0.035
    for side in (-1, 1):
        b.limb((side * 0.33, 0.28, 0), (0, -0.62, 0), 0.38, 0.09)
        b.limb((side * 0.2, 0.1, 0), (0, -0.45, 0), 0.3, 0.12)


def diamond(b):
    b.cone(0, 0.32, 0, 0.72, 0.42, 0.18, round=0.005)
    b.cone(0, -0.36, 0, 0.01, 0.72, 0.5, round=0.005)
    light = "white" if b.main.min() < 0.8 else "glass"
    for k in range(8):
        one, two = 2 * math.pi * k / 8, 2 * math.pi * (k + 0.5) / 8
        b.limb(
            (0.7 * math.cos(one), 0.15, 0.7 * math.sin(one)),
            (0.02 * math.cos(one), -0.84, 0.02 * math.sin(one)),
            0.018,
            0.014,
            light,
        )
        b.limb(
            (0.7 * math.cos(one), 0.15, 0.7 * math.sin(one)),
            (0.42 * math.cos(two), 0.5, 0.42 * math.sin(two)),
            0.018,
            0.018,
            light,
        )
        b.limb(
            (0.42 * math.cos(two), 0.5, 0.42 * math.sin(two)),
            (0.7 * math.cos(one + math.pi / 4), 0.15, 0.7 * math.sin(one + math.pi / 4)),
            0.018,
            0.018,
            light,
        )


def television(b):
    b.box(0, 0, 0, 0.85, 0.6, 0.32, round=0.08)
    b.box(-0.15, 0, 0.31, 0.6, 0.46, 0.03, "dark", round=0.06)
    b.box(-0.15, 0, 0.33, 0.53, 0.39, 0.025, "cyan", round=0.06)
    for y, color in ((0.3, "yellow"), (0.08, "red")):
        b.cone(0.65, y, 0.34, 0.09, 0.09, 0.04, color, round=0.03, tilt=(90, 0, 0))
    for k in range(3):
        b.box(0.65, -0.2 - 0.1 * k, 0.325, 0.11, 0.022, 0.01, "dark", round=0.01)
    for side in (-1, 1):
        b.limb((side * 0.06, 0.6, 0), (side * 0.42, 1.1, 0), 0.03, 0.025, "steel")
        b.ball(side * 0.42, 1.12, 0, 0.05, color="steel")
        b.limb((side * 0.6, -0.55, 0), (side * 0.7, -0.8, 0), 0.07, 0.05, "dark")
    b.box(0, -0.02, -0.34, 0.6, 0.4, 0.08, "dark", round=0.06)


def laptop(b):
    b.box(0, -0.5, 0.1, 0.85, 0.045, 0.58, round=0.03)
    b.box(0, -0.455, 0.0, 0.74, 0.012, 0.33, "dark", round=0.01)
    for row in range(4):
        for k in range(9):
            b.box(
                -0.62 + 0.155 * k,
                -0.44,
                -0.24 + 0.155 * row,
                0.058,
                0.014,
                0.055,
                "white" if b.main.mean() < 0.85 else "gray",
                round=0.012,
            )
    b.box(0, -0.452, 0.5, 0.2, 0.01, 0.12, "dark", round=0.01)
    b.box(0, 0.06, -0.6, 0.85, 0.56, 0.035, round=0.03, tilt=(-14, 0, 0))
    b.box(0, 0.07, -0.565, 0.77, 0.48, 0.02, "dark", round=0.02, tilt=(-14, 0, 0))
    b.box(0, 0.07, -0.55, 0.73, 0.44, 0.015, "cyan", round=0.02, tilt=(-14, 0, 0))


def anchor(b):
    b.ring(0, 0.82, 0, 0.17, 0.06, tilt=(90, 0, 0))
    b.limb((0, 0.65, 0), (0, -0.85, 0), 0.09, 0.1)
    b.limb(
        (-0.42, 0.45, 0),
        (0.42, 0.45, 0),
        0.075,
        0.075,
        "wood" if b.main.std() > 0.05 or b.main.mean() < 0.3 else "dark",
    )
    b.arc(0, -0.15, 0, 0.72, 0.09, 70, tilt=(0, 0, 180))
    for side in (-1, 1):
        x, y = side * 0.72 * math.sin(math.radians(70)), -0.15 - 0.72 * math.cos(math.radians(70))
        b.limb((x, y - 0.08, 0), (x + side * 0.04, y + 0.24, 0), 0.17, 0.02)


RECIPES = (
    drum, hat, book, clock, camera, guitar, bell, key, crown, boot, sword, hammer, pencil, ball, dice, gift, balloon,
    star, heart, diamond, television, laptop, anchor,
)  # fmt: skip
