"""The cache of decoded images: whatever happens to it, the network sees the pixels of the files."""

import os
import random
import resource
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import EVALUATOR, QUICK, TRAINER, make_image, make_project, run, run_process

from models import images, pixel_cache

SIZE = 32
IMAGES = 20
NAMES = (f"{SIZE}px.index", f"{SIZE}px.pixels")


@pytest.fixture
def paths(tmp_path, monkeypatch):
    """Twenty image files, read eight at a time."""
    monkeypatch.setattr(pixel_cache, "IMAGES_AT_ONCE", 8)
    for number in range(IMAGES):
        make_image(tmp_path / f"images/{number:02}.png", number, fake=bool(number % 2))
    return [str(path) for path in sorted((tmp_path / "images").iterdir())]


def read_all(paths, folder, budget=1e9, size=SIZE):
    """Look up and read as the trainer does."""
    cache = pixel_cache.PixelCache(folder, size, budget)
    cache.read_all(paths, workers=0)
    return cache


def count_kept(cache):
    return sum(entry.offset is not None for entry in cache.entries.values())


def assert_right(cache, paths):
    for path in paths:
        expected = images.read_image(path, cache.size)
        assert torch.equal(cache.read(path), expected)
        assert cache.entries[path].fingerprint == images.take_fingerprint(expected.numpy())


def test_second_run_reads_nothing(paths, tmp_path, capsys):
    read_all(paths, tmp_path / "cache")
    assert "Read 20 images in " in capsys.readouterr().out
    cache = read_all(paths, tmp_path / "cache")
    output = capsys.readouterr().out
    assert "Read 0 images in " in output and "20 of 20 are in the cache" in output
    for path in paths:
        os.truncate(path, 0)  # pixels come from the cache alone
    assert cache.read(paths[3]).shape == (3, SIZE, SIZE)


@pytest.mark.parametrize(
    ("change", "count"),
    [("pixels", 1), ("time", 1), ("same time", 1), ("size of the input", 20)],
)
def test_changed_image_is_read_again(paths, tmp_path, change, count, capsys):
    read_all(paths, tmp_path / "cache")
    if change == "pixels":
        make_image(tmp_path / "images/05.png", 99, fake=True)
    elif change == "same time":
        os.utime(paths[5], ns=(1, 1))
        read_all(paths, tmp_path / "cache")
        content = Path(paths[5]).read_bytes()
        make_image(tmp_path / "other.png", 99, fake=True)
        other = (tmp_path / "other.png").read_bytes()
        padding = b"\0" * abs(len(content) - len(other))  # behind the end of a PNG it does no harm
        Path(paths[5]).write_bytes(other + padding if len(other) <= len(content) else other)
        os.utime(paths[5], ns=(1, 1))
    elif change == "time":
        os.utime(paths[5], ns=(1, 1))
    capsys.readouterr()
    cache = read_all(paths, tmp_path / "cache", size=48 if count == 20 else SIZE)
    assert f"Read {count} images in" in capsys.readouterr().out
    assert_right(cache, paths)


def test_interrupted_pass_resumes_where_it_was(paths, tmp_path, monkeypatch, capsys):
    append, calls = pixel_cache.append, []

    def append_some(path, content):
        calls.append(path)
        if len(calls) > 2 * 16:  # a piece of pixels and a line of the index for each image
            raise KeyboardInterrupt
        return append(path, content)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pixel_cache, "append", append_some)
        read_all(paths, tmp_path / "cache")
    capsys.readouterr()
    cache = read_all(paths, tmp_path / "cache")
    assert "Read 4 images in" in capsys.readouterr().out
    assert_right(cache, paths)


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "delete", "swap"])
@pytest.mark.parametrize("when", ["before the lookup", "after it"])
@pytest.mark.parametrize("name", NAMES)
def test_damaged_files_never_give_wrong_pixels(paths, tmp_path, damage, when, name):
    rng = random.Random(damage + name)
    for _ in range(10):
        folder = tmp_path / "cache"
        shutil.rmtree(folder, ignore_errors=True)
        cache = read_all(paths, folder)
        content = bytearray((folder / name).read_bytes())
        if damage == "flip":
            for place in rng.sample(range(len(content)), 5):
                content[place] ^= 1 << rng.randrange(8)
        elif damage == "swap":  # an older file, of other images in another order
            shutil.rmtree(folder)
            read_all(paths[::-1], folder)
            content = bytearray((folder / name).read_bytes())
            shutil.rmtree(folder)
            read_all(paths, folder)
        elif damage != "delete":
            del content[rng.randrange(len(content)) if damage == "truncate" else 0 :]
        (folder / name).unlink() if damage == "delete" else (folder / name).write_bytes(content)
        if when == "before the lookup":
            cache = read_all(paths, folder)
        assert_right(cache, paths)


