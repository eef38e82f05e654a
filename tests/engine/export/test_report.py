"""The report: one self-contained file with the content of the run's files, in which nothing becomes markup."""

import base64
import io
import json
import re
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dream_fast.bench.accuracy import check
from dream_fast.cli import main, parse
from dream_fast.engine import run as run_module
from dream_fast.engine.config.configure import configure
from dream_fast.engine.config.reproduce import reproduce_command
from dream_fast.engine.config.schema import settings
from dream_fast.engine.errors import UserError
from dream_fast.engine.export import report
from dream_fast.engine.export.charts import Series, _digits, draw_chart, format_number, linear_axis, running_mean
from dream_fast.engine.export.report import MAX_FRAMES, MAX_PAGE_BYTES, write_report
from dream_fast.engine.export.video import write_video
from dream_fast.engine.workspace.folder import Workspace

SIDE, FRAMES = 24, 5
SMALL = f"""
    --device cpu --iters 6 --log_every 1 --seed 7 --w 16 --h 16 --W {SIDE} --H {SIDE} --dataset_size_test {FRAMES}
    --dataset_size_valid 2 --n_levels 3 --log2_hashmap_size 10 --max_resolution 32 --hidden_width 16 --hidden_layers 1
    --bound 0.6 --max_steps 48 --occupancy_resolution 16 --latent_iter_ratio 0.5 --save_guidance
    --save_guidance_interval 3
""".split()
# Elements of HTML and SVG that have no end.
EMPTY = ("meta", "img", "line", "path", "br")


def command(workspace: Path, model: Path, *more: str) -> list[str]:
    return ["--text", "a hamburger", "--hf_key", str(model), "--workspace", str(workspace), *SMALL, *more]


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory) -> Path:
    workspace = tmp_path_factory.mktemp("runs") / "trial"
    assert main(command(workspace, tiny_model)) == 0
    return workspace


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "trial")


class Page(HTMLParser):
    """A page as a browser reads it: elements, the text in each kind of them, and whether every one is closed."""

    def __init__(self, path: Path):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.texts.setdefault(tag, [])
        if tag not in EMPTY:
            self.open.append(tag)
            self.texts[tag].append("")

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        for tag in set(self.open):
            self.texts[tag][-1] += data

    def of(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


def decode_image(uri: str) -> np.ndarray:
    head, data = uri.split(",", 1)
    assert head == "data:image/webp;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")).astype(int)


def sheets(page: Page) -> dict[str, tuple[dict, np.ndarray]]:
    """The sheets of frames of the turntable by kind: attributes and pixels."""
    elements = [attributes for attributes in page.of("div") if attributes.get("class") == "sheet"]
    return {one["data-kind"]: (one, decode_image(re.search(r"url\((.*?)\)", one["style"])[1])) for one in elements}


# The page as a whole


def test_report_sections(finished):
    """A finished run has a page with every section."""
    page = Page(finished / "report.html")
    assert page.texts["h1"] == ["a hamburger"]
    assert page.texts["h2"] == ["Six views", "During the run", "Curves", "Time", "Reproduce"]
    decoded = [decode_image(image["src"]) for image in page.of("img")]
    # 6 views twice, one strip of the last step, the guidance of steps 3 and 6
    assert [pixels.shape[:2] for pixels in decoded] == [(SIDE, SIDE)] * 12 + [(2 * SIDE, 2 * SIDE)] + [(32, 96)] * 2
    expected = np.asarray(Image.open(finished / "results" / "front.png").convert("RGB")).astype(int)
    assert np.abs(decoded[0] - expected).mean() < 8
    captions = "\n".join(page.texts["figcaption"])
    levels = [json.loads(row)["t"] for row in (finished / "metrics.jsonl").read_text().splitlines()]
    assert f"step 3, t = {levels[2][0]}" in captions and f"step 6, t = {levels[5][0]}" in captions
    assert "after 6 steps" in captions
    facts = dict(zip(page.texts["dt"], page.texts["dd"], strict=True))
    assert (facts["steps"], facts["seed"], facts["torch"]) == ("6", "7", json_of(finished)["versions"]["torch"])
    cells = page.texts["td"]
    assert "0 to 6" in cells and f"{json_of(finished)['seconds']:.1f} s" in cells
    for _, field in settings():
        assert f"--{field.name}" in cells


