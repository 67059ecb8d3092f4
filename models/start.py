"""What training starts from: a detector, ImageNet's weights, those of another file, or random ones."""

from __future__ import annotations

import hashlib
import http.client
import socket
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, Optional

import torch
from torch import nn
from torchvision.models import ResNet18_Weights, WeightsEnum

from models import detector
from models.detector import CLASSES

DOWNLOAD_TIMEOUT_S = 30  # without a single byte; torch.hub itself would wait for ever
RATE_FROM_RANDOM, RATE_FROM_IMAGENET, RATE_FROM_DETECTOR = 1e-3, 3e-4, 5e-4  # where LEARNING_RATE is None
INHERITED = ("classes", "image_size", "seen_images", "seen_recordings", "appearance")  # from the start's checkpoint


class Start(NamedTuple):
    """What training starts from."""

    words: str  # that describe it in the checkpoint
    learning_rate: float  # the peak of the schedule that suits it
    weights: Optional[dict[str, torch.Tensor]] = None  # None: random
    facts: dict = {}  # where they are a detector's of this project: what its checkpoint says, by INHERITED


def choose_start(pretrained: Optional[str], here: Path, image_size: int) -> Start:
    """Get the weights to start from, for images of this size.

    Raises:
        ValueError: `pretrained` is a path, and no ResNet-18 can be loaded from it.
    """
    if pretrained is None:
        return Start("random (PRETRAINED = None)", RATE_FROM_RANDOM)
    if pretrained not in ResNet18_Weights.__members__:
        path = here / pretrained
        if not path.is_file():
            names = ", ".join(weights.name for weights in ResNet18_Weights)
            raise ValueError(f"PRETRAINED: no file {path} (allowed: {names}, the path of a .pth, or None)")
        content = detector.load_content(path)
        facts = {name: content[name] for name in INHERITED if name in content}
        rate, words = RATE_FROM_DETECTOR if facts else RATE_FROM_IMAGENET, f"file {path.name}"
        if (size := facts.get("image_size", image_size)) != image_size:
            words += f", trained at {size} pixels: what it has seen is told by the names of recordings only"
            facts = {name: value for name, value in facts.items() if name not in ("seen_images", "appearance")}
        return Start(words, rate, detector.find_weights(content, path), facts)
    try:
        weights = fetch_weights(ResNet18_Weights[pretrained], DOWNLOAD_TIMEOUT_S)
        return Start(pretrained, RATE_FROM_IMAGENET, weights)
    except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        print(f"WARNING: NO PRETRAINED WEIGHTS. {pretrained} could not be downloaded ({reason}).")
        print("WARNING: Training starts from RANDOM weights: expect a higher error than with pretrained ones.")
        return Start(f"random ({pretrained} could not be downloaded: {reason})", RATE_FROM_RANDOM)


def fetch_weights(weights: WeightsEnum, timeout_s: float) -> dict[str, torch.Tensor]:
    """Load torchvision's weights from its cache, or download them; their hash is checked in either case."""
    cached = Path(torch.hub.get_dir(), "checkpoints", weights.url.rpartition("/")[2])
    digest = cached.stem.rpartition("-")[2]  # torch.hub checks it only while downloading
    if cached.is_file() and not hashlib.sha256(cached.read_bytes()).hexdigest().startswith(digest):
        print(f"Warning: {cached} is damaged; downloading it again")
        cached.unlink()
    socket.setdefaulttimeout(timeout_s)
    try:
        return weights.get_state_dict(progress=sys.stderr.isatty(), check_hash=True, weights_only=True)
    finally:
        socket.setdefaulttimeout(None)


def start_model(start: Start) -> nn.Module:
    """Make a network with the initial weights; its two-class head is kept where they are a detector's.

    Raises:
        ValueError: the initial weights are not those of such a network.
    """
    model = detector.make_network()
    if start.weights is not None:
        head = () if start.facts.get("classes") == list(CLASSES) else ("fc.weight", "fc.bias")
        chosen = {name: tensor for name, tensor in start.weights.items() if name not in head}
        try:
            missing, unexpected = model.load_state_dict(chosen, strict=False)
        except RuntimeError as error:
            missing, unexpected = [str(error).splitlines()[-1].strip()], []
        if unexpected or set(missing) - set(head):
            raise ValueError(f"PRETRAINED: not a ResNet-18 ({(unexpected or missing)[0]})")
    return model


def join_seen(fingerprints: Iterable[int], inherited: Optional[torch.Tensor]) -> torch.Tensor:
    """Join the fingerprints of a run with those of its start: int64, sorted, each once."""
    own = torch.tensor(list(fingerprints), dtype=torch.int64)
    return own.unique() if inherited is None else torch.cat([own, inherited]).unique()
