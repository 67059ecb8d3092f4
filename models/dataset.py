"""The images of a training run: found, read once, held out, split by recording or folder."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Subset
from torchvision.datasets import ImageFolder

from models import runtime
from models.detector import CLASSES
from models.pixel_cache import PixelCache
from models.runtime import Team
from models.tables import find_columns, list_merged_names, name_recording, parse_table, resolve_image, unify_spelling

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
MIN_SOURCES = 5  # with fewer, holding out whole ones for validation would cost training too much
FOLDER_PATTERN = r"^(.*/[^/]+?)(?:__[^/]*)?$"  # as RECORDING_PATTERN it tells equal names in two folders apart


class Chosen(NamedTuple):
    """The images that a run uses: what each has, in the order of the folder."""

    paths: list[str]
    labels: np.ndarray  # class indices
    recordings: list[str]
    fingerprints: list[int]  # of the pixels
    groups: np.ndarray  # as `group_images` numbers them: by recording and pixels
    looks: np.ndarray  # float32, shape (images, 4), as LOOKS names them
    unreadable: int  # number of those left out because they cannot be read


class Data(NamedTuple):
    """The images of a run."""

    train: Subset
    val: Subset
    weights: np.ndarray  # of the training images, for drawing them
    val_recordings: list[str]  # the recording of each validation image


# ---- Images


class SpectrogramFolder(ImageFolder):
    """An ImageFolder of the classes in CLASSES, whatever else lies beside them; its pixels come from a cache.

    Attributes:
        problems: a reason for each folder that cannot be read.
        ignored: number of files that are not images of SUFFIXES, by suffix.
    """

    cache: PixelCache

    def __init__(self, root: Path) -> None:
        self.problems: list[str] = []
        self.ignored: Counter[str] = Counter()
        super().__init__(str(root), allow_empty=True)

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        names = [name.lower() for name in CLASSES]
        return names, {name: index for index, name in enumerate(names)}

    def make_dataset(self, directory: str, class_to_idx: dict[str, int], *_, **__) -> list[tuple[str, int]]:  # noqa: ANN002
        samples = []
        for name, index in class_to_idx.items():
            files, problems = runtime.find_files(find_class_dir(Path(directory), name))
            self.problems += problems
            for path in files:
                suffix = os.path.splitext(path)[1].lower()
                if suffix in SUFFIXES:
                    samples.append((path, index))
                else:
                    self.ignored[suffix] += 1
        return samples

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path, label = self.samples[index]
        return self.cache.read(path), label


def find_class_dir(data_dir: Path, name: str) -> Path:
    """Find a class folder, whose name may differ in case."""
    if not data_dir.is_dir():
        raise ValueError(f"folder not found: {data_dir} (DATA_DIR)")
    folders = [entry.name for entry in data_dir.iterdir() if entry.is_dir() and not entry.name.startswith((".", "__"))]
    alike = [folder for folder in folders if folder.lower() == name]
    if len(alike) != 1 and name not in alike:
        found = ", ".join(sorted(folders)) or "no folder"
        raise ValueError(
            f"folder not found: {data_dir / name} (DATA_DIR must hold a folder for each class; it holds {found})"
        )
    return data_dir / (name if name in alike else alike[0])


def find_images(data_dir: Path) -> SpectrogramFolder:
    """Index the images below the class folders, and print how many each folder holds.

    Raises:
        ValueError: a class folder is missing, or holds fewer than two images.
    """
    folder = SpectrogramFolder(data_dir)
    for index, name in enumerate(folder.classes):
        if (count := folder.targets.count(index)) < 2:
            raise ValueError(f"{count} images below {data_dir / name}: two are needed ({' '.join(SUFFIXES)})")
    others = sorted(entry.name for entry in data_dir.iterdir() if entry.is_dir())
    others = [name for name in others if name.lower() not in folder.classes and not name.startswith((".", "__"))]
    if others:
        print(f"Folders below {data_dir} that are not a class and are ignored: {', '.join(others)}")
    if folder.ignored:
        ignored = sorted(folder.ignored.items())
        kinds = ", ".join(f"{count:,} {suffix or 'without a suffix'}" for suffix, count in ignored)
        print(f"Ignored files in the class folders: {kinds} (images are {' '.join(SUFFIXES)})")
    for problem in folder.problems:
        print(f"left out: {problem}", file=sys.stderr)
    print(f"Images below {data_dir}:")
    counts = Counter(os.path.relpath(os.path.dirname(path), data_dir) for path, _ in folder.samples)
    for name, count in sorted(counts.items()):
        print(f"  {name:<38} {count:>9,}")
    return folder


def read_all_images(cache: PixelCache, paths: list[str], workers: int, team: Team) -> None:
    """Decode every image once on each machine: which are unreadable, and which show the same?"""
    if team.local_rank == 0:
        cache.read_all(paths, workers)
    results = team.gather((cache.entries, cache.reasons) if team.local_rank == 0 else None)
    cache.entries, cache.reasons = results[team.rank - team.local_rank]


# ---- Hold-out and split


def list_holdout(csv_paths: list[Path], data_dir: Path, encoding: str) -> list[str]:
    """List the images, as absolute paths, that the hold-out CSVs name; ValueError where most of a CSV's are missing."""
    listed = []
    for path in csv_paths:
        if not path.is_file():
            raise ValueError(
                f"hold-out list not found: {path}; correct HOLDOUT_CSVS, or set HOLDOUT_CSVS = [] "
                "to train on every image"
            )
        (header, *rows), _ = parse_table(path.read_bytes(), path, encoding)
        column = find_columns(header)["img_path"]
        cells = (row[column] for row in rows if len(row) > column)
        images = [resolve_image(data_dir, cell) for cell in cells if cell.strip()]
        missing = [image for image in images if not os.path.isfile(image)]
        if 2 * len(missing) > len(images):
            raise ValueError(
                f"hold-out list {path}: {len(missing):,} of {len(images):,} images cannot be found, such as "
                f"{missing[0]}; put them back, correct img_path (relative to DATA_DIR, {data_dir}), or take the list "
                "out of HOLDOUT_CSVS to train without it"
            )
        listed += images
    return listed


