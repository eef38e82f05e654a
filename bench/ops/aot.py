"""Compile kernels ahead of time, as a GPU would, on a machine without one. `python -m dream_fast.bench aot`.

An operator on CPU tensors inside `recorded_launches` lists its launches. Each is bound as Triton binds it at a launch
(types, divisibility of pointers and numbers by 16, numbers equal to 1, absent arguments) and compiled for a target.
Registers, local and shared memory, and the memory, atomic and matrix instructions of the machine code are counted; the
counts are of instructions in the code, not of their executions.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import reduce
from multiprocessing import get_context
from operator import getitem
from pathlib import Path
from typing import Any

from dream_fast.bench.ops.machine_code import count_instructions, disassemble, find_usage
from dream_fast.bench.results import RESULTS
from dream_fast.kernels._core.launch import INTERPRETED, Launch, recorded_launches

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
GATED = ("sm_80", "sm_90")
RECORD = "(record)"  # replaces a kernel's name where an operator raised before it launched any
# In Triton's code for sm_90: the layouts of products with their warps along the rows, and the products.
LAYOUT = re.compile(r"^(#\w+) = #ttg\.nvidia_mma<{versionMajor = 3,.*?warpsPerCTA = \[(\d+),", re.MULTILINE)
PRODUCT = re.compile(r"warp_group_dot .*-> tensor<(\d+)x(\d+)xf\d+, (#\w+)>")
Resources = dict[str, dict[str, dict[str, Any]]]  # {target: {"entry/kernel": {field: value}}}
Kernels = dict[str, frozenset[str]]  # {entry: names of kernels in it, as `unique_launches` gives them}


def bind_launch(launch: Launch, target: str) -> tuple[Any, Any, dict[str, Any]]:
    """Source (signature, constants, attributes), target and options that Triton would compile for a launch.

    Raises RuntimeError: when kernels are interpreted. Raises TypeError: when the arguments are not the kernel's.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET=1 defines no kernels that can be compiled: run without it")
    kernel, gpu = launch.kernel, GPUTarget(*TARGETS[target])
    backend = make_backend(gpu)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    has_maxnreg = gpu.backend == "cuda" and gpu.arch >= 90  # as in `launch`
    chosen = {name: value for name, value in launch.options.items() if name != "maxnreg" or has_maxnreg}
    arguments, specialization, options = binder(**launch.arguments, **chosen, debug=False)
    kinds, attributes = zip(*specialization, strict=True)
    source = ASTSource(
        kernel,
        dict(zip(arguments, kinds, strict=True)),
        {path: reduce(getitem, path, [*arguments.values()]) for path, kind in _leaves(kinds) if kind == "constexpr"},
        {path: backend.parse_attr(word) for path, word in _leaves(attributes) if isinstance(word, str)},
    )
    return source, gpu, vars(backend.parse_options(options))


def _leaves(value: Any, path: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], Any]]:
    """Yield the leaves of nested tuples with their paths, by which Triton names constants and attributes."""
    if not isinstance(value, tuple):
        yield path, value
        return
    for number, item in enumerate(value):
        yield from _leaves(item, (*path, number))


def compile_launch(launch: Launch, target: str) -> Any:
    """Compile the kernel of a launch, or take it from Triton's cache; its intermediate code is in `.asm`."""
    import triton

    source, gpu, options = bind_launch(launch, target)
    return triton.compile(source, target=gpu, options=options)


def describe_variant(launch: Launch) -> str:
    """Types, specialisations, constants and options of a launch, which tell the compilations of one kernel apart."""
    try:
        source, _, _ = bind_launch(launch, "sm_90")
    except TypeError as mismatch:  # arguments that are not the kernel's: compiling it raises again
        return str(mismatch)
    words = [f"{name}={value}" for name, value in launch.options.items()]
    for index, (name, kind) in enumerate(source.signature.items()):
        if kind == "constexpr":
            words.append(f"{name}={source.constants[(index,)]}")
        else:
            divisible = "" if source.attrs.get((index,)) else "!"
            words.append(f"{name}:{kind}{divisible}")
    return " ".join(words)


def find_rows_outside(code: str) -> list[str]:
    """List products in Triton's code for sm_90 (`.asm["ttgir"]`) whose warps take more rows than there are.

    A warp takes 16 rows. Triton 3.6 puts all warps along the rows of a product whose result is a factor of another
    one, however few the rows; warps past the end read from behind the tile.
    """
    layouts = dict(LAYOUT.findall(code))
    products = set()
    for rows, columns, layout in PRODUCT.findall(code):
        warps = int(layouts[layout])
        if 16 * warps > int(rows):
            products.add(f"{warps} warps along the rows of a product of {rows} x {columns}")
    return sorted(products)


