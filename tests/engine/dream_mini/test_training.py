"""How the embedded model is trained: resumable to the bit, views alone and in groups, and what it writes."""

import json
import math

import pytest
import torch
from torch import nn

from dream_fast.bench.quality.model_samples import sample_groups
from dream_fast.engine.dream_mini import dataset, model, train
from dream_fast.engine.dream_mini import fit as fit_module
from dream_fast.engine.dream_mini.catalogue import vocabulary
from dream_fast.engine.dream_mini.fit import Fit
from dream_fast.engine.dream_mini.multiview import CameraEmbedding, camera_vectors, make_multiview, predict
from dream_fast.engine.dream_mini.training import FitDiffusion, Latents
from dream_fast.engine.dream_mini.vocabulary import Vocabulary, read_vocabulary
from dream_fast.engine.guidance.model.components import load_components
from dream_fast.engine.guidance.prompts import encode
from dream_fast.engine.scene.camera import make_cameras

# --- loop


class Line(Fit):
    """A line through random points."""

    name = "line"

    def __init__(self, **options):
        torch.manual_seed(0)
        super().__init__(
            nn.ModuleList([nn.Linear(3, 1)]), **{"rate": 0.01, "seed": 1, "steps": 9, "budget": 0} | options
        )

    def loss(self):
        x = torch.randn(8, 3, generator=self.generator)
        return (self.models[0](x) - x.sum(1, keepdim=True)).square().mean()


class Clock:
    """A clock that goes on by a second whenever it is asked."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(fit_module.time, "perf_counter", self.tick)

    def tick(self):
        self.now += 1.0
        return self.now


def state_of(fit: Fit) -> list[torch.Tensor]:
    return [*fit.models.state_dict().values(), *fit.average]


def test_fit_resumes(tmp_path):
    """Weights, averages, draws and learning rates of nine steps are the same whether made in one go or in pieces."""
    whole = Line()
    assert whole.run(float("inf"), tmp_path / "whole.pt", 1e9, lambda: None, tmp_path / "log")
    steps = 0
    while True:
        piece = Line()
        if (tmp_path / "piece.pt").exists():
            piece.load(tmp_path / "piece.pt")
        for _ in range(2 if steps < 8 else 1):
            piece._step()
        piece.save(tmp_path / "piece.pt")
        steps = piece.step
        if piece.finished:
            break
    assert steps == whole.step == 9
    assert all(torch.equal(a, b) for a, b in zip(state_of(whole), state_of(piece), strict=True))
    assert not (tmp_path / "piece.new").exists()
    assert not torch.equal(state_of(whole)[0], state_of(Line())[0])


def test_fit_stops_in_time(tmp_path, monkeypatch):
    """A training stops at its time, and saves its state and calls back at intervals."""
    clock = Clock(monkeypatch)
    calls = []
    fit = Line(steps=1000)
    assert not fit.run(clock.now + 60, tmp_path / "s.pt", 20, lambda: calls.append(fit.step), tmp_path / "log")
    assert 10 < fit.step < 60 and len(calls) >= 3 and calls[-1] == fit.step
    again = Line(steps=1000)
    again.load(tmp_path / "s.pt")
    assert again.step == fit.step and again.seconds == fit.seconds > 0
    rows = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert rows[0]["stage"] == "line" and rows[0]["step"] == 1 and rows[0]["loss"] > 0


def test_fit_without_steps(tmp_path):
    """A training of no steps is finished at once, with the weights that it began with."""
    fit, same = Line(steps=0), Line(steps=0)
    assert fit.run(float("inf"), tmp_path / "s.pt", 1e9, lambda: None, tmp_path / "log") and fit.step == 0
    assert all(torch.equal(a, b) for a, b in zip(state_of(fit), state_of(same), strict=True))


def test_fit_budget(tmp_path, monkeypatch):
    """With a clock of a fixed rate, two pieces take the budget together, and the rate follows what is spent."""
    clock = Clock(monkeypatch)
    first = Line(steps=None, budget=1000.0)
    assert not first.run(clock.now + 600, tmp_path / "s.pt", 1e9, lambda: None, tmp_path / "log")
    assert first.learning_rate() == pytest.approx(0.01 * (1 + math.cos(math.pi * first.seconds / 1000)) / 2)
    again = Line(steps=None, budget=1000.0)
    again.load(tmp_path / "s.pt")
    assert again.run(float("inf"), tmp_path / "s.pt", 1e9, lambda: None, tmp_path / "log")
    assert 1000 <= again.seconds < 1010 and again.learning_rate() == 0 < first.step < again.step
    assert clock.now < 1100


# --- four at once


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return model.make_unet().eval()


def rows(count: int, seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    latents, states = torch.randn(count, 4, 16, 16, generator=draw), torch.randn(count, 7, model.WIDTH, generator=draw)
    return latents, torch.full((count,), 300), states


@torch.no_grad()
def test_multiview_predict():
    """Single rows are what diffusers computes; a row of a group depends on its own group's rows and on no others."""
    torch.manual_seed(0)
    plain, grouped = model.make_unet().eval(), model.make_unet().eval()
    grouped.load_state_dict(plain.state_dict())
    make_multiview(grouped)
    latents, t, states = rows(10)
    exact = plain.double()(latents.double(), t, states.double()).sample
    single = plain.float()(latents, t, states).sample
    alone = predict(grouped, latents, t, states, None, 10)
    assert (alone - exact).abs().max() <= 2 * (single - exact).abs().max() + 1e-6
    both = predict(grouped, latents, t, states, None, 2)
    assert (both[:2] - exact[:2]).abs().max() <= 2 * (single - exact).abs().max() + 1e-6
    assert (both[2:] - exact[2:]).abs().amax((1, 2, 3)).min() > 1e-4  # the others are not what they are alone
    other = latents.clone()
    other[9] += 1
    moved = (predict(grouped, other, t, states, None, 2) - both).abs().amax((1, 2, 3))
    assert moved[:6].max() < 1e-5 < 1e-4 < moved[6:].min()


