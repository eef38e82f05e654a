"""The ahead-of-time gate: every kernel compiled as for a GPU and compared with the golden file, and planted faults."""

import copy
import re
import subprocess
import tempfile

import pytest
import torch

from dream_fast.bench.ops import aot, machine_code
from dream_fast.bench.ops.cases import AOT_CASES
from dream_fast.kernels._core.launch import INTERPRETED, jit, launch, recorded_launches, tl

triton = pytest.importorskip("triton")
if INTERPRETED:
    # At the level of the module: the interpreter takes the compiler's place when a kernel is defined, once for all.
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)  # `make test` runs it compiled

GOLDEN = aot.golden_path()
# Kernels that do not compile for a target, "target kernel", and why.
CANNOT: dict[str, str] = {}
DIVISIBLE = [["tt.divisibility", 16]]


@jit
def _scale_kernel(x_ptr, y_ptr, extra_ptr, count, factor, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + rows, mask=rows < count, other=0.0)
    if extra_ptr is not None:
        x += tl.load(extra_ptr + rows, mask=rows < count, other=0.0)
    tl.store(y_ptr + rows, x * factor, mask=rows < count)
    tl.atomic_add(y_ptr + rows % 7, x, sem="relaxed")


@jit
def _product_kernel(a_ptr, b_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(b_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(a_ptr + at)).to(tl.float16))


