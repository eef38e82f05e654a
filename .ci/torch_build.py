"""Prints which torch this Python has, without importing it: none, old (before 2.10), cpu, or gpu."""

import importlib.util
import runpy
from pathlib import Path

spec = importlib.util.find_spec("torch")
if spec is None or not spec.origin:
    print("none")
else:
    facts = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    version = tuple(int(part) for part in facts["__version__"].split(".")[:2])
    if version < (2, 10):
        print("old")
    else:
        print("gpu" if facts.get("cuda") or facts.get("hip") or facts.get("xpu") else "cpu")
