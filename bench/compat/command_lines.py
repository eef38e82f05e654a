"""Run command lines of stable-dreamfusion's README and scripts. `python -m dream_fast.bench command_lines`.

Each is run for 20 steps with dream-mini, small images and few frames, in a separate folder, and the outcome is written
to docs/coming_from_stable_dreamfusion.md. A line that names a model to download is run with dream-mini
instead.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from dream_fast.bench.results import ROOT

STEPS = 20
SHORT = f"--iters {STEPS} --device cpu --W 96 --H 96 --dataset_size_test 6 --dataset_size_valid 2".split()
FILES = {"scripts/res64.args": "-O --vram_O --w 64 --h 64"}  # that the lines read
PAGE = ROOT / "docs" / "coming_from_stable_dreamfusion.md"
KNOWN = "a hamburger"  # for a prompt of another model that dream-mini does not know


class CommandLine(NamedTuple):
    """A command line after `python main.py`, and the file that it comes from."""

    source: str
    words: str


LINES = (
    CommandLine("README", '--text "a hamburger" --workspace trial -O'),
    CommandLine("README", '--text "a hamburger" --workspace trial -O --vram_O'),
    CommandLine(
        "README",
        '--file scripts/res64.args --workspace trial_awesome_hamburger --text "a photo of an awesome hamburger"',
    ),
    CommandLine("README", '--text "a hamburger" --workspace trial -O --backbone grid_taichi'),
    CommandLine("README", '--text "a hamburger" --workspace trial -O --sd_version 1.5'),
    CommandLine("README", '--text "a hamburger" --workspace trial -O --hf_key andite/anything-v4.0'),
    CommandLine("README", '--text "a hamburger" --workspace trial -O --IF'),
    CommandLine("README", '--text "a hamburger" --workspace trial -O --IF --vram_O'),
    CommandLine("README", '--text "a rose" --negative "red" --workspace trial -O'),
    CommandLine("README", '--text "a hamburger" --workspace trial -O --albedo_iter_ratio 1.0'),
    CommandLine("README", '--text "a hamburger" --workspace trial -O --lambda_entropy 1e-5'),
    CommandLine("README", '--text "a hamburger" --workspace trial -O --gui'),
    CommandLine("README", "--workspace trial -O --test"),
    CommandLine("README", "--workspace trial -O --test --save_mesh"),
    CommandLine("README", '--text "a hotdog" --workspace trial2 -O2'),
    CommandLine(
        "README",
        '-O --text "a hamburger" --workspace trial_dmtet --dmtet --iters 5000 --init_with trial/checkpoints/df.pth',
    ),
    CommandLine("README", "-O --image data/hamburger_rgba.png --workspace trial_image --iters 5000"),
    CommandLine(
        "scripts/run.sh",
        '-O --text "a DSLR photo of a delicious hamburger" --workspace trial_hamburger --iters 5000 --batch_size 4',
    ),
    CommandLine(
        "scripts/run_if2_perpneg.sh",
        '-O --text "a lion bust" --workspace trial_perpneg_if_lion --iters 5000 --IF --batch_size 1 --perpneg',
    ),
    CommandLine(
        "scripts/run_vanilla.sh",
        '-O --text "a DSLR photo of a delicious hamburger" --workspace trial_vanilla_hamburger --iters 10000 '
        "--backbone vanilla",
    ),
)

UNKNOWN = "the embedded model does not know what "  # the start of the error message

_HEAD = """# Coming from stable-dreamfusion

Replace `python main.py` with `dream-fast`. The table lists {count} command lines from the README and the scripts of
stable-dreamfusion, and their results here. `python -m dream_fast.bench command_lines` ran each of them for {steps}
steps with dream-mini on a CPU ({machine}, two shared cores, so the seconds are no benchmark), with
images of 96 x 96 and 6 frames. Each ran in its own folder; a line with `--test` ran in the folder of the first. A test
keeps the messages current. All flags: [options.md](options.md).

Differences:

- The default image model is dream-mini, not Stable Diffusion 2.1. It knows {things} things and refuses a prompt without
  any of them; such a line ran with the prompt "{known}".
- A line that names a model to download ran with dream-mini and otherwise unchanged. The code for those models is tested
  with random weights; their trained weights were not available.
- A workspace holds one run. Many lines of the README share `--workspace trial`. A second run with different settings is
  refused there, and the message lists them; stable-dreamfusion continues from the first run's checkpoint. Use another
  folder or `--ckpt scratch`.
- Model names of 2022 were removed from the hub (`runwayml/stable-diffusion-v1-5`, `stabilityai/stable-diffusion-2`,
  `-2-base`, `-2-1`, `-2-1-base`). `--sd_version` uses existing copies; a removed name is refused, and the message
  contains the name of a copy.
- A run uses one GPU. `--device cuda:1` selects the second one; `CUDA_VISIBLE_DEVICES` works as usual.
- `--test --output FOLDER` writes the outputs of a run to another folder and leaves its workspace unchanged.
- Flags of other programs (`--prompt`, `--steps`, `--cfg_scale`, `--lora`, `--gpu`) are refused with the corresponding
  flag. Weights such as `(red:1.3)` and tags such as `<lora:x:0.8>` in a prompt are treated as words, with a warning
  that suggests an alternative.
