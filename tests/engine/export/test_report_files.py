"""The report is complete whatever one of the files that it reads is or holds."""

import io
import json
import os
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from dream_fast.engine.config.presets import reference
from dream_fast.engine.export import report
from dream_fast.engine.export.charts import running_mean
from dream_fast.engine.export.report import write_report
from dream_fast.engine.workspace.folder import Workspace

STEP = "validation/step_000003.png"
VIDEO = "results/turntable.mp4"


def image(kind: str, side: int = 8) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side)).save(file, kind)
    return file.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def large(width: int, height: int) -> bytes:
    """The beginning of a PNG of that size."""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    workspace = Workspace(tmp_path / "run")
    workspace.write_config(reference().override({"text": "a hamburger", "seed": 3}))
    workspace.write_manifest({"text": "a hamburger", "seed": 3, "runs": []})
    for folder in (workspace.validation, workspace.results):
        folder.mkdir()
    return workspace


def page(workspace: Workspace) -> str:
    text = write_report(workspace).read_text(encoding="utf-8")
    assert "<h1" in text and "--seed" in text and text.rstrip().endswith("</html>")
    return text


CONTENTS = {
    **{kind: image(kind) for kind in ("GIF", "TIFF", "BMP", "JPEG", "WEBP", "PPM", "TGA", "PDF")},
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
    "empty": b"",
    "cut": image("PNG", 64)[:-30],
    "many pixels": large(20_000, 20_000),
    "too many pixels": large(2**31 - 1, 2**31 - 1),
    "long text": image("PNG")[:33] + chunk(b"zTXt", b"k\0\0" + zlib.compress(b"x" * 5_000_000)) + image("PNG")[33:],
    "playlist": b"#EXTM3U\n#EXTINF:10,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
    "list of videos": b"ffconcat version 1.0\nfile /etc/passwd\n",
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
@pytest.mark.parametrize("name", [STEP, VIDEO])
def test_report_other_contents(name: str, content: bytes, workspace: Workspace) -> None:
    """Images and videos of other formats, too large or broken ones are named, and all else is on the page."""
    (workspace.path / name).write_bytes(content)
    text = page(workspace)
    assert f'class="missing">{Path(name).name} cannot be read: ' in text and "passwd" not in text


@pytest.mark.parametrize("kind", ["folder", "pipe", "link", "device"])
@pytest.mark.parametrize("name", [STEP, VIDEO, "results/front.png"])
def test_report_other_kinds(name: str, kind: str, workspace: Workspace, tmp_path: Path) -> None:
    """What is not a file, or is elsewhere, is not read and not waited for."""
    path = workspace.path / name
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        (tmp_path / "secret.png").write_bytes(image("PNG"))
        path.symlink_to(tmp_path / "secret.png" if kind == "link" else "/dev/zero")
    assert f'class="missing">{path.name} cannot be read: ' in page(workspace)


@pytest.mark.parametrize(
    "row",
    [
        {"step": 10**299, "loss_a": 1.0},
        {"step": 2**53 - 1, "loss_a": 1.0},
        {"step": 1, "loss_a": 5e-324, "opacity": 1e-308},
        {"step": 1, "loss_a": 1e299, "grad_norm": -1e299},
        {"step": 1, **{f"loss_{i}": 1.0 for i in range(1000)}},
        {"step": 1, "phase": "x" * 10_000, "loss_a": True, "it_per_s": "x", "opacity": [1]},
        {"step": -1, "loss_a": 1.0},
    ],
)
def test_report_odd_rows(row: dict, workspace: Workspace) -> None:
    """Numbers beyond a drawing, and rows with many or odd entries, cost nothing but themselves."""
    rows = [{"step": 0, "phase": "a", "loss_a": 0.5}, row, row | {"phase": "b"}]
    workspace.metrics.write_text("".join(json.dumps(entry) + "\n" for entry in rows))
    assert len(page(workspace)) < 200_000


def test_report_many_rows(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more rows than are drawn, evenly spaced ones and the last are taken; the first is among them."""
    monkeypatch.setattr(report, "MAX_ROWS", 100)
    workspace.metrics.write_text("".join(json.dumps({"step": step, "loss_a": 1.0}) + "\n" for step in range(1003)))
    steps = [row["step"] for row in report._rows(workspace)]
    assert steps[0] == 0 and steps[-1] == 1002 and 50 <= len(steps) <= 102
    assert {after - before for before, after in zip(steps[:-2], steps[1:-1], strict=True)} == {16}


def test_running_mean_every() -> None:
    """Means for some of the points are those of all points at these places."""
    points = [(step, None if step % 7 == 3 else float(step * step)) for step in range(100)]
    for every in (1, 3, 50):
        assert running_mean(points, 9, every) == running_mean(points, 9)[::every]


HIDDEN = [0x200B, 0x200C, 0x200D, 0x200E, 0x200F, 0x61C, 0x2028, 0x2029, 0xAD, 0xFEFF, 0xE0041, 0x202E, 0x2066, 0xFE0F]
HIDDEN += [0x2060, 0x180E, 0x3164, 0x115F, 0x2800, 0xFFF9, 0x2065, 0x1D173, 0xE0100, 0x1B, 0x85, 0x9B, 0x34F, 0x17B4]


def test_report_invisible_characters(workspace: Workspace) -> None:
    """Characters that are invisible or change the direction are escaped wherever text of a run is on the page."""
    hidden = "a" + "b".join(map(chr, HIDDEN)) + "c"
    workspace.write_config(reference().override({"text": hidden, "negative": hidden, "seed": 3}))
    workspace.write_manifest({"text": hidden, "seed": 3, "model": hidden, "runs": [{"device": hidden, "to_step": 1}]})
    workspace.metrics.write_text(json.dumps({"step": 1, "phase": hidden, f"loss_{hidden}": 1.0}) + "\n" * 2)
    (workspace.validation / "step_00\u202e\u200b3.png").write_bytes(image("PNG"))
    text = page(workspace)
    assert not [f"{code:x}" for code in HIDDEN if chr(code) in text]
    assert "\\u200b" in text and "\\U000e0041" in text
