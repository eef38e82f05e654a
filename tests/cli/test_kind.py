"""Helpful answers to mistakes that users of similar programs make."""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import dream_fast
from dream_fast.cli import build_parser, main
from dream_fast.engine.config import other_programs
from dream_fast.engine.config.compat import UNSUPPORTED_FLAGS, UNSUPPORTED_VALUES
from dream_fast.engine.config.configure import configure
from dream_fast.engine.config.presets import reference
from dream_fast.engine.config.prompt_syntax import foreign_syntax
from dream_fast.engine.config.reproduce import reproduce_command
from dream_fast.engine.config.spelling import nearest, slips
from dream_fast.engine.errors import UserError
from dream_fast.engine.runtime.device import choose_runtime, prepare
from dream_fast.engine.workspace import lock
from dream_fast.engine.workspace.folder import Workspace
from dream_fast.kernels._core.launch import launch

SMALL = """
    --device cpu --iters 2 --log_every 1 --seed 7 --w 8 --h 8 --W 16 --H 16 --dataset_size_test 2
    --dataset_size_valid 1 --n_levels 2 --log2_hashmap_size 8 --max_resolution 32 --hidden_width 16 --hidden_layers 1
    --bound 0.6 --max_steps 48 --occupancy_resolution 16 --mcubes_resolution 16 --texture_resolution 32
""".split()


def refusal(capsys: pytest.CaptureFixture, words: list[str]) -> str:
    """The message with which the command refuses `words`."""
    capsys.readouterr()
    assert main(words) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("dream-fast: error: ") and "\n" not in error
    return error.removeprefix("dream-fast: error: ")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_module_is_the_command(tmp_path):
    """`python -m dream_fast` is the command, and `python -m dream_fast.bench` lists the measurements."""
    version = subprocess.run([sys.executable, "-m", "dream_fast", "--version"], capture_output=True, text=True)
    assert (version.returncode, version.stdout) == (0, f"dream-fast {dream_fast.__version__}\n"), version.stderr
    refused = subprocess.run([sys.executable, "-m", "dream_fast"], capture_output=True, text=True, cwd=tmp_path)
    assert refused.returncode == 2 and refused.stderr.startswith("dream-fast: error: no prompt")
    bench = subprocess.run([sys.executable, "-m", "dream_fast.bench", "--help"], capture_output=True, text=True)
    assert bench.returncode == 0 and bench.stdout.startswith("usage: python -m dream_fast.bench COMMAND")


# ------------------------------------------------------------------------------------------------------ what is typed


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["--prompt", "a cat"], "--text"),
        (["-p", "a cat"], "--text"),
        (["--negative_prompt", "blurry"], "--negative"),
        (["--resume"], "--workspace"),
        (["--resume_from_checkpoint", "x"], "--workspace"),
        (["--lora", "x"], "--hf_key"),
        (["--mesh_format", "ply"], "--save_mesh"),
        (["--export"], "--save_mesh"),
        (["--suppress_face"], "--perpneg"),
        (["--steps", "50"], "--iters"),
        (["--num_inference_steps", "50"], "--iters"),
        (["--max-train-steps", "50"], "--iters"),
        (["--cfg", "7"], "--guidance_scale"),
        (["--CFG-scale=7"], "--guidance_scale"),
        (["--outdir", "x"], "--workspace"),
        (["--output_dir", "x"], "--output"),
        (["--gpu", "1"], "--device cuda:1"),
        (["--gpu_ids", "1"], "--device cuda:1"),
        (["--width", "512"], "--w and --h"),
        (["--pretrained_model_name_or_path", "x"], "--hf_key"),
        (["--medvram"], "--vram_O"),
        (["--xformers"], "--attention xformers"),
        (["--fp32"], "leave out -O"),
        (["--mixed_precision", "fp16"], "-O "),
        (["--learning_rate", "0.1"], "--lr"),
        (["--port", "7860"], "report.html"),
        (["system.prompt_processor.prompt=a cat"], "--text"),
        (["--text", "a cat", "trainer.max_steps=10"], "--iters"),
        (["--text", "a cat", "save_path=x"], "--workspace"),
        (["--text", "a cat", "system.loss.lambda_sds=1"], "--help"),
        (["--text", "a cat", "--guidance", "stable-diffusion"], "--guidance SD"),
        (["--text", "a cat", "--sd_version", "xl"], "--hf_key"),
        (["--text", "a cat", "--sd_version", "1.4"], "--hf_key CompVis/stable-diffusion-v1-4"),
        (["--text", "a cat", "--device", "1"], "--device cuda:1"),
        (["--text", "a cat", "--device", "mps"], "leave --device out"),
        (["--text", "a cat", "--seed", "-1"], "leave --seed out to draw one"),
        (["train", "--text", "a cat"], "no commands here; begin with --text"),
        (["export", "--workspace", "x"], "--save_mesh"),
        (["--text", "a cat", "--save_mesh", "True"], "--no-save_mesh turns it off"),
        (["--text", "a cat", "--fp16=false"], "--fp16 takes no value, so not 'false': --no-fp16 turns it off"),
        (["\u2014text", "a cat"], "a dash that is not a hyphen"),
        (["--text", "\u201ca", "cat\u201d"], "straight quotes"),
        (["--text", "a cat", "--zero123-config", "x"], UNSUPPORTED_FLAGS["--zero123_config"]),
    ],
)
def test_flag_of_another_program(words, flag, capsys):
    """A flag of another program is refused with the equivalent here, and without another suggestion."""
    message = refusal(capsys, words)
    assert flag in message and "did you mean" not in message


