"""The maker: which images it makes of which recordings, nothing mixed, nothing lost."""

import json
import os
import shutil
from functools import partial

import laundering
import numpy as np
import pytest
import soundfile
from conftest import (
    CLEAN,
    MAKER,
    assert_refused,
    list_images,
    make_tone,
    read_csv,
    run,
    run_process,
    write_voices,
    write_wav,
)
from PIL import Image


def test_script_makes_every_copy_the_same_in_each_run_and_class(tmp_path):
    conditions = ["clean", *laundering.LAUNDERING, "reverb+noise"]
    content = {}
    for name in ("one", "two"):
        for kind in ("original", "deepfake"):
            write_voices(tmp_path / name / "data/audio" / kind, ["a__x", "b"])
        outcome = run(tmp_path / name, MAKER, CONDITIONS=conditions)
        assert outcome.status == 0, outcome.err
        for kind in ("original", "deepfake"):
            folder = tmp_path / name / f"data/{kind}/combined"
            content[name, kind] = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert content["one", "original"] == content["two", "original"] == content["one", "deepfake"]
    expected = {f"a__{name}-x.png" for name in conditions} | {f"b__{name}.png" for name in conditions}
    assert set(content["one", "original"]) == expected
    words = {}
    for name in expected:
        with Image.open(tmp_path / "one/data/original/combined" / name) as image:
            words[name] = json.loads(image.text["spectrogram"]).get("laundering")
    assert words["b__clean.png"] is None
    assert "RT60" in words["b__reverb+noise.png"] and "SNR" in words["b__reverb+noise.png"]
    assert len({content["one", "original"][f"b__{name}.png"] for name in conditions}) == len(conditions)


def test_clean_images_do_not_mind_the_settings_of_laundering(tmp_path):
    write_voices(tmp_path / "data/audio/original", ["a"])
    assert run(tmp_path, MAKER, CONDITIONS=("clean", "noise")).status == 0
    outcome = run(tmp_path, MAKER, CONDITIONS=("clean", "noise"), SEED=1)
    assert_refused(outcome, "a__noise.png was made with SEED = 0, now it is 1")
    assert run(tmp_path, MAKER, CONDITIONS=("clean",), SEED=1).status == 0


def test_any_condition_draws_one_for_each_recording(tmp_path):
    write_voices(tmp_path / "data/audio/original", [f"voice{number}" for number in range(12)])
    assert run(tmp_path, MAKER, CONDITIONS=("any",)).status == 0
    words = set()
    for path in (tmp_path / "data/original/combined").iterdir():
        with Image.open(path) as image:
            words.add(json.loads(image.text["spectrogram"])["laundering"].split()[0])
    assert len(words) >= 3


def test_unknown_condition_is_refused(tmp_path):
    write_voices(tmp_path / "data/audio/original", ["a"])
    outcome = run(tmp_path, MAKER, CONDITIONS=("clean", "noise+echo"))
    assert_refused(outcome, "CONDITIONS = ('clean', 'noise+echo') (allowed: some of clean, any, noise, reverb")


def test_codec_copies_without_soundfile_are_left_out_and_said(tmp_path, without_soundfile):
    write_voices(tmp_path / "data/audio/original", ["a"])
    outcome = run(tmp_path, MAKER, CONDITIONS=("clean", "codec"))
    assert outcome.status == 1
    assert "condition codec, whose codecs need it: soundfile is not installed (pip install" in outcome.err
    assert [path.name for path in (tmp_path / "data/original/combined").iterdir()] == ["a__clean.png"]


def test_fakes_of_genuine_recordings_lie_in_the_other_class(tmp_path):
    write_voices(tmp_path / "data/audio/original", ["one"])
    outcome = run(tmp_path, MAKER, CONDITIONS=("clean",), FAKES=("lpc", "harmonic+codec"))
    assert outcome.status == 0, outcome.err
    names = sorted(path.name for path in (tmp_path / "data/deepfake/combined").iterdir())
    assert names == ["one__harmonic+codec.png", "one__lpc.png"]
    assert [path.name for path in (tmp_path / "data/original/combined").iterdir()] == ["one__clean.png"]


