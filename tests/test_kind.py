"""What users of such programs type and complain about gets the answer that they need."""

import subprocess
import sys

import dream_fast


def test_module_is_the_command(tmp_path):
    """`python -m dream_fast` is the command, and `python -m dream_fast.bench` lists the measurements."""
    version = subprocess.run([sys.executable, "-m", "dream_fast", "--version"], capture_output=True, text=True)
    assert (version.returncode, version.stdout) == (0, f"dream-fast {dream_fast.__version__}\n"), version.stderr
    refused = subprocess.run([sys.executable, "-m", "dream_fast"], capture_output=True, text=True, cwd=tmp_path)
    assert refused.returncode == 2 and refused.stderr.startswith("dream-fast: error: no prompt")
    bench = subprocess.run([sys.executable, "-m", "dream_fast.bench", "--help"], capture_output=True, text=True)
    assert bench.returncode == 0 and bench.stdout.startswith("usage: python -m dream_fast.bench COMMAND")
