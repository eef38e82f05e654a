"""The benchmarks: what they count, what they refuse, and a judge that can be wrong."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dream_fast.bench import __main__ as command
from dream_fast.bench import main_job, quality
from dream_fast.bench.judge import SIZE, WEIGHTS, Verdicts, load_judge, verdicts
from dream_fast.bench.judge.train import accuracy, disturb
from dream_fast.bench.quality import AZIMUTHS, HELD_OUT, PROMPTS, assess, contact_sheet, summary, wanted
from dream_fast.engine.camera import make_cameras, turntable
from dream_fast.engine.config import Config
from dream_fast.engine.prior.data import NATURAL
from dream_fast.engine.prior.tracer import pack, render
from dream_fast.engine.prior.vocabulary import COLORS, THINGS, VIEWS, check_prompt, find_object
from dream_fast.engine.prior.world import make_scene

OBJECTS, SHADES = list(THINGS), list(COLORS)

# ------------------------------------------------------------------------------------------------------------- quality


def test_the_prompts_are_as_many_and_as_different_as_is_claimed():
    for prompts in (PROMPTS, HELD_OUT):
        names = {find_object(prompt) for prompt in prompts}
        assert len(set(prompts)) == len(prompts) == 16
        assert len(names) >= 12
        assert sum(THINGS[name].face for name in names) >= 6
        assert [check_prompt(prompt) for prompt in prompts] == [[]] * 16  # no word that the model would ignore
    assert not set(PROMPTS) & set(HELD_OUT)


@pytest.mark.parametrize(
    ("prompt", "name", "color"),
    [
        ("a hamburger", "hamburger", None),
        ("a red robot", "robot", "red"),
        ("an orange cat", "cat", "orange"),
        ("a brown bear", "bear", "brown"),
    ],
)
def test_what_a_prompt_wants(prompt, name, color):
    assert wanted(prompt) == (OBJECTS.index(name), None if color is None else SHADES.index(color))


def test_the_pictures_from_behind_are_those():
    azimuth = turntable(Config().camera, AZIMUTHS, torch.device("cpu")).azimuth
    behind = torch.cos(torch.deg2rad(azimuth)) < -0.5
    assert behind.nonzero().flatten().tolist() == list(quality.BEHIND)


def judged(monkeypatch, prompt: str, names: list[str], colors: list[str], views: list[str]) -> dict[str, float | None]:
    """The scores of eight pictures in which the judge sees what the lists say."""
    seen = Verdicts(
        torch.tensor([OBJECTS.index(name) for name in names]),
        torch.tensor([SHADES.index(color) for color in colors]),
        torch.tensor([VIEWS.index(view) for view in views]),
    )
    monkeypatch.setattr(quality, "verdicts", lambda judge, pictures: seen)
    return assess(None, torch.zeros(AZIMUTHS, 3, 4, 4), prompt)


def test_scores_are_shares_of_the_pictures(monkeypatch):
    names = ["robot"] * 6 + ["snowman"] * 2
    colors = ["red"] * 3 + ["blue"] * 3 + ["red"] * 2
    views = ["front", "front", "side", "back", "front", "front", "side", "front"]
    scores = judged(monkeypatch, "a red robot", names, colors, views)
    assert scores == pytest.approx({"object": 6 / 8, "object_color": 3 / 8, "janus": 2 / 3})
    scores = judged(monkeypatch, "a snowman", names, colors, views)
    assert scores == pytest.approx({"object": 2 / 8, "object_color": None, "janus": 2 / 3})
    assert judged(monkeypatch, "a blue car", names, colors, views) == {"object": 0, "object_color": 0, "janus": None}


def test_a_summary_averages_what_each_row_has():
    rows = [
        {"object": 1.0, "object_color": 0.5, "janus": None},
        {"object": 0.0, "object_color": None, "janus": 0.0},
        {"object": 0.5, "object_color": 1.0, "janus": 1 / 3},
    ]
    assert summary(rows) == {"object": 0.5, "object_color": 0.75, "janus_rate": 0.1667, "runs": 3}
    assert summary([]) == {"object": None, "object_color": None, "janus_rate": None, "runs": 0}


def test_the_contact_sheet_keeps_the_place_of_a_missing_run(tmp_path):
    prompts = ("a hamburger", "a red robot", "a blue car", "a snowman")
    side = quality.SIZE
    for prompt, level in zip(prompts[::3], (10, 100), strict=True):  # nothing of robot and car
        strip = np.repeat(np.arange(AZIMUTHS, dtype=np.uint8), side)[None, :, None] + np.uint8(level)
        folder = tmp_path / f"{prompt.replace(' ', '-')}-0"
        folder.mkdir()
        Image.fromarray(np.broadcast_to(strip, (side, AZIMUTHS * side, 3)).copy()).save(folder / "views.png")
    contact_sheet(tmp_path, prompts, tmp_path / "out" / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "out" / "sheet.png"))
    assert sheet.shape == (2 * side, 8 * side + 8, 3)
    middles = np.arange(4) * side + side // 2
    assert sheet[side // 2, middles, 0].tolist() == [10, 12, 14, 16]
    assert sheet[side + side // 2, middles + 4 * side + 8, 0].tolist() == [100, 102, 104, 106]
    assert (sheet[:side, 4 * side :] == 255).all() and (sheet[side:, : 4 * side + 8] == 255).all()


# ---------------------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(("words", "status"), [([], 2), (["speed"], 2), (["--help"], 0), (["-h"], 0)])
def test_without_a_known_benchmark_the_command_names_those_there_are(words, status, capsys):
    assert command.main(words) == status
    said = capsys.readouterr().out
    assert said.startswith("usage: ") and all(name in said for name in command.COMMANDS)


@pytest.mark.parametrize("name", command.COMMANDS)
def test_every_benchmark_has_help_and_refuses_an_unknown_flag(name, capsys):
    for words, status in ((["--help"], 0), (["--nonsense"], 2)):
        with pytest.raises(SystemExit) as ended:
            command.main([name, *words])
        assert ended.value.code == status
    output = capsys.readouterr()
    assert f"bench {name}" in output.out and "--nonsense" in output.err


def test_the_main_job_runs_the_command_and_records_it(tmp_path, monkeypatch):
    commands = []

    def run(words, *, check):
        commands.append(words)
        workspace = Path(words[words.index("--workspace") + 1])
        workspace.mkdir()
        runs = [{"peak_bytes": {"host": 1}}, {"peak_bytes": {"host": 2}}]
        (workspace / "manifest.json").write_text(json.dumps({"runs": runs}))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(main_job, "subprocess", SimpleNamespace(run=run))
    assert command.main(["main_job", "--device", "cpu", "--out", str(tmp_path / "out")]) == 0
    (words,) = commands
    assert words[words.index("--text") + 1] == "a hamburger" and {"-O", "--save_mesh"} <= set(words)
    record = json.loads((tmp_path / "out" / "main_job-cpu.json").read_text())
    assert record["peak_bytes"] == {"host": 2} and record["gpu"] is None
    assert record["seconds"] >= 0 and record["host_peak_bytes"] > 0 and record["torch"] == torch.__version__


# ----------------------------------------------------------------------------------------------------------- the judge


@pytest.fixture(scope="module")
def judge():
    return load_judge()


def pictures_of(things: list[tuple[str, str | None]], azimuth: float) -> torch.Tensor:
    """Pictures [N, 3, 64, 64] of objects of the procedural world, made from a seed that nothing was trained on."""
    scenes = [make_scene(np.random.default_rng(7), name, color, plain=True) for name, color in things]
    n = len(scenes)
    cameras = make_cameras(*(torch.full((n,), angle) for angle in (75.0, azimuth, 3.2, 22.0)))
    ones = torch.ones(n)
    pictures = render(
        pack(scenes, "cpu"), cameras, SIZE, shading=0 * ones, ambient=ones, light_noise=torch.zeros(n, 3),
        background=torch.full((n, 3), 0.75), supersample=1.0,
    )  # fmt: skip
    return pictures.permute(0, 3, 1, 2)


def test_the_judge_recognises_objects_colours_and_sides(judge):
    assert WEIGHTS.stat().st_size <= 2e6
    front = pictures_of([("robot", "red"), ("penguin", None), ("car", "blue")], 0.0)
    back = pictures_of([("robot", "red"), ("penguin", None)], 180.0)
    for pictures, view in ((front, "front"), (back, "back")):
        found = verdicts(judge, pictures)
        assert [OBJECTS[k] for k in found.object] == ["robot", "penguin", "car"][: len(pictures)]
        assert [VIEWS[k] for k in found.view[:2]] == [view, view]
        assert SHADES[found.color[0]] == "red"
    assert SHADES[verdicts(judge, front).color[2]] == "blue"

    # It looks at the picture: with red and blue exchanged it says so, and an empty picture is nobody's.
    assert [SHADES[k] for k in verdicts(judge, front.flip(1)).color[::2]] == ["blue", "red"]
    assert OBJECTS[verdicts(judge, torch.full((1, 3, SIZE, SIZE), 0.75)).object[0]] not in ("robot", "penguin", "car")
    robot = front[:1].expand(AZIMUTHS, -1, -1, -1)
    assert assess(judge, robot, "a red robot") == {"object": 1, "object_color": 1, "janus": 1}
    assert assess(judge, robot, "a blue car") == {"object": 0, "object_color": 0, "janus": None}


def test_a_picture_of_any_size_gets_its_verdict(judge):
    picture = pictures_of([("robot", "red")], 0.0)
    large = torch.nn.functional.interpolate(picture, (128, 128), mode="bilinear")
    assert OBJECTS[verdicts(judge, large).object[0]] == "robot"


def test_its_stated_accuracy_is_high_and_accuracy_counts_right_answers():
    stated = json.loads(WEIGHTS.with_suffix(".json").read_text())
    assert stated["held_out"]["object"] > 0.95 and stated["held_out_pictures"] > 1000

    def says(pictures):  # robot, red, front, whatever is shown
        scores = torch.zeros(len(pictures), 3, 64)
        for k, index in enumerate((OBJECTS.index("robot"), SHADES.index("red"), VIEWS.index("front"))):
            scores[:, k, index] = 1
        return scores[:, 0, : len(OBJECTS)], scores[:, 1, : NATURAL + 1], scores[:, 2, : len(VIEWS)]

    robot, car, red, blue = OBJECTS.index("robot"), OBJECTS.index("car"), SHADES.index("red"), SHADES.index("blue")
    labels = torch.tensor([[robot, red, 0], [robot, NATURAL, 1], [car, red, 2], [robot, blue, 0]])
    found = accuracy(says, torch.zeros(4, 3, SIZE, SIZE, dtype=torch.uint8), labels)
    # colours count where one is named (three of four), sides where there is a face (the robots)
    assert found == pytest.approx({"object": 3 / 4, "color": 2 / 3, "object_color": 1 / 3, "view": 2 / 3})


def test_disturbed_pictures_keep_their_shape_and_range_and_repeat():
    pictures = torch.rand(6, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    once, again, other = (disturb(pictures, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert once.shape == pictures.shape and once.min() >= 0 and once.max() <= 1
    assert torch.equal(once, again) and not torch.equal(once, other)
    assert (once - pictures).abs().mean(dim=(1, 2, 3)).min() > 0.01  # every picture is changed
