"""The benchmark of the operators: its workloads, its gate on accuracy, its rows, its timer and its comparison."""

import copy
import json
import math
import subprocess
import threading
from types import SimpleNamespace

import pytest
import torch

from dream_fast import kernels
from dream_fast.bench import __main__ as command
from dream_fast.bench import compare, measure, results
from dream_fast.bench.accuracy import check_fp64
from dream_fast.bench.ops import gate, host, inputs
from dream_fast.bench.ops import run as bench
from dream_fast.bench.ops.cases import FULL, SMALL, SPECS, build, tiny_cases
from dream_fast.bench.ops.spec import Case, run
from dream_fast.kernels._core.launch import INTERPRETED

CPU = torch.device("cpu")
ROW = "op case impl mode call dtype median_ms p20_ms p80_ms floor_ms pct_of_floor peak_bytes max_err tol".split()
NEVER = 1e6  # seconds: no limit ends what these tests run
HEAD = "schema gpu driver torch triton git_sha dirty utc copy_rate matmul_rate rows".split()


@pytest.mark.parametrize(("side", "millions"), [(64, 0.51), (128, 2.03)])
def test_sphere_samples(side, millions):
    """Samples lie in the sphere, a step apart, and are as many as the documents state."""
    positions, t, offsets = inputs.sphere_samples(side, CPU)
    assert round(len(t) / 1e6, 2) == millions and len(t) % 256 == 0
    assert positions.norm(dim=1).max() < inputs.RADIUS + inputs.STEP / 2
    assert offsets.shape == (side * side + 1,) and offsets[-1] == len(t)
    step = t.diff()
    inner = torch.ones(len(t) - 1, dtype=torch.bool)
    inner[offsets[(offsets > 0) & (offsets < len(t))] - 1] = False
    # Two numbers of up to t.max() are rounded, each by half a unit; their difference is exact.
    assert (step[inner].double() - inputs.STEP).abs().max() <= torch.finfo(t.dtype).eps * t.max()


def test_camera():
    """The field of view is 20 degrees around the origin."""
    origins, directions = inputs.camera(512, CPU)
    assert torch.equal(origins.unique(dim=0), torch.tensor([[0, 0, 3.2]]))
    check_fp64("lengths", directions.double().norm(dim=1), torch.ones(512**2, dtype=torch.float64))
    corners = directions.view(512, 512, 3)
    # The middle of the first row is half a pixel inside the field of view.
    slope = (corners[0, 256, 1] / -corners[0, 256, 2]).double()
    check_fp64("first row", slope, torch.tensor(math.tan(math.radians(10)) * 511 / 512, dtype=torch.float64))
    assert corners[0, 0, 0] < 0 < corners[0, 511, 0]


def test_occupancy_bits():
    """Occupied cells are those whose centre lies in the sphere."""
    bits = inputs.occupancy_bits(CPU)
    x = 2 * torch.rand(4096, 3, generator=torch.Generator().manual_seed(0)) - 1
    occupied = kernels.occupancy_query(bits, x, 1.0, inputs.OCCUPANCY)
    centre = ((x + 1) * 64).floor().add(0.5) / 64 - 1
    assert torch.equal(occupied, centre.norm(dim=1) < inputs.RADIUS) and occupied.any()


@pytest.mark.parametrize("name", inputs.SCENES)
def test_scene_cases(name):
    """Samples lie in occupied cells and fill most of the room for them, and every operator takes them."""
    scene, side = inputs.scene_of(f"{name}_16")
    positions, t, offsets = inputs.scene_samples(scene, side, CPU)
    bits = inputs.occupancy_bits(CPU, scene.is_occupied, scene.bound)
    assert kernels.occupancy_query(bits, positions, scene.bound, inputs.OCCUPANCY).all()
    assert len(t) % 256 == 0 and 0.5 < len(t) / (side * side * scene.samples_a_ray) <= 1 and offsets[-1] == len(t)
    for op in ("march", "composite", "hash_grid"):
        case = Case(op=op, case=f"{name}_16", mode=SPECS[op].modes[-1], dtype="float32")
        problem = build(case)
        results = run(problem, problem.operator, case.mode, case.compute_dtype)
        assert all(torch.isfinite(result).all() for result in results)
        if op == "march":
            assert results[5] // 256 * 256 == len(t) and not results[6]  # count, overflow
        assert problem.least_bytes > 0


def test_camera_of_a_scene_looks_at_the_origin():
    """The mean of a symmetric image's rays points from the camera to the origin."""
    scene = inputs.SCENES["inside"]
    origins, directions = inputs.camera(64, CPU, scene.position, scene.field_of_view)
    mean = directions.double().mean(0)
    check_fp64("direction", mean / mean.norm(), -origins[0].double() / origins[0].double().norm())


