"""Wall-clock time and memory of the main command, as a user runs it. `python -m dream_fast.bench end_to_end`.

Results keep the name main_job-<device>.json, which earlier versions wrote.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from dream_fast.bench.results import RESULTS
from dream_fast.engine.runtime.device import machine

PROMPT = "a hamburger"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dream_fast.bench end_to_end", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of main_job-cpu.json or main_job-cuda.json")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-P", "-m", "dream_fast.cli", "--text", PROMPT, "--workspace", f"{folder}/trial"]
        command += ["-O", "--save_mesh", "--seed", "0", "--device", args.device]
        start = time.monotonic()
        subprocess.run(command, check=True)
        seconds = time.monotonic() - start
        manifest = json.loads(Path(folder, "trial", "manifest.json").read_text())["runs"][-1]
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    record = {
        "seconds": round(seconds, 1),
        "seconds_of": manifest["seconds_of"],
        "host_peak_bytes": peak,
        "peak_bytes": manifest["peak_bytes"],
        "gpu": torch.cuda.get_device_name() if args.device == "cuda" else None,
        "machine": machine(),
        "torch": torch.__version__,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"main_job-{args.device}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))
    return 0
