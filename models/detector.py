"""The detector: network, checkpoint, calibration, score and verdict."""

from __future__ import annotations

import hashlib
import io
import re
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Optional

import numpy as np
import torch
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval

from models.images import IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:
    from torchvision.models import ResNet

CLASSES = ("Deepfake", "Original")  # logit order; the folders bear these names in lower case
CHECKPOINT_FORMAT = 1
BARE_FACTS = {  # assumed where a file holds weights only
    "classes": list(CLASSES),
    "image_size": 224,
    "mean": list(IMAGENET_MEAN),
    "std": list(IMAGENET_STD),
    "calibration": {"scale": 1.0, "offset": 0.0},
    "recording_pattern": r"^([^/]+?)__[^/]*$",
}


# ---- Network and checkpoint


def make_network() -> ResNet:
    """Make the network, with random weights."""
    from torchvision.models import resnet18  # takes 2 s to import

    return resnet18(num_classes=len(CLASSES))


class Detector(NamedTuple):
    """A network in evaluation mode, on the CPU, and what its checkpoint says about it."""

    model: ResNet
    facts: dict
    sha256: str = ""  # of the file as it was loaded


class Score(NamedTuple):
    """What was found out about one image."""

    margin: float  # logit Deepfake - logit Original
    llr: float  # calibrated log-likelihood ratio, higher = more bona fide
    fingerprint: int  # of its pixels
    reason: str  # why it has no verdict; "": it has one
    span: Optional[tuple[float, float]] = None  # from when to when, in s, it shows its recording; None: unknown


def load_content(path: Path, content: Optional[bytes] = None) -> dict:
    """Load what torch.save wrote: weights and plain types only, without running code that a file may hold.

    torch checks no checksums, so that a flipped bit would pass as a weight: the zip's own are checked here.
    """
    try:
        content = path.read_bytes() if content is None else content
        archive = zipfile.ZipFile(io.BytesIO(content)) if content.startswith(b"PK") else None
        if content.lstrip().startswith(b"<"):
            raise ValueError("it is a web page")
        if content[8:9] == b"{" and b'"data_offsets"' in content[:100_000]:
            raise ValueError("it is a safetensors file: save the state_dict with torch.save")
        if archive and any(name.endswith("/constants.pkl") for name in archive.namelist()):
            raise ValueError("it is a TorchScript archive: save the state_dict with torch.save")
        if archive and (damaged := archive.testzip()):
            raise ValueError(f"the checksum of {damaged} is wrong")
        loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if not isinstance(loaded, dict):
            raise ValueError(f"it holds a {type(loaded).__name__}, not a ResNet-18")
        return loaded
    except Exception as error:  # zipfile and torch raise many kinds on damaged or foreign files
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        if "Weights only load failed" in reason:  # what follows it is advice to run the code
            name = re.search(r"(?i)unsupported global:? (?:GLOBAL )?(\S+)", str(error))
            reason = f"it holds {name[1] if name else 'more than weights'}, which is not loaded"
        raise ValueError(f"{path} is not a checkpoint, or is damaged ({reason})") from None


def find_weights(content: dict, path: Path) -> dict[str, torch.Tensor]:
    """Find a ResNet-18's state_dict in what a file holds, under its plain names."""
    key = next((key for key in ("state_dict", "model_state_dict", "model") if isinstance(content.get(key), dict)), None)
    state = content[key] if key else content
    if not state or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise ValueError(f"{path} holds no weights; its keys: {', '.join(map(str, content))[:200]}")
    plain = {re.sub(r"^(_orig_mod\.|module\.)+", "", str(name)): tensor for name, tensor in state.items()}
    return {name.replace("fc.1.", "fc."): tensor for name, tensor in plain.items()}


def build_model(state: dict, path: Path) -> ResNet:
    """Build a two-class ResNet-18 from a state_dict, in evaluation mode, on the CPU."""
    head = state.get("fc.weight")
    if head is None or head.ndim != 2:
        raise ValueError(f"{path} holds no ResNet-18 (no fc.weight); its keys: {', '.join(state)[:200]}")
    if len(head) != len(CLASSES):
        raise ValueError(f"{path} has {len(head)} classes; needed: {', '.join(CLASSES)}")
    model = make_network()
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path} holds no ResNet-18: {str(error).splitlines()[-1].strip()[:200]}") from None
    if not all(torch.isfinite(value).all() for value in model.state_dict().values()):
        raise ValueError(f"{path} holds weights that are not finite: train again")
    return model.eval()


