"""The images of a run: found, held out, split by recording or folder, weighed."""

import os
import shutil
import zlib
from unicodedata import normalize

import numpy as np
import pytest
from conftest import D0, QUICK, TRAINER, assert_refused, make_image, read_csv, run, run_process, write_csv
from PIL import Image

import train_deepfake_detector as trainer
from models import dataset
from models.pixel_cache import PixelCache
from models.runtime import Team

SETTINGS = {
    "IMAGE_SIZE": 32,
    "WORKERS": 0,
    "MAX_UNREADABLE": 0.1,
    "VAL_FRACTION": 0.25,
    "SEED": 0,
    "RECORDING_PATTERN": trainer.RECORDING_PATTERN,
}


def load_data(folder, csvs, **settings):
    """Run the trainer's own choice of images."""
    images = dataset.find_images(folder / "data")
    images.cache = PixelCache(folder / "models/cache", 32, 1e9)
    listed = dataset.list_holdout([folder / path for path in csvs], folder / "data", "utf-8")
    settings = {**SETTINGS, **settings}
    return dataset.split_images(images, dataset.choose_images(images, listed, settings, Team()), settings)


def train_indices(folder, csvs, **settings):
    """Run the trainer's own choice of images; return the paths of both sides."""
    data = load_data(folder, csvs, **settings)
    return [[side.dataset.samples[i][0] for i in side.indices] for side in (data.train, data.val)]


def names(paths):
    return {path.rpartition("/")[2] for path in paths}


def test_nothing_listed_in_test_csv_is_used(project):
    make_image(project / "data/original/new/o0__noise.png", 1, fake=False)  # another image of a listed recording
    train, val = train_indices(project, ["test_data/test.csv"])
    listed = {row["img_path"].rpartition("/")[2] for row in read_csv(project / "test_data/test.csv")}
    recordings = {name.partition("__")[0] for name in listed}
    used = names(train) | names(val)
    assert len(used) == 2 * 14 * 2
    assert not used & listed
    assert not {name.partition("__")[0] for name in used} & recordings


def test_copy_of_a_test_image_under_another_name_is_left_out(project, capsys):
    source = project / "data/deepfake/combined/d0__clean_1.png"
    with Image.open(source) as image:
        image.save(project / "data/deepfake/combined/harmless.bmp")
    shutil.copy(source, project / "data/original/combined/other__name.png")
    train, val = train_indices(project, ["test_data/test.csv"])
    assert not {"harmless.bmp", "other__name.png"} & (names(train) | names(val))
    assert "2 copies of listed images" in capsys.readouterr().out


def test_held_out_image_outside_the_data_folder_counts(project, tmp_path):
    outside = tmp_path / "elsewhere" / "secret.png"
    outside.parent.mkdir()
    shutil.copy(project / "data/deepfake/combined/d9__clean_1.png", outside)
    write_csv(project / "more.csv", [["img_path"], [str(outside)]])
    train, val = train_indices(project, ["more.csv"])
    assert "d9__clean_1.png" not in names(train) | names(val)


@pytest.mark.parametrize(
    "cell", ["deepfake\\combined\\d5__clean_1.png", " deepfake/combined/../combined/d5__clean_1.png "]
)
def test_holdout_paths_are_understood_in_every_spelling(project, cell, capsys):
    write_csv(project / "more.csv", [["img_path"], [cell]])
    train_indices(project, ["more.csv"])
    assert (
        "Held out: 1 of 1 listed images, 0 copies of listed images under other names, 1 other"
        in capsys.readouterr().out
    )


def test_blanks_around_the_name_of_the_column_do_not_matter(project, capsys):
    (project / "more.csv").write_text("actual_output, img_path\nDeepfake,deepfake/combined/d5__clean_1.png\n")
    train_indices(project, ["more.csv"])
    assert "Held out: 1 of 1 listed images" in capsys.readouterr().out


@pytest.mark.parametrize(("on_disk", "listed"), [("NFD", "NFC"), ("NFC", "NFD"), ("NFD", "NFD")])
def test_listed_images_are_held_out_whatever_the_unicode_form(project, on_disk, listed, capsys):
    name = "original/größe/й é__clean_1.png"
    for number, folder in enumerate(("größe", "other")):
        path = project / "data" / normalize(on_disk, name.replace("größe", folder).replace("_1", f"_{number}1"))
        make_image(path, 900 + number, fake=False)
    (project / "more.csv").write_text(f"img_path\n{normalize(listed, name.replace('_1', '_01'))}\n", encoding="utf-8")
    train, val = train_indices(project, ["more.csv"])
    assert (
        "Held out: 1 of 1 listed images, 0 copies of listed images under other names, 1 other"
        in capsys.readouterr().out
    )
    assert len(train) + len(val) == 2 * 16 * 2


