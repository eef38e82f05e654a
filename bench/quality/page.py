"""Write docs/quality.md: results compared with objects of the world. `python -m dream_fast.bench quality_page`.

Tables from results/quality-*.json, a column each, are written between the page's markers; `bench quality --name NAME`
writes such a file, and its sheet of images.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from dream_fast.bench.results import RESULTS, ROOT

PAGE = ROOT / "docs" / "quality.md"
BEGIN, END = "<!-- generated: quality -->", "<!-- end: quality -->"
MEASURES = {  # name -> title
    "roughness_deg": "roughness, degrees",
    "edge_ratio": "edge ratio",
    "edge_width": "edge width, pixels",
    "floaters": "floaters a view",
    "color_error": "colour error, CIEDE2000",
    "kid": "kernel distance",
    "object": "object",
    "object_color": "object and colour",
    "janus_rate": "front seen from behind",
    "mesh_psnr": "mesh compared with field, worst view, dB",
    "mesh_iou": "the same, overlap",
    "mesh_roughness_deg": "roughness of the mesh, degrees",
}
TILE, ACROSS = 160, 3  # pixels of an image of the sheet, prompts in a row


def read_records(folder: Path = RESULTS) -> dict[str, dict]:
    """The named measurements, by name, in the order of their time."""
    records = {
        path.stem.removeprefix("quality-"): json.loads(path.read_text()) for path in folder.glob("quality-*.json")
    }
    return dict(sorted(records.items(), key=lambda item: item[1]["utc"]))


def select_column(record: Mapping, part: str) -> dict[str, float]:
    """The measures of a record for the fixed prompts (part "") or the held-out ones ("held_out")."""
    summary = record["held_out"] if part else record
    values = {name: summary.get(name) for name in MEASURES} | record[f"{part}_look".removeprefix("_")]["result"]
    return {name: value for name, value in values.items() if value is not None}


def format_table(records: Mapping[str, Mapping], part: str) -> str:
    """A Markdown table: a row a measure, a column for each record and for the world; empty without records."""
    columns = {name: select_column(record, part) for name, record in records.items()}
    columns = {name: column for name, column in columns.items() if column}
    if not columns:
        return ""
    key = f"{part}_look".removeprefix("_")
    world: dict[str, float] = next((r[key]["world"] for r in reversed(list(records.values())) if "world" in r[key]), {})
    lines = [f"| | {' | '.join(columns)} | the world's own |", f"|{'---|' * (len(columns) + 2)}"]
    for name, title in MEASURES.items():
        values = [*(column.get(name) for column in columns.values()), world.get(name)]
        if any(value is not None for value in values):
            lines.append(f"| {title} | {' | '.join('' if v is None else f'{v:.3g}' for v in values)} |")
    return "\n".join(lines)


def format_attributes(records: Mapping[str, Mapping]) -> str:
    """A Markdown table: a row a prompt that names a part or pattern; empty without records that have any."""
    measured = {name: record.get("attributes", {}) for name, record in records.items()}
    measured = {name: shares for name, shares in measured.items() if shares.get("prompts")}
    if not measured:
        return ""
    lines = [f"| | {' | '.join(measured)} |", f"|{'---|' * (len(measured) + 1)}"]
    prompts = dict.fromkeys(prompt for shares in measured.values() for prompt in shares["prompts"])
    rows = {prompt: [shares["prompts"].get(prompt) for shares in measured.values()] for prompt in prompts}
    for title, key in (("mean", "result"), ("renders of the world", "world")):
        rows[title] = [shares[key] for shares in measured.values()]
    for title, values in rows.items():
        lines.append(f"| {title} | {' | '.join('' if v is None else f'{v:.3f}' for v in values)} |")
    return "\n".join(lines)


def format_source(name: str, record: Mapping) -> str:
    """The runs, device, commit and date of a column."""
    runs, held_out = record["runs"], record["held_out"]["runs"]
    of = f"{runs} runs of fixed prompts" + (f" and {held_out} of held-out ones" if held_out else "")
    return f"`{name}`: {of}, {record['device']}, commit {record['commit']}, {record['utc'][:10]}."


def generated(records: Mapping[str, Mapping]) -> str:
    parts = [
        (title, format_table(records, part))
        for title, part in (("Fixed prompts", ""), ("Held-out prompts", "held_out"))
    ]
    parts.append(("Parts and patterns: share of images that show what the prompt names", format_attributes(records)))
    text = "\n\n".join(f"### {title}\n\n{lines}" for title, lines in parts if lines)
    sources = "\n".join(f"- {format_source(name, record)}" for name, record in records.items())
    sheets = "\n\n".join(f"![{name}](../bench/results/quality-{name}.jpg)" for name in records)
    return f"{BEGIN}\n{text}\n\n{sources}\n\n{sheets}\n{END}"


def fill_page(page: str, records: Mapping[str, Mapping]) -> str:
    """The page with the text between its markers replaced."""
    before, rest = page.split(BEGIN)
    return before + generated(records) + rest.split(END)[1]


def write_sheet(strips: Path, names: list[str], path: Path) -> None:
    """A small sheet of the strips of runs: of each the view from the front's right, as it is and as normals."""
    files = [strips / f"{name}.jpg" for name in names if (strips / f"{name}.jpg").exists()]
    sheet = Image.new("RGB", (ACROSS * 2 * TILE, -(-len(files) // ACROSS) * TILE), "white")
    for number, file in enumerate(files):
        strip = Image.open(file)
        half = strip.crop((0, 0, strip.width // 2, strip.height)).resize((2 * TILE, TILE), Image.Resampling.LANCZOS)
        sheet.paste(half, (number % ACROSS * 2 * TILE, number // ACROSS * TILE))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, quality=85)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dream_fast.bench quality_page", description=__doc__.split("\n\n")[0]
    )
    parser.parse_args(argv)
    PAGE.write_text(fill_page(PAGE.read_text(encoding="utf-8"), read_records()), encoding="utf-8")
    return 0
