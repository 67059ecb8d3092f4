"""Train a ResNet-18 to tell deepfake from original speech by images of its spectrogram.

    python train_deepfake_detector.py

In:  images at any depth below DATA_DIR/deepfake/ and DATA_DIR/original/, all rendered in the same way
     (data/make_spectrograms.py makes them from audio files).
Out: the best checkpoint by validation loss and the final one; beside the final one history.csv (a row
     per epoch) and learning_curves.png; decoded images in CACHE_DIR.
     An interrupted run resumes when the script is started again. The files of a finished run are
     kept under names that begin with previous_.

The images that HOLDOUT_CSVS list are kept out of training and validation, so that
evaluate_deepfake_model.py can test the result on them. Runs on CUDA if available, else on the CPU.
The demo data takes about a minute on two cores with bfloat16 instructions, twice as long without.
"""

from __future__ import annotations

import io
import math
import os
import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple, Optional

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from models import dataset, detector, figures, gradients, runtime, script
from models.checks import check_shortcuts, check_start
from models.dataset import Chosen, Data
from models.detector import CLASSES
from models.images import IMAGENET_MEAN, IMAGENET_STD, learn_rendering, take_fingerprint, to_input
from models.pixel_cache import PixelCache
from models.runtime import Compute, Team, write_file
from models.start import Start, choose_start, join_seen, start_model
from models.tables import format_csv, name_recording

# ------------------------------------------------------------------------------------------------
# Settings. Relative paths start at this script's folder.
# Paths
DATA_DIR = Path("data")  # holds the folders deepfake/ and original/
HOLDOUT_CSVS = ["test_data/test.csv"]  # lists of images (img_path, relative to DATA_DIR) never trained on; []: none
CSV_ENCODING = "utf-8"  # of HOLDOUT_CSVS, with or without a byte order mark; "cp1252", "utf-16", ...
BEST_MODEL_PATH = Path("models/experiments/best_laundered_processed.pth")
FINAL_MODEL_PATH = Path("models/experiments/final_laundered_processed.pth")
CACHE_DIR = Path("models/cache")  # decoded images; may be deleted at any time
# Data
RECORDING_PATTERN = r"^([^/]+?)__[^/]*$"  # group 1 names the recording: in the file name, else in the path to it
IMAGE_SIZE = 112  # pixels, width and height of the network's input; 32 or more; 224: as good, four times as slow
VAL_FRACTION = 0.12  # fraction of the images used for validation; between 0 and 1
MAX_UNREADABLE = 0.01  # fraction of the images that may be unreadable before the run stops; 0 to 1
# Model
PRETRAINED = "models/speech_resnet18.pth"  # a detector or other .pth, "IMAGENET1K_V1": torchvision's, or None: random
# Training
EPOCHS = 8
EPOCH_IMAGES = 5_000  # images drawn for an epoch, at most; fewer where there are fewer
TIME_CROP = 0.5  # fraction of an image's width, at a random position, that a training step uses; 0.01 to 1
BATCH_SIZE = 64  # images
LEARNING_RATE = None  # peak of the schedule; None: 1e-3 from random weights, 3e-4 from ImageNet's, 5e-4 from a detector
WEIGHT_DECAY = 0.05  # of AdamW
LABEL_SMOOTHING = 0.05  # 0 to below 1
PATIENCE = 20  # epochs without a lower validation loss after which training stops
SEED = 0
# System
WORKERS = None  # processes that decode images; 0: the main process; None: chosen by machine and job
CACHE_GB = 20  # GB that CACHE_DIR may hold; images beyond are decoded again in every epoch; 0: all are
PRECISION = "auto"  # "auto": bfloat16 or float16 where the hardware is faster with it; "float32"
RESUME = True  # resume an interrupted run; False: start over
# ------------------------------------------------------------------------------------------------

