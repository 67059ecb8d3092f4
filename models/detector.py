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
USUAL_KEYS = ("state_dict", "model_state_dict", "model", "net", "ema")  # of weights, the likeliest first
FOREIGN_FILES = {  # how the files of other programs begin
    rb".{8}\{.{0,100000}\"data_offsets\"": "a safetensors file",
    rb"\s*<": "a web page",
    rb"version https://git-lfs": "a Git LFS pointer: get the file itself with git lfs pull",
    rb"\x89HDF": "an HDF5 file, as Keras writes it (.h5)",
    rb"\x08.[\x12\x1a\x22\x3a]": "an ONNX file",
    rb".{4}TFL3": "a TensorFlow Lite file",
    rb"\x93NUMPY": "a NumPy array (.npy)",
    rb"GGUF": "a GGUF file",
    rb"\x80[\x02-\x05](?!\x8a\x0al\xfc)": "a pickle of Python objects (.pkl)",
    rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!": "a compressed file: unpack it",
}
FOREIGN_MEMBERS = {  # what their zip archives hold
    "/constants.pkl": "a TorchScript archive",
    "model.weights.h5": "a Keras model (.keras)",
    ".npy": "a NumPy archive (.npz)",
    ".pth": "a zip archive of weights: unpack it",
    ".pt": "a zip archive of weights: unpack it",
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


def name_foreign(content: bytes) -> str:
    """Name the kind of a file that is not torch's; "": none that is known."""
    if content.startswith(b"PK"):
        names = zipfile.ZipFile(io.BytesIO(content)).namelist()
        for ending, kind in FOREIGN_MEMBERS.items():
            if any(name.endswith(ending) for name in names):
                return kind
    return next((kind for start, kind in FOREIGN_FILES.items() if re.match(start, content, re.DOTALL)), "")


def load_content(path: Path, content: Optional[bytes] = None) -> dict:
    """Load what torch.save wrote: weights and plain types only, without running code that a file may hold.

    torch checks no checksums, so that a flipped bit would pass as a weight: the zip's own are checked here.
    """
    try:
        content = path.read_bytes() if content is None else content
        if kind := name_foreign(content):
            raise ValueError(f"it is {kind}")
        archive = zipfile.ZipFile(io.BytesIO(content)) if content.startswith(b"PK") else None
        if archive and (damaged := archive.testzip()):
            raise ValueError(f"the checksum of {damaged} is wrong")
        loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if not isinstance(loaded, dict):
            raise ValueError(f"it holds a {type(loaded).__name__}")
        return loaded
    except Exception as error:  # zipfile and torch raise many kinds on damaged or foreign files
        reason = f"{type(error).__name__}: {error}".removeprefix("ValueError: ").splitlines()[0][:200]
        if "Weights only load failed" in reason:  # what follows it is advice to run the code
            name = re.search(r"(?i)unsupported global:? (?:GLOBAL )?(\S+)", str(error))
            reason = f"it holds {name[1] if name else 'more than weights'}, which is not loaded"
        raise ValueError(
            f"{path} is not a checkpoint, or is damaged ({reason}); needed: a .pth with the state_dict of a ResNet-18, "
            "written by torch.save"
        ) from None


def list_networks(content: dict, where: str = "") -> dict[str, dict[str, torch.Tensor]]:
    """List what may be ResNets in what a file holds, under any key and with any prefix before the names.

    Returns:
        {key and prefix: weights under their plain names}, the usual keys first.
    """
    found = {}
    for name in map(str, content):
        if re.search(r"(^|\.)conv1\.weight$", name) and not re.search(r"layer\d\.\d+\.conv1", name):
            prefix = name.removesuffix("conv1.weight")
            own = {str(key): value for key, value in content.items() if isinstance(value, torch.Tensor)}
            own = {key[len(prefix) :]: tensor for key, tensor in own.items() if key.startswith(prefix)}
            found[where + prefix] = {key.replace("fc.1.", "fc."): tensor for key, tensor in own.items()}
    for name in sorted(content, key=lambda key: USUAL_KEYS.index(key) if key in USUAL_KEYS else len(USUAL_KEYS)):
        if isinstance(content[name], dict):
            found |= list_networks(content[name], f"{where}{name}.")
    return found


def describe_content(content: dict, most: int = 8) -> str:
    """Describe what a file holds in one line: the first keys, with shapes or types."""
    words = []
    for key, value in list(content.items())[:most]:
        what = type(value).__name__
        if isinstance(value, torch.Tensor):
            what = "x".join(map(str, value.shape)) or "scalar"
        elif isinstance(value, dict):
            what = describe_content(value, 4)
        words.append(f"{str(key)[:60]} ({what})")
    return " ".join((", ".join(words) + ", …" * (len(content) > most) or "nothing").split())


def find_weights(content: dict, path: Path) -> dict[str, torch.Tensor]:
    """Find a ResNet-18's state_dict in what a file holds, under its plain names; of several the first is taken."""
    found = list_networks(content)
    if not found:
        raise ValueError(f"{path} holds no weights of a ResNet-18, but: {describe_content(content)}")
    first, *others = (name.rstrip(".") or "the outermost" for name in found)
    if others:
        print(f"Note: {path.name} holds several networks: {first} is used, not {', '.join(others)}")
    return next(iter(found.values()))


def build_model(state: dict, path: Path) -> ResNet:
    """Build a two-class ResNet-18 from a state_dict, in evaluation mode, on the CPU."""
    head = state.get("fc.weight")
    if head is None or head.ndim != 2:
        raise ValueError(f"{path} holds no ResNet-18 (no fc.weight), but: {describe_content(state)}")
    if len(head) != len(CLASSES):
        raise ValueError(f"{path} has {len(head)} classes; needed: {', '.join(CLASSES)}")
    model = make_network()
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()[:200]
        raise ValueError(f"{path} holds no ResNet-18: {reason} It holds: {describe_content(state)}") from None
    if not all(torch.isfinite(value).all() for value in model.state_dict().values()):
        raise ValueError(f"{path} holds weights that are not finite: train again")
    return model.eval()


def load_detector(path: Path) -> Detector:
    """Rebuild a detector from a checkpoint, or from a bare state_dict, without running any code in it."""
    if not path.is_file():
        shipped = 'MODEL_PATH = Path("models/speech_resnet18.pth")'
        found = "a folder, not a file" if path.is_dir() else "file not found"
        raise ValueError(f"MODEL_PATH: {found}: {path} (train first, or judge with the shipped one: {shipped})")
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
