"""Whole runs with inputs that nobody would type: python -P fuzz_runs.py FOLDER MODEL FIRST STOP STRIDE

Each number from FIRST on is an input: a kind, and what is changed in it. The command trains one step of a tiny run,
writes its outputs and the report, or takes up a finished run. It is taken or refused with one sentence. Before each
input its number and kind are printed, afterwards the outcome; `test_fuzz_runs.py` watches time and memory.
"""

import contextlib
import functools
import io
import json
import random
import shutil
import struct
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIZES = """
    --device cpu --w 6 --h 6 --W 8 --H 8 --dataset_size_test 2 --dataset_size_valid 1 --n_levels 2 --log2_hashmap_size 6
    --max_resolution 16 --hidden_width 16 --hidden_layers 1 --bound 0.6 --max_steps 16 --occupancy_resolution 8
    --mcubes_resolution 8 --texture_resolution 16 --log_every 1 --seed 1
""".split()
NUMBERS = [
    0,
    1,
    -1,
    2,
    3,
    0.5,
    1e9,
    -1e9,
    1e-9,
    5e-324,
    1e308,
    -1e308,
    2**31,
    2**53,
    2**62,
    2**63 - 1,
    1e18,
    0.1,
    7,
    100,
]
WORDS = [
    "",
    " ",
    "a hamburger",
    "nan",
    "inf",
    "-inf",
    "9" * 400,
    "0:1:2:1",
    "0:0.5:1:1",
    "::",
    "../x",
    "/dev/null",
    "\ud800",
]
WORDS += [
    "\u202etxet",
    "\u200b",
    "x" * 3000,
    "auto",
    "cpu",
    "cuda:7",
    "sds",
    "grid",
    "vanilla",
    "none",
    "\0",
    "a\nb",
    "\x1b[2J",
]
LEAVES = [
    *NUMBERS,
    *WORDS,
    None,
    True,
    False,
    [],
    {},
    [1, 2],
    {"a": 1},
    float("nan"),
    float("inf"),
    -float("inf"),
    10**400,
]
# Settings whose values set the size of the work: the values in their range are kept small, and these are tried too.
SIZED = """
    w h W H batch_size dataset_size_test dataset_size_valid n_levels n_features_per_level log2_hashmap_size hidden_width
    hidden_layers max_steps num_steps upsample_steps occupancy_resolution mcubes_resolution texture_resolution iters
    tet_grid_size dmtet_reso_scale inversion_steps n_frequencies bound
""".split()


