"""The cache of decoded images: whatever happens to it, the network sees the pixels of the files."""

import os
import random
import resource
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import EVALUATOR, QUICK, TRAINER, make_image, make_project, run, run_process, write_csv
from PIL import Image

import train_deepfake_detector as trainer

SIZE = 32
IMAGES = 20


@pytest.fixture
def paths(tmp_path, monkeypatch):
    """Twenty image files, and shards of eight images."""
    monkeypatch.setattr(trainer, "IMAGES_PER_SHARD", 8)
    monkeypatch.setattr(trainer, "SHARD_HEAD", 8 + 8 * trainer.CACHE_ENTRY.itemsize)
    for number in range(IMAGES):
        make_image(tmp_path / f"images/{number:02}.png", number, fake=bool(number % 2))
    return [str(path) for path in sorted((tmp_path / "images").iterdir())]


def read_all(paths, folder, budget=1e9):
    """Look up and read as the trainer does. Returns the cache, and what was unreadable."""
    cache = trainer.PixelCache(folder, paths, SIZE)
    return cache, trainer.read_all_images(cache, budget, workers=0)


def assert_right(cache):
    for number, path in enumerate(cache.paths):
        expected = trainer.read_image(path, SIZE)
        assert torch.equal(cache.read(number), expected)
        assert cache.fingerprints[number] == trainer.take_fingerprint(expected.numpy())


def test_second_run_reads_nothing(paths, tmp_path, capsys):
    read_all(paths, tmp_path / "cache")
    assert "Read 20 images now, in " in capsys.readouterr().out
    cache, _ = read_all(paths, tmp_path / "cache")
    output = capsys.readouterr().out
    assert "Read 0 images now, in " in output and "20 of 20 lie decoded in the cache" in output
    for path in paths:
        os.truncate(path, 0)  # pixels come from the cache alone
    assert cache.read(3).shape == (3, SIZE, SIZE)


@pytest.mark.parametrize("change", ["pixels", "time", "size of the network's input"])
def test_changed_image_is_read_again(paths, tmp_path, change, capsys, monkeypatch):
    read_all(paths, tmp_path / "cache")
    if change == "pixels":
        make_image(tmp_path / "images/05.png", 99, fake=True)
    elif change == "time":
        os.utime(paths[5], ns=(1, 1))
    else:
        monkeypatch.setattr("test_cache.SIZE", 48)
    capsys.readouterr()
    cache, _ = read_all(paths, tmp_path / "cache")
    assert (
        f"Read {1 if change != 'size of the network' + chr(39) + 's input' else 20} images" in capsys.readouterr().out
    )
    assert_right(cache)


def test_interrupted_pass_goes_on_where_it_was(paths, tmp_path, monkeypatch, capsys):
    write_file, calls = trainer.write_file, []

    def write_two(path, content):
        calls.append(path)
        if len(calls) > 2:
            raise KeyboardInterrupt
        write_file(path, content)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer, "write_file", write_two)
        read_all(paths, tmp_path / "cache")
    capsys.readouterr()
    cache, _ = read_all(paths, tmp_path / "cache")
    assert "Read 4 images now" in capsys.readouterr().out
    assert_right(cache)


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "delete", "swap"])
@pytest.mark.parametrize("when", ["before the lookup", "after it"])
def test_damaged_shards_never_give_wrong_pixels(paths, tmp_path, damage, when):
    draw = random.Random(damage)
    for _ in range(10):
        folder = tmp_path / "cache"
        shutil.rmtree(folder, ignore_errors=True)
        cache, _ = read_all(paths, folder)
        shards = sorted(folder.iterdir())
        content = bytearray(shards[0].read_bytes())
        if damage == "flip":
            for place in draw.sample(range(len(content)), 3) + draw.sample(range(trainer.SHARD_HEAD), 2):
                content[place] ^= 1 << draw.randrange(8)
        elif damage == "swap":
            content = bytearray(shards[1].read_bytes())
        elif damage != "delete":
            del content[draw.randrange(len(content)) if damage == "truncate" else 0 :]
        shards[0].unlink() if damage == "delete" else shards[0].write_bytes(content)
        if when == "before the lookup":
            cache, _ = read_all(paths, folder)
        assert_right(cache)


def test_two_runs_at_once_do_no_harm(paths, tmp_path, capsys):
    with ThreadPoolExecutor(2) as pool:
        for cache, unreadable in pool.map(lambda _: read_all(paths, tmp_path / "cache"), range(2)):
            assert not unreadable
            assert_right(cache)
    capsys.readouterr()
    assert_right(read_all(paths, tmp_path / "cache")[0])
    assert "Read 0 images now" in capsys.readouterr().out


