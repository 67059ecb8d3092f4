"""Which image belongs to which recording: names, the plan of all images, those that exist, those to set aside."""

from __future__ import annotations

import os
import re
import zlib
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path
from typing import Callable, NamedTuple, Optional

from pictures import read_notes

from models import runtime

LONGEST_NAME = 180  # bytes of a recording's name in the names of its images
SET_ASIDE = "set_aside"  # folder for images whose recording is gone, below data/


class Recording(NamedTuple):
    """A file of audio."""

    path: str
    kind: str  # original, deepfake or unknown
    place: str  # path below AUDIO_DIR, with forward slashes
    folder: str  # below the kind's folder, with forward slashes; "": directly in it
    title: str  # folder and file name
    name: str  # the same in the names of its images, where it must not merge with another
    rest: str  # what its file name holds after __, another copy of the recording; "": in unknown/, where it is one

    @property
    def source(self) -> str:
        return self.folder.partition("/")[0]

    @property
    def checksum(self) -> int:
        return checksum_file(self.path, os.stat(self.path).st_mtime_ns)


class Picture(NamedTuple):
    """The image, or the several images, to make of a recording."""

    recording: Recording
    condition: str
    stem: Path  # of the image's path; its parts get _1, _2, ... behind it
    is_fake: bool  # made of a genuine recording

    def name_channel(self, channel: int) -> Path:
        """Name the images of one channel of a recording whose channels are different voices; 0: of all channels."""
        name, mark, rest = self.stem.name.partition("__")
        return self.stem.with_name(f"{name}-channel{channel}{mark}{rest}") if channel else self.stem


class Image(NamedTuple):
    """An image that exists."""

    path: Path
    channel: int  # 0: all channels of the recording
    start_s: float  # where in the recording it begins


@cache
def checksum_file(path: str, changed_ns: int) -> int:
    """Compute the CRC-32 of a file's content, once for each time at which it was changed."""
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            checksum = zlib.crc32(block, checksum)
    return checksum


# ---- Names


def name_recording(path: str, audio_dir: Path, kind: str) -> Recording:
    """Name a recording by its folders and its file name, in a form that every file system takes.

    What stands before __ names it in the class folders, where several files may be copies of one recording. A file in
    unknown/ is a recording of its own: where its name could merge it with another, a checksum keeps them apart.
    """
    below = os.path.relpath(os.path.dirname(path), audio_dir / kind).replace(os.sep, "/")
    below = "" if below == "." else below
    stem = os.path.splitext(os.path.basename(path))[0]
    stem, _, rest = (stem, "", "") if kind == "unknown" else (stem.lstrip("_") or "unnamed").partition("__")
    name = "-".join([*below.replace("__", "_").split("/"), stem] if below else [stem])
    title = make_portable(name)
    if kind == "unknown" and (name != name.strip("_") or "__" in name):
        name = f"{re.sub('__+', '_', name).strip('_')}-{zlib.crc32(os.fsencode(name)):08x}"
    name, rest = (make_portable(text) for text in (name, rest))
    place = f"{kind}/{below}/{os.path.basename(path)}".replace("//", "/")
    return Recording(path, kind, place, make_portable(below, keep="/"), title, name, rest)


def make_portable(text: str, keep: str = "") -> str:
    """Replace what file systems or CSVs may not take, and cut what is too long; a checksum keeps names apart."""
    portable = "".join(c if c in keep or (c.isprintable() and c not in '\\/:*?"<>|') else "_" for c in text)
    if portable != text or len(text.encode()) > LONGEST_NAME:
        checksum = zlib.crc32(text.encode("utf-8", "surrogateescape"))
        portable = f"{portable.encode()[: LONGEST_NAME - 9].decode(errors='ignore').rstrip('_')}-{checksum:08x}"
    return portable


def list_merged(recordings: list[Recording], kind: str) -> str:
    """Say which files of a class are taken as copies of one recording; "": none."""
    groups = defaultdict(list)
    for recording in recordings:
        groups[re.match("^([^/]+?)__", recording.name + "__")[1]].append(os.path.basename(recording.path))
    groups = {name: files for name, files in groups.items() if len(files) > 1}
    if not groups:
        return ""
    shown = "; ".join(f"{name}: {', '.join(files[:4])}" for name, files in list(groups.items())[:3])
    return f"{kind}: what stands before __ names the recording: {len(groups):,} have several files ({shown}" + (
        "; ...)" if len(groups) > 3 else ")"
    )


# ---- The plan


def plan_pictures(recordings: list[Recording], conditions: dict[str, list[str]], data_dir: Path) -> list[Picture]:
    """Plan the pictures of all recordings; ValueError names all those whose images would have the same name.

    Where a folder directly below the class is in both classes, the images of each such folder lie in one of its name.

    Args:
        conditions: copies to make for original, deepfake, unknown, and "fakes" (of genuine recordings).
    """
    folders = {kind: {r.source for r in recordings if r.kind == kind} for kind in ("original", "deepfake")}
    sources = (folders["original"] & folders["deepfake"]) - {""}
    pictures = []
    for recording in recordings:
        copies = [(recording.kind, condition) for condition in conditions[recording.kind]]
        if recording.kind == "original":
            copies += [("deepfake", condition) for condition in conditions["fakes"]]
        for kind, condition in copies:
            folder = data_dir / kind / ("" if kind == "unknown" else "combined")
            if sources and kind != "unknown":
                folder /= recording.source
            name = f"{recording.name}__{condition}" + (f"-{recording.rest}" if recording.rest else "")
            pictures.append(Picture(recording, condition, folder / name, kind != recording.kind))
    by_stem = defaultdict(list)
    for picture in pictures:
        by_stem[str(picture.stem).lower()].append(picture.recording.path)  # some file systems ignore case
    clashes = [" and ".join(paths) for paths in by_stem.values() if len(set(paths)) > 1]
    for stem, paths in by_stem.items():
        whole, _, number = stem.rpartition("_")
        if whole in by_stem and number.isdigit():
            clashes.append(f"{by_stem[whole][0]} and {paths[0]}")
    if clashes:
        raise ValueError(f"recordings whose images would have the same name: {'; '.join(dict.fromkeys(clashes))}")
    return pictures