def test_recordings_and_sources_are_the_same_in_every_unicode_form(project, capsys):
    (project / "more.csv").write_text(f"img_path\n{D0}\noriginal/{normalize('NFC', 'é')}__gone.png\n", encoding="utf-8")
    for kind, form in (("original", "NFD"), ("deepfake", "NFC")):
        make_image(project / "data" / kind / normalize(form, "größe") / "x.png", len(kind), fake=False)
    make_image(project / "data/original" / normalize("NFD", "é__a.png"), 3, fake=False)
    train_indices(project, ["more.csv"])
    said = capsys.readouterr().out
    assert "Held out: 1 of 2 listed images, 0 copies of listed images under other names, 2 other" in said
    assert "1 sources with both classes" in said


def test_holdout_list_most_of_whose_images_are_missing_stops_training(project):
    listed = [row["img_path"] for row in read_csv(project / "test_data/test.csv")]
    for name in listed[:4]:
        (project / "data" / name).unlink()
    assert len(train_indices(project, ["test_data/test.csv"])[0])
    (project / "data" / listed[4]).unlink()
    outcome = run(project, TRAINER, **QUICK)
    assert_refused(
        outcome, "test.csv: 5 of 8 images cannot be found, such as", listed[0], "DATA_DIR", "out of HOLDOUT_CSVS"
    )


def test_missing_holdout_list_is_an_error_that_names_the_way_out(project):
    outcome = run(project, TRAINER, **{**QUICK, "HOLDOUT_CSVS": ["test_data/tset.csv"]})
    assert_refused(outcome, "test_data/tset.csv", "HOLDOUT_CSVS = []")


def test_recordings_and_identical_images_stay_on_one_side(project):
    shutil.copy(project / "data/deepfake/combined/d5__clean_1.png", project / "data/deepfake/combined/d6__noise.png")
    for seed in range(20):
        recordings = [f"r{n // 3}" for n in range(60)] + ["extra"]
        pixels = [*range(60), 0]  # the extra image shows the same as the first
        groups = dataset.group_images(recordings, pixels)
        in_val = dataset.split_by_recording(groups, np.array([n % 2 for n in range(61)]), 0.2, seed)
        sides = {}
        for name, side in zip(recordings, in_val):
            assert sides.setdefault(name, side) == side
        assert sides["extra"] == sides["r0"]
        assert 8 <= in_val.sum() <= 16
    train, val = train_indices(project, [])
    assert names(train).isdisjoint(names(val))
    assert {n.partition("__")[0] for n in names(train)}.isdisjoint({n.partition("__")[0] for n in names(val)})


def test_split_is_stratified_by_class():
    labels = np.array([0] * 900 + [1] * 100)
    in_val = dataset.split_by_recording(np.arange(1000), labels, 0.2, 3)
    assert in_val[labels == 0].sum() == 180
    assert in_val[labels == 1].sum() == 20


def test_few_large_recordings_still_split():
    groups, labels = np.repeat(np.arange(6), 50), np.repeat([0, 0, 0, 1, 1, 1], 50)
    in_val = dataset.split_by_recording(groups, labels, 0.1, 0)
    assert [in_val[labels == c].sum() for c in (0, 1)] == [50, 50]


def test_one_recording_per_class_is_refused():
    with pytest.raises(ValueError, match="RECORDING_PATTERN"):
        dataset.split_by_recording(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 1]), 0.2, 0)


def test_other_folders_hidden_files_and_non_images_are_passed_over(project, capsys):
    make_image(project / "data/audio/x.png", 1, fake=True)
    make_image(project / "data/deepfake/.hidden/x.png", 2, fake=True)
    (project / "data/deepfake/combined/._d1.png").write_bytes(b"x")
    (project / "data/deepfake/combined/notes.txt").write_text("x")
    for name in ("@eaDir/d1.png", "combined/#recycle", "$RECYCLE.BIN/S-1-5", "lost+found", "__MACOSX/data"):
        make_image(project / "data/deepfake" / name / "SYNOPHOTO_THUMB_XL.png", 4, fake=True)
    make_image(project / "data/deepfake/deep/er/y.png", 3, fake=True)
    images = dataset.find_images(project / "data")
    output = capsys.readouterr().out
    assert len(images) == 2 * 16 * 2 + 1
    assert "not a class and are ignored: audio" in output
    assert "Ignored files in the class folders: 1 .txt" in output
    assert "deepfake/deep/er" in output
    assert {label for path, label in images.samples if "/data/deepfake/" in path} == {0}


@pytest.mark.parametrize("kind", ["missing", "empty"])
def test_class_folder_without_images_is_an_error(project, kind):
    shutil.rmtree(project / "data/original")
    if kind == "empty":
        (project / "data/original/combined").mkdir(parents=True)
    outcome = run(project, TRAINER, **QUICK)
    assert_refused(outcome, str(project / "data/original"))


