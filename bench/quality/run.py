"""Quality of whole runs with default settings, by a classifier of their images. `python -m dream_fast.bench quality`.

R-precision over all captions (object, and object x colour) is the share of images, eight azimuths around each object,
whose most likely caption is the prompt's. `janus_rate` is, for objects with a face, the share of images from behind
that show the front; it has a meaning where `front_rate` and `back_rate`, the shares of fronts classified as fronts and
of backs as backs, are high. The prompts were fixed before any setting was tuned.

--work holds finished runs: rows.jsonl (a row for each, written when it ends), views/ (images) and runs/ (workspaces).
The same command resumes there, and at its end writes quality.json from all rows, scored again by the present
classifier; `--seconds 0` starts no run and only writes.

`--scores sds,csd,asd,ism` does that once for each score, each with its own defaults and its own folder under
--work, and writes quality_scores.json, a contact sheet a score (quality_SCORE.png) and a table. ISM (Interval Score
Matching) is measured as sdi, which is of the same family and what --objective offers.
"""

import argparse
import gc
import hashlib
import json
import multiprocessing
import os
import shutil
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dream_fast.bench.finished_run import load_finished
from dream_fast.bench.quality.attributes import share_with_attribute
from dream_fast.bench.quality.classifier import WEIGHTS, Classifier, classify, load_classifier
from dream_fast.bench.quality.measures import kid
from dream_fast.bench.quality.page import write_sheet
from dream_fast.bench.quality.protocol import (
    ATTRIBUTED,
    AZIMUTHS,
    BACK,
    BACKGROUND,
    BEHIND,
    FRONT,
    HELD_OUT,
    PROMPTS,
    SIZE,
)
from dream_fast.bench.quality.run_measures import measure_color, measure_mesh, measure_shape, round_values, write_strip
from dream_fast.bench.quality.world import (
    color_error,
    color_spread,
    main_colors,
    read_probes,
    read_world,
    world_summary,
)
from dream_fast.bench.results import RESULTS, git_state
from dream_fast.engine.config.configure import configure
from dream_fast.engine.config.schema import read_values
from dream_fast.engine.config.sections import GuidanceConfig
from dream_fast.engine.dream_mini import MODEL_FOLDER
from dream_fast.engine.dream_mini.vocabulary import COLORS, THINGS, VIEWS, find_object
from dream_fast.engine.errors import UserError
from dream_fast.engine.export.images import to_uint8
from dream_fast.engine.runtime.device import machine
from dream_fast.engine.scene.camera import turntable
from dream_fast.engine.training.trainer import Trainer

SCORES = ("object", "object_color", "janus", "front", "back")
SHAPE = ("roughness_deg", "edge_ratio", "edge_width", "floaters")
MESH = ("mesh_psnr", "mesh_iou", "mesh_roughness_deg")
ALIASES = {"ism": "sdi"}  # other names of the scores that guide
SHOWN = ("object", "object_color", "janus_rate", "front_rate", "back_rate", "runs")  # in the table of several scores


def expected_classes(prompt: str) -> tuple[int, int | None]:
    """The classes of a prompt: object, and colour where it names one."""
    words = prompt.split()
    color = next((k for k, name in enumerate(COLORS) if name in words), None)
    name = find_object(prompt)
    assert name is not None, f"{prompt!r} names no object of the world"
    return list(THINGS).index(name), color


def assess(classifier: Classifier, images: Tensor, prompt: str) -> dict[str, float | None]:
    """Shares of the images [8, 3, H, W] that are right; None for what the prompt does not name."""
    predictions = classify(classifier, images)
    thing, color = expected_classes(prompt)
    right = predictions.object == thing
    both = None if color is None else (right & (predictions.color == color)).float().mean().item()
    janus = front = back = None
    if list(THINGS.values())[thing].face:
        janus = (predictions.view[list(BEHIND)] == VIEWS.index("front")).float().mean().item()
        front = float(predictions.view[FRONT] == VIEWS.index("front"))
        back = float(predictions.view[BACK] == VIEWS.index("back"))
    return {"object": right.float().mean().item(), "object_color": both, "janus": janus, "front": front, "back": back}


