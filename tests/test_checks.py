"""Leak, format and shortcut checks: what is as in training passes, what is not is noticed."""

import shutil

import numpy as np
import pandas
import pytest
import torch
from conftest import EVALUATOR, QUICK, TRAINER, make_image, read_checkpoint, read_csv, read_summary, run, write_csv
from matplotlib import colormaps
from PIL import Image

from models import checks
from models.detector import Score
from models.images import take_fingerprint
from models.pixel_cache import LOOKS


def paint_voice(path, number, size=64):
    """Write a picture like a spectrogram in magma: lines that rise and fall, denser and brighter towards the bottom."""
    draw = np.random.default_rng(number)
    time = np.arange(size) / size
    bend = np.sin(2 * np.pi * (draw.uniform(1, 2) * time + draw.random()))
    rows = np.arange(size)[:, None]
    lines = (
        np.cos(2 * np.pi * rows / (6 + bend))
        * (0.1 + 0.3 * rows / size)
        * (1 - (3 * time + draw.random()) % 1)  # sounds begin at once and die away
    )
    levels = 0.4 + lines + 0.05 * draw.normal(size=(size, size))
    Image.fromarray((colormaps["magma"](np.clip(levels, 0, 1))[:, :, :3] * 255).astype(np.uint8)).save(path)


def test_leak_is_found_by_file_name_too_where_a_column_names_the_recordings():
    table = pandas.DataFrame({"path": ["a", "b"], "label": ["Original"] * 2, "recording": ["x", "y"]})
    table["recording_by_name"] = ["seen", "new"]
    facts = {"seen_images": torch.tensor([]), "seen_recordings": torch.tensor([take_fingerprint(b"seen")])}
    found = checks.check_seen(table.assign(llr=1.0, is_fake=False), facts, dict.fromkeys("ab", Score(0, 0, 1, "")))
    assert found["rows_as_recording"] == 1


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
    "backwards": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
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
        paint_voice(path, number)
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


def test_images_seen_in_training_are_found_under_any_name(judged):
    with Image.open(judged / "data/original/combined/o9__clean_1.png") as image:
        image.save(judged / "data/new_name.bmp")
    make_image(judged / "data/d9__noise_7.png", 12345, fake=True)
    rows = [["img_path", "actual_output"], ["new_name.bmp", "original"], ["d9__noise_7.png", "deepfake"]]
    rows += [[f"{kind}/combined/{kind[0]}{n}__clean_1.png", kind] for kind in ("deepfake", "original") for n in (0, 1)]
    write_csv(judged / "test_data/test.csv", rows)
    assert run(judged, EVALUATOR).status == 0
    (entry,) = read_summary(judged)
    assert (entry["seen"]["rows_as_image"], entry["seen"]["rows_as_recording"]) == (1, 1)
    assert entry["seen"]["without_them"]["rows_measured"] == 4
    assert "1 rows were trained or validated on, 1 more show a recording that was" in entry["report"]
    assert "were used in training" in entry["report"].split("\n\n")[0].replace("\n", " ")


def test_test_set_of_the_split_is_not_seen(judged):
    run(judged, EVALUATOR)
    (entry,) = read_summary(judged)
    assert entry["seen"] == {"rows_as_image": 0, "rows_as_recording": 0, "without_them": None}


def test_checkpoint_that_does_not_say_what_it_saw_is_doubted(judged):
    path = judged / "models/experiments/best_laundered_processed.pth"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["seen_images"], checkpoint["seen_recordings"]
    torch.save(checkpoint, path)
    run(judged, EVALUATOR)
    (entry,) = read_summary(judged)
    assert entry["seen"] is None
    assert "train/test overlap could not be checked" in entry["report"].replace("\n", " ")


def make_looks(seed=0, images=400):
    """Looks, labels and groups in which nothing tells the class."""
    draw = np.random.default_rng(seed)
    looks = np.stack(
        [np.full(images, 224), np.full(images, 224), draw.normal(0.4, 0.1, images), draw.random(images)], 1
    )
    return looks.astype(np.float32), np.arange(images) % 2, np.arange(images) // 4


def test_shortcut_check_is_silent_where_nothing_tells_the_class(capsys):
    results = checks.check_shortcuts(*make_looks())
    assert set(results) == {*LOOKS, "all together"}
    assert max(results.values()) < 0.65
    assert not capsys.readouterr().out


@pytest.mark.parametrize("place", range(4))
def test_shortcut_check_names_what_tells_the_class(place, capsys):
    looks, labels, groups = make_looks()
    looks[:, place] += labels * 3 * (looks[:, place].std() or 1)
    results = checks.check_shortcuts(looks, labels, groups)
    assert results[LOOKS[place]] > 0.9
    assert LOOKS[place] in capsys.readouterr().out


def test_shortcut_check_needs_two_recordings_of_each_class():
    looks, labels, _ = make_looks(images=6)
    assert checks.check_shortcuts(looks, labels, np.array([0, 1, 0, 1, 0, 1])) is None


def test_trainer_warns_of_images_of_another_size_in_one_class(project):
    for path in (project / "data/original/combined").iterdir():
        with Image.open(path) as image:
            larger = image.resize((80, 80))
        larger.save(path)
    outcome = run(project, TRAINER, **QUICK)
    assert "WARNING: image size or brightness alone predicts the class (AUC: original width 1.00" in outcome.out
    checkpoint = read_checkpoint(project, "final")
    assert checkpoint["shortcuts"]["original height"] == 1.0


@pytest.mark.parametrize(("interval", "recordings", "words"), [((0.1, 0.2), 300, "wide"), ((0, 0), 2, "too narrow")])
def test_few_recordings_are_a_caveat_however_narrow_their_interval(interval, recordings, words):
    entry = {"intervals_95": {"eer": interval}, "recordings": recordings, "eer": 0.1, "half_total_error": 0.1}
    entry |= {
        "rows_repeated": 0,
        "seen": {"rows_as_image": 0, "rows_as_recording": 0},
        "format": None,
        "shortcuts": None,
    }
    assert words in checks.list_caveats(entry)[0]
    entry |= {"intervals_95": {"eer": (0.1, 0.12)}, "recordings": 300}
    assert len(checks.list_caveats(entry)) == 1
