"""Device, precision, seeds and threads of a run, and what it used of the machine."""

import importlib.util
import os
import platform
import resource
import sys
import warnings
from dataclasses import dataclass

import torch

from dream_fast.engine.config.schema import Config, device_kind
from dream_fast.engine.errors import UserError, first_line
from dream_fast.engine.runtime.seeds import seed_libraries

# Either tells torch how to take memory of a GPU.
ALLOCATOR_VARIABLES = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Where a run computes and how.

    ``dtype`` is the dtype of the guidance model's weights and of autocast; the field's parameters, the optimiser and
    the losses stay fp32 everywhere. ``description`` is one phrase for a person, such as "cpu (2 threads), fp32".
    """

    device: torch.device
    dtype: torch.dtype
    description: str

    @property
    def fp16(self) -> bool:
        return self.dtype == torch.float16


def find_gpu() -> tuple[bool, str]:
    """Whether torch finds a GPU; and if not, what it says of one that it cannot use (its driver is too old), or ""."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        there = torch.cuda.is_available()
    why = first_line(said[0].message).split(" (Triggered internally")[0] if said and not there else ""
    return there, why


def choose_runtime(config: Config) -> Runtime:
    """The device and precision that ``config`` asks for; UserError when it names a GPU that is not there.

    Without a number it is torch's current GPU.

    Half precision is fp16 on a GPU, bf16 on a CPU that multiplies it, and elsewhere fp32: emulated it is slow.
    """
    wanted = config.run.device
    there, why = (False, "") if wanted == "cpu" else find_gpu()
    if device_kind(wanted) == "cuda" or there:
        if not there:
            said = f" ({why})" if why else ""
            raise UserError(
                f"--device {wanted}: torch finds no GPU on this machine{said}; leave --device out to use the CPU"
            )
        if importlib.util.find_spec("triton") is None:
            raise UserError("a GPU needs triton, which is not installed: pip install triton, or run with --device cpu")
        dtype = torch.float16 if config.run.fp16 else torch.float32
        device = torch.device("cuda", _gpu_number(wanted))
        name = torch.cuda.get_device_name(device)
        return Runtime(device=device, dtype=dtype, description=f"{name}, {'fp16' if config.run.fp16 else 'fp32'}")
    threads = torch.get_num_threads()
    dtype = torch.bfloat16 if config.run.fp16 and multiplies_bf16() else torch.float32
    name = "bf16" if dtype == torch.bfloat16 else "fp32"
    description = f"cpu ({threads} thread{'s' if threads != 1 else ''}), {name}"
    return Runtime(device=torch.device("cpu"), dtype=dtype, description=description)


def _gpu_number(wanted: str) -> int:
    """The number of the GPU that ``wanted`` names. UserError: there is none of that number."""
    if ":" not in wanted:
        return torch.cuda.current_device()
    number, count = int(wanted.partition(":")[2]), torch.cuda.device_count()
    if number < count:
        return number
    there = ", ".join(f"cuda:{index} ({torch.cuda.get_device_name(index)})" for index in range(count))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    limited = f"; CUDA_VISIBLE_DEVICES={visible} hides all others" if visible is not None else ""
    raise UserError(f"--device {wanted}: there is no GPU of that number, only {there}{limited}")


def multiplies_bf16() -> bool:
    """Whether this CPU has a unit for matrix products in bf16 (Intel's AMX) that torch uses.

    torch multiplies bf16 by oneDNN, which leaves AMX alone where `ONEDNN_MAX_CPU_ISA` names an older instruction set.
    """
    asks = getattr(torch.cpu, "_is_amx_tile_supported", None)  # not public
    newest = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "ALL"
    allowed = newest.upper() in ("ALL", "DEFAULT") or "AMX" in newest.upper()
    return bool(asks and asks() and allowed and torch.backends.mkldnn.is_available())


def prepare(runtime: Runtime, seed: int, *, deterministic: bool = False, vram_O: bool = False) -> None:
    """Process-wide settings of a run: current GPU, global seeds, TF32 on a GPU, subnormals flushed to zero on a CPU.

    Every draw of the engine takes its own generator; the global seeds only cover what a library draws, at the start and
    (the step's own) in the steps.
    ``deterministic`` makes a GPU repeat bit for bit (a CPU always does). Subnormal numbers cost a CPU a hundred times
    an ordinary one and appear in the moments of the optimiser. With ``vram_O`` torch takes a GPU's memory in segments
    that grow, of which less is lost between blocks (a choice in the environment is kept).
    """
    if runtime.device.type == "cuda" and runtime.device.index is not None:
        torch.cuda.set_device(runtime.device)  # for what libraries launch, allocate and seed without naming a device
    seed_libraries(seed)
    if runtime.device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        if deterministic:
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # what cuBLAS asks for, before its first use
            torch.backends.cudnn.benchmark = False
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs time, changes nothing
        if vram_O and not ALLOCATOR_VARIABLES & os.environ.keys():
            _take_memory_by("expandable_segments:True")
    else:
        torch.set_flush_denormal(True)


def _take_memory_by(settings: str) -> None:
    """torch's name for this is not public, and another one before 2.11."""
    change = getattr(torch._C, "_accelerator_setAllocatorSettings", None) or torch.cuda.memory._set_allocator_settings
    change(settings)


def peak_memory(device: torch.device) -> dict[str, int]:
    """Peak bytes of this process: ``host`` (resident), and ``device`` (allocated by torch) on a GPU."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type == "cuda":
        peak["device"] = torch.cuda.max_memory_allocated(device)
    return peak


def machine() -> dict[str, str | int]:
    """Facts of the machine that can change a result: for the manifest."""
    return {
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:  # not a Linux machine
        pass
    return platform.processor() or platform.machine()
