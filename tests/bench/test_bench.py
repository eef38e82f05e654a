"""The benchmarks: counts, refusals and commands."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dream_fast.bench import __main__ as command
from dream_fast.bench.pipeline import end_to_end
from dream_fast.bench.quality import run as quality
from dream_fast.bench.quality.classifier import (
    Predictions,
)
from dream_fast.bench.quality.run import AZIMUTHS, HELD_OUT, PROMPTS, assess, contact_sheet, expected_classes, summarize
from dream_fast.engine.config.presets import reference
from dream_fast.engine.config.schedule import LinearSchedule
from dream_fast.engine.dream_mini.vocabulary import COLORS, THINGS, VIEWS, check_prompt, find_object
from dream_fast.engine.scene.camera import turntable

OBJECTS, SHADES = list(THINGS), list(COLORS)

# ------------------------------------------------------------------------------------------------------------- quality


def test_prompts_differ():
    """16 fixed and 16 other held-out prompts name at least 12 objects each, in words that dream-mini knows."""
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
def test_expected_classes(prompt, name, color):
    """Object and colour of a prompt."""
    assert expected_classes(prompt) == (OBJECTS.index(name), None if color is None else SHADES.index(color))


def test_views_from_behind():
    """The azimuths from behind are those more than 120 degrees from the front."""
    azimuth = turntable(reference().camera, AZIMUTHS, torch.device("cpu")).azimuth
    behind = torch.cos(torch.deg2rad(azimuth)) < -0.5
    assert behind.nonzero().flatten().tolist() == list(quality.BEHIND)
    assert azimuth[quality.FRONT] == 0 and azimuth[quality.BACK].abs() == 180


def score_views(
    monkeypatch, prompt: str, names: list[str], colors: list[str], views: list[str]
) -> dict[str, float | None]:
    """The scores of eight images for which the classifier predicts the given lists."""
    predictions = Predictions(
        torch.tensor([OBJECTS.index(name) for name in names]),
        torch.tensor([SHADES.index(color) for color in colors]),
        torch.tensor([VIEWS.index(view) for view in views]),
    )
    monkeypatch.setattr(quality, "classify", lambda classifier, images: predictions)
    return assess(None, torch.zeros(AZIMUTHS, 3, 4, 4), prompt)


def test_assess_counts_shares(monkeypatch):
    """Scores are shares of the images, or None where the prompt names nothing."""
    names = ["robot"] * 6 + ["snowman"] * 2
    colors = ["red"] * 3 + ["blue"] * 3 + ["red"] * 2
    views = ["front", "front", "side", "back", "front", "front", "side", "front"]
    scores = score_views(monkeypatch, "a red robot", names, colors, views)
    sides = {"janus": 2 / 3, "front": 1, "back": 0}
    assert scores == pytest.approx({"object": 6 / 8, "object_color": 3 / 8, **sides})
    scores = score_views(monkeypatch, "a snowman", names, colors, views)
    assert scores == pytest.approx({"object": 2 / 8, "object_color": None, **sides})
    scores = score_views(monkeypatch, "a blue car", names, colors, views)
    assert scores == {"object": 0, "object_color": 0, "janus": None, "front": None, "back": None}
    views = ["side", "front", "side", "back", "back", "front", "front", "front"]
    scores = score_views(monkeypatch, "a red robot", names, colors, views)
    assert scores == pytest.approx({"object": 6 / 8, "object_color": 3 / 8, "janus": 1 / 3, "front": 0, "back": 1})


def row(prompt: str, seed: int, *scores: float | None) -> dict:
    return {"prompt": prompt, "seed": seed, **dict(zip(quality.SCORES, scores, strict=True)), "seconds": 2.0}


def test_summarize_averages_rows():
    """Means are over the rows that have a value."""
    rows = [
        row("a red mug", 0, 1.0, 0.5, None, None, None),
        row("a robot", 0, 0.0, None, 0.0, 1.0, 1.0),
        row("a red cat", 0, 0.5, 1.0, 1 / 3, 0.0, 1.0),
    ]
    means = {"object": 0.5, "object_color": 0.75, "janus_rate": 0.1667, "front_rate": 0.5, "back_rate": 1.0, "runs": 3}
    assert summarize(rows) == means
    assert summarize([]) == dict.fromkeys(means) | {"runs": 0}
    again = [*rows, row("a red mug", 1, 0.0, 0.0, None, None, None)]
    table = quality.summarize_prompts(again, ("a red cat", "a red mug", "a hat"))
    assert [line["prompt"] for line in table] == ["a red cat", "a red mug"]
    assert table[1] == {"prompt": "a red mug", **summarize(again[::3]), "seconds": 2.0}


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Calls the command with runs that cost nothing; `bench.made` lists them, those in `bench.broken` fail."""
    bench = SimpleNamespace(
        made=[], others=[], broken=set(), work=tmp_path / "work", out=tmp_path / "out", facts={"model": "m"}
    )

    def make(prompt, seed, work, device, other):
        bench.made.append((prompt, seed))
        bench.others.append(other)
        if (prompt, seed) in bench.broken:
            raise RuntimeError("out of memory")
        path = work / "views" / f"{prompt.replace(' ', '-')}-{seed}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (AZIMUTHS * quality.SIZE, quality.SIZE)).save(path)
        return row(prompt, seed, 0.25, None, None, None, None)

    def call(*words):
        bench.made.clear()
        where = ["--work", str(bench.work), "--out", str(bench.out), "--device", "cpu", "--no_prior"]
        assert quality.main([*where, "--prompts", "a mug", "a hat", "--seeds", "2", *words]) == 0
        return json.loads((bench.out / "quality.json").read_text())

    bench.call = call
    monkeypatch.setattr(quality, "make_run", make)
    monkeypatch.setattr(quality, "ProcessPoolExecutor", lambda number, **context: ThreadPoolExecutor(number))
    monkeypatch.setattr(quality, "describe_setup", lambda device, other: bench.facts | other)
    monkeypatch.setattr(quality, "load_classifier", lambda: None)
    monkeypatch.setattr(quality, "assess", lambda classifier, images, prompt: {"object": float(len(images))})
    return bench


