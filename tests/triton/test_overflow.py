"""Numbers past 32 bits in interpreted kernels, without large tensors.

A program so far from the others that its rows wrap around in 32 bits touches the same memory as another that far.
"""

import importlib
import os
from functools import partial

import pytest
import torch

from dream_fast import kernels
from dream_fast.bench import selftest
from dream_fast.bench.cases import run
from dream_fast.kernels import FieldSpec, HashGridSpec, _grid, recorded_launches

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# In 32 bits, times a block of 4 to 2^14 rows, the first is 0 and the second no row of a small tensor.
FAR = (1 << 30, (1 << 30) + 3 * (1 << 17))
interpreted = pytest.mark.skipif(not INTERPRETED, reason="tensors past 2^31 elements show the same on a GPU")
# What a program that far computes with is no data.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
PROBLEMS = selftest.problems(torch.device("cpu")) if INTERPRETED else {}


GRID = HashGridSpec(levels=5, features=2, log2_entries=8, base_resolution=4, max_resolution=16)


def touched(memory, monkeypatch, launch, program, programs=None, **changed):
    """How many lanes of one program of a launch read and write which argument's memory."""
    with memory.far(monkeypatch, program, programs or launch.grid):
        launch.kernel[(1,)](**{**launch.arguments, **changed})
    return {name: lanes for name, lanes in memory.touched.items() if lanes}


def record(monkeypatch, call):
    """The launches of operators, by the kernel's name, with zeros in what no kernel has filled."""
    with monkeypatch.context() as patch, recorded_launches() as launches:
        patch.setattr(torch, "empty", torch.zeros)
        patch.setattr(torch, "empty_like", torch.zeros_like)
        call()
    return {launch.kernel.__name__: launch for launch in launches}


def gradients(name):
    problem, mode = PROBLEMS[name]
    return partial(run, problem, problem.operator, mode, torch.float32)


@interpreted
@pytest.mark.parametrize("name", PROBLEMS)
def test_overflow_of_program_numbers(name, memory, monkeypatch):
    """Program numbers are taken to 64 bits before they are multiplied, in every kernel."""
    for kernel, launch in record(monkeypatch, gradients(name)).items():
        rest = (0,) * (len(launch.grid) - 1)
        one, other = (touched(memory, monkeypatch, launch, (program, *rest)) for program in FAR)
        assert one == other, f"{kernel}: programs 2^30 and 2^30 + 393216 touch different memory"


@interpreted
@pytest.mark.parametrize("case", ["field", "march", "composite", "group_norm_silu", "group_norm_silu last"])
def test_overflow_of_program_numbers_in_other_passes(case, memory, monkeypatch):
    """The same for padding, for scans of several blocks and for groups in parts."""
    tensors, generator = PROBLEMS[case.split()[0]][0].tensors, torch.Generator().manual_seed(0)
    if case == "field":
        weights, biases = selftest._layers(tensors)
        count = torch.tensor(40)

        def call():
            kernels.field(tensors["x"], tensors["table"], weights, biases, selftest.FIELD, count=count)
    elif case == "march":
        module = importlib.import_module("dream_fast.kernels.march")
        config = module._march_config
        monkeypatch.setattr(module, "_march_config", lambda *shape: {**config(*shape), "SCAN": 4})

        def call():
            rays = (tensors["origins"].clone().requires_grad_(), tensors["directions"], tensors["bits"])
            out = kernels.march(*rays, bound=1.0, resolution=selftest.CELLS, capacity=50, dt_gamma=0.01)
            out.positions.sum().backward()
    elif case == "composite":

        def call():
            leaves = [tensors[name].requires_grad_() for name in ("sigma", "values")]
            out = kernels.composite(*leaves, tensors["t"], tensors["dt"], tensors["offsets"], count=torch.tensor(30))
            (out.values.sum() + out.depth.sum()).backward()
    else:
        module = importlib.import_module("dream_fast.kernels.group_norm_silu")
        for name, value in {"_TILE": 16, "_PROGRAMS": 100, "_WHOLE": 0, "_MERGE": 0}.items():
            monkeypatch.setattr(module, name, value)
        x = torch.randn(2, 8, 5, 3, generator=generator)
        x = (x.to(memory_format=torch.channels_last) if case.endswith("last") else x).requires_grad_()
        weight, bias = (torch.ones(8, requires_grad=True) for _ in range(2))

        def call():
            kernels.group_norm_silu(x, 2, weight, bias).sum().backward()

    for kernel, launch in record(monkeypatch, call).items():
        # A program of the scan would add up the sums of all blocks before it.
        changed = {"sums": None} if kernel == "march_offsets_kernel" else {}
        first = launch.arguments.get("ray_programs", 0)  # of the programs that fill padding
        one, other = (touched(memory, monkeypatch, launch, (first + program, 0), **changed) for program in FAR)
        assert one == other, f"{kernel}: programs 2^30 and 2^30 + 393216 touch different memory"


