"""Initial weights: found in the cache, given as a path, damaged, refused, unreachable."""

import hashlib
import http.server
import shutil
import socket
import threading
from pathlib import Path

import pytest
import torch
from conftest import CHECKPOINT, QUICK, TRAINER, assert_refused, read_checkpoint, run, run_process, write_csv
from PIL import Image
from torchvision.models import Weights, WeightsEnum, resnet18

from models import start


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    """A file named as torchvision's are: resnet18-<first 8 digits of its SHA-256>.pth."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(1)
    torch.save(resnet18().state_dict(), folder / "plain.pth")
    digest = hashlib.sha256((folder / "plain.pth").read_bytes()).hexdigest()[:8]
    return (folder / "plain.pth").rename(folder / f"resnet18-{digest}.pth")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of torch.hub's."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    folder = tmp_path / "home" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def server(weights_file):
    """A web server on this machine that hands the weights out, damaged under /damaged/."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802, the base class calls it so
            if "/missing/" in self.path:
                self.send_error(404)
                return
            content = weights_file.read_bytes()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if "/damaged/" in self.path else content)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{web.server_address[1]}"
        web.shutdown()


def make_weights(url):
    """A member of an enumeration of weights, as torchvision's, that lie at this address."""
    return WeightsEnum("LocalWeights", {"V1": Weights(url=url, transforms=None, meta={})}).V1


def same_weights(state, path):
    expected = torch.load(path, weights_only=True)
    return all(torch.equal(state[name], expected[name]) for name in expected)


def test_cached_weights_are_used_without_a_connection(cache, weights_file):
    (cache / weights_file.name).write_bytes(weights_file.read_bytes())
    assert same_weights(start.fetch_weights(make_weights(f"http://127.0.0.1:9/{weights_file.name}"), 1), weights_file)


def test_missing_weights_are_downloaded_into_the_cache(cache, weights_file, server):
    assert same_weights(start.fetch_weights(make_weights(f"{server}/{weights_file.name}"), 5), weights_file)
    assert (cache / weights_file.name).read_bytes() == weights_file.read_bytes()


def test_damaged_cache_is_noticed_and_downloaded_again(cache, weights_file, server, capsys):
    (cache / weights_file.name).write_bytes(weights_file.read_bytes()[:1000])
    assert same_weights(start.fetch_weights(make_weights(f"{server}/{weights_file.name}"), 5), weights_file)
    assert "is damaged; downloading it again" in capsys.readouterr().out


def test_damaged_download_is_refused_and_leaves_no_file(cache, weights_file, server):
    with pytest.raises(RuntimeError, match="invalid hash"):
        start.fetch_weights(make_weights(f"{server}/damaged/{weights_file.name}"), 5)
    assert not list(cache.iterdir())


def test_refused_download_raises(cache, weights_file, server):
    with pytest.raises(OSError, match="404"):
        start.fetch_weights(make_weights(f"{server}/missing/{weights_file.name}"), 5)


def test_silent_server_ends_the_attempt(cache, weights_file):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/{weights_file.name}"
        with pytest.raises(OSError, match="timed out"):
            start.fetch_weights(make_weights(url), 0.5)
    assert socket.getdefaulttimeout() is None


@pytest.mark.slow
def test_unreachable_weights_are_said_loudly_and_recorded(project):
    env = dict.fromkeys(("https_proxy", "HTTPS_PROXY"), "http://127.0.0.1:9")
    outcome = run_process(project, TRAINER, env=env, **{**QUICK, "PRETRAINED": "IMAGENET1K_V1"})
    assert outcome.status == 0, outcome.err
    assert "WARNING: NO PRETRAINED WEIGHTS" in outcome.out
    checkpoint = read_checkpoint(project)
    assert checkpoint["initial_weights"].startswith("random (IMAGENET1K_V1 could not be downloaded: ")
    assert checkpoint["settings"]["LEARNING_RATE"] == 1e-3


@pytest.mark.parametrize("kind", ["plain", "wrapped", "checkpoint"])
def test_weights_from_a_path_fill_all_but_the_head(weights_file, tmp_path, kind):
    state = torch.load(weights_file, weights_only=True)
    if kind == "wrapped":
        state = {f"module.{name}": tensor for name, tensor in state.items()}
    torch.save({"state_dict": state} if kind == "checkpoint" else state, tmp_path / "w.pth")
    found = start.choose_start("w.pth", tmp_path, 112)
    model = start.start_model(found)
    expected = torch.load(weights_file, weights_only=True)
    assert torch.equal(model.layer4[1].conv2.weight, expected["layer4.1.conv2.weight"])
    assert model.fc.weight.shape == (2, 512)
    assert (found.words, found.learning_rate) == ("file w.pth", 3e-4)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("missing", "PRETRAINED: no file {path} (allowed: IMAGENET1K_V1, the path of a .pth, or None)"),
        ("text", "{path} is not a checkpoint, or is damaged ("),
        ("other network", "{path} holds no weights of a ResNet-18, but: layer.weight (3)"),
    ],
)
def test_path_that_fails_is_an_error_in_one_line(project, content, words):
    path = project / "w.pth"
    if content == "text":
        path.write_text("hello")
    elif content == "other network":
        torch.save({"layer.weight": torch.zeros(3)}, path)
    outcome = run(project, TRAINER, **{**QUICK, "PRETRAINED": "w.pth"})
    assert_refused(outcome, words.format(path=path))