@jit
def _worse_kernel(x_ptr, y_ptr, extra_ptr, count, factor, BLOCK: tl.constexpr):
    """`_scale_kernel` that reads everything twice."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + rows, mask=rows < count, other=0.0)
    x += tl.load(x_ptr + (rows ^ 1), mask=rows < count, other=0.0)
    tl.store(y_ptr + rows, x * factor, mask=rows < count)
    tl.atomic_add(y_ptr + rows % 7, x, sem="relaxed")


def recorded(kernel=_scale_kernel, *, x=None, count=1024, extra=None, block=1024, **options):
    x = torch.empty(4096) if x is None else x
    with recorded_launches() as launches:
        launch(
            kernel,
            (4,),
            x.device,
            x_ptr=x,
            y_ptr=x,
            extra_ptr=extra,
            count=count,
            factor=2.0,
            BLOCK=block,
            **options,
        )
    return launches[0]


@jit
def _chain_kernel(a_ptr, b_ptr, SIZE: tl.constexpr):
    """A product of a product, as the layers of a network are."""
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    a = tl.load(a_ptr + at)
    tl.store(b_ptr + at, tl.dot(tl.dot(a, a).to(tl.float16), a).to(tl.float16))


def product(size, kernel=_product_kernel, **options):
    a = torch.empty(size, size, dtype=torch.float16)
    with recorded_launches() as launches:
        launch(kernel, (1,), a.device, a_ptr=a, b_ptr=a, SIZE=size, **options)
    return launches[0]


def measured(launches, target="sm_90"):
    rows = [aot.measure_shared(launch, target) for launch in launches]
    aot.count_resources(rows, target)
    return rows


# --- what is compiled


def test_bind_launch():
    """A launch is bound as Triton binds it: types, constants and divisibility by 16."""
    x = torch.empty(4096)
    aligned, _, options = aot.bind_launch(recorded(x=x, num_warps=8), "sm_90")
    assert aligned.signature == {
        "x_ptr": "*fp32",
        "y_ptr": "*fp32",
        "extra_ptr": "constexpr",  # None is a constant
        "count": "i32",
        "factor": "fp32",
        "BLOCK": "constexpr",
    }
    assert aligned.constants == {(2,): None, (5,): 1024}
    # Both pointers and the count divide by 16.
    assert aligned.attrs == {(0,): DIVISIBLE, (1,): DIVISIBLE, (3,): DIVISIBLE}
    assert options["num_warps"] == 8

    odd, _, _ = aot.bind_launch(recorded(x=x[1:], count=1), "sm_90")
    assert not any(odd.attrs.values())
    assert odd.signature["count"] == "constexpr" and odd.constants[(3,)] == 1
    long, _, _ = aot.bind_launch(recorded(x=x.half(), count=2**40 + 1), "sm_90")
    assert (long.signature["x_ptr"], long.signature["count"]) == ("*fp16", "i64")


def test_unique_launches():
    """Launches that differ are variants, equal ones are compiled once."""
    launches = [recorded(), recorded(count=2048), recorded(count=7), recorded(x=torch.empty(4097)[1:]), recorded()]
    assert [name for name, _ in aot.unique_launches(launches)] == [
        "_scale_kernel",
        "_scale_kernel 2",
        "_scale_kernel 3",
    ]


def test_resources_by_width():
    """Loads and stores are counted by their width."""
    wide, narrow = measured([recorded(), recorded(x=torch.empty(4097)[1:])])
    assert (wide["loads"], narrow["loads"]) == ({"128": 2}, {"32": 8})
    assert (wide["stores"], narrow["stores"]) == ({"128": 2}, {"32": 8})
    assert wide["atomics"] == {"RED.ADD.F32": 8}
    assert wide["spills"] == wide["local_bytes"] == 0 and wide["registers"] > 16


@pytest.mark.parametrize(("target", "instruction"), [("sm_80", "HMMA"), ("sm_90", "HGMMA")])
def test_resources_of_products(target, instruction):
    """Matrix instructions of each target are counted."""
    (resources,) = measured([product(64)], target)
    assert resources["matrix"].keys() == {instruction} and resources["shared"] > 0


def test_resources_refuse_rows_outside():
    """Triton 3.6 code for 64 rows and 8 warps reads past them; 4 warps have enough rows."""
    with pytest.raises(ValueError, match="8 warps along the rows of a product of 64 x 64"):
        aot.measure_shared(product(64, _chain_kernel, num_warps=8), "sm_90")
    enough = measured([product(64, _chain_kernel, num_warps=4), product(128, _chain_kernel, num_warps=8)])
    assert [row["matrix"].keys() for row in enough] == [{"HGMMA"}] * 2


def test_disassemble_order():
    """Each of several kernels in one call has the instructions that it has alone, as cuobjdump lists them."""
    cubins = [aot.compile_launch(launch, "sm_90").kernel for launch in (recorded(), product(64), recorded(num_warps=8))]
    together = machine_code.disassemble(cubins, "sm_90")
    for cubin, codes in zip(cubins, together, strict=True):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, "-sass", file.name]
            sass = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        assert codes and codes == machine_code.INSTRUCTION.findall(sass)


def test_measure_entries_reports_compile_error(monkeypatch):
    """A kernel that does not compile has its error as its row."""
    odd, good = recorded(block=1000), recorded()  # no power of two
    short = good._replace(arguments={"x_ptr": torch.empty(16)})
    monkeypatch.setattr(aot, "record_launches", lambda key: [odd, good, short])
    kernels = aot.distinct_kernels(["any", "other"])
    assert kernels == {"any": {"_scale_kernel", "_scale_kernel 2", "_scale_kernel 3"}}
    resources = aot.measure_entries({"sm_90": kernels}, workers=1)["sm_90"]
    assert "power of 2" in resources["any/_scale_kernel"]["error"] and "registers" in resources["any/_scale_kernel 2"]
    assert "missing 5 required" in resources["any/_scale_kernel 3"]["error"]
    assert "power of 2" in aot.format_table(resources)


def test_measure_entries_reports_operator_error(monkeypatch):
    """An operator that raises before any launch has its error as a row."""

    def record(key):
        raise ValueError("no such thing")

    monkeypatch.setattr(aot, "record_launches", record)
    kernels = aot.distinct_kernels(["any"])
    assert kernels == {"any": {aot.RECORD}}
    assert aot.measure_entries({"sm_90": kernels}, workers=1) == {
        "sm_90": {f"any/{aot.RECORD}": {"error": "ValueError: no such thing"}}
    }


def test_first_variants():
    """The first variant of each kernel remains, and each entry that raises."""
    kernels = {
        "a": frozenset({"x_kernel", "x_kernel 2"}),
        "b": frozenset({"x_kernel 3", "y_kernel 2"}),
        "c": frozenset({aot.RECORD}),
        "d": frozenset({aot.RECORD}),
    }
    assert aot.first_variants(kernels) == {
        "a": {"x_kernel"},
        "b": {"y_kernel 2"},
        "c": {aot.RECORD},
        "d": {aot.RECORD},
    }


# --- the gate catches what it is there for


@pytest.fixture(scope="module")
def good():
    return {"sm_90": {"a/_scale_kernel": measured([recorded()])[0]}}


def test_differences_of_the_same_kernel(good):
    """A kernel equals itself."""
    assert aot.find_differences(aot.select_gated(good), aot.select_gated(good)) == []


@pytest.mark.parametrize(
    ("field", "worse"),
    [
        ("loads", {"kernel": _worse_kernel}),
        ("loads", {"extra": torch.empty(4096)}),
        ("stores", {"x": torch.empty(4097)[1:]}),
        ("atomics", {"num_warps": 8}),
        ("registers", {"block": 4096}),
        ("shared", {"num_warps": 8}),
    ],
)
def test_differences_of_a_worse_kernel(good, field, worse):
    """A planted fault is a difference, with both values."""
    resources = {"sm_90": {"a/_scale_kernel": measured([recorded(**worse)])[0]}}
    differences = aot.find_differences(aot.select_gated(good), aot.select_gated(resources))
    assert any(f"sm_90 a/_scale_kernel: {field} " in line for line in differences)


def test_differences_of_missing_kernels(good):
    """A removed, new or broken kernel is one sentence each."""
    golden = aot.select_gated(good)
    assert aot.find_differences(golden, {}) == ["sm_90 a/_scale_kernel: not compiled any more"]
    assert aot.find_differences({}, golden) == ["sm_90 a/_scale_kernel: not in the golden file"]
    broken = copy.deepcopy(golden)
    broken["sm_90"]["a/_scale_kernel"] = {"error": "CompilationError: no"}
    assert aot.find_differences(golden, broken) == ["sm_90 a/_scale_kernel: does not compile: CompilationError: no"]


@pytest.mark.parametrize(
    ("spills", "resources", "differences"),
    [(112, 110, False), (110, 112, False), (110, 120, True), (110, 0, True), (0, 2, True), (20, 22, True)],
)
def test_differences_allow_varying_spills(good, spills, resources, differences):
    """The number of spills of the same code varies between runs of ptxas."""

    def row(number):
        return {"sm_90": {"a/_scale_kernel": aot.select_gated(good)["sm_90"]["a/_scale_kernel"] | {"spills": number}}}

    assert bool(aot.find_differences(row(spills), row(resources))) == differences


def test_spilling_forwards():
    """A forward kernel that spills is reported, a backward one is not."""
    (spilled,) = measured([product(128, num_warps=1)], "sm_80")  # 512 sums a thread
    assert spilled["spills"] > 0 and spilled["local_bytes"] > 0
    differences = aot.find_spilling_forwards(
        {"sm_90": {"a/_scale_fwd_kernel": spilled, "a/_scale_bwd_kernel": spilled}}
    )
    assert len(differences) == 1 and differences[0].startswith("sm_90 a/_scale_fwd_kernel: ")


# --- the gate


@pytest.fixture(scope="module")
def all_compiled():
    """All variants for the gated targets, one variant of each kernel for the others."""
    kernels = aot.distinct_kernels(AOT_CASES)
    targets = {target: kernels if target in aot.GATED else aot.first_variants(kernels) for target in aot.TARGETS}
    return aot.measure_entries(targets, workers=1)  # beside the suite's other process


@pytest.fixture(scope="module")
def compiled(all_compiled):
    return {target: all_compiled[target] for target in aot.GATED}


def test_golden_covers_operators(compiled):
    """Every group of entries has kernels."""
    operators = {key.split("/")[0] for key in AOT_CASES}
    assert {name.split("/")[0] for name in compiled["sm_90"]} == operators


def test_golden_kernels_compile(compiled):
    """Every kernel compiles, and no forward kernel spills except the known ones."""
    errors = [f"{target} {name}: {row['error']}" for target in compiled for name, row in compiled[target].items()
              if "error" in row]  # fmt: skip
    assert errors == []
    assert aot.find_spilling_forwards(compiled) == []


def test_golden_file_is_current(compiled):
    """Registers, spills, memory and instructions are those of the golden file."""
    if not GOLDEN.exists() and list(aot.RESULTS.glob("aot-*.json")):
        reason = f"Triton {triton.__version__} has no golden file; another compiler makes other code"
        pytest.skip(reason)  # registers belong to one compiler; the version that CI pins has its file and is compared
    differences = aot.find_differences(aot.load_golden(), aot.select_gated(compiled))
    assert differences == [], "better or worse? If better: python -m dream_fast.bench aot --write\n" + "\n".join(
        differences
    )


def starts(code: str) -> list[str]:
    """Return the initial values of a kernel's products, other than zero and another product."""
    products = dict(re.findall(r"(%\S+) = tt\.dot \S+ \S+ (%\S+) :", code))
    assert products
    return [start for start in products.values() if start not in products and not start.startswith("%cst")]


