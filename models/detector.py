"""What trainer and evaluator must agree on: pixels, network, checkpoint, score, and how images were rendered."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset
from torchvision.models import ResNet, resnet18

CLASSES = ("Deepfake", "Original")  # logit order; the folders bear these names in lower case
CHECKPOINT_FORMAT = 1
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # pytorch.org/vision/stable/models.html, ResNet18_Weights
IMAGENET_STD = (0.229, 0.224, 0.225)
AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aif", ".aiff", ".webm", ".aac", ".wma", ".amr")
SHORTCUT_AUC = 0.75  # above it the class can be predicted without the voice
BAND_STATISTICS = ("deviation over time", "change from row to row", "change from column to column")
RENDERING_SAMPLE = 2000  # images whose rendering statistics are learnt


# ---- Tables and names


def parse_table(content: bytes, path: Path, encoding: str) -> tuple[list[list[str]], str]:
    """Parse a CSV as text: its rows, header first, and its delimiter (comma, semicolon or tab).

    Raises:
        ValueError: it is not a CSV in this encoding, or has no column img_path.
    """
    if content.startswith(b"PK\x03\x04"):
        raise ValueError(f"{path} is an Excel workbook, not a CSV: save it as CSV UTF-8")
    try:
        text = content.decode(encoding).removeprefix("\ufeff")
    except UnicodeError as error:
        where = getattr(error, "start", 0)
        raise ValueError(f"{path} is not {encoding} (byte {where}): set CSV_ENCODING, or re-save it as UTF-8") from None
    csv.field_size_limit(2**31 - 1)
    headers = []
    for blanks in ("", " "):  # a column of exactly this name in one delimiter comes before one with blanks in another
        for delimiter in ",;\t":
            try:
                headers.append(next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), []))
                if "img_path" in [name.strip(blanks) if blanks else name for name in headers[-1]]:
                    # strict: a quote that is never closed would swallow the rows after it
                    return list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)), delimiter
            except csv.Error as error:
                raise ValueError(f"{path} is not a valid CSV: {error} (unbalanced quotes?)") from None
    found = ", ".join(repr(name.strip()[:40]) for name in max(headers, key=len)[:20]) or "none"
    raise ValueError(f"{path} has no column img_path; columns found: {found}")


def find_columns(header: list[str]) -> dict[str, int]:
    """Find the columns of a table by their names, blanks around them left out: {name: index}, the first of equals."""
    return {name.strip(" "): index for index, name in reversed(list(enumerate(header)))}


def resolve_image(base: Path, cell: str) -> str:
    """Resolve an img_path: slashes of either kind, relative to base; absolute paths and URLs stay."""
    cell = cell.strip()
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", cell) or (os.name != "nt" and re.match(r"[A-Za-z]:[\\/]", cell)):
        return cell
    path = os.path.normpath(os.path.join(base, cell.replace("\\", "/")))
    return os.fsdecode(path.encode("utf-8", "surrogateescape"))  # as os.walk spells it where names are not UTF-8


def name_recording(path: str, base: Path, pattern: str) -> str:
    """Name the recording that an image belongs to.

    Args:
        path: of the image.
        base: the folder that holds the class folders.
        pattern: RECORDING_PATTERN, searched in the file name without its suffix, then in the path below the class
            folder (with forward slashes); group 1 is the recording. Without a match the file name is.
    """
    below = os.path.splitext(os.path.relpath(path, base).replace(os.sep, "/").partition("/")[2])[0]
    stem = os.path.splitext(os.path.basename(path))[0]
    match = re.search(pattern, stem) or re.search(pattern, below)
    name = (match and match.group(1)) or stem
    return os.fsencode(name).decode("utf-8", "replace")  # file names may hold bytes that are not text


def take_fingerprint(content: bytes) -> int:
    """Hash bytes, or an array of decoded pixels, to a signed integer of 64 bits."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


# ---- Images


