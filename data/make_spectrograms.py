"""Turn folders of recordings into spectrogram images that the detector learns from and judges.

    python data/make_spectrograms.py

In:  recordings at any depth below AUDIO_DIR/original/ (genuine), AUDIO_DIR/deepfake/ (synthetic or manipulated) and
     AUDIO_DIR/unknown/ (to be judged): WAV, and with `soundfile` installed FLAC, MP3, OGG, Opus, AIFF, telephone WAV.
Out: images in original/combined/, deepfake/combined/ and unknown/, IMAGE_SIZE x IMAGE_SIZE, RGB (README.md);
     test_data/unknown.csv, and test_data/test_own.csv where recordings lie in speaker folders.

`<folder>/<recording>.wav` becomes `<folder>-<recording>__<condition>[_<part>].png`. A first folder that both classes
have (a speaker, page or corpus with genuine and fake speech) is a source; its images get a folder of that name.
CONDITIONS lists the copies of each training recording: clean, or laundered as speech is on its way to a listener. What
is done is drawn for each file, the same in each run, and stored in the image with all settings; images made with other
settings are never mixed with new ones. Every pixel column stands for the same time: long recordings become several
images, short ones are repeated to fill one. About 75 clean recordings a second on one core.
"""

from __future__ import annotations

import json
import os
import sys
import zlib
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parent.parent))
from laundering import LAUNDERING, Draw, Laundering, launder  # noqa: E402
from pictures import Format, draw_parts, encode_png, fill_up, place_parts, read_notes  # noqa: E402
from recordings import AUDIO_SUFFIXES, FOREIGN_SUFFIXES, SILENCE, check_soundfile, is_audio, read_audio  # noqa: E402
from resynthesis import RESYNTHESES  # noqa: E402

from models import runtime  # noqa: E402
from models.runtime import Rule  # noqa: E402
from models.tables import write_list  # noqa: E402

# ------------------------------------------------------------------------------------------------
# Settings. Relative paths start at this script's folder.
AUDIO_DIR = Path("audio")  # holds original/, deepfake/ and unknown/, each with recordings at any depth

CONDITIONS = ("clean",)  # also noise, reverb, resample, codec, bandlimit; any: one of these; gain, clip; "reverb+noise"
FAKES = ()  # fakes to make of each genuine recording: griffinlim, lpc, harmonic; "lpc+codec": laundered as well
BABBLE_DIR = None  # folder of recordings for babble among the noises, the same for both classes; None: no babble
SNR_RANGE_DB = (5, 30)  # dB, speech over noise
RT60_RANGE_S = (0.2, 0.8)  # s, time in which the reverberation falls by 60 dB
HOLDOUT_SPEAKERS = 0.2  # fraction of the speaker folders of each class that test_own.csv lists; 0: none
SEED = 0  # of all that is drawn

SAMPLE_RATE = 16000  # Hz; recordings of any other rate are resampled
WINDOW_S = 0.032  # s, length of one Hann window
HOP_S = 0.008  # s, from one window to the next
FREQUENCY_RANGE_HZ = (60, 7900)  # Hz, bottom and top row
DB_RANGE = (-30, 40)  # dB, darkest and brightest level, relative to each frequency's mean over time
IMAGE_SIZE = 112  # pixels, width and height; a column is two hops wide, an image shows 1.8 s
LEVELS = 32  # values of each colour, 2 to 256; fewer make smaller files
# ------------------------------------------------------------------------------------------------


def are_conditions(value: tuple, first: tuple[str, ...]) -> bool:
    """Tell whether these are conditions: steps joined by +, one of `first` among them."""
    steps = [condition.split("+") for condition in value]
    known = {"clean", *LAUNDERING, *RESYNTHESES}
    return not isinstance(value, str) and all({*first} & {*names} and {*names} <= known for names in steps)


