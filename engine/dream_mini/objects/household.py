"""Furniture and vessels: places for other things; handles and spouts point to the side (+x)."""

import math


def mug(b):
    h, r = b.u(0.48, 0.56), b.u(0.42, 0.48)
    b.cone(0, 0, 0, r, r, h, round=0.06)
    b.cone(0, 0.16, 0, 0.84 * r, 0.84 * r, h, "dark", cut=True)
    b.cone(0, h - 0.22, 0, 0.85 * r, 0.85 * r, 0.02, "patty")
    b.arc(r - 0.02, -0.02, 0, 0.27, 0.075, 110, tilt=(0, 0, -90))
    b.mouth = (h, 0.8 * r, 0.3)


def teapot(b):
    b.blend = 0.02
    b.ball(0, -0.1, 0, 0.58, b.u(0.46, 0.52), 0.58)
    b.cone(0, -0.54, 0, 0.34, 0.3, 0.06, round=0.04)
    b.path([(0.4, -0.25, 0), (0.72, -0.08, 0), (0.88, 0.28, 0)], [0.17, 0.12, 0.085])
    b.arc(-0.52, -0.02, 0, 0.3, 0.065, 115, tilt=(0, 0, 90))
    b.ring(0, 0.3, 0, 0.34, 0.035, "white" if b.main.min() < 0.7 else "blue")
    b.ball(0, 0.33, 0, 0.32, 0.12, 0.32)
    b.ball(0, 0.52, 0, 0.095, color="dark")
    b.ball(0.9, 0.31, 0, 0.055, 0.04, 0.055, "dark")


def bottle(b):
    h = b.u(0.5, 0.58)
    b.blend = 0.03
    b.cone(0, -0.35, 0, 0.32, 0.32, h, round=0.08)
    b.limb((0, 0.1, 0), (0, 0.5, 0), 0.28, 0.12)
    b.cone(0, 0.6, 0, 0.125, 0.12, 0.2, round=0.02)
    b.cone(0, 0.86, 0, 0.13, 0.13, 0.09, "wood", round=0.03)
    b.ring(0, 0.74, 0, 0.125, 0.03)
    b.cone(0, -0.35, 0, 0.332, 0.332, 0.25, "cream", round=0.01)
    b.ball(0, -0.35, 0.31, 0.12, 0.12, 0.03, "red")


def vase(b):
    b.blend = 0.05
    b.cone(0, -0.75, 0, 0.28, 0.26, 0.06, round=0.03)
    b.ball(0, -0.28, 0, b.u(0.43, 0.5), 0.48, 0.46)
    b.limb((0, 0.0, 0), (0, 0.45, 0), 0.3, 0.15)
    b.cone(0, 0.6, 0, 0.16, 0.3, 0.13, round=0.03)
    b.cone(0, 0.66, 0, 0.1, 0.26, 0.14, "dark", cut=True)
    b.mouth = (0.72, 0.22, 0.25)


def lamp(b):
    b.cone(0, -0.9, 0, 0.38, 0.28, 0.06, "dark", round=0.03)
    b.limb((0, -0.9, 0), (0, 0.3, 0), 0.05, 0.04, "steel")
    b.ball(0, -0.6, 0, 0.15, 0.22, 0.15, "steel")
    low, high = b.u(0.54, 0.62), b.u(0.28, 0.34)
    b.cone(0, 0.42, 0, low, high, 0.34, round=0.02)
    b.cone(0, 0.36, 0, 0.95 * low, 0.93 * high, 0.36, "dark", cut=True)
    b.ball(0, 0.28, 0, 0.17, color="yellow")
    b.shelter = (0.34, -0.96, 0.18, 0.95)