def measure_shared(launch: Launch, target: str) -> dict[str, Any]:
    """Compile a launch: its shared memory, and for NVIDIA's targets its "cubin", which `count_resources` replaces.

    Raises ValueError: when a product reads past its tile.
    """
    compiled = compile_launch(launch, target)
    if products := find_rows_outside(compiled.asm["ttgir"]):
        raise ValueError("; ".join(products))
    shared = {"shared": compiled.metadata.shared}
    return shared | {"cubin": compiled.kernel} if target.startswith("sm_") else shared


def count_resources(rows: Iterable[dict[str, Any]], target: str) -> None:
    """Replace the "cubin" of each row of `measure_shared` by the counts of its registers and instructions."""
    rows = [row for row in rows if "cubin" in row]
    cubins = [row.pop("cubin") for row in rows]
    for row, cubin, codes in zip(rows, cubins, disassemble(cubins, target) if cubins else [], strict=True):
        row |= find_usage(cubin) | count_instructions(codes)


def unique_launches(launches: list[Launch]) -> Iterator[tuple[str, Launch]]:
    """Launches that compile to different kernels, named `kernel`, `kernel 2`, `kernel 3` ... in their order."""
    known: set[str] = set()
    numbers: Counter[str] = Counter()
    for launch in launches:
        name = launch.kernel.__name__
        key = f"{launch.kernel.__module__}.{name} {describe_variant(launch)}"
        if key not in known:
            known.add(key)
            numbers[name] += 1
            yield name if numbers[name] == 1 else f"{name} {numbers[name]}", launch


def record_launches(key: str) -> list[Launch]:
    """The launches of one entry of `dream_fast.bench.ops.cases`."""
    from dream_fast.bench.ops.cases import AOT_CASES

    run = AOT_CASES[key]()
    with recorded_launches() as launches:
        run()
    return launches


def distinct_kernels(keys: Iterable[str]) -> Kernels:
    """Choose entries and kernels in them so that each variant of each kernel occurs once."""
    known: set[str] = set()
    chosen: Kernels = {}
    for key in keys:
        try:
            launches = record_launches(key)
        except Exception:  # `measure_entries` reports it
            chosen[key] = frozenset({RECORD})
            continue
        for name, launch in unique_launches(launches):
            kernel = f"{launch.kernel.__module__}.{launch.kernel.__name__} {describe_variant(launch)}"
            if kernel not in known:
                known.add(kernel)
                chosen[key] = chosen.get(key, frozenset()) | {name}
    return chosen


def first_variants(kernels: Kernels) -> Kernels:
    """The first variant of each kernel that `distinct_kernels` chose."""
    first: dict[str, tuple[str, str]] = {}
    for key, names in kernels.items():
        for name in sorted(names):
            first.setdefault(f"{key} {name}" if name == RECORD else name.split()[0], (key, name))
    return {key: frozenset(name for at, name in first.values() if at == key) for key, _ in first.values()}


def measure_share(share: dict[str, dict[str, frozenset[str]]]) -> Resources:
    """Measure the kernels {entry: {target: names}}; each entry is recorded once.

    A row has "variant" and the resources, a broken kernel's "error" instead; so does the row of an entry that raises.
    """
    import torch

    torch.set_num_threads(1)
    compiled: Resources = {target: {} for targets in share.values() for target in targets}
    for key, targets in share.items():
        try:
            launches = dict(unique_launches(record_launches(key)))
        except Exception as error:  # anything that an operator raises is a result
            for target in targets:
                compiled[target][f"{key}/{RECORD}"] = {"error": f"{type(error).__name__}: {error}"}
            continue
        for target, name in ((target, name) for target, names in targets.items() for name in names):
            row = {"variant": describe_variant(launches[name])}
            try:
                row |= measure_shared(launches[name], target)
            except Exception as error:  # anything that the compiler raises is a result
                row["error"] = f"{type(error).__name__}: {error}"[-4000:]
            compiled[target][f"{key}/{name}"] = row
    for target, rows in compiled.items():
        count_resources(rows.values(), target)
    return compiled


