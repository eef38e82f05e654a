"""Household things; handles and spouts point to the side (+x)."""

import math


def mug(b):
    h, r = b.u(0.5, 0.6), b.u(0.42, 0.5)
    b.cone(0, 0, 0, r, r, h, round=0.04)
    b.cone(0, 0.14, 0, 0.84 * r, 0.84 * r, h, "dark", cut=True)
    b.ring(r + 0.08, 0, 0, 0.26, 0.075, tilt=(90, 0, 0))


def teapot(b):
    b.ball(0, -0.1, 0, 0.58, b.u(0.46, 0.52), 0.58)
    b.ball(0, 0.33, 0, 0.32, 0.12, 0.32)
    b.ball(0, 0.5, 0, 0.09, color="dark")
    b.limb((0.4, -0.2, 0), (0.85, 0.28, 0), 0.15, 0.08)
    b.ring(-0.6, -0.05, 0, 0.27, 0.065, tilt=(90, 0, 0))
    b.cone(0, -0.54, 0, 0.34, 0.3, 0.05)


def bottle(b):
    b.cone(0, -0.35, 0, 0.32, 0.32, b.u(0.5, 0.6), round=0.06)
    b.ball(0, 0.18, 0, 0.31, 0.25, 0.31)
    b.cone(0, 0.5, 0, 0.13, 0.11, 0.28)
    b.cone(0, 0.82, 0, 0.13, 0.13, 0.08, "wood")
    b.cone(0, -0.35, 0, 0.332, 0.332, 0.25, "cream", round=0)


def vase(b):
    b.cone(0, -0.75, 0, 0.28, 0.26, 0.06)
    b.ball(0, -0.25, 0, b.u(0.45, 0.52), 0.52, 0.48)
    b.cone(0, 0.32, 0, 0.26, 0.18, 0.25)
    b.cone(0, 0.62, 0, 0.17, 0.32, 0.1)
    if b.u(0, 1) < 0.5:
        for k in range(3):
            turn = 2.1 * k
            x, z = 0.2 * math.cos(turn), 0.2 * math.sin(turn)
            b.limb((0.3 * x, 0.5, 0.3 * z), (x, 1.0, z), 0.03, 0.03, "leaf")
            b.ball(x, 1.06, z, 0.13, color=("red", "yellow", "pink")[k])


def lamp(b):
    b.cone(0, -0.9, 0, 0.36, 0.3, 0.05, "dark")
    b.limb((0, -0.9, 0), (0, 0.2, 0), 0.05, 0.05, "steel")
    b.cone(0, 0.42, 0, b.u(0.52, 0.6), b.u(0.28, 0.34), 0.32)
    b.ball(0, 0.12, 0, 0.14, color="yellow")


def chair(b):
    w = b.u(0.4, 0.46)
    b.box(0, -0.1, 0, w, 0.06, w, round=0.02)
    for sx in (-1, 1):
        for sz in (-1, 1):
            b.box(sx * (w - 0.07), -0.52, sz * (w - 0.07), 0.06, 0.4, 0.06, round=0.01)
        b.box(sx * (w - 0.07), 0.4, -w + 0.06, 0.06, 0.48, 0.05, round=0.01)
    b.box(0, 0.65, -w + 0.06, w, 0.2, 0.04, round=0.02)
    b.box(0, 0.25, -w + 0.06, w, 0.06, 0.04, round=0.01)


def table(b):
    w, d = b.u(0.75, 0.95), b.u(0.5, 0.75)
    if b.u(0, 1) < 0.3:
        b.cone(0, 0.35, 0, w, w, 0.06)
        b.limb((0, -0.5, 0), (0, 0.3, 0), 0.1, 0.1)
        b.cone(0, -0.52, 0, 0.42, 0.3, 0.05)
        return
    b.box(0, 0.35, 0, w, 0.06, d, round=0.02)
    for sx in (-1, 1):
        for sz in (-1, 1):
            b.box(sx * (w - 0.1), -0.12, sz * (d - 0.1), 0.07, 0.44, 0.07, round=0.01)


def hat(b):
    b.cone(0, -0.35, 0, 0.9, 0.9, 0.05, round=0.03)
    b.cone(0, 0.1, 0, 0.5, b.u(0.46, 0.56), b.u(0.42, 0.55), round=0.04)
    b.cone(0, -0.2, 0, 0.53, 0.53, 0.09, "red" if b.main[0] < 0.6 or b.main[1] > 0.5 else "white")


def umbrella(b):
    r = b.u(0.85, 0.95)
    b.ball(0, 0.2, 0, r, 0.55, r)
    b.ball(0, 0.02, 0, 0.99 * r, 0.5, 0.99 * r, "dark", cut=True)
    b.cone(0, 0.8, 0, 0.03, 0.02, 0.1, "wood")
    b.ring(0.12, -0.92, 0, 0.12, 0.04, "wood", tilt=(90, 0, 0))
    b.cone(0, -0.1, 0, 0.04, 0.04, 0.82, "wood")


def candle(b):
    h = b.u(0.45, 0.65)
    b.cone(0, -0.62, 0, 0.5, 0.46, 0.06, "steel")
    b.ring(0.52, -0.55, 0, 0.14, 0.04, "steel", tilt=(90, 0, 0))
    b.cone(0, h - 0.58, 0, 0.22, 0.2, h, round=0.02)
    top = 2 * h - 0.58
    b.limb((0, top, 0), (0, top + 0.1, 0), 0.02, 0.02, "dark")
    b.ball(0, top + 0.24, 0, 0.09, 0.17, 0.09, "orange")
    b.ball(0, top + 0.2, 0.02, 0.06, 0.11, 0.08, "yellow")


def drum(b):
    r, h = b.u(0.6, 0.7), b.u(0.35, 0.48)
    b.cone(0, 0, 0, r, r, h)
    for side in (-1, 1):
        b.cone(0, side * h, 0, 1.05 * r, 1.05 * r, 0.07, "steel")
    b.cone(0, h + 0.06, 0, 0.95 * r, 0.95 * r, 0.03, "cream")
    for side in (-1, 1):
        b.limb((side * 0.5, h + 0.14, -0.3), (side * -0.1, h + 0.18, 0.4), 0.035, 0.035, "wood")
        b.ball(side * -0.1, h + 0.18, 0.42, 0.07, color="wood")


RECIPES = (mug, teapot, bottle, vase, lamp, chair, table, hat, umbrella, candle, drum)