@interpreted
def test_overflow_of_channels_of_a_hash_grid(memory, monkeypatch):
    """Channel times points is taken in 64 bits: with 2^30 points level 2 would be level 0 again."""
    x = torch.rand(48, 3, requires_grad=True)
    table = torch.randn(GRID.rows, GRID.features, requires_grad=True)

    def call():
        kernels.hash_grid(x, table, GRID).backward(torch.ones(48, GRID.channels))

    launches = record(monkeypatch, call)
    for kernel, name in (("_hash_grid_fwd_kernel", "out written"), ("_scatter_kernel", "features read")):
        lanes = touched(memory, monkeypatch, launches[kernel], (0, 2), n=1 << 30)
        assert name not in lanes, kernel
    points = touched(memory, monkeypatch, launches["_position_gradient_kernel"], (0,), n=1 << 30)
    assert points["features read"] == launches["_position_gradient_kernel"].arguments["BLOCK"]
    (turn,) = record(monkeypatch, lambda: _grid.by_channel(torch.ones(48, GRID.channels).t(), None)).values()
    wrapped, apart = (touched(memory, monkeypatch, turn, (0,), n=number) for number in (1 << 30, (1 << 30) - (1 << 20)))
    assert wrapped == apart
    for launch in (turn, launches["_position_gradient_kernel"]):
        one, other = (touched(memory, monkeypatch, launch, (program,)) for program in FAR)
        assert one == other, launch.kernel.__name__


