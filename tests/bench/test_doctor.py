"""--doctor on this machine and on machines that lack something."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from dream_fast.bench.doctor import doctor, selftest
from dream_fast.bench.doctor.doctor import Finding
from dream_fast.bench.doctor.interpreter import quick_interpreter
from dream_fast.bench.ops import gate
from dream_fast.cli import main


@pytest.fixture(scope="module")
def findings() -> list[Finding]:
    """The findings of the self test in the interpreter, as on a machine without a GPU."""
    return list(doctor.check_kernels(on_gpu=False))


def test_check_kernels(findings):
    """Every kernel is right in the interpreter."""
    (finding,) = findings
    assert finding.state == "ok"
    assert {"hash_grid", "march", "render", "adan", "weight_decay"} <= set(finding.message.split(": ")[1].split(", "))


def test_selftest_catches_faults():
    """A factor of 1.001 on an output is caught, and so is an operator that raises."""

    def spoiled(operator):
        def call(*inputs, **options):
            out = operator(*inputs, **options)
            if isinstance(out, tuple):
                # Samples and views are named tuples; the first float tensor of each is spoiled.
                parts = list(out)
                at = next(i for i, part in enumerate(parts) if part.is_floating_point())
                parts[at] = parts[at] * 1.001
                return type(out)(*parts) if hasattr(out, "_fields") else tuple(parts)
            return out * 1.001 if out.is_floating_point() else out

        return call

    lines = {line["kernel"]: line["error"] for line in selftest.check(torch.device("cpu"), spoiled)}
    unseen = [name for name, error in lines.items() if error is None]
    assert unseen == ["adan"]  # changes its inputs and returns no numbers
    wrong = selftest.check(torch.device("cpu"), lambda operator: lambda *_, **__: (_ for _ in ()).throw(OSError("no")))
    assert all(line["error"] == "OSError: no" for line in wrong)


ENOUGH = 1e6  # seconds: only what never ends meets its limit


@pytest.mark.parametrize(
    ("code", "seconds", "sentence"),
    [
        (
            'print(\'{"kernel": "march", "error": "error 1, allowed 0", "seconds": 1}\'); exit(1)',
            ENOUGH,
            "kernel march",
        ),
        ("import os; os.kill(os.getpid(), 11)", ENOUGH, "failed with status -11"),
        ("import signal; signal.pause()", 1, "not finished after 1 s"),
        ("raise SystemExit('no driver')", ENOUGH, "failed with status 1: no driver"),
    ],
)
def test_check_kernels_reports_failures(code, seconds, sentence, monkeypatch):
    """A self test that fails, dies or hangs is a finding with advice."""
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **options: run([sys.executable, "-c", code], **options))
    (finding,) = doctor.check_kernels(on_gpu=True, seconds=seconds)
    assert finding.state == "wrong" and sentence in finding.message and "--backbone grid_torch" in finding.advice


def test_kernels_advice(monkeypatch):
    """On a GPU the advice has the cache folder; on a CPU, which calls no kernel, it is a note without one."""
    run, code = subprocess.run, 'print(\'{"kernel": "march", "error": "error 1, allowed 0", "seconds": 1}\'); exit(1)'
    monkeypatch.setattr(subprocess, "run", lambda command, **options: run([sys.executable, "-c", code], **options))
    monkeypatch.setenv("TRITON_CACHE_DIR", "/somewhere/else")
    (on_gpu,), (on_cpu,) = doctor.check_kernels(on_gpu=True), doctor.check_kernels(on_gpu=False)
    assert (on_gpu.state, on_cpu.state) == ("wrong", "note")
    assert "(/somewhere/else)" in on_gpu.advice and "cache" not in on_cpu.advice
    assert all("error 1, allowed 0" in finding.message and "report" in finding.advice for finding in (on_gpu, on_cpu))


@pytest.mark.parametrize("missing", [None, "_LangPatchScope"])
def test_quick_interpreter_leaves_no_trace(missing, monkeypatch):
    """Triton's interpreter is changed inside the context alone, and not at all where it is another one."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    if missing:
        monkeypatch.delattr(interpreter, missing)

    def state():
        builder = interpreter.interpreter_builder
        return interpreter._patch_lang, interpreter._get_np_dtype, builder.options

    before = state()
    with quick_interpreter():
        assert (state() == before) == (missing is not None)
    assert state() == before


def test_selftest_of_normals():
    """Inputs moved by half a rounding, as on another processor, pass; a normal turned by a thousandth fails."""
    name = "field_normals (finite_difference)"
    case, problem = selftest.build_all(torch.device("cpu"))[name]
    generator = torch.Generator().manual_seed(0)

    def rounded_otherwise(x, table, *rest, **options):
        noise = torch.rand(table.shape, generator=generator, dtype=table.dtype) - 0.5
        return problem.reference(x, table * (1 + 2**-23 * noise), *rest, **options)

    def turned(*inputs, **options):
        sigma, albedo, normal = problem.reference(*inputs, **options)
        return sigma, albedo, normal + 1e-3 * normal.roll(1, 1)

    operators = {"rounded": rounded_otherwise, "turned": turned}
    verdicts = gate.judge_problem(problem, case.mode, torch.float32, operators)
    assert verdicts["rounded"].good and not verdicts["turned"].good


