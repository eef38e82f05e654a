"""Mesh refinement: initialisation, rendering, optimisation, and the command."""

import json
import math
from pathlib import Path

import pytest
import torch
import trimesh
from PIL import Image
from rich.console import Console

from dream_fast.bench.accuracy import check
from dream_fast.cli import main
from dream_fast.engine.config.configure import configure
from dream_fast.engine.config.presets import DMTET_OVERRIDES, reference
from dream_fast.engine.config.sections import CameraConfig
from dream_fast.engine.errors import UserError
from dream_fast.engine.export.images import depth_image
from dream_fast.engine.guidance.base import GuidanceResult
from dream_fast.engine.render.base import Shading
from dream_fast.engine.runtime.device import choose_runtime
from dream_fast.engine.runtime.reporter import Reporter
from dream_fast.engine.scene.camera import make_cameras, rays, six_views
from dream_fast.engine.scene.tet_mesh import TetMesh
from dream_fast.engine.training.dmtet_init import (
    find_init_source,
    normalized,
    read_surface,
    start_from_field,
    start_from_mesh,
)
from dream_fast.engine.training.loop import Loop
from dream_fast.engine.training.trainer import Trainer
from dream_fast.engine.workspace.checkpoint import save_checkpoint
from dream_fast.engine.workspace.folder import Workspace

ULP = torch.finfo(torch.float32).eps  # relative distance of neighbours in fp32

FIELD = dict(
    n_levels=3, log2_hashmap_size=10, max_resolution=32, hidden_width=16, hidden_layers=1, bound=0.6, max_steps=48
)
SMALL = FIELD | dict(
    text="a hamburger", device="cpu", iters=6, log_every=1, w=12, h=10, W=20, H=20, dataset_size_valid=2,
    occupancy_resolution=16, density_thresh=3.0,
)  # fmt: skip
MESH = SMALL | DMTET_OVERRIDES | dict(dmtet=True, dmtet_reso_scale=2.0, tet_grid_size=12)


def disc(radius):
    """A guidance towards a white disc on black, of `radius` half image heights."""

    def guidance(images, cameras, inputs):
        height, width = images.shape[2:]
        y, x = torch.meshgrid(
            (torch.arange(height) + 0.5) * 2 / height - 1, (torch.arange(width) + 0.5 - width / 2) * 2 / height,
            indexing="ij",
        )  # fmt: skip
        difference = images - (torch.hypot(x, y) < radius).float()
        loss = difference.square().sum() / len(images)
        return GuidanceResult(loss, torch.zeros(len(images), dtype=torch.int64), loss.detach(), difference)

    return guidance


def make_trainer(guidance=None, seed=0, **changes) -> Trainer:
    config = reference().override(MESH | changes)
    return Trainer(config, choose_runtime(config), seed, guidance or disc(0.5))


def volume(trainer: Trainer) -> float:
    mesh = trainer.renderer.mesh()
    shape = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
    assert shape.is_watertight
    return float(shape.volume)


# ---------------------------------------------------------------------------------------------------------- rendering