def test_specs_are_complete():
    """Every target has a row, and every operator cases for a GPU, a CPU and the self test."""
    rows = {(case.op, case.case, case.mode) for case in FULL}
    targets = {(spec.name, *key) for spec in SPECS.values() for key in spec.targets}
    assert targets <= rows and len(rows) == len(FULL)
    assert {case.op for case in FULL} == {case.op for case in SMALL}
    assert {case.op for case in tiny_cases()} == SPECS.keys()
    assert {case.mode for case in FULL} <= {"forward", "backward", "forward_backward"}


@pytest.mark.parametrize("case", [case for case in SMALL if "difference" not in case.case], ids=str)
def test_small_cases_run(case):
    """Outputs are finite, gradients have the shapes of leaves, and the floor counts the written bytes."""
    problem = build(case)
    outputs = run(problem, problem.operator, case.mode, case.compute_dtype)
    assert all(torch.isfinite(out).all() for out in outputs)
    gradients = len(problem.leaves) if case.mode == "forward_backward" else 0
    assert [out.shape for out in outputs[len(outputs) - gradients :]] == [
        problem.tensors[name].shape for name in problem.leaves[:gradients]
    ]
    written = sum(inputs.nbytes(out) for out in outputs)
    assert problem.least_bytes >= (0.9 if case.op == "march" else 1) * written * (not problem.mutates)


def test_floor_counts_touched_rows():
    """The floor of the table counts the rows that are read."""
    few = build(Case(op="hash_grid", case="uniform_2^4", mode="forward", dtype="float32"))
    rest = inputs.nbytes(few.tensors["x"]) + 16 * inputs.GRID.channels * 4
    rows = (few.least_bytes - rest) / (inputs.GRID.features * 4)
    assert 0.9 * 16 * 8 * 16 < rows <= 16 * 8 * 16  # hardly two points share a corner


def test_build_refuses_wrong_names():
    """A name that does not fit the operator is a ValueError."""
    with pytest.raises(ValueError, match="must be a rays_N, got uniform_2"):
        build(Case(op="march", case="uniform_2^4", mode="forward", dtype="float32"))
    with pytest.raises(ValueError, match="ends in _finite_difference or _analytic, got rays_8"):
        build(Case(op="field_normals", case="rays_8", mode="forward", dtype="float32"))


@pytest.mark.parametrize(
    ("op", "case", "mode"),
    [
        ("hash_grid", "uniform_2^6", "forward_backward"),
        ("composite", "rays_8", "forward_backward"),
        ("march", "rays_8", "forward"),
        ("adan", "0.1M", "forward"),
    ],
)
def test_judge_catches_small_faults(op, case, mode):
    """The reference passes, and a factor of 1.001 fails."""
    what = Case(op=op, case=case, mode=mode, dtype="float32")
    reference = bench.find_implementation(what, "reference")

    def wrong(*args, **kwargs):
        out = reference(*args, **kwargs)
        if op == "adan":
            args[0].mul_(1.001)
            return out
        parts = [out] if isinstance(out, torch.Tensor) else list(out)
        parts[0] = parts[0] * 1.001
        return parts[0] if isinstance(out, torch.Tensor) else type(out)(*parts)

    verdicts = gate.judge(what, CPU, {"good": reference, "wrong": wrong})
    assert verdicts["good"].good and not verdicts["wrong"].good


def test_judge_catches_gradients_and_nan():
    """A wrong gradient and a NaN are caught."""
    what = Case(op="composite", case="rays_8", mode="forward_backward", dtype="float32")

    def scaled(sigma, *args, **kwargs):  # the same values, another gradient
        return kernels.composite_reference(sigma.detach() * 1.01 - sigma * 0.01 + 0.0 * sigma.detach(), *args, **kwargs)

    def missing(*args, **kwargs):
        out = kernels.composite_reference(*args, **kwargs)
        return out._replace(depth=out.depth * torch.nan)

    verdicts = gate.judge(what, CPU, {"scaled": scaled, "missing": missing})
    assert not verdicts["scaled"].good and verdicts["missing"].max_err == math.inf


def test_worst_verdict_of_small_gradients():
    """A bias whose reference is right by luck is judged by the network's error; an output or a wrong bias is not."""
    exact = (torch.ones(4).double(), torch.ones(100).double(), torch.ones(4).double())
    reference = (exact[0], exact[1] * (1 + 1e-5), exact[2])
    got = (exact[0], exact[1], exact[2] * (1 + 1.25e-5))
    assert gate.worst_verdict(got, reference, exact, gradients=2).good
    assert not gate.worst_verdict(got, reference, exact).good
    assert not gate.worst_verdict((exact[0], exact[1], exact[2] * 1.0001), reference, exact, gradients=2).good
    assert not gate.worst_verdict((exact[0] * 1.00001, *got[1:]), reference, exact, gradients=2).good


