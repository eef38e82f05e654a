"""The embedded model: its words, its world, and the folder that is shipped."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors import safe_open

from dream_fast.bench.accuracy import error
from dream_fast.engine.dream_mini import MODEL_FOLDER, check_prompt, dataset, model
from dream_fast.engine.dream_mini.captions import BORDER, caption, view_of
from dream_fast.engine.dream_mini.model import save_tokenizer
from dream_fast.engine.dream_mini.scenes import KINDS, RADIUS, Primitive, make_scene
from dream_fast.engine.dream_mini.sphere_tracer import pack
from dream_fast.engine.dream_mini.vocabulary import COLORS, SHADES, THINGS, VIEWS, find_object, known_words, words
from dream_fast.engine.errors import UserError
from dream_fast.engine.guidance.ddim import sample
from dream_fast.engine.guidance.model.components import load_components

# ------------------------------------------------------------------------------------------------------------- prompts


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
        ("a catalogue", None),
        ("a chairman", None),
        ("", None),
    ],
)
def test_the_object_of_a_prompt(text: str, name: str | None) -> None:
    assert find_object(text) == name


def test_check_prompt_unknown_object() -> None:
    with pytest.raises(UserError) as refused:
        check_prompt("a marble statue\nof a zebra")
    sentence = str(refused.value)
    assert '"a marble statue of a zebra"' in sentence and "\n" not in sentence
    assert all(name in sentence for name in THINGS)
    assert "--sd_version" in sentence and "--hf_key" in sentence


def test_check_prompt_unknown_word() -> None:
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
        ("blurry, low quality", ""),
        ("", ""),
    ],
)
def test_what_the_model_reads_of_a_prompt(text: str, read: str) -> None:
    assert known_words(text) == read
    assert known_words(read) == read


def test_check_prompt_negative() -> None:
    assert check_prompt("a cat", "blue, side view") == []
    (warning,) = check_prompt("a cat", "blurry")
    assert '"blurry"' in warning


def test_every_name_is_understood_as_its_thing() -> None:
    assert len(THINGS) >= 36 and len(COLORS) == 12
    for name, thing in THINGS.items():
        for spelling in (name, *thing.synonyms):
            assert find_object(f"a red {spelling} with a blue hat") == name
        assert all(color in COLORS or color in SHADES for color in thing.natural or ())


# --------------------------------------------------------------------------------------------------------------- world


CORNERS = [(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]


def reach(p: Primitive) -> float:
    """Largest distance from the origin to a primitive's unrounded outline, from dense points on it."""
    turn = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    circle, up = np.stack([np.cos(turn), 0 * turn, np.sin(turn)], 1), np.array([0, 1, 0])
    lean = np.linspace(-np.pi / 2, 3 * np.pi / 2, 48)[:, None, None]
    match p.kind:
        case "ball":
            local = (circle * np.cos(lean) + up * np.sin(lean)) * p.size
        case "box":
            hx, hy, hz, _, top_x, top_z = p.size
            local = np.array([(x * (top_x if y > 0 else 1), y, z * (top_z if y > 0 else 1)) for x, y, z in CORNERS]) * (
                hx,
                hy,
                hz,
            )
        case "cone":
            r0, r1, h, _ = p.size
            local = np.concatenate([circle * r0 - up * h, circle * r1 + up * h])
        case _:
            local = circle * (p.size[0] + p.size[1] * np.cos(lean)) + up * p.size[1] * np.sin(lean)
    return np.linalg.norm(local.reshape(-1, 3) @ p.rotation + p.center, axis=1).max()


@pytest.mark.parametrize("name", THINGS)
def test_recipes_fit_sphere_and_tracer(name: str) -> None:
    scenes = [make_scene(np.random.default_rng(seed), name) for seed in range(50)]
    pack(scenes, "cpu")  # refuses more primitives than it has room for
    sizes = [max(reach(p) for p in scene.primitives if not p.cut) for scene in scenes[::5]]
    assert max(sizes) <= 1.04 * RADIUS  # where the tracer's rays begin
    assert min(sizes) >= 0.8 * RADIUS
    assert len({scene.primitives[0].size for scene in scenes}) == 50  # proportions vary
    assert all(math.isfinite(v) and v > 0 for scene in scenes for p in scene.primitives for v in p.size[:3])


def test_make_scene_seed_and_arguments() -> None:
    first, again = (make_scene(np.random.default_rng(4)) for _ in range(2))
    assert (first.name, first.color, first.attribute, first.hat) == (
        again.name,
        again.color,
        again.attribute,
        again.hat,
    )
    assert all(np.array_equal(p.center, q.center) for p, q in zip(first.primitives, again.primitives, strict=True))
    scenes = [make_scene(np.random.default_rng(seed), "cat", "purple", plain=True) for seed in range(30)]
    assert {(s.name, s.color, s.attribute, s.hat) for s in scenes} == {("cat", "purple", None, None)}
    body = [next(p.color for p in s.primitives if p.main) for s in scenes]
    assert np.abs(np.array(body) - COLORS["purple"]).max() < 0.12
    free = [make_scene(np.random.default_rng(seed)) for seed in range(400)]
    assert {s.attribute for s in free} == {None, "tall", "wide", "striped", "spotted"}
    assert {s.color for s in free} == {None, *COLORS} and sum(s.hat is not None for s in free) > 5