def leave_out_holdout(folder: SpectrogramFolder, listed: list[str], pattern: str) -> list[str]:
    """Leave out what is listed for testing, copies of it under other names, and its recordings."""
    held, entries = set(listed), folder.cache.entries
    held_pixels = {entries[path].fingerprint for path in held if path in entries}
    held_recordings = {name_recording(path, folder.root, pattern) for path in held}
    kept, counts = [], Counter()
    for path, label in folder.samples:
        if path in held:
            counts["listed"] += 1
        elif path in entries and entries[path].fingerprint in held_pixels:
            counts["copies"] += 1
        elif name_recording(path, folder.root, pattern) in held_recordings:
            counts["relatives"] += 1
        else:
            kept.append(path)
            counts[label] += 1
    if held:
        print(
            f"Held out: {counts['listed']:,} of {len(held):,} listed images, {counts['copies']:,} copies of listed "
            f"images under other names, {counts['relatives']:,} other images of their recordings"
        )
    if unseen := sum(path not in entries for path in held):
        print(f"Warning: {unseen:,} listed images are missing or unreadable: copies of them cannot be recognised")
    empty = [i for i in range(len(CLASSES)) if not counts[i]]
    empty = [f"{folder.targets.count(index):,} images of class {CLASSES[index]}" for index in empty]
    if empty:
        raise ValueError(f"all {' and all '.join(empty)} are held out (see HOLDOUT_CSVS and RECORDING_PATTERN)")
    return kept