def test_classes_weigh_the_same_within_each_folder_and_on_the_whole():
    folders = ["a"] * 40 + [""] * 100 + ["b"] * 25  # b holds fakes only
    labels = np.array([0] * 30 + [1] * 10 + [0] * 10 + [1] * 90 + [0] * 25)
    weights = dataset.weigh_images(folders, labels)
    sums = {key: weights[[pair == key for pair in zip(folders, labels)]].sum() for key in zip(folders, labels)}
    for label in (0, 1):
        assert weights[labels == label].sum() == pytest.approx(0.5)
        assert sums["", label] / sums["a", label] == pytest.approx((100 / 40) ** 0.5)
    assert sums["b", 0] / sums["a", 0] == pytest.approx(2 * (25 / 40) ** 0.5)


@pytest.mark.parametrize(("sources", "by_source"), [(6, True), (3, False)])
def test_whole_folders_are_held_out_for_validation(tmp_path, sources, by_source, capsys):
    for kind in ("deepfake", "original"):
        for source in [f"s{number}" for number in range(sources)] + [f"{kind}{number}" for number in range(sources)]:
            for number in range(4):
                name = f"{kind}/combined/{source}/{kind[0]}{source}{number}__clean.png"
                make_image(tmp_path / "data" / name, zlib.crc32(name.encode()), fake=kind == "deepfake")
    data = load_data(tmp_path, [])
    folders = [
        {path.split("/")[-2] for path in side}
        for side in [[side.dataset.samples[i][0] for i in side.indices] for side in (data.train, data.val)]
    ]
    assert (not folders[0] & folders[1]) == by_source
    words = (
        f"{sources} sources with both classes; validation holds out whole {'folders' if by_source else 'recordings'}"
    )
    assert words in capsys.readouterr().out


def test_link_to_itself_takes_no_image_twice(project):
    (project / "data/deepfake/combined/loop").symlink_to(project / "data/deepfake")
    (project / "data/original/linked").symlink_to(project / "elsewhere")
    make_image(project / "elsewhere/x.png", 1, fake=False)
    assert len(dataset.find_images(project / "data")) == 2 * 16 * 2 + 1


def test_folder_that_may_not_be_read_is_named(project, monkeypatch):
    walk = os.walk

    def refuse(folder, followlinks, onerror):
        onerror(PermissionError(13, "Permission denied", f"{folder}/locked"))
        return walk(folder, followlinks=followlinks, onerror=onerror)

    monkeypatch.setattr(os, "walk", refuse)
    outcome = run(project, TRAINER, **QUICK)
    assert outcome.status == 1
    assert "left out: [Errno 13] Permission denied: " in outcome.err and "locked" in outcome.err


def test_class_folder_may_differ_in_case_and_others_are_named(project):
    (project / "data/original").rename(project / "data/Original")
    assert len(dataset.find_images(project / "data")) == 2 * 16 * 2
    (project / "data/Original").rename(project / "data/real")
    assert_refused(run(project, TRAINER, **QUICK), "folder not found: ", "it holds deepfake, real")


def test_files_of_other_kinds_are_counted_by_suffix(project, capsys):
    for name in ("a.gif", "b.GIF", "c.avif", "d.jfif"):
        (project / "data/deepfake/combined" / name).write_bytes(b"x")
    dataset.find_images(project / "data")
    assert "Ignored files in the class folders: 1 .avif, 2 .gif, 1 .jfif" in capsys.readouterr().out


def test_equal_names_in_different_folders_are_said_and_a_pattern_tells_them_apart(project, capsys):
    for speaker in ("p1", "p2"):
        make_image(project / f"data/original/{speaker}/000.png", 5 if speaker == "p1" else 6, fake=False)
    load_data(project, [])
    said = capsys.readouterr().out
    assert "1 file names, such as 000.png, are in several folders and count as one recording each" in said
    assert dataset.FOLDER_PATTERN in said
    load_data(project, [], RECORDING_PATTERN=dataset.FOLDER_PATTERN)
    assert "are in several folders" not in capsys.readouterr().out


def test_class_that_is_held_out_whole_is_named(project):
    rows = [["img_path"], *([f"original/combined/{p.name}"] for p in (project / "data/original/combined").iterdir())]
    write_csv(project / "test_data/test.csv", rows)
    assert_refused(run(project, TRAINER, **QUICK), "all 32 images of class Original are held out")


@pytest.mark.slow
def test_listed_images_stay_out_where_file_names_are_not_utf8(project):
    make_image(project / "data/original/combined/\u00e9t\u00e9__clean.png", 1, fake=False)
    write_csv(project / "test_data/test.csv", [["img_path"], ["original/combined/\u00e9t\u00e9__clean.png"]])
    env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    outcome = run_process(project, TRAINER, env=env, **QUICK)
    assert outcome.status == 0, outcome.err
    assert "Held out: 1 of 1 listed images" in outcome.out