def measure_entries(kernels: dict[str, Kernels], workers: int = 2) -> Resources:
    """Compile kernels {target: kernels that `distinct_kernels` chose}; {target: {"entry/kernel": resources}}."""
    entries: dict[str, dict[str, frozenset[str]]] = {}
    for target, chosen in kernels.items():
        for key, names in chosen.items():
            entries.setdefault(key, {})[target] = names
    # The slowest first, so that the shares are alike.
    order = sorted(entries, key=lambda key: -sum(map(len, entries[key].values())))
    shares = [{key: entries[key] for key in order[i::workers]} for i in range(min(workers, len(order)))]
    compiled: Resources = {target: {} for target in kernels}
    measured: Iterable[Resources]
    if len(shares) < 2:
        measured = map(measure_share, shares)
    else:
        with ProcessPoolExecutor(len(shares), mp_context=get_context("spawn")) as pool:
            measured = list(pool.map(measure_share, shares))
    for share in measured:
        for target, rows in share.items():
            compiled[target] |= rows
    return {target: dict(sorted(rows.items())) for target, rows in compiled.items()}


def format_counts(counts: dict[str, int]) -> str:
    """A counter in one cell: "12x128 4x32"."""
    return " ".join(f"{number}x{name}" for name, number in counts.items()) or "-"


def format_table(kernels: dict[str, dict[str, Any]]) -> str:
    """A table for the terminal: kernels and their resources."""
    head = (
        "kernel",
        "regs",
        "spill",
        "local",
        "shared",
        "loads",
        "stores",
        "atomics",
        "matrix",
        "lds/sts",
        "shfl",
        "bar",
    )
    rows: list[tuple[str, ...]] = [head]
    for name, row in kernels.items():
        if "error" in row:
            # The compiler quotes the source first and the error last.
            text = [part.strip() for part in row["error"].splitlines() if part.strip(" ^\t")]
            rows.append((name, " ... ".join(dict.fromkeys([text[0][:60], text[-1][:140]]))))
        elif "registers" not in row:
            rows.append((name, "-", "-", "-", str(row["shared"])))
        else:
            numbers = [str(row[column]) for column in ("registers", "spills", "local_bytes", "shared")]
            counts = [format_counts(row[column]) for column in ("loads", "stores", "atomics", "matrix")]
            shared = f"{row['shared_loads']}/{row['shared_stores']}"
            rows.append((name, *numbers, *counts, shared, str(row["shuffles"]), str(row["barriers"])))
    widths = [max(len(row[i]) for row in rows if len(row) > max(i, 2)) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(widths[i]) for i, cell in enumerate(row)) for row in rows)


# ptxas places what does not fit into registers by the addresses of its own memory, which are random: of the same PTX,
# field/float32/field_bwd_kernel 3 came out with 110 and with 112 spills. Nothing else has varied.
VARYING = {"spills": 0.05, "local_bytes": 0.05}
GATED_FIELDS = ("registers", "spills", "local_bytes", "shared", "loads", "stores", "atomics", "matrix")
# Kernels of a backward pass, by their names.
BACKWARD = re.compile(r"bwd|backward|grad|scatter")
# Forward kernels that spill nevertheless. Their tiles are sized for the matrix products of sm_90, which keep one factor
# in shared memory; those of sm_80 keep both in registers. The golden file holds how much.
KNOWN_SPILLS = {
    "sm_80": (
        "field/wide/field_fwd_kernel",
        "field_normals/finite_difference_float16/field_normals_fd_fwd_kernel",
    )
}


def golden_path() -> Path:
    """The golden file of the installed Triton; another compiler makes other code."""
    import triton

    return RESULTS / f"aot-{triton.__version__}.json"


def find_spilling_forwards(compiled: Resources) -> list[str]:
    """Forward kernels, other than the known ones, that spill registers; the golden file does not excuse them."""
    return [
        f"{target} {name}: {row['spills']} spills, {row['local_bytes']} bytes of local memory"
        for target, kernels in compiled.items()
        for name, row in kernels.items()
        if not BACKWARD.search(name.split("/")[-1])
        and name not in KNOWN_SPILLS.get(target, ())
        and (row.get("spills") or row.get("local_bytes"))
    ]