RULES = {
    "CONDITIONS": Rule(
        lambda value: value and are_conditions(value, ("clean", *LAUNDERING)),
        f"some of clean, {', '.join([*LAUNDERING, *RESYNTHESES])}, or several joined by +",
    ),
    "FAKES": Rule(lambda value: are_conditions(value, (*RESYNTHESES,)), f"() or some of {', '.join(RESYNTHESES)}"),
    "SNR_RANGE_DB": Rule(lambda value: value[0] <= value[1], "(lowest, highest)"),
    "RT60_RANGE_S": Rule(lambda value: 0.05 <= value[0] <= value[1], "(shortest, longest), from 0.05"),
    "HOLDOUT_SPEAKERS": runtime.number(0, 0.9),
    "SEED": runtime.whole_number(0),
    "SAMPLE_RATE": runtime.whole_number(1000),
    "WINDOW_S": Rule(lambda value: value * SAMPLE_RATE >= 8, "at least 8 samples long"),
    "HOP_S": Rule(lambda value: value * SAMPLE_RATE >= 1, "at least 1 sample long"),
    "FREQUENCY_RANGE_HZ": Rule(
        lambda v: 0 <= v[0] < v[1] <= SAMPLE_RATE / 2, "(low, high), up to half the sample rate"
    ),
    "DB_RANGE": Rule(lambda value: value[0] < value[1], "(darkest, brightest)"),
    "IMAGE_SIZE": runtime.whole_number(8),
    "LEVELS": runtime.whole_number(2, 256),
}
KINDS = ("original", "deepfake", "unknown")
LONGEST_NAME = 180  # bytes of a recording's name in the names of its images


class Recording(NamedTuple):
    """A file of audio."""

    path: str
    kind: str  # original, deepfake or unknown
    folder: str  # below the kind's folder, with forward slashes; "": directly in it
    name: str  # in the names of its images: folder and file name
    rest: str  # what its file name holds after __, another copy of the recording

    @property
    def source(self) -> str:
        return self.folder.partition("/")[0]


class Recipe(NamedTuple):
    """What shapes the images."""

    form: Format
    laundering: Laundering
    babble: list[str]  # recordings that babble may be made of

    def list_settings(self, condition: str) -> dict:
        """List what is stored in an image: the settings of the laundering do not concern a clean one."""
        return {**self.form._asdict(), **(self.laundering._asdict() if condition != "clean" else {})}


class Picture(NamedTuple):
    """The image, or the several images, to make of a recording."""

    recording: Recording
    condition: str
    stem: Path  # of the image's path; its parts get _1, _2, ... behind it


# ---- Recordings and names


def find_recordings(folder: Path, kind: str) -> tuple[list[Recording], list[str], Counter]:
    """Find recordings; a line for each file that cannot be used; the number of files that are not audio, by suffix."""
    files, problems = runtime.find_files(folder)
    recordings, ignored = [], Counter()
    for path in files:
        suffix = os.path.splitext(path)[1].lower()
        if suffix in FOREIGN_SUFFIXES:
            stem = os.path.splitext(os.path.basename(path))[0]
            problems.append(f"{path}: {suffix} cannot be read: convert with ffmpeg -i {stem}{suffix} {stem}.wav")
        elif suffix in AUDIO_SUFFIXES or is_audio(path):
            recordings.append(name_recording(path, folder, kind))
        else:
            ignored[suffix or "without a suffix"] += 1
    return recordings, problems, ignored


def name_recording(path: str, folder: Path, kind: str) -> Recording:
    """Name a recording by its folders and its file name, in a form that every file system takes."""
    below = os.path.relpath(os.path.dirname(path), folder).replace(os.sep, "/")
    below = "" if below == "." else below
    stem, _, rest = os.path.splitext(os.path.basename(path))[0].partition("__")
    name = "-".join([*below.replace("__", "_").split("/"), stem] if below else [stem])
    name, rest = (make_portable(text) for text in (name, rest))
    return Recording(path, kind, make_portable(below, keep="/"), name, rest)


def make_portable(text: str, keep: str = "") -> str:
    """Replace what file systems or CSVs may not take, and cut what is too long; a checksum keeps names apart."""
    portable = "".join(c if c in keep or (c.isprintable() and c not in '\\/:*?"<>|') else "_" for c in text)
    if len(portable.encode()) > LONGEST_NAME:
        checksum = zlib.crc32(text.encode("utf-8", "surrogateescape"))
        portable = portable.encode()[: LONGEST_NAME - 9].decode(errors="ignore") + f"-{checksum:08x}"
    return portable


