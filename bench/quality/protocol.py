"""Prompts, views and sizes that every measurement of quality shares. They were fixed before any setting was tuned."""

import torch

from dream_fast.engine.scene.camera import Cameras, make_cameras

PROMPTS = (
    "a hamburger", "a red robot", "a yellow duck", "a blue car", "a snowman", "a green cactus", "a pink pig",
    "a purple mug", "a brown bear", "a white rabbit", "an orange cat", "a red mushroom", "a pineapple", "a cyan teapot",
    "a blue house", "a black penguin",
)  # fmt: skip
HELD_OUT = (
    "a donut", "a purple owl", "a red truck", "a yellow dog", "a green frog", "a pink cupcake", "a lighthouse",
    "a blue fish", "a gray cat", "a white robot", "an orange bear", "a brown chair", "a cyan vase", "a black hat",
    "a red apple", "a green turtle",
)  # fmt: skip
ATTRIBUTED = (  # with a part or pattern; the other measures leave them out
    "a striped mug", "a spotted cat", "a striped vase", "a spotted mushroom", "a tall robot", "a wide house",
    "a snowman with a red hat", "a bear with a blue hat",
)  # fmt: skip
AZIMUTHS, SIZE = 8, 128  # views around the object for the classifier, and their pixels
FRONT, BEHIND, BACK = 0, (3, 4, 5), 4  # of the azimuths 0, 45, ... 315: the front, those from behind, the back
BACKGROUND = 0.75
SIDES = ((90.0, 0.0), (90.0, 90.0), (90.0, 180.0), (90.0, -90.0))  # (polar, azimuth): front, right, back, left
SHAPE_SIZE = 256  # pixels of the views that shapes are measured in
RADIUS, FOVY = 3.2, 23.0


def sides(device: torch.device | str) -> Cameras:
    """The four cameras of SIDES."""
    angles = torch.tensor(SIDES, device=device)
    full = torch.ones(len(SIDES), device=device)
    return make_cameras(angles[:, 0], angles[:, 1], RADIUS * full, FOVY * full)