@torch.no_grad()
def test_camera_embedding(unet, tmp_path):
    """A new camera embedding changes nothing; a trained one does, and is read back from its file."""
    camera = model.make_camera()
    vectors = camera_vectors(make_cameras(*(torch.tensor([v, v]) for v in (75.0, 30.0, 3.2, 22.0))).c2w)
    latents, t, states = rows(2)
    make_multiview(unet)
    before = predict(unet, latents, t, states, None, 2)
    assert torch.equal(predict(unet, latents, t, states, camera(vectors), 2), before)  # zero at first
    nn.init.normal_(camera[2].weight, std=0.3)
    after = predict(unet, latents, t, states, camera(vectors), 2)
    assert (after - before).abs().max() > 1e-3
    camera.save(tmp_path)
    read = CameraEmbedding.load(tmp_path)
    assert (read(vectors) - camera(vectors)).abs().max() < 1e-2 and read(vectors).abs().max() > 0.1


def test_camera_vectors():
    """The camera in front stands at -y of MVDream's world, one above at +z; its rows are a rotation."""
    cameras = make_cameras(*(torch.tensor(v) for v in ([90.0, 0.0, 90.0], [0.0, 0.0, 90.0], [3.2] * 3, [22.0] * 3)))
    vectors = camera_vectors(cameras.c2w).view(3, 4, 4)
    assert torch.allclose(vectors[:, :3, 3], torch.tensor([[0.0, -1, 0], [0, 0, 1], [1, 0, 0]]), atol=1e-6)
    assert torch.allclose(vectors[:, 3], torch.tensor([0.0, 0, 0, 1]).expand(3, 4))
    turn = vectors[:, :3, :3]
    assert torch.allclose(turn @ turn.transpose(1, 2), torch.eye(3).expand(3, 3, 3), atol=1e-6)
    assert torch.allclose(torch.linalg.det(turn), torch.ones(3), atol=1e-6)
    assert torch.allclose(turn[0, :, 1], torch.tensor([0.0, 0, 1]), atol=1e-6)  # its up is up


# --- batches


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return model.save_tokenizer(tmp_path_factory.mktemp("tokenizer"), Vocabulary(vocabulary()).words)


def test_to_ids(tokenizer):
    """The quick look-up gives the tokenizer's own ids."""
    ids = train.to_ids(tokenizer, Vocabulary(vocabulary()).words)
    for text in ("a 3d render of an untextured ufo with a flag, side view", "", "a t rex next to a hot air balloon"):
        assert ids(text) == tokenizer(text, padding="max_length", max_length=model.TOKENS).input_ids
    longest = "a spotted turquoise ice cream cone wearing a turquoise hat on top of a striped turquoise hot air balloon"
    assert ids(longest) == tokenizer(longest, padding="max_length", truncation=True, max_length=model.TOKENS).input_ids