def plan_pictures(recordings: list[Recording], conditions: dict[str, list[str]], data_dir: Path) -> list[Picture]:
    """Plan the pictures of all recordings; ValueError names all those whose images would have the same name.

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
            if recording.source in sources and kind != "unknown":
                folder /= recording.source
            name = f"{recording.name}__{condition}" + (f"-{recording.rest}" if recording.rest else "")
            pictures.append(Picture(recording, condition, folder / name))
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


@cache
def checksum_file(path: str) -> int:
    """Compute the CRC-32 of a file's content."""
    return zlib.crc32(Path(path).read_bytes())


def find_finished(folders: set[Path], pictures: list[Picture], recipe: Recipe) -> set[Path]:
    """Find the stems whose images are all there, made with these settings from these recordings.

    Raises:
        ValueError: an image in these folders was made with other settings, from another recording, or elsewhere.
    """
    planned, found = {picture.stem: picture for picture in pictures}, defaultdict(list)
    for path in (Path(file) for folder in sorted(folders) for file in runtime.find_files(folder)[0]):
        if path.suffix.lower() != ".png":
            continue
        stem = path.with_suffix("")
        stem = stem if stem in planned else stem.with_name(stem.name.rpartition("_")[0] or stem.name)
        notes = read_notes(path)
        if notes is None:
            raise ValueError(f"{path} was not made by this script: move it and its like out of {path.parent}")
        condition = planned[stem].condition if stem in planned else "clean"
        for name, value in recipe.list_settings(condition).items():
            if (stored := notes["settings"].get(name)) != value:
                raise ValueError(
                    f"{path} was made with {name.upper()} = {stored}, now it is {value}: move the old images out of "
                    f"{path.parent}, or set {name.upper()} back"
                )
        if stem in planned:
            recording = planned[stem].recording.path
            if notes.get("recording_crc32") != checksum_file(recording):
                name = os.path.basename(recording)
                raise ValueError(f"{path} was made from another {name}: move the old images away")
            found[stem].append(notes["parts"])
    return {stem for stem, parts in found.items() if len(parts) == parts[0]}


# ---- Making


class Tally(NamedTuple):
    """What was made of one kind of recordings."""

    images: Counter  # by kind
    seconds: Counter  # of audio, by kind
    silent: Counter  # parts without sound, by kind
    failed: list[str]  # a line for each recording or copy that was left out


def make_images(todo: list[Picture], recipe: Recipe) -> Tally:
    """Make the images of every recording; continue past what cannot be read."""
    by_recording, form = defaultdict(list), recipe.form
    for picture in todo:
        by_recording[picture.recording].append(picture)
    tally = Tally(Counter(), Counter(), Counter(), [])
    for recording, pictures in tqdm(by_recording.items(), "Making spectrograms", unit=" recordings", disable=None):
        try:
            samples, peak = read_audio(recording.path, form.sample_rate)
            if len(samples) < form.window:
                raise ValueError("it is shorter than WINDOW_S")
            starts, filled = place_parts(len(samples), form), fill_up(samples, form.duration)
            loud = [n for n in starts if np.ptp(filled[n * form.column :][: form.duration]) > 2 * SILENCE / peak]
            if not loud:
                raise ValueError("it holds nothing but silence")
            checksum = checksum_file(recording.path)
        except Exception as error:  # decoders raise many kinds; every one is reported by name
            tally.failed.append(f"{recording.path}: {explain(error)}")
            continue
        tally.seconds[recording.kind] += len(samples) / form.sample_rate
        tally.silent[recording.kind] += len(starts) - len(loud)
        for picture in pictures:
            try:
                make_picture(picture, samples, loud, checksum, recipe)
                tally.images[picture.stem.parent] += len(loud)
            except Exception as error:
                tally.failed.append(f"{recording.path} ({picture.condition}): {explain(error)}")
    return tally