def field_launches(monkeypatch, kernel, into_x=False):
    """The launches of the field, or of the field with normals, to which this kernel belongs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(48, 3, generator=generator).requires_grad_(into_x)
    table = torch.randn(GRID.rows, GRID.features, generator=generator).requires_grad_()
    shapes = ((16, GRID.channels), (4, 16)), ((16,), (4,))
    weights, biases = ([torch.ones(shape, requires_grad=True) for shape in part] for part in shapes)
    operator = kernels.field if kernel.startswith("field") else kernels.field_normals
    options = {"mode": "analytic"} if kernel.startswith("analytic") else {}

    def call():
        sum(part.sum() for part in operator(x, table, weights, biases, FieldSpec(grid=GRID), **options)).backward()

    return record(monkeypatch, call)[kernel]


@interpreted
@pytest.mark.parametrize(
    ("kernel", "size"),
    [("field_bwd_kernel", "rows"), ("differences_bwd_kernel", "columns"), ("analytic_bwd_kernel", "n")],
)
def test_overflow_of_channels_of_a_field(kernel, size, memory, monkeypatch):
    """Gradients of features are written by channel in 64 bits: those of level 2 do not meet those of level 0."""
    launch = field_launches(monkeypatch, kernel)
    wrapped, apart = (
        touched(memory, monkeypatch, launch, (0,), (1 << 30,), **{size: number})["to_features written"]
        for number in (1 << 30, (1 << 30) - (1 << 20))
    )
    assert wrapped == apart


@interpreted
@pytest.mark.parametrize("kernel", ["differences_bwd_kernel", "analytic_bwd_kernel"])
def test_overflow_of_partial_sums(kernel, memory, monkeypatch):
    """Program 2^21 of a network of 2^11 parameters does not add to what program 0 adds up."""
    launch = field_launches(monkeypatch, kernel)
    lanes = touched(memory, monkeypatch, launch, (1 << 21,), (1 << 30,), size=1 << 11, n=1 << 33)
    assert not {"partial read", "partial written"} & lanes.keys()


@interpreted
@pytest.mark.parametrize("kernel", ["analytic_bwd_kernel", "differences_points_kernel"])
def test_overflow_of_tiles_of_normals(kernel, memory, monkeypatch):
    """Tiles past 2^32 points are not those from 0 on."""
    launch = field_launches(monkeypatch, kernel, into_x=True)
    program = (1 << 32) // launch.arguments["BLOCK"]
    assert "x read" not in touched(memory, monkeypatch, launch, (program,), (1 << 30,), n=1 << 33)


@interpreted
def test_overflow_of_pictures(memory, monkeypatch):
    """Vertices of a picture that lies 2^32 vertices away are not those of picture 0."""
    small = record(monkeypatch, gradients("rasterize"))["_raster_small_kernel"]
    vertices = 4 * small.arguments["blocks"]
    one, other = (touched(memory, monkeypatch, small, (program,), vertices=vertices) for program in FAR)
    assert one == other


@interpreted
def test_overflow_of_rays(memory, monkeypatch):
    """Three numbers of ray 1431655766 are not those of ray 0, where 3 times that wraps around to."""
    tensors = PROBLEMS["march"][0].tensors

    def call():
        rays = (tensors["origins"].clone().requires_grad_(), tensors["directions"], tensors["bits"])
        kernels.march(*rays, bound=1.0, resolution=selftest.CELLS, capacity=50).positions.sum().backward()

    launches, most = record(monkeypatch, call), (1 << 31) - 1
    changed = {"rays": most, "ray_programs": most}
    for kernel in ("march_count_kernel", "march_write_kernel", "march_backward_kernel"):
        launch = launches[kernel]
        given = {name: value for name, value in changed.items() if name in launch.arguments}
        lanes = touched(memory, monkeypatch, launch, (1431655766,), (most,), **given)
        assert not {"origins read", "grad_origins written"} & lanes.keys(), kernel


@interpreted
def test_overflow_of_cascades(memory, monkeypatch):
    """Cells of the fifth cascade of 1024^3 are not those of the first."""
    origins = torch.tensor([[-16.02, -15.99, -15.99]])
    bits = torch.zeros(5, 16**3 // 8, dtype=torch.uint8)
    options = {"bound": 16.0, "resolution": 16, "capacity": 8, "max_steps": 64}

    def call():
        kernels.march(origins, torch.eye(3)[:1], bits, **options)

    launch = record(monkeypatch, call)["march_count_kernel"]
    lanes = touched(memory, monkeypatch, launch, (0,), RESOLUTION=1024, outer_scale=1024 / 32)
    assert "origins read" in lanes and "bits read" not in lanes


@interpreted
def test_overflow_of_rows_of_a_table(memory, monkeypatch):
    """First rows of levels from 2^31 on are no rows before the table."""
    launch = field_launches(monkeypatch, "field_fwd_kernel")
    launch.arguments["WIDE"] = True
    levels = launch.arguments["levels"]
    near, far = (
        touched(
            memory, monkeypatch, launch, (0,), levels=torch.where(levels != 0, levels & 0xFFFFFFFF | first << 32, 0)
        )
        for first in ((1 << 31) - 256, -16)  # the latter is 2^32 - 16, as levels are read
    )
    assert near == far


@interpreted
def test_overflow_of_blocks_of_parameters(memory, monkeypatch):
    """Adan's blocks past 2^32 parameters are not those from 0 on."""
    launches = record(monkeypatch, gradients("adan"))
    lanes = touched(memory, monkeypatch, launches["_adan_norm_kernel"], (1 << 21,), (1 << 30,), size=1 << 33)
    assert "grads read" not in lanes


@interpreted
def test_overflow_of_tiles_of_a_field(memory, monkeypatch):
    """Tiles past 2^32 points are not those from 0 on."""
    launches = record(monkeypatch, gradients("field"))
    forward = launches["field_fwd_kernel"]
    lanes = touched(memory, monkeypatch, forward, (1 << 26,), (1 << 27,), rows=1 << 33)
    assert "x read" not in lanes and "sigma written" not in lanes
