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
import time
import zlib
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

HERE = Path(globals().get("__file__", "data/make_spectrograms.py")).resolve().parent  # none where it was pasted
sys.path[:0] = [str(HERE), str(HERE.parent)]  # before other packages called models
from copies import (  # noqa: E402
    Image,
    Picture,
    Recording,
    find_existing,
    list_merged,
    name_recording,
    plan_pictures,
    set_aside,
)
from laundering import LAUNDERING, Laundering  # noqa: E402
from making import Recipe, Share, Tally, find_share, make_all  # noqa: E402
from pictures import Format  # noqa: E402
from recordings import AUDIO_SUFFIXES, FOREIGN_SUFFIXES, check_soundfile, is_audio  # noqa: E402
from resynthesis import RESYNTHESES  # noqa: E402

from models import runtime, script  # noqa: E402
from models.lists import find_used, merge_list, read_list  # noqa: E402
from models.runtime import Rule  # noqa: E402

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

WORKERS = None  # processes; None: one for each core
# ------------------------------------------------------------------------------------------------


def are_conditions(value: tuple, first: tuple[str, ...]) -> bool:
    """Tell whether these are conditions: steps joined by +, one of `first` among them."""
    steps = [condition.split("+") for condition in value]
    known = {"clean", *LAUNDERING, *RESYNTHESES}
    return not isinstance(value, str) and all({*first} & {*names} and {*names} <= known for names in steps)


RULES = {
    "AUDIO_DIR": runtime.PATH,
    "BABBLE_DIR": runtime.or_none(runtime.PATH),
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
    "WORKERS": runtime.or_none(runtime.whole_number(1)),
}
KINDS = ("original", "deepfake", "unknown")
UNKNOWN_COLUMNS = ["img_path", "recording", "start_s"]
OWN_COLUMNS = ["img_path", "actual_output", "speaker", "condition"]


# ---- Recordings


class Found(NamedTuple):
    """What lies in a folder of recordings."""

    recordings: list[Recording]
    unread: list[str]  # a line for each folder that cannot be read
    foreign: list[str]  # a line for each file that has to be converted first
    ignored: Counter  # files that are not audio, by suffix

    @property
    def problems(self) -> list[str]:
        return [*self.unread, *self.foreign]


def find_recordings(folder: Path, kind: str) -> Found:
    """Find the recordings in a folder."""
    files, unread = runtime.find_files(folder)
    recordings, foreign, ignored = [], [], Counter()
    for path in files:
        suffix = os.path.splitext(path)[1].lower()
        if suffix in FOREIGN_SUFFIXES:
            stem = os.path.splitext(os.path.basename(path))[0]
            foreign.append(f"{path}: {suffix} cannot be read: convert with ffmpeg -i {stem}{suffix} {stem}.wav")
        elif suffix in AUDIO_SUFFIXES or is_audio(path):
            recordings.append(name_recording(path, folder.parent, kind))
        else:
            ignored[suffix or "without a suffix"] += 1
    return Found(recordings, unread, foreign, ignored)


# ---- Lists of images


def choose_test_speakers(recordings: list[Recording], fraction: float, seed: int) -> set[str]:
    """Choose speakers for testing (folders directly below a class), a fraction; none where a class has under two."""
    by_class = [{r.source for r in recordings if r.kind == kind} - {""} for kind in ("original", "deepfake")]
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
    """Choose the copies of each kind, as `plan_pictures` takes them; those that need soundfile, if it is not there."""
    conditions, fakes = (list(dict.fromkeys(settings[name])) for name in ("CONDITIONS", "FAKES"))
    fault = check_soundfile()
    lacking = [c for c in (*conditions, *fakes) if {"codec", "any"} & {*c.split("+")}] if fault else []
    return {"original": conditions, "deepfake": conditions, "unknown": ["clean"], "fakes": fakes}, lacking


def report_kind(kind: str, found: Found, tally: Tally, images: int) -> None:
    """Print what there is of one kind of recordings, and what was left out."""
    seconds, silent, ignored = tally.seconds[kind], tally.silent[kind], found.ignored
    print(
        f"{kind}: {len(found.recordings):,} recordings, {images:,} images"
        + (f"; {seconds:,.0f} s of audio read now" if seconds else "")
        + (f"; {silent:,} parts without sound left out" if silent else "")
        + (f"; not audio: {', '.join(f'{n:,} {suffix}' for suffix, n in sorted(ignored.items()))}" if ignored else "")
    )
    if merged := list_merged(found.recordings, kind):
        print(merged)


