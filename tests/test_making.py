"""Images are made by all cores of a machine and by many machines, the same as by one process."""

import os
import subprocess
import sys

import making
import pytest
from conftest import MAKER, copy_script, list_images, run, write_voices


def test_images_and_lists_are_the_same_whatever_the_number_of_processes(tmp_path):
    content = []
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        write_voices(folder / "data/audio/unknown", [f"v{number}" for number in range(50)])
        (folder / "data/audio/unknown/v7.wav").write_bytes(b"RIFF")
        outcome = run(folder, MAKER, WORKERS=workers)
        assert outcome.status == 1 and len(outcome.err.splitlines()) == 1 and "v7.wav" in outcome.err
        files = [path for path in folder.rglob("*") if path.suffix in (".png", ".csv")]
        content.append({path.relative_to(folder): path.read_bytes() for path in files})
    assert content[0] == content[1]
    assert len(content[0]) == 50


def test_death_of_a_worker_process_is_one_line(tmp_path):
    write_voices(tmp_path / "data/audio/original", [f"v{number}" for number in range(50)])
    script = copy_script(tmp_path, MAKER, WORKERS=2)
    module = tmp_path / "data/making.py"
    module.write_text(
        module.read_text().replace("    recording, form, rate = ", "    os._exit(1)\n    recording, form, rate = ")
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: a worker process died")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("names", [("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")])
def test_several_processes_share_the_recordings(tmp_path, names):
    voices = [f"v{number}" for number in range(12)]
    for name in ("alone", "shared"):
        write_voices(tmp_path / name / "data/audio/unknown", voices)
    assert run(tmp_path / "alone", MAKER).status == 0
    script = copy_script(tmp_path / "shared", MAKER)
    processes = [
        subprocess.Popen(
            [sys.executable, script],
            env={**os.environ, names[0]: str(rank), names[1]: "4"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (3, 2, 1, 0)
    ]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0, 0]
    assert outputs[:3] == ["", "", ""] and "12 images made now" in outputs[3]
    for name in (*[f"data/unknown/{voice}__clean.png" for voice in voices], "test_data/unknown.csv"):
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "shared" / name).read_bytes()
    assert not (tmp_path / "shared/data/.making").exists()


def test_process_that_died_is_named_and_its_part_made_by_the_next_start(tmp_path, monkeypatch):
    monkeypatch.setattr(making, "SILENT_S", 0.3)
    write_voices(tmp_path / "data/audio/unknown", [f"v{number}" for number in range(12)])
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    outcome = run(tmp_path, MAKER)
    assert outcome.status == 1
    made = len(list_images(tmp_path / "data"))
    assert 0 < made < 12
    assert outcome.err == f"left out: {12 - made} copies: rank 1 of 2 never started: run this again to make them\n"
    monkeypatch.delenv("RANK")
    assert run(tmp_path, MAKER).status == 0
    assert len(list_images(tmp_path / "data")) == 12