def fake_torch(*, built=None, available=False, works=True, capability=(9, 0), warning=None, count=1):
    """The parts of torch that the doctor reads, as on another machine."""
    import warnings

    def is_available():
        if warning:
            warnings.warn(warning, stacklevel=1)
        return available

    def ones(*_, **__):
        if not works:
            raise RuntimeError("CUDA error: unspecified launch failure\nmore lines")
        return torch.ones(1)

    cuda = SimpleNamespace(
        is_available=is_available,
        device_count=lambda: count,
        get_device_name=lambda: "NVIDIA Test",
        get_device_capability=lambda: capability,
        get_device_properties=lambda _: SimpleNamespace(total_memory=80 * 2**30),
    )
    return SimpleNamespace(version=SimpleNamespace(cuda=built), cuda=cuda, ones=ones)


OLD_DRIVER = "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040)."


@pytest.mark.parametrize(
    ("machine", "driver", "state", "sentence", "advice"),
    [
        ({}, None, "note", "no NVIDIA GPU: runs use the CPU", ""),
        ({"built": "12.8"}, None, "note", "built for CUDA 12.8, which is harmless", ""),
        ({}, "550.1", "wrong", "the installed torch is a CPU build", "see pytorch.org"),
        ({"built": "13.0", "warning": OLD_DRIVER}, "470.1", "wrong", "driver on your system is too old", "update the"),
        ({"built": "12.8"}, "550.1", "wrong", "cannot use it (no reason given)", "--device cpu"),
        (
            {"built": "12.8", "available": True, "works": False},
            "550.1",
            "wrong",
            "unspecified launch failure",
            "restart",
        ),
        ({"built": "12.8", "available": True, "capability": (7, 0)}, "550.1", "note", "sm_70", ""),
        ({"built": "12.8", "available": True}, "550.1", "ok", "NVIDIA Test, 80 GiB, sm_90, driver 550.1", ""),
        ({"built": "12.8", "available": True, "count": 2}, "550.1", "ok", "the first of 2, use --device cuda:1", ""),
    ],
)
def test_check_gpu(machine, driver, state, sentence, advice, monkeypatch):
    """Findings for GPUs that work, are too old, or do not start."""
    monkeypatch.setattr(doctor, "find_driver", lambda: driver)
    finding = doctor.check_gpu(fake_torch(**machine))
    assert (
        finding.state == state
        and sentence in finding.message
        and advice in finding.advice
        and "\n" not in finding.message
    )


def test_missing_libraries(monkeypatch):
    """A missing triton or xformers is a note, or an error where it is needed."""
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    assert doctor.check_triton(on_gpu=False).state == "note"
    missing = doctor.check_triton(on_gpu=True)
    assert missing.state == "wrong" and "pip install triton" in missing.advice
    finding = {finding.message.split()[1]: finding for finding in doctor.check_attention(torch, torch.device("cpu"))}
    assert (
        finding["sdpa"].state == "ok"
        and finding["xformers"].state == "note"
        and "xformers" in finding["xformers"].advice
    )


def test_run_without_triton(tmp_path, tiny_model):
    """A run on a CPU needs neither triton nor xformers."""
    code = "import sys\nfor name in ('triton', 'xformers', 'xformers.ops'): sys.modules[name] = None\n"
    code += "from dream_fast.cli import main\nsys.exit(main(sys.argv[1:]))"
    words = (
        f"--hf_key {tiny_model} --workspace {tmp_path} --device cpu --iters 1 --w 8 --h 8 --W 32 --H 32 --n_levels 2"
    )
    words += " --max_resolution 32 --log2_hashmap_size 8 --occupancy_resolution 16 --dataset_size_test 1 --max_steps 32"
    words += " --dataset_size_valid 1 --six_views"
    process = subprocess.run(
        [sys.executable, "-P", "-c", code, "--text", "a hamburger", *words.split()], capture_output=True, text=True
    )
    assert process.returncode == 0 and "done in" in process.stdout, process.stderr


def test_torch_does_not_load(monkeypatch):
    """A torch that does not load is the last finding."""

    def broken(name):
        raise OSError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setattr(doctor, "import_module", broken)
    finding = list(doctor.make_findings())[-1]
    assert finding.state == "wrong" and "libcudart.so.12" in finding.message and "reinstall" in finding.advice


def test_main_prints_findings(monkeypatch, capsys):
    """Findings are printed, and the status is 1 if there is an error."""
    for finding, status in ((Finding("note", "no GPU"), 0), (Finding("wrong", "no torch", "pip install torch"), 1)):
        monkeypatch.setattr(doctor, "make_findings", lambda finding=finding: iter([Finding("ok", "fine"), finding]))
        assert main(["--doctor"]) == status
        out = capsys.readouterr().out
        assert finding.message in out and finding.advice in out
        assert ("ready for a run" in out) == (status == 0)


def test_selftest_prints_json(capsys, monkeypatch):
    """The self test prints a line of JSON for each kernel, and its status is 1 if one fails."""
    monkeypatch.setattr(selftest, "check", lambda device: iter([{"kernel": "march", "error": "no", "seconds": 0}]))
    assert selftest.main([]) == 1
    assert json.loads(capsys.readouterr().out)["kernel"] == "march"