def test_batch_of_views_and_groups(tokenizer):
    """Groups share timestep and caption number, all have cameras; held images are in no batch."""
    images, held = 64, 16
    numbers = torch.arange(images)
    moments = torch.zeros(images, 8, model.LATENT, model.LATENT)
    moments[:, :4] = numbers[:, None, None, None]
    tokens = (numbers[:, None, None] * 3 + torch.arange(3)[:, None]).expand(-1, -1, model.TOKENS).to(torch.int16)
    latents = Latents(moments, tokens, numbers[:, None].expand(-1, 16).float(), numbers.view(16, 4), held)
    empty = torch.full((model.TOKENS,), -1, dtype=torch.int16)
    parts = model.make_text_encoder(tokenizer), model.make_unet(), model.make_camera()
    fit = FitDiffusion(*parts, latents, empty, 32, rate=1e-3, seed=0, steps=5, budget=0)
    assert (fit.singles, fit.groups) == (20, 3)
    rows = torch.arange(held, images)
    for seed in range(5):
        noisy, t, ids, cameras, placed, target = fit._batch(torch.Generator().manual_seed(seed), rows, fit.free_groups)
        assert noisy.shape == target.shape == (32, 4, model.LATENT, model.LATENT)
        image = cameras[:, 0].long()
        assert image.min() >= held
        group = image[20:].view(3, 4)
        assert torch.equal(group, group[:, :1] // 4 * 4 + torch.arange(4))
        assert (
            torch.equal(t[20:].view(3, 4), t[20::4, None].expand(3, 4)) and placed[20:].all() and not placed[:20].all()
        )
        caption = ids[:, 0]
        told = caption >= 0
        assert torch.equal(caption[told] // 3, image[told])
        together = (caption[20:].view(3, 4) % 3).masked_fill(caption[20:].view(3, 4) < 0, -1)
        assert torch.equal(together, together[:, :1].expand(3, 4))
        alpha = fit.alphas[t][:, None, None, None]
        clean = alpha.sqrt() * noisy - (1 - alpha).sqrt() * target  # what v-prediction inverts to
        assert (clean - image[:, None, None, None]).abs().max() < 1e-3
    assert fit.measured[3][:, 0].max() < held


# --- the command


class Here:
    """A pool of workers that works at once and in this process."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *arguments):
        result = function(*arguments)
        return type("Job", (), {"result": lambda self: result})()


def test_train_command(tmp_path, monkeypatch):
    """Tiny, from end to end: stopped in the second stage, gone on with, and started from by another training."""
    for module in (dataset, train):
        monkeypatch.setattr(module, "BATCH", 4)
    monkeypatch.setattr(train, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(train, "IMAGE", 32)
    threads = torch.get_num_threads()
    words = ["--cache", str(tmp_path / "cache"), "--scenes", "8", "--views", "0", "--held", "4", "--vae_steps", "1"]
    words += ["--vae_batch", "2", "--batch", "8", "--steps", "2"]
    monkeypatch.setattr(model, "LATENT", 8)
    out = ["--out", str(tmp_path / "out")]
    assert train.main([*out, *words, "--seconds", "0"]) is False  # not even the autoencoder
    assert train.main([*out, *words]) is True
    torch.set_num_threads(threads)
    components = load_components(tmp_path / "out", "cpu", need_vae_decoder=True)
    assert read_vocabulary(tmp_path / "out").find_object("a red ufo") == "ufo"
    assert encode(components, ["a red ufo"]).shape[-1] == model.WIDTH
    images = sample_groups(components, tmp_path / "out", ["a red ufo"], steps=2)
    assert images.shape[:2] == (1, 4)
    stages = [json.loads(line)["stage"] for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert stages == ["vae", "unet"]
    args = train._arguments(["--out", "x", "--start", str(tmp_path / "out")])
    encoder, unet, _ = train.starting_weights(args, components.tokenizer)
    assert torch.equal(unet.conv_in.weight, components.unet.conv_in.weight)
    own, other = (part.state_dict() for part in (encoder, components.text_encoder))
    assert all(torch.equal(own[name], other[name]) for name in own)