RULES = {
    **dict.fromkeys(("DATA_DIR", "BEST_MODEL_PATH", "FINAL_MODEL_PATH", "CACHE_DIR"), runtime.PATH),
    "HOLDOUT_CSVS": runtime.PATH_LIST,
    "CSV_ENCODING": runtime.ENCODING,
    "RECORDING_PATTERN": runtime.Rule(lambda value: re.compile(value).groups >= 1, "a regular expression with a group"),
    "IMAGE_SIZE": runtime.whole_number(32),
    "VAL_FRACTION": runtime.number(0.001, 0.999),
    "MAX_UNREADABLE": runtime.number(0, 1),
    "PRETRAINED": runtime.or_none(runtime.PATH._replace(allowed="'IMAGENET1K_V1' or a path")),
    "EPOCHS": runtime.whole_number(1),
    "EPOCH_IMAGES": runtime.whole_number(2),
    "TIME_CROP": runtime.number(0.01, 1),
    "BATCH_SIZE": runtime.whole_number(2),
    "LEARNING_RATE": runtime.or_none(runtime.number(1e-12, 10)),
    "WEIGHT_DECAY": runtime.number(0, 10),
    "LABEL_SMOOTHING": runtime.number(0, 0.999),
    "PATIENCE": runtime.whole_number(1),
    "SEED": runtime.whole_number(0),
    "WORKERS": runtime.or_none(runtime.whole_number(0)),
    "CACHE_GB": runtime.number(0, 1e9),
    "PRECISION": runtime.one_of("auto", "float32"),
    "RESUME": runtime.one_of(True, False),
}
NOT_SHAPING = (  # settings that do not shape the result: they may change before an interrupted run resumes
    *("DATA_DIR", "HOLDOUT_CSVS", "CSV_ENCODING", "BEST_MODEL_PATH", "FINAL_MODEL_PATH", "CACHE_DIR"),
    *("MAX_UNREADABLE", "WORKERS", "CACHE_GB", "RESUME"),
)
SHORTEST_CROP = 48  # pixels; at 32 and less oneDNN (torch 2.14, 2.15) gave wrong bfloat16 gradients for layer4.0.conv1
METRICS = ("train_loss", "val_loss", "val_balanced_accuracy", "val_auc")


class Outputs(NamedTuple):
    """The files that a run writes."""

    best: Path
    final: Path
    history: Path
    curves: Path
    state: Path  # what an interrupted run resumes from


# ---- Batches


class Batches:
    """The batches of one epoch after another, of each this rank's part, as lists of indices.

    Images are drawn with replacement, by weight. All ranks draw the same order, so that together they take the batches
    that a single process would take.
    """

    def __init__(self, weights: np.ndarray, images: int, batch_size: int, team: Team) -> None:
        """Draw up to `images` for an epoch, by these weights."""
        self.weights, self.team, self.generator = torch.from_numpy(weights), team, torch.Generator()
        self.images = min(images, len(weights))
        self.batch_size = min(batch_size, self.images)

    def __len__(self) -> int:
        return self.images // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        count = len(self) * self.batch_size
        order = torch.multinomial(self.weights, count, replacement=True, generator=self.generator)
        for batch in order.split(self.batch_size):
            yield self.team.take_part(batch).tolist()


