"""A whole step on a GPU: no wait for the device, gradients of the kernels against the references, repeatable bits."""

import gzip
import json
import random

import numpy as np
import pytest
import torch
from PIL import Image

from dream_fast import kernels
from dream_fast.bench.accuracy import FACTOR, FLOOR, check, error
from dream_fast.bench.pipeline.random_sd import in_dtype
from dream_fast.cli import main
from dream_fast.engine.config.configure import configure
from dream_fast.engine.config.presets import reference
from dream_fast.engine.config.schedule import LinearSchedule
from dream_fast.engine.config.schema import Config
from dream_fast.engine.config.sections import GuidanceConfig
from dream_fast.engine.dream_mini import MODEL_FOLDER
from dream_fast.engine.guidance.base import StepInputs
from dream_fast.engine.guidance.diffusion import diffusion_guidance
from dream_fast.engine.guidance.model.components import load_components
from dream_fast.engine.guidance.prompts import PromptEmbeddings
from dream_fast.engine.guidance.sds import ScoreDistillation
from dream_fast.engine.runtime.cuda_graph import static_copy
from dream_fast.engine.runtime.device import choose_runtime, prepare
from dream_fast.engine.scene.camera import rays, sample_cameras
from dream_fast.engine.training.trainer import Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernels of a whole step run on a GPU only"),
]


def make_trainer(**changes) -> Trainer:
    """dream-mini's run of a hamburger with the defaults of a GPU."""
    typed = {"text": "a hamburger", "seed": 0, "fp16": True, **changes}
    config: Config = configure(typed, "cuda")
    runtime = choose_runtime(config)
    options = dict(attention="sdpa", vram_O=config.run.vram_O)
    components = load_components(MODEL_FOLDER, runtime.device, runtime.dtype, **options)
    guidance = diffusion_guidance(components, PromptEmbeddings(components, config.run.text), config)
    return Trainer(config, runtime, 0, guidance)


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    built = make_trainer()
    for _ in range(40):  # every kernel compiled, every graph captured
        built.train_step()
    return built


# Shaded steps take the field with normals; the others are the defaults.
SHADED = {"albedo_iter_ratio": 0.0}
AS_SD = SHADED | {"bg_radius": 1.4, "lambda_orient": 1e-2, "textureless_ratio": 0.0}
# Regularisers of the hash table, whose weights change in each step.
TABLE = {"lambda_tv": LinearSchedule.parse("0.0:1e-5:1e-4:1.0"), "lambda_wd": LinearSchedule.parse("0.0:0.0:1e-2:1.0")}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        SHADED,
        {"jitter_pose": True, "angle_front": 60.0},
        SHADED | {"normals": "analytic"},
        AS_SD,
        AS_SD | {"vram_O": True},
        {"cuda_graph": False},
        AS_SD | {"cuda_graph": False},
        TABLE,
        {"progressive_level": True, "iters": 50},
        {"perpneg": True},
        {"perpneg": True, "cuda_graph": False},
        {"objective": "csd", "clip_grad_latent": 1.0},
        {"objective": "asd"},
        {"objective": "asd", "cuda_graph": False},
        {"objective": "sdi", "inversion_steps": 2},
    ],
    ids=lambda changes: "-".join(changes) or "default",
)
def test_steps_never_synchronize(changes):
    """Twenty steps never wait for the device."""
    trainer = make_trainer(**changes)
    for _ in range(20):
        trainer.train_step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            trainer.train_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert int(trainer.skipped) < 20 and trainer.step == 40


def test_trace_without_synchronization(trainer):
    """A trace of twenty steps shows no wait and no copy to the host."""
    from torch.profiler import ProfilerActivity, profile, record_function

    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities) as trace, record_function("twenty steps"):
        for _ in range(20):
            trainer.train_step()
    events = trace.events()
    (span,) = (event.time_range for event in events if event.name == "twenty steps" and event.device_type.name == "CPU")
    inside = [event.name for event in events if span.start <= event.time_range.start <= span.end]
    assert any("_kernel" in name for name in inside)  # the trace did see the device's work
    waits = [name for name in inside if "Synchronize" in name or "DtoH" in name]
    assert waits == []