- Results are `results/turntable.mp4`, `results/six_views.png`, `mesh/mesh.glb` and `report.html`.

| source | command line | result | details |
|---|---|---|---|
"""


class Outcome(NamedTuple):
    """verdict: works, works with a remark, or refused. details: steps and files, or the error message."""

    verdict: str
    details: str


def run_command(words: list[str], folder: Path) -> subprocess.CompletedProcess:
    """Run the command in `folder`."""
    command = [sys.executable, "-P", "-m", "dream_fast.cli", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def read_refusal(done: subprocess.CompletedProcess) -> str | None:
    """The error message of a refused command, or None. Raises RuntimeError: on any other failure."""
    if done.returncode == 0:
        return None
    if done.returncode != 2:
        raise RuntimeError(done.stderr)
    return done.stderr.strip().splitlines()[-1].removeprefix("dream-fast: error: ")


def write_files(folder: Path) -> None:
    """Write the files that the command lines read."""
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def find_model(words: list[str], folder: Path) -> tuple[str | None, str | None]:
    """(error message, None) for a refused line, otherwise (None, the model that it names; None: dream-mini)."""
    done = run_command([*words, "--device", "cpu", "--print-config"], folder)
    if sentence := read_refusal(done):
        return sentence, None
    settings = json.loads(done.stdout)["guidance"]
    if settings["guidance"] == ["dream-mini"]:
        return None, None
    if settings["guidance"] == ["IF"]:
        return None, settings["if_key"] or "DeepFloyd IF"
    return None, settings["hf_key"] or f"Stable Diffusion {settings['sd_version']}"


def with_dream_mini(words: list[str]) -> list[str]:
    """`words` without the flags that choose a model."""
    remaining, skip = [], False
    for word in words:
        if not skip and word not in ("--IF", "--sd_version", "--hf_key"):
            remaining.append(word)
        skip = word in ("--sd_version", "--hf_key")
    return remaining


def adapt_words(words: list[str], folder: Path) -> tuple[list[str], Outcome]:
    """Words to run in place of those of a line, and its outcome, without details unless it is refused."""
    sentence, model = find_model(words, folder)
    verdict = "works"
    if model:
        verdict = f"works with dream-mini instead of {model}"
        words = with_dream_mini(words)
        sentence, _ = find_model(words, folder)
    if sentence and sentence.startswith(UNKNOWN):
        unknown = f'dream-mini does not know the prompt; "{KNOWN}" works, and so does another model'
        verdict = f'{verdict} and the prompt "{KNOWN}"' if model else unknown
        words = list(words)
        words[words.index("--text") + 1] = KNOWN
        sentence, _ = find_model(words, folder)
    return words, Outcome("refused", sentence) if sentence else Outcome(verdict, "")


def run_line(line: CommandLine, folder: Path) -> Outcome:
    """Run a line in `folder`."""
    write_files(folder)
    words, outcome = shlex.split(line.words), Outcome("works", "")
    if "--test" not in words:  # which needs an earlier run
        words, outcome = adapt_words(words, folder)
    if outcome.verdict == "refused":
        return outcome
    begin = time.monotonic()
    done = run_command([*words, *SHORT], folder)
    seconds = time.monotonic() - begin
    if sentence := read_refusal(done):
        return Outcome("refused", sentence)
    workspace = folder / words[words.index("--workspace") + 1]
    return outcome._replace(details=f"{list_outputs(done.stdout, workspace)}; {seconds:.0f} s")


def list_outputs(output: str, workspace: Path) -> str:
    """The number of steps, and the output files that the command printed."""
    rows = (workspace / "metrics.jsonl").read_text().splitlines()
    names = ("results/turntable.mp4", "results/six_views.png", "mesh/mesh.glb")
    files = ", ".join(f"`{name}`" for name in names if f"/{name} " in re.sub(r"\s+", " ", output))
    return f"{json.loads(rows[-1])['step']} steps; {files}"


def format_row(line: CommandLine, outcome: Outcome) -> str:
    """A row of the table; bars inside cells become slashes."""
    cells = (line.source, f"`{line.words}`", outcome.verdict, outcome.details)
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |\n"


def format_page(outcomes: list[Outcome]) -> str:
    """The text of the page."""
    from dream_fast.engine.dream_mini.vocabulary import THINGS
    from dream_fast.engine.runtime.device import machine

    head = _HEAD.format(count=len(LINES), steps=STEPS, machine=machine()["processor"], things=len(THINGS), known=KNOWN)
    return head + "".join(format_row(line, outcome) for line, outcome in zip(LINES, outcomes, strict=True))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dream_fast.bench command_lines", description=__doc__)
    parser.add_argument("--out", type=Path, default=PAGE, help="page to write")
    args = parser.parse_args(argv)
    outcomes = []
    with tempfile.TemporaryDirectory() as root:
        for number, line in enumerate(LINES):
            folder = Path(root) / ("0" if "--test" in line.words else str(number))
            folder.mkdir(exist_ok=True)
            outcomes.append(run_line(line, folder))
            print(format_row(line, outcomes[-1]), end="", flush=True)
    args.out.write_text(format_page(outcomes), encoding="utf-8")
    return 0
