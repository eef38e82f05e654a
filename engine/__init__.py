"""The engine: from a configuration to the files of a run.

Packages in the order of their imports; each imports only from those before it:

- `errors`, `text`: the user's errors; text for a terminal.
- `config`: every setting, presets, checks.
- `runtime`: device, seeds, signals, CUDA graphs, reporter. `geometry`: meshes, surfaces, signed distance.
- `scene`: cameras and fields.
- `render`: images of a field or a mesh. `workspace`: checkpoints, lock, manifest. `dream_mini`: the image model.
- `guidance`: score distillation, prompts and image models. `export`: images, video, mesh files, report.
- `training`: the step, the loop, losses, optimiser.
- `outputs`: what a finished run writes. `run`: the order of a run.

Nothing is imported here, so that the command reads `dream_fast.engine.config` without loading torch.
"""
