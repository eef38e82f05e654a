"""Check an installation: `dream-fast --doctor`.

It checks versions, GPU and driver, the implementations of attention, and every kernel once against its reference (in a
separate process, since a broken driver may end it). Exit status 0: runs work, possibly slowly; 1: there is a problem,
with advice.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from importlib import import_module, metadata
from typing import NamedTuple

import dream_fast
from dream_fast.engine.errors import first_line

NEEDED = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "safetensors",
    "numpy",
    "pillow",
    "av",
    "trimesh",
    "fast-simplification",
    "uvunwrap",
    "xatlas",
    "rich",
)
SECONDS = 300.0  # for the kernels, most of it compiling the first time
TORCH_WITH_CUDA = "install a CUDA build of torch; see pytorch.org for the command"


class Finding(NamedTuple):
    """A result. state: "ok"; "note": not needed for runs; "wrong": runs would fail, see `advice`."""

    state: str
    message: str
    advice: str = ""


def find_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def check_packages() -> Iterator[Finding]:
    yield Finding(
        "ok", f"dream-fast {dream_fast.__version__}, Python {platform.python_version()}, {platform.platform()}"
    )
    versions = {package: find_version(package) for package in NEEDED}
    yield Finding("ok", ", ".join(f"{package} {number}" for package, number in versions.items() if number))
    for package in [package for package, number in versions.items() if number is None]:
        yield Finding("wrong", f"{package} is not installed", f"pip install {package}")


def find_driver() -> str | None:
    """The driver version reported by nvidia-smi, or None without an NVIDIA GPU."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.split()[0] if done.returncode == 0 and done.stdout.strip() else None


def check_gpu(torch) -> Finding:
    """Check that torch can compute on the GPU, if there is one."""
    number, built = find_driver(), torch.version.cuda
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        if number is None:
            build = f" (torch is built for CUDA {built}, which is harmless)" if built else ""
            return Finding("note", f"no NVIDIA GPU{build}: runs use the CPU")
        if built is None:
            return Finding("wrong", "there is a GPU, but the installed torch is a CPU build", TORCH_WITH_CUDA)
        reason = first_line(warned[-1].message) if warned else "no reason given"
        return Finding(
            "wrong",
            f"there is a GPU with driver {number}, but torch, built for CUDA {built}, cannot use it ({reason})",
            "update the driver, or install torch for an older CUDA; until then use --device cpu",
        )
    try:
        name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
        memory = torch.cuda.get_device_properties(0).total_memory
        count = torch.cuda.device_count()
        torch.ones(8, device="cuda").sum().item()
    except Exception as error:  # any error of the driver
        advice = "restart the machine or its driver; until then use --device cpu"
        return Finding("wrong", f"a computation on the GPU failed: {first_line(error)}", advice)
    message = f"{name}, {memory / 2**30:.0f} GiB, sm_{capability[0]}{capability[1]}, driver {number}, CUDA {built}"
    if count > 1:
        message += f"; the first of {count}, use --device cuda:1 for the next"
    if capability < (8, 0):
        return Finding("note", f"{message}; the kernels are written for sm_80 and later")
    return Finding("ok", message)


def check_triton(on_gpu: bool) -> Finding:
    try:
        import_module("triton")
    except Exception as error:  # a broken build can raise anything
        reason = first_line(error)
        if on_gpu:
            advice = "pip install triton; until then use --device cpu"
            return Finding("wrong", f"triton cannot be imported ({reason}), and the kernels need it on a GPU", advice)
        return Finding("note", f"triton cannot be imported ({reason}); runs on a CPU do not need it")
    return Finding("ok", f"triton {find_version('triton')}")


def check_attention(torch, device) -> Iterator[Finding]:
    from dream_fast.engine.guidance.model.attention import KINDS, Shape, unsupported_reason
    from dream_fast.engine.runtime.quiet import quiet_diffusers

    quiet_diffusers()  # xformers prints six lines otherwise

    dtype = torch.float16 if device.type == "cuda" else torch.float32
    advice = {
        "xformers": "optional: pip install a build of xformers for this torch",
        "cudnn": "included in CUDA builds of torch",
    }
    for kind in KINDS:
        reason = unsupported_reason(kind, Counter({Shape(1, 64, 64, 2, 64): 1}), device, dtype, gradient=False)
        if reason is None:
            yield Finding("ok", f"attention {kind}")
        elif kind == "sdpa":
            yield Finding("wrong", f"attention sdpa does not work ({reason})", "reinstall torch: all runs need it")
        else:
            yield Finding("note", f"attention {kind} is not available; runs use another one", advice[kind])


def kernels_advice(on_gpu: bool) -> tuple[str, str]:
    """State and advice for a failing kernel; runs on a CPU call no kernel of Triton."""
    if not on_gpu:
        return "note", "runs on this CPU do not use Triton's kernels; please report this line with the versions above"
    cache = os.environ.get("TRITON_CACHE_DIR") or "~/.triton/cache"
    advice = (
        f"empty Triton's cache ({cache}) and try again; if that fails, please report this line and the versions above"
    )
    return "wrong", f"{advice}; until then use --backbone grid_torch or --device cpu"


def check_kernels(on_gpu: bool, seconds: float = SECONDS) -> Iterator[Finding]:
    """Check each kernel against its reference, on the GPU or in Triton's interpreter."""
    how = "on the GPU" if on_gpu else "in Triton's interpreter"
    environment = dict(os.environ) if on_gpu else os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-P", "-m", "dream_fast.bench", "selftest"]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
        out, status, errors = done.stdout, done.returncode, done.stderr
    except subprocess.TimeoutExpired as error:
        out = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        status, errors = 124, f"not finished after {seconds:g} s"
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    right = [line["kernel"] for line in lines if line["error"] is None]
    if right:
        took = sum(line["seconds"] for line in lines)
        yield Finding("ok", f"kernels correct {how}, {took:.1f} s: {', '.join(right)}")
    state, advice = kernels_advice(on_gpu)
    for line in lines:
        if line["error"] is not None:
            yield Finding(state, f"kernel {line['kernel']} {how}: {line['error']}", advice)
    if status not in (0, 1) or not lines:
        last = (errors.strip().splitlines() or ["no message"])[-1]
        yield Finding(state, f"the self test of the kernels failed with status {status}: {last[:300]}", advice)


def make_findings() -> Iterator[Finding]:
    yield from check_packages()
    try:
        torch = import_module("torch")
    except Exception as error:  # a missing library, an old glibc, a broken installation
        yield Finding(
            "wrong", f"torch cannot be imported: {first_line(error)}", "pip install --force-reinstall 'torch>=2.10'"
        )
        return
    finding = check_gpu(torch)
    on_gpu = finding.state != "wrong" and torch.cuda.is_available()
    yield finding
    triton = check_triton(on_gpu)
    yield triton
    yield from check_attention(torch, torch.device("cuda" if on_gpu else "cpu"))
    if triton.state == "ok":
        where = "on the GPU (the first time they are compiled)" if on_gpu else "in Triton's interpreter"
        yield Finding("note", f"comparing every kernel with its reference, {where}")
        yield from check_kernels(on_gpu)


def main() -> int:
    """Print each finding; returns 1 if any is "wrong"."""
    wrong = 0
    for finding in make_findings():
        print(f"{finding.state:5}  {finding.message}", flush=True)
        if finding.advice:
            print(f"       -> {finding.advice}", flush=True)
        wrong += finding.state == "wrong"
    print("this machine is ready for a run" if not wrong else f"problems: {wrong}")
    return int(wrong > 0)