def test_quality_resumes(bench, capsys):
    """The same command makes only the missing runs."""
    jobs = [(prompt, seed) for seed in (0, 1) for prompt in ("a mug", "a hat")]
    bench.broken = {("a hat", 0)}
    record = bench.call("--jobs", "2")
    assert sorted(bench.made) == sorted(jobs) and record["runs"] == 3
    assert "'a hat', seed 0, failed" in capsys.readouterr().out
    assert record["object"] == AZIMUTHS  # scored again from the images, not taken from the rows
    assert [(line["prompt"], line["runs"]) for line in record["prompts"]] == [("a mug", 2), ("a hat", 1)]
    assert (bench.out / "quality.png").exists()

    bench.broken.clear()
    assert bench.call("--seconds", "0")["runs"] == 3 and not bench.made
    assert "1 of 4 runs are missing" in capsys.readouterr().out
    with (bench.work / "rows.jsonl").open("a") as file:
        file.write('{"prompt": "a hat", "se')  # what a killed command may leave
    assert len(quality.read_rows(bench.work / "rows.jsonl")) == 3
    record = bench.call()
    assert bench.made == [("a hat", 0)]
    assert [(line["prompt"], line["seed"]) for line in record["rows"]] == jobs


def test_quality_refuses_other_settings(bench, capsys):
    """A folder of other settings is refused."""
    bench.call()
    bench.facts = {"model": "another"}
    with pytest.raises(SystemExit) as ended:
        bench.call()
    assert ended.value.code == 2 and not bench.made
    assert "holds runs of other settings" in capsys.readouterr().err


def test_quality_compares_objectives(bench, capsys):
    """Each objective has its own runs and a row of the table."""
    where = ["--work", str(bench.work), "--out", str(bench.out), "--device", "cpu", "--seeds", "1"]
    where += ["--settings", '{"iters": 7}']
    words = [*where, "--prompts", "a mug", "a hat", "--scores", "sds,ism,csd"]
    assert quality.main(words) == 0
    assert bench.made == [("a mug", 0), ("a hat", 0)] * 3
    assert bench.others == [{"iters": 7, "objective": score} for score in ("sds", "sdi", "csd") for _ in range(2)]
    output = capsys.readouterr().out
    assert "ism is measured as sdi" in output
    assert "| sdi | 8.000 |  |  |  |  | 2 | 2 |" in output
    records = json.loads((bench.out / "quality_scores.json").read_text())
    assert list(records) == ["sds", "sdi", "csd"] and records["csd"]["objective"] == "csd"
    for score in records:
        assert Image.open(bench.out / f"quality_{score}.png").size == (8 * quality.SIZE + 8, quality.SIZE)
    assert not (bench.out / "quality.json").exists()
    bench.made.clear()
    assert quality.main(words) == 0 and not bench.made  # taken up: all is done
    with pytest.raises(SystemExit):
        quality.main([*where, "--scores", "sds,dds"])
    assert "--scores takes some of sds,csd,asd,sdi,ism, not 'dds'" in capsys.readouterr().err
    read = quality.read_settings('{"lambda_tv": "0.5:0:1:1.0", "t_range": [0.1, 0.9]}')
    assert read == {"lambda_tv": LinearSchedule(0.5, 0, 1, 1.0), "t_range": (0.1, 0.9)}
    wrongs = {
        '{"iters": 0}': "--iters must be",
        '{"itres": 7}': "unknown setting: itres",
        '{"lambda_tv": "1:2"}': "'1:2' is not a schedule",
        "[7]": "a JSON object",
        "{": "Expecting",
    }
    for wrong, sentence in wrongs.items():
        with pytest.raises(SystemExit):
            quality.main([*where, "--settings", wrong])
        assert f"--settings: {sentence}" in capsys.readouterr().err


