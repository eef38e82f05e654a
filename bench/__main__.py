"""`python -m dream_fast.bench COMMAND`: measurements that anyone can repeat."""

import importlib
import sys
from typing import NamedTuple

from dream_fast.bench.results import IN_REPOSITORY


class Command(NamedTuple):
    """The module below `dream_fast.bench` whose `main` is called, and one line of help."""

    module: str
    help: str


COMMANDS = {
    "kernels": Command("ops.run", "accuracy and speed of every operator on a GPU"),
    "step": Command("pipeline.step", "time, memory and parts of a whole step, also at Stable Diffusion's size"),
    "models": Command("pipeline.models", "time and memory of a guidance step of SDXL, SD3, PRX and FLUX.2"),
    "end_to_end": Command("pipeline.end_to_end", "time and memory of `dream-fast --text` from start to exit"),
    "compare": Command("compare", "slowdowns of a result of `kernels` against an earlier one"),
    "timing": Command("regression.timing", "speed on a CPU compared with an earlier commit, on the same machine"),
    "aot": Command("ops.aot", "registers, spills and instructions of every kernel, compiled without a GPU"),
    "quality": Command("quality.run", "whole runs with default settings, scored by the classifier"),
    "world": Command("quality.world", "renders of the procedural world, with which `quality` compares results"),
    "mesh": Command(
        "pipeline.mesh_export", "meshes of finished runs compared with their fields, and the time of the export"
    ),
    "sharpness": Command("pipeline.mesh_sharpness", "mesh refinement against the field that it began from"),
    "kill_resume": Command(
        "reliability.kill_resume", "runs that are killed and resumed, compared with one that is not"
    ),
    "soak": Command("reliability.soak", "memory, open files and speed of a long run"),
    "selftest": Command("doctor.selftest", "every kernel once against its reference, on tiny inputs"),
    "report": Command("report", "the tables of PROFILING.md, from bench/results"),
    "quality_page": Command("quality.page", "docs/quality.md, from the results of `quality --name`"),
    "command_lines": Command("compat.command_lines", "docs/coming_from_stable_dreamfusion.md, from runs of its lines"),
}
# These read or write files that an installed package does not contain.
NEED_REPOSITORY = ("timing", "aot", "quality", "world", "sharpness", "report", "quality_page", "command_lines")
ALIASES = {
    "main_job": "end_to_end",
    "kills": "kill_resume",
    "long_run": "soak",
    "reference_lines": "command_lines",
}


def main(argv: list[str]) -> int:
    name = ALIASES.get(argv[0], argv[0]) if argv else ""
    if name not in COMMANDS:
        print("usage: python -m dream_fast.bench COMMAND [--help]\n")
        for name, command in COMMANDS.items():
            print(f"  {name:15} {command.help}")
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    if name in NEED_REPOSITORY and not IN_REPOSITORY:
        print(
            f"error: `bench {name}` needs the repository: an installed package lacks the files that it reads "
            "and writes; run it in a clone",
            file=sys.stderr,
        )
        return 2
    return importlib.import_module(f"dream_fast.bench.{COMMANDS[name].module}").main(argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