def find_differences(golden: Resources, compiled: Resources) -> list[str]:
    """Differences of compiled kernels from the golden file, one sentence each; exact except for `VARYING`."""
    sentences = []
    for target in sorted({*golden, *compiled}):
        before, after = golden.get(target, {}), compiled.get(target, {})
        for name in sorted({*before, *after}):
            old, new = before.get(name), after.get(name)
            if old is None or new is None:
                sentences.append(
                    f"{target} {name}: {'not in the golden file' if old is None else 'not compiled any more'}"
                )
            elif "error" in new:
                sentences.append(f"{target} {name}: does not compile: {new['error']}")
            else:
                sentences += [
                    f"{target} {name}: {field} {_cell(old.get(field))} -> {_cell(new.get(field))}"
                    for field in GATED_FIELDS
                    if not _same(field, old.get(field), new.get(field))
                ]
    return sentences


def _same(field: str, old: Any, new: Any) -> bool:
    return old == new or (field in VARYING and bool(old and new) and abs(new - old) <= VARYING[field] * old)


def _cell(value: Any) -> str:
    return format_counts(value) if isinstance(value, dict) else str(value)


def select_gated(compiled: Resources) -> Resources:
    """The fields of `measure_entries` that the golden file holds."""
    fields = ("error", *GATED_FIELDS)
    return {
        target: {name: {field: row[field] for field in fields if field in row} for name, row in kernels.items()}
        for target, kernels in compiled.items()
    }


def load_golden() -> Resources:
    return json.loads(golden_path().read_text(encoding="utf-8"))["targets"]


def check_golden(kernels: Kernels, *, everything: bool, write: bool) -> int:
    """Compare with the golden file, or write it (of some entries: only theirs) if no kernel is broken."""
    compiled = select_gated(measure_entries(dict.fromkeys(GATED, kernels)))
    sentences = [
        f"{target} {name}: {row['error']}"
        for target, rows in compiled.items()
        for name, row in rows.items()
        if "error" in row
    ]
    sentences += find_spilling_forwards(compiled)
    path = golden_path()
    golden = load_golden() if path.exists() else {}
    prefixes = tuple(f"{key}/" for key in kernels)
    compared: Resources = {}
    others: Resources = {}
    for target in GATED:
        for name, row in golden.get(target, {}).items():
            (compared if everything or name.startswith(prefixes) else others).setdefault(target, {})[name] = row
    if not write:
        sentences += find_differences(compared, compiled)
    elif not sentences:
        write_golden({target: others.get(target, {}) | compiled[target] for target in GATED})
    outcome = f"wrote {path}" if write else f"as in {path.name}"
    print("\n".join(sentences) or f"{outcome}: {sum(map(len, compiled.values()))} kernels")
    return int(bool(sentences))


def write_golden(targets: Resources) -> None:
    """Write the golden file, one kernel a line for the sake of diffs."""
    blocks = (
        f'  "{target}": {{\n'
        + ",\n".join(f"   {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(rows.items()))
        + "\n  }"
        for target, rows in targets.items()
    )
    golden_path().write_text('{\n "targets": {\n' + ",\n".join(blocks) + "\n }\n}\n")


def main(argv: list[str] | None = None) -> int:
    from dream_fast.bench.ops.cases import AOT_CASES

    parser = argparse.ArgumentParser(prog="python -m dream_fast.bench aot", description=__doc__.splitlines()[0])
    parser.add_argument("--op", action="append", help="only entries that start with this (may be given several times)")
    parser.add_argument("--arch", action="append", choices=TARGETS, help="target (default sm_90)")
    parser.add_argument("--variants", action="store_true", help="print types, constants and options of each kernel")
    parser.add_argument("--check", action="store_true", help="compare with the golden file, sm_80 and sm_90")
    parser.add_argument("--write", action="store_true", help="write the golden file of this Triton")
    args = parser.parse_args(argv)
    keys = [key for key in AOT_CASES if not args.op or key.startswith(tuple(args.op))]
    if not keys:
        print(f"no entry starts with {' or '.join(args.op)}; there are: {' '.join(AOT_CASES)}", file=sys.stderr)
        return 2
    if args.check or args.write:
        # The entry that lists a shared kernel depends on all of them.
        kernels = {key: names for key, names in distinct_kernels(AOT_CASES).items() if key in keys}
        return check_golden(kernels, everything=len(keys) == len(AOT_CASES), write=args.write)
    kernels = distinct_kernels(keys)
    failed = False
    for target in args.arch or ["sm_90"]:
        compiled = measure_entries({target: kernels})[target]
        failed |= any("error" in row for row in compiled.values())
        print(f"{target}\n{format_table(compiled)}")
        if args.variants:
            print("\n".join(f"{name}: {row.get('variant')}" for name, row in compiled.items()))
        print(json.dumps({"target": target, "kernels": len(compiled)}))
    return int(failed)
