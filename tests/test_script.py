"""How scripts start and end: arguments, other ways to start, one training at a time in a folder."""

import errno
import subprocess
import sys

import pytest
from conftest import EVALUATOR, MAKER, MODELS, QUICK, ROOT, TRAINER, assert_refused, copy_script, run

from models import runtime, script

HOLD = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from models.script import lock_folder
with lock_folder(Path(sys.argv[2])):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(project):
    """A process that holds the lock of the folder of checkpoints."""
    folder = project / MODELS
    folder.mkdir(parents=True)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(ROOT), str(folder)], **pipes) as process:
        assert process.stdout.readline() == "locked\n"
        yield process


# ---- One training at a time


@pytest.mark.parametrize("resume", [True, False])
def test_second_training_in_a_folder_is_told_of_the_first_and_touches_nothing(project, holder, resume):
    (project / MODELS / "history.csv").write_text("of the first")
    before = {path: path.read_bytes() for path in project.rglob("*") if path.is_file() and path.suffix != ".py"}
    outcome = run(project, TRAINER, **QUICK, RESUME=resume)
    assert_refused(outcome, f"a training is running there already (process {holder.pid}, since 20", "another folder")
    assert "RESUME" not in outcome.err
    after = {path: path.read_bytes() for path in project.rglob("*") if path.is_file() and path.suffix != ".py"}
    assert after == before
    other = {"BEST_MODEL_PATH": "models/b/best.pth", "FINAL_MODEL_PATH": "models/b/final.pth"}
    assert run(project, TRAINER, **QUICK, **other).status == 0
    assert_refused(run(project, TRAINER, **QUICK, BEST_MODEL_PATH="models/c/best.pth"), "already")


def test_lock_of_a_killed_run_does_no_harm(project, holder):
    holder.kill()
    holder.wait()
    assert (project / MODELS / script.LOCK_NAME).exists()
    assert run(project, TRAINER, **QUICK).status == 0
    assert not (project / MODELS / script.LOCK_NAME).exists()


def test_holder_on_another_machine_or_without_a_note_is_described(tmp_path):
    (tmp_path / script.LOCK_NAME).write_text("17 2024-05-03 10:11 elsewhere")
    assert script.describe_holder(tmp_path / script.LOCK_NAME) == "process 17 on elsewhere, since 2024-05-03 10:11"
    (tmp_path / script.LOCK_NAME).write_text("")
    assert script.describe_holder(tmp_path / script.LOCK_NAME) == "in another process"


@pytest.mark.skipif(script.fcntl is None, reason="Windows has other locks")
def test_share_without_locks_does_no_harm(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(script.fcntl, "lockf", refuse)
    with script.lock_folder(tmp_path), script.lock_folder(tmp_path / "no folder"):
        pass


# ---- Other ways to start


@pytest.mark.parametrize(
    ("name", "arguments", "setting"),
    [
        (EVALUATOR, ["my.csv"], "CSV_FILES"),
        (EVALUATOR, ["--model", "a.pth"], "MODEL_PATH"),
        (TRAINER, ["--epochs=5", "--batch-size", "8"], "EPOCHS, BATCH_SIZE"),
        (TRAINER, ["x"], "the settings"),
    ],
)
def test_arguments_are_refused_with_the_setting_to_edit(project, monkeypatch, name, arguments, setting):
    parse = script.refuse_arguments

    def parse_more(*rest):
        sys.argv += arguments
        parse(*rest)

    monkeypatch.setattr(script, "refuse_arguments", parse_more)
    line = f"{name} takes no arguments ({' '.join(arguments)}): edit {setting} at the top of the script"
    assert_refused(run(project, name), line)


@pytest.mark.parametrize("name", [TRAINER, EVALUATOR, MAKER])
def test_code_pasted_into_a_cell_says_how_to_start_it(name, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    argv = ["ipykernel_launcher.py", "-f", "kernel.json"]
    for what, value in (("argv", argv), ("path", [*sys.path]), ("stdout", sys.stdout), ("stderr", sys.stderr)):
        monkeypatch.setattr(sys, what, value)
    with pytest.raises(SystemExit) as end:
        exec((ROOT / name).read_text(encoding="utf-8"), {"__name__": "__main__"})
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: this code runs without its file") and "%run" in line


@pytest.mark.slow
@pytest.mark.parametrize("way", [[MAKER], ["-m", "data.make_spectrograms"]])
def test_maker_starts_as_a_module_and_beside_another_package_called_models(tmp_path, monkeypatch, way):
    copy_script(tmp_path / "p", MAKER)
    (tmp_path / "other/models").mkdir(parents=True)
    (tmp_path / "other/models/__init__.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "other"))
    done = subprocess.run([sys.executable, *way], cwd=tmp_path / "p", capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: no audio")


def test_what_was_left_out_makes_the_status_1(monkeypatch):
    for name, value in (("argv", ["script.py"]), ("stdout", sys.stdout), ("stderr", sys.stderr)):
        monkeypatch.setattr(sys, name, value)
    assert script.run_script(lambda: 0, "", "") == 0
    assert script.run_script(lambda: runtime.leave_out("a file"), "", "") == 1