def find_all(audio_dir: Path) -> tuple[list[Recording], dict[str, Found]]:
    """Find all recordings, and what else lies in the folder of each kind that is there."""
    found = {kind: find_recordings(audio_dir / kind, kind) for kind in KINDS if (audio_dir / kind).is_dir()}
    recordings = [recording for of_kind in found.values() for recording in of_kind.recordings]
    if not recordings:
        hint = f"put genuine recordings into {audio_dir / 'original'}, fakes into {audio_dir / 'deepfake'}, "
        lines = [line for of_kind in found.values() for line in of_kind.problems]
        raise ValueError("; ".join([*lines, f"no audio: {hint}and those to judge into {audio_dir / 'unknown'}"]))
    if fault := check_soundfile():
        others = sum(not recording.path.lower().endswith((".wav", ".wave")) for recording in recordings)
        print(f"{fault}: {others:,} files that are not WAV need it")
    return recordings, found


def make_missing(pictures: list[Picture], finished: set[Path], recipe: Recipe, share: Share) -> tuple[Tally, dict]:
    """Make this process's part of the images that are missing. Returns what was made, and its images by stem."""
    jobs, tally, images = defaultdict(list), Tally(), {}
    for picture in pictures:
        if picture.stem not in finished and share.owner(picture.recording) == share.rank:
            jobs[picture.recording].append(picture)
    workers = runtime.count_cores() // share.on_machine if WORKERS is None else WORKERS
    started = time.perf_counter()
    with share.report(tally):
        results = make_all(list(jobs.values()), recipe, max(1, workers))
        for made in tqdm(results, "Making spectrograms", len(jobs), unit=" recordings", disable=None):
            tally.add(made)
            images |= {Path(stem): parts for stem, parts in made.images.items()}
    seconds = time.perf_counter() - started
    if jobs:
        print(f"{len(jobs):,} recordings in {seconds:,.0f} s: {len(jobs) / seconds:,.3g} recordings a second")
    return tally, images


def set_aside_strays(
    strays: list[tuple], recordings: list[Recording], found: dict[str, Found], data_dir: Path, root: str
) -> list[str]:
    """Set aside the images that no recording accounts for, but for those in unknown.csv on which somebody has written.

    Returns:
        Lines that say what was moved and what stays, and why.
    """
    used = find_used(data_dir.parent / "test_data/unknown.csv", UNKNOWN_COLUMNS, data_dir)
    free = [stray for stray in strays if str(stray[0]) not in used]
    unread = {kind for kind, of_kind in found.items() if of_kind.unread}
    lines = set_aside(free, recordings, unread, data_dir, root)
    if kept := len(strays) - len(free):
        lines.append(
            f"unknown: {kept:,} images stay although their recordings are gone: unknown.csv holds verdicts or notes on "
            "them (delete their rows, and the next run sets them aside)"
        )
    return lines


def main() -> int:
    """Make the images that are missing. Returns the exit status; `run_script` makes 0 a 1 if something was left out."""
    data_dir = HERE
    settings = runtime.check_settings({name: globals()[name] for name in RULES}, RULES)
    settings = json.loads(json.dumps(settings, default=str))  # as the images give them back
    form, laundering = (kind(*(settings[name.upper()] for name in kind._fields)) for kind in (Format, Laundering))
    audio_dir, share = Path(os.path.normpath(data_dir / settings["AUDIO_DIR"])), find_share(data_dir)
    if share.rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    recordings, found = find_all(audio_dir)
    conditions, lacking = choose_conditions(settings)
    pictures = plan_pictures(recordings, conditions, data_dir)
    possible = [picture for picture in pictures if picture.condition not in lacking]
    babble_dir = settings["BABBLE_DIR"]
    babble = [r.path for r in find_recordings(data_dir / babble_dir, "babble").recordings] if babble_dir else []
    root = Path(os.path.relpath(audio_dir, data_dir)).as_posix()
    recipe = Recipe(form, laundering, babble, root)
    existing = find_existing(data_dir, pictures, recipe.list_settings)
    if not share.rank:
        share.forget_dead()
        lines = set_aside_strays(existing.strays, recordings, found, data_dir, root)
    tally, images = make_missing(possible, existing.finished, recipe, share)
    if share.size > 1 and not share.rank:
        tally.failed += share.wait(lambda: count_missing(data_dir, possible, recipe, share), tally)
        images = find_existing(data_dir, pictures, recipe.list_settings).images
    if share.rank:
        return 1 if tally.failed else 0
    images = {**existing.images, **images}
    for kind, of_kind in found.items():
        stems = [picture.stem for picture in pictures if picture.recording.kind == kind]
        report_kind(kind, of_kind, tally, sum(len(images.get(stem, ())) for stem in stems))
    print(
        f"{sum(tally.made.values()):,} images made now; {len(existing.finished):,} of {len(pictures):,} copies were "
        "there already"
    )
    for line in [*lines, *describe_voices(tally.voices, audio_dir), *write_lists(pictures, images, data_dir)]:
        print(line)
    if lacking:
        tally.failed.append(f"condition {', '.join(lacking)}, whose codecs need it: {check_soundfile()}")
    for of_kind in found.values():
        tally.failed += of_kind.problems
    for problem in tally.failed:
        runtime.leave_out(problem)
    return 0