def build_loaders(data: Data, compute: Compute, settings: dict, team: Team) -> tuple[DataLoader, DataLoader]:
    """Build the training loader, drawn anew in each epoch, and the validation loader, for this rank's part of each.

    Where nothing is left to decode, workers would only take the network's cores: a cached image costs 0.2 ms.
    """
    on_gpu, entries = compute.device.type == "cuda", data.train.dataset.cache.entries
    workers = runtime.choose_workers(settings["WORKERS"], team.local_size)
    if settings["WORKERS"] is None and not on_gpu and all(entry.offset is not None for entry in entries.values()):
        workers = 0
    common = {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": on_gpu}
    batches = Batches(data.weights, settings["EPOCH_IMAGES"], settings["BATCH_SIZE"], team)
    val_part = Subset(data.val.dataset, team.take_part(data.val.indices))
    val_batch = max(1, 2 * settings["BATCH_SIZE"] // team.size)
    return DataLoader(data.train, batch_sampler=batches, **common), DataLoader(val_part, val_batch, **common)


# ---- Augmentation. Nothing is flipped or rotated: the axes have a meaning.


def crop_in_time(images: torch.Tensor, crop: float, rng: torch.Generator) -> torch.Tensor:
    """Crop each image to a part that begins anywhere in time and wraps around at the end.

    Args:
        images: shape (batch, 3, height, width).
        crop: TIME_CROP.
        rng: on the device of the images.

    Returns:
        The same shape, but for a width of crop * width (at least SHORTEST_CROP where the image has as much).
    """
    batch, _, height, full_width = images.shape
    width = max(min(full_width, SHORTEST_CROP), round(crop * full_width))
    starts = (torch.rand(batch, 1, generator=rng, device=rng.device) * full_width).long()
    columns = (torch.arange(width, device=rng.device) + starts) % full_width
    return torch.gather(images, 3, columns[:, None, None].expand(-1, 3, height, -1))


# ---- A run, and what it saves when


class Run:
    """A training run: what learns, its history, and the files that keep both.

    Attributes:
        history: a dict per epoch, as in history.csv.
        last: epoch, metrics, calibration and validation scores of the last epoch, as its checkpoint holds them.
        parts: in so many parts a batch is computed; 1 until the memory ran out.
    """

    def __init__(
        self, model: nn.Module, steps: int, compute: Compute, outputs: Outputs, facts: dict, start: Start
    ) -> None:
        """Set up optimizer and schedule of so many steps; facts: what checkpoints hold beside weights and `last`."""
        settings = facts["settings"]
        self.compute, self.outputs, self.facts, self.start = compute, outputs, facts, start
        self.model = model.to(compute.device, memory_format=torch.channels_last)
        if compute.device.type == "cpu":
            gradients.speed_up_gradients(self.model)
        rate, decay = settings["LEARNING_RATE"], settings["WEIGHT_DECAY"]
        self.optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=decay, fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, partial(scale_rate, steps=steps))
        self.scaler = torch.amp.GradScaler(compute.device.type, enabled=compute.dtype == torch.float16)
        self.history: list[dict] = []
        self.last: dict = {}
        self.parts = 1

    @property
    def best(self) -> Optional[dict]:
        """The row of the epoch with the lowest validation loss, the first of equals; None before the first epoch."""
        return min(self.history, key=lambda row: row["val_loss"], default=None)

    def save_epoch(self, conditions: dict) -> None:
        """Save the last epoch: its checkpoint, if it is the best so far; the state to resume from; the history."""
        if len(self.history) == 1:
            set_aside_previous(self.outputs)
        if self.best is self.history[-1]:
            self.save_checkpoint(self.outputs.best)
        learning = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "schedule", "scaler")}
        about = {"history": self.history, "last": self.last, "conditions": conditions}
        about |= {"start": self.start._replace(weights=None)._asdict(), "precision": str(self.compute.dtype)}
        save(self.outputs.state, {**learning, **about})
        with suppress(OSError):  # the state holds it too; what is still missing in the end is named
            write_file(self.outputs.history, self.format_history())

    def format_history(self) -> bytes:
        """Write the history as CSV."""
        return format_csv([list(self.history[0]), *(row.values() for row in self.history)], newline="\r\n")

    def save_checkpoint(self, path: Path) -> None:
        """Save the weights and every fact that scoring an image needs; plain types and tensors only."""
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.model.state_dict().items()}
        save(path, {"state_dict": state, **self.facts, **self.last})

    def restore(self, state: dict) -> None:
        """Continue from what an interrupted run saved."""
        for name in ("model", "optimizer", "schedule", "scaler"):
            if state[name]:  # a scaler's is empty where the run began without float16
                getattr(self, name).load_state_dict(state[name])
        self.history, self.last = state["history"], state["last"]
        if state["precision"] != str(self.compute.dtype):
            print(f"Warning: the run began in {state['precision']} and continues in {self.compute.dtype}")
        path = self.outputs.best
        found = detector.load_content(path).get("epoch", 0) if path.exists() else 0
        if found < self.best["epoch"]:
            raise ValueError(f"{path} is not of epoch {self.best['epoch']}: put it back, or start over: RESUME = False")
        print(f"Resuming after epoch {len(self.history)} (RESUME = False starts over)")

    def finish(self) -> None:
        """Save the final checkpoint, the history and the learning curves; where all could be, delete the state."""
        self.save_checkpoint(self.outputs.final)
        curves = figures.draw_learning_curves(self.history, self.best["epoch"])
        pairs = ((self.outputs.history, self.format_history()), (self.outputs.curves, curves))
        if [path for path, content in pairs if not runtime.try_write(path, content)]:
            print("Run it again to write what is missing; nothing is trained again", file=sys.stderr)
        else:
            delete_state(self.outputs.state)