def test_recordings_whose_parts_would_share_a_name_are_refused(tmp_path):
    write_voices(tmp_path / "data/audio/original", ["talk__anna", "talk__anna_1"])
    assert_refused(run(tmp_path, MAKER), "talk__anna.wav and ", "talk__anna_1.wav", "have the same name")


def test_what_exists_with_the_same_settings_is_skipped_and_the_rest_made(tmp_path):
    write_wav(tmp_path / "data/audio/original/a.wav", make_tone(1000, 4.0))
    write_wav(tmp_path / "data/audio/original/b.wav", make_tone(2000, 4.0))
    run(tmp_path, MAKER, **CLEAN)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "data/original/combined").iterdir()}
    assert len(before) == 4
    (tmp_path / "data/original/combined/b__clean_2.png").unlink()  # as an interrupted run would leave it
    outcome = run(tmp_path, MAKER, **CLEAN)
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "data/original/combined").iterdir()}
    assert "2 images made now; 1 of 2 copies were there already" in outcome.out
    assert {name for name in after if after[name] == before[name]} == {"a__clean_1.png", "a__clean_2.png"}
    assert set(after) == set(before)


@pytest.mark.parametrize(
    "other, reason",
    [
        ("settings", "HOP_S = 0.004, now it is 0.008"),
        ("settings of another recording", "HOP_S = 0.004, now it is 0.008"),
        ("audio", "a__clean.png was made from another a.wav"),
        ("foreign", "was not made by this script"),
    ],
)
def test_images_of_another_format_are_never_mixed_in(tmp_path, other, reason):
    write_wav(tmp_path / "data/audio/original/a.wav", make_tone(1000, 1.9))
    if other != "foreign":
        run(tmp_path, MAKER, **CLEAN, HOP_S=0.008 if other == "audio" else 0.004)
        if other == "settings of another recording":
            (tmp_path / "data/audio/original/a.wav").rename(tmp_path / "data/audio/original/b.wav")
        if other == "audio":
            write_wav(tmp_path / "data/audio/original/a.wav", make_tone(2000, 1.9))
    else:
        (tmp_path / "data/original/combined").mkdir(parents=True)
        Image.new("L", (224, 224)).save(tmp_path / "data/original/combined/a__clean.png")
    before = {path: path.read_bytes() for path in (tmp_path / "data/original/combined").iterdir()}
    outcome = run(tmp_path, MAKER, **CLEAN)
    assert_refused(outcome, reason)
    assert {path: path.read_bytes() for path in (tmp_path / "data/original/combined").iterdir()} == before


def test_copies_of_a_recording_keep_its_name(tmp_path):
    write_wav(tmp_path / "data/audio/original/text1__vocoder.wav", make_tone(1000, 4.0))
    run(tmp_path, MAKER, **CLEAN)
    assert sorted(path.name for path in (tmp_path / "data/original/combined").iterdir()) == [
        "text1__clean-vocoder_1.png",
        "text1__clean-vocoder_2.png",
    ]


def test_all_clashes_of_names_are_named_at_once(tmp_path):
    for name in ("x/a.wav", "x-a.wav", "y/b.wav", "y-b.wav", "c.wav"):
        write_wav(tmp_path / "data/audio/original" / name, make_tone(1000, 1.9))
    outcome = run(tmp_path, MAKER, **CLEAN)
    assert_refused(outcome, "x-a.wav and ", "x/a.wav", "y-b.wav and ", "y/b.wav")
    assert "c.wav" not in outcome.err


@pytest.mark.parametrize(
    "constants",
    [
        {"SAMPLE_RATE": 0, "LEVELS": 1},
        {"FREQUENCY_RANGE_HZ": (60, 9000)},
        {"DB_RANGE": (10, 10), "IMAGE_SIZE": 2},
        {"WINDOW_S": "long"},
    ],
)
def test_wrong_settings_are_named(tmp_path, constants):
    write_wav(tmp_path / "data/audio/original/a.wav", make_tone(1000, 1.9))
    outcome = run(tmp_path, MAKER, **{**CLEAN, **constants})
    assert_refused(outcome)
    for name in constants:
        assert name in outcome.err


