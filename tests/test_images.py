"""Decoding: every mode and size of image reaches the network as the pixels that people see."""

import numpy as np
import pytest
import torch
from conftest import EVALUATOR, O0, QUICK, TRAINER, evaluate_text, make_project, read_csv, run, write_csv
from PIL import Image

from models import images

RAMP = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (64, 1))
COLOUR = np.stack([RAMP, RAMP.T, 255 - RAMP], axis=2)
MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK"]


def test_fast_decoding_keeps_within_a_grey_level_of_the_slow_way(tmp_path):
    draw = np.random.default_rng(0)
    levels = draw.integers(0, 256, (1155, 2325, 4), dtype=np.uint8)
    levels[:, ::2] = levels[:, 1::2][:, : levels[:, ::2].shape[1] - 1].repeat(2, axis=1)[:, : levels[:, ::2].shape[1]]
    for mode in ("RGBA", "RGB", "L", "P"):
        Image.fromarray(levels).convert("RGB").convert(mode).save(tmp_path / "a.png")
        with Image.open(tmp_path / "a.png") as image:
            slow = np.asarray(image.convert("RGB").resize((224, 224), Image.BILINEAR)).astype(int)
        fast = images.read_image(str(tmp_path / "a.png"), 224).permute(1, 2, 0).numpy().astype(int)
        assert np.abs(fast - slow).mean() < 0.1
        assert np.abs(fast - slow).max() <= 1


def save_in_mode(mode, path):
    """Save the ramp in a mode; return the RGB that is expected, uint8 (64, 64, 3)."""
    grey = np.repeat(RAMP[:, :, None], 3, axis=2)
    if mode == "1":
        Image.fromarray(RAMP > 127).save(path)
        return np.where(grey > 127, 255, 0)
    if mode == "I;16":
        Image.fromarray(RAMP.astype(np.uint16) * 257).save(path)
        return grey
    if mode in ("L", "LA"):
        Image.fromarray(RAMP).convert(mode).save(path)
        return grey
    if mode == "P":
        image = Image.fromarray(RAMP, "P")
        image.putpalette([value for level in range(256) for value in (level, 255 - level, 0)])
        image.save(path)
        return np.stack([RAMP, 255 - RAMP, RAMP * 0], axis=2)
    Image.fromarray(COLOUR).convert(mode).save(path, **({"quality": 100} if mode == "CMYK" else {}))
    return COLOUR


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated")
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_the_expected_pixels(mode, tmp_path):
    path = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    expected = save_in_mode(mode, path).astype(int)
    with Image.open(path) as image:
        assert image.mode == mode or (mode, image.mode) == ("I;16", "I")
    pixels = images.read_image(str(path), 64)
    assert (pixels.dtype, pixels.shape) == (torch.uint8, (3, 64, 64))
    tolerance = 4 if mode == "CMYK" else 0
    assert np.abs(pixels.permute(1, 2, 0).numpy().astype(int) - expected).max() <= tolerance


def test_big_sixteen_bit_values_are_scaled_not_clipped(tmp_path):
    Image.fromarray(np.array([[0, 257, 32896, 65535]] * 4, np.uint16)).save(tmp_path / "a.png")
    assert images.read_image(str(tmp_path / "a.png"), 4)[0, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("size", [(1, 1), (4000, 3000), (64, 7)])
def test_every_size_is_resized(size, tmp_path):
    Image.new("RGB", size, (10, 200, 90)).save(tmp_path / "a.png")
    pixels = images.read_image(str(tmp_path / "a.png"), 48)
    assert pixels.shape == (3, 48, 48)
    assert (pixels == torch.tensor([10, 200, 90])[:, None, None]).all()


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_in_exif_is_heeded(tmp_path, suffix, orientation):
    image = Image.fromarray(np.kron([[0, 80, 160], [40, 120, 240]], np.ones((16, 16))).astype(np.uint8))
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / f"a.{suffix}", exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    turned = np.asarray(image)
    if orientation > 4:
        turned = turned.T
    turned = turned[:: -1 if orientation in (3, 4, 7, 8) else 1, :: -1 if orientation in (2, 3, 6, 7) else 1]
    expected = Image.fromarray(np.ascontiguousarray(turned)).convert("RGB")
    expected.save(tmp_path / "b.png")
    seen, wanted = (images.read_image(str(tmp_path / name), 64).int() for name in (f"a.{suffix}", "b.png"))
    assert (seen - wanted).abs().max() <= (6 if suffix == "jpg" else 0)


def test_damaged_exif_turns_nothing(tmp_path):
    Image.fromarray(COLOUR).save(tmp_path / "a.png", exif=b"Exif\0\0no such thing")
    assert (images.read_image(str(tmp_path / "a.png"), 64).permute(1, 2, 0).numpy() == COLOUR).all()


def test_floating_point_images_are_refused_with_a_reason(tmp_path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="save it with 8 or 16 bits"):
        images.read_image(str(tmp_path / "a.tif"), 8)


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated")
def test_all_modes_train_and_evaluate(tmp_path):
    folder = make_project(tmp_path, recordings=6)
    rows = [["img_path", "actual_output"]]
    for number, mode in enumerate(MODES):
        name = f"original/combined/m{number}__{'a.jpg' if mode == 'CMYK' else 'a.png'}"
        save_in_mode(mode, folder / "data" / name)
        rows.append([name, "Original"])
    for number, size in enumerate([(1, 1), (4000, 3000)]):
        name = f"deepfake/combined/s{number}__a.png"
        Image.new("RGB", size, (10, 200, 90)).save(folder / "data" / name)
        rows.append([name, "Deepfake"])
    assert run(folder, TRAINER, **QUICK).status == 0
    write_csv(folder / "test_data/test.csv", rows)
    assert run(folder, EVALUATOR, WORKERS=0).status == 0
    assert all(row["predicted_output"] for row in read_csv(folder / "test_data/test.csv"))


def test_transparent_margins_are_seen_on_white(tmp_path):
    figure = np.dstack([COLOUR, np.where(RAMP > 100, 255, 0).astype(np.uint8)])
    figure[RAMP <= 100, :3] = (200, 0, 0)  # hidden under the transparency
    Image.fromarray(figure, "RGBA").save(tmp_path / "a.png")
    pixels = images.read_image(str(tmp_path / "a.png"), 64).permute(1, 2, 0).numpy()
    assert (pixels[RAMP <= 100] == 255).all()
    assert (pixels[RAMP > 100] == COLOUR[RAMP > 100]).all()


def test_fingerprint_survives_saving_anew_and_tells_images_apart(tmp_path):
    Image.fromarray(COLOUR).save(tmp_path / "a.png")
    Image.fromarray(COLOUR).save(tmp_path / "b.bmp")
    other = COLOUR.copy()
    other[3, 5, 1] += 1
    Image.fromarray(other).save(tmp_path / "c.png")
    prints = [
        images.take_fingerprint(images.read_image(str(tmp_path / n), 64).numpy()) for n in ("a.png", "b.bmp", "c.png")
    ]
    assert prints[0] == prints[1] != prints[2]


def test_audio_is_sent_to_the_maker(judged):
    (judged / "data/a.wav").write_bytes(b"RIFF")
    outcome = evaluate_text(judged, f"img_path\na.wav\n{O0}\n")
    assert "it is audio: make images of it with data/make_spectrograms.py" in outcome.err
