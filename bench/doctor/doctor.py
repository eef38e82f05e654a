"""`dream-fast --doctor`: what works on this machine, and what to do about the rest.

It checks versions, GPU and driver, the implementations of attention, and every kernel once against its reference (in a
process of its own, since a broken driver may end the process). Exit status 0: runs work here, if slowly; 1: something
has to be put right, and the line says how.
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
TORCH_WITH_CUDA = "install a torch that is built for CUDA: pytorch.org has the command"


class Finding(NamedTuple):
    """A result. state: "ok"; "note": runs work without it; "wrong": a run would fail, and `advice` helps."""

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
    """The driver's version by nvidia-smi, or None without an NVIDIA GPU."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.split()[0] if done.returncode == 0 and done.stdout.strip() else None


def check_gpu(torch) -> Finding:
    """Check that torch computes on the GPU, if there is one."""
    number, built = find_driver(), torch.version.cuda
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        if number is None:
            build = f"; torch is built for CUDA {built}, which does no harm" if built else ""
            return Finding("note", f"no NVIDIA GPU{build}: runs take the CPU")
        if built is None:
            return Finding("wrong", "there is a GPU, but this torch is a build for CPUs", TORCH_WITH_CUDA)
        reason = first_line(warned[-1].message) if warned else "it gives no reason"
        return Finding(
            "wrong",
            f"there is a GPU with driver {number}, but torch, built for CUDA {built}, does not start it ({reason})",
            "update the driver, or install a torch for an older CUDA; with --device cpu runs go on meanwhile",
        )
    try:
        name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
        memory = torch.cuda.get_device_properties(0).total_memory
        count = torch.cuda.device_count()
        torch.ones(8, device="cuda").sum().item()
    except Exception as error:  # any error of the driver
        advice = "restart the machine or its driver; with --device cpu runs go on meanwhile"
        return Finding("wrong", f"the GPU does not compute: {first_line(error)}", advice)
    message = f"{name}, {memory / 2**30:.0f} GiB, sm_{capability[0]}{capability[1]}, driver {number}, CUDA {built}"
    if count > 1:
        message += f"; the first of {count}, --device cuda:1 takes the next"
    if capability < (8, 0):
        return Finding("note", f"{message}; the kernels are written for sm_80 and later")
    return Finding("ok", message)


def check_triton(on_gpu: bool) -> Finding:
    try:
        import_module("triton")
    except Exception as error:  # a broken build fails in its own ways
        reason = first_line(error)
        if on_gpu:
            advice = "pip install triton; with --device cpu runs go on meanwhile"
            return Finding("wrong", f"triton does not load ({reason}), and the kernels need it on a GPU", advice)
        return Finding("note", f"triton does not load ({reason}); a run on a CPU does not need it")
    return Finding("ok", f"triton {find_version('triton')}")


def check_attention(torch, device) -> Iterator[Finding]:
    from dream_fast.engine.guidance.model.attention import KINDS, Shape, unsupported_reason
    from dream_fast.engine.runtime.quiet import quiet_diffusers

    quiet_diffusers()  # instead of six lines by xformers

    dtype = torch.float16 if device.type == "cuda" else torch.float32
    advice = {
        "xformers": "pip install a build of xformers for this torch, if you want it",
        "cudnn": "comes with torch builds for CUDA",
    }
    for kind in KINDS:
        reason = unsupported_reason(kind, Counter({Shape(1, 64, 64, 2, 64): 1}), device, dtype, gradient=False)
        if reason is None:
            yield Finding("ok", f"attention {kind}")
        elif kind == "sdpa":
            yield Finding("wrong", f"attention sdpa does not work ({reason})", "install torch anew: all runs need it")
        else:
            yield Finding("note", f"attention {kind} is not available here; runs take another", advice[kind])


def kernels_advice(on_gpu: bool) -> tuple[str, str]:
    """State and advice for a failing kernel; runs on a CPU call no kernel of Triton."""
    if not on_gpu:
        return "note", "runs on this CPU do not use Triton's kernels; please report this line with the versions above"
    cache = os.environ.get("TRITON_CACHE_DIR") or "~/.triton/cache"
    advice = (
        f"empty Triton's cache ({cache}) and try again; if it stays, please report this line with the versions above"
    )
    return "wrong", f"{advice}; with --backbone grid_torch or --device cpu runs go on meanwhile"


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
        status, errors = 124, f"no end after {seconds:g} s"
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    right = [line["kernel"] for line in lines if line["error"] is None]
    if right:
        took = sum(line["seconds"] for line in lines)
        yield Finding("ok", f"kernels right {how}, {took:.1f} s: {', '.join(right)}")
    state, advice = kernels_advice(on_gpu)
    for line in lines:
        if line["error"] is not None:
            yield Finding(state, f"kernel {line['kernel']} {how}: {line['error']}", advice)
    if status not in (0, 1) or not lines:
        last = (errors.strip().splitlines() or ["no message"])[-1]
        yield Finding(state, f"the self test of the kernels ended early, status {status}: {last[:300]}", advice)


def make_findings() -> Iterator[Finding]:
    yield from check_packages()
    try:
        torch = import_module("torch")
    except Exception as error:  # a library that is missing beside it, an old glibc, half an installation
        yield Finding(
            "wrong", f"torch does not load: {first_line(error)}", "pip install --force-reinstall 'torch>=2.10'"
        )
        return
    finding = check_gpu(torch)
    on_gpu = finding.state != "wrong" and torch.cuda.is_available()
    yield finding
    triton = check_triton(on_gpu)
    yield triton
    yield from check_attention(torch, torch.device("cuda" if on_gpu else "cpu"))
    if triton.state == "ok":
        where = "on the GPU (compiling them takes a while the first time)" if on_gpu else "in Triton's interpreter"
        yield Finding("note", f"now every kernel beside its reference, {where}")
        yield from check_kernels(on_gpu)


def main() -> int:
    """Print findings as they are made; returns 1 if something is wrong."""
    wrong = 0
    for finding in make_findings():
        print(f"{finding.state:5}  {finding.message}", flush=True)
        if finding.advice:
            print(f"       -> {finding.advice}", flush=True)
        wrong += finding.state == "wrong"
    print("this machine is ready for a run" if not wrong else f"{wrong} to put right")
    return int(wrong > 0)