def explain(error: Exception) -> str:
    """Explain in one line why a recording was left out."""
    return (str(error) or type(error).__name__).splitlines()[0]


def make_picture(picture: Picture, samples: np.ndarray, starts: list[int], checksum: int, recipe: Recipe) -> None:
    """Make the image, or images, of a recording under one condition; the parts start at these columns."""
    form, stem = recipe.form, picture.stem
    others = [path for path in recipe.babble if os.path.basename(path) != os.path.basename(picture.recording.path)]
    rng = np.random.default_rng([recipe.laundering.seed, zlib.crc32(stem.name.encode("utf-8"))])
    rate = form.sample_rate
    draw = Draw(rate, rng, recipe.laundering, others, lambda path: read_audio(path, rate)[0])
    laundered, words = launder(samples, picture.condition, draw)
    notes = {"settings": recipe.list_settings(picture.condition), "parts": len(starts), "recording_crc32": checksum}
    notes |= {"seconds": round(form.duration / rate, 3), **({"laundering": words} if words else {})}
    stem.parent.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(draw_parts(fill_up(laundered, form.duration), starts, form)):
        path = stem.with_name(stem.name + (f"_{number + 1}" if len(starts) > 1 else "") + ".png")
        notes["start_s"] = round(starts[number] * form.column / rate, 3)
        runtime.write_file(path, encode_png(part, notes))


# ---- Lists of images


def list_images(pictures: list[Picture], data_dir: Path) -> list[tuple[str, Picture, float]]:
    """List the images that exist of these pictures: path below data_dir, picture, start of the part in s."""
    images = []
    for picture in pictures:
        number = 1
        while True:
            suffixes = (f"_{number}.png", ".png") if number == 1 else (f"_{number}.png",)
            paths = [picture.stem.with_name(picture.stem.name + suffix) for suffix in suffixes]
            path = next((path for path in paths if path.exists()), None)
            if path is None:
                break
            notes = read_notes(path) if picture.recording.kind == "unknown" else None  # opening many takes long
            start_s = (notes or {}).get("start_s", 0.0)
            images.append((path.relative_to(data_dir).as_posix(), picture, start_s))
            number += 1
    return images


def choose_test_speakers(recordings: list[Recording], fraction: float, seed: int) -> set[str]:
    """Choose speakers, folders, for testing: a fraction of each class; none where a class has fewer than two."""
    by_class = [{r.folder for r in recordings if r.kind == kind} - {""} for kind in ("original", "deepfake")]
    if not fraction or min(map(len, by_class)) < 2:
        return set()
    order = sorted(set.union(*by_class), key=lambda name: (zlib.crc32(f"{seed} {name}".encode()), name))
    order.sort(key=lambda name: -sum(name in names for names in by_class))  # those of both classes first
    chosen: set[str] = set()
    for name in order:
        lacking = [names for names in by_class if len(names & chosen) < max(1, round(fraction * len(names)))]
        if any(name in names for names in lacking) and not any(names <= chosen | {name} for names in by_class):
            chosen.add(name)
    return chosen


# ---- Main


def choose_conditions(settings: dict) -> tuple[dict[str, list[str]], list[str]]:
    """Choose the copies to make, as `plan_pictures` takes them; without soundfile, a line for what needs it."""
    conditions, fakes = (list(dict.fromkeys(settings[name])) for name in ("CONDITIONS", "FAKES"))
    problems = []
    if check_soundfile():
        lacking = [name for name in (*conditions, *fakes) if {"codec", "any"} & {*name.split("+")}]
        if lacking:
            problems.append(f"condition {', '.join(lacking)}: codecs need soundfile; {check_soundfile()}")
        conditions, fakes = ([c for c in names if c not in lacking] for names in (conditions, fakes))
    return {"original": conditions, "deepfake": conditions, "unknown": ["clean"], "fakes": fakes}, problems