@pytest.mark.parametrize("size", [(24, 24), (18, 30)])
def test_ball_depth(size):
    """The depth of a ball is that of its intersection with rays."""
    trainer = make_trainer(tet_grid_size=32)
    trainer.shape.initialize(torch.tensor([0.1, -0.05, 0.15]), torch.full((3,), 0.4), trainer.shape.sdf.detach())
    middle, radius = torch.tensor([0.1, -0.05, 0.15]), 0.2
    # By the edges L of the grid: how far the zeros of straight lines lie inside, and the middles of triangles below.
    longest = 2 * 0.4 / 16
    missed = longest**2 / (8 * radius) + longest**2 / (6 * radius)
    distances = (trainer.renderer.surface().vertices - middle).norm(dim=1)
    assert radius - missed < distances.min() and distances.max() < radius + 4 * ULP
    cameras = six_views(CameraConfig(default_radius=2.0, default_fovy=30.0))
    view = trainer.renderer.view(cameras, *size, background=torch.zeros(3))
    origins, directions = rays(cameras, *size)
    along = ((middle - origins) * directions).sum(-1)
    miss = ((origins + along[..., None] * directions) - middle).norm(dim=-1).view(6, *size)
    assert (view.opacity[miss < 0.97 * radius] > 0.4).all() and (view.opacity[miss > 1.03 * radius] < 0.6).all()
    core = miss < 0.7 * radius
    at = along - (radius**2 - miss.view(6, -1) ** 2).clamp(min=0).sqrt()
    slanted = (1 - 0.7**2) ** -0.5  # of a ray 0.7 of the radius beside the middle
    assert (view.depth[core] - at.view(6, *size)[core]).abs().max() < missed * slanted
    normal = torch.nn.functional.normalize(origins + at[..., None] * directions - middle, dim=-1).view(6, *size, 3)
    assert (view.normal[core] * normal[core]).sum(-1).min() > math.cos(longest / radius)  # a triangle's turn
    assert not view.normal[miss > 1.2 * radius].any() and not view.rgb[miss > 1.2 * radius].any()
    image = depth_image(view, cameras.radius, 0.6)
    assert image[core].min() > image[miss > 1.2 * radius].max() == 0


def test_shadings_and_backgrounds():
    trainer = make_trainer()
    cameras = make_cameras(*(torch.tensor([v]) for v in (90.0, 0.0, 3.2, 20.0)))
    light = torch.tensor([0.0, 0.0, 1.0])
    background = torch.tensor([0.0, 1.0, 0.0])
    seen = {
        shading: trainer.renderer.train_views(cameras, 20, 20, Shading(shading, 0.25, light), background=background)
        for shading in ("albedo", "lambertian", "textureless", "normal")
    }
    middle, corner = (0, 10, 10), (0, 0, 0)
    assert seen["albedo"].opacity[middle] == 1 and seen["albedo"].opacity[corner] == 0
    strength = seen["textureless"].rgb[middle]
    assert strength.unique().numel() == 1 and 0.95 < strength[0] <= 1
    albedo, normal = seen["albedo"].rgb[middle], seen["normal"].normal[middle]
    check("lambertian", seen["lambertian"].rgb[middle], albedo * strength, albedo.double() * strength.double())
    check("normal", seen["normal"].rgb[middle], (normal + 1) / 2, (normal.double() + 1) / 2)
    for rendered in seen.values():
        assert torch.equal(rendered.rgb[corner], torch.tensor([0.0, 1.0, 0.0]))
    network = trainer.renderer.train_views(cameras, 20, 20)
    assert network.rgb[corner].unique().numel() > 1  # the background network
    assert 0 < int(network.sample_count) <= int((network.opacity > 0).sum())


def test_gradients_of_shape_and_field():
    """The shape has gradients from silhouettes, and the field from colours."""
    trainer = make_trainer(albedo_iter_ratio=1.0)
    cameras = make_cameras(*(torch.tensor([v]) for v in (90.0, 0.0, 3.2, 20.0)))
    rendered = trainer.renderer.train_views(cameras, 20, 20, background=torch.zeros(3))
    rendered.opacity.sum().backward()
    to_distance, to_shift = trainer.shape.sdf.grad, trainer.shape.deformation.grad
    # A larger distance is a larger ball.
    assert to_distance.sum() > 0 and to_shift.any() and not trainer.field.table.grad.any()
    before = to_distance.clone()
    inside = rendered.opacity == 1
    rendered = trainer.renderer.train_views(cameras, 20, 20, background=torch.zeros(3))
    rendered.rgb[inside].square().sum().backward()
    assert trainer.field.table.grad.any() and torch.equal(trainer.shape.sdf.grad, before)


@pytest.mark.parametrize(("radius", "grows"), [(0.2, False), (0.9, True)])
def test_ball_learns_size(radius, grows):
    """A ball reaches the size of the target."""
    changes = dict(iters=30, lr=0.02, lambda_mesh_normal=0.0, bg_radius=-1.0, optim="adam")
    trainer = make_trainer(disc(radius), **changes)
    trainer.start_shape()
    before = volume(trainer)
    with torch.no_grad():  # white, so that only the silhouette counts
        trainer.field.biases[-1][1:] = 8
    losses = [float(trainer.train_step().terms["guidance"]) for _ in range(30)]
    assert (volume(trainer) > 1.1 * before) if grows else (volume(trainer) < 0.9 * before)
    assert sum(losses[-5:]) < sum(losses[:5]) and int(trainer.skipped) == 0