def test_describe_setup_of_objectives():
    """Each objective has its own defaults."""
    sds, csd = (quality.describe_setup("cpu", {"objective": score})["settings"]["guidance"] for score in ("sds", "csd"))
    assert (sds["objective"], csd["objective"]) == ("sds", "csd") and sds["guidance_rescale"] != csd["guidance_rescale"]


def test_make_runs_stops_in_time(monkeypatch, tmp_path, bench):
    """A run that would end after the limit is not started."""
    clock = iter(range(0, 1000, 30))
    monkeypatch.setattr(quality, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    jobs = [("a mug", seed) for seed in range(9)]
    (tmp_path / "work").mkdir()
    rows = list(quality.make_runs(jobs, tmp_path / "work", "cpu", 1, 200.0))
    assert 0 < len(rows) < 4 and bench.made == jobs[: len(rows)]  # each run takes 30 and more of the 200


def test_read_views(tmp_path):
    """Images are read as they were written."""
    strip = np.repeat(np.arange(AZIMUTHS, dtype=np.uint8) * 30, quality.SIZE)[None, :, None]
    Image.fromarray(np.broadcast_to(strip, (quality.SIZE, strip.shape[1], 3)).copy()).save(tmp_path / "views.png")
    images = quality.read_views(tmp_path / "views.png")
    assert images.shape == (AZIMUTHS, 3, quality.SIZE, quality.SIZE)
    assert torch.equal((images * 255).amax((1, 2, 3)), (images * 255).amin((1, 2, 3)))
    assert (images[:, 0, 0, 0] * 255).round().tolist() == [30 * k for k in range(AZIMUTHS)]


def test_contact_sheet(tmp_path):
    """The place of a missing run is white."""
    prompts = ("a hamburger", "a red robot", "a blue car", "a snowman")
    side = quality.SIZE
    for prompt, level in zip(prompts[::3], (10, 100), strict=True):  # nothing of robot and car
        strip = np.repeat(np.arange(AZIMUTHS, dtype=np.uint8), side)[None, :, None] + np.uint8(level)
        path = tmp_path / "views" / f"{prompt.replace(' ', '-')}-0.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.broadcast_to(strip, (side, AZIMUTHS * side, 3)).copy()).save(path)
    contact_sheet(tmp_path, prompts, tmp_path / "out" / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "out" / "sheet.png"))
    assert sheet.shape == (2 * side, 8 * side + 8, 3)
    middles = np.arange(4) * side + side // 2
    assert sheet[side // 2, middles, 0].tolist() == [10, 12, 14, 16]
    assert sheet[side + side // 2, middles + 4 * side + 8, 0].tolist() == [100, 102, 104, 106]
    assert (sheet[:side, 4 * side :] == 255).all() and (sheet[side:, : 4 * side + 8] == 255).all()


# ---------------------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(("words", "status"), [([], 2), (["speed"], 2), (["--help"], 0), (["-h"], 0)])
def test_command_usage(words, status, capsys):
    """Without a known command the usage lists all of them."""
    assert command.main(words) == status
    output = capsys.readouterr().out
    assert output.startswith("usage: ") and all(name in output for name in command.COMMANDS)


@pytest.mark.parametrize("name", command.COMMANDS)
def test_command_help(name, capsys):
    """Every command has help under its name and refuses an unknown flag."""
    for words, status in ((["--help"], 0), (["--nonsense", "one", "two"], 2)):
        with pytest.raises(SystemExit) as ended:
            command.main([name, *words])
        assert ended.value.code == status
    output = capsys.readouterr()
    assert f"bench {name}" in output.out and "--nonsense" in output.err


def test_end_to_end_writes_a_record(tmp_path, monkeypatch):
    """The record has the time of the command, also by its old name."""
    commands = []

    now = [50.0]

    def run(words, *, check):
        commands.append(words)
        now[0] += 123.44
        workspace = Path(words[words.index("--workspace") + 1])
        workspace.mkdir()
        runs = [{"peak_bytes": {"host": n}, "seconds_of": {"start": n, "steps": 3.0, "outputs": 4.0}} for n in (1, 2)]
        (workspace / "manifest.json").write_text(json.dumps({"runs": runs}))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(end_to_end, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setattr(end_to_end, "time", SimpleNamespace(monotonic=lambda: now[0]))
    assert command.main(["main_job", "--device", "cpu", "--out", str(tmp_path / "out")]) == 0
    (words,) = commands
    assert words[words.index("--text") + 1] == "a hamburger" and {"-O", "--save_mesh"} <= set(words)
    record = json.loads((tmp_path / "out" / "main_job-cpu.json").read_text())
    assert record["peak_bytes"] == {"host": 2} and record["gpu"] is None
    assert record["seconds_of"] == {"start": 2, "steps": 3.0, "outputs": 4.0}
    assert record["seconds"] == 123.4 and record["host_peak_bytes"] > 2**20 and record["torch"] == torch.__version__