def test_tables_of_other_programs():
    """No name is one of our flags, none occurs twice, and every flag in an answer exists."""
    flags = set(build_parser()._option_string_actions)
    names = [name for names in other_programs.ANSWERS for name in names.split()]
    assert len(names) == len(set(names)) and names == list(map(other_programs.plain_name, names))
    assert not {other_programs.plain_name(flag) for flag in flags} & set(names)
    assert not {other_programs.plain_name(flag) for flag in UNSUPPORTED_FLAGS} & set(names)
    answers = [
        *other_programs.FLAGS.values(),
        *other_programs.COMMANDS.values(),
        *other_programs.KEYS.values(),
        *other_programs.VALUES.values(),
    ]
    for answer in answers:
        assert set(re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", answer)) <= flags, answer
        assert "|" not in answer
    assert {flag for flag, _ in other_programs.VALUES} <= flags
    assert not set(other_programs.VALUES) & set(UNSUPPORTED_VALUES)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--itres", "--iters"),
        ("--iter", "--iters"),
        ("--workspcae", "--workspace"),
        ("--guidence_scale", "--guidance_scale"),
        ("--save-mesh", "--save_mesh"),
        ("--Workspace", "--workspace"),
        ("-iters", "--iters"),
        ("--no_save_mesh", "--no-save_mesh"),
        ("--sd_verison", "--sd_version"),
    ],
)
def test_mistyped_flag_suggestion(typed, meant, capsys):
    """A typing error, or another spelling of a name, is answered with the flag."""
    assert refusal(capsys, ["--text", "a cat", typed, "x"]) == f"unknown flag {typed}; did you mean {meant}?"


@pytest.mark.parametrize("typed", ["--zxqvj", "-x", "--lrr", "--foo", "--quality", "--lambda_mesh", "--theta", "--op"])
def test_flag_without_suggestion(typed, capsys):
    """There is no suggestion where no flag, or more than one, is near."""
    assert refusal(capsys, ["--text", "a cat", typed, "x"]) == f"unknown flag {typed}; see --help"


def test_slips_count():
    """An inserted, missing, different or swapped letter is one slip each."""
    pairs = {("iters", "itres"): 1, ("iter", "iters"): 1, ("iterss", "iters"): 1, ("itars", "iters"): 1, ("", "abc"): 3}
    assert all(slips(*pair) == count == slips(*pair[::-1]) for pair, count in pairs.items())
    assert nearest("abcdefgh", {"abcdefgx": "one", "abcdefgy": "two"}) is None
    assert nearest("abcdefgh", {"abcdefgx": "one", "abcdefxy": "two"}) == "one"
    assert nearest("abc", {"abx": "one"}) is None


@pytest.mark.parametrize(
    ("prompt", "shown", "advice"),
    [
        ("a (red:1.3) hamburger", "(red:1.3)", "--guidance_scale"),
        ("a ((red)) hamburger", "((red))", "--guidance_scale"),
        ("a [red|blue] hamburger", "[red|blue]", "--guidance_scale"),
        ("a [red:blue:0.5] hamburger", "[red:blue:0.5]", "--guidance_scale"),
        ("a red++ hamburger", "red++", "--guidance_scale"),
        ("a (red hamburger)-", ")-", "--guidance_scale"),
        ("a hamburger <lora:x:0.8>", "<lora:x:0.8>", "--hf_key"),
        ("a <my-cat> hamburger", "<my-cat>", "textual inversions"),
        ("a hamburger, embedding:easy", "embedding:easy", "textual inversions"),
        ("a {red|blue} hamburger", "{red|blue}", "plain words"),
        ("a hamburger BREAK a plate", "BREAK", "plain words"),
        ("a hamburger --ar 16:9", "--ar 16:9", "flags"),
        ("a hamburger --no people", "--no people", "--negative"),
    ],
)
def test_foreign_syntax_noted(prompt, shown, advice, capsys):
    """It is read as words, with a note and advice, for each prompt and the negative one."""
    (note,) = foreign_syntax(prompt)
    assert note.startswith(f'"{shown}" has no special meaning and is read as words') and advice in note
    words = ["--print-config", "--device", "cpu", "--hf_key", "x", "--text"]
    assert main([*words, prompt]) == 0
    assert capsys.readouterr().err == f"dream-fast: note: --text: {note}\n"
    assert main([*words, "a hamburger", "--text_back", prompt, "--negative", prompt]) == 0
    assert capsys.readouterr().err == "".join(f"dream-fast: note: --{at}: {note}\n" for at in ("text_back", "negative"))


