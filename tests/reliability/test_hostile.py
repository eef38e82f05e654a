"""Input from elsewhere stays text and data, and stays in its folder."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from dream_fast.cli import main
from dream_fast.engine.config.argument_file import LARGEST
from dream_fast.engine.errors import UserError
from dream_fast.engine.guidance.model.components import load_components
from dream_fast.engine.guidance.model.hub import find_folder
from dream_fast.engine.text import escape_controls
from dream_fast.engine.workspace.folder import Workspace

SMALL = """
    --device cpu --iters 1 --log_every 1 --seed 7 --w 12 --h 12 --W 32 --H 32 --dataset_size_test 1 --six_views
    --dataset_size_valid 1 --n_levels 2 --log2_hashmap_size 8 --max_resolution 32 --hidden_width 16 --hidden_layers 1
    --bound 0.6 --max_steps 48 --occupancy_resolution 16
""".split()
PROMPTS = {
    "control": "a cat\x1b[2J\x07\r\n\x00\x9b31m<script>alert(1)</script>",
    "right to left": "a \u202etac\u2066 \u05d7\u05ea\u05d5\u05dc",
    "long": "a cat " * 3_000,
    "path": "../../../etc/passwd; rm -rf ~ $(id) `id`",
    "rich": "[bold red]a cat[/] :cat:",
}


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_prompt_stays_text(prompt, tmp_path, tiny_model, capsys):
    words = [
        "--text",
        prompt,
        "--negative",
        prompt,
        "--hf_key",
        str(tiny_model),
        "--workspace",
        str(tmp_path / "trial"),
    ]
    assert main([*words, *SMALL]) == 0
    output = capsys.readouterr()
    for text in (output.out, output.err, (tmp_path / "trial" / "log.txt").read_text()):
        assert escape_controls(text.replace("\n", "")) == text.replace("\n", "") and len(text) < 20_000
    page = (tmp_path / "trial" / "report.html").read_text()
    assert "<script>alert" not in page and "\u202e" not in page and "\x1b" not in page
    assert json.loads((tmp_path / "trial" / "config.json").read_text())["run"]["text"] == prompt
    assert {path.name for path in tmp_path.iterdir()} == {"trial"}
    assert all(path.name.isascii() and path.name.isprintable() for path in (tmp_path / "trial").rglob("*"))
    if prompt == PROMPTS["rich"]:
        assert prompt in output.out


def test_links_out_of_workspace(tmp_path, tiny_model, capsys):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "back.png").write_text("mine")
    trial = tmp_path / "trial"
    trial.mkdir()
    (trial / "config.json").write_text("{}")
    (trial / "results").symlink_to(tmp_path / "precious")
    words = ["--text", "a cat", "--hf_key", str(tiny_model), "--workspace", str(trial), *SMALL, "--ckpt", "scratch"]
    assert main(words) == 2
    assert "results would be written elsewhere, being a link" in capsys.readouterr().err
    assert (tmp_path / "precious" / "back.png").read_text() == "mine"


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_impossible_folder_name(name):
    with pytest.raises(UserError, match="cannot be a folder"):
        Workspace(Path(name)).check_usable()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--text", "caf\udce9"], "--text is not text in UTF-8"),
        (["--text", "a cat", "--workspace", "~nobody-has-this-name/x"], "there is no home folder of that name"),
        (["--test", "--workspace", "~nobody-has-this-name/x"], "there is no home folder of that name"),
        (["--file", "~nobody-has-this-name/x"], "cannot be read"),
        (["--text", "a cat", "--hf_key", "~nobody-has-this-name/x"], "there is no home folder of that name"),
    ],
)
def test_undecodable_bytes_and_unknown_homes(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*words, "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err and not any(tmp_path.iterdir())


@pytest.mark.parametrize("named", [["../../secret.safetensors"], ["/etc/passwd"], [3], []])
def test_weight_index_outside_folder(tmp_path, tiny_model, named):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    index = {"weight_map": {str(i): name for i, name in enumerate(named)}}
    (model / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="must name files in its own folder"):
        load_components(model, "cpu")


def test_pickled_weights_not_run(tmp_path, tiny_model):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    model = shutil.copytree(tiny_model, tmp_path / "model")
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    for name in ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"):
        torch.save({"a": Evil()}, model / "unet" / name)
        with pytest.raises(UserError, match="pickled weights are not loaded|damaged or incomplete"):
            load_components(model, "cpu")
    assert not (tmp_path / "ran").exists()


def test_hub_revision(monkeypatch, tiny_model):
    calls = []

    def download(name, *, revision, allow_patterns):
        calls.append((name, revision))
        return str(tiny_model)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    for source in ("somebody/model@0123abc", "somebody/model"):
        load_components(source, "cpu")
    assert set(calls) == {("somebody/model", "0123abc"), ("somebody/model", None)}
    for source in ("somebody/model@", "a/b@../x", "a/b@-x"):
        with pytest.raises(UserError, match="does not exist"):
            find_folder(source, "SD", half=False)


def test_endless_argument_file(tmp_path, capsys):
    (tmp_path / "long.txt").write_text("x " * LARGEST)
    for name, sentence in (
        ("/dev/zero", "is not a text file"),
        (str(tmp_path / "long.txt"), "is not a list of arguments"),
    ):
        assert main(["--text", "a cat", "--file", name]) == 2
        assert sentence in capsys.readouterr().err


@pytest.fixture
def load_once(monkeypatch):
    """load_once(component): all other components of a model are loaded once from then on."""
    import diffusers
    import transformers

    loaded = {}
    changing = []
    classes = (
        transformers.CLIPTokenizer,
        transformers.CLIPTextModel,
        diffusers.DDIMScheduler,
        diffusers.UNet2DConditionModel,
        diffusers.AutoencoderKL,
    )
    for cls in classes:

        def load(path, load=cls.from_pretrained, **options):
            if path.name in changing:
                return load(path, **options)
            if path not in loaded:
                loaded[path] = load(path, **options)
            return loaded[path]

        monkeypatch.setattr(cls, "from_pretrained", load)

    def use(part):
        changing[:] = [part]

    return use


def test_model_settings_of_wrong_types(tmp_path, tiny_model, load_once):
    """Each setting of each component with a value of another type is refused or ignored."""
    refused = 0
    shutil.copytree(tiny_model, tmp_path, dirs_exist_ok=True)
    for path in sorted(tiny_model.rglob("*config.json")):
        part = tmp_path / path.relative_to(tiny_model)
        stated = json.loads(path.read_text())
        load_once(path.parent.name)
        for name in stated:
            for value in (None, [None], "x"):
                part.write_text(json.dumps(stated | {name: value}))
                try:
                    load_components(tmp_path, "cpu")
                except UserError as error:
                    refused += 1
                    assert "\n" not in str(error)
        shutil.copy(path, part)
    assert refused > 100
