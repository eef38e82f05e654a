"""The embedded model: its words, the world that it learned from, and the folder that is shipped."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

from dream_fast.bench.accuracy import error
from dream_fast.engine.dream_mini import MODEL_FOLDER, check_prompt, model
from dream_fast.engine.dream_mini.catalogue import vocabulary
from dream_fast.engine.dream_mini.compose import make_scene
from dream_fast.engine.dream_mini.model import save_tokenizer
from dream_fast.engine.dream_mini.sphere_tracer import pack, render
from dream_fast.engine.dream_mini.vocabulary import (
    COLORS,
    SHADES,
    THINGS,
    Vocabulary,
    find_object,
    known_words,
    read_vocabulary,
    words,
)
from dream_fast.engine.errors import UserError
from dream_fast.engine.guidance.ddim import sample
from dream_fast.engine.guidance.model.components import load_components
from dream_fast.engine.guidance.prompts import encode
from dream_fast.engine.scene.camera import make_cameras

# --- prompts


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("a hamburger", "hamburger"),
        ("A DSLR photo of a Cheeseburger.", "hamburger"),
        ("one kitten", "cat"),
        ("a rubber duck toy", "duck"),
        ("ice cream", "ice cream cone"),
        ("a pink ice cream cone", "ice cream cone"),
        ("a birthday cake", "cake"),
        ("a pine tree", "pine tree"),
        ("a tree", "tree"),
        ("a top hat", "hat"),
        ("a cat wearing a red hat", "cat"),
        ("a red hat on a cat", "hat"),
        ("a wizard wearing a red hat", None),
        ("a wizard with a top hat, front view", None),
        ("a table with a lamp on it", "table"),
        ("something with a mug", "mug"),
        ("a mug and a teapot", "mug"),
        ("two hamburgers", "hamburger"),
        ("an hambuger", "hamburger"),
        ("a pengiun", "penguin"),
        ("a beard", None),
        ("a planet", None),
        ("a catalogue", None),
        ("a chairman", None),
        ("", None),
    ],
)
def test_find_object(text: str, name: str | None) -> None:
    """The first known object of a prompt; parts that are worn are none."""
    assert find_object(text) == name


def test_check_prompt_refuses_unknown_objects() -> None:
    """The error names every known object and the other models."""
    with pytest.raises(UserError) as refused:
        check_prompt("a marble statue\nof a zebra")
    sentence = str(refused.value)
    assert '"a marble statue of a zebra"' in sentence and "\n" not in sentence
    assert all(name in sentence for name in THINGS)
    assert "--sd_version" in sentence and "--hf_key" in sentence


def test_check_prompt_unknown_words() -> None:
    """Each unknown word is named once, at most ten of them."""
    assert check_prompt("a small grey robot wearing a blue hat, back view") == []
    many = check_prompt("a hamburger " + " ".join(f"word{'x' * i}" for i in range(9000)))
    assert len(many) == 11 and many[-1] == "nor does it know 8990 other words"
    warnings = check_prompt("a glorious, glorious DSLR photo of a velvet hamburger")
    assert len(warnings) == 2 and '"glorious"' in warnings[0] and '"velvet"' in warnings[1]


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("a red robot with a blue hat", "a red robot with a blue hat"),
        ("A glorious DSLR photo of a velvet Hamburger!", "a dslr photo of a hamburger"),
        ("a robot, shiny, 8k, side view.", "a robot side view"),
        ("an ice-cream cone (pink)", "an ice cream cone pink"),
        ("some red donuts and a stripped mug", "some red donut and a striped mug"),
        ("blurry, low quality", ""),
        ("", ""),
    ],
)
def test_known_words(text: str, read: str) -> None:
    """Known words remain, in lower case, with plurals and misspellings replaced."""
    assert known_words(text) == read
    assert known_words(read) == read


def test_check_prompt_misspelt_words() -> None:
    """The warning about a misspelt word names the word that it is read as; a plural gives none."""
    """A user sees what a misspelt word was taken for, and nothing about a plural."""
    (warning,) = check_prompt("two red hambugers".removeprefix("two "))
    assert '"hambugers"' in warning and '"hamburger"' in warning
    assert check_prompt("donuts") == []


def test_read_vocabulary(tmp_path) -> None:
    """A folder with other words is read with those, and the world's own words make a vocabulary that reads back."""
    assert words() == read_vocabulary(MODEL_FOLDER).words
    content = json.loads((MODEL_FOLDER / "vocabulary.json").read_text())
    content["things"]["zebra"] = {"synonyms": ["quagga"], "natural": None, "face": True}
    (tmp_path / "vocabulary.json").write_text(json.dumps(content))
    other = read_vocabulary(tmp_path)
    assert other.find_object("a red quagga") == "zebra" and find_object("a red quagga") is None
    assert "zebra" in other.words and other.check_prompt("a zebra") == []
    grown = Vocabulary(json.loads(json.dumps(vocabulary())))
    assert set(words()) <= set(grown.words)  # what users could ask for stays
    assert grown.find_object("a mug with a flower") == "mug" and grown.find_object("a cat in blue boots") == "cat"
    assert grown.find_object("a cat with a red bow") == "cat" and grown.find_object("a wizard with a red bow") is None


def test_check_prompt_negative() -> None:
    """Unknown words of the negative prompt give warnings too."""
    assert check_prompt("a cat", "blue, side view") == []
    (warning,) = check_prompt("a cat", "blurry")
    assert '"blurry"' in warning


def test_find_object_all_names() -> None:
    """Every name and synonym is found, and natural colours exist."""
    assert len(THINGS) >= 36 and len(COLORS) == 12
    for name, thing in THINGS.items():
        for spelling in (name, *thing.synonyms):
            assert find_object(f"a red {spelling} with a blue hat") == name
        assert all(color in COLORS or color in SHADES for color in thing.natural or ())