class Fuzz:
    """Makes and runs inputs in `folder`, with the image model in the folder `model`."""

    def __init__(self, folder: Path, model: Path):
        self.folder, self.model = folder, model
        self.finished = folder / "finished"
        status, said = self.run(["--text", "a cat", "--save_mesh", *self.words(self.finished)])
        if status != 0:
            raise SystemExit("the run without changes fails: " + said)
        self.kinds: dict[str, Callable[[random.Random], tuple[int, str]]] = {
            "flags": self.flags,
            "config": functools.partial(self.json_file, "config.json"),
            "manifest": functools.partial(self.json_file, "manifest.json"),
            "metrics": self.metrics,
            "checkpoint": self.checkpoint,
            "model": self.model_folder,
            "mesh": self.mesh,
            "picture": self.picture,
        }

    def words(self, workspace: Path, *, iters: int = 1) -> list[str]:
        return ["--hf_key", str(self.model), "--workspace", str(workspace), "--iters", str(iters), *SIZES]

    @staticmethod
    def run(words: list[str]) -> tuple[int, str]:
        """Exit status of the command and what it said on standard error."""
        from dream_fast.cli import main

        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(words)
        return status, err.getvalue()

    def copy(self) -> Path:
        shutil.copytree(self.finished, self.folder / "copy")
        return self.folder / "copy"

    def again(self, rng: random.Random, workspace: Path) -> tuple[int, str]:
        """Take up the run in one of the ways: its outputs, what is missing, or one more step."""
        way = rng.randrange(3)
        if way == 0:
            return self.run(["--test", "--six_views", "--workspace", str(workspace), "--device", "cpu"])
        if way == 1:
            (workspace / "report.html").unlink(missing_ok=True)
        return self.run(["--text", "a cat", *self.words(workspace, iters=1 + (way == 2))])

    # ------------------------------------------------------------------------------------------------------ the kinds

    def flags(self, rng: random.Random) -> tuple[int, str]:
        from dream_fast.engine.config.schema import settings
        from dream_fast.engine.config.setting import value_type

        fields = [
            field for _, field in settings() if field.name not in ("workspace", "output", "test", "device", "compile")
        ]
        typed = ["--text", "a cat", *self.words(self.folder / "new")]
        for field in rng.sample(fields, rng.choice((1, 1, 1, 2, 3))):
            kind, bounds = value_type(field), field.metadata
            if kind is bool:
                typed.append(f"--{rng.choice(('', 'no-'))}{field.name}")
                continue
            choices: list[Any] = [*(bounds["choices"] or ()), *WORDS[:10]]
            edges = [bounds[name] for name in ("low", "above", "high", "below") if bounds[name] is not None]
            if kind is not str and not bounds["choices"]:
                choices = [*NUMBERS, *edges, *(edge + shift for edge in edges for shift in (-1, 1, 1e-9))]
                if field.name in SIZED:
                    choices = [value for value in choices if value <= 40 or value > max([40, *edges])]
                if kind is int:
                    choices = [int(value) for value in choices]
            values = [str(rng.choice(choices))]
            if str(kind).startswith("tuple") and not bounds["choices"]:
                values = sorted([*values, str(rng.choice(choices))], key=float)
            if "LinearSchedule" in str(kind) and rng.random() < 0.3:
                values = [f"{rng.choice((0, 0.3))}:{value}:{rng.choice(choices)}:1" for value in values]
            typed += [f"--{field.name}={values[0]}"] if len(values) == 1 else [f"--{field.name}", *values]
        return self.run(typed)

    def json_file(self, name: str, rng: random.Random) -> tuple[int, str]:
        workspace = self.copy()
        self.change_json(rng, workspace / name)
        return self.again(rng, workspace)

    def metrics(self, rng: random.Random) -> tuple[int, str]:
        workspace = self.copy()
        path = workspace / "metrics.jsonl"
        row = json.loads(path.read_text().splitlines()[0])
        lines = [json.dumps(change(rng, row)) for _ in range(rng.randrange(4))]
        path.write_text(
            "\n".join([*lines, rng.choice(("", "{", "[" * 5000, "\0", '{"step": 9}'))]), errors="surrogatepass"
        )
        return self.again(rng, workspace)

    def checkpoint(self, rng: random.Random) -> tuple[int, str]:
        from safetensors import safe_open
        from safetensors.torch import save_file

        from dream_fast.engine.workspace import checkpoint as module

        workspace = self.copy()
        path = next((workspace / "checkpoints").iterdir())
        if rng.random() < 0.3:
            path.write_bytes(change_bytes(rng, path.read_bytes()))
            return self.again(rng, workspace)
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()[module.FORMAT])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        header.pop("checksum")
        if rng.random() < 0.5:
            header = change(rng, header)
        else:
            name = rng.choice(sorted(tensors))
            tensor = tensors[name]
            value = rng.choice((0, 1, -1, 1e30, float("nan"), float("inf"), 2**40))
            with contextlib.suppress(RuntimeError, OverflowError):
                changes = [
                    tensor.flatten()[:3].clone(),
                    tensor.float() + value,
                    tensor * 0 + value,
                    tensor[None].clone(),
                ]
                tensors[name] = rng.choice(changes).contiguous()
            if rng.random() < 0.1:
                del tensors[name]
        with contextlib.suppress(TypeError, AttributeError, ValueError):
            header["checksum"] = module._checksum(header, tensors)  # so that the change itself is met
        save_file(tensors, path, metadata={module.FORMAT: json.dumps(header)})
        return self.again(rng, workspace)

    def model_folder(self, rng: random.Random) -> tuple[int, str]:
        shutil.copytree(self.model, self.folder / "model")
        paths = sorted(path for path in (self.folder / "model").rglob("*") if path.is_file())
        path = rng.choice(paths)
        if path.suffix == ".json" and rng.random() < 0.8:
            self.change_json(rng, path)
        else:
            path.write_bytes(change_bytes(rng, path.read_bytes()))
        words = self.words(self.folder / "new")
        return self.run(["--text", "a cat", "--hf_key", str(self.folder / "model"), "--six_views", *words[2:]])

    def mesh(self, rng: random.Random) -> tuple[int, str]:
        import trimesh

        suffix = rng.choice(("glb", "gltf", "obj", "off", "ply", "stl"))
        path = self.folder / f"mesh.{suffix}"
        exported = trimesh.creation.box().export(file_type=suffix)
        if suffix == "gltf":
            for name, content in exported.items():
                (self.folder / name).write_bytes(content)
            path = self.folder / "model.gltf"
            if rng.random() < 0.7:
                self.change_json(rng, path)
                exported = path.read_bytes()
            else:
                exported = change_bytes(rng, path.read_bytes())
        elif suffix == "glb" and rng.random() < 0.7:
            exported = change_glb(rng, exported)
        else:
            exported = change_bytes(rng, exported.encode() if isinstance(exported, str) else exported)
        path.write_bytes(exported)
        words = self.words(self.folder / "new")
        refined = ["--dmtet", "--tet_grid_size", "8", "--dmtet_reso_scale", "1", "--init_with", str(path)]
        return self.run(["--text", "a cat", "--six_views", *refined, *words])

    def picture(self, rng: random.Random) -> tuple[int, str]:
        workspace = self.copy()
        folders = [workspace / "results", workspace / "validation", workspace / "mesh"]
        path = rng.choice(sorted(path for folder in folders for path in folder.iterdir()))
        path.write_bytes(change_bytes(rng, path.read_bytes()))
        return self.again(rng, workspace)

    def change_json(self, rng: random.Random, path: Path) -> None:
        if rng.random() < 0.15:
            path.write_bytes(change_bytes(rng, path.read_bytes()))
        else:
            path.write_text(json.dumps(change(rng, json.loads(path.read_bytes()))))

    # -------------------------------------------------------------------------------------------------------- one input

    def try_input(self, number: int) -> str:
        """Run the input of that number. Return the outcome: taken, refused, or how it failed."""
        rng = random.Random(number)
        kind = list(self.kinds)[number % len(self.kinds)]
        print(json.dumps({"input": number, "kind": kind}), flush=True)
        try:
            status, said = self.kinds[kind](rng)
            last = said.splitlines()[-1] if said else ""
            if status != 0 and not (status == 2 and last.startswith("dream-fast: error: ")):
                return f"status {status}: {said[-300:]}"
            if "Traceback" in said or any(ord(letter) < 32 and letter != "\n" for letter in said):
                return f"said {said[-300:]!r}"
            return "taken" if status == 0 else "refused"
        except BaseException:
            return traceback.format_exc()[-1500:]
        finally:
            for path in self.folder.iterdir():
                if path not in (self.finished, self.model):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def change(rng: random.Random, data: Any) -> Any:
    """`data`, as JSON holds it, with one or two values replaced, left out, repeated or added."""
    data = json.loads(json.dumps(data))
    for _ in range(rng.choice((1, 1, 2))):
        places: list[tuple[Any, Any]] = []
        collect(data, places)
        if not places:
            return rng.choice(LEAVES)
        inside, key = rng.choice(places)
        what = rng.random()
        if what < 0.1 and isinstance(inside, dict):
            del inside[key]
        elif what < 0.2 and isinstance(inside, dict):
            inside[rng.choice(WORDS)] = rng.choice(LEAVES)
        elif what < 0.3 and isinstance(inside, list):
            inside += inside * rng.choice((1, 3))
        elif what < 0.5 and type(inside[key]) in (int, float):
            inside[key] = rng.choice(
                (-inside[key], inside[key] * 2, inside[key] + 1, inside[key] * 1e-3, float(inside[key]))
            )
        else:
            inside[key] = rng.choice(LEAVES)
    return data