def chair(b):
    w = b.u(0.4, 0.46)
    b.box(0, -0.1, 0, w, 0.06, w, round=0.04)
    for sx in (-1, 1):
        for sz in (-1, 1):
            b.limb((sx * (w - 0.07), -0.12, sz * (w - 0.07)), (sx * (w - 0.04), -0.92, sz * (w - 0.04)), 0.07, 0.05)
        b.limb((sx * (w - 0.07), -0.1, -w + 0.07), (sx * (w - 0.07), 0.86, -w + 0.0), 0.06, 0.055)
    b.box(0, 0.68, -w + 0.02, w, 0.17, 0.04, round=0.035)
    b.box(0, 0.3, -w + 0.04, w - 0.05, 0.06, 0.03, round=0.025)
    b.seat, b.shelter = (0, -0.04, 0.06, w - 0.06), (0, -0.96, 0, 0.76)


def stool(b):
    b.cone(0, 0.35, 0, 0.5, 0.5, 0.08, round=0.06)
    for k in range(3):
        turn = 2 * math.pi * (k + 0.25) / 3
        x, z = math.cos(turn), math.sin(turn)
        b.limb((0.28 * x, 0.3, 0.28 * z), (0.5 * x, -0.75, 0.5 * z), 0.075, 0.055)
    b.ring(0, -0.3, 0, 0.38, 0.035)
    b.seat = (0, 0.43, 0, 0.46)


def table(b):
    w, d = b.u(0.75, 0.95), b.u(0.5, 0.7)
    b.seat, b.shelter = (0, 0.42, 0, 0.9 * min(w, d)), (0, -0.56, 0.08, 0.84)
    if b.chance(0.3):
        b.cone(0, 0.35, 0, w, w, 0.07, round=0.05)
        b.limb((0, -0.5, 0), (0, 0.3, 0), 0.1, 0.09)
        for k in range(3):
            turn = 2 * math.pi * k / 3
            b.limb((0, -0.4, 0), (0.45 * math.cos(turn), -0.54, 0.45 * math.sin(turn)), 0.07, 0.055)
        b.shelter = (0.42, -0.6, 0.15, 0.8)
        return
    b.box(0, 0.35, 0, w, 0.065, d, round=0.04)
    b.box(0, 0.24, 0, w - 0.12, 0.06, d - 0.12, round=0.02)
    for sx in (-1, 1):
        for sz in (-1, 1):
            b.limb((sx * (w - 0.1), 0.28, sz * (d - 0.1)), (sx * (w - 0.08), -0.56, sz * (d - 0.08)), 0.08, 0.055)


def sofa(b):
    b.box(0, -0.15, 0.02, 0.72, 0.14, 0.4, round=0.09)
    b.box(0, 0.22, -0.36, 0.78, 0.36, 0.14, round=0.11)
    for side in (-1, 1):
        b.box(side * 0.82, 0.0, 0.0, 0.14, 0.27, 0.46, round=0.11)
        b.box(side * 0.345, 0.03, 0.08, 0.33, 0.09, 0.34, round=0.07)
        for z in (-0.34, 0.34):
            b.cone(side * 0.78, -0.36, z, 0.05, 0.07, 0.08, "wood", round=0.02)
    b.box(-0.42, 0.27, -0.1, 0.2, 0.2, 0.08, "cream" if b.main.mean() < 0.7 else "blue", round=0.07, tilt=(-18, 0, 12))
    b.seat = (0, 0.12, 0.1, 0.4)


def bed(b):
    b.box(0, -0.3, 0, 0.56, 0.1, 0.9, "wood", round=0.03)
    b.box(0, 0.05, -0.92, 0.6, 0.42, 0.06, "wood", round=0.05)
    b.box(0, -0.15, 0.92, 0.6, 0.25, 0.05, "wood", round=0.05)
    b.box(0, -0.12, 0, 0.54, 0.12, 0.88, "white", round=0.07)
    b.box(0, -0.06, 0.28, 0.57, 0.12, 0.6, round=0.08)
    b.box(0, 0.06, -0.3, 0.56, 0.025, 0.09, "cream", round=0.02)
    for side in (-1, 1):
        b.box(side * 0.26, 0.08, -0.66, 0.22, 0.08, 0.15, "white", round=0.075)
        for z in (-0.88, 0.88):
            b.cone(side * 0.5, -0.48, z, 0.05, 0.06, 0.1, "wood", round=0.02)
    b.seat = (0, 0.07, 0.3, 0.42)