def read_image(path: str, size: int) -> torch.Tensor:
    """Decode an image of any mode and resize it: uint8, shape (3, size, size), RGB.

    Sixteen-bit grey is scaled to eight bits; what is transparent is seen on white, as viewers show it.
    torch resizes in a tenth of Pillow's time, to pixels that differ by at most 1.

    Raises:
        OSError, ValueError, SyntaxError and others of Pillow's: the file is not a complete image.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError("there is no such file")
    if path.lower().endswith(AUDIO_SUFFIXES):
        raise ValueError("it is audio: make images of it with data/make_spectrograms.py")
    with Image.open(path) as image:
        if image.mode == "F":
            raise ValueError("floating-point pixels have no fixed range: save it with 8 or 16 bits")
        if image.mode.startswith("I"):
            grey = np.round(np.asarray(image, dtype=np.float64) / 257)
            image = Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8))
        if image.mode in ("LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
        if image.mode == "RGBA" and image.getchannel("A").getextrema()[0] < 255:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        if image.mode not in ("RGB", "RGBA"):
            image = image.convert("RGB")
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    if pixels.shape[1:] != (size, size):
        pixels = nn.functional.interpolate(pixels[None], (size, size), mode="bilinear", antialias=True)[0]
    return pixels[:3].contiguous()


def to_input(images: torch.Tensor, mean: Sequence[float], std: Sequence[float], white: int = 1) -> torch.Tensor:
    """Normalise RGB from 0 to `white`, float32, shape (batch, 3, height, width); mean and deviation are of 0 to 1."""
    mean, std = (images.new_tensor(values).view(3, 1, 1) * white for values in (mean, std))
    return ((images - mean) / std).contiguous(memory_format=torch.channels_last)


def to_brightness(images: torch.Tensor) -> torch.Tensor:
    """Weigh RGB, shape (batch, 3, height, width), to brightness, (batch, height, width), as ITU-R BT.601 does."""
    return torch.einsum("bchw,c->bhw", images, images.new_tensor([0.299, 0.587, 0.114]))


# ---- Rendering statistics: they differ where images were made with other software or settings


def learn_colours(images: Dataset, sample: int = 64) -> torch.Tensor:
    """Learn from a sample of images which colour stands for which brightness.

    For grey images, and for colour maps that rise in brightness (magma, viridis), that is the colour map.

    Returns:
        float32, shape (256, 3), RGB in 0 to 1 for brightness 0 to 255.
    """
    chosen = np.linspace(0, len(images) - 1, min(sample, len(images))).astype(int)
    pixels = torch.stack([images[index][0] for index in chosen]).float() / 255
    bins = (to_brightness(pixels) * 255).round().long().flatten()
    colours = pixels.permute(0, 2, 3, 1).reshape(-1, 3)
    count = torch.bincount(bins, minlength=256)
    total = torch.zeros(256, 3).index_add_(0, bins, colours)
    seen = torch.nonzero(count).flatten().numpy()
    mean = (total[seen] / count[seen, None]).numpy()
    return torch.tensor(np.stack([np.interp(np.arange(256), seen, band) for band in mean.T], axis=1)).float()


def describe_rendering(pixels: torch.Tensor, colours: torch.Tensor) -> torch.Tensor:
    """Describe how images were rendered, by statistics that depend little on voice, loudness and length.

    Each row's own mean is removed first: it depends on what else the recording holds.

    Args:
        pixels: uint8, shape (batch, 3, height, width).
        colours: float32, shape (256, 3), as `learn_colours` returns them.

    Returns:
        float32, shape (batch, 25), logarithms: BAND_STATISTICS, each in eight bands from top to bottom; distance of
        the colours from `colours`.
    """
    images = pixels.float() / 255
    brightness = to_brightness(images)
    painted = nn.functional.embedding((brightness * 255).round().int(), colours).permute(0, 3, 1, 2)
    distance = (images - painted).abs().mean((1, 2, 3))
    brightness = brightness - brightness.mean(2, keepdim=True)
    maps = (brightness.std(2), brightness.diff(dim=1).abs().mean(2), brightness.diff(dim=2).abs().mean(2))
    bands = [nn.functional.adaptive_avg_pool1d(rows, 8) for rows in maps]
    return torch.log(torch.cat([*bands, distance[:, None]], dim=1) + 1e-3)


def learn_rendering(train: Dataset, val: Dataset, colours: torch.Tensor) -> dict:
    """Learn the rendering statistics of the training images.

    Returns:
        colours; mean, deviation and precision (inverse of the covariance, shrunk by a tenth to its diagonal) of the
        training images' statistics; limit, the Mahalanobis distance within which 99 % of the validation images lie.
    """

    def describe(images: Dataset) -> torch.Tensor:
        chosen = np.linspace(0, len(images) - 1, min(RENDERING_SAMPLE, len(images))).astype(int).tolist()
        return torch.cat([describe_rendering(images[index][0][None], colours) for index in chosen]).double()

    seen = describe(train)
    covariance = torch.cov(seen.T).view(seen.shape[1], -1).nan_to_num()
    variance = covariance.diag() + 1e-4
    rendering = {
        "colours": colours,
        "mean": seen.mean(0),
        "deviation": variance.sqrt(),
        "precision": torch.linalg.inv(0.9 * covariance + 0.1 * variance.diag() + 1e-4 * torch.eye(len(variance))),
    }
    off = describe(val) - rendering["mean"]
    distances = torch.einsum("ni,ij,nj->n", off, rendering["precision"], off).sqrt()
    return {**rendering, "limit": distances.quantile(0.99, interpolation="higher").item()}


class Rendering(NamedTuple):
    """How images compare with the training images in how they were rendered."""

    distances: np.ndarray  # Mahalanobis distance of each image, in units of what 99 % of the validation images keep
    shift: float  # Mahalanobis distance of their mean, less what chance adds; 0 for a single image
    differences: dict[str, float]  # by statistic, in standard deviations, the largest first


def compare_rendering(pixels: torch.Tensor, rendering: dict) -> Optional[Rendering]:
    """Compare images with the training images by their rendering statistics.

    Args:
        pixels: uint8, shape (images, 3, size, size).
        rendering: as `learn_rendering` returns it; of an older version: the result is None.
    """
    seen = describe_rendering(pixels, rendering["colours"]).double()
    if seen.shape[1] != len(rendering["mean"]):
        return None
    off = seen - rendering["mean"]
    squares = torch.einsum("ni,ij,nj->n", off, rendering["precision"], off)
    mean = off.mean(0)  # far off even where no single image is, as when all are upside down
    shift = (mean @ rendering["precision"] @ mean - squares.mean() / len(off)).clamp(0).sqrt().item()
    names = [f"{what} in eighth {band} from the top" for what in BAND_STATISTICS for band in range(1, 9)]
    differences = zip([*names, "distance from the training images' colours"], (mean / rendering["deviation"]).tolist())
    largest = dict(sorted(differences, key=lambda pair: -abs(pair[1])))
    return Rendering((squares.sqrt() / rendering["limit"]).numpy(), shift, largest)


# ---- Network and checkpoint


def make_network() -> ResNet:
    """Make the network, with random weights."""
    return resnet18(num_classes=len(CLASSES))


class Detector(NamedTuple):
    """A network in evaluation mode, on the CPU, and what its checkpoint says about it."""

    model: ResNet
    facts: dict


def load_content(path: Path) -> dict:
    """Load what torch.save wrote: weights and plain types only, without running code that a file may hold.

    torch checks no checksums, so that a flipped bit would pass as a weight: the zip's own are checked here.

    Raises:
        ValueError: the file is damaged, or something else.
    """
    try:
        content = path.read_bytes()
        if content.lstrip().startswith(b"<"):
            raise ValueError("it is a web page")
        if content[8:9] == b"{" and b'"data_offsets"' in content[:100_000]:
            raise ValueError("it is a safetensors file: save the state_dict with torch.save")
        if content.startswith(b"PK") and any(
            n.endswith("/constants.pkl") for n in zipfile.ZipFile(io.BytesIO(content)).namelist()
        ):
            raise ValueError("it is a TorchScript archive: save the state_dict with torch.save")
        if content.startswith(b"PK") and (damaged := zipfile.ZipFile(io.BytesIO(content)).testzip()):
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
    """Find a ResNet-18's state_dict in what a file holds, under its plain names.

    Raises:
        ValueError: there is none.
    """
    key = next((key for key in ("state_dict", "model_state_dict", "model") if isinstance(content.get(key), dict)), None)
    state = content[key] if key else content
    if not state or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise ValueError(f"{path} holds no weights; its keys: {', '.join(map(str, content))[:200]}")
    plain = {re.sub(r"^(_orig_mod\.|module\.)+", "", str(name)): tensor for name, tensor in state.items()}
    return {name.replace("fc.1.", "fc."): tensor for name, tensor in plain.items()}


def build_model(state: dict, path: Path) -> ResNet:
    """Build a two-class ResNet-18 from a state_dict, in evaluation mode, on the CPU.

    Raises:
        ValueError: the state_dict is not one, or a weight is not finite.
    """
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
