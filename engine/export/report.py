"""report.html: a run on one page, without other files and without network.

It is made from the files of a workspace: the turntable's frames to drag, the six views, images during the run, charts
of metrics.jsonl, the settings, and the command that reproduces the run.
"""

import base64
import html
import io
import json
import math
import re
import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import av
import numpy as np
from PIL import Image

from dream_fast.engine.config.reproduce import reproduce_command
from dream_fast.engine.config.schema import Config, settings
from dream_fast.engine.errors import UserError, first_line
from dream_fast.engine.export.charts import COLOURS, Series, draw_chart
from dream_fast.engine.files import BadFile, open_regular
from dream_fast.engine.scene.camera import SIX_VIEWS
from dream_fast.engine.text import escape_controls
from dream_fast.engine.workspace.atomic import atomic_write
from dream_fast.engine.workspace.folder import Workspace

TEMPLATE = Path(__file__).with_name("report.html")
MAX_PAGE_BYTES = 6_000_000  # images are shrunk until the page fits
IMAGE_SIDES = (384, 288, 192, 128)  # pixels along the longer edge of an image, tried in this order
MAX_FRAMES = 48  # of the turntable
MAX_VALIDATION_IMAGES, MAX_GUIDANCE_IMAGES = 4, 6
WEBP_QUALITY, WEBP_EFFORT = 82, 2  # effort 4 takes twice the time for 3 % fewer bytes
MAX_PIXELS = 90_000_000  # of an image or a frame that is read
MAX_IMAGE_BYTES, MAX_VIDEO_BYTES, MAX_METRICS_BYTES = 500_000_000, 4_000_000_000, 4_000_000_000
MAX_DECODED_FRAMES = 10_000
MAX_ROWS = 20_000  # of metrics.jsonl; of more, evenly spaced ones are drawn
MAX_ROW_BYTES, MAX_ROW_ENTRIES = 100_000, 64
MAX_LINES, MAX_MARKS = 12, 12  # of a chart
MAX_RUNS = 50  # of the manifest
MAX_TEXT = 100_000  # characters of a value on the page
KINDS = ("colour", "normals", "depth")  # in a frame of the turntable, from left to right


def write_report(workspace: Workspace) -> Path:
    """Write the report of the run in `workspace`; returns its path.

    Missing images are left out, and unreadable ones are named on the page. The time is linear in the rows of
    metrics.jsonl. Raises UserError: when the settings or the manifest are missing or damaged.
    """
    template = Template(TEMPLATE.read_text(encoding="utf-8"))
    config, manifest, rows = workspace.stored_config(), workspace.read_manifest(), _rows(workspace)
    if config is None:
        raise UserError(f"{workspace.path} holds no run to report on")
    manifest = manifest | {"runs": manifest.get("runs", [])[-MAX_RUNS:]}
    sections = _sections(config, manifest, rows)
    for side in IMAGE_SIDES:
        page = template.substitute(sections | _images(workspace, config, side))
        if len(page.encode()) <= MAX_PAGE_BYTES:
            break
    with atomic_write(workspace.report) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return workspace.report


def _images(workspace: Workspace, config: Config, side: int) -> dict[str, str]:
    """The values of the template's placeholders for images, `side` pixels along their longer edge."""
    return {
        "turntable": _turntable(workspace.results / "turntable.mp4", side),
        "views": _six_views(workspace.results, side),
        "strips": _strips(workspace, config, side),
    }


def _sections(config: Config, manifest: Mapping[str, Any], rows: list[dict[str, Any]]) -> dict[str, str]:
    """The values of the template's other placeholders."""
    return {
        "title": text(config.run.text),
        "facts": _summary(config, manifest, rows),
        "curves": _charts(rows),
        "timings": _timings(manifest),
        "repeat": _reproduce(config, manifest),
        "settings": _settings(config),
        "machine": _machine(manifest),
    }


def text(value: Any) -> str:
    """Escape a value as text of a page: markup, terminal control characters, and characters that change direction."""
    words = str(value)
    if len(words) > MAX_TEXT:
        words = f"{words[: MAX_TEXT // 2]} ... ({len(words) - MAX_TEXT} characters) ... {words[-MAX_TEXT // 2 :]}"
    return html.escape("".join(part if part in ("\n", "\t") else escape_controls(part) for part in _PARTS(words)))


_PARTS = re.compile(r"[\n\t]|[^\n\t]+").findall


def _webp(image: Image.Image) -> str:
    """The image as a data URI."""
    file = io.BytesIO()
    image.convert("RGB").save(file, "WEBP", quality=WEBP_QUALITY, method=WEBP_EFFORT)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def _shrink(image: Image.Image, width: int, height: int) -> Image.Image:
    """Shrink an image to fit in `width` x `height`; smaller ones stay."""
    scale = min(1.0, width / image.width, height / image.height)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)