@pytest.mark.parametrize(
    "prompt",
    [
        "a hamburger (with cheese), 3:4 view",
        "a DSLR photo of a T-rex - roaring",
        "C++ and a well-known cat",
        "a < b > c",
        *(part * 100_000 for part in ("(", "((", "[", "<lora:", "__", "a", "(a:1", "{a|", "--no ", "(:", "1+")),
        "(a:" + "1" * 100_000,
    ],
    ids=lambda prompt: prompt[:12],
)
def test_plain_prompt_has_no_note(prompt):
    """Brackets, colons and dashes of plain English give no note."""
    assert foreign_syntax(prompt) == []


# -------------------------------------------------------------------------------------------------- outputs elsewhere


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory) -> Path:
    """The workspace of a finished run; tests that change it work on a copy."""
    workspace = tmp_path_factory.mktemp("runs") / "trial"
    assert main(["--text", "a cat", "--hf_key", str(tiny_model), "--workspace", str(workspace), *SMALL]) == 0
    return workspace


def test_outputs_of_test_go_elsewhere(finished, tmp_path, capsys):
    """`--test --output` only reads the workspace, works while another process holds it, and can be repeated."""
    before, folder = contents(finished), tmp_path / "look"
    words = ["--test", "--workspace", str(finished), "--output", str(folder), "--device", "cpu"]
    (finished / ".lock").mkdir()  # nobody can lock it
    try:
        assert main([*words, "--six_views", "--W", "20"]) == 0
        assert main([*words, "--save_mesh"]) == 0
    finally:
        (finished / ".lock").rmdir()
    assert contents(finished) == before
    names = {"config.json", "manifest.json", "metrics.jsonl", "log.txt", "report.html", "mesh/mesh.glb"}
    assert {*names, "results/front.png", "results/turntable.mp4"} <= set(contents(folder))
    assert f"{folder}"[:40] in capsys.readouterr().out
    stored = Workspace(folder).stored_config()
    assert (stored.run.test, stored.camera.W) == (True, 16) and "--output" not in reproduce_command(stored)


def test_read_only_workspace(finished, tmp_path, capsys, monkeypatch):
    """A read-only run is refused with advice to use --output, which works."""
    allowed = os.access
    words = ["--test", "--six_views", "--workspace", str(finished), "--device", "cpu"]
    for path in (finished, finished / "results", finished / "log.txt"):
        # Root may write everywhere, so a mode bit would show nothing.
        monkeypatch.setattr("os.access", lambda name, mode, path=path: name != path and allowed(name, mode))
        message = refusal(capsys, words)
        assert f"no permission to write {'in ' * path.is_dir()}{path}; --output FOLDER writes the outputs" in message
        assert main([*words, "--output", str(tmp_path / "look")]) == 0
    assert "--output" not in refusal(capsys, ["--text", "a cat", "--workspace", str(finished), *SMALL])


def test_output_folder_occupied(finished, tmp_path, capsys):
    """Neither another run nor files of another program are overwritten."""
    other = shutil.copytree(finished, tmp_path / "other")
    words = ["--test", "--six_views", "--workspace", str(finished), "--device", "cpu", "--output"]
    assert "is the workspace of a run; choose another folder" in refusal(capsys, [*words, str(other)])
    (tmp_path / "mine" / "results").mkdir(parents=True)
    (tmp_path / "mine" / "results" / "front.png").write_text("mine")
    assert "holds results but no config.json" in refusal(capsys, [*words, str(tmp_path / "mine")])
    (tmp_path / "mine" / "config.json").write_text('{"model_type": "bert"}')
    assert "config.json cannot be used" in refusal(capsys, [*words, str(tmp_path / "mine")])
    assert (tmp_path / "mine" / "results" / "front.png").read_text() == "mine"
    message = refusal(capsys, ["--text", "a cat", "--output", str(tmp_path / "new"), "--device", "cpu"])
    assert message == "--output works only with --test: a run writes everything to its --workspace"