def collect(data: Any, places: list[tuple[Any, Any]]) -> None:
    """Add every value inside of `data` as (what it is in, its key)."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        places.append((data, key))
        collect(value, places)


def change_bytes(rng: random.Random, content: bytes) -> bytes:
    """`content` cut, emptied, repeated, or with some bytes replaced."""
    what = rng.random()
    if what < 0.1:
        return rng.randbytes(rng.choice((0, 1, 50)))
    if what < 0.3:
        return content[: rng.randrange(len(content) + 1)]
    if what < 0.35:
        return content * 2
    changed = bytearray(content)
    most = len(changed) if rng.random() < 0.5 else min(len(changed), 300)  # headers stand at the beginning
    for _ in range(rng.choice((1, 1, 2, 8))):
        if changed:
            changed[rng.randrange(max(1, most))] = rng.randrange(256)
    return bytes(changed)


def change_glb(rng: random.Random, content: bytes) -> bytes:
    """A GLB file whose JSON is changed, with lengths that agree."""
    (length,) = struct.unpack("<I", content[12:16])
    text = json.dumps(change(rng, json.loads(content[20 : 20 + length]))).encode()
    text += b" " * (-len(text) % 4)
    rest = content[20 + length :]
    return content[:8] + struct.pack("<II", 20 + len(text) + len(rest), len(text)) + b"JSON" + text + rest


def main(folder: Path, model: Path, first: int, stop: int, stride: int) -> None:
    import torch

    torch.set_num_threads(1)
    fuzz = Fuzz(folder, model)
    print(json.dumps({"ready": True}), flush=True)
    for number in range(first, stop, stride):
        print(json.dumps({"outcome": fuzz.try_input(number)}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:6]))