def test_folder_without_audio_is_an_error(tmp_path):
    (tmp_path / "data/audio").mkdir(parents=True)
    outcome = run(tmp_path, MAKER, **CLEAN)
    assert_refused(outcome)
    assert "no audio: put genuine recordings into " in outcome.err


@pytest.mark.slow
def test_script_runs_from_another_folder(tmp_path):
    write_wav(tmp_path / "data/audio/original/a.wav", make_tone(1000, 1.9))
    (tmp_path / "elsewhere").mkdir()
    assert run_process(tmp_path, MAKER, cwd=tmp_path / "elsewhere", **CLEAN).status == 0
    assert (tmp_path / "data/original/combined/a__clean.png").exists()


def test_three_kinds_of_recordings_make_images_and_a_list(tmp_path):
    for name in ("original/o.wav", "deepfake/d.wav", "unknown/talk/u.wav"):
        write_wav(tmp_path / "data/audio" / name, make_tone(1000, 4.0))
    outcome = run(tmp_path, MAKER, CONDITIONS=("clean", "noise"))
    assert outcome.status == 0, outcome.err
    expected = [
        f"{kind}/combined/{kind[0]}__{what}_{n}.png"
        for kind in ("deepfake", "original")
        for what in ("clean", "noise")
        for n in (1, 2)
    ]
    expected += ["unknown/talk-u__clean_1.png", "unknown/talk-u__clean_2.png"]
    assert list_images(tmp_path / "data") == expected
    rows = read_csv(tmp_path / "test_data/unknown.csv")
    assert [row["img_path"] for row in rows] == expected[-2:]
    assert [row["recording"] for row in rows] == ["talk-u"] * 2
    assert float(rows[0]["start_s"]) == 0 and float(rows[1]["start_s"]) == pytest.approx(4.0 - 1.85, abs=0.05)
    assert "unknown: 1 recordings, 2 images; 4 s of audio" in outcome.out


def test_folders_stand_in_the_names_and_shared_ones_become_sources(tmp_path):
    for name in ("original/sp1/001.wav", "original/sp2/001.wav", "deepfake/sp1/001.wav", "deepfake/x/y/001.wav"):
        write_wav(tmp_path / "data/audio" / name, make_tone(1000, 1.9))
    assert run(tmp_path, MAKER, **CLEAN).status == 0
    assert list_images(tmp_path / "data") == [
        "deepfake/combined/sp1/sp1-001__clean.png",
        "deepfake/combined/x/x-y-001__clean.png",
        "original/combined/sp1/sp1-001__clean.png",
        "original/combined/sp2/sp2-001__clean.png",
    ]


def test_speakers_are_folders_directly_below_their_class(tmp_path):
    for kind in ("original", "deepfake"):
        for speaker in ("84", "174"):
            for chapter in ("1", "2"):
                write_wav(tmp_path / f"data/audio/{kind}/{speaker}/{chapter}/x.wav", make_tone(1000, 1.0))
    assert run(tmp_path, MAKER, **CLEAN).status == 0
    rows = read_csv(tmp_path / "test_data/test_own.csv")
    assert len(rows) == 4 and len({row["speaker"] for row in rows}) == 1
    assert rows[0]["speaker"] in ("84", "174")


def test_why_nothing_is_listed_for_testing_is_said(tmp_path):
    for name in ("original/anna/1.wav", "original/ben/1.wav", "deepfake/engine/1.wav"):
        write_wav(tmp_path / "data/audio" / name, make_tone(1000, 1.0))
    outcome = run(tmp_path, MAKER, **{**CLEAN, "HOLDOUT_SPEAKERS": 0.2})
    assert "No list for testing: each class needs recordings in two folders (speakers) or more" in outcome.out


def test_underscores_before_a_name_are_no_name(tmp_path):
    for name in ("__x.wav", "____.wav", "b.wav"):
        write_wav(tmp_path / "data/audio/original" / name, make_tone(1000, 1.0))
    assert run(tmp_path, MAKER, **CLEAN).status == 0
    expected = {f"original/combined/{name}__clean.png" for name in ("x", "unnamed", "b")}
    assert set(list_images(tmp_path / "data")) == expected