# ---------------------------------------------------------------------------------------------------------- which GPU


@pytest.fixture
def two_gpus(monkeypatch) -> Iterator[list[torch.device]]:
    """A torch that finds two GPUs; the result lists the current devices that were set."""
    current: list[torch.device] = []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"NVIDIA {getattr(device, 'index', device)}")
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield current
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize(("device", "number"), [("cuda:1", 1), ("cuda:0", 0), ("cuda", 0), ("auto", 0)])
def test_gpu_number_becomes_current(device, number, two_gpus):
    """The run uses the GPU with the typed number, also for code that names no device."""
    runtime = choose_runtime(reference().override({"device": device}))
    assert runtime.device == torch.device("cuda", number) and f"NVIDIA {number}" in runtime.description
    prepare(runtime, 0)
    assert two_gpus == [torch.device("cuda", number)]


def test_missing_gpu_refused(two_gpus, monkeypatch):
    """A number that is too large is refused with the list of GPUs and the variable that hides others."""
    with pytest.raises(UserError) as refused:
        choose_runtime(reference().override({"device": "cuda:2"}))
    there = "only cuda:0 (NVIDIA 0), cuda:1 (NVIDIA 1)"
    assert str(refused.value) == f"--device cuda:2: there is no GPU of that number, {there}"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    with pytest.raises(UserError, match="; CUDA_VISIBLE_DEVICES=4,5 hides all others"):
        choose_runtime(reference().override({"device": "cuda:2"}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda:1: torch finds no GPU on this machine"):
        choose_runtime(reference().override({"device": "cuda:1"}))


@pytest.mark.parametrize("device", ["cuda:", "cuda:-1", "cuda:x", "cuda:01", "cuda1", "cuda:1,2", "CUDA:1", "cpu:0"])
def test_bad_device_refused(device):
    """Only cuda with a whole number names one of several GPUs."""
    with pytest.raises(UserError, match="--device is one of auto, cpu, cuda, cuda:N, not "):
        reference().override({"device": device})


def test_gpu_number_not_in_run():
    """Defaults are the same on each GPU, a run continues on another one, and its command has no number."""
    first, other = (configure({"text": "a cat", "seed": 1}, device) for device in ("cuda", "cuda:1"))
    assert other.run.device == "cuda:1" and other.override({"device": "cuda"}) == first
    assert first.differences(other) == [] == other.differences(first)
    assert first.differences(first.override({"device": "cpu"})) == ["--device cuda, not cpu"]
    assert reproduce_command(other) == reproduce_command(first)


def test_kernels_start_on_their_gpu(monkeypatch):
    """A launch makes the device of its tensors the current one."""
    entered = []

    class Device(contextlib.nullcontext):
        def __enter__(self):
            entered.append(self.enter_result)

    started = []
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr("dream_fast.kernels._core.launch.start_compiled", lambda *launched: started.append(launched[2]))
    launch(None, (1,), torch.device("cuda", 1))
    assert entered == [torch.device("cuda", 1)] and started == [1]
    launch(None, (1,), torch.device("cuda", 0))
    assert len(entered) == 1 and started == [1, 0]


def test_code_names_no_current_gpu():
    """Nothing in the engine and the kernels puts a tensor on the current GPU."""
    root = Path(dream_fast.__file__).parent
    for path in [*(root / "engine").rglob("*.py"), *(root / "kernels").rglob("*.py")]:
        named = re.findall(r"""device=["']cuda|torch\.device\(["']cuda["']\)|\.cuda\(\)""", path.read_text("utf-8"))
        assert not named, path


# ---------------------------------------------------------------------------------------------- a disk without locks


@pytest.fixture(params=[errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS], ids=errno.errorcode.get)
def no_locks(request, monkeypatch) -> None:
    """A disk on which files cannot be locked, and leases expire after half a second."""

    def refuse(handle: int, how: int) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(lock, "LEASE_SECONDS", 0.5)


HOLD = """
import fcntl, os, pathlib, sys
from dream_fast.engine.workspace import lock
def refuse(handle, how): raise OSError(37, "No locks available")
fcntl.flock, lock.LEASE_SECONDS = refuse, 0.5
own = lock.Lock(pathlib.Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_lock_without_disk_locks(tmp_path, no_locks):
    """A second process is refused with the holder of the workspace, until the first ends, also by a signal."""
    held = lock.Lock(tmp_path)
    assert held.is_valid() and [path.name for path in tmp_path.iterdir()] == [lock.LEASE]
    with pytest.raises(UserError, match=f"is in use by process {os.getpid()} on "):
        lock.Lock(tmp_path)
    held.release()
    assert not any(tmp_path.iterdir())
    with subprocess.Popen(
        [sys.executable, "-P", "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=f"is in use by process {holder.pid} on "):
            lock.Lock(tmp_path)
        holder.kill()
    lock.Lock(tmp_path).release()


def test_lease_taken_over(tmp_path, no_locks, monkeypatch, caplog):
    """A lease that is not renewed is taken over; one that is renewed keeps the workspace."""
    held = lock.Lock(tmp_path)
    monkeypatch.setattr(lock.socket, "gethostname", lambda: "elsewhere")
    with pytest.raises(UserError, match="is in use by process"):
        lock.Lock(tmp_path)
    assert "waiting up to 1 s in case it has ended" in caplog.text
    held.release()
    record = f"filelock/2\npid=1\nhost=node7\nmode=lease\ntoken={'a' * 32}\nduration=0.5\n"
    (tmp_path / lock.LEASE).write_text(record)
    held = lock.Lock(tmp_path)
    assert "process 1 on node7 holds the workspace" in caplog.text
    held.release()


def test_run_without_flock(finished, tmp_path, no_locks, monkeypatch, capsys):
    """A whole run works on such a disk, with a lease and without, with one warning."""
    words = ["--test", "--six_views", "--workspace", str(shutil.copytree(finished, tmp_path / "trial"))]
    assert main([*words, "--device", "cpu"]) == 0
    assert "locks" not in capsys.readouterr().out
    assert not [path for path in (tmp_path / "trial").iterdir() if path.name.startswith(".lock")]

    def refuse(self, *_, **__):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(lock.SoftFileLease, "acquire", refuse)
    (tmp_path / "link").symlink_to(tmp_path / "trial")
    words[-1] = str(tmp_path / "link")
    assert main([*words, "--device", "cpu"]) == 0
    output = capsys.readouterr().out
    assert output.count("has no locks") == 1 and "make sure that no other run uses this workspace" in output
    assert not [path for path in (tmp_path / "trial").iterdir() if path.name.startswith(".lock")]


# --------------------------------------------------------------------------------------------------- absurd numbers

ABSURD = [
    *((name, str(2**63 - 1)) for name in ("max_steps", "max_resolution", "base_resolution")),
    *((name, "1e308") for name in ("min_near", "density_thresh", "normal_epsilon", "default_radius", "blob_radius")),
    *((name, "1e308") for name in ("guidance_scale", "jitter_center", "jitter_target", "jitter_up")),
    *((name, "5e-324") for name in ("bound", "blob_radius", "normal_epsilon")),
    ("max_steps", "1000000000"),
    ("radius_range", "1e308", "1e308"),
    ("clip_grad_latent", "0:1:1e308:5"),
]


@pytest.mark.parametrize(("name", "values"), [(name, values) for name, *values in ABSURD])
def test_number_out_of_range(name, values, capsys):
    """It is refused with the flag and the bound before anything starts.

    Where an earlier run in this process flushes subnormals to zero, 5e-324 is no more than 0.
    """
    message = refusal(capsys, ["--text", "a cat", "--device", "cpu", "--print-config", f"--{name}", *values])
    assert re.match(rf"--{name} (must be (at most|at least|more than) [\d.e+-]+, not |is too large a number)", message)


@pytest.mark.parametrize(
    "words",
    [
        "--jitter_pose --jitter_center 1e9 --jitter_target 1e9 --jitter_up 1e9",
        "--radius_range 1e9 1e9 --default_radius 1e9 --min_near 1e9",
        "--radius_range 1e-9 1e-9 --default_radius 1e-9",
        "--base_resolution 1000000000 --max_resolution 1000000000",
        "--blob_radius 1e9 --blob_density 1e9 --density_thresh 1e9",
        "--blob_radius 1e-9 --bound 1e-9",
        "--normal_epsilon 1e9 --latent_iter_ratio 0 --guidance_scale 1e9 --max_steps 16384",
        "--normal_epsilon 1e-9 --latent_iter_ratio 0 --clip_grad_latent 1e9 --lambda_orient 1e9",
    ],
)
def test_largest_and_smallest_numbers_run(words, tiny_model, tmp_path, capsys):
    """A run with numbers at their bounds ends without a traceback."""
    words = [*SMALL, "--six_views", *words.split()]
    assert main(["--text", "a cat", "--hf_key", str(tiny_model), "--workspace", str(tmp_path / "w"), *words]) == 0