def bathtub(b):
    b.box(0, 0, 0, 0.82, 0.32, 0.42, round=0.2, top=(1.12, 1.12))
    b.box(0, 0.15, 0, 0.7, 0.36, 0.33, "dark", round=0.15, top=(1.15, 1.15), cut=True)
    b.box(0, 0.15, 0, 0.76, 0.03, 0.37, "cyan", round=0.03)
    for x in (-0.62, 0.62):
        for z in (-0.26, 0.26):
            b.limb((x, -0.26, z), (1.12 * x, -0.45, 1.2 * z), 0.075, 0.055, "yellow")
    b.path([(-0.8, 0.25, 0), (-0.8, 0.52, 0), (-0.62, 0.54, 0), (-0.6, 0.44, 0)], [0.045, 0.045, 0.045, 0.04], "steel")
    for x, z, r in ((0.4, 0.1, 0.15), (0.58, -0.12, 0.13), (0.25, -0.16, 0.13), (0.45, -0.05, 0.17)):
        b.ball(x, 0.21, z, r, color="white")
    b.mouth = (0.24, 0.33, 0.12)


def bowl(b):
    r = b.u(0.72, 0.82)
    b.ball(0, 0.15, 0, r, 0.62, r)
    b.box(0, 0.75, 0, 2, 0.6, 2, "dark", round=0, cut=True)
    b.ball(0, 0.2, 0, 0.9 * r, 0.56, 0.9 * r, "dark", cut=True)
    b.ring(0, 0.14, 0, 0.96 * r, 0.04)
    b.cone(0, -0.47, 0, 0.36, 0.3, 0.06, round=0.03)
    b.mouth = (0.16, 0.62 * r, 0.36)


def basket(b):
    b.cone(0, -0.35, 0, 0.48, 0.62, 0.36, round=0.04)
    b.cone(0, -0.15, 0, 0.46, 0.56, 0.4, "dark", cut=True)
    for k in range(5):
        b.ring(0, -0.64 + 0.15 * k, 0, 0.505 + 0.033 * k, 0.035, "wood" if b.main.mean() > 0.4 else "tan")
    b.ring(0, 0.0, 0, 0.6, 0.06)
    b.arc(0, -0.05, 0, 0.6, 0.05, 88, "wood" if b.main.mean() > 0.4 else "tan")
    b.mouth = (-0.02, 0.48, 0.3)


def bucket(b):
    b.cone(0, -0.1, 0, 0.42, 0.56, 0.52, round=0.02)
    b.cone(0, 0.05, 0, 0.4, 0.51, 0.52, "dark", cut=True)
    b.ring(0, 0.42, 0, 0.55, 0.04, "steel" if b.main.std() > 0.05 else "dark")
    b.arc(0, 0.4, 0.12, 0.58, 0.028, 90, "dark", tilt=(15, 0, 0))
    b.limb((-0.1, 0.98, 0.27), (0.1, 0.98, 0.27), 0.055, 0.055, "wood")
    b.mouth = (0.4, 0.44, 0.25)


def barrel(b):
    b.blend = 0.0
    b.ball(0, 0, 0, 0.62, 1.3, 0.62)
    b.box(0, 1.15, 0, 2, 0.5, 2, "dark", round=0, cut=True)
    b.box(0, -1.15, 0, 2, 0.5, 2, "dark", round=0, cut=True)
    for y in (-0.5, -0.2, 0.2, 0.5):
        b.cone(
            0,
            y,
            0,
            0.635 * math.sqrt(1 - (y / 1.3) ** 2),
            0.635 * math.sqrt(1 - (y / 1.3) ** 2),
            0.045,
            "steel",
            round=0.01,
        )
    for k in range(12):
        turn = 2 * math.pi * k / 12
        b.path(
            [
                (0.55 * math.cos(turn), -0.6, 0.55 * math.sin(turn)),
                (0.618 * math.cos(turn), 0, 0.618 * math.sin(turn)),
                (0.55 * math.cos(turn), 0.6, 0.55 * math.sin(turn)),
            ],
            [0.012, 0.012, 0.012],
            "dark",
        )
    b.seat = (0, 0.65, 0, 0.5)