def test_grid_border_stays_outside():
    """The border of the grid stays outside."""
    shape = TetMesh(8, 1.0)
    with torch.no_grad():
        shape.sdf.fill_(1.0)
    surface = shape.surface()
    mesh = trimesh.Trimesh(surface.vertices.detach(), surface.faces, process=False)
    assert mesh.is_watertight and mesh.volume > 2


def test_vanished_surface_raises():
    """An empty surface raises."""
    trainer = make_trainer()
    with torch.no_grad():
        trainer.shape.sdf.fill_(-1.0)
    with pytest.raises(UserError, match="the surface has vanished"):
        trainer.train_step()


# --------------------------------------------------------------------------------------------------------------- start


def nerf(**changes) -> Trainer:
    config = reference().override(SMALL | changes)
    return Trainer(config, choose_runtime(config), 0)


@pytest.mark.parametrize("threshold", [3.0, 1e6])
@pytest.mark.parametrize("backbone", [{}, {"backbone": "vanilla", "n_frequencies": 4, "max_steps": 1024}])
def test_start_from_a_field(threshold, backbone):
    """A refinement starts from the blob of a new field, whatever the threshold."""
    if backbone:
        backbone = backbone | {"occupancy_resolution": 128}
    trainer = nerf(blob_density=10.0, **backbone)
    field, shape = trainer.field, TetMesh(24, 0.6)
    start_from_field(shape, field, threshold)
    surface = shape.surface()
    mesh = trimesh.Trimesh(surface.vertices.detach(), surface.faces, process=False)
    assert mesh.is_watertight and mesh.volume > 1e-3
    density = field.density(surface.vertices.detach()).log()
    # One level, but for what straight lines of length L make of a blob whose second derivative is 10 / 0.2^2 at most.
    curved = float(2 * shape.half_extent.max() / 12) ** 2 / 8 * 10 / 0.2**2
    assert density.max() - density.min() < curved
    if threshold < 10:
        some = field.density(torch.rand(20000, 3, generator=torch.Generator().manual_seed(0)) * 1.2 - 0.6)
        uncertain = 5 * float(some.std() / some.mean()) / len(some) ** 0.5  # of the mean's logarithm
        assert abs(density.mean().item() - math.log(min(threshold, float(some.mean())))) < curved + uncertain
    reach = surface.vertices.abs().amax(0)
    assert (reach < shape.half_extent).all() and (shape.half_extent < reach + 0.12).all()
    inner = (shape.positions().norm(dim=1) < 0.5 * reach.min()).nonzero()[:, 0]
    assert (shape.sdf[inner] > 0).all() and shape.sdf.abs().max() == 1


def test_field_without_surface_raises():
    """A field without a surface is refused."""
    trainer = nerf(blob_density=0.0)
    with torch.no_grad():
        for parameter in trainer.field.parameters():
            parameter.zero_()
    with pytest.raises(UserError, match="the same everywhere"):
        start_from_field(TetMesh(8, 0.6), trainer.field, 3.0)