@jit
def _biased_product_kernel(a_ptr, b_ptr, SIZE: tl.constexpr):
    column = tl.arange(0, SIZE)[None, :]
    at = tl.arange(0, SIZE)[:, None] * SIZE + column
    product = tl.dot(tl.load(a_ptr + at), tl.load(a_ptr + at), input_precision="ieee")
    tl.store(b_ptr + at, product + tl.load(a_ptr + column))


def test_products_start_from_zero():
    """Otherwise steps round at the size of the bias, which shows only in normals by differences on a GPU."""
    forward = next(one for one in aot.record_launches("field/float32") if one.kernel.__name__ == "field_fwd_kernel")
    assert starts(aot.compile_launch(forward, "sm_90").asm["ttir"]) == []
    with recorded_launches() as launches:
        a = torch.zeros(32, 32)
        launch(_biased_product_kernel, (1,), a.device, a_ptr=a, b_ptr=a, SIZE=32)
    assert starts(aot.compile_launch(launches[0], "sm_90").asm["ttir"])


@pytest.mark.parametrize("target", ["gfx942", "sm_100"])
def test_kernels_compile_for_other_gpus(target, all_compiled):
    """Every kernel compiles for GPUs that are not gated."""
    rows = all_compiled[target]
    failed = {f"{target} {name.split('/')[-1]}": row["error"] for name, row in rows.items() if "error" in row}
    assert rows and failed.keys() == {name for name in CANNOT if name.startswith(target)}, failed