# --- the shipped model


@pytest.fixture(scope="module")
def dream_mini():
    return load_components(MODEL_FOLDER, "cpu", need_vae_decoder=True)


def test_model_files() -> None:
    """The weights are small, in half precision and without pickles."""
    files = [path for path in MODEL_FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 24e6
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert max(path.stat().st_size for path in weights) <= 12e6
    for path in weights:
        with safe_open(path, framework="pt") as file:
            assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}, path
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt", ".md", ".png"}  # nothing pickled


def test_model_loads(dream_mini) -> None:
    """The folder loads as a Stable Diffusion pipeline with the sizes of dream-mini."""
    assert dream_mini.name == "dream-mini"
    assert (dream_mini.image_size, dream_mini.latent_size, dream_mini.latent_channels) == (128, 32, 4)
    assert (dream_mini.prediction_type, dream_mini.num_train_timesteps) == ("v_prediction", 1000)
    stored = json.loads((MODEL_FOLDER / "vae" / "config.json").read_text())
    assert dream_mini.scaling_factor == stored["scaling_factor"] != 0.18215  # its own, from its own data
    assert dream_mini.shift_factor == 0
    assert 6e6 < sum(p.numel() for p in dream_mini.unet.parameters()) < 10e6
    assert dream_mini.alphas_cumprod[-1] < 0.01 and dream_mini.alphas_cumprod[0] > 0.99
    assert len(dream_mini.tokenizer) == dream_mini.text_encoder.config.vocab_size


def is_one_token(tokenizer, word: str) -> bool:
    start, *inside, end = tokenizer(word).input_ids
    return len(inside) == 1 and (start, end) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_tokenizer(dream_mini, tmp_path) -> None:
    """Each known word is one token, and a fresh tokenizer has the same bytes each time."""
    fresh = save_tokenizer(tmp_path / "fresh", words())
    for tokenizer in (dream_mini.tokenizer, fresh):
        split = [word for word in words() if not is_one_token(tokenizer, word)]
        assert split == ["3d"]  # CLIP's tokenizer takes every digit alone
        text = "a photo of a tall grey ice cream cone wearing a turquoise hat , overhead view"
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text.split()) + 2
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text
        assert tokenizer("A  Photo of a DONUT").input_ids == tokenizer("a photo of a donut").input_ids
        assert tokenizer.decode(tokenizer("zebra 7").input_ids, skip_special_tokens=True).strip() == "zebra 7"
        longest = "a photo of a striped turquoise pine tree wearing a turquoise hat , overhead view"
        assert len(tokenizer(longest).input_ids) <= tokenizer.model_max_length == 24
    save_tokenizer(tmp_path / "again", words())
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()


def test_encode(dream_mini) -> None:
    """Other words give other embeddings, the same words the same bits."""
    car, again, apple = encode(dream_mini, ["a red car", "a red car", "a red apple"])
    assert torch.equal(car, again) and error(apple, car.double()) > 0.1
    assert car.shape == (24, dream_mini.unet.config.cross_attention_dim)


def test_samples_have_their_color(dream_mini) -> None:
    """Samples of apples have the colour of their prompt."""
    asked = ["red", "green", "blue", "yellow"]
    cond = encode(dream_mini, [f"a {color} apple, front view" for color in asked])
    uncond = encode(dream_mini, [""]).expand(len(asked), -1, -1)
    images = sample(dream_mini, cond, uncond, steps=6, guidance_scale=4.0, generator=torch.Generator().manual_seed(0))
    assert images.shape == (4, 3, 128, 128)
    middle = images[:, :, 56:80, 52:76].mean(dim=(2, 3))  # on the apple, whatever the background
    nearest = torch.cdist(middle, torch.tensor([COLORS[color] for color in asked])).argmin(1)
    assert nearest.tolist() == [0, 1, 2, 3], middle


def test_autoencoder(dream_mini) -> None:
    """The autoencoder returns an image at 22 dB or better."""
    scene = make_scene(np.random.default_rng(3), "duck", "yellow", plain=True)
    numbers = (torch.tensor([value]) for value in (80.0, 30.0, 3.2, 20.0))
    image = render(
        pack([scene], "cpu"), make_cameras(*numbers), 128, shading=torch.zeros(1), ambient=torch.zeros(1),
        light_noise=torch.zeros(1, 3), background=torch.full((1, 3), 0.5), supersample=1,
    ).permute(0, 3, 1, 2)  # fmt: skip
    with torch.no_grad():
        latent = dream_mini.vae.encode(image * 2 - 1).latent_dist.mean
        back = dream_mini.vae.decode(latent).sample / 2 + 0.5
    assert 0.3 < (latent * dream_mini.scaling_factor).std() < 3  # about 1 over all images
    assert -10 * torch.log10((back - image).square().mean()) > 22  # dB


def test_save_model_without_paths(tmp_path):
    """A saved configuration has no path of this machine."""
    tokenizer = save_tokenizer(tmp_path / "tokenizer", words())
    model.make_vae().save_pretrained(tmp_path / "cache")
    vae = model.AutoencoderKL.from_pretrained(tmp_path / "cache")
    assert str(tmp_path) in vae.to_json_string()  # what diffusers would write
    parts = (model.make_text_encoder(tokenizer), model.make_unet(), vae)
    model.save_model(tmp_path / "out", tokenizer, *parts, model.make_scheduler())
    for folder in (tmp_path / "out", MODEL_FOLDER):
        for config in folder.glob("*/config.json"):
            assert "_name_or_path" not in json.loads(config.read_text()), config
    assert load_components(tmp_path / "out", "cpu").latent_size == model.LATENT
