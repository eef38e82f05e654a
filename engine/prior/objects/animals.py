"""Things with a face, which looks towards +z, and the fish."""

import math


def _feet(b, y, z, dx, size, color="main"):
    for side in (-1, 1):
        b.ball(side * dx, y, z, size, 0.6 * size, 1.5 * size, color)


def _four_legs(b, y0, y1, dx, dz, radius, color="main"):
    for sx in (-1, 1):
        for sz in (-1, 1):
            b.limb((sx * dx, y1, sz * dz), (sx * dx, y0, sz * dz), radius, radius, color)


def snowman(b):
    b.ball(0, -0.65, 0, 0.62, 0.56, 0.62)
    b.ball(0, 0.15, 0, 0.46)
    b.ball(0, 0.75, 0, 0.33)
    b.eyes(0.84, 0.28, 0.12, 0.06)
    b.limb((0, 0.73, 0.25), (0, 0.7, 0.65), 0.08, 0.02, "orange")
    for y in (0.0, 0.18, 0.36):
        b.ball(0, y, 0.45, 0.055, color="dark")
    for side in (-1, 1):
        b.limb((side * 0.4, 0.25, 0), (side * 0.85, b.u(0.4, 0.6), 0.05), 0.035, 0.03, "wood")
    if b.u(0, 1) < 0.6:
        b.ring(0, 0.48, 0, 0.3, 0.08, ("red", "blue", "green")[int(b.u(0, 3))])
    b.head = (0, 1.02, 0, 0.3)


def robot(b):
    b.box(0, -0.1, 0, 0.42, 0.45, 0.3, round=0.04)
    b.box(0, 0.66, 0, 0.32, 0.26, 0.26, round=0.04)
    b.cone(0, 0.38, 0, 0.12, 0.12, 0.08, "dark")
    for side in (-1, 1):
        b.ball(side * 0.14, 0.7, 0.27, 0.08, color="yellow")
        b.limb((side * 0.5, 0.2, 0), (side * 0.6, -0.35, 0.08), 0.1, 0.1)
        b.ball(side * 0.61, -0.45, 0.09, 0.13, color="dark")
        b.cone(side * 0.2, -0.72, 0, 0.12, 0.12, 0.2, "dark")
        b.box(side * 0.2, -0.95, 0.06, 0.16, 0.07, 0.24, round=0.03)
    b.box(0, 0.52, 0.27, 0.16, 0.03, 0.02, "dark", round=0)
    b.box(0, 0.0, 0.31, 0.24, 0.16, 0.02, "cyan", round=0.01)
    b.limb((0, 0.9, 0), (0, 1.08, 0), 0.025, 0.025, "dark")
    b.ball(0, 1.12, 0, 0.07, color="red")
    b.head = (0, 0.94, 0, 0.28)


def duck(b):
    b.ball(0, -0.25, -0.05, 0.5, 0.42, 0.68)
    b.ball(0, 0.4, 0.35, 0.36)
    b.limb((0, -0.1, 0.3), (0, 0.3, 0.35), 0.3, 0.24)
    b.ball(0, 0.33, 0.74, 0.17, 0.07, 0.2, "beak")
    b.eyes(0.52, 0.62, 0.17, 0.06)
    b.ball(0, 0.0, -0.68, 0.16, 0.12, 0.24, tilt=(35, 0, 0))
    for side in (-1, 1):
        b.ball(side * 0.46, -0.18, -0.1, 0.12, 0.24, 0.4)
    b.head = (0, 0.72, 0.33, 0.26)


def penguin(b):
    b.ball(0, -0.15, 0, 0.5, 0.75, 0.46)
    b.ball(0, -0.2, 0.12, 0.42, 0.62, 0.4, "white")
    b.ball(0, 0.62, 0.02, 0.36, 0.34, 0.36)
    for side in (-1, 1):
        b.ball(side * 0.13, 0.62, 0.24, 0.15, 0.18, 0.14, "white")
        b.ball(side * 0.12, 0.67, 0.37, 0.05, color="dark")
        b.ball(side * 0.53, -0.1, 0, 0.1, 0.45, 0.2, tilt=(0, 0, side * 18))
    b.limb((0, 0.55, 0.34), (0, 0.52, 0.58), 0.09, 0.03, "beak")
    _feet(b, -0.88, 0.2, 0.22, 0.16, "beak")
    b.head = (0, 0.92, 0, 0.28)


