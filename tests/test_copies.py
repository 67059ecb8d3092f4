"""Which image belongs to which recording: names, images that exist, images to set aside."""

import json
import shutil

import numpy as np
import pictures
import pytest
from conftest import MAKER, list_images, make_voice, read_csv, run, write_csv, write_voices, write_wav
from PIL import Image

from models import tables
from train_deepfake_detector import RECORDING_PATTERN as PATTERN


def list_aside(folder):
    """The paths of all images that were set aside."""
    return list_images(folder / "data/set_aside")


def test_images_of_corrected_labels_are_set_aside_in_their_folders(tmp_path):
    audio = tmp_path / "data/audio"
    for number, name in enumerate(("original/a.wav", "original/b.wav", "original/c.wav", "deepfake/d.wav")):
        write_wav(audio / name, make_voice(number))
    assert run(tmp_path, MAKER, CONDITIONS=("clean", "noise"), FAKES=("lpc",)).status == 0
    (audio / "original/b.wav").rename(audio / "deepfake/b.wav")
    (audio / "original/c.wav").unlink()
    outcome = run(tmp_path, MAKER, CONDITIONS=("clean",), FAKES=("lpc",))
    assert (outcome.status, outcome.err) == (0, "")
    assert list_images(tmp_path / "data/original") == ["combined/a__clean.png"]
    assert list_images(tmp_path / "data/deepfake") == [
        *("combined/a__lpc.png", "combined/b__clean.png", "combined/d__clean.png"),
    ]
    moved = [f"deepfake/combined/{name}.png" for name in ("b__lpc", "c__lpc", "d__noise")]
    moved += [f"original/combined/{a}__{b}.png" for a in "abc" for b in ("clean", "noise") if a + b != "aclean"]
    assert list_aside(tmp_path) == moved
    for line in (
        "3 images whose recording was moved to the other class: ",
        "3 images whose recording is gone: ",
        "2 images that CONDITIONS and FAKES no longer ask for",
    ):
        assert f"Set aside in data/set_aside/: {line}" in outcome.out
    assert "Set aside" not in run(tmp_path, MAKER, CONDITIONS=("clean",), FAKES=("lpc",)).out


def test_nothing_is_set_aside_that_this_folder_of_recordings_does_not_account_for(tmp_path):
    write_voices(tmp_path / "data/audio/original", ["a", "b"])
    write_voices(tmp_path / "data/audio/deepfake", ["d"])
    write_voices(tmp_path / "data/other/original", ["x"])
    assert run(tmp_path, MAKER).status == 0
    shutil.rmtree(tmp_path / "data/audio/deepfake")
    outcome = run(tmp_path, MAKER)
    assert "deepfake: 1 images stay although their recordings are gone: no recording at all is left in " in outcome.out
    assert run(tmp_path, MAKER, AUDIO_DIR="other").status == 0
    image = tmp_path / "data/original/combined/a__clean.png"
    with Image.open(image) as opened:  # as the demo's images are: they note no recording
        notes = json.loads(opened.text["spectrogram"])
        pixels = np.array(opened)
    image.with_name("demo__clean.png").write_bytes(
        pictures.encode_png(pixels, {name: notes[name] for name in ("settings", "parts", "recording_crc32")})
    )
    assert run(tmp_path, MAKER).status == 0
    assert list_aside(tmp_path) == []
    assert len(list_images(tmp_path / "data")) == 5


def test_images_set_aside_twice_replace_nothing(tmp_path):
    for number in (1, 2):
        write_voices(tmp_path / f"data/audio/original/{number}", ["a"])
        write_wav(tmp_path / "data/audio/original/b.wav", make_voice(number))
        assert run(tmp_path, MAKER).status == 0
        (tmp_path / "data/audio/original/b.wav").unlink()
        assert run(tmp_path, MAKER).status == 0
    assert list_aside(tmp_path) == ["original/combined/b__clean.2.png", "original/combined/b__clean.png"]