def load_detector(path: Path) -> Detector:
    """Rebuild a detector from a checkpoint, or from a bare state_dict, without running any code in it."""
    if not path.is_file():
        shipped = 'MODEL_PATH = Path("models/speech_resnet18.pth")'
        raise ValueError(f"MODEL_PATH: file not found: {path} (train first, or judge with the shipped one: {shipped})")
    try:
        content = path.read_bytes()
        facts = load_content(path, content)
        if "format" not in facts:
            print(
                f"Warning: {path.name} holds weights only; assumed: classes {', '.join(CLASSES)}, image size "
                f"{BARE_FACTS['image_size']}, ImageNet's mean and deviation, no calibration"
            )
            facts = {"state_dict": find_weights(facts, path), **BARE_FACTS, "format": CHECKPOINT_FORMAT}
        if facts["format"] != CHECKPOINT_FORMAT:
            raise ValueError(f"{path} has format {facts['format']}; this script reads {CHECKPOINT_FORMAT}")
        missing = [name for name in BARE_FACTS if name not in facts]
        if missing or sorted(facts["classes"]) != sorted(CLASSES):
            raise ValueError(f"{path} lacks {', '.join(missing) or 'the classes ' + str(CLASSES)}")
        model = build_model(find_weights(facts, path), path)
        return Detector(model, facts, hashlib.sha256(content).hexdigest())
    except ValueError as error:
        raise ValueError(f"MODEL_PATH: {error}") from None


def fuse_norms(model: nn.Module) -> nn.Module:
    """Fold each batch norm of a ResNet-18 into the convolution before it: the same outputs, a seventh faster."""
    from torchvision.models.resnet import BasicBlock

    for block in (model, *(part for part in model.modules() if isinstance(part, BasicBlock))):
        for conv, norm in (("conv1", "bn1"), ("conv2", "bn2")):
            if hasattr(block, conv):
                setattr(block, conv, fuse_conv_bn_eval(getattr(block, conv), getattr(block, norm)))
                setattr(block, norm, nn.Identity())
        if getattr(block, "downsample", None):
            block.downsample = fuse_conv_bn_eval(*block.downsample)
    return model


# ---- Score and verdict


def fit_calibration(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Fit scale and offset that make z, logit Deepfake - logit Original, a log-likelihood ratio for a fake.

    Logistic regression with both classes weighing the same, and targets a little off 0 and 1, so that it is sound
    for few or perfectly separated scores too: Platt, 1999, section 2.2.

    Args:
        logits: float32, shape (images, 2), in the order of CLASSES; labels: class indices, shape (images,).

    Returns:
        scale and offset; 1 and 0 where a higher z does not mean a likelier fake.
    """
    from sklearn.linear_model import LogisticRegression

    margins, is_fake = (logits[:, 0] - logits[:, 1]).double().numpy(), (labels == 0).numpy()
    spread = margins.std() or 1.0
    counts = np.where(is_fake, is_fake.sum(), (~is_fake).sum())
    weights = [(counts + 1) / (counts + 2) / counts, 1 / (counts + 2) / counts]  # of the true class, of the other
    regression = LogisticRegression(C=1e6, max_iter=1000).fit(
        np.tile(margins / spread, 2)[:, None], np.concatenate([is_fake, ~is_fake]), np.concatenate(weights)
    )
    scale, offset = float(regression.coef_.item() / spread), float(regression.intercept_.item())
    return {"scale": scale, "offset": offset} if scale > 0 else {"scale": 1.0, "offset": 0.0}


def to_probability(llr: np.ndarray) -> np.ndarray:
    """Turn log-likelihood ratios, higher = more bona fide, into probabilities of a fake at equal priors."""
    return 1 / (1 + np.exp(np.clip(llr, -700, 700)))


def to_scores(llr: np.ndarray) -> np.ndarray:
    """Turn log-likelihood ratios, higher = more bona fide, into deepfake_scores: 0 to 1, six decimals."""
    return np.round(to_probability(llr), 6)


def decide(llr: np.ndarray) -> np.ndarray:
    """Decide by log-likelihood ratios, higher = more bona fide: True where the verdict is Deepfake."""
    return to_scores(llr) >= 0.5


def name_verdicts(llr: np.ndarray) -> list[str]:
    """Name the verdicts of log-likelihood ratios."""
    return np.where(decide(llr), "Deepfake", "Original").tolist()