def rabbit(b):
    b.ball(0, -0.4, -0.05, 0.42, 0.5, 0.42)
    b.ball(0, 0.28, 0.1, 0.34, 0.32, 0.34)
    length = b.u(0.36, 0.46)
    for side in (-1, 1):
        b.ball(side * 0.15, 0.55 + length, 0.02, 0.1, length, 0.08, tilt=(0, 0, side * -9))
        b.ball(side * 0.15, 0.55 + length, 0.08, 0.05, 0.75 * length, 0.04, "rose", tilt=(0, 0, side * -9))
        b.ball(side * 0.18, -0.3, 0.36, 0.1, 0.22, 0.12)
    b.ball(0, -0.4, 0.16, 0.28, 0.36, 0.26, "white")
    b.eyes(0.36, 0.38, 0.15, 0.06)
    b.ball(0, 0.2, 0.4, 0.15, 0.11, 0.1, "white")
    b.ball(0, 0.27, 0.48, 0.055, color="rose")
    _feet(b, -0.84, 0.22, 0.22, 0.15)
    b.ball(0, -0.55, -0.5, 0.16, color="white")


def cat(b):
    b.ball(0, -0.15, -0.2, 0.3, 0.3, 0.55)
    b.ball(0, 0.3, 0.42, 0.32, 0.29, 0.28)
    for side in (-1, 1):
        b.cone(side * 0.2, 0.62, 0.42, 0.13, 0.01, 0.14, tilt=(0, 0, side * -12))
        for k in (-0.02, 0.04):
            b.limb((side * 0.1, 0.2 + k, 0.68), (side * 0.4, 0.18 + 2 * k, 0.68), 0.012, 0.012, "white")
    b.eyes(0.37, 0.66, 0.13, 0.06)
    b.ball(0, 0.2, 0.68, 0.12, 0.08, 0.07, "white")
    b.ball(0, 0.26, 0.73, 0.045, 0.035, 0.035, "rose")
    _four_legs(b, -0.72, -0.2, 0.18, 0.32, 0.1)
    b.limb((0, -0.05, -0.7), (0, 0.3, -0.95), 0.08, 0.07)
    b.limb((0, 0.28, -0.93), (0, 0.65, -0.85), 0.07, 0.05)
    b.head = (0, 0.57, 0.42, 0.24)


def dog(b):
    b.ball(0, -0.1, -0.2, 0.33, 0.32, 0.58)
    b.ball(0, 0.35, 0.42, 0.31, 0.3, 0.3)
    b.ball(0, 0.25, 0.74, 0.17, 0.14, 0.24, "cream")
    b.ball(0, 0.32, 0.95, 0.075, color="dark")
    b.eyes(0.45, 0.68, 0.13, 0.055)
    for side in (-1, 1):
        b.ball(side * 0.33, 0.25, 0.38, 0.08, 0.25, 0.15, "patty")
    _four_legs(b, -0.8, -0.1, 0.2, 0.36, 0.11)
    b.limb((0, 0.05, -0.72), (0, 0.42, -1.0), 0.07, 0.05)
    b.ball(0, 0.02, 0.55, 0.06, 0.05, 0.05, "red")
    b.head = (0, 0.63, 0.4, 0.24)


def bear(b):
    b.ball(0, -0.3, 0, 0.48, 0.52, 0.42)
    b.ball(0, -0.3, 0.18, 0.32, 0.36, 0.28, "cream")
    b.ball(0, 0.45, 0.04, 0.4, 0.36, 0.36)
    b.ball(0, 0.36, 0.36, 0.19, 0.15, 0.14, "cream")
    b.ball(0, 0.42, 0.49, 0.065, color="dark")
    b.eyes(0.56, 0.34, 0.16, 0.055)
    for side in (-1, 1):
        b.ball(side * 0.32, 0.75, 0.02, 0.14, 0.14, 0.09)
        b.ball(side * 0.32, 0.75, 0.09, 0.08, 0.08, 0.05, "cream")
        b.limb((side * 0.42, 0.0, 0.05), (side * 0.62, -0.38, 0.2), 0.15, 0.14)
        b.limb((side * 0.26, -0.65, 0.05), (side * 0.34, -0.78, 0.42), 0.18, 0.17)
    b.head = (0, 0.8, 0.02, 0.27)