def test_tall_and_wide_things_are() -> None:
    def height_to_width(attribute: str | None) -> float:
        scenes = [make_scene(np.random.default_rng(seed), "house") for seed in range(60)]
        centers = [np.array([p.center for p in s.primitives]) for s in scenes if s.attribute == attribute]
        return float(np.mean([np.ptp(c[:, 1]) / np.ptp(c[:, 0]) for c in centers]))

    assert height_to_width("tall") > 1.2 * height_to_width(None) > 1.2**2 * height_to_width("wide")


# ------------------------------------------------------------------------------------------------------------ captions


@pytest.mark.parametrize(
    ("polar", "azimuth", "view"),
    [
        (75, 0, "front"), (75, -44, "front"), (75, 361, "front"), (75, 46, "side"), (75, -90, "side"),
        (75, 134, "side"), (75, 136, "back"), (75, -180, "back"), (75, 180, "back"), (30, 0, "overhead"),
        (5, 170, "overhead"), (31, 0, "front"),
    ],
)  # fmt: skip
def test_the_view_that_a_caption_names(polar: float, azimuth: float, view: str) -> None:
    assert view_of(polar, azimuth) == view


def test_the_border_between_two_views_varies() -> None:
    def seen(azimuth: float) -> set[str]:
        return {view_of(75, azimuth, rng=np.random.default_rng(seed)) for seed in range(60)}

    assert seen(44) == seen(46) == {"front", "side"} and seen(39) == {"front"} and seen(51) == {"side"}
    assert seen(134) == seen(136) == {"side", "back"} and seen(129) == {"side"} and seen(141) == {"back"}


def test_captions_known_words() -> None:
    rng = np.random.default_rng(0)
    written = set()
    for _ in range(500):
        scene, view = make_scene(rng), (*VIEWS, None)[rng.integers(5)]
        text = caption(scene, view, rng)
        written.add(text)
        assert find_object(text) == scene.name and check_prompt(text) == []
        assert text.endswith(f", {view} view") if view else "view" not in text
        assert scene.attribute is None or f" {scene.attribute} " in f" {text}"
        assert (f" a {scene.hat} hat" in text) if scene.hat else " with " not in text
    assert any(text.startswith("a photo of an ") for text in written)
    assert any("wearing" in text for text in written) and any(" grey " in text for text in written)


# ---------------------------------------------------------------------------------------------------------------- data


class Here:
    """A pool of workers that runs in this process."""

    def submit(self, function, *arguments):
        result = function(*arguments)
        return type("Job", (), {"result": lambda self: result})()


@pytest.fixture
def few(monkeypatch) -> None:
    monkeypatch.setattr(dataset, "BATCH", 8)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_rendered_batches_repeat(few: None) -> None:
    drawn = list(dataset.rendered(5, 1, 2, 16, torch.device("cpu"), Here()))
    assert len(drawn) == 2
    again = next(dataset.rendered(5, 1, 1, 16, torch.device("cpu"), Here()))
    other = next(dataset.rendered(6, 1, 1, 16, torch.device("cpu"), Here()))
    assert torch.equal(again.images, drawn[0].images) and again.captions == drawn[0].captions
    assert not torch.equal(other.images, drawn[0].images)
    for batch in drawn:
        assert batch.images.shape == (8, 16, 16, 3) and batch.images.dtype == torch.uint8
        assert batch.labels.shape == (8, 3) and batch.labels.dtype == np.int16
        assert batch.images.float().std(dim=(1, 2)).sum(-1).min() > 10  # something is there
        for texts, (thing, color, view) in zip(batch.captions, batch.labels, strict=True):
            assert len(texts) == dataset.CAPTIONS and "view" not in texts[-1]
            assert all(find_object(text) == list(THINGS)[thing] for text in texts)
            assert 0 <= color <= dataset.NATURAL and 0 <= view < len(VIEWS)
    assert np.array_equal(drawn[0].labels[:, :2], drawn[1].labels[:, :2])  # the same objects from elsewhere
    assert not torch.equal(drawn[0].images, drawn[1].images)


