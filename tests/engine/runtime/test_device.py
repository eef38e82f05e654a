"""Device choice, per-step seeds, and a quiet import of diffusers."""

import subprocess
import sys
import warnings

import pytest
import torch

from dream_fast.cli import main
from dream_fast.engine.config.presets import reference
from dream_fast.engine.errors import UserError
from dream_fast.engine.runtime import device as runtime
from dream_fast.engine.runtime.device import Runtime, choose_runtime, peak_memory, prepare
from dream_fast.engine.runtime.seeds import draw_seed, step_seed


@pytest.mark.parametrize(
    ("fp16", "amx", "capability", "dtype", "name"),
    [
        (True, True, "AVX512", torch.bfloat16, "bf16"),
        (True, True, "AVX2", torch.float32, "fp32"),
        (True, True, "DEFAULT", torch.float32, "fp32"),
        (True, False, "AVX512", torch.float32, "fp32"),
        (False, True, "AVX512", torch.float32, "fp32"),
    ],
)
def test_cpu_bf16(fp16, amx, capability, dtype, name, monkeypatch):
    """Half precision is bf16 on a CPU with AMX, unless torch is to use an older instruction set."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    for variable in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(variable, raising=False)
    runtime = choose_runtime(reference().override({"device": "cpu", "fp16": fp16}))
    assert (runtime.device.type, runtime.dtype, runtime.fp16) == ("cpu", dtype, False)
    assert runtime.description.endswith(f", {name}")


@pytest.mark.parametrize(
    ("variable", "newest", "used"),
    [
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_VNNI", False),
        ("ONEDNN_MAX_CPU_ISA", "avx2", False),
        ("DNNL_MAX_CPU_ISA", "AVX512_CORE_BF16", False),
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_AMX", True),
        ("ONEDNN_MAX_CPU_ISA", "all", True),
        ("ONEDNN_MAX_CPU_ISA", "", True),
    ],
)
def test_cpu_fp32_without_amx(variable, newest, used, monkeypatch):
    """Without AMX in oneDNN's instruction set a CPU uses fp32."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, newest)
    assert choose_runtime(reference().override({"device": "cpu", "fp16": True})).dtype == (
        torch.bfloat16 if used else torch.float32
    )


def test_missing_gpu_raises(monkeypatch):
    """A missing GPU is refused."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda"):
        choose_runtime(reference().override({"device": "cuda"}))
    assert choose_runtime(reference()).device.type == "cpu"


def test_driver_warning_in_message(monkeypatch, capsys):
    """The warning of a driver is in the message, as one sentence."""

    def old_driver():
        warnings.warn(
            "The NVIDIA driver is too old (found 11000). (Triggered internally at A.cpp:1.)\nPlease",
            UserWarning,
            stacklevel=1,
        )
        return False

    monkeypatch.setattr(torch.cuda, "is_available", old_driver)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_runtime(reference()).device.type == "cpu"
        assert main(["--text", "a cat", "--print-config"]) == 0
        note = "dream-fast: note: the GPU is not used (The NVIDIA driver is too old (found 11000).)\n"
        assert capsys.readouterr().err == note
        with pytest.raises(
            UserError, match=r"no GPU on this machine \(The NVIDIA driver is too old \(found 11000\).\);"
        ):
            choose_runtime(reference().override({"device": "cuda"}))


def test_missing_triton_raises(monkeypatch):
    """A GPU without triton is refused."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install triton, or run with --device cpu"):
        choose_runtime(reference())


def test_step_seeds_differ():
    """Seeds of steps differ between steps and between seeds."""
    seeds = {step_seed(seed, step) for seed in (0, 1, 2**32 - 1) for step in range(1000)}
    assert len(seeds) == 3000
    assert all(0 <= seed < 2**63 for seed in seeds)
    first = [torch.rand((), generator=torch.Generator().manual_seed(step_seed(0, step))) for step in range(200)]
    assert abs(torch.stack(first).mean() - 0.5) < 0.08  # four standard errors of 200 uniform draws


def test_draw_seed_range():
    """A drawn seed can be typed."""
    reference().override({"seed": draw_seed()})


def test_peak_memory_bytes():
    """Peak memory is in bytes."""
    assert 50e6 < peak_memory(torch.device("cpu"))["host"] < 1e12  # a process with torch in it


def test_diffusers_import_keeps_no_callers():
    """What a function holds while it imports diffusers is freed after it, also where xformers does not load."""
    code = """
import gc, weakref
from dream_fast.engine.runtime.quiet import quiet_diffusers

class Model: pass

def load():
    model = Model()
    quiet_diffusers()
    from diffusers import AutoencoderKL
    return weakref.ref(model)

kept = load()
gc.collect()
assert kept() is None
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_quiet_diffusers():
    """Importing diffusers prints nothing about xformers."""
    program = (
        "from dream_fast.engine.runtime.quiet import quiet_diffusers; quiet_diffusers(); quiet_diffusers();"
        "from diffusers import UNet2DConditionModel; import logging;"
        "logging.getLogger('xformers').warning('another matter')"
    )
    process = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    assert "XFORMERS" not in process.stderr + process.stdout
    assert "another matter" in process.stderr


@pytest.mark.parametrize(
    ("vram_O", "variable", "expected"),
    [(True, None, ["expandable_segments:True"]), (False, None, []), (True, "PYTORCH_CUDA_ALLOC_CONF", [])],
)
def test_allocator_settings(vram_O, variable, expected, monkeypatch):
    """Expandable segments are set with --vram_O, unless the environment configures the allocator."""
    given = []
    monkeypatch.setattr(runtime, "_set_allocator", given.append)
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    for name in runtime.ALLOCATOR_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    if variable is not None:
        monkeypatch.setenv(variable, "max_split_size_mb:64")
    try:
        prepare(Runtime(device=torch.device("cuda"), dtype=torch.float16, description=""), 0, vram_O=vram_O)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    assert given == expected