def json_of(workspace: Path) -> dict:
    return json.loads((workspace / "manifest.json").read_text())["runs"][-1]


def test_report_is_self_contained(finished):
    """The page loads nothing from elsewhere."""
    page = Page(finished / "report.html")
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, name)
    assert not re.search(r"url\((?!data:)|@import|https?://|fetch\(|XMLHttpRequest", page.source)
    (policy,) = [one["content"] for one in page.of("meta") if one.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'") and "http" not in policy
    assert "prefers-color-scheme: dark" in page.source


def test_report_times(tiny_model, tmp_path, monkeypatch):
    """The times are those of loading, steps and outputs."""
    now = [100.0]
    monkeypatch.setattr(run_module, "time", SimpleNamespace(monotonic=lambda: now[0], strftime=time.strftime))

    def taking(seconds, function):
        def timed(*given, **named):
            now[0] += seconds
            return function(*given, **named)

        return timed

    for owner, name, seconds in (
        (run_module, "load_guidance", 5),
        (run_module.Loop, "fit", 70),
        (run_module, "write_outputs", 900),
    ):
        monkeypatch.setattr(owner, name, taking(seconds, getattr(owner, name)))
    assert main(command(tmp_path, tiny_model, "--iters", "1", "--six_views")) == 0
    run = json_of(tmp_path)
    assert run["seconds_of"] == {"start": 5, "steps": 70, "outputs": 900} and run["seconds"] == 975


EVIL = '<script>alert(1)</script> & "quoted" </title><img src=x onerror=alert(1)> \x1b[31m\x00\u202e$title </pre>'


def test_report_escapes_prompt(copy):
    """A prompt stays text."""
    config = json.loads((copy / "config.json").read_text())
    config["run"] |= {"text": EVIL, "negative": EVIL, "text_back": EVIL, "workspace": f"/{EVIL}"}
    (copy / "config.json").write_text(json.dumps(config))
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["model"] = EVIL
    manifest["runs"][-1] |= {"device": EVIL, "finished": EVIL}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with (copy / "metrics.jsonl").open("a") as metrics:
        row = {"step": 7, "phase": EVIL, f"loss_{EVIL}": 1.0, "grad_norm": EVIL}
        metrics.write(json.dumps(row) + "\n")
    (copy / "validation" / f"step_000007{'<b>'}.png").write_bytes(b"no image")
    page = Page(write_report(Workspace(copy)))
    shown = EVIL.replace("\x1b", "\\x1b").replace("\x00", "\\x00").replace("\u202e", "\\u202e")
    assert page.texts["h1"] == [shown] and page.texts["title"][0] == f"{shown} \u2013 dream-fast"
    facts = dict(zip(page.texts["dt"], page.texts["dd"], strict=True))
    assert facts["negative prompt"] == facts["prompt, back"] == facts["image model"] == shown
    assert len(page.of("script")) == 1 and all("onerror" not in attributes for _, attributes in page.elements)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", page.source)


def test_report_command(finished, tiny_model):
    """The command on the page repeats the run."""
    (shown,) = Page(finished / "report.html").texts["pre"]
    config = Workspace(finished).stored_config()
    assert shown == reproduce_command(config)
    typed = parse(command(finished, tiny_model))
    assert config == configure({"guidance": ("SD",)} | typed, "cpu")


def test_report_commands_of_parts(copy, tiny_model):
    """An extended run has a command for each part."""
    assert main(command(copy, tiny_model, "--iters", "8")) == 0
    page = Page(copy / "report.html")
    config = Workspace(copy).stored_config()
    assert page.texts["pre"] == ["\n".join(reproduce_command(config, iters) for iters in (6, 8))]
    assert "6 to 8" in page.texts["td"]


def test_report_without_run(tmp_path):
    """A folder without a run has no report."""
    with pytest.raises(UserError, match="holds no run"):
        write_report(Workspace(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_report_rewritten(copy, tiny_model):
    """--test writes the report again; a finished run only if it is missing."""
    (copy / "report.html").unlink()
    assert main(command(copy, tiny_model)) == 0
    assert Page(copy / "report.html").texts["h1"] == ["a hamburger"]
    (copy / "report.html").write_text("mine")
    assert main(command(copy, tiny_model)) == 0
    assert (copy / "report.html").read_text() == "mine"
    (copy / "results" / "turntable.mp4").unlink()
    assert main(command(copy, tiny_model)) == 2  # it would replace a report that dream-fast did not write
    assert (copy / "report.html").read_text() == "mine"
    (copy / "report.html").unlink()
    assert main(command(copy, tiny_model)) == 0
    assert sheets(Page(copy / "report.html"))
    assert main(["--test", "--six_views", "--workspace", str(copy), "--W", "32", "--H", "20"]) == 0
    assert decode_image(Page(copy / "report.html").of("img")[0]["src"]).shape[:2] == (20, 32)


# Images


def test_report_turntable_sheets(copy):
    """The sheets have the frames in order."""
    colours = np.linspace(0, 240, 7).astype(np.uint8)  # of frame i, in thirds for the three kinds

    def frame(value: int) -> np.ndarray:
        thirds = [np.full((SIDE, SIDE + 1, 3), (value, third, 255 - value), np.uint8) for third in (0, 120, 240)]
        return np.concatenate(thirds, axis=1)  # 75 wide: the video repeats the last column

    write_video(copy / "results" / "turntable.mp4", map(frame, colours), 25)
    page = Page(write_report(Workspace(copy)))
    (table,) = [one for one in page.of("div") if one.get("id") == "turntable"]
    assert [table[f"data-{name}"] for name in ("frames", "columns", "rows")] == ["7", "3", "3"]
    elements = sheets(page)
    assert list(elements) == ["colour", "normals", "depth"]
    for (_, (attributes, pixels)), third in zip(elements.items(), (0, 120, 240), strict=True):
        assert pixels.shape[:2] == (3 * SIDE, 3 * (SIDE + 1)) and "background-size: 300% 300%" in attributes["style"]
        for index, value in enumerate(colours.astype(int)):
            middle = pixels[index // 3 * SIDE + SIDE // 2, index % 3 * (SIDE + 1) + SIDE // 2]
            assert np.abs(middle - (value, third, 255 - value)).max() < 20, (index, middle)
    assert ["hidden" in attributes for attributes, _ in elements.values()] == [False, True, True]


def test_report_size(copy):
    """The size of the page is bounded."""
    drawn = np.random.default_rng(0)

    def noise(height: int, width: int) -> np.ndarray:
        return drawn.integers(0, 256, (height, width, 3), dtype=np.uint8)

    frame = noise(384, 1152)  # a constant image: the video is small, while the page encodes each frame
    write_video(copy / "results" / "turntable.mp4", (frame for _ in range(MAX_FRAMES + 2)), 25)
    for path in [*(copy / "results").glob("*.png"), *(copy / "validation").glob("*.png")]:
        Image.fromarray(noise(400, 400)).save(path)
    page = Page(write_report(Workspace(copy)))
    assert 1_000_000 < (copy / "report.html").stat().st_size <= MAX_PAGE_BYTES
    (table,) = [one for one in page.of("div") if one.get("id") == "turntable"]
    assert int(table["data-frames"]) == MAX_FRAMES
    assert len(page.of("img")) == 15


def test_report_damaged_files(copy):
    """Missing or damaged files are named."""
    (copy / "results" / "turntable.mp4").write_bytes(b"no video")
    (copy / "results" / "back.png").write_bytes(b"no image")
    (copy / "guidance" / "step_000003.png").write_bytes(b"no image")
    (copy / "metrics.jsonl").write_bytes(b'junk\n[]\n{"step": 1, "loss_guidance": null}\n{"ste')
    page = Page(write_report(Workspace(copy)))
    missing = "\n".join(page.texts["p"])
    assert "turntable.mp4 cannot be read" in missing and "back.png cannot be read" in missing
    assert "step_000003.png cannot be read" in missing
    assert len(page.of("img")) == 13 and "nothing was recorded" in page.texts["text"]
    row = '{"step": 2, "phase": 3, "loss_guidance": %s, "it_per_s": "fast", "samples": [1], "lr": {}}\n'
    (copy / "metrics.jsonl").write_text("".join(row % value for value in ("1", "NaN", "1e400", "true", "1" * 400)))
    assert len(Page(write_report(Workspace(copy))).of("img")) == 13
    for folder in ("results", "validation", "guidance"):
        shutil.rmtree(copy / folder)
    (copy / "metrics.jsonl").unlink()
    page = Page(write_report(Workspace(copy)))
    assert page.of("img") == [] and "no turntable was made" in page.texts["p"]


def test_report_refused_images(copy, monkeypatch):
    """Too many pixels, too long a text, and a video that is too narrow are named."""
    long = PngInfo()
    long.add_text("t", "x" * 2_000_000, zip=True)
    Image.new("RGB", (4, 4)).save(copy / "results" / "back.png", pnginfo=long)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    write_video(copy / "results" / "turntable.mp4", iter([np.zeros((2, 2, 3), np.uint8)]), 25)
    missing = "\n".join(Page(write_report(Workspace(copy))).texts["p"])
    assert "back.png cannot be read" in missing and "turntable.mp4 cannot be read" in missing
    assert "front.png cannot be read: Image size" in missing and "step_000003.png cannot be read" in missing


# Curves


def drawn(series: list[Series], marks=()) -> ElementTree.Element:
    return ElementTree.fromstring(draw_chart("Losses <&>", "loss & more", series, marks))


def lines(root: ElementTree.Element) -> list[ElementTree.Element]:
    """The paths of the series."""
    return [path for path in root.iter("path") if path.get("class", "").startswith("s")]


def points(path: ElementTree.Element) -> list[list[tuple[float, float]]]:
    """The strokes of a path."""
    strokes = [re.findall(r"([\d.]+) ([\d.]+)", part) for part in path.get("d").split("M")[1:]]
    return [[(float(x), float(y)) for x, y in stroke] for stroke in strokes]


def assert_there(point: tuple[float, float], place: tuple[float, float]) -> None:
    """Both have one digit after the point, so each is off by up to 0.05."""
    assert max(abs(a - b) for a, b in zip(point, place, strict=True)) < 0.11


def test_chart_points():
    """Points lie at the values of the ticks."""
    root = drawn([Series("a", [0, 5, 10], [0.0, 5.0, 10.0]), Series("b", [0, 10], [10.0, None])])
    (first, second) = lines(root)
    ticks = {text.text: float(text.get("y")) - 3.5 for text in root.iter("text") if text.get("text-anchor") == "end"}
    columns = {text.text: float(text.get("x")) for text in root.iter("text") if text.get("text-anchor") == "middle"}
    ((start, middle, end),) = points(first)
    assert_there(start, (columns["0"], ticks["0"]))
    assert_there(end, (columns["10"], ticks["10"]))
    assert_there(middle, ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2))
    assert ticks["10"] < ticks["0"] and columns["0"] < columns["10"]
    (((alone,),),) = [points(second)]
    assert_there(alone, (columns["0"], ticks["10"]))
    words = [text.text for text in root.iter("text")]
    assert "step" in words and "loss & more" in words and root.find("title").text == "Losses <&>"


def test_chart_logarithmic_axis():
    """Positive values that differ widely have a logarithmic axis."""
    root = drawn([Series("a", [1, 2, 3], [0.01, 1.0, 100.0])])
    (path,) = lines(root)
    ((low, middle, high),) = points(path)
    assert_there(middle, ((low[0] + high[0]) / 2, (low[1] + high[1]) / 2))
    ticks = [text.text for text in root.iter("text") if text.get("text-anchor") == "end"]
    assert ticks == ["0.01", "0.1", "1", "10", "100"]
    negative = drawn([Series("a", [1, 2, 3], [-0.01, 1.0, 100.0])])
    assert "0.1" not in [text.text for text in negative.iter("text")]


def test_chart_missing_values():
    """A missing value interrupts the line, and a single point is a dot."""
    (path,) = lines(drawn([Series("a", [1, 2, 3, 4, 5], [1.0, 2.0, None, 1.0, 2.0])]))
    assert [len(stroke) for stroke in points(path)] == [2, 2]
    (dot,) = lines(drawn([Series("a", [7], [3.0])]))
    assert dot.get("d").endswith("h0")
    for nothing in ([Series("a", [1], [None])], []):
        assert "nothing was recorded" in [text.text for text in drawn(nothing).iter("text")]


def test_chart_long_lines():
    """Long lines are thinned and smoothed."""
    steps = list(range(1, 3001))
    values = [float(step % 2) for step in steps]
    raw, mean = lines(drawn([Series("a", steps, values)]))
    assert raw.get("class") == "s0 raw" and mean.get("class") == "s0 mean"
    assert all(len(stroke) <= 500 for path in (raw, mean) for stroke in points(path))
    assert max(y for _, y in points(mean)[0][20:]) - min(y for _, y in points(mean)[0][20:]) < 2
    assert running_mean([(1, 1.0), (2, 3.0), (3, None), (4, 7.0)], 2) == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 7.0)]


def test_chart_marks(finished):
    """Marks are at the first step of a phase."""
    page = Page(finished / "report.html")
    assert page.source.count('class="phase"') == 2 * len(page.of("svg"))
    assert page.texts["text"].count("latent") == page.texts["text"].count("shaded") == len(page.of("svg")) == 6
    rows = [{"step": 1, "phase": "albedo"}, {"step": 2, "phase": "albedo"}]
    assert report._marks(rows) == []
    assert report._marks([*rows, {"step": 3, "phase": "shaded"}]) == [(1, "albedo"), (3, "shaded")]


@pytest.mark.parametrize("low", [0.0, -3.7, 12.0, 1e-7, 1e6, 5.0])
@pytest.mark.parametrize("reach", [0.0, 1e-6, 0.3, 1.0, 17.0, 1e5])
def test_linear_axis_ticks(low, reach):
    """An axis includes its values and has a few even ticks."""
    axis = linear_axis(low, low + reach)
    unseen = 1e-6 * (axis.high - axis.low)
    assert axis.low - unseen <= low <= low + reach <= axis.high + unseen and 2 <= len(axis.ticks) <= 9
    steps = torch.from_numpy(np.diff(axis.ticks))
    check("steps", steps, steps.mean().expand_as(steps), steps.mean().expand_as(steps))
    assert axis.fraction(axis.high) == 1
    words = [format_number(tick, _digits(axis.ticks)) for tick in axis.ticks]
    assert len(set(words)) == len(words)


def test_format_number():
    """Numbers are short."""
    shown = {
        0: "0",
        0.5: "0.5",
        1234: "1234",
        25000: "25k",
        1.5e6: "1.5M",
        1e-7: "1e-07",
        1e12: "1e+12",
        -20000: "-20k",
    }
    assert {value: format_number(value) for value in shown} == shown
