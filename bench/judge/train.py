"""Train the judge: `python -m dream_fast.bench.judge.train` writes judge.safetensors and judge.json beside itself."""

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from dream_fast.bench.judge import SIZE, WEIGHTS, Judge, verdicts
from dream_fast.engine.prior.data import NATURAL, rendered
from dream_fast.engine.prior.vocabulary import THINGS

TRAIN_SEED, HELD_OUT_SEED = 101, 202  # dream-mini learns from seed 0


def dataset(seed: int, batches: int, device: torch.device, pool: ProcessPoolExecutor) -> tuple[Tensor, Tensor]:
    """Pictures [N, 3, 64, 64] uint8 and labels [N, 3] int64."""
    pictures, labels = [], []
    for views in rendered(seed, batches, 4, SIZE, device, pool):
        pictures.append(views.images.permute(0, 3, 1, 2))
        labels.append(torch.from_numpy(views.labels))
    return torch.cat(pictures), torch.cat(labels).long().to(device)


def disturb(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures [N, 3, 64, 64] as a rendered field may look: shifted, scaled, blurred, noisy, paler or darker."""
    n, device = len(pictures), pictures.device

    def draw(*shape: int) -> Tensor:
        return torch.rand(n, *shape, generator=generator, device=device)

    scale, shift = 0.85 + 0.4 * draw(1, 1), 0.3 * (draw(2, 1) - 0.5)
    theta = torch.cat([torch.eye(2, device=device) * scale, shift], dim=2)
    grid = F.affine_grid(theta, list(pictures.shape), align_corners=False)
    pictures = F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
    soft = F.avg_pool2d(F.pad(pictures, (2, 2, 2, 2), mode="replicate"), 5, 1)
    pictures = torch.lerp(pictures, soft, draw(1, 1, 1))
    gain, lift = 0.8 + 0.35 * draw(1, 1, 1), 0.1 * (draw(1, 1, 1) - 0.5)
    noise = torch.randn(pictures.shape, generator=generator, device=device) * 0.06 * draw(1, 1, 1)
    return (pictures * gain + lift + noise).clamp(0, 1)


def accuracy(judge: Judge, pictures: Tensor, labels: Tensor) -> dict[str, float]:
    """Fractions right on held-out pictures: colours where one was named, views where the object has a face."""
    found = [verdicts(judge, part.float() / 255) for part in pictures.split(1024)]
    thing, color, view = (torch.cat(column) == labels[:, k] for k, column in enumerate(zip(*found, strict=True)))
    named = labels[:, 1] != NATURAL
    face = torch.tensor([t.face for t in THINGS.values()], device=labels.device)[labels[:, 0]]
    return {
        "object": thing.float().mean().item(),
        "color": color[named].float().mean().item(),
        "object_color": (thing & color)[named].float().mean().item(),
        "view": view[face].float().mean().item(),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--batches", type=int, default=300, help="batches of 64 objects, four views of each")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--workers", type=int, default=14)
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(TRAIN_SEED)
    with ProcessPoolExecutor(args.workers) as pool:
        pictures, labels = dataset(TRAIN_SEED, args.batches, device, pool)
        held_pictures, held_labels = dataset(HELD_OUT_SEED, max(1, args.batches // 10), device, pool)
    print(f"rendered {len(pictures)} pictures to learn from, {len(held_pictures)} held out", flush=True)
    judge = Judge().to(device)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3, weight_decay=0.05)
    generator = torch.Generator(device).manual_seed(TRAIN_SEED)
    start, step = time.perf_counter(), 0
    while (done := (time.perf_counter() - start) / args.seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, 20 * done, 1.02 - done)
        index = torch.randint(len(pictures), (256,), device=device, generator=generator)
        logits = judge(disturb(pictures[index].float() / 255, generator))
        loss = sum(F.cross_entropy(part, labels[index, k]) for k, part in enumerate(logits))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % 500 == 0:
            print(f"judge step {step}, loss {loss.item():.3f}", flush=True)
        step += 1
    judge.eval()
    halved = {name: t.half() if t.is_floating_point() else t for name, t in judge.state_dict().items()}
    judge.load_state_dict({name: t.to(device) for name, t in halved.items()})
    result = {k: round(v, 4) for k, v in accuracy(judge, held_pictures, held_labels).items()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous().cpu() for name, t in halved.items()}, args.out)
    record = {"held_out": result, "held_out_pictures": len(held_pictures), "pictures": len(pictures), "steps": step}
    args.out.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