def count_missing(data_dir: Path, pictures: list[Picture], recipe: Recipe, share: Share) -> Counter:
    """Count the copies that are not there yet, by the rank that has to make them."""
    finished = find_existing(data_dir, pictures, recipe.list_settings).finished
    return Counter(share.owner(picture.recording) for picture in pictures if picture.stem not in finished)


def describe_voices(paths: list[str], audio_dir: Path) -> list[str]:
    """Say which recordings have different voices on their channels, and what was done."""
    by_kind, lines = defaultdict(list), []
    for path in paths:
        kind, _, name = Path(path).relative_to(audio_dir).as_posix().partition("/")
        by_kind[kind == "unknown"].append(name if kind == "unknown" else f"{kind}/{name}")
    for in_unknown, names in by_kind.items():
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        lines.append(
            f"{len(names):,} files have a different voice on each channel; each channel is a recording: {shown}"
            if in_unknown
            else f"WARNING: {len(names):,} files have a different voice on each channel and are mixed to one: {shown}"
        )
    return lines


def write_lists(pictures: list[Picture], images: dict[Path, list[Image]], data_dir: Path) -> list[str]:
    """Write the lists of the images to judge, and of whole speakers to test on. Returns what was done."""
    unknown, own, lines, folder = [], [], [], data_dir.parent / "test_data"
    speakers = choose_test_speakers([picture.recording for picture in pictures], HOLDOUT_SPEAKERS, SEED)
    if (folder / "test_own.csv").exists():  # a speaker that was tested on stays one
        names, *rows = read_list(folder / "test_own.csv")[0]
        speakers |= {dict(zip(names, row)).get("speaker", "") for row in rows} - {""}
    for picture in pictures:
        recording = picture.recording
        for image in sorted(images.get(picture.stem, ()), key=lambda image: (image.channel, image.start_s)):
            path = image.path.relative_to(data_dir).as_posix()
            if recording.kind == "unknown":
                title = recording.title + (f" channel {image.channel}" if image.channel else "")
                unknown.append([path, title, f"{image.start_s:g}"])
            elif recording.source in speakers and path.startswith(recording.kind):
                own.append([path, recording.kind.capitalize(), recording.source, picture.condition])
    if unknown:
        lines.append(merge_list(folder / "unknown.csv", UNKNOWN_COLUMNS, unknown, data_dir))
        settings = 'MODEL_PATH = Path("models/speech_resnet18.pth") and CSV_FILES = ["test_data/unknown.csv"]'
        lines.append(f"To judge the recordings in unknown/, set in evaluate_deepfake_model.py: {settings}")
    if own:
        lines.append(merge_list(folder / "test_own.csv", OWN_COLUMNS, own, data_dir))
        lines[-1] += f"; {len(speakers)} speakers are tested: name it in HOLDOUT_CSVS and in CSV_FILES"
    elif HOLDOUT_SPEAKERS and {"original", "deepfake"} <= {picture.recording.kind for picture in pictures}:
        lines.append("No list for testing: each class needs recordings in two folders (speakers) or more")
    return lines


if __name__ == "__main__":
    sys.exit(script.run_script(main, __doc__, "run it again to make the rest", "AUDIO_DIR"))
