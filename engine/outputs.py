"""The outputs of a run: six views, the turntable video, the mesh."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from dream_fast.engine.export.images import six_view_paths, write_six_views
from dream_fast.engine.export.mesh_files import mesh_paths, write_mesh, write_textured
from dream_fast.engine.export.silhouette import render_silhouettes
from dream_fast.engine.export.video import turntable_frames, write_video
from dream_fast.engine.geometry.mesh import NoSurface, simplify
from dream_fast.engine.render.mesh import MeshRenderer
from dream_fast.engine.runtime.reporter import Reporter
from dream_fast.engine.scene.camera import six_views
from dream_fast.engine.training.trainer import Trainer
from dream_fast.engine.workspace.folder import Workspace


class Output(NamedTuple):
    """Files that a finished run should have, and what writes them."""

    paths: list[Path]
    write: Callable[[], object]


def outputs(trainer: Trainer, workspace: Workspace, reporter: Reporter) -> list[Output]:
    """The outputs that were asked for: six views; the video, unless six views alone were asked; the mesh."""
    config = trainer.config
    camera, output = config.camera, config.output
    video = workspace.results / "turntable.mp4"

    def write_turntable() -> None:
        with reporter.bar("video", output.dataset_size_test) as bar:
            frames = turntable_frames(trainer.renderer, camera, output.dataset_size_test)
            write_video(video, bar.count(frames), output.video_fps)

    wanted = [
        Output(six_view_paths(workspace.results), lambda: write_six_views(workspace.results, trainer.renderer, camera))
    ]
    if not config.run.six_views:
        wanted.append(Output([video], write_turntable))
    if config.run.save_mesh:
        wanted.append(_mesh_output(trainer, workspace.mesh / "mesh.glb", reporter))
    return wanted


def _mesh_output(trainer: Trainer, path: Path, reporter: Reporter) -> Output:
    """The field's surface, or that of a mesh refinement as it is."""
    output, refined = trainer.config.output, isinstance(trainer.renderer, MeshRenderer)

    def write() -> None:
        with reporter.bar("mesh", 100) as bar:
            texels, told = output.texture_resolution, dict(progress=lambda part: bar.advance(round(100 * part)))
            if refined:
                mesh = simplify(trainer.renderer.mesh(), output.decimate_target)
                write_textured(path, mesh, trainer.field, texels, **told)
            else:
                silhouettes = render_silhouettes(trainer.renderer, six_views(trainer.config.camera, trainer.device))
                threshold, target = trainer.config.render.density_thresh, output.decimate_target
                options = dict(silhouettes=silhouettes, decimate_target=target, texture_resolution=texels, **told)
                write_mesh(path, trainer.field, output.mcubes_resolution, threshold, **options)

    return Output(mesh_paths(path, normals=not refined), write)


class OutputStatus(NamedTuple):
    """What became of the outputs: whether there was something to write, and why there is no mesh."""

    some: bool
    no_mesh: NoSurface | None

    def status(self) -> int:
        """The exit status: 0, or the error, now that everything else is there."""
        if self.no_mesh is not None:
            raise self.no_mesh
        return 0


def write_outputs(
    trainer: Trainer, workspace: Workspace, reporter: Reporter, *, only_missing: bool = False
) -> OutputStatus:
    """Writes the outputs from the averaged weights, without specks."""
    some, no_mesh = False, None
    with trainer.optimizer.ema_weights(), trainer.renderer.without_floaters():
        for output in outputs(trainer, workspace, reporter):
            if not (only_missing and all(path.exists() for path in output.paths)):
                some = True
                try:
                    output.write()
                except NoSurface as error:
                    no_mesh = error
    return OutputStatus(some, no_mesh)
