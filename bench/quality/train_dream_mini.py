"""Train dream-mini with sheets of its images: `python -m dream_fast.bench.quality.train_dream_mini --out FOLDER`.

Takes the arguments of `python -m dream_fast.engine.dream_mini.train`, and `--shown`. Each time the model is written,
the folder gets samples-STEP.png (front, side, back and overhead view, one by one) and groups-STEP.png (four views made
together).
"""

import argparse
from pathlib import Path

import torch

from dream_fast.bench.quality.model_samples import sample_groups, sample_views, sheet
from dream_fast.engine.dream_mini import train
from dream_fast.engine.guidance.model.components import load_components

SHOWN = (
    "a hamburger", "a red robot with a blue hat", "a white rabbit", "an orange cat with glasses", "a striped blue mug",
    "a house", "a cow", "a spotted green dinosaur", "a cat on a chair", "a mug with a flower", "a dog under a table",
    "an astronaut beside a rocket",
)  # fmt: skip


def write_sheets(folder: Path, step: int, device: torch.device, prompts: list[str]) -> None:
    """Write both sheets of the model in `folder`; none without prompts."""
    if not prompts:
        return
    components = load_components(folder, device, need_vae_decoder=True)
    sheet(sample_views(components, prompts), columns=2).save(folder / f"samples-{step:06}.png")
    sheet(sample_groups(components, folder, prompts), columns=2).save(folder / f"groups-{step:06}.png")


def main(argv: list[str] | None = None) -> bool:
    """Train. True: the training is finished."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], add_help=False)
    parser.add_argument("--shown", type=int, default=len(SHOWN), help="prompts on the sheets")
    args, others = parser.parse_known_args(argv)
    prompts = list(SHOWN[: args.shown])
    return train.main(others, lambda folder, step, device: write_sheets(folder, step, device, prompts))


if __name__ == "__main__":
    main()
