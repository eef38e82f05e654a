"""The classifier of results: its accuracy, its training, its scores, and that it can be wrong."""

import json

import numpy as np
import pytest
import torch

from dream_fast.bench.accuracy import check
from dream_fast.bench.quality.classifier import (
    SECTORS,
    SIZE,
    WEIGHTS,
    Classifier,
    Predictions,
    classify,
    load_classifier,
    prior,
)
from dream_fast.bench.quality.classifier import train as classifier_train
from dream_fast.bench.quality.classifier.train import UNNAMED, Examples, accuracy, confusion, disturb
from dream_fast.bench.quality.run import AZIMUTHS, assess, expected_classes
from dream_fast.engine.dream_mini import dataset
from dream_fast.engine.dream_mini.dataset import NATURAL, Views
from dream_fast.engine.dream_mini.scenes import make_scene
from dream_fast.engine.dream_mini.sphere_tracer import pack, render
from dream_fast.engine.dream_mini.vocabulary import COLORS, THINGS, VIEWS
from dream_fast.engine.scene.camera import make_cameras

OBJECTS, SHADES = list(THINGS), list(COLORS)


@pytest.fixture(scope="module")
def classifier():
    return load_classifier()


def render_things(names: list[tuple[str, str | None]], azimuth: float) -> torch.Tensor:
    """Images [N, 3, 64, 64] of objects of the procedural world, from a seed that was not used for training."""
    scenes = [make_scene(np.random.default_rng(7), name, color, plain=True) for name, color in names]
    n = len(scenes)
    cameras = make_cameras(*(torch.full((n,), angle) for angle in (75.0, azimuth, 3.2, 22.0)))
    ones = torch.ones(n)
    images = render(
        pack(scenes, "cpu"), cameras, 64, shading=0 * ones, ambient=ones, light_noise=torch.zeros(n, 3),
        background=torch.full((n, 3), 0.75), supersample=1.0,
    )  # fmt: skip
    return images.permute(0, 3, 1, 2)


def test_classify_renders(classifier):
    """Objects, colours and sides of renders are classified; changed images get other classes."""
    assert WEIGHTS.stat().st_size <= 2e6
    front = render_things([("robot", "red"), ("penguin", "black"), ("car", "blue")], 0.0)
    back = render_things([("robot", "red"), ("penguin", "black")], 180.0)
    for images, view in ((front, "front"), (back, "back")):
        predictions = classify(classifier, images)
        assert [OBJECTS[k] for k in predictions.object] == ["robot", "penguin", "car"][: len(images)]
        assert [VIEWS[k] for k in predictions.view[:2]] == [view, view]
        assert [SHADES[k] for k in predictions.color[:2]] == ["red", "black"]
    assert SHADES[classify(classifier, front).color[2]] == "blue"

    # It looks at the image: with red and blue exchanged it says so, and an empty image is nobody's.
    assert [SHADES[k] for k in classify(classifier, front.flip(1)).color[::2]] == ["blue", "red"]
    assert OBJECTS[classify(classifier, torch.full((1, 3, SIZE, SIZE), 0.75)).object[0]] not in (
        "robot",
        "penguin",
        "car",
    )
    robot = front[:1].expand(AZIMUTHS, -1, -1, -1)
    sides = {"janus": 1, "front": 1, "back": 0}
    assert assess(classifier, robot, "a red robot") == {"object": 1, "object_color": 1, **sides}
    assert assess(classifier, robot, "a blue car") == {"object": 0, "object_color": 0, **dict.fromkeys(sides)}
    large = torch.nn.functional.interpolate(front[:1], (128, 128), mode="bilinear")  # any size will do
    assert OBJECTS[classify(classifier, large).object[0]] == "robot"


def test_classifier_reaches_its_accuracy(classifier):
    """On images from an unused seed the accuracy is the stated one, within five standard errors."""
    stated = json.loads(WEIGHTS.with_suffix(".json").read_text())["held_out"]
    colors = ["red", "green", "blue", "yellow"]
    names = [(name, colors[k % 4]) for k, name in enumerate(sorted(OBJECTS)[::3][:24])]
    predictions = classify(classifier, render_things(names, 30.0))
    right = {
        "object": [OBJECTS[k] == name for k, (name, _) in zip(predictions.object, names, strict=True)],
        "color": [SHADES[k] == color for k, (_, color) in zip(predictions.color, names, strict=True)],
    }
    for name, hits in right.items():
        p, n = stated[name], len(names)
        assert n >= 16 and sum(hits) >= n * p - 5 * (n * p * (1 - p)) ** 0.5, (name, names, hits)


