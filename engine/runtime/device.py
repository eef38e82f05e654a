"""Device and precision of a run, process-wide settings, and the facts of the machine that the manifest records."""

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

# Environment variables that configure torch's allocator.
ALLOCATOR_VARIABLES = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Device and precision of a run.

    `dtype` is that of the guidance model's weights; the field's parameters, the optimiser and the losses stay fp32
    everywhere. `description` is a phrase for messages, such as "cpu (2 threads), fp32".
    """

    device: torch.device
    dtype: torch.dtype
    description: str

    @property
    def fp16(self) -> bool:
        return self.dtype == torch.float16


def find_gpu() -> tuple[bool, str]:
    """Return whether torch finds a GPU, and else its warning about one that it cannot use (an old driver), or ""."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    reason = first_line(caught[0].message).split(" (Triggered internally")[0] if caught and not available else ""
    return available, reason


def choose_runtime(config: Config) -> Runtime:
    """Choose device and precision by --device and --fp16; a GPU without a number is torch's current one.

    Half precision is fp16 on a GPU, bf16 on a CPU with a unit for it, and else fp32, because emulation is slow.

    Raises UserError: when the named GPU does not exist, or triton is missing on a GPU.
    """
    device_name = config.run.device
    available, reason = (False, "") if device_name == "cpu" else find_gpu()
    if device_kind(device_name) == "cuda" or available:
        if not available:
            because = f" ({reason})" if reason else ""
            raise UserError(
                f"--device {device_name}: torch finds no GPU on this machine{because}; "
                "leave --device out to use the CPU"
            )
        if importlib.util.find_spec("triton") is None:
            raise UserError("a GPU needs triton, which is not installed: pip install triton, or run with --device cpu")
        dtype = torch.float16 if config.run.fp16 else torch.float32
        device = torch.device("cuda", _gpu_number(device_name))
        name = torch.cuda.get_device_name(device)
        return Runtime(device=device, dtype=dtype, description=f"{name}, {'fp16' if config.run.fp16 else 'fp32'}")
    threads = torch.get_num_threads()
    dtype = torch.bfloat16 if config.run.fp16 and multiplies_bf16() else torch.float32
    name = "bf16" if dtype == torch.bfloat16 else "fp32"
    description = f"cpu ({threads} thread{'s' if threads != 1 else ''}), {name}"
    return Runtime(device=torch.device("cpu"), dtype=dtype, description=description)


def _gpu_number(device_name: str) -> int:
    """Number of the GPU that `device_name` names. Raises UserError: when there is no GPU of that number."""
    if ":" not in device_name:
        return torch.cuda.current_device()
    number, count = int(device_name.partition(":")[2]), torch.cuda.device_count()
    if number < count:
        return number
    gpus = ", ".join(f"cuda:{index} ({torch.cuda.get_device_name(index)})" for index in range(count))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    limited = f"; CUDA_VISIBLE_DEVICES={visible} hides all others" if visible is not None else ""
    raise UserError(f"--device {device_name}: there is no GPU of that number, only {gpus}{limited}")


def multiplies_bf16() -> bool:
    """Return whether torch multiplies bf16 matrices by a unit of this CPU (Intel's AMX).

    torch uses oneDNN for it, and oneDNN no AMX where `ONEDNN_MAX_CPU_ISA` names an older instruction set. Where
    `ATEN_CPU_CAPABILITY` names one, torch's attention in bf16 fails beside AMX.
    """
    supports_amx = getattr(torch.cpu, "_is_amx_tile_supported", None)  # not public
    newest = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "ALL"
    allowed = newest.upper() in ("ALL", "DEFAULT") or "AMX" in newest.upper()
    allowed = allowed and "AVX512" in torch.backends.cpu.get_cpu_capability()
    return bool(supports_amx and supports_amx() and allowed and torch.backends.mkldnn.is_available())


def prepare(runtime: Runtime, seed: int, *, deterministic: bool = False, vram_O: bool = False) -> None:
    """Apply the process-wide settings of a run: current GPU, global seeds, TF32 on a GPU, no subnormals on a CPU.

    Every draw of the engine has its own generator; the global seeds are for draws of libraries. With `deterministic` a
    GPU repeats its results bit for bit (a CPU always does). Subnormal numbers, which appear in the moments of the
    optimiser, cost a CPU a hundred times an ordinary one. With `vram_O` torch's allocator has segments that grow and
    fragment less, unless the environment configures it.
    """
    if runtime.device.type == "cuda" and runtime.device.index is not None:
        torch.cuda.set_device(runtime.device)  # for libraries that launch, allocate or seed without a device
    seed_libraries(seed)
    if runtime.device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        if deterministic:
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS requires it, before its first use
            torch.backends.cudnn.benchmark = False
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs time, changes nothing
        if vram_O and not ALLOCATOR_VARIABLES & os.environ.keys():
            _set_allocator("expandable_segments:True")
    else:
        torch.set_flush_denormal(True)


def _set_allocator(settings: str) -> None:
    """Configure torch's allocator. The function is not public, and had another name before 2.11."""
    configure = (
        getattr(torch._C, "_accelerator_setAllocatorSettings", None) or torch.cuda.memory._set_allocator_settings
    )
    configure(settings)


def peak_memory(device: torch.device) -> dict[str, int]:
    """Peak bytes of this process: "host" (resident), and on a GPU "device" (allocated by torch)."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type == "cuda":
        peak["device"] = torch.cuda.max_memory_allocated(device)
    return peak


def machine() -> dict[str, str | int]:
    """Facts of the machine that can change a result, for the manifest."""
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