def leave_out_unreadable(paths: list[str], reasons: dict[str, str], limit: float, rank: int) -> list[str]:
    """Leave out, and name, the images that could not be read; ValueError if they are more than `limit` of all."""
    unreadable = [path for path in paths if path in reasons]
    if len(unreadable) > limit * len(paths):
        raise ValueError(
            f"{len(unreadable)} of {len(paths)} images are unreadable, more than MAX_UNREADABLE = {limit}; "
            f"the first: {unreadable[0]}: {reasons[unreadable[0]]}"
        )
    for path in unreadable if rank == 0 else ():
        print(f"left out, unreadable: {path}: {reasons[path]}", file=sys.stderr)
    return [path for path in paths if path not in reasons]


def find_folders(paths: list[str], data_dir: str) -> list[str]:
    """Find the sub-folder (of a class folder, or of combined/ in it) that each image is in, by name; "" for none."""
    names = []
    for path in paths:
        _, *folders = os.path.relpath(unify_spelling(os.path.dirname(path)), data_dir).split(os.sep)
        names.append(next(iter(folders[1:] if folders[:1] == ["combined"] else folders), ""))
    return names


def group_images(*namings: list) -> np.ndarray:
    """Number the groups of images that must stay on one side of the split: those that share a name in any naming.

    Returns:
        int array, shape (images,): the group of each image, from 0.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    ids: dict[tuple, int] = {}
    nodes = [[ids.setdefault((which, name), len(ids)) for name in names] for which, names in enumerate(namings)]
    edges = (np.tile(nodes[0], len(nodes) - 1), np.concatenate(nodes[1:]))
    graph = coo_matrix((np.ones(len(edges[0]), np.int8), edges), shape=(len(ids), len(ids)))
    return connected_components(graph, directed=False)[1][nodes[0]]


def split_by_recording(groups: np.ndarray, labels: np.ndarray, val_fraction: float, seed: int) -> np.ndarray:
    """Draw whole groups for validation until each class has its fraction there.

    Returns:
        bool array, shape (images,): True for validation.
    """
    counts = np.zeros((groups.max() + 1, len(CLASSES)), int)
    np.add.at(counts, (groups, labels), 1)
    missing = np.maximum(1, val_fraction * counts.sum(axis=0)).tolist()
    in_val = np.zeros(len(counts), bool)
    order = np.random.default_rng(seed).permutation(len(counts))
    for group, sizes in zip(order.tolist(), counts[order].tolist()):
        rest = [wanted - size for wanted, size in zip(missing, sizes)]
        if sum(map(abs, rest)) < sum(map(abs, missing)):
            in_val[group], missing = True, rest
    for index in range(len(CLASSES)):  # few, large recordings: take the smallest one
        if not counts[in_val, index].any():
            candidates = np.flatnonzero(counts[:, index])
            in_val[candidates[counts[candidates].sum(axis=1).argmin()]] = True
    if not (counts[in_val].any(axis=0) & counts[~in_val].any(axis=0)).all():
        raise ValueError(
            "too few recordings to split: each class needs at least two (a file's name up to '__' names its "
            "recording; see RECORDING_PATTERN)"
        )
    return in_val[groups]


def weigh_images(folders: list[str], labels: np.ndarray) -> np.ndarray:
    """Weigh images for drawing: classes count the same within each folder, folders by the square root of their size.

    So a network learns less of what tells the folders apart. Images without a folder count as one more. At last each
    class is scaled to half of all draws: many folders of one class only tip the balance within the others.

    Returns:
        float64, shape (images,), sum 1.
    """
    pairs = list(zip(folders, labels.tolist()))
    sizes, counts = Counter(folders), Counter(pairs)
    classes = Counter(name for name, _ in counts)
    weights = np.array([sizes[name] ** 0.5 / classes[name] / counts[name, label] for name, label in pairs])
    return weights / np.bincount(labels, weights)[labels] / len(CLASSES)


def report_names(paths: list[str], recordings: list[str], fingerprints: list[int], labels: np.ndarray) -> None:
    """Print how recordings are named, which file names repeat in several folders, and which images are identical."""
    names = sorted(set(recordings))
    print(f"Recordings are named like: {', '.join(names[:: max(1, len(names) // 3)][:3])}")
    if repeated := list_merged_names(paths, recordings):
        print(
            f"Warning: {len(repeated):,} file names, such as {repeated[0]}, are in several folders and count as one "
            f'recording each; RECORDING_PATTERN = r"{FOLDER_PATTERN}" takes the folder in'
        )
    if repeated := len(paths) - len(set(fingerprints)):
        print(f"Identical images: {repeated:,} repeat another and stay on its side")
    images = dict(zip(zip(fingerprints, labels.tolist()), paths))  # one for each pixels and class
    pairs = [f"{images[pixels, 0]} = {path}" for (pixels, i), path in images.items() if i and (pixels, 0) in images]
    if pairs:
        more = f"; and {len(pairs) - 3:,} more" if len(pairs) > 3 else ""
        print(
            f"WARNING: {len(pairs):,} images are in both classes; delete the wrong one of each: {'; '.join(pairs[:3])}"
            f"{more}"
        )


def choose_images(folder: SpectrogramFolder, listed: list[str], settings: dict, team: Team) -> Chosen:
    """Read every image once, and leave out what is listed for testing or unreadable."""
    labels = dict(folder.samples)
    elsewhere = [path for path in dict.fromkeys(listed) if path not in labels and os.path.isfile(path)]
    read_all_images(folder.cache, [*labels, *elsewhere], runtime.choose_workers(settings["WORKERS"]), team)
    allowed = leave_out_holdout(folder, listed, settings["RECORDING_PATTERN"])
    paths = leave_out_unreadable(allowed, folder.cache.reasons, settings["MAX_UNREADABLE"], team.rank)
    entries = [folder.cache.entries[path] for path in paths]
    fingerprints = [entry.fingerprint for entry in entries]
    recordings = [name_recording(path, folder.root, settings["RECORDING_PATTERN"]) for path in paths]
    groups, looks = group_images(recordings, fingerprints), np.array([entry.looks for entry in entries], np.float32)
    labels = np.array([labels[path] for path in paths])
    report_names(paths, recordings, fingerprints, labels)
    return Chosen(paths, labels, recordings, fingerprints, groups, looks, len(allowed) - len(paths))


def split_images(folder: SpectrogramFolder, chosen: Chosen, settings: dict) -> Data:
    """Split the chosen images into training and validation, and print what each side holds.

    Where there are enough sources, whole sub-folders are held out for validation, be they sources or of one class only:
    what else is in a folder tells its class. Else whole recordings are.
    """
    paths, labels, recordings, fingerprints, groups, *_ = chosen
    used = set(paths)
    indices = np.flatnonzero([path in used for path, _ in folder.samples])
    folders = find_folders(paths, folder.root)
    classes = Counter(name for name, _ in {*zip(folders, labels.tolist())} if name)
    if count := sum(number == len(CLASSES) for number in classes.values()):
        what = "folders" if count >= MIN_SOURCES else "recordings"
        print(f"{count} sources with both classes; validation holds out whole {what}")
        if count >= MIN_SOURCES:
            groups = group_images(recordings, fingerprints, [name or path for name, path in zip(folders, paths)])
    in_val = split_by_recording(groups, labels, settings["VAL_FRACTION"], settings["SEED"])
    for side, mask in (("Training", ~in_val), ("Validation", in_val)):
        counts = []
        for index, name in enumerate(CLASSES):
            members = np.flatnonzero(mask & (labels == index))
            counts.append(f"{len(members):,} {name} images ({len({recordings[i] for i in members}):,} recordings)")
        print(f"{side}: {', '.join(counts)}")
    return Data(
        Subset(folder, indices[~in_val].tolist()),
        Subset(folder, indices[in_val].tolist()),
        weigh_images([name for name, is_val in zip(folders, in_val) if not is_val], labels[~in_val]),
        [recording for recording, is_val in zip(recordings, in_val) if is_val],
    )