def test_step_gradients_against_reference(trainer):
    """With the same inputs, kernels in fp16 are compared with references in fp16 and fp64."""
    field, renderer, config = trainer.field, trainer.renderer, trainer.config
    spec, params = field.spec, [field.table, *field.weights, *field.biases]
    layers = len(field.weights)

    def gradients(operators, samples, upstream, dtype, compute):
        leaves = [parameter.detach().to(dtype).requires_grad_() for parameter in params]
        table, weights, biases = leaves[0], leaves[1 : 1 + layers], leaves[1 + layers :]
        evaluate, composite = operators
        x, t, dt = (part.to(dtype) for part in (samples.positions, samples.t, samples.dt))
        sigma, albedo = evaluate(x, table, weights, biases, spec, count=samples.count, dtype=compute)
        out = composite(sigma, albedo, t, dt, samples.offsets, count=samples.count)
        pixels = torch.cat([out.values, out.opacity[:, None]], 1)
        return torch.autograd.grad(pixels, leaves, upstream.to(dtype))

    triton = (kernels.field, kernels.composite)
    reference = (kernels.field_reference, kernels.composite_reference)
    largest = {"table": [], "network": []}
    for step in range(200):
        trainer.train_step()
        generator = torch.Generator("cuda").manual_seed(step)
        cameras = sample_cameras(config.camera, 1, generator, trainer.device)
        origins, directions = (
            part.reshape(-1, 3).contiguous() for part in rays(cameras, config.camera.h, config.camera.w)
        )
        with torch.no_grad():
            samples = renderer.sampler.sample(origins, directions, generator)
        upstream = torch.randn(len(origins), 4, generator=generator, device="cuda")
        got, same, exact = (
            gradients(operators, samples, upstream, dtype, compute)
            for operators, dtype, compute in (
                (triton, torch.float32, torch.float16),
                (reference, torch.float32, torch.float16),
                (reference, torch.float64, torch.float64),
            )
        )
        parts = {"table": slice(0, 1), "network": slice(1, None)}
        for name, part in parts.items():
            found, allowed = (length_apart(some[part], exact[part]) for some in (got, same))
            assert found <= 2 * allowed, f"step {step}, {name}: {found:.3g} apart, the reference {allowed:.3g}"
            largest[name].append([max(map(error, some[part], exact[part])) for some in (got, same)])
    # The largest error of a step hangs on one sample, whose density rounds to the other side once in hundreds of steps.
    for name, errors in largest.items():
        found, allowed = (max(column) for column in zip(*errors, strict=True))
        assert found <= 2 * allowed, f"{name}: error {found:.3g}, the reference's {allowed:.3g}"


def length_apart(got, exact):
    """|got - exact| / |exact| of tensors as one vector."""
    got, exact = (torch.cat([tensor.double().flatten() for tensor in some]) for some in (got, exact))
    return float((got - exact).norm() / exact.norm())


def test_guidance_graph_equals_call(trainer):
    """Guidance from a graph equals the call."""
    components = trainer.guidance.components
    drawn = torch.randn(2, 1, *trainer.guidance.prompts.negative.shape[1:], device="cuda")
    results = []
    for graphs in (False, True):
        score = ScoreDistillation(components, GuidanceConfig(guidance_scale=8.0), cuda_graphs=graphs)
        image = torch.rand(1, 3, 96, 96, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
        for draw in range(3):  # the second and third call replay, with other noise
            image.requires_grad_().grad = None
            score(image, *drawn, StepInputs(generator=torch.Generator("cuda").manual_seed(draw))).loss.backward()
            results.append(image.grad.clone())
    precise = in_dtype(components, torch.float64)
    score = ScoreDistillation(precise, GuidanceConfig(guidance_scale=8.0), cuda_graphs=False)
    for draw, (plain, graphed) in enumerate(zip(results[:3], results[3:], strict=True)):
        image.requires_grad_().grad = None
        prompts = (part.double() for part in drawn)
        score(image, *prompts, StepInputs(generator=torch.Generator("cuda").manual_seed(draw))).loss.backward()
        check(f"draw {draw}", graphed, plain, image.grad.double())
    assert not torch.equal(results[3], results[4])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"jitter_pose": True, "angle_front": 60.0},
        AS_SD,
        {"perpneg": True},
        {"objective": "asd"},
        TABLE,
        {"progressive_level": True, "iters": 100},
    ],
    ids=["albedo", "jitter", "shaded", "perpneg", "asd", "table", "levels"],
)
def test_replay_equals_call(changes):
    """With the same draws, gradients of a graph equal those of calls."""
    trainer = make_trainer(**changes)
    for _ in range(20):
        trainer.train_step()
    progress = trainer.schedule.progress(trainer.step)
    inputs = trainer.step_inputs(random.Random(0), progress, progress)
    inputs = inputs._replace(background_network=trainer.field.has_background)
    results = []
    for seed in (1, 2):
        trainer.generator.manual_seed(seed)
        replayed = trainer.replay_gradients(inputs)
        got, loss = trainer.optimizer.grads.clone(), replayed.terms["guidance"].clone()
        calls = []
        for _ in range(5):
            trainer.generator.manual_seed(seed)
            prepared = trainer.guidance.prepare_step(inputs, 1)
            called = trainer.gradients(prepared._replace(scalars=static_copy(prepared.scalars, trainer.device)))
            calls.append((called.terms["guidance"].clone(), trainer.optimizer.grads.clone()))
        # Sums of atomics differ from call to call, and now and then a sample's density rounds to the other side: the
        # gradients are compared as one vector, with the largest difference of several calls.
        for name, replay, first, *others in zip(("loss", "gradients"), (loss, got), *calls, strict=True):
            found, allowed = length_apart([replay], [first]), max(length_apart([again], [first]) for again in others)
            assert found <= FACTOR * allowed + FLOOR, f"{name}: {found:.3g} apart, two calls {allowed:.3g}"
        results.append(loss)
    assert not torch.equal(*results)  # the draws are those of the seed, not those of the capture