def test_budget_is_kept_and_said_and_more_of_it_is_used_later(paths, tmp_path, capsys):
    folder, budget = tmp_path / "cache", 10 * 3 * SIZE * SIZE
    for first in (True, False):
        cache, _ = read_all(paths, folder, budget)
        output = capsys.readouterr().out
        assert f"Read {20 if first else 0} images now" in output  # the second run knows even what it did not keep
        assert "8 of 20 lie decoded" in output
        assert "The 12 others are decoded again in every epoch: CACHE_GB allows no more" in output
        assert sum(path.stat().st_size for path in folder.iterdir()) <= budget
        assert_right(cache)
    cache, _ = read_all(paths, folder, 1e9)
    assert "Read 12 images now" in capsys.readouterr().out
    assert (cache.places >= 0).all()
    assert_right(cache)


def test_shards_of_other_images_make_room(paths, tmp_path):
    folder = tmp_path / "cache"
    read_all(paths[:10], folder)
    before = set(folder.iterdir())
    cache, _ = read_all(paths[10:], folder, 12 * 3 * SIZE * SIZE)
    assert not before & set(folder.iterdir())
    assert (cache.places >= 0).all()


def test_full_disk_costs_the_cache_not_the_run(paths, tmp_path, capsys):
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))  # bytes a file
    try:
        cache, _ = read_all(paths, tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert "The 20 others are decoded again in every epoch: [Errno 27] File too large" in capsys.readouterr().out
    assert not list((tmp_path / "cache").iterdir())
    assert_right(cache)


def test_unusable_folder_costs_the_cache_not_the_run(paths, tmp_path, capsys):
    (tmp_path / "cache").write_text("a file")
    cache, _ = read_all(paths, tmp_path / "cache")
    assert "The 20 others are decoded again in every epoch: [Errno 17]" in capsys.readouterr().out
    assert_right(cache)


def test_unreadable_images_are_named_in_every_run(paths, tmp_path):
    os.truncate(paths[4], 100)
    for _ in range(2):
        cache, unreadable = read_all(paths, tmp_path / "cache")
        assert list(unreadable) == [paths[4]]
        assert cache.fingerprints[4] == 0


def test_image_that_changes_while_the_run_works_stops_it(paths, tmp_path):
    cache, _ = read_all(paths, None)
    make_image(tmp_path / "images/05.png", 99, fake=True)
    with pytest.raises(ValueError, match="05.png was changed while the run worked"):
        cache.read(5)


@pytest.mark.slow
def test_result_does_not_depend_on_cache_workers_or_way_of_starting_them(tmp_path):
    (tmp_path / "spawn").mkdir()
    (tmp_path / "spawn/sitecustomize.py").write_text(
        "import multiprocessing; multiprocessing.set_start_method('spawn')"
    )
    spawn = {"PYTHONPATH": str(tmp_path / "spawn")}
    states = []
    for name, env, constants in (
        ("a", {}, {"WORKERS": 0}),
        ("b", {}, {"WORKERS": 2, "CACHE_GB": 0}),
        ("c", spawn, {"WORKERS": 1, "CACHE_GB": 0.0001}),
    ):
        folder = make_project(tmp_path / name)
        outcome = run_process(folder, TRAINER, env=env, **{**QUICK, **constants})
        assert outcome.status == 0, outcome.err
        path = folder / "models/experiments/final_laundered_processed.pth"
        states.append(torch.load(path, weights_only=True)["state_dict"])
        assert run_process(folder, EVALUATOR, env=env, WORKERS=constants["WORKERS"]).status == 0
    for other in states[1:]:
        assert all(torch.equal(states[0][key], other[key]) for key in other)


def test_fast_decoding_keeps_within_a_grey_level_of_the_slow_way(tmp_path):
    draw = np.random.default_rng(0)
    levels = draw.integers(0, 256, (1155, 2325, 4), dtype=np.uint8)
    levels[:, ::2] = levels[:, 1::2][:, : levels[:, ::2].shape[1] - 1].repeat(2, axis=1)[:, : levels[:, ::2].shape[1]]
    for mode in ("RGBA", "RGB", "L", "P"):
        Image.fromarray(levels).convert("RGB").convert(mode).save(tmp_path / "a.png")
        with Image.open(tmp_path / "a.png") as image:
            slow = np.asarray(image.convert("RGB").resize((224, 224), Image.BILINEAR)).astype(int)
        fast = trainer.read_image(str(tmp_path / "a.png"), 224).permute(1, 2, 0).numpy().astype(int)
        assert np.abs(fast - slow).mean() < 0.1
        assert np.abs(fast - slow).max() <= 1


def test_path_listed_twice_is_judged_once(judged):
    write_csv(judged / "test_data/test.csv", [["img_path"]] + [["original/combined/o0__clean_1.png"]] * 3)
    assert "Judged 1 images in " in run(judged, EVALUATOR).out
