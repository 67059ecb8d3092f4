"""Every picture is drawn, in its size, and shows what it should."""

import numpy as np
import torch
from conftest import EVALUATOR, add_condition, assert_picture, run, write_csv, write_parts
from PIL import Image

from models import detector, figures, images


def test_every_picture_is_written_in_its_size_and_is_not_blank(judged):
    add_condition(judged)
    assert run(judged, EVALUATOR, WORKERS=0).status == 0
    sizes = {
        ".png": (624, 528),
        "_curves.png": (1320, 576),
        "_mistakes.png": (1440, 1560),
        "_conditions.png": (840, 268),
    }
    for ending, size in sizes.items():
        assert_picture((judged / f"test_data/test{ending}").read_bytes(), size)


def test_activation_map_lights_up_where_the_image_differs():
    facts = {"mean": [0.4] * 3, "std": [0.2] * 3}
    torch.manual_seed(0)
    model = detector.make_network().eval()
    with torch.no_grad():  # features of random weights, of which the head takes those that answer to the bright patch
        pixels = torch.full((3, 256, 256), 100, dtype=torch.uint8)
        pixels[:, 20:60, 180:240] = 255
        kept = []
        hook = model.layer4.register_forward_hook(lambda *results: kept.append(results[-1][0]))
        model(images.to_input(pixels[None].float(), **facts, white=255))
        hook.remove()
        contrast = kept[0][:, :2, 5:].mean((1, 2)) - kept[0][:, 4:, :4].mean((1, 2))
        model.fc.weight.copy_(torch.stack([contrast, -contrast]))
    found = figures.map_activations(detector.Detector(model, facts), pixels)
    assert (found.shape, found.max()) == ((256, 256), 1)
    assert found[10:70, 170:250].mean() > 2 * found[128:, :128].mean()


def test_learning_curves_are_drawn():
    row = {"train_loss": 0.5, "val_loss": 0.4, "val_balanced_accuracy": 0.8, "val_auc": 0.9}
    history = [{**row, "epoch": epoch} for epoch in (1, 2, 3)]
    assert_picture(figures.draw_learning_curves(history, 2), (1320, 480))


def test_timeline_shows_a_splice(judged):
    write_parts(judged / "data/unknown/splice", 1, [False, False, True, False])
    names = [f"unknown/splice__clean_{n}.png" for n in (1, 2, 3, 4)]
    write_csv(judged / "test_data/test.csv", [["img_path"], *([name] for name in names)])
    assert run(judged, EVALUATOR, WORKERS=0).status == 0
    with Image.open(judged / "test_data/test_timeline.png") as image:
        assert image.size == (1320, 300)
        pixels = np.asarray(image.convert("RGB"), int)
    red, blue = (np.abs(pixels - colour).sum(2) < 30 for colour in ([213, 94, 0], [0, 114, 178]))
    columns = np.flatnonzero(red.sum(0) > 2)
    middle = (columns.min() + columns.max()) / 2
    left, right = np.flatnonzero(blue.sum(0) > 2)[[0, -1]]
    assert 0.5 < (middle - left) / (right - left) < 0.75  # the third of four parts
    assert np.flatnonzero(red.any(1)).mean() < np.flatnonzero(blue.any(1)).mean() - 50  # high up