# ---- Images that exist


class Existing(NamedTuple):
    """The maker's images that exist in the folders of the plan."""

    images: dict[Path, list[Image]]  # by the stem of their picture
    finished: set[Path]  # stems of which all images are there
    strays: list[tuple[Path, dict]]  # images that are not in the plan, and their notes


def find_existing(data_dir: Path, pictures: list[Picture], list_settings: Callable[[str], dict]) -> Existing:
    """Find the maker's images, all made with these settings from these recordings.

    Args:
        list_settings: lists the settings that an image of a condition must have.

    Raises:
        ValueError: an image in a folder of the plan was made with other settings, from another recording, or elsewhere.
    """
    planned = {picture.stem: picture for picture in pictures}
    own = {data_dir / picture.stem.relative_to(data_dir).parts[0] for picture in pictures}
    existing, parts = Existing(defaultdict(list), set(), []), defaultdict(list)
    for folder in (data_dir / kind for kind in ("deepfake", "original", "unknown")):
        for path in map(Path, runtime.find_files(folder)[0]):
            if path.suffix.lower() != ".png":
                continue
            notes = read_notes(path)
            if notes is None and (folder not in own or not path.exists()):  # another process may have moved it
                continue
            stem = path.with_suffix("")
            if notes and notes.get("channel"):
                stem = stem.with_name(stem.name.replace(f"-channel{notes['channel']}__", "__", 1))
            stem = stem if stem in planned else stem.with_name(stem.name.rpartition("_")[0] or stem.name)
            picture = planned.get(stem)
            if folder in own:
                check_notes(path, notes, picture, list_settings(picture.condition if picture else "clean"))
            if picture:
                existing.images[stem].append(Image(path, notes.get("channel", 0), notes.get("start_s", 0.0)))
                parts[stem].append((notes["parts"], notes.get("channels", 1), notes.get("channel", 0)))
            elif "recording" in notes:
                existing.strays.append((path, notes))
    for stem, marks in parts.items():
        count = Counter(marks)
        if all(number == mark[0] for mark, number in count.items()) and len(count) == marks[0][1]:
            existing.finished.add(stem)
    return existing


def check_notes(path: Path, notes: Optional[dict], picture: Optional[Picture], settings: dict) -> None:
    """Check that an image was made by this script with these settings, from the recording that is there now."""
    if notes is None:
        raise ValueError(f"{path} was not made by this script: move it and its like out of {path.parent}")
    for name, value in settings.items():
        if (stored := notes["settings"].get(name)) != value:
            raise ValueError(
                f"{path} was made with {name.upper()} = {stored}, now it is {value}: move the old images out of "
                f"{path.parent}, or set {name.upper()} back"
            )
    if picture and notes.get("recording_crc32") != picture.recording.checksum:
        name = os.path.basename(picture.recording.path)
        raise ValueError(f"{path} was made from another {name}: move the old images away")


# ---- Set aside


def set_aside(
    strays: list[tuple[Path, dict]], recordings: list[Recording], unread: set[str], data_dir: Path, root: str
) -> list[str]:
    """Move images that no recording below AUDIO_DIR accounts for any more to data/set_aside/, in the folders they had.

    Images stay where a class has no recording left at all: people delete audio once they have images.

    Args:
        strays: as in Existing; unread: kinds of recordings of which a folder could not be read.
        root: AUDIO_DIR as images note it.

    Returns:
        Lines that say what was moved and why, and what stays.
    """
    places, kinds = {recording.place for recording in recordings}, {recording.kind for recording in recordings} - unread
    moved, kept = defaultdict(list), Counter()
    for path, notes in strays:
        below = path.relative_to(data_dir)
        kind = notes.get("recording_class", below.parts[0])
        other = {"original": "deepfake", "deepfake": "original"}.get(kind)
        if notes.get("audio") != root:
            continue
        if f"{kind}/{notes['recording']}" in places:
            moved["that CONDITIONS and FAKES no longer ask for, or that belong into another folder now"].append(below)
        elif f"{other}/{notes['recording']}" in places:
            moved["whose recording was moved to the other class"].append(below)
        elif kind in kinds:
            moved["whose recording is gone"].append(below)
        else:
            kept[kind] += 1
    lines = [
        f"{kind}: {count:,} images stay although their recordings are gone: "
        + ("a folder could not be read" if kind in unread else f"no recording at all is left in {root}/{kind}/")
        for kind, count in sorted(kept.items())
    ]
    for reason, paths in moved.items():
        for path in paths:
            move_file(data_dir / path, data_dir / SET_ASIDE / path)
        names = ", ".join(path.name for path in paths[:3]) + (", ..." if len(paths) > 3 else "")
        lines.append(f"Set aside in data/{SET_ASIDE}/: {len(paths):,} images {reason}: {names}")
    return lines


def move_file(path: Path, target: Path) -> None:
    """Move a file to a folder that may hold one of that name, which stays."""
    target.parent.mkdir(parents=True, exist_ok=True)
    number, free = 1, target
    while free.exists():
        number += 1
        free = target.with_name(f"{target.stem}.{number}{target.suffix}")
    os.replace(path, free)