def test_judged_images_of_deleted_recordings_stay(tmp_path):
    folder = tmp_path / "data/audio/unknown"
    write_voices(folder, ["a", "b", "c"])
    assert run(tmp_path, MAKER).status == 0
    rows = read_csv(tmp_path / "test_data/unknown.csv")
    write_csv(
        tmp_path / "test_data/unknown.csv",
        [
            [*rows[0], "predicted_output"],
            *([*row.values(), "Original" * (number == 0)] for number, row in enumerate(rows)),
        ],
    )
    for name in "ab":
        (folder / f"{name}.wav").unlink()
    outcome = run(tmp_path, MAKER)
    assert outcome.status == 0
    assert "unknown: 1 images stay although their recordings are gone: unknown.csv holds verdicts" in outcome.out
    assert list_aside(tmp_path) == ["unknown/b__clean.png"]
    assert [row["recording"] for row in read_csv(tmp_path / "test_data/unknown.csv")] == ["a", "c"]


def test_file_to_convert_does_not_keep_images_of_deleted_recordings(tmp_path):
    folder = tmp_path / "data/audio/original"
    write_voices(folder, ["a", "b"])
    (folder / "c.m4a").write_bytes(b"x")
    assert run(tmp_path, MAKER).status == 1
    (folder / "a.wav").unlink()
    assert run(tmp_path, MAKER).status == 1
    assert list_aside(tmp_path) == ["original/combined/a__clean.png"]


def test_speakers_that_were_tested_on_stay_so(tmp_path):
    for kind in ("original", "deepfake"):
        for speaker in range(4):
            write_wav(tmp_path / f"data/audio/{kind}/{speaker}/x.wav", make_voice(speaker))
    assert run(tmp_path, MAKER).status == 0
    before = {row["speaker"] for row in read_csv(tmp_path / "test_data/test_own.csv")}
    for kind in ("original", "deepfake"):
        for speaker in range(4, 20):
            write_wav(tmp_path / f"data/audio/{kind}/{speaker}/x.wav", make_voice(speaker))
        for speaker in before:
            write_wav(tmp_path / f"data/audio/{kind}/{speaker}/y.wav", make_voice(99))
    assert run(tmp_path, MAKER).status == 0
    rows = read_csv(tmp_path / "test_data/test_own.csv")
    for speaker in before:
        assert sum(row["speaker"] == speaker for row in rows) == 4


# ---- One file in unknown/ is one recording; several in a class may be


@pytest.mark.parametrize(
    "names",
    [
        ("2024-05-03__alice", "2024-05-03__bob"),
        ("a", "a_"),
        ("a", "a__"),
        ("a", "a___b"),
        ("_a", "a"),
        ("a?b", "a*b", "a_b"),
        ("x" * 200 + "1", "x" * 200 + "2"),
    ],
)
def test_names_of_files_to_judge_merge_nothing(tmp_path, names):
    write_voices(tmp_path / "data/audio/unknown", names)
    outcome = run(tmp_path, MAKER)
    assert (outcome.status, outcome.err) == (0, "")
    rows = read_csv(tmp_path / "test_data/unknown.csv")
    assert len({row["recording"] for row in rows}) == len(names)
    assert len({tables.name_recording(row["img_path"], "", PATTERN) for row in rows}) == len(names)


def test_files_that_are_taken_as_copies_of_one_recording_are_named(tmp_path):
    write_voices(tmp_path / "data/audio/original", ["talk__phone", "talk__studio", "b", "b_", "c"])
    write_voices(tmp_path / "data/audio/deepfake", ["talk__vocoder"])
    lines = run(tmp_path, MAKER).out.splitlines()
    assert [line for line in lines if "have several files" in line] == [
        "original: what stands before __ names the recording: 2 have several files (b: b.wav, b_.wav; "
        "talk: talk__phone.wav, talk__studio.wav)"
    ]