def test_image_of_a_short_recording_says_how_much_of_it_there_is(tmp_path):
    write_wav(tmp_path / "data/audio/unknown/short.wav", make_tone(1000, 0.5))
    assert run(tmp_path, MAKER).status == 0
    with Image.open(tmp_path / "data/unknown/short__clean.png") as image:
        assert json.loads(image.text["spectrogram"])["seconds"] == pytest.approx(0.5, abs=0.01)


def test_whole_speakers_are_listed_for_testing(tmp_path):
    for kind in ("original", "deepfake"):
        for speaker in range(5):
            for number in range(2):
                write_wav(tmp_path / f"data/audio/{kind}/{kind[0]}{speaker}/{number}.wav", make_tone(1000, 1.0))
    assert run(tmp_path, MAKER, CONDITIONS=("clean", "noise")).status == 0
    rows = read_csv(tmp_path / "test_data/test_own.csv")
    assert len({row["speaker"] for row in rows}) == 2
    assert {row["actual_output"] for row in rows} == {"Original", "Deepfake"}
    assert len(rows) == 2 * 2 * 2
    for row in rows:
        assert row["img_path"].startswith(row["actual_output"].lower() + "/combined/" + row["speaker"])
    first = {row["speaker"] for row in rows}
    for kind in ("original", "deepfake"):
        write_wav(tmp_path / f"data/audio/{kind}/{kind[0]}9/0.wav", make_tone(1000, 1.0))
    assert run(tmp_path, MAKER, CONDITIONS=("clean", "noise")).status == 0
    assert len({row["speaker"] for row in read_csv(tmp_path / "test_data/test_own.csv")}) == 2
    shutil.rmtree(tmp_path / "test_data")
    assert run(tmp_path, MAKER, CONDITIONS=("clean", "noise"), HOLDOUT_SPEAKERS=0).status == 0
    assert not (tmp_path / "test_data").exists()
    assert len(first) == 2


def test_parts_without_sound_make_no_image_and_are_counted(tmp_path):
    voice = make_tone(1000, 5.0) / 2
    silence = np.zeros(5 * 16000)
    silence[::7] = 1 / 32768  # dither of one bit
    write = partial(soundfile.write, samplerate=16000, subtype="PCM_16")
    (tmp_path / "data/audio/unknown").mkdir(parents=True)
    write(tmp_path / "data/audio/unknown/half.wav", np.r_[voice, silence])
    write(tmp_path / "data/audio/unknown/none.wav", silence)
    outcome = run(tmp_path, MAKER)
    assert outcome.status == 1
    assert "none.wav: it holds nothing but silence" in outcome.err
    assert list_images(tmp_path / "data") == [f"unknown/half__clean_{n}.png" for n in (1, 2, 3, 4)]
    assert "2 parts without sound left out" in outcome.out


def test_hidden_files_are_passed_over_and_links_followed_once(tmp_path):
    folder = tmp_path / "data/audio/original"
    for name in ("a.wav", ".Trash-1000/files/x.wav", ".ipynb_checkpoints/a.wav", "._a.wav"):
        write_wav(folder / name, make_tone(1000, 1.9))
    write_wav(tmp_path / "elsewhere/b.wav", make_tone(1000, 1.9))
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "loop").symlink_to(folder)
    outcome = run(tmp_path, MAKER, **CLEAN)
    assert (outcome.status, outcome.err) == (0, "")
    names = ["original/combined/a__clean.png", "original/combined/linked-b__clean.png"]
    assert list_images(tmp_path / "data") == names


@pytest.mark.parametrize("name", ["x" * 240, "语" * 80, "two\nlines", "a 'b' \"c\"", b"\xe9t\xe9"])
def test_names_of_every_kind_make_images_and_lists(tmp_path, name):
    folder = tmp_path / "data/audio/unknown"
    name = os.fsdecode(name) if isinstance(name, bytes) else name
    write_wav(tmp_path / "a.wav", make_tone(1000, 1.9))
    for path in (folder / f"{name}.wav", folder / "good.wav"):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "a.wav", path)
    outcome = run(tmp_path, MAKER)
    assert (outcome.status, outcome.err) == (0, "")
    rows = read_csv(tmp_path / "test_data/unknown.csv")
    assert len(rows) == 2
    assert all((tmp_path / "data" / row["img_path"]).exists() for row in rows)