def logits(image_classes: list[tuple[int, int, int]]):
    """A classifier that predicts the classes (object, colour, sector) of its list."""

    def says(images):
        scores = torch.zeros(3, len(images), 64)
        for n, classes in enumerate(image_classes):
            for k, index in enumerate(classes):
                scores[k, n, index] = 9
        return scores[0, :, : len(OBJECTS)], scores[1, :, : len(SHADES)], scores[2, :, : SECTORS + 1]

    return says


def test_classify_sums_sectors():
    """Sectors of azimuth sum to the words for views, in training as well."""
    azimuths = [-172, -136, -134, -50, -46, -44, -1, 1, 44, 46, 91, 134, 136, 179]
    words = ["back"] * 2 + ["side"] * 3 + ["front"] * 4 + ["side"] * 3 + ["back"] * 2 + ["overhead"]
    sectors = [int((a + 180) // 15) for a in azimuths] + [SECTORS]
    predictions = classify(logits([(0, 0, k) for k in sectors]), torch.zeros(len(sectors), 3, SIZE, SIZE))
    assert [VIEWS[k] for k in predictions.view] == words
    level = torch.tensor([90.0] * len(azimuths) + [10.0])
    targets = classifier_train.view_targets(level, torch.tensor([*azimuths, 0]).float())
    check("sums", targets.sum(-1), torch.ones(len(sectors)), torch.ones(len(sectors)).double())
    assert targets.argmax(-1).tolist() == sectors


def examples(*truth: tuple[str, str | None, str, float]) -> Examples:
    """Empty images with these true (object, colour, view, azimuth)."""
    names, colors, views, azimuths = zip(*truth, strict=True)
    return Examples(
        torch.zeros(len(truth), 3, SIZE, SIZE, dtype=torch.uint8),
        torch.tensor([OBJECTS.index(name) for name in names]),
        torch.tensor([SHADES.index(color) if color else UNNAMED for color in colors]),
        torch.tensor([VIEWS.index(view) for view in views]),
        torch.full((len(truth),), 75.0),
        torch.tensor(azimuths),
    )


def test_accuracy_of_classes():
    """Accuracies count named classes only; the confusion matrix has shares."""
    truth = examples(
        ("robot", "red", "front", 0.0),
        ("robot", None, "side", 50.0),
        ("mug", "red", "back", 180.0),
        ("robot", "blue", "front", -40.0),
    )
    robot_red_front = (OBJECTS.index("robot"), SHADES.index("red"), SECTORS // 2)
    predictions = classifier_train.classify_all(logits([robot_red_front] * 4), truth.images)
    # colours count where there is a word (three of four), sides of faces where there is one (the robots)
    assert accuracy(predictions, truth) == pytest.approx(
        {
            "object": 3 / 4,
            "color": 2 / 3,
            "object_color": 1 / 3,
            "view": 2 / 4,
            "view_fronts": 2 / 3,
            "view_faces": 2 / 3,
            "view_faces_clear": 1.0,
        }
    )
    shares = confusion(torch.tensor([0, 0, 2, 1]), torch.tensor([0, 0, 0, 2]))
    assert shares["front"] == {"front": 0.6667, "side": 0.0, "back": 0.3333, "overhead": 0.0}
    assert set(shares) == {"front", "back"} and shares["back"]["side"] == 1


def test_color_labels():
    """Labels of colours are the caption's, or a word for the natural shade."""
    truth = [
        ("bear", "blue", (0.12, 0.25, 0.85), 0, "blue"),  # the caption's
        ("bear", None, (0.43, 0.25, 0.1), 0, "brown"),  # its natural shade
        ("tree", None, (0.13, 0.5, 0.16), 1, "green"),  # "leaf", for which captions have no word
        ("hamburger", None, (0.85, 0.6, 0.3), 0, None),  # tan is none of the twelve
        ("car", None, (0.9, 0.1, 0.12), 0, "red"),  # cars have no natural colour
        ("car", "red", (0.85, 0.1, 0.1), 2, None),  # an image without colour
    ]
    labels = [[OBJECTS.index(t[0]), SHADES.index(t[1]) if t[1] else NATURAL, 0] for t in truth]
    columns = (np.array(labels), np.zeros((6, 2)), np.array([t[3] for t in truth]), np.array([t[2] for t in truth]))
    found = classifier_train.color_labels(Views(torch.zeros(6), [], *columns))
    assert [None if k == UNNAMED else SHADES[k] for k in found] == [t[4] for t in truth]


def test_paint_is_the_captions_color():
    """The paint of a scene is near the colour of its caption."""
    arrays, _, ((_, _, _, _, labels),) = dataset._draw(3, 1)
    paint = dataset._paint(arrays)
    assert paint.shape == (dataset.BATCH, 3) and (labels[:, 1] != NATURAL).sum() > 20
    for painted, (_, color, _) in zip(paint, labels, strict=True):
        if color != NATURAL:
            assert np.abs(painted - list(COLORS.values())[color]).max() < 0.2


def test_mirrored_examples():
    """A mirrored image has the opposite azimuth."""
    images = torch.arange(2 * 3 * 2 * 2, dtype=torch.uint8).view(2, 3, 2, 2)
    truth = examples(("cat", None, "side", 60.0), ("cat", None, "side", 60.0))._replace(images=images)
    turned = classifier_train.mirrored(truth, torch.tensor([True, False]))
    assert turned.azimuth.tolist() == [-60, 60] and torch.equal(turned.view, truth.view)
    assert torch.equal(turned.images[0], images[0].flip(-1)) and torch.equal(turned.images[1], images[1])


def test_loss_ignores_unknown_classes():
    """The view of a mug and an unnamed colour give no gradient; the view of a cat does."""
    torch.manual_seed(0)
    learner, fronts = Classifier(), classifier_train.membership(classifier_train.FRONTS, "cpu")
    images = torch.rand(2, 3, SIZE, SIZE)
    mugs = examples(("mug", "red", "front", 0.0), ("mug", None, "front", 0.0))
    classifier_train.loss_of(learner, images, mugs, fronts).backward()
    assert not learner.view.weight.grad.any() and learner.color.weight.grad.any() and learner.object.weight.grad.any()
    learner.zero_grad(set_to_none=True)
    cats = examples(("cat", "red", "front", 0.0), ("mug", "red", "front", 0.0))
    classifier_train.loss_of(learner, images, cats, fronts).backward()
    assert learner.view.weight.grad.any()
    stored = classifier_train.to_half(learner)
    assert sum(t.numel() * t.element_size() for t in stored.values()) <= 1.95e6


def test_disturb_repeats():
    """Disturbed images keep shape and range, and depend only on the seed."""
    images = torch.rand(6, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    once, again, other = (disturb(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert once.shape == images.shape and once.min() >= 0 and once.max() <= 1
    assert torch.equal(once, again) and not torch.equal(once, other)
    assert (once - images).abs().mean(dim=(1, 2, 3)).min() > 0.01  # every image is changed


def test_prior_scores():
    """Scores of dream-mini's images count the words of their captions."""
    n = len(THINGS)
    thing = torch.arange(n)[:, None].expand(n, 3).clone()
    color = torch.tensor([SHADES.index(prior.COLOR_OF[name]) for name in OBJECTS])[:, None].expand(n, 3)
    view = torch.arange(3).expand(n, 3).clone()
    right = prior.scores(Predictions(thing, color, view))
    assert (right["object"], right["color"], right["view"]) == (1, 1, 1)
    assert right["images"] == 3 * n and right["images_of_faces"] == 3 * len(prior.FACES)
    view[:, 0] = VIEWS.index("side")  # no front is seen as one
    thing[OBJECTS.index("mug")] = OBJECTS.index("vase")
    scores = prior.scores(Predictions(thing, color, view))
    assert scores["view"] == round(2 / 3, 4)
    assert scores["object"] == round(1 - 1 / n, 4)
    assert scores["views"]["front"]["side"] == 1 and scores["faces"]["cat"] == [0, 1, 1]
    assert [expected_classes(prompt) for prompt in prior.PROMPTS] == [(k, int(color[k, 0])) for k in range(n)]
    image = prior.sheet(
        torch.rand(2 * n, 3, 3, 16, 16), Predictions(*(torch.cat([c, c]) for c in (thing, color, view)))
    )
    assert image.size == (6 * 16, len(prior.FACES) * 30)