def report_kind(kind: str, recordings: list[Recording], tally: Tally, images: int, ignored: Counter) -> None:
    """Print what there is of one kind of recordings, and what was left out."""
    of_kind = [recording for recording in recordings if recording.kind == kind]
    seconds, silent = tally.seconds[kind], tally.silent[kind]
    print(
        f"{kind}: {len(of_kind):,} recordings, {images:,} images"
        + (f"; {seconds:,.0f} s of audio read now" if seconds else "")
        + (f"; {silent:,} parts without sound left out" if silent else "")
        + (f"; not audio: {', '.join(f'{n:,} {suffix}' for suffix, n in sorted(ignored.items()))}" if ignored else "")
    )


def main() -> int:
    """Make the images that are missing. Returns the exit status: 0, or 1 if something was left out."""
    data_dir = Path(__file__).resolve().parent
    settings = {name: globals()[name] for name in RULES}
    runtime.check_settings(settings, RULES)
    settings = json.loads(json.dumps(settings))  # as the images give them back
    form, laundering = (kind(*(settings[name.upper()] for name in kind._fields)) for kind in (Format, Laundering))
    audio_dir = Path(os.path.normpath(data_dir / AUDIO_DIR))
    recordings, problems, ignored = [], [], {}
    for kind in KINDS:
        if (audio_dir / kind).is_dir():
            found, failed, ignored[kind] = find_recordings(audio_dir / kind, kind)
            recordings += found
            problems += failed
    if not recordings:
        hint = f"put genuine recordings into {audio_dir / 'original'}, fakes into {audio_dir / 'deepfake'}, "
        raise ValueError("; ".join([*problems, f"no audio: {hint}and those to judge into {audio_dir / 'unknown'}"]))
    if fault := check_soundfile():
        others = sum(not recording.path.lower().endswith((".wav", ".wave")) for recording in recordings)
        print(f"{fault}: {others:,} files that are not WAV need it")
    conditions, missing = choose_conditions(settings)
    problems += missing
    pictures = plan_pictures(recordings, conditions, data_dir)
    folders = {picture.stem.relative_to(data_dir).parts[0] for picture in pictures}
    babble = [r.path for r in find_recordings(data_dir / BABBLE_DIR, "babble")[0]] if BABBLE_DIR else []
    recipe = Recipe(form, laundering, babble)
    finished = find_finished({data_dir / folder for folder in folders}, pictures, recipe)
    tally = make_images([picture for picture in pictures if picture.stem not in finished], recipe)

    images = list_images(pictures, data_dir)
    for kind in ignored:
        count = sum(picture.recording.kind == kind for _, picture, _ in images)
        report_kind(kind, recordings, tally, count, ignored[kind])
    made = sum(tally.images.values())
    print(f"{made:,} images made now; {len(finished):,} of {len(pictures):,} copies were there already")
    speakers = choose_test_speakers(recordings, HOLDOUT_SPEAKERS, SEED)
    write_lists(images, speakers, data_dir.parent / "test_data")
    problems += tally.failed
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    return 1 if problems else 0


def write_lists(images: list[tuple], speakers: set[str], folder: Path) -> None:
    """Write the lists of the images to judge, and of whole speakers to test on."""
    unknown = [[path, p.recording.name, f"{start_s:g}"] for path, p, start_s in images if p.recording.kind == "unknown"]
    lines = [write_list(folder / "unknown.csv", ["img_path", "recording", "start_s"], unknown)] if unknown else []
    own = [
        [path, p.recording.kind.capitalize(), p.recording.folder, p.condition]
        for path, p, _ in images
        if p.recording.folder in speakers and path.startswith(p.recording.kind)
    ]
    if own:
        lines.append(write_list(folder / "test_own.csv", ["img_path", "actual_output", "speaker", "condition"], own))
        lines[-1] += f" of {len(speakers)} speakers: name it in HOLDOUT_CSVS and in CSV_FILES"
    if unknown:
        settings = 'MODEL_PATH = Path("models/speech_resnet18.pth") and CSV_FILES = ["test_data/unknown.csv"]'
        lines.append(f"To judge the recordings in unknown/, set in evaluate_deepfake_model.py: {settings}")
    for line in lines:
        print(line)


if __name__ == "__main__":
    sys.exit(runtime.run_script(main, __doc__, "run it again to make the rest"))