def _image(path: Path, width: int, height: int, alt: str) -> str:
    """An <img> of the file, or a sentence when it cannot be read."""
    try:
        with _open_png(path) as file:
            image = _shrink(file, width, height)
            size = f'width="{image.width}" height="{image.height}"'
            return f'<img src="{_webp(image)}" {size} alt="{text(alt)}">'
    except Exception as error:  # the page is complete whatever a file does to the library
        return _unreadable(path, error)


@contextmanager
def _open_png(path: Path) -> Iterator[Image.Image]:
    """Open a PNG in a folder of a workspace. Raises any error of the library; OSError: it has too many pixels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about many pixels, which are counted here
        with (
            open_regular(path, MAX_IMAGE_BYTES, folder=path.parent.parent) as data,
            Image.open(data, formats=("PNG",)) as image,
        ):
            if image.width * image.height > MAX_PIXELS:
                raise OSError(f"it has {image.width} x {image.height} pixels, too many for this page")
            yield image


def _unreadable(path: Path, error: Exception) -> str:
    reason = f"it {error.reason}" if isinstance(error, BadFile) else first_line(error)
    return f'<p class="missing">{text(path.name)} cannot be read: {text(reason)}</p>'


def _turntable(path: Path, side: int) -> str:
    """All frames of a kind in one image, of which the page shows one frame at a time."""
    if not path.exists():
        return '<p class="missing">no turntable was made</p>'
    try:
        frames = _frames(path, side)
    except Exception as error:  # the page is complete whatever a file does to the library
        return _unreadable(path, error)
    columns = math.ceil(math.sqrt(len(frames)))
    rows = math.ceil(len(frames) / columns)
    size = frames[0][0].size
    sheets = []
    for parts in zip(*frames, strict=True):
        sheet = Image.new("RGB", (columns * size[0], rows * size[1]))
        for number, part in enumerate(parts):
            sheet.paste(part, (number % columns * size[0], number // columns * size[1]))
        sheets.append(_webp(sheet))
    layout = dict(frames=len(frames), columns=columns, rows=rows)
    data = " ".join(f'data-{name}="{value}"' for name, value in layout.items())
    sheet_elements = [
        f'<div class="sheet" data-kind="{kind}" style="aspect-ratio: {size[0]} / {size[1]}; '
        f"background-size: {columns * 100}% {rows * 100}%; background-image: url({sheet})"
        f'"{"" if kind == KINDS[0] else " hidden"}></div>'
        for kind, sheet in zip(KINDS, sheets, strict=True)
    ]
    buttons = "".join(
        f'<button type="button" data-kind="{kind}" aria-pressed="{str(kind == KINDS[0]).lower()}">{kind}</button>'
        for kind in KINDS
    )
    return (
        f'<div id="turntable" {data} style="max-width: {min(2 * size[0], 460)}px"><div class="stage" role="slider" '
        f'tabindex="0" aria-label="turn the object" aria-valuemin="0" aria-valuemax="360" aria-valuenow="0">'
        f'{"".join(sheet_elements)}</div><div class="bar">{buttons}'
        '<button type="button" id="play">pause</button></div></div>'
    )


def _frames(path: Path, side: int) -> list[list[Image.Image]]:
    """The frames to show, each as a small image of each kind. Raises OSError: when there are none."""
    frames: list[list[Image.Image]] = []
    with (
        open_regular(path, MAX_VIDEO_BYTES, folder=path.parent.parent) as data,
        av.open(data, "r", format="mp4") as video,
    ):
        stream = video.streams.video[0] if video.streams.video else None
        if stream is None or stream.width < len(KINDS) or stream.width * stream.height > MAX_PIXELS:
            raise OSError("it holds no images of the three kinds")
        chosen = set(_spread(range(min(stream.frames, MAX_DECODED_FRAMES)), MAX_FRAMES))
        for number, frame in enumerate(video.decode(video=0)):
            if number in chosen:
                frames.append(_split_kinds(frame.to_ndarray(format="rgb24"), side))
            if number >= max(chosen, default=0):
                break
    if not frames:
        raise OSError("it has no frames")
    return frames


def _split_kinds(frame: np.ndarray, side: int) -> list[Image.Image]:
    width = frame.shape[1] // len(KINDS)  # a column that made the video's width even is left out
    parts = [frame[:, index * width : (index + 1) * width] for index in range(len(KINDS))]
    return [_shrink(Image.fromarray(part), side, side) for part in parts]


def _spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of the items, evenly spaced from the first on."""
    if len(items) <= most:
        return list(items)
    return [items[index * len(items) // most] for index in range(most)]


def _latest(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of the items, evenly spaced up to the last."""
    return _spread(items[::-1], most)[::-1]


def _six_views(folder: Path, side: int) -> str:
    figures = []
    for name, (polar, azimuth) in SIX_VIEWS.items():
        pair = [folder / f"{name}.png", folder / f"{name}_normal.png"]
        images = "".join(_image(path, side, side, path.stem) for path in pair if path.exists())
        if images:
            angles = f"polar {polar:g}°, azimuth {azimuth:g}°"
            figures.append(f"<figure>{images}<figcaption><b>{name}</b> {angles}</figcaption></figure>")
    return "".join(figures) or '<p class="missing">no views were made</p>'


def _strips(workspace: Workspace, config: Config, side: int) -> str:
    """The images during the run: validation images, and those of the guidance."""
    elements = []
    images = _latest(sorted(workspace.validation.glob("step_*.png")), MAX_VALIDATION_IMAGES)
    if images:
        elements.append("<h3>The object, colours above normals</h3>")
    for path in images:
        step = _step(path)
        image = _image(path, 4 * side, side, f"the object after {step} steps")
        elements.append(f'<figure class="wide">{image}<figcaption>after {text(step)} steps</figcaption></figure>')
    guidance_images = _latest(sorted(workspace.guidance.glob("step_*.png")), MAX_GUIDANCE_IMAGES)
    if guidance_images:
        elements.append("<h3>Guidance: render, with noise, one-step estimate</h3>")
        elements.append('<div class="seen">')
        for path in guidance_images:
            step = _step(path)
            image = _image(path, 2 * side, config.camera.batch_size * side, f"guidance of step {step}")
            elements.append(f"<figure>{image}<figcaption>step {text(step)}{_timestep(path)}</figcaption></figure>")
        elements.append("</div>")
    return "".join(elements) or '<p class="missing">no images were saved</p>'


def _step(path: Path) -> str:
    """The step in the name of an image."""
    return path.stem.removeprefix("step_").lstrip("0") or "0"


def _timestep(path: Path) -> str:
    try:
        with _open_png(path) as image:
            return f", t = {text(str(image.info['t'])[:200])}"
    except Exception:  # the page names a damaged image already
        return ""


def _rows(workspace: Workspace) -> list[dict[str, Any]]:
    """The readable rows of metrics.jsonl; of more than MAX_ROWS, evenly spaced ones and the last."""
    rows: list[dict[str, Any]] = []
    last, every, count = None, 1, 0
    if not workspace.metrics.exists():
        return rows
    with open_regular(workspace.metrics, MAX_METRICS_BYTES, folder=workspace.path) as file:
        while line := file.readline(MAX_ROW_BYTES):
            if (row := _row(line)) is None:
                continue
            last, count = row, count + 1
            if (count - 1) % every == 0:
                rows.append(row)
                if len(rows) > MAX_ROWS:
                    rows, every = rows[::2], 2 * every
    return rows if last is None or rows[-1] is last else [*rows, last]


def _row(line: bytes) -> dict[str, Any] | None:
    """The entries of a row that can be shown, or None for an unreadable row."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not (isinstance(row, dict) and type(row.get("step")) is int and 0 <= row["step"] < 2**53):
        return None
    return {"step": row["step"]} | {name: row[name] for name in list(row)[:MAX_ROW_ENTRIES] if _is_plain(row[name])}


def _is_plain(value: Any) -> bool:
    """True for None, text, and numbers that can be drawn."""
    if value is None or isinstance(value, str):
        return True
    return isinstance(value, int | float) and (value == 0 or 1e-200 < abs(value) < 1e200)


class Chart(NamedTuple):
    """A chart: its title, the label of its axis, and the columns of metrics.jsonl."""

    title: str
    label: str
    names: Sequence[str]


def _charts(rows: list[dict[str, Any]]) -> str:
    losses = _names(rows, "loss_")
    rates = _names(rows, "lr_")
    charts = [
        Chart("Losses, weighted", "loss", losses),
        Chart("Gradient of the guidance", "norm in the latents", ["grad_norm"]),
        Chart("Opacity of the rays", "mean", ["opacity"]),
        Chart("Samples of a step", "samples", ["samples"]),
        Chart("Learning rates", "rate", rates or ["lr"]),  # earlier versions logged the base rate alone
        Chart("Speed", "steps a second", ["it_per_s"]),
    ]
    marks = _marks(rows)
    return "".join(_figure(chart, rows, marks) for chart in charts)


def _names(rows: list[dict[str, Any]], prefix: str) -> list[str]:
    """The first MAX_LINES names of entries that begin with `prefix`."""
    names = dict.fromkeys(name for row in rows for name in row if name.startswith(prefix))
    return list(names)[:MAX_LINES]


def _marks(rows: list[dict[str, Any]]) -> list[tuple[int, str]]:
    """The first step of each phase, if there are several; of many the first ones."""
    phases = [(row["step"], str(row.get("phase", ""))[:40]) for row in rows]
    begins = [*phases[:1], *(now for before, now in pairwise(phases) if before[1] != now[1])]
    return begins[:MAX_MARKS] if len(begins) > 1 else []


def _figure(chart: Chart, rows: list[dict[str, Any]], marks: list[tuple[int, str]]) -> str:
    series = []
    for name in chart.names:
        with_name = [row for row in rows if name in row]
        values = [value if isinstance(value := row[name], int | float) else None for row in with_name]
        series.append(Series(name.removeprefix("loss_")[:80], [row["step"] for row in with_name], values))
    keys = "".join(f'<span class="key s{i % COLOURS}">{text(line.name)}</span>' for i, line in enumerate(series))
    legend = f'<div class="keys">{keys}</div>' if len(series) > 1 else ""
    drawing = draw_chart(chart.title, chart.label, series, marks)
    return f"<figure><figcaption><b>{text(chart.title)}</b></figcaption>{drawing}{legend}</figure>"


def _summary(config: Config, manifest: Mapping[str, Any], rows: list[dict[str, Any]]) -> str:
    runs = manifest.get("runs", [])
    last = runs[-1] if runs else {}
    facts = {
        "steps": last.get("to_step", config.run.iters),
        "time": _duration(sum(run.get("seconds", 0.0) for run in runs)),
        "image model": manifest.get("model", "?"),
        "device": last.get("device", config.run.device),
        "seed": config.run.seed,
        "finished": last.get("finished", "?"),
        "peak memory": _memory(last),
    }
    if speeds := [speed for row in rows if isinstance(speed := row.get("it_per_s"), int | float) and speed > 0]:
        facts["median speed"] = f"{statistics.median(speeds):.2f} steps a second"
    if config.run.negative:
        facts["negative prompt"] = config.run.negative
    facts |= {f"prompt, {view}": prompt for view, prompt in config.run.view_prompts.items()}
    return _list(facts)


def _list(facts: Mapping[str, Any]) -> str:
    return "<dl>" + "".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in facts.items()) + "</dl>"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _timings(manifest: Mapping[str, Any]) -> str:
    head = ["steps", "start", "optimisation", "outputs", "in all", "peak memory", "device"]
    lines = []
    for run in manifest.get("runs", []):
        seconds_of = run.get("seconds_of", {})
        memory = _memory(run)
        times = [f"{seconds_of[part]:.1f} s" if part in seconds_of else "–" for part in ("start", "steps", "outputs")]
        whole = f"{run['seconds']:.1f} s" if "seconds" in run else "stopped before its end"
        span = f"{run.get('from_step', '?')} to {run.get('to_step', '?')}"
        lines.append([span, *times, whole, memory, run.get("device", "?")])
    return _table(head, lines)


def _memory(run: Mapping[str, Any]) -> str:
    return ", ".join(f"{count / 1e9:.2f} GB {place}" for place, count in run.get("peak_bytes", {}).items()) or "–"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cells = "".join(f"<th>{text(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'


def _reproduce(config: Config, manifest: Mapping[str, Any]) -> str:
    """The command that reproduces the run, one for each time that it was continued."""
    ends = list(dict.fromkeys(run["to_step"] for run in manifest.get("runs", []) if "to_step" in run))
    lines = [reproduce_command(config, iters) for iters in ends or [config.run.iters]]
    # The page must not break a line between the dashes of a flag and its name.
    return re.sub(r"(?<= )-\S*", r'<span class="flag">\g<0></span>', text("\n".join(lines)))


def _settings(config: Config) -> str:
    tables = []
    for section, values in config.to_dict().items():
        meanings = {field.name: field.metadata["help"] for owner, field in settings() if owner.name == section}
        lines = [[f"--{name}", _format_value(value), meanings[name]] for name, value in values.items()]
        tables.append(f"<h3>{text(section)}</h3>" + _table(["setting", "value", "meaning"], lines))
    return "".join(tables)


def _format_value(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return {None: "none", "": '""'}.get(value, str(value))


def _machine(manifest: Mapping[str, Any]) -> str:
    runs = manifest.get("runs", [])
    if not runs:
        return ""
    last = runs[-1]
    facts = {"attention": last.get("attention"), "code": last.get("git") or "an installed package"}
    return _list(facts | last.get("machine", {}) | last.get("versions", {}))
