"""Things to eat."""

import math


def hamburger(b):
    r, bun = b.u(0.9, 1.05), b.u(0.22, 0.3)
    b.cone(0, -0.42, 0, 0.92 * r, r, bun * 0.6, round=0.1)
    b.cone(0, -0.16, 0, 1.04 * r, 1.04 * r, 0.11, "patty", round=0.06)
    b.box(0, -0.03, 0, 0.78 * r, 0.025, 0.78 * r, "yellow", tilt=(0, b.u(0, 90), 0))
    b.cone(0, 0.05, 0, 1.1 * r, 1.1 * r, 0.05, "lettuce", round=0.04)
    if b.u(0, 1) < 0.6:
        b.cone(0, 0.13, 0, 0.95 * r, 0.95 * r, 0.05, "red", round=0.03)
    top = b.u(0.5, 0.65)
    b.ball(0, 0.17, 0, r, top, r)
    for _ in range(12):
        turn, out = b.u(0, 2 * math.pi), b.u(0.05, 0.7)
        height = 0.17 + top * math.sqrt(1 - out**2)
        b.ball(r * out * math.cos(turn), height, r * out * math.sin(turn), 0.045, 0.03, 0.045, "cream")


def donut(b):
    thick = b.u(0.3, 0.38)
    tilt = (b.u(50, 75), 0, 0) if b.u(0, 1) < 0.3 else (0, 0, 0)
    b.ring(0, 0, 0, 0.7, thick, "tan", tilt)
    axis = (math.cos(math.radians(tilt[0])), math.sin(math.radians(tilt[0])))
    lift = 0.09
    b.ring(0, lift * axis[0], lift * axis[1], 0.7, thick * 0.93, "main", tilt)
    for _ in range(12):
        turn, out = b.u(0, 2 * math.pi), 0.7 + b.u(-0.14, 0.14)
        x, up, z = out * math.cos(turn), lift + thick * 0.88, out * math.sin(turn)
        y, z = up * axis[0] - z * axis[1], up * axis[1] + z * axis[0]
        b.ball(x, y, z, 0.05, color=("red", "yellow", "cyan", "white")[int(b.u(0, 4))])


def ice_cream_cone(b):
    b.cone(0, -0.55, 0, 0.06, 0.42, 0.65, "tan", round=0.02)
    b.ring(0, 0.1, 0, 0.4, 0.07, "tan")
    r = b.u(0.46, 0.54)
    b.ball(0, 0.35, 0, r)
    if b.u(0, 1) < 0.5:
        b.ball(0, 0.35 + 0.75 * r, 0, 0.75 * r)
    if b.u(0, 1) < 0.5:
        b.ball(0, 0.35 + 1.55 * r, 0, 0.12, color="red")


def cupcake(b):
    b.cone(0, -0.4, 0, 0.48, 0.68, 0.36, ("tan", "brown", "steel")[int(b.u(0, 3))], round=0.03)
    b.ball(0, 0.05, 0, 0.78, 0.3, 0.78)
    b.ball(0, 0.28, 0, 0.58, 0.26, 0.58)
    b.ball(0, 0.48, 0, 0.36, 0.24, 0.36)
    b.ball(0, 0.74, 0, 0.14, color="red")


def cake(b):
    b.cone(0, -0.62, 0, 1.15, 1.15, 0.03, "white")
    b.cone(0, -0.3, 0, 0.95, 0.95, 0.3, round=0.05)
    b.cone(0, 0.0, 0, 0.97, 0.97, 0.05, "white", round=0.03)
    if b.u(0, 1) < 0.6:
        b.cone(0, 0.2, 0, 0.62, 0.62, 0.22, round=0.05)
        b.cone(0, 0.42, 0, 0.64, 0.64, 0.04, "white", round=0.03)
        top, ring = 0.45, 0.4
    else:
        top, ring = 0.05, 0.65
    for k in range(5):
        turn = 2 * math.pi * k / 5
        x, z = ring * math.cos(turn), ring * math.sin(turn)
        b.cone(x, top + 0.18, z, 0.045, 0.045, 0.18, "cyan")
        b.ball(x, top + 0.43, z, 0.05, 0.09, 0.05, "yellow")


def apple(b):
    r = b.u(0.6, 0.68)
    b.ball(0, 0.06, 0, r, 0.88 * r, r)
    b.ball(0, -0.22, 0, 0.72 * r, 0.62 * r, 0.72 * r)
    b.ball(0, 0.72 * r + 0.2, 0, 0.2, 0.14, 0.2, "dark", cut=True)
    b.limb((0, 0.3, 0), (b.u(-0.1, 0.1), 0.9, 0), 0.045, 0.06, "wood")
    b.ball(0.22, 0.82, 0, 0.22, 0.05, 0.12, "leaf", tilt=(0, 0, 25))


def pear(b):
    b.ball(0, -0.3, 0, 0.6, 0.55, 0.6)
    b.limb((0, -0.2, 0), (0, 0.45, 0), 0.52, 0.28)
    b.ball(0, 0.45, 0, 0.29, 0.27, 0.29)
    b.limb((0, 0.6, 0), (b.u(-0.1, 0.1), 0.95, 0), 0.04, 0.05, "wood")
    b.ball(0.2, 0.82, 0, 0.2, 0.05, 0.11, "leaf", tilt=(0, 0, 25))


def carrot(b):
    b.cone(0, -0.2, 0, 0.06, b.u(0.26, 0.34), 0.75, round=0.05)
    b.ball(0, 0.52, 0, 0.28, 0.16, 0.28)
    for k in range(5):
        turn = 2 * math.pi * k / 5
        b.limb((0, 0.55, 0), (0.26 * math.cos(turn), 1.05, 0.26 * math.sin(turn)), 0.05, 0.09, "leaf")


def mushroom(b):
    b.limb((0, -0.75, 0), (0, 0.1, 0), b.u(0.26, 0.32), 0.22, "cream")
    r = b.u(0.72, 0.85)
    b.ball(0, 0.08, 0, r, 0.62, r)
    b.ball(0, -0.38, 0, 0.97 * r, 0.42, 0.97 * r, "cream", cut=True)
    for k in range(9):
        turn, out = 2.4 * k, 0.25 + 0.55 * (k % 3) / 2
        height = 0.08 + 0.62 * math.sqrt(max(0.0, 1 - out**2))
        b.ball(r * out * math.cos(turn), height, r * out * math.sin(turn), 0.12, 0.08, 0.12, "white")


def pumpkin(b):
    for k in range(8):
        turn = 2 * math.pi * k / 8
        b.ball(0.36 * math.cos(turn), 0, 0.36 * math.sin(turn), 0.42, b.u(0.5, 0.56), 0.42)
    b.limb((0, 0.35, 0), (0.08, 0.78, 0), 0.11, 0.08, "leaf")


def pineapple(b):
    b.ball(0, -0.2, 0, 0.5, b.u(0.68, 0.78), 0.5)
    for level in range(2):
        for k in range(6):
            turn = 2 * math.pi * (k + 0.5 * level) / 6
            out, up = 0.42 - 0.22 * level, 0.95 + 0.2 * level
            b.limb((0, 0.4, 0), (out * math.cos(turn), up, out * math.sin(turn)), 0.12, 0.03, "leaf")


RECIPES = (hamburger, donut, ice_cream_cone, cupcake, cake, apple, pear, carrot, mushroom, pumpkin, pineapple)