def save(path: Path, content: dict) -> None:
    """Save with torch.save, as a whole file."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_file(path, buffer.getvalue())


def set_aside_previous(outputs: Outputs) -> None:
    """Rename the files of the run before to previous_*, unless that would replace a finished run by an unfinished."""
    if outputs.final.exists() or not outputs.final.with_name("previous_" + outputs.final.name).exists():
        for path in filter(Path.exists, (outputs.best, outputs.final, outputs.history, outputs.curves)):
            try:
                runtime.replace_file(path, path.with_name("previous_" + path.name))
                print(f"Kept from the previous run: previous_{path.name}")
            except OSError as error:
                what = f"{path} cannot be renamed to previous_{path.name}: {error.strerror}"
                if path in (outputs.best, outputs.final):
                    raise ValueError(what) from None
                runtime.leave_out(what)
    delete_state(outputs.state)


def delete_state(path: Path) -> None:
    """Delete the state of a run that is over."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        runtime.leave_out(f"{path} cannot be deleted: {error.strerror}")


def prepare_outputs(best: Path, final: Path) -> Outputs:
    """Name the files that a run writes, make their folders, and delete what killed runs left there."""
    for path in (best, final):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK) or path.is_dir():
            raise ValueError(f"{path} cannot be written: its folder is read-only, or it is a folder itself")
        runtime.remove_leftovers(path.parent)
    return Outputs(best, final, *map(final.with_name, ("history.csv", "learning_curves.png", "resume_state.pth")))


def load_state(path: Path) -> Optional[dict]:
    """Load the state of an interrupted run; None: there is none."""
    if not path.exists():
        return None
    try:
        state = detector.load_content(path)
        if "conditions" not in state:
            raise ValueError(f"{path} is of another version of this script")
        return state
    except ValueError as error:
        raise ValueError(f"{error}: the run cannot be resumed; RESUME = False starts over") from None


def describe_conditions(chosen: Chosen, data: Data, settings: dict) -> dict:
    """Describe what shapes the result: a run can only resume where none of it has changed."""
    root = data.train.dataset.root
    listing = [(os.path.relpath(path, root), pixels) for path, pixels in zip(chosen.paths, chosen.fingerprints)]
    digest = take_fingerprint(repr([*listing, data.train.indices, data.val.indices]).encode())
    return {
        **{name: value for name, value in settings.items() if name not in NOT_SHAPING},
        "the list of images": f"{len(listing)} images, digest {digest:x}",
    }


def compare_conditions(before: dict, now: dict) -> None:
    """Raise ValueError that names what shapes the result and differs from the interrupted run."""
    differing = [f"{name} was {before.get(name)!r}, is {now[name]!r}" for name in now if before.get(name) != now[name]]
    if differing:
        raise ValueError(
            f"the interrupted run cannot be resumed: {'; '.join(differing)} (set these back, or RESUME = False)"
        )


# ---- Training


