"""The outputs of a run: six views, the turntable video, the mesh."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from dream_fast.engine.config.schema import Config
from dream_fast.engine.export.images import six_view_paths, write_six_views
from dream_fast.engine.export.mesh_files import mesh_paths, write_mesh, write_textured
from dream_fast.engine.export.silhouette import render_silhouettes
from dream_fast.engine.export.video import turntable_frames, write_video
from dream_fast.engine.files import is_regular
from dream_fast.engine.geometry.mesh import simplify
from dream_fast.engine.runtime.paths import expand_user
from dream_fast.engine.runtime.reporter import Reporter
from dream_fast.engine.scene.camera import six_views
from dream_fast.engine.training.failures import translate_oom
from dream_fast.engine.training.trainer import Trainer
from dream_fast.engine.workspace.folder import Workspace


class Output(NamedTuple):
    """Files that a finished run should have, and the function that writes them."""

    paths: list[Path]
    write: Callable[[], object]


def choose_output_folder(config: Config, workspace: Workspace) -> Workspace:
    """Return the folder of the outputs: `workspace`, or another one with `--output`."""
    if config.run.output is None:
        return workspace
    target = Workspace(expand_user(config.run.output), flag="--output")
    return workspace if os.path.realpath(target.path) == os.path.realpath(workspace.path) else target


def paths_of_outputs(config: Config, workspace: Workspace, *, only_missing: bool = False) -> list[Path]:
    """Return the files that the outputs of a run are written to, with `only_missing` those of outputs that lack one."""
    outputs = [output for output in _output_paths(config, workspace) if not (only_missing and _all_there(output))]
    return [path for output in outputs for path in output] + [workspace.report] * bool(outputs)


def paths_of_run(config: Config, workspace: Workspace, step: int) -> list[Path]:
    """Return the files that a run from `step` on writes, as far as their names are known."""
    trace = [workspace.profile / "trace.json.gz"] if config.output.profile else []
    return [*paths_of_outputs(config, workspace), *trace, *workspace.later_files(step, config.run.iters)]


def _output_paths(config: Config, workspace: Workspace) -> list[list[Path]]:
    """Return the files of each output of the settings, in the order of `_list_outputs`."""
    paths = [six_view_paths(workspace.results)]
    if not config.run.six_views:
        paths.append([workspace.results / "turntable.mp4"])
    if config.run.save_mesh:
        paths.append(mesh_paths(workspace.mesh / "mesh.glb", normals=not config.dmtet.dmtet))
    return paths


def _all_there(paths: list[Path]) -> bool:
    return all(map(is_regular, paths))


def write_outputs(trainer: Trainer, workspace: Workspace, reporter: Reporter, *, only_missing: bool = False) -> bool:
    """Write the outputs of a run from the averaged weights, without floaters. Return True if there were any to write.

    The reporter collects what cannot be written.
    """
    outputs = _list_outputs(trainer, workspace, reporter)
    if only_missing:
        outputs = [output for output in outputs if not _all_there(output.paths)]
    if outputs:
        with (
            reporter.collect(workspace.results),
            trainer.optimizer.ema_weights(),
            trainer.renderer.without_floaters(),
        ):
            for output in outputs:
                with reporter.collect(output.paths[0]), translate_oom(trainer.config, workspace):
                    output.write()
    return bool(outputs)


def _list_outputs(trainer: Trainer, workspace: Workspace, reporter: Reporter) -> list[Output]:
    """Return the outputs of the settings: six views; the video, unless `--six_views`; the mesh with `--save_mesh`."""
    run, camera, folder = trainer.config.run, trainer.config.camera, workspace.results
    outputs = [Output(six_view_paths(folder), lambda: write_six_views(folder, trainer.renderer, camera))]
    if not run.six_views:
        outputs.append(_video_output(trainer, folder / "turntable.mp4", reporter))
    if run.save_mesh:
        outputs.append(_mesh_output(trainer, workspace.mesh / "mesh.glb", reporter))
    return outputs


def _video_output(trainer: Trainer, path: Path, reporter: Reporter) -> Output:
    camera, output = trainer.config.camera, trainer.config.output

    def write() -> None:
        with reporter.bar("video", output.dataset_size_test) as bar:
            frames = turntable_frames(trainer.renderer, camera, output.dataset_size_test)
            write_video(path, bar.count(frames), output.video_fps)

    return Output([path], write)


def _mesh_output(trainer: Trainer, path: Path, reporter: Reporter) -> Output:
    """Return the output of the mesh: that of a refinement, or the extracted surface of the field."""
    config = trainer.config

    def write() -> None:
        with reporter.bar("mesh", 100) as bar:
            texture: dict[str, Any] = dict(progress=lambda part: bar.advance(round(100 * part)))
            size, target = config.output.texture_resolution, config.output.decimate_target
            mesh = trainer.renderer.mesh()
            if mesh is not None:
                write_textured(path, simplify(mesh, target), trainer.field, size, **texture)
                return
            write_mesh(
                path,
                trainer.field,
                config.output.mcubes_resolution,
                config.render.density_thresh,
                silhouettes=render_silhouettes(trainer.renderer, six_views(config.camera, trainer.device)),
                decimate_target=target,
                texture_resolution=size,
                **texture,
            )

    return Output(mesh_paths(path, normals=not config.dmtet.dmtet), write)
