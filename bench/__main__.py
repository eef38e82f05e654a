"""`python -m dream_fast.bench COMMAND`: measurements that anyone can repeat."""

import importlib
import sys

COMMANDS = {
    "aot": "registers, spills and instructions of every kernel, compiled without a GPU",
    "kernels": "accuracy and speed of every operator on a GPU",
    "step": "time, memory and parts of a whole step, also at Stable Diffusion's size",
    "compare": "whether a result of `kernels` is slower than an earlier one",
    "timing": "speed on a CPU beside an earlier commit, on the same machine",
    "main_job": "time and memory of the main command",
    "mesh": "meshes of finished runs beside their fields, and the time of the export",
    "sharpness": "mesh refinement against the field that it began from",
    "reference_lines": "command lines of stable-dreamfusion, run here, into docs/coming_from_stable_dreamfusion.md",
    "kills": "runs that are killed and taken up again, beside one that is not",
    "selftest": "every kernel once against its reference, on tiny inputs",
    "long_run": "memory, open files and speed of a long run",
    "world": "renders of the procedural world, with which `quality` compares results",
    "quality": "whole runs with default settings, or one set of them a score, looked at by the judge",
    "quality_page": "docs/quality.md, from the results of `quality --name`",
}


def main(argv: list[str]) -> int:
    if not argv or argv[0] not in COMMANDS:
        print("usage: python -m dream_fast.bench COMMAND [--help]\n")
        for name, text in COMMANDS.items():
            print(f"  {name:15} {text}")
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    return importlib.import_module(f"dream_fast.bench.{argv[0]}").main(argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