def test_start_from_a_detector_keeps_its_head_and_what_it_has_seen(trained, tmp_path):
    shutil.copytree(trained / "data", tmp_path / "data")
    shutil.copytree(trained / "test_data", tmp_path / "test_data")
    shutil.copy(trained / CHECKPOINT, tmp_path / "start.pth")
    before = torch.load(tmp_path / "start.pth", weights_only=True)
    model = start.start_model(start.choose_start("start.pth", tmp_path, 32))
    assert torch.equal(model.fc.weight, before["state_dict"]["fc.weight"])
    for path in (tmp_path / "data").rglob("*0__clean_1.png"):
        path.unlink()
    write_csv(tmp_path / "test_data/test.csv", [["img_path"], ["original/combined/o5__clean_1.png"]])
    outcome = run(tmp_path, TRAINER, **{**QUICK, "PRETRAINED": "start.pth"})
    assert outcome.status == 0, outcome.err
    assert "WARNING: PRETRAINED has seen 1 of the held-out images and 1 of their recordings" in outcome.out
    after = read_checkpoint(tmp_path)
    assert after["settings"]["LEARNING_RATE"] == 5e-4
    for name in ("seen_images", "seen_recordings"):
        assert set(before[name].tolist()) <= set(after[name].tolist())


def test_start_trained_on_images_of_another_look_is_said(trained, tmp_path):
    shutil.copytree(trained / "data", tmp_path / "data")
    for path in (tmp_path / "data").rglob("*.png"):
        with Image.open(path) as image:
            grey = image.convert("L")
        grey.save(path)
    shutil.copy(trained / CHECKPOINT, tmp_path / "start.pth")
    outcome = run(tmp_path, TRAINER, **{**QUICK, "PRETRAINED": "start.pth", "HOLDOUT_CSVS": []})
    assert outcome.status == 0, outcome.err
    assert "rendered unlike those of PRETRAINED: PRETRAINED = 'IMAGENET1K_V1' may be the better start" in outcome.out


def test_start_of_another_size_is_said_and_its_images_are_not_compared(trained, tmp_path):
    shutil.copytree(trained / "data", tmp_path / "data")
    shutil.copy(trained / CHECKPOINT, tmp_path / "start.pth")
    outcome = run(
        tmp_path, TRAINER, **{**QUICK, "PRETRAINED": "start.pth", "HOLDOUT_CSVS": [], "IMAGE_SIZE": 40, "TIME_CROP": 1}
    )
    assert outcome.status == 0, outcome.err
    words = "start.pth, trained at 32 pixels: what it has seen is told by the names of recordings only"
    assert words in outcome.out and words in read_checkpoint(tmp_path)["initial_weights"]
    seen, before = read_checkpoint(tmp_path), torch.load(tmp_path / "start.pth", weights_only=True)
    assert not {*seen["seen_images"].tolist()} & {*before["seen_images"].tolist()}
    assert {*before["seen_recordings"].tolist()} <= {*seen["seen_recordings"].tolist()}


def test_half_precision_weights_load(trained, tmp_path):
    checkpoint = torch.load(trained / CHECKPOINT, weights_only=True)
    full = checkpoint["state_dict"]
    checkpoint["state_dict"] = {n: t.half() if t.is_floating_point() else t for n, t in full.items()}
    torch.save(checkpoint, tmp_path / "half.pth")
    model = start.start_model(start.choose_start("half.pth", tmp_path, 112))
    assert model.conv1.weight.dtype == torch.float32
    assert torch.allclose(model.conv1.weight, full["conv1.weight"], atol=1e-3)


def test_pretrained_weights_get_a_lower_rate(project, weights_file):
    outcome = run(project, TRAINER, **{**QUICK, "PRETRAINED": str(weights_file)})
    assert outcome.status == 0, outcome.err
    path = Path(project / "models/experiments/best_laundered_processed.pth")
    assert torch.load(path, weights_only=True)["settings"]["LEARNING_RATE"] == 3e-4