def umbrella(b):
    r = b.u(0.85, 0.92)
    b.ball(0, 0.2, 0, r, 0.55, r)
    b.ball(0, 0.02, 0, 0.99 * r, 0.56, 0.99 * r, "dark", cut=True)
    for k in range(8):
        turn = 2 * math.pi * (k + 0.5) / 8
        b.ball(r * math.cos(turn), 0.12, r * math.sin(turn), 0.26, 0.24, 0.26, "dark", cut=True)
    b.limb((0, -0.95, 0), (0, 0.85, 0), 0.035, 0.03, "wood")
    b.arc(0.12, -0.95, 0, 0.12, 0.04, 90, "wood", tilt=(0, 0, 180))
    b.shelter = (0.3, -1.1, 0.1, 1.05)


def candle(b):
    h = b.u(0.42, 0.6)
    b.cone(0, -0.62, 0, 0.5, 0.46, 0.05, "steel", round=0.03)
    b.ring(0, -0.58, 0, 0.46, 0.045, "steel")
    b.ring(0.56, -0.55, 0, 0.13, 0.04, "steel", tilt=(90, 0, 0))
    b.cone(0, h - 0.58, 0, 0.22, 0.2, h, round=0.03)
    top = 2 * h - 0.58
    for k, drop in enumerate((0.35, 0.2, 0.28)):
        turn = 2.2 * k
        b.limb(
            (0.19 * math.cos(turn), top - 0.04, 0.19 * math.sin(turn)),
            (0.21 * math.cos(turn), top - drop, 0.21 * math.sin(turn)),
            0.04,
            0.05,
        )
    b.limb((0, top, 0), (0, top + 0.1, 0), 0.02, 0.02, "dark")
    b.limb((0, top + 0.18, 0), (0, top + 0.42, 0), 0.1, 0.02, "orange")
    b.ball(0, top + 0.17, 0.04, 0.06, 0.09, 0.08, "yellow")


def pan(b):
    b.cone(0, 0, 0, 0.6, 0.7, 0.13, round=0.03)
    b.cone(0, 0.08, 0, 0.56, 0.64, 0.13, "dark", cut=True)
    b.path(
        [(0.62, 0.04, 0), (0.95, 0.12, 0), (1.4, 0.14, 0)],
        [0.05, 0.06, 0.08],
        "dark" if b.main.mean() > 0.3 else "wood",
    )
    for k in range(5):
        turn = 2 * math.pi * k / 5
        b.ball(0.14 * math.cos(turn) - 0.05, -0.03, 0.14 * math.sin(turn), 0.24, 0.04, 0.24, "white")
    b.ball(-0.05, 0.0, 0, 0.17, 0.09, 0.17, "yellow")


def trophy(b):
    b.box(0, -0.82, 0, 0.32, 0.13, 0.32, "dark", round=0.03)
    b.cone(0, -0.62, 0, 0.26, 0.12, 0.07, round=0.03)
    b.limb((0, -0.6, 0), (0, -0.1, 0), 0.09, 0.1)
    b.blend = 0.03
    b.ball(0, 0.32, 0, 0.46, 0.52, 0.46)
    b.box(0, 0.95, 0, 1, 0.45, 1, "dark", round=0, cut=True)
    b.ball(0, 0.42, 0, 0.38, 0.44, 0.38, "dark", cut=True)
    for side in (-1, 1):
        b.arc(side * 0.44, 0.24, 0, 0.2, 0.05, 115, tilt=(0, 0, -side * 90))
    b.ball(0, 0.25, 0.44, 0.12, 0.12, 0.04, "red" if b.main[0] < 0.6 or b.main[1] > 0.5 else "white")


RECIPES = (
    mug, teapot, bottle, vase, lamp, chair, stool, table, sofa, bed, bathtub, bowl, basket, bucket, barrel, umbrella,
    candle, pan, trophy,
)  # fmt: skip