def test_start_from_a_mesh_file(tmp_path):
    scene = trimesh.util.concatenate(
        [trimesh.creation.box((4, 2, 3)), trimesh.creation.icosphere(3, 1.2).apply_translation((0, 1.4, 0))]
    ).apply_translation((50, 0, -7))
    for name in ("shape.glb", "shape.obj", "shape.stl", "shape.ply"):
        scene.export(tmp_path / name)
        mesh = normalized(read_surface(tmp_path / name), 0.6, CameraConfig())
        shape = TetMesh(32, 0.6)
        start_from_mesh(shape, mesh)
        surface = shape.surface()
        found = trimesh.Trimesh(surface.vertices.detach(), surface.faces, process=False)
        size = torch.tensor(found.extents)
        visible = 3.2 * math.tan(math.radians(10)) * 0.8
        longest, scale = float(2 * shape.half_extent.max() / 16), visible / 2
        # Sharp edges are cut by half an edge of the grid at most.
        assert (size - torch.tensor([4, 3.6, 3]).double() * scale).abs().max() < longest
        assert found.is_watertight and abs(found.bounds.mean(0)).max() < longest / 2
        expected = (24 + 4 / 3 * math.pi * 1.2**3 - math.pi * 0.8**2 * (3 * 1.2 - 0.8) / 3) * scale**3
        # Along sharp edges a triangle with legs of half an edge is cut off; a ball's surface lies below by L^2 / 8r and
        # L^2 / 6r, and its triangles of the file have a volume of their own.
        edges = (36 + 2 * math.pi * 0.8 * 1.5) * scale
        below = (1 / 8 + 1 / 6) * longest**2 / (1.2 * scale) * found.area
        facets = (4 / 3 * math.pi * 1.2**3 - trimesh.creation.icosphere(3, 1.2).volume) * scale**3
        assert abs(found.volume - expected) < edges * longest**2 / 8 + below + facets


def test_bad_init_source_raises(tmp_path):
    """An unsuitable --init_with is refused."""
    cases = {
        "missing.glb": (None, "there is no such file"),
        "old.pth": (b"x", "checkpoints of other programs cannot be read"),
        "note.txt": (b"x", "is neither a checkpoint .* nor a mesh file"),
        "broken.glb": (b"not a mesh", "cannot be read"),
        "points.ply": (
            b"ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nproperty float y\nproperty float z\n"
            b"end_header\n0 0 0\n",
            "has no triangles|cannot be read",
        ),
        "nan.obj": (b"v nan 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n", "not finite|cannot be read"),
        "point.obj": (b"v 0 0 0\nv 0 0 0\nv 0 0 0\nf 1 2 3\n", "has no triangle with an area"),
        "flat.obj": (b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n", "encloses no space"),
        "other.safetensors": (b"x", "damaged"),
    }
    for name, (content, sentence) in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=sentence):
            make_trainer(init_with=str(tmp_path / name)).start_shape()
    with pytest.raises(UserError, match="the folder holds no checkpoint"):
        find_init_source(str(tmp_path))


def test_init_from_run(tmp_path):
    """A refinement starts with the colours and the shape of a run."""
    before = nerf(blob_density=10.0)
    with torch.no_grad():
        before.field.biases[-1][1:] = torch.tensor([4.0, -4.0, -4.0])
    before.optimizer.state.ema.copy_(before.optimizer.params)
    average = before.optimizer.params.clone()
    with torch.no_grad():  # the last step is not what counts
        before.field.biases[-1][1:] = torch.tensor([-4.0, -4.0, 4.0])
    before.save(Workspace(tmp_path))
    trainer = make_trainer(init_with=str(tmp_path), blob_density=10.0)
    trainer.start_shape()
    assert torch.equal(trainer.optimizer.params[: trainer.optimizer.scene], average)
    points = trainer.renderer.surface().vertices.detach()
    assert before.field.density(points).log().std() < 0.1
    cameras = six_views(trainer.config.camera)
    before.renderer.update_occupancy(None)
    view, field = (t.renderer.view(cameras, 24, 24) for t in (trainer, before))
    assert (view.opacity[:, 12, 12] == 1).all() and (view.rgb[:, 12, 12, 0] > 0.9).all()
    both = (view.opacity > 0.5) & (field.opacity > 0.5)
    either = (view.opacity > 0.5) | (field.opacity > 0.5)
    assert both.sum() / either.sum() > 0.6
    for changes, sentence in (
        ({"n_levels": 4}, "n_levels 3 there, 4 here"),
        (
            {"backbone": "vanilla", "max_steps": 1024, "n_levels": 16, "log2_hashmap_size": 19, "max_resolution": 2048},
            "backbone",
        ),
    ):
        with pytest.raises(UserError, match=sentence):
            make_trainer(init_with=str(tmp_path), **({"blob_density": 10.0} | changes)).start_shape()
    trainer.save(Workspace(tmp_path / "mesh"))
    with pytest.raises(UserError, match="is already a mesh refinement"):
        make_trainer(init_with=str(tmp_path / "mesh")).start_shape()