def test_cut_line_costs_one_more_image_and_no_other(paths, tmp_path, capsys):
    read_all(paths[:10], tmp_path / "cache")
    os.truncate(tmp_path / "cache" / NAMES[0], (tmp_path / "cache" / NAMES[0]).stat().st_size - 5)
    for count in (11, 1, 0):  # the first new line is glued to the cut one
        capsys.readouterr()
        cache = read_all(paths, tmp_path / "cache")
        assert f"Read {count} images in" in capsys.readouterr().out
        assert_right(cache, paths)


def test_two_runs_at_once_do_no_harm(paths, tmp_path, capsys):
    with ThreadPoolExecutor(2) as pool:
        for cache in pool.map(lambda _: read_all(paths, tmp_path / "cache"), range(2)):
            assert not cache.reasons
            assert_right(cache, paths)
    capsys.readouterr()
    assert_right(read_all(paths, tmp_path / "cache"), paths)
    assert "Read 0 images in" in capsys.readouterr().out


def test_budget_is_kept_and_said_and_more_of_it_is_used_later(paths, tmp_path, capsys):
    folder, budget = tmp_path / "cache", 10.9 * 3 * SIZE * SIZE
    for count in (20, 10):
        cache = read_all(paths, folder, budget)
        output = capsys.readouterr().out
        assert f"Read {count} images in" in output
        assert "10 of 20 are in the cache" in output
        assert "The other 10 are decoded again in every epoch: CACHE_GB allows no more" in output
        assert (folder / NAMES[1]).stat().st_size <= budget
        assert_right(cache, paths)
    cache = read_all(paths, folder, 1e9)
    assert "Read 10 images in" in capsys.readouterr().out
    assert count_kept(cache) == 20
    assert_right(cache, paths)


def test_pixels_of_other_images_make_room(paths, tmp_path):
    folder = tmp_path / "cache"
    read_all(paths[:10], folder)
    cache = read_all(paths[10:], folder, 12.9 * 3 * SIZE * SIZE)
    assert (folder / NAMES[1]).stat().st_size == 10 * 3 * SIZE * SIZE
    assert count_kept(cache) == 10
    assert_right(cache, paths[10:])


def test_full_disk_costs_the_cache_not_the_run(paths, tmp_path, capsys):
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))  # bytes a file
    try:
        cache = read_all(paths, tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert "The other 19 are decoded again in every epoch: " in capsys.readouterr().out
    assert_right(cache, paths)
    assert_right(read_all(paths, tmp_path / "cache"), paths)


def test_unusable_folder_costs_the_cache_not_the_run(paths, tmp_path, capsys):
    (tmp_path / "cache").write_text("a file")
    cache = read_all(paths, tmp_path / "cache")
    assert "The other 20 are decoded again in every epoch: [Errno 17]" in capsys.readouterr().out
    assert_right(cache, paths)


def test_unreadable_images_are_named_in_every_run(paths, tmp_path):
    os.truncate(paths[4], 100)
    for _ in range(2):
        cache = read_all(paths, tmp_path / "cache")
        assert list(cache.reasons) == [paths[4]]
        assert paths[4] not in cache.entries


def test_image_that_changes_during_the_run_stops_it(paths, tmp_path):
    cache = read_all(paths, tmp_path / "cache", budget=0)
    make_image(tmp_path / "images/05.png", 99, fake=True)
    with pytest.raises(ValueError, match="05.png was changed during the run"):
        cache.read(paths[5])


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
        start = partial(run_process, env=env) if env else run
        outcome = start(folder, TRAINER, **{**QUICK, **constants})
        assert outcome.status == 0, outcome.err
        path = folder / "models/experiments/final_laundered_processed.pth"
        states.append(torch.load(path, weights_only=True)["state_dict"])
        assert start(folder, EVALUATOR, WORKERS=constants["WORKERS"]).status == 0
    for other in states[1:]:
        assert all(torch.equal(states[0][key], other[key]) for key in other)