def scale_rate(step: int, steps: int) -> float:
    """Return the fraction of the peak learning rate at a step: warm-up over a twentieth, then cosine decay to 0."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    return (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up))) / 2 if step < steps else 0.0


def train_one_epoch(run: Run, network: nn.Module, loader: DataLoader, loss_fn: Callable, rng: torch.Generator) -> float:
    """Take one optimizer step per batch of cropped images.

    Args:
        network: run.model, wrapped where several processes share the work.
        loss_fn: the loss of logits (images, classes) and labels (images,), summed over images.

    Returns:
        The mean loss.

    Raises:
        ValueError: a loss is not finite.
    """
    network.train()
    device, batches, crop, losses = run.compute.device, loader.batch_sampler, run.facts["settings"]["TIME_CROP"], []
    weight = batches.batch_size / batches.team.size  # of the images of a rank's part: gradients are averaged over ranks
    for images, labels in tqdm(loader, "Training", leave=False, unit=" batches", disable=None):
        images = crop_in_time(images.to(device, non_blocking=True), crop, rng)
        inputs = to_input(images.float(), IMAGENET_MEAN, IMAGENET_STD, white=255)
        labels = labels.to(device, non_blocking=True)
        losses.append(add_gradients(run, network, inputs, lambda *part: loss_fn(*part) / weight, labels))
        if len(losses) % 50 == 0 or len(losses) == len(loader):  # seldom: the GPU has to be waited for
            check_losses(losses[-50:], len(losses))
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.schedule.step()
    return torch.stack(losses).mean().item()


def add_gradients(
    run: Run, network: nn.Module, inputs: torch.Tensor, loss_fn: Callable, labels: torch.Tensor
) -> torch.Tensor:
    """Compute a batch's gradients; where the memory runs out, again in twice as many parts. Returns its loss."""
    while True:
        size = math.ceil(len(inputs) / run.parts)
        run.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=run.compute.device)
        try:
            for part_inputs, part_labels in zip(inputs.split(size), labels.split(size)):
                with run.compute.autocast():
                    logits = network(part_inputs)
                loss = loss_fn(logits.float(), part_labels)
                run.scaler.scale(loss).backward()
                total += loss.detach()
            return total
        except RuntimeError as error:
            alone = network is run.model  # other processes would wait for all gradients
            if size == 1 or not alone or not runtime.is_out_of_memory(error):
                raise
        if run.parts == 1:
            print("\nOut of memory: computing batches in parts from now on (batch normalisation sees fewer images)")
        run.parts *= 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def check_losses(losses: list[torch.Tensor], steps: int) -> None:
    """Raise ValueError if one of the last losses, up to this number of steps in the epoch, is not finite."""
    wrong = torch.nonzero(~torch.isfinite(torch.stack(losses))).flatten().tolist()
    if wrong:
        raise ValueError(
            f"training diverged: the loss of step {steps - len(losses) + wrong[0] + 1} of this epoch is not finite; "
            "lower LEARNING_RATE, or set PRECISION = 'float32' (the best checkpoint so far is intact)"
        )


@torch.inference_mode()
def predict_logits(run: Run, loader: DataLoader, batch_size: int, team: Team) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the logits of every image, float32 (images, classes), and the labels (images,), on the CPU."""
    run.model.eval()
    logits, labels = [torch.empty(0, len(CLASSES))], [torch.empty(0, dtype=torch.int64)]
    for images, batch_labels in loader:
        images = images.to(run.compute.device, non_blocking=True).float().div_(255)
        inputs = to_input(images)
        size = len(inputs) if run.parts == 1 else math.ceil(batch_size / run.parts)
        with run.compute.autocast():
            logits += [run.model(part).float().cpu() for part in inputs.split(size)]
        labels.append(batch_labels)
    return join_parts(team.gather((torch.cat(logits), torch.cat(labels))))


def join_parts(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Join logits and labels of the ranks, of which each holds every size-th image, in the order of one process."""
    size = sum(len(labels) for _, labels in parts)
    logits, labels = torch.empty(size, len(CLASSES)), torch.empty(size, dtype=torch.int64)
    for rank, (part_logits, part_labels) in enumerate(parts):
        logits[rank :: len(parts)], labels[rank :: len(parts)] = part_logits, part_labels
    return logits, labels


