"""Machine code of compiled kernels for NVIDIA GPUs: its instructions are listed and counted, without a GPU."""

from __future__ import annotations

import itertools
import re
import struct
import subprocess
import tempfile
from collections import Counter
from typing import Any

# Targets as nvdisasm names them.
MACHINES = {"sm_80": "SM80", "sm_90": "SM90a", "sm_100": "SM100a"}
INSTRUCTION_BYTES = 16
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.x]*)", re.MULTILINE)
USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
WIDTH = re.compile(r"\.(?:U|S)?(8|16|64|128)\b")
MATRIX = ("HMMA", "HGMMA", "IMMA", "DMMA", "QGMMA", "UTCHMMA", "UTCQMMA")


def find_code(cubin: bytes) -> bytes:
    """The machine code of a cubin: its ELF sections `.text.*`, one after the other."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, index = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<I20xQQ", cubin, table + i * size) for i in range(count)]  # name, offset, length
    names = headers[index][1]
    return b"".join(
        cubin[start : start + length] for name, start, length in headers if cubin.startswith(b".text.", names + name)
    )


def disassemble(cubins: list[bytes], target: str) -> list[list[str]]:
    """Machine instructions of each cubin, in order, as opcodes with modifiers.

    One call of nvdisasm, which starts for a third of a second, serves all.
    """
    import triton

    codes = [find_code(cubin) for cubin in cubins]
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-ndf", "-b", MACHINES[target], file.name]
        sass = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    instructions = iter(INSTRUCTION.findall(sass))
    listed = [list(itertools.islice(instructions, len(code) // INSTRUCTION_BYTES)) for code in codes]
    assert [len(one) * INSTRUCTION_BYTES for one in listed] == [len(code) for code in codes], "nvdisasm left some out"
    assert next(instructions, None) is None, "nvdisasm lists more instructions than there are"
    return listed


def find_usage(cubin: bytes) -> dict[str, int]:
    """Registers and bytes of local memory of a kernel."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = USAGE.search(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert usage is not None, "cuobjdump prints no resource usage"
    registers, stack, _, local = map(int, usage.groups())
    return {"registers": registers, "local_bytes": stack + local}


def count_instructions(codes: list[str]) -> dict[str, Any]:
    """Count instructions of each kind in a list of `disassemble`."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in ("loads", "stores", "atomics", "matrix")}
    spills = 0
    for code in codes:
        name, *modifiers = code.split(".")
        width = next(iter(WIDTH.findall(code)), "32")
        if name in ("LDG", "LDGSTS"):
            counts["loads"][width if name == "LDG" else f"{width} to shared"] += 1
        elif name == "STG":
            counts["stores"][width] += 1
        elif name in ("UBLKCP", "UTMALDG", "UTMASTG", "UTMAREDG"):
            counts["stores" if "STG" in name else "loads"][name] += 1
        elif name in ("RED", "REDG", "ATOM", "ATOMG"):
            kind = [m for m in modifiers if m not in ("E", "STRONG", "GPU", "SYS", "FTZ", "RN", "PT", "CTA")]
            counts["atomics"][".".join([name.rstrip("G"), *kind])] += 1
        elif name in MATRIX:
            counts["matrix"][name] += 1
        elif name in ("LDL", "STL"):
            spills += 1
    return {
        "spills": spills,
        **{name: dict(sorted(counter.items())) for name, counter in counts.items()},
        "shared_loads": sum(code.startswith(("LDS", "LDSM")) for code in codes),
        "shared_stores": sum(code.startswith(("STS", "STSM")) for code in codes),
        "shuffles": sum(code.startswith("SHFL") for code in codes),
        "barriers": sum(code.startswith("BAR") for code in codes),
        "instructions": len(codes),
    }