def make_run(prompt: str, seed: int, work: Path, device: str, other: Mapping[str, object]) -> dict:
    """Make one run in this process, with `other` settings, and its images; returns its row."""
    from dream_fast.engine.run import run

    workspace = work / "runs" / _name(prompt, seed)
    shutil.rmtree(workspace, ignore_errors=True)
    typed = {"text": prompt, "seed": seed, "workspace": str(workspace), "fp16": True, "device": device}
    typed |= {"six_views": True, "eval_interval": 1000}  # no video and no images on the way: they change no result
    meshes = other.get("save_mesh", False)  # measured, and not written among the outputs
    config = configure(typed | dict(other) | {"save_mesh": False}, device)
    start = time.monotonic()
    run(config)
    seconds = time.monotonic() - start
    trainer = load_finished(config, workspace)
    strip = torch.cat(list(render_views(trainer)), dim=2).permute(1, 2, 0)
    path = _views(work, prompt, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(to_uint8(strip)).save(path)
    write_strip(trainer, work / "strips" / f"{_name(prompt, seed)}.jpg", config.camera)
    look = measure_shape(trainer) | (measure_mesh(config, workspace, workspace / "measured") if meshes else {})
    del trainer
    gc.collect()
    torch.cuda.empty_cache()
    scores = assess(load_classifier(), read_views(path), prompt) | round_values(look)
    return {"prompt": prompt, "seed": seed, **scores, "seconds": round(seconds, 1), "iters": config.run.iters}


@torch.no_grad()
def render_views(trainer: Trainer) -> Tensor:
    """Render the object from eight azimuths at the default camera, averaged weights: [8, 3, 128, 128] in [0, 1]."""
    device = trainer.device
    background = torch.full((3,), BACKGROUND, device=device)
    with trainer.optimizer.ema_weights():
        cameras = turntable(trainer.config.camera, AZIMUTHS, device)
        return trainer.renderer.view(cameras, SIZE, SIZE, background=background, normals=False).rgb.permute(0, 3, 1, 2)


def read_views(path: Path) -> Tensor:
    """Read the images of a run: [8, 3, 128, 128] in [0, 1]."""
    strip = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
    return torch.stack(strip.split(SIZE, dim=2)).float() / 255


def _name(prompt: str, seed: int) -> str:
    return f"{prompt.replace(' ', '-')}-{seed}"


def _views(work: Path, prompt: str, seed: int) -> Path:
    return work / "views" / f"{_name(prompt, seed)}.png"


def make_runs(
    jobs: list[tuple[str, int]],
    work: Path,
    device: str,
    at_once: int,
    seconds: float,
    other: Mapping[str, object] = MappingProxyType({}),
) -> Iterator[dict]:
    """Rows of the jobs as they end, `at_once` processes each taking one job after the other; `other` as in `make_run`.

    A job is started only if, by the time that the last one took, it ends within `seconds`. A failed job is reported and
    left out; a process that dies ends the rest.
    """
    deadline, queue, last = time.monotonic() + seconds, deque(jobs), 0.0
    running: dict[Future, tuple[str, int, float]] = {}
    threads = max(1, len(os.sched_getaffinity(0)) // at_once)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(at_once, mp_context=context, initializer=_start, initargs=(work, threads)) as pool:
        while True:
            while queue and len(running) < at_once and time.monotonic() + last < deadline:
                prompt, seed = queue.popleft()
                running[pool.submit(make_run, prompt, seed, work, device, dict(other))] = prompt, seed, time.monotonic()
            if not running:
                return
            for job in wait(running, return_when=FIRST_COMPLETED).done:
                prompt, seed, began = running.pop(job)
                last = time.monotonic() - began
                try:
                    yield job.result()
                except BrokenProcessPool:
                    print(f"a process died during {prompt!r}, seed {seed}; see {work}/worker-*.log", flush=True)
                    return
                except Exception as error:  # of any kind: one run that fails does not take the others with it
                    print(f"{prompt!r}, seed {seed}, failed: {error!r}; see {work}/worker-*.log", flush=True)


def _start(work: Path, threads: int) -> None:
    """Start a worker process: its output goes to a separate log, and it uses its share of the cores."""
    log = os.open(work / f"worker-{os.getpid()}.log", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(log, stream)
    torch.set_num_threads(threads)


def read_rows(path: Path) -> list[dict]:
    """Read stored rows, the last of each run; a truncated line is left out."""
    rows = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        rows[row["prompt"], row["seed"]] = row
    return list(rows.values())


def matches_work(work: Path, facts: dict) -> bool:
    """True if `work` is fresh, or holds runs of the same settings, device and model."""
    work.mkdir(parents=True, exist_ok=True)
    path, facts = work / "settings.json", json.loads(json.dumps(facts))
    if path.exists():
        return json.loads(path.read_text()) == facts
    path.write_text(json.dumps(facts, indent=1) + "\n")
    return True


def describe_setup(device: str, other: Mapping[str, object]) -> dict:
    """Describe what all runs of a measurement share: settings, device and the embedded model's weights."""
    digest = hashlib.sha256()
    for path in sorted(MODEL_FOLDER.rglob("*.safetensors")):
        digest.update(path.read_bytes())
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else machine()["processor"],
        "model": digest.hexdigest()[:16],
        "settings": configure({"fp16": True} | dict(other), device).to_dict(),
    }


def _mean(rows: list[dict], name: str) -> float | None:
    values = [row[name] for row in rows if row.get(name) is not None]
    return round(sum(values) / len(values), 4) if values else None


def summarize(rows: list[dict]) -> dict[str, float | None]:
    names = {"janus": "janus_rate", "front": "front_rate", "back": "back_rate"}
    return {**{names.get(name, name): _mean(rows, name) for name in SCORES}, "runs": len(rows)}


def summarize_prompts(rows: list[dict], prompts: tuple[str, ...]) -> list[dict]:
    """A row a prompt: the means over its seeds."""
    table = []
    for prompt in prompts:
        if mine := [row for row in rows if row["prompt"] == prompt]:
            table.append({"prompt": prompt, **summarize(mine), "seconds": _mean(mine, "seconds")})
    return table


def score_again(rows: list[dict], work: Path) -> list[dict]:
    """Replace the scores of rows by those of the present classifier, and their colours by those of their images."""
    classifier, fresh = load_classifier(), []
    for row in rows:
        path, prompt = _views(work, row["prompt"], row["seed"]), row["prompt"]
        if path.exists():
            images = read_views(path)
            row = row | assess(classifier, images, prompt)
            row["color"] = round_values({"": measure_color(images, prompt, BACKGROUND)})[""]
        fresh.append(row)
    return fresh


def compare_with_world(rows: list[dict], work: Path, prompts: tuple[str, ...]) -> dict:
    """Compare the runs of some prompts with the world's own objects: `result`, `world`, and `ratio` of the two.

    kid and color_error are distances to the world already. Measures that need renders of the world are left out where
    none are stored (`bench world`).
    """
    rows = [row for row in rows if row["prompt"] in prompts]
    prompts = tuple(prompt for prompt in prompts if any(row["prompt"] == prompt for row in rows))
    result: dict[str, float | None] = {name: _mean(rows, name) for name in (*SHAPE, *MESH)}
    own: dict[str, float] = {}
    if colored := [row for row in rows if row.get("color")]:
        errors = [color_error(torch.tensor(row["color"]), main_colors(row["prompt"])) for row in colored]
        result["color_error"], own["color_error"] = sum(errors) / len(errors), color_spread(prompts)
    if prompts and (world := read_world(prompts)) is not None:
        own |= world_summary(world)
        paths = [path for row in rows if (path := _views(work, row["prompt"], row["seed"])).exists()]
        if paths:
            classifier = load_classifier()
            shown = torch.cat([classifier.features(read_views(path)) for path in paths])
            result["kid"] = kid(shown, world.features.flatten(0, 2))
    ratio = {name: value / own[name] for name in SHAPE if (value := result[name]) is not None and own.get(name)}
    return {"result": round_values(result), "world": round_values(own), "ratio": round_values(ratio)}


def summarize_attributes(rows: list[dict], work: Path) -> dict[str, object]:
    """Share of the images of ATTRIBUTED prompts that show the part or pattern: `result`, by prompt, and of renders of
    the world; without the prompts for which no probe is stored.
    """
    classifier, probes, shares = load_classifier(), read_probes(), {}
    for prompt, probe in probes.items():
        paths = [_views(work, row["prompt"], row["seed"]) for row in rows if row["prompt"] == prompt]
        features = [classifier.features(read_views(path)) for path in paths if path.exists()]
        if features:
            shares[prompt] = share_with_attribute(torch.cat(features), probe)
    if not shares:
        return {"result": None, "world": None, "prompts": {}}
    own = sum(probes[prompt].accuracy for prompt in shares) / len(shares)
    values = {"result": sum(shares.values()) / len(shares), "world": own}
    return round_values(values) | {"prompts": round_values(shares)}


def contact_sheet(work: Path, prompts: tuple[str, ...], path: Path) -> None:
    """Four views of each prompt's first seed, two prompts a row in their order; the place of a missing run is white."""
    sheet = Image.new("RGB", (2 * 4 * SIZE + 8, -(-len(prompts) // 2) * SIZE), "white")
    for n, prompt in enumerate(prompts):
        file = _views(work, prompt, 0)
        if not file.exists():
            continue
        image = Image.open(file)
        for k in range(4):
            view = image.crop((2 * k * SIZE, 0, (2 * k + 1) * SIZE, SIZE))
            sheet.paste(view, ((n % 2) * (4 * SIZE + 8) + k * SIZE, n // 2 * SIZE))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def score_prior(work: Path, device: str) -> dict:
    """Scores of dream-mini's own images, once for each classifier: four seeds on a GPU, one on a CPU."""
    from dream_fast.bench.quality.classifier.prior import prior_scores

    path = work / f"prior-{hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()[:8]}.json"
    if not path.exists():
        path.write_text(json.dumps(prior_scores(device, 4 if device == "cuda" else 1), indent=1) + "\n")
    return json.loads(path.read_text())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dream_fast.bench quality", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of quality.json and the contact sheet")
    parser.add_argument(
        "--work", type=Path, default=Path("quality"), help="folder of finished runs; an earlier one is resumed"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prompts", nargs="*", help="these instead of the fixed 32")
    parser.add_argument("--scores", help="compare these scores, such as sds,csd,asd,ism")
    of_runs = """of every run, such as '{"iters": 600, "lambda_tv": "0.5:0:1e-5:1.0"}'; default: the model's own"""
    parser.add_argument("--settings", default="{}", metavar="JSON", help=of_runs)
    parser.add_argument("--seconds", type=float, default=1e9, help="start no run that would end later; 0: none at all")
    parser.add_argument("--name", help="also a column of docs/quality.md: writes quality-NAME.json and its sheet")
    parser.add_argument("--no_prior", "--no-prior", action="store_true", help="leave dream-mini's own images out")
    args = parser.parse_args(argv)
    try:
        args.settings = read_settings(args.settings)
        configure(args.settings, args.device)
    except (UserError, ValueError) as error:
        parser.error(f"--settings: {error}")
    if args.scores is not None:
        scores = args.scores.split(",")
        known = (*GuidanceConfig.__dataclass_fields__["objective"].metadata["choices"], *ALIASES)
        if unknown := [name for name in scores if name not in known]:
            parser.error(f"--scores takes some of {','.join(known)}, not {unknown[0]!r}")
        return compare_scores(scores, args, parser)
    record = measure(args, args.work, args.settings, parser, full=True)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "quality.json").write_text(json.dumps(record, indent=1) + "\n")
    contact_sheet(args.work, tuple(args.prompts or PROMPTS), args.out / "quality.png")
    if args.name:
        write_named(args.name, record, args.work, args.out)
    if not args.prompts:
        contact_sheet(args.work, HELD_OUT, args.work / "held_out.png")
    print(json.dumps({k: v for k, v in record.items() if k not in ("rows", "settings")}, indent=1))
    return 0


def write_named(name: str, record: dict, work: Path, out: Path) -> None:
    """Write the record as a column of docs/quality.md, and the sheet of its first seed."""
    about = {"commit": git_state()[0], "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    (out / f"quality-{name}.json").write_text(json.dumps(about | record, indent=1) + "\n")
    shown = [_name(line["prompt"], 0) for line in record["prompts"]]
    write_sheet(work / "strips", shown, out / f"quality-{name}.jpg")


def read_settings(text: str) -> dict[str, object]:
    """Read settings from a JSON object, with schedules as on the command line. Raises ValueError: for other text."""
    settings = json.loads(text)
    if not isinstance(settings, dict):
        raise ValueError(f"a JSON object, not {text}")
    return read_values(settings)


def measure(
    args: argparse.Namespace,
    work: Path,
    other: Mapping[str, object],
    parser: argparse.ArgumentParser,
    *,
    full: bool = False,
) -> dict:
    """Make the runs that `work` lacks, with `other` settings, and return the record of all that there are.

    full: with the classifier's own accuracy and its scores of dream-mini's images.
    """
    held_out, attributed = ((), ()) if args.prompts else (HELD_OUT, ATTRIBUTED)
    prompts = tuple(args.prompts or PROMPTS)
    facts = describe_setup(args.device, other)
    if not matches_work(work, facts):
        parser.error(f"--work {work} holds runs of other settings, another device or another model: name another")
    written = work / "rows.jsonl"
    done = {(row["prompt"], row["seed"]) for row in read_rows(written)}
    jobs = [(prompt, seed) for seed in range(args.seeds) for prompt in (*prompts, *held_out, *attributed)]
    with written.open("a") as file:
        if written.stat().st_size and not written.read_text().endswith("\n"):
            file.write("\n")  # after a line that a killed command left
        for row in make_runs([j for j in jobs if j not in done], work, args.device, args.jobs, args.seconds, other):
            line = json.dumps(row)
            print(line, flush=True)
            file.write(f"{line}\n")
            file.flush()
    rows = score_again([row for row in read_rows(written) if (row["prompt"], row["seed"]) in jobs], work)
    rows.sort(key=lambda row: jobs.index((row["prompt"], row["seed"])))
    missing = len(jobs) - len(rows)
    if missing:
        print(f"{missing} of {len(jobs)} runs are missing: repeat the command to continue")
    classifier = (
        json.loads((Path(__file__).parent / "classifier" / "judge.json").read_text())["held_out"] if full else None
    )
    return {
        **summarize([row for row in rows if row["prompt"] in prompts]),
        "held_out": summarize([row for row in rows if row["prompt"] in held_out]),
        "attributes": summarize_attributes(rows, work),
        "look": compare_with_world(rows, work, prompts),
        "held_out_look": compare_with_world(rows, work, held_out),
        **(score_prior(work, args.device) if full and not args.no_prior else {}),
        **({"judge": classifier} if full else {}),
        **facts,
        "seconds": round(sum(row["seconds"] for row in rows), 1),
        "jobs": args.jobs,
        "prompts": summarize_prompts(rows, (*prompts, *held_out, *attributed)),
        "rows": rows,
    }


def compare_scores(scores: list[str], args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Measure once for each objective in `scores`; writes the table, and a contact sheet for each."""
    args.out.mkdir(parents=True, exist_ok=True)
    records = {}
    for name in scores:
        score = ALIASES.get(name, name)
        if score != name:
            print(f"{name} is measured as {score}, the score of its family that guides here", flush=True)
        work = args.work / score
        records[score] = measure(args, work, {**args.settings, "objective": score}, parser)
        contact_sheet(work, tuple(args.prompts or PROMPTS), args.out / f"quality_{score}.png")
        (args.out / "quality_scores.json").write_text(json.dumps(records, indent=1) + "\n")
    print(format_table(records))
    return 0


def format_table(records: Mapping[str, Mapping]) -> str:
    """A Markdown table with a row for each objective: scores of the prompts, and the seconds of a run."""
    lines = [f"| score | {' | '.join(SHOWN)} | seconds a run |", f"|{'---|' * (len(SHOWN) + 2)}"]
    for score, record in records.items():
        shares = ["" if record[name] is None else f"{record[name]:.3f}" for name in SHOWN[:-1]]
        seconds = _mean(record["rows"], "seconds")
        time_of_one = "" if seconds is None else f"{seconds:.0f}"
        lines.append(f"| {score} | {' | '.join([*shares, str(record['runs'])])} | {time_of_one} |")
    return "\n".join(lines)