def measure(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Measure validation: loss with classes weighted equally, balanced accuracy, area under the ROC curve."""
    from sklearn.metrics import balanced_accuracy_score, roc_auc_score

    if not torch.isfinite(logits).all():
        raise ValueError("training diverged: outputs not finite; lower LEARNING_RATE, or set PRECISION = 'float32'")
    weights = 1 / torch.bincount(labels, minlength=len(CLASSES))
    loss = nn.functional.cross_entropy(logits, labels, weights.float())
    margin = (logits[:, 1] - logits[:, 0]).numpy()
    return {
        "val_loss": loss.item(),
        "val_balanced_accuracy": float(balanced_accuracy_score(labels, margin > 0)),
        "val_auc": float(roc_auc_score(labels, margin)),
    }


def calibrate(logits: torch.Tensor, labels: torch.Tensor, recordings: list[str]) -> dict:
    """Fit the calibration, and list what validation scores with it: what a later score is compared with.

    Returns:
        calibration, and validation_scores: for each class the mean log-likelihood ratios (higher = more bona fide) of
        its recordings, sorted, float32.
    """
    calibration = detector.fit_calibration(logits, labels)
    llr = -(calibration["scale"] * (logits[:, 0] - logits[:, 1]) + calibration["offset"])
    scores = {}
    for index, name in enumerate(CLASSES):
        by_recording = defaultdict(list)
        for i in torch.nonzero(labels == index).flatten().tolist():
            by_recording[recordings[i]].append(llr[i].item())
        scores[name] = torch.tensor(sorted(np.mean(values) for values in by_recording.values()), dtype=torch.float32)
    return {"calibration": calibration, "validation_scores": scores}


def fit(run: Run, loaders: tuple[DataLoader, DataLoader], recordings: list[str], conditions: dict, team: Team) -> None:
    """Train, validate and print a line per epoch; keep history, best checkpoint and state up to date.

    Args:
        recordings: of the validation images; conditions: as `describe_conditions` returns them.
    """
    settings, device = run.facts["settings"], run.compute.device
    train_loader, val_loader = loaders
    loss_fn = partial(nn.functional.cross_entropy, label_smoothing=settings["LABEL_SMOOTHING"], reduction="sum")
    rng = torch.Generator(device)
    network = team.wrap_model(run.model, device)
    while len(run.history) < settings["EPOCHS"]:
        if run.history and len(run.history) - run.best["epoch"] >= settings["PATIENCE"]:
            print(f"Stopped early: no lower validation loss in {settings['PATIENCE']} epochs")
            break
        started, epoch = time.perf_counter(), len(run.history) + 1
        train_loader.batch_sampler.generator.manual_seed(settings["SEED"] * 1_000_003 + epoch)
        rng.manual_seed((settings["SEED"] * 1_000_003 + epoch) * team.size + team.rank)
        row = {"epoch": epoch, "learning_rate": run.schedule.get_last_lr()[0]}
        losses = team.gather(train_one_epoch(run, network, train_loader, loss_fn, rng))
        row["train_loss"] = float(np.mean(losses))
        team.copy_buffers(run.model)
        logits, labels = predict_logits(run, val_loader, settings["BATCH_SIZE"], team)
        row |= team.share(measure(logits, labels))
        row["seconds"] = time.perf_counter() - started
        print("  ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
        run.history.append(row)
        run.last = {"epoch": epoch, "metrics": {name: row[name] for name in METRICS}}
        run.last |= calibrate(logits, labels, recordings)
        if team.rank == 0:
            run.save_epoch(conditions)


# ---- Main


def collect_facts(chosen: Chosen, data: Data, shortcuts: Optional[dict], start: Start, settings: dict) -> dict:
    """Collect what every checkpoint holds beside weights, epoch and metrics: all that scoring an image needs.

    What the start has seen counts as seen.
    """
    recordings = [take_fingerprint(name.encode()) for name in set(chosen.recordings)]
    return {
        "format": detector.CHECKPOINT_FORMAT,
        "classes": list(CLASSES),
        "image_size": settings["IMAGE_SIZE"],
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
        "seen_images": join_seen(chosen.fingerprints, start.facts.get("seen_images")),
        "seen_recordings": join_seen(recordings, start.facts.get("seen_recordings")),
        "recording_pattern": settings["RECORDING_PATTERN"],
        "initial_weights": start.words,
        "shortcuts": shortcuts,
        "unreadable_images": chosen.unreadable,
        "appearance": learn_rendering(data.train, data.val),
        "settings": settings,
        "versions": runtime.list_versions(),
    }


def main() -> int:
    """Train on the images below DATA_DIR. Returns the exit status: 0, or 1 if something was left out."""
    here = Path(__file__).resolve().parent
    settings = runtime.check_settings({name: globals()[name] for name in RULES}, RULES)
    settings["HOLDOUT_CSVS"] = [str(path) for path in settings["HOLDOUT_CSVS"]]
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    team = runtime.join_team()
    outputs = prepare_outputs(here / settings["BEST_MODEL_PATH"], here / settings["FINAL_MODEL_PATH"])
    with ExitStack() as locks:
        for folder in sorted({outputs.best.parent, outputs.final.parent}) if team.rank == 0 else ():
            locks.enter_context(script.lock_folder(folder))
        return train(here, settings, outputs, team)


def train(here: Path, settings: dict, outputs: Outputs, team: Team) -> int:
    """Train a detector; paths start at `here`. Returns the exit status."""
    data_dir = Path(os.path.normpath(here / settings["DATA_DIR"]))
    runtime.keep_freed_memory()
    if settings["BATCH_SIZE"] < 2 * team.size:
        raise ValueError(f"BATCH_SIZE = {BATCH_SIZE} (allowed: at least 2 for each of {team.size} processes)")
    compute = runtime.choose_compute(settings["PRECISION"])

    folder = dataset.find_images(data_dir)
    listed = dataset.list_holdout(
        [here / path for path in settings["HOLDOUT_CSVS"]], data_dir, settings["CSV_ENCODING"]
    )
    folder.cache = PixelCache(here / settings["CACHE_DIR"], settings["IMAGE_SIZE"], settings["CACHE_GB"] * 1e9)
    state = team.share(load_state(outputs.state) if settings["RESUME"] and team.rank == 0 else None)
    chosen_start = None
    if team.rank == 0 and not state:
        chosen_start = choose_start(settings["PRETRAINED"], here, settings["IMAGE_SIZE"])
    start = Start(**state["start"]) if state else team.share(chosen_start)
    torch.manual_seed(settings["SEED"])
    model = start_model(start)

    chosen = dataset.choose_images(folder, listed, settings, team)
    shortcuts = check_shortcuts(chosen.looks, chosen.labels, chosen.groups)
    data = dataset.split_images(folder, chosen, settings)
    if start.facts and team.rank == 0:
        held = [folder.cache.entries[path].fingerprint for path in listed if path in folder.cache.entries]
        recordings = {name_recording(path, folder.root, settings["RECORDING_PATTERN"]) for path in listed}
        check_start(start.facts, held, recordings, dict(zip(chosen.paths, chosen.fingerprints)))
    conditions = describe_conditions(chosen, data, settings)
    if state:
        compare_conditions(state["conditions"], conditions)
    loaders = build_loaders(data, compute, settings, team)
    settings["LEARNING_RATE"] = settings["LEARNING_RATE"] or start.learning_rate
    print(f"Start: {start.words}; learning rate {settings['LEARNING_RATE']:g}, at most {settings['EPOCHS']} epochs")
    facts = collect_facts(chosen, data, shortcuts, start, settings)
    run = Run(model, len(loaders[0]) * settings["EPOCHS"], compute, outputs, facts, start)
    if state:
        run.restore(state)
    fit(run, loaders, data.val_recordings, conditions, team)
    if team.rank == 0:
        run.finish()
    team.leave()
    if start.words.startswith("random") and settings["PRETRAINED"] is not None:
        print(f"WARNING: this model started from random weights: {start.words}")
    print(f"Best epoch {run.best['epoch']}: validation loss {run.best['val_loss']:.4f}, AUC {run.best['val_auc']:.4f}")
    print(f"Best checkpoint   {settings['BEST_MODEL_PATH']}\nFinal checkpoint  {settings['FINAL_MODEL_PATH']}")
    print("Beside it         history.csv, learning_curves.png")
    return 1 if chosen.unreadable or folder.problems else 0


if __name__ == "__main__":
    sys.exit(script.run_script(main, __doc__, "run it again to resume after the last finished epoch (RESUME = True)"))