def test_worst_verdict_weighs_outputs():
    """A deviation where the weight is 0 does not count, and one where it is 1 does."""
    exact = (torch.ones(100, 3).double(),)
    weight = (torch.arange(100.0)[:, None] != 7).double()
    for row, good in ((7, True), (8, False)):
        got = exact[0].clone()
        got[row] = -1
        assert gate.worst_verdict((got,), exact, exact, (weight,)).good == good


def test_judge_refuses_lost_samples():
    """A march with fewer samples on its rays cannot be compared."""
    what = Case(op="march", case="rays_8", mode="forward", dtype="float32")

    def short(*args, **kwargs):
        return kernels.march_reference(*args, **(kwargs | {"max_steps": 900}))

    with pytest.raises(AssertionError, match="of the rays have another number of samples"):
        gate.judge(what, CPU, {"short": short})


def test_copied_inputs_protect_the_problem():
    """An operator that changes its inputs changes copies."""
    problem = build(Case(op="adan", case="0.1M", mode="forward", dtype="float32"))
    before = problem.tensors["params"].clone()
    run(gate.copy_inputs(problem), problem.operator, "forward", torch.float32)
    run(gate.in_dtype(problem, torch.float32), problem.operator, "forward", torch.float32)
    assert torch.equal(problem.tensors["params"], before)


def rows_of(tmp_path, *more: str) -> tuple[int, dict]:
    out = tmp_path / "cpu.json"
    limits = ["--seconds", str(NEVER), "--peer_seconds", str(NEVER)]
    status = bench.main(["--device", "cpu", "--ms", "5", *limits, "--out", str(out), *more])
    return status, json.loads(out.read_text())


@pytest.fixture(autouse=True)
def no_rates(monkeypatch):
    """Constant rates of the machine, since measuring them takes a second."""
    monkeypatch.setattr(measure, "copy_rate", lambda device: 10e9)
    monkeypatch.setattr(measure, "matmul_rate", lambda device: 100e9)


def test_result_file_schema(tmp_path, capsys):
    """Header and rows have the fields of the schema."""
    status, record = rows_of(tmp_path, "--op", "composite", "--op", "march")
    assert status == 0 and list(record) == HEAD
    assert [(row["op"], row["mode"]) for row in record["rows"]] == [
        ("march", "forward"),
        ("composite", "forward"),
        ("composite", "forward_backward"),
    ]
    for row in record["rows"]:
        assert list(row) == ROW
        assert row["impl"] == "reference" and row["dtype"] == "float32" and row["call"] == "eager"
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["pct_of_floor"] == pytest.approx(100 * row["floor_ms"] / row["median_ms"], rel=0.05, abs=0.01)
        assert row["max_err"] <= row["tol"]
    printed = capsys.readouterr().out
    assert "composite" in printed and json.loads(printed.splitlines()[-1])["rows"] == 3
    assert compare.main([str(tmp_path / "cpu.json")] * 2) == 0


def test_file_name():
    """The file is named after the GPU."""
    assert results.file_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3.json"
    assert results.file_name(None) == "cpu.json"


def test_suite_rejects_wrong_results(tmp_path, monkeypatch, capsys):
    """A wrong implementation is not timed; a wrong kernel fails the command."""
    suite = bench.Suite(CPU, seconds=NEVER, peer_seconds=NEVER, milliseconds=5)
    case = Case(op="composite", case="rays_8", mode="forward", dtype="float32")

    def wrong(*args, **kwargs):
        out = kernels.composite_reference(*args, **kwargs)
        return out._replace(values=out.values * 1.01)

    monkeypatch.setattr(bench, "find_implementation", lambda case, name: wrong)
    suite.measure_case(case, "triton")
    suite.measure_case(case, "reference")
    assert suite.rows == []
    assert suite.inaccurate[0].startswith("composite rays_8 forward triton: error 0.01")
    assert suite.left_out[0].startswith("composite rays_8 forward reference: error 0.01")