def pig(b):
    b.ball(0, -0.05, -0.15, 0.45, 0.42, 0.62)
    b.ball(0, 0.15, 0.5, 0.34, 0.33, 0.3)
    b.cone(0, 0.08, 0.82, 0.15, 0.14, 0.07, "rose", round=0.03, tilt=(90, 0, 0))
    for side in (-1, 1):
        b.ball(side * 0.06, 0.08, 0.9, 0.03, color="dark")
        b.ball(side * 0.23, 0.46, 0.48, 0.11, 0.14, 0.05, tilt=(0, 0, side * -25))
    b.eyes(0.26, 0.76, 0.15, 0.05)
    _four_legs(b, -0.68, -0.2, 0.24, 0.32, 0.12)
    b.ring(0, 0.1, -0.8, 0.08, 0.035, tilt=(0, 0, 90))
    b.head = (0, 0.46, 0.48, 0.25)


def owl(b):
    b.ball(0, -0.15, 0, 0.5, 0.65, 0.44)
    b.ball(0, 0.42, 0.02, 0.42, 0.36, 0.38)
    b.ball(0, -0.25, 0.18, 0.36, 0.46, 0.32, "cream")
    for side in (-1, 1):
        b.ball(side * 0.17, 0.47, 0.32, 0.17, 0.17, 0.1, "white")
        b.ball(side * 0.16, 0.47, 0.41, 0.075, color="dark")
        b.cone(side * 0.27, 0.82, 0, 0.1, 0.01, 0.15, tilt=(0, 0, side * -20))
        b.ball(side * 0.5, -0.15, -0.02, 0.11, 0.45, 0.26, tilt=(0, 0, side * 10))
    b.limb((0, 0.36, 0.38), (0, 0.28, 0.5), 0.07, 0.02, "beak")
    _feet(b, -0.8, 0.18, 0.18, 0.1, "beak")


def frog(b):
    b.ball(0, -0.15, -0.1, 0.52, 0.36, 0.58)
    b.ball(0, 0.1, 0.3, 0.44, 0.28, 0.36)
    b.ball(0, -0.22, 0.2, 0.4, 0.24, 0.4, "cream")
    for side in (-1, 1):
        b.ball(side * 0.24, 0.38, 0.35, 0.15)
        b.ball(side * 0.24, 0.4, 0.46, 0.08, color="white")
        b.ball(side * 0.24, 0.4, 0.52, 0.045, color="dark")
        b.ball(side * 0.5, -0.25, -0.25, 0.18, 0.26, 0.36)
        b.ball(side * 0.55, -0.48, 0.05, 0.14, 0.05, 0.22)
        b.limb((side * 0.36, -0.1, 0.35), (side * 0.4, -0.46, 0.52), 0.09, 0.09)
    b.box(0, 0.04, 0.62, 0.22, 0.015, 0.05, "dark", round=0.01)
    b.head = (0, 0.36, 0.25, 0.24)


def fish(b):
    b.ball(0, 0, 0.1, 0.24, 0.42, 0.66)
    for s in (-1, 1):
        b.ball(0, s * 0.2, -0.72, 0.05, 0.12, 0.32, tilt=(s * 35, 0, 0))
        b.ball(s * 0.2, 0.12, 0.48, 0.09, color="white")
        b.ball(s * 0.25, 0.12, 0.52, 0.055, color="dark")
        b.ball(s * 0.3, -0.1, 0.1, 0.16, 0.04, 0.12, tilt=(0, 0, s * -30))
    b.ball(0, 0.42, 0.0, 0.04, 0.18, 0.32)
    b.ball(0, -0.06, 0.74, 0.09, 0.06, 0.05, "rose")


def turtle(b):
    b.ball(0, 0.05, 0, 0.6, 0.42, 0.7)
    b.cone(0, -0.08, 0, 0.66, 0.6, 0.06, "cream", round=0.04)
    b.ball(0, 0.1, 0.9, 0.22, 0.2, 0.24, "lettuce")
    b.limb((0, -0.05, 0.55), (0, 0.05, 0.85), 0.13, 0.13, "lettuce")
    b.eyes(0.2, 1.07, 0.1, 0.045)
    for sx in (-1, 1):
        for sz in (-1, 1):
            b.ball(sx * 0.5, -0.22, sz * 0.45, 0.16, 0.14, 0.2, "lettuce")
    b.ball(0, -0.1, -0.76, 0.07, 0.05, 0.14, "lettuce")
    for k in range(6):
        turn = 2 * math.pi * k / 6
        b.ball(0.36 * math.cos(turn), 0.33, 0.42 * math.sin(turn), 0.13, 0.07, 0.13, "leaf")
    b.ball(0, 0.44, 0, 0.16, 0.06, 0.16, "leaf")


RECIPES = (snowman, robot, duck, penguin, rabbit, cat, dog, bear, pig, owl, frog, fish, turtle)