def test_labels_say_what_the_captions_say(few: None, monkeypatch) -> None:
    monkeypatch.setattr(dataset, "BATCH", 300)
    _, _, ((camera, _, _, captions, labels),) = dataset._draw(1, 1)
    spelled = {"grey": "gray", "teal": "cyan", "turquoise": "cyan", "violet": "purple", "golden": "yellow"}
    certain = 0
    for (polar, azimuth, *_), texts, (_, color, view) in zip(camera.T, captions, labels, strict=True):
        head = texts[0].split(" with ")[0].split(" wearing ")[0].split(",")[0].split()
        named = [spelled.get(word, word) for word in head if spelled.get(word, word) in COLORS]
        assert named == ([] if color == dataset.NATURAL else [list(COLORS)[color]])
        assert VIEWS[view] == view_of(polar, azimuth)
        if abs(abs(abs(azimuth) - 90) - 45) > BORDER:  # nearer to a border a caption may call it either
            certain += 1
            assert texts[0].endswith(f", {VIEWS[view]} view")
    assert certain > 150 and len(set(labels[:, 2])) == len(VIEWS)


# --------------------------------------------------------------------------------------------------- the shipped model


@pytest.fixture(scope="module")
def dream_mini():
    return load_components(MODEL_FOLDER, "cpu", need_vae_decoder=True)


def test_model_size_and_dtype() -> None:
    files = [path for path in MODEL_FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 24e6
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert max(path.stat().st_size for path in weights) <= 12e6
    for path in weights:
        with safe_open(path, framework="pt") as file:
            assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}, path
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt", ".md", ".png"}  # nothing pickled


def test_the_model_loads_as_any_other(dream_mini) -> None:
    assert dream_mini.name == "dream-mini"
    assert (dream_mini.image_size, dream_mini.latent_size, dream_mini.latent_channels) == (128, 32, 4)
    assert (dream_mini.prediction_type, dream_mini.process.num_timesteps) == ("v_prediction", 1000)
    stored = json.loads((MODEL_FOLDER / "vae" / "config.json").read_text())
    assert dream_mini.scaling_factor == stored["scaling_factor"] != 0.18215  # its own, from its own data
    assert dream_mini.shift_factor == 0
    assert 6e6 < sum(p.numel() for p in dream_mini.unet.parameters()) < 10e6
    assert dream_mini.process.alphas_cumprod[-1] < 0.01 and dream_mini.process.alphas_cumprod[0] > 0.99
    assert len(dream_mini.tokenizer) == dream_mini.text_encoder.config.vocab_size


def is_one_token(tokenizer, word: str) -> bool:
    start, *inside, end = tokenizer(word).input_ids
    return len(inside) == 1 and (start, end) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_tokenizer_known_words(dream_mini, tmp_path) -> None:
    fresh = save_tokenizer(tmp_path / "fresh")
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
    save_tokenizer(tmp_path / "again")
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()


def test_embedding_depends_on_words(dream_mini) -> None:
    car, again, apple = dream_mini.embed(["a red car", "a red car", "a red apple"])
    assert torch.equal(car, again) and error(apple, car.double()) > 0.1
    assert car.shape == (24, dream_mini.unet.config.cross_attention_dim)


def test_sample_colour_of_prompt(dream_mini) -> None:
    names = ["red", "green", "blue", "yellow"]
    cond = dream_mini.embed([f"a {color} apple, front view" for color in names])
    uncond = dream_mini.embed([""]).expand(len(names), -1, -1)
    images = sample(dream_mini, cond, uncond, steps=6, guidance_scale=4.0, generator=torch.Generator().manual_seed(0))
    assert images.shape == (4, 3, 128, 128)
    middle = images[:, :, 56:80, 52:76].mean(dim=(2, 3))  # on the apple, whatever the background
    nearest = torch.cdist(middle, torch.tensor([COLORS[color] for color in names])).argmin(1)
    assert nearest.tolist() == [0, 1, 2, 3], middle


def test_autoencoder_keeps_an_image(dream_mini, views) -> None:
    scene = make_scene(np.random.default_rng(3), "duck", "yellow", plain=True)
    image = views([scene], [30.0], 128, background=0.5).permute(0, 3, 1, 2)
    with torch.no_grad():
        latent = dream_mini.vae.encode(image * 2 - 1).latent_dist.mean
        back = dream_mini.vae.decode(latent).sample / 2 + 0.5
    assert 0.3 < (latent * dream_mini.scaling_factor).std() < 3  # about 1 over all images
    assert -10 * torch.log10((back - image).square().mean()) > 22  # dB


def test_kinds_are_all_drawn() -> None:
    """Every kind of primitive occurs in the world."""
    used = {p.kind for name in THINGS for p in make_scene(np.random.default_rng(0), name).primitives}
    assert used == set(KINDS)


def test_save_model_without_paths(tmp_path) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    model.make_vae().save_pretrained(tmp_path / "cache")
    vae = model.AutoencoderKL.from_pretrained(tmp_path / "cache")
    assert str(tmp_path) in vae.to_json_string()  # what diffusers would write
    parts = (model.make_text_encoder(tokenizer), model.make_unet(), vae)
    model.save_model(tmp_path / "out", tokenizer, *parts, model.make_scheduler())
    for folder in (tmp_path / "out", MODEL_FOLDER):
        for config in folder.glob("*/config.json"):
            assert "_name_or_path" not in json.loads(config.read_text()), config
    assert load_components(tmp_path / "out", "cpu").latent_size == model.LATENT