def test_suite_reports_failures(monkeypatch):
    """A peer that fails or takes too long is left out, with the reason."""
    suite = bench.Suite(CPU, seconds=NEVER, peer_seconds=NEVER, milliseconds=5)
    case = Case(op="composite", case="rays_8", mode="forward", dtype="float32")

    def raises(*args, **kwargs):
        raise torch.OutOfMemoryError("all of it")

    monkeypatch.setattr(bench, "find_implementation", lambda case, name: raises)
    suite.measure_case(case, "compiled")
    suite.measure_case(case, "compiled")  # compiling it fails once, and not once a mode
    endless = threading.Event()
    monkeypatch.setattr(bench, "find_implementation", lambda case, name: lambda *args, **kwargs: endless.wait())
    suite.peer_seconds = 0.2
    suite.measure_case(case, "reference")
    suite.end = 0.0  # long ago
    suite.measure_case(case, "reference")
    assert suite.rows == [] and suite.inaccurate == []
    assert suite.left_out == [
        "composite rays_8 forward compiled: OutOfMemoryError: all of it",
        "composite rays_8 forward compiled: not compiled, see above",
        "composite rays_8 forward reference: TimeoutError: more than 0 s",
        "composite rays_8 forward reference: no time left (--seconds)",
    ]


def test_compile_side_by_side(monkeypatch, tmp_path, capsys):
    """Each case is compiled once, by a command that the parser accepts."""
    commands = []

    def run(command, *, timeout, **_):
        commands.append(command)
        assert timeout <= NEVER
        raise subprocess.TimeoutExpired(command, timeout)  # what takes too long is nobody's fault

    cases = [
        Case(op="composite", case="rays_8", mode="forward", dtype="float32"),
        Case(op="composite", case="rays_8", mode="forward_backward", dtype="float32"),
        Case(op="march", case="rays_8", mode="forward", dtype="float32"),
    ]
    with monkeypatch.context() as patch:
        patch.setattr(bench.subprocess, "run", run)
        bench.compile_side_by_side(cases, "cpu", NEVER)
    assert sorted(command[command.index("--op") + 1] for command in commands) == ["composite", "march"]
    # The other process takes these words, for the implementation that is named alone.
    words = commands[0][commands[0].index("kernels") + 1 :]
    assert words[words.index("--impl") + 1] == "compiled"
    out = tmp_path / "rows.json"
    words[words.index("--impl") + 1], words[words.index("--out") + 1] = "reference", str(out)
    assert bench.main(words) == 0
    assert {row["impl"] for row in json.loads(out.read_text())["rows"]} == {"reference"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the command measures for minutes and refuses nothing")
def test_kernels_command_without_gpu(capsys):
    """Without a GPU, and for an unknown operator, the command ends with status 2."""
    assert bench.main([]) == 2
    assert "finds no GPU" in capsys.readouterr().err
    assert bench.main(["--device", "cpu", "--op", "nothing"]) == 2
    assert "hash_grid/rays_64" in capsys.readouterr().err


def test_time_cpu(monkeypatch):
    """The timer warms up, makes at least three calls and takes the median."""
    now, calls = [0.0], []

    def call():
        calls.append(1)
        now[0] += 0.05 if len(calls) == 3 else 0.002

    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    timing = measure.time_cpu(call, milliseconds=61)
    # One to warm up, then 2, 50, 2, 2, 2, 2 and 2 ms.
    assert len(calls) == 8 and timing == pytest.approx((2, 2, 2, False))
    measure.time_cpu(call, milliseconds=0)
    assert len(calls) == 8 + 1 + 3  # never fewer than three
    assert measure.quantiles([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == (3.5, 2.0, 5.0, False)
    assert measure.peak_bytes(call, CPU) == 0


def test_time_eager(monkeypatch):
    """Calls follow one another in batches, each of which ends with a wait for the GPU that counts."""
    now, calls, waits = [0.0], [], []

    def call():
        calls.append(1)
        now[0] += 0.001

    def synchronize():
        waits.append(len(calls))
        now[0] += 0.001 * (len(waits) % 2 == 0)  # the second wait of a batch is for its work

    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    timing = measure.time_eager(call, milliseconds=400)
    # 8 / (4/3) = 6 calls a batch, which takes 7 ms.
    assert timing == pytest.approx((7 / 6, 7 / 6, 7 / 6, False))
    batches = list(zip(waits[2::2], waits[3::2], strict=True))
    assert len(batches) == math.ceil(400 / 7) and all(after - before == 6 for before, after in batches)


def test_ways_to_call():
    """On a GPU ours has two rows, and a peer one: from a graph where it can be captured. A CPU has no graphs."""
    cuda, norm, field = (
        torch.device("cuda"),
        *(next(c for c in FULL if c.op == op) for op in ("group_norm_silu", "field")),
    )
    assert bench.ways_to_call(field, "triton", cuda) == ("graph", "eager")
    assert bench.ways_to_call(field, "reference", cuda) == ("eager",)
    assert bench.ways_to_call(norm, "compiled", cuda) == ("graph",)
    assert bench.ways_to_call(field, "reference", CPU) == ("eager",)


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not launched")
def test_time_host(monkeypatch, capsys):
    """The host's part has the launches of a call, forward and backward, and a row for each operator that is named."""
    pytest.importorskip("triton")
    monkeypatch.setattr(host, "CALLS", 1)
    monkeypatch.setattr(host, "BATCHES", 1)
    assert bench.main(["--host", "--op", "composite", "--op", "march"]) == 0
    head, *rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert head == ["op", "case", "mode", "us", "launching", "launches"]
    assert [(row[0], row[2], int(row[5])) for row in rows] == [
        ("march", "forward", 3),
        ("composite", "forward_backward", 2),
    ]
    assert all(float(row[3]) > 0 for row in rows)
    assert bench.main(["--host", "--op", "nothing"]) == 2
    assert "no such operator; there are: hash_grid" in capsys.readouterr().err


def result(**changes) -> dict:
    row = {"op": "field", "case": "rays_64", "impl": "triton", "mode": "forward", "dtype": "float16"}
    numbers = {"median_ms": 1.0, "p20_ms": 0.99, "p80_ms": 1.01, "floor_ms": 0.1, "pct_of_floor": 10.0}
    others = {"peak_bytes": 1, "max_err": 1e-4, "tol": 2e-4}
    rows = [row | numbers | others, row | numbers | others | {"mode": "forward_backward"}]
    return {"schema": 1, "gpu": "NVIDIA H100 80GB HBM3", "git_sha": "a", "rows": rows} | changes


@pytest.fixture
def judged(tmp_path):
    """Exit status of the comparison of two results."""

    def status(base, new) -> int:
        for name, record in (("base", base), ("new", new)):
            (tmp_path / name).write_text(record if isinstance(record, str) else json.dumps(record))
        return command.main(["compare", str(tmp_path / "base"), str(tmp_path / "new")])

    return status


@pytest.mark.parametrize(
    ("median", "spread", "status"),
    [
        (1.0, 0.02, 0),
        (1.049, 0.02, 0),  # within 5 %
        (1.051, 0.02, 1),
        (2.0, 0.02, 1),
        (1.15, 0.08, 0),  # within twice the spread
        (1.17, 0.08, 1),
        (0.5, 0.02, 0),
    ],
)
def test_compare_catches_regressions(judged, capsys, median, spread, status):
    """A planted slowdown is caught, noise is not."""
    new = result()
    new["rows"][1] |= {"median_ms": median, "p20_ms": median - spread / 2, "p80_ms": median + spread / 2}
    assert judged(result(), new) == status
    printed = capsys.readouterr().out
    assert ("field rays_64 forward_backward float16 triton" in printed) == bool(status)
    assert "field rays_64 forward float16" not in printed


def test_compare_allows_noise_of_the_base(judged):
    """The spread of the base counts as well."""
    base, new = result(), result()
    base["rows"][0] |= {"p20_ms": 0.9, "p80_ms": 1.1}
    new["rows"][0] |= {"median_ms": 1.3}
    assert judged(base, new) == 0


def test_compare_ignores_measurements(judged):
    """Measured fields and commits are not part of a row's identity."""
    new = result(git_sha="b")
    for row in new["rows"]:
        row |= {"floor_ms": 0.2, "peak_bytes": 5, "max_err": 3e-4, "tol": 5e-4, "pct_of_floor": 3.0, "split_ms": {}}
    assert judged(result(), new) == 0


def test_compare_lists_missing_rows(judged, capsys):
    """Rows that only the base has are listed."""
    new = result()
    del new["rows"][1]
    assert judged(result(), new) == 0
    assert "only in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("new", "complaint"),
    [
        (result(gpu="NVIDIA H200"), "gpu differs: NVIDIA H100 80GB HBM3 and NVIDIA H200"),
        (result(schema=2), "schema differs: 1 and 2"),
        (result(rows=[]), "no row in common"),
        ("{", "Expecting property name"),
        ("[]", "is not a result of `bench kernels`"),
        ({"schema": 1}, "is not a result of `bench kernels`"),
    ],
)
def test_compare_refuses_other_files(judged, capsys, new, complaint):
    """Other GPUs, schemas and kinds of files are refused with a sentence."""
    assert judged(result(), copy.deepcopy(new)) == 2
    assert complaint in capsys.readouterr().err


def test_compare_refuses_missing_files(tmp_path, capsys):
    """A missing file is refused with a sentence."""
    assert compare.main([str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert "No such file" in capsys.readouterr().err