# -------------------------------------------------------------------------------------------------- learning, resuming


def fit(trainer: Trainer, path: Path) -> Workspace:
    workspace = Workspace(path)
    workspace.write_config(trainer.config)
    workspace.truncate_after(trainer.step)
    Loop(trainer, workspace, Reporter(Console(quiet=True))).fit()
    return workspace


@pytest.mark.parametrize("locked", [False, True])
def test_resume_equals_uninterrupted(locked, tmp_path):
    """A resumed run equals the uninterrupted one."""
    whole = make_trainer(lock_geo=locked)
    whole.start_shape()
    fit(whole, tmp_path / "whole")
    part = make_trainer(lock_geo=locked)
    part.start_shape()
    for _ in range(3):
        part.train_step()
    path = part.save(Workspace(tmp_path / "part"))
    again = make_trainer(lock_geo=locked, seed=0)
    with torch.no_grad():
        again.shape.sdf.add_(0.3)  # whatever it holds before
    again.load(path)
    fit(again, tmp_path / "part")
    for a, b in (
        (whole.optimizer.state_dict(), again.optimizer.state_dict()),
        (whole.renderer.state_dict(), again.renderer.state_dict()),
    ):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert (whole.optimizer.lrs == (5e-2, 5e-3, 1e-3)) != locked
    rows = [json.loads(row) for row in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    shadings = {row["shading"] for row in rows}
    terms = {name for row in rows for name in row if name.startswith("loss_")}
    if locked:
        assert shadings == {"lambertian"} and terms == {"loss_guidance"}
        assert torch.equal(whole.shape.sdf, make_trainer().shape.sdf)
    else:
        assert terms == {"loss_guidance", "loss_mesh_normal", "loss_mesh_laplacian"}
        assert not torch.equal(whole.shape.sdf, make_trainer().shape.sdf)
    with pytest.raises(UserError, match="tet_grid_size 12 there, 14 here"):
        make_trainer(lock_geo=locked, tet_grid_size=14).load(path)
    save_checkpoint(tmp_path / "bad", 1, {"optimizer": {}}, whole.architecture())
    with pytest.raises(UserError, match="is damaged"):
        make_trainer(lock_geo=locked).load(tmp_path / "bad" / "step_000001.safetensors")


@pytest.mark.parametrize("locked", [False, True])
def test_load_replaces_surface(locked, tmp_path):
    """The surface is computed again after a checkpoint is loaded."""
    smaller, trainer = (make_trainer(lock_geo=locked) for _ in range(2))
    with torch.no_grad():
        smaller.shape.sdf.sub_(0.6)
    path = smaller.save(Workspace(tmp_path))
    before = volume(trainer)  # looks at its own, which a locked shape keeps
    trainer.load(path)
    assert volume(trainer) == volume(smaller) < 0.8 * before
    cameras = make_cameras(*(torch.tensor([v]) for v in (90.0, 0.0, 3.2, 20.0)))
    opacities = [each.renderer.view(cameras, 20, 20).opacity for each in (trainer, smaller)]
    assert torch.equal(*opacities)


def test_outputs_without_floaters():
    """Outputs have no floaters and show the average."""
    trainer = make_trainer(tet_grid_size=16)
    grid = trainer.shape.vertices
    ball = 0.5 - grid.norm(dim=1)
    floater = 0.06 - (grid - torch.tensor([0.72, 0.72, 0.72])).norm(dim=1)
    with torch.no_grad():
        trainer.shape.sdf.copy_(torch.maximum(ball, floater))
    whole = len(trainer.renderer.surface().faces)
    with trainer.renderer.without_floaters():
        inside = trainer.renderer.surface()
        assert 0 < len(inside.faces) < whole and inside.vertices.abs().max() < 0.4
        assert trainer.renderer.surface() is inside
    assert len(trainer.renderer.surface().faces) == whole
    with trainer.optimizer.ema_weights():
        assert len(trainer.renderer.surface().faces) not in (0, whole)


# --------------------------------------------------------------------------------------------------------- the command


def command(workspace: Path, model: Path, *more: str) -> list[str]:
    return [
        *("--text", "a hamburger", "--hf_key", str(model), "--workspace", str(workspace), "--device", "cpu"),
        *("--iters", "2", "--w", "8", "--h", "8", "--W", "20", "--H", "20", "--seed", "3", "--dataset_size_test", "2"),
        *("--dataset_size_valid", "2", *more),
    ]


FIELD_FLAGS = [word for name, value in FIELD.items() for word in (f"--{name}", str(value))]


def refused(capsys, arguments) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    return error


def test_command_to_mesh(tiny_model, tmp_path, capsys):
    """The command refines a run and writes its mesh."""
    first, second = tmp_path / "nerf", tmp_path / "mesh"
    assert main(command(first, tiny_model, "--six_views", "--occupancy_resolution", "16", *FIELD_FLAGS)) == 0
    refine = command(
        second, tiny_model, "--dmtet", "--init_with", str(first), "--tet_grid_size", "16", "--dmtet_reso_scale", "2",
        "--save_mesh", "--batch_size", "2", "--texture_resolution", "64",
    )  # fmt: skip
    assert main(refine) == 0
    stored = Workspace(second).stored_config()
    assert stored.field == Workspace(first).stored_config().field and stored.render.bound == 0.6
    assert stored.guidance.t_range == (0.02, 0.5) and stored.shading.latent_iter_ratio == 0
    assert stored.train_size == (16, 16)
    mesh = trimesh.load(second / "mesh" / "mesh.glb", force="mesh")
    mesh.merge_vertices(merge_tex=True, merge_norm=True)  # those that seams of the texture double
    assert mesh.is_watertight and mesh.volume > 0
    assert Image.open(second / "results" / "front.png").size == (20, 20)
    log = (second / "log.txt").read_text()
    assert "2 x 16x16 pixels" in log and f"starts from {first}" in log
    # Looked at again, taken up again: also when what it began from is gone.
    first.rename(tmp_path / "elsewhere")
    before = (second / "mesh" / "mesh.glb").read_bytes()
    (second / "mesh" / "mesh.glb").unlink()
    assert main(["--test", "--workspace", str(second), "--save_mesh", "--six_views", "--device", "cpu"]) == 0
    assert (second / "mesh" / "mesh.glb").read_bytes() == before
    assert main([*refine, "--iters", "3"]) == 0
    assert (second / "checkpoints" / "step_000003.safetensors").exists()
    assert "there is no such file" in refused(capsys, [*refine, "--ckpt", "scratch"])
    assert (second / "checkpoints" / "step_000003.safetensors").exists()


def test_bad_settings_raise(tiny_model, tmp_path, capsys):
    """Bad settings are refused."""
    base = command(tmp_path / "run", tiny_model)
    assert "it works only with --dmtet" in refused(capsys, [*base, "--init_with", "x.glb"])
    assert "it works only with --dmtet" in refused(capsys, [*base, "--lock_geo"])
    assert "--tet_grid_size must be even, not 33" in refused(capsys, [*base, "--dmtet", "--tet_grid_size", "33"])
    assert "no such file" in refused(capsys, [*base, "--dmtet", "--init_with", str(tmp_path / "none.glb")])
    assert not (tmp_path / "run").exists()


def test_defaults_of_a_refinement():
    plain = configure({"guidance": ("SD",)}, "cpu")
    mesh = configure({"guidance": ("SD",), "dmtet": True}, "cpu")
    assert mesh.train_size == (512, 512) and plain.train_size == (64, 64)
    assert (mesh.guidance.t_range, mesh.shading.latent_iter_ratio) == ((0.02, 0.5), 0.0)
    assert configure({"guidance": ("SD",), "dmtet": True, "t_range": (0.1, 0.3)}, "cpu").guidance.t_range == (0.1, 0.3)
    mini = configure({"dmtet": True}, "cuda")
    assert not mini.run.cuda_graph and mini.train_size == (256, 256)
