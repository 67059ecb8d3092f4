"""The format check: images rendered as those of training pass, others are noticed."""

import shutil

import numpy as np
import pytest
import torch
from conftest import EVALUATOR, QUICK, TRAINER, read_csv, run, write_csv
from matplotlib import colormaps
from PIL import Image


def make_voice(path, number, size=64):
    """Write a picture like a spectrogram in magma: lines that rise and fall, denser and brighter towards the bottom."""
    draw = np.random.default_rng(number)
    time = np.arange(size) / size
    bend = np.sin(2 * np.pi * (draw.uniform(1, 2) * time + draw.random()))
    rows = np.arange(size)[:, None]
    lines = (
        np.cos(2 * np.pi * rows / (6 + bend))
        * (0.1 + 0.3 * rows / size)
        * (np.sin(9 * time + draw.random() * 6) > -0.5)
    )
    levels = 0.4 + lines + 0.05 * draw.normal(size=(size, size))
    Image.fromarray((colormaps["magma"](np.clip(levels, 0, 1))[:, :, :3] * 255).astype(np.uint8)).save(path)


def paint_again(image, name):
    magma = colormaps["magma"](np.linspace(0, 1, 256))[:, :3].sum(1)
    levels = np.interp(np.asarray(image).sum(2) / 255, magma, np.linspace(0, 1, 256))
    return Image.fromarray((colormaps[name](levels)[:, :, :3] * 255).astype(np.uint8))


def put_into_figure(image):
    figure = Image.new("RGB", (100, 90), "white")
    figure.paste(image, (20, 10))
    return figure


FAULTS = {
    "grey instead of magma": lambda image: paint_again(image, "gray"),
    "viridis instead of magma": lambda image: paint_again(image, "viridis"),
    "upside down": lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
    "margins": put_into_figure,
    "half the frequency range": lambda image: image.crop((0, 32, 64, 64)).resize((64, 64)),
}


@pytest.fixture(scope="module")
def voices(tmp_path_factory):
    """A project with pictures like spectrograms, trained; and the evaluator's list."""
    folder = tmp_path_factory.mktemp("voices")
    for number in range(240):
        path = folder / "data" / ("deepfake", "original")[number % 2] / f"v{number}__clean.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        make_voice(path, number)
    rows = [
        [f"{kind}/v{number}__clean.png"]
        for number in range(200, 240)
        for kind in (("deepfake", "original")[number % 2],)
    ]
    write_csv(folder / "test_data/test.csv", [["img_path"], *rows])
    outcome = run(folder, TRAINER, **{**QUICK, "IMAGE_SIZE": 64, "BATCH_SIZE": 64})
    assert outcome.status == 0, outcome.err
    return folder


def test_format_check_is_silent_on_images_rendered_alike(voices):
    outcome = run(voices, EVALUATOR, WORKERS=0)
    assert outcome.status == 0, outcome.err
    assert "rendered unlike the training images (validation" not in outcome.out


@pytest.mark.parametrize("fault", FAULTS)
def test_format_check_warns_of_images_rendered_otherwise(voices, fault, tmp_path):
    shutil.copytree(voices, tmp_path / "copy")
    for row in read_csv(tmp_path / "copy/test_data/test.csv"):
        path = tmp_path / "copy/data" / row["img_path"]
        with Image.open(path) as image:
            changed = FAULTS[fault](image.convert("RGB"))
        changed.save(path)
    outcome = run(tmp_path / "copy", EVALUATOR, WORKERS=0)
    assert outcome.status == 0, outcome.err
    assert "of 40 images were rendered unlike the training images (validation: 1%)" in outcome.out
    assert "Verdicts on them cannot be relied on" in outcome.out


def test_report_names_checks_for_which_the_checkpoint_holds_nothing(judged):
    path = judged / "models/experiments/best_laundered_processed.pth"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["appearance"], checkpoint["shortcuts"]
    torch.save(checkpoint, path)
    outcome = run(judged, EVALUATOR, WORKERS=0)
    assert "The checkpoint holds nothing for these checks: shortcut, format" in outcome.out