def test_grown_buffers_captured_again():
    """After buffers grow graphs are captured again."""
    trainer = make_trainer()
    for _ in range(3):
        trainer.train_step()
    trainer.renderer.sampler.samples_per_ray = 1
    before, counted = trainer.optimizer.params.clone(), int(trainer.overflowed)
    assert bool(trainer.train_step().overflow)
    assert torch.equal(trainer.optimizer.params, before) and int(trainer.overflowed) == counted + 1
    trainer.renderer.sampler.adapt_capacity(trainer.config.camera.h * trainer.config.camera.w)
    trainer.train_step()
    trainer.renderer.sampler.adapt_capacity(trainer.config.camera.h * trainer.config.camera.w)
    assert not bool(trainer.train_step().overflow)


def test_overflow_skips_step(trainer):
    """A step with an overflow is skipped."""
    before, counted = trainer.optimizer.params.clone(), int(trainer.overflowed)
    scale, capacity = trainer.scaler.scale.clone(), trainer.renderer.sampler.samples_per_ray
    trainer.renderer.sampler.samples_per_ray = 1
    trainer.train_step()
    assert torch.equal(trainer.optimizer.params, before) and int(trainer.overflowed) == counted + 1
    assert torch.equal(trainer.scaler.scale, scale)
    trainer.renderer.sampler.adapt_capacity(trainer.config.camera.h * trainer.config.camera.w)
    assert trainer.renderer.sampler.samples_per_ray > 1
    trainer.renderer.sampler.samples_per_ray = capacity
    trainer.train_step()
    assert not torch.equal(trainer.optimizer.params, before)


def test_deterministic_runs_repeat():
    """Deterministic runs repeat bit for bit."""
    states = []
    try:
        for _ in range(2):
            prepare(choose_runtime(reference()), 0, deterministic=True)
            trainer = make_trainer(deterministic=True, albedo_iter_ratio=0.2, iters=30)
            for _ in range(30):
                trainer.train_step()
            states.append(trainer.optimizer.params.clone())
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(*states)


@pytest.mark.parametrize("graph", ["--cuda_graph", "--no-cuda_graph"])
def test_run_with_callbacks(graph, tmp_path, capsys):
    """Images are saved while steps are graphs, and a trace has the kernels inside it."""
    words = "--device cuda --iters 60 --seed 1 --save_guidance --profile --six_views -O".split()
    assert main(["--text", "a hamburger", "--workspace", str(tmp_path), *words, graph]) == 0
    output = capsys.readouterr().out
    assert "ms a step on the CUDA" in output and "warning" not in output
    with gzip.open(tmp_path / "profile" / "trace.json.gz", "rt") as file:
        kernels = [event["name"] for event in json.load(file)["traceEvents"] if event.get("cat") == "kernel"]
    assert any("_kernel" in name for name in kernels)
    paths = sorted((tmp_path / "guidance").iterdir())
    assert [path.name for path in paths] == [f"step_{step:06d}.png" for step in range(10, 70, 10)]
    for path in paths:
        tiles = np.asarray(Image.open(path)).astype(float).reshape(128, 3, 128, 3)
        render, noisy, clean = tiles.transpose(1, 0, 2, 3)
        assert min(render.std(), noisy.std(), clean.std()) > 1
    # At the last step t is low: what is shown three times is nearly the same image.
    assert np.abs(clean - render).mean() < 20 and np.abs(noisy - render).mean() < 40


def test_mesh_refinement_steps():
    """Only the size of its surface is read on the host."""
    trainer = make_trainer(dmtet=True, tet_grid_size=32)
    before = [part.detach().clone() for part in (trainer.shape.sdf, trainer.shape.deformation, trainer.field.table)]
    for _ in range(3):
        step = trainer.train_step()
    assert int(trainer.skipped) == 0 and torch.isfinite(step.grad_norm).all()
    after = (trainer.shape.sdf, trainer.shape.deformation, trainer.field.table)
    assert all(not torch.equal(a, b) for a, b in zip(after, before, strict=True))
