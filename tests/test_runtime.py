"""How scripts run: several processes under torchrun do what one does; streams, files that resist, leftovers."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    EVALUATOR,
    MODELS,
    O0,
    QUICK,
    TRAINER,
    copy_script,
    make_project,
    read_csv,
    run,
    run_process,
    write_csv,
)

import train_deepfake_detector as trainer
from models import runtime
from models.runtime import Team

EXACT = {**QUICK, "EPOCHS": 2, "PRECISION": "float32"}
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
PLAIN = """
import sys, torch
import train_deepfake_detector as trainer
from models import runtime, script
trainer.crop_in_time = lambda images, *_: images
begin = trainer.Run.__init__
def begin_plainly(run, model, *rest):
    begin(run, model, *rest)
    run.optimizer, run.schedule = torch.optim.SGD(model.parameters(), 0.01), Steady()
class Steady:
    def get_last_lr(self): return [0.01]
    def step(self): pass
    def state_dict(self): return {}
trainer.Run.__init__ = begin_plainly
train_mode = torch.nn.Module.train
torch.nn.BatchNorm2d.train = lambda self, mode=True: train_mode(self, False)
add = trainer.add_gradients
def tell(*arguments):
    total = add(*arguments)
    mean = total.clone()
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(mean)
        mean /= torch.distributed.get_world_size()
    print(f"loss {mean.item():.9f}", flush=True)
    return total
trainer.add_gradients = tell
sys.exit(script.run_script(trainer.main, "", ""))
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["2>&-", ">&- 2>&-", "| head -n 1"])
def test_closed_streams_do_not_cost_the_work(judged, how):
    copy_script(judged, EVALUATOR, WORKERS=0)
    command = f"{sys.executable} -u {EVALUATOR} {how}"
    subprocess.run(["bash", "-c", command], cwd=judged, capture_output=True, timeout=120)
    assert all(row["predicted_output"] for row in read_csv(judged / "test_data/test.csv"))
    assert (judged / "test_data/test_report.txt").exists()


@pytest.mark.slow
def test_names_that_are_not_ascii_are_found_with_an_ascii_file_system(judged):
    shutil.copy(judged / "data" / O0, judged / "data/\u00e9t\u00e9.png")
    write_csv(judged / "test_data/test.csv", [["img_path"], ["\u00e9t\u00e9.png"]])
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    copy_script(judged, EVALUATOR, WORKERS=0)
    done = subprocess.run([sys.executable, EVALUATOR], cwd=judged, env=env, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert read_csv(judged / "test_data/test.csv")[0]["predicted_output"]


def test_leftovers_of_killed_runs_are_removed_and_others_kept(project):
    (project / MODELS).mkdir(parents=True)
    old, new = (project / MODELS / f".writing-{name}.tmp" for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 2 * 24 * 3600,) * 2)
    assert run(project, TRAINER, **QUICK).status == 0
    assert [path.name for path in project.rglob(".*.tmp")] == [new.name]  # of a run beside this one


@pytest.mark.parametrize("number", [errno.EPERM, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_refused_chmod_and_fsync_are_no_errors(tmp_path, monkeypatch, number):
    refuse = raise_always(OSError(number, "refused"))
    for name in ("chmod", "fsync"):
        monkeypatch.setattr(os, name, refuse)
    for content in (b"one", b"two"):
        runtime.write_file(tmp_path / "a.txt", content)
        assert (tmp_path / "a.txt").read_bytes() == content
    assert len(list(tmp_path.iterdir())) == 1


def raise_always(error):
    def refuse(*_, **__):
        raise error

    return refuse


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_file_that_cannot_be_written_stays_and_is_named(tmp_path, monkeypatch, capsys, function):
    (tmp_path / "a.txt").write_bytes(b"one")
    monkeypatch.setattr(runtime, "RENAME_WAITS_S", (0, 0))
    monkeypatch.setattr(os, function, raise_always(OSError(errno.EIO, "Input/output error")))
    assert not runtime.try_write(tmp_path / "a.txt", b"two")
    assert runtime.left_out.pop() == f"{tmp_path / 'a.txt'} cannot be written: Input/output error"
    assert "left out: " in capsys.readouterr().err
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"one"]


def test_refused_rename_is_tried_again(tmp_path, monkeypatch):
    replace, errors = os.replace, [PermissionError(13, "Permission denied"), OSError(errno.EBUSY, "busy")]

    def refuse_twice(source, target):
        if errors:
            raise errors.pop()
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse_twice)
    monkeypatch.setattr(runtime, "RENAME_WAITS_S", (0, 0))
    assert runtime.try_write(tmp_path / "a.txt", b"one")
    assert (tmp_path / "a.txt").read_bytes() == b"one"


def test_tilde_at_the_beginning_of_a_path_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    settings = {"A": "~/a", "B": Path("~/b"), "C": ["~/c", Path("c~")], "D": "~/d", "E": None, "F": "~"}
    rules = dict.fromkeys("ABF", runtime.PATH) | {"C": runtime.PATH_LIST, "D": runtime.one_of("~/d")}
    found = runtime.check_settings(settings, {**rules, "E": runtime.or_none(runtime.PATH)})
    expected = {"A": f"{tmp_path}/a", "B": tmp_path / "b", "C": [f"{tmp_path}/c", Path("c~")], "D": "~/d", "E": None}
    assert found == {**expected, "F": str(tmp_path)}


def test_trained_and_judged_below_the_home_folder(project, monkeypatch):
    monkeypatch.setenv("HOME", str(project / "home"))
    shutil.move(project / "data", project / "home/data")
    table = project / "home/my.csv"
    rows = [[f"~/data/{row['img_path']}"] for row in read_csv(project / "test_data/test.csv")]
    write_csv(table, [["img_path"], *rows])
    paths = {"BEST_MODEL_PATH": "~/m/best.pth", "FINAL_MODEL_PATH": "~/m/final.pth", "CACHE_DIR": "~/cache"}
    outcome = run(project, TRAINER, **QUICK, **paths, DATA_DIR="~/data", HOLDOUT_CSVS=["~/my.csv"])
    assert outcome.status == 0, outcome.err
    assert "Held out: 8 of 8 listed images" in outcome.out
    outcome = run(project, EVALUATOR, WORKERS=0, MODEL_PATH="~/m/best.pth", CSV_FILES=["~/my.csv"])
    assert outcome.status == 0, outcome.err
    assert all(row["predicted_output"] for row in read_csv(table))
    assert not list(project.rglob("~"))


def launch(folder, script, processes, *options, **constants):
    """Run an edited copy of a script under torchrun."""
    copy_script(folder, script, **constants)
    return launch_file(folder, script, processes, *options)


def launch_file(folder, name, processes, *options):
    command = [*LAUNCH, f"--nproc-per-node={processes}", *options, name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_HOME": str(folder / "torch_home")}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
@pytest.mark.parametrize("images", [8, 21, 33])
def test_every_image_is_in_exactly_one_part(images, processes):
    alone = trainer.Batches(np.ones(images), 99, 8, Team())
    alone.generator.manual_seed(3)
    whole = list(alone)
    parts = [trainer.Batches(np.ones(images), 99, 8, Team(rank, processes)) for rank in range(processes)]
    for part in parts:
        part.generator.manual_seed(3)
    for batch, *shares in zip(whole, *parts):
        assert sorted(batch) == sorted(sum(shares, []))
    values = torch.arange(images)
    logits = torch.stack([values, values + 1], dim=1).float()
    joined = trainer.join_parts([(logits[rank::processes], values[rank::processes]) for rank in range(processes)])
    assert [part.tolist() for part in joined] == [logits.tolist(), values.tolist()]


@pytest.mark.slow
def test_losses_and_measures_are_those_of_one_process(tmp_path):
    results = []
    for processes in (1, 3):
        folder = make_project(tmp_path / str(processes), recordings=24)
        copy_script(folder, TRAINER, **{**EXACT, "TIME_CROP": 1})
        (folder / "plain.py").write_text(PLAIN)
        done = launch_file(folder, "plain.py", processes)
        assert done.returncode == 0, done.stderr
        losses = [float(value) for value in re.findall(r"^loss ([\d.]+)$", done.stdout, flags=re.MULTILINE)]
        history = read_csv(folder / MODELS / "history.csv")
        results.append((losses, [float(row["val_loss"]) for row in history]))
    assert len(results[0][0]) >= 16
    for losses, measures in results[1:]:
        assert losses == pytest.approx(results[0][0], rel=1e-4)
        assert measures == pytest.approx(results[0][1], rel=1e-4)


@pytest.mark.slow
def test_training_writes_once_and_resumes_with_another_number_of_processes(tmp_path):
    folder = make_project(tmp_path / "two")
    target = copy_script(folder, TRAINER, **{**EXACT, "EPOCHS": 300, "PATIENCE": 300})
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*LAUNCH, "--nproc-per-node=2", target.name]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = subprocess.Popen(command, cwd=folder, env=environment, **pipes)
    lines = []
    while not lines or not lines[-1].startswith("epoch 2"):
        lines.append(running.stdout.readline())
        assert running.poll() is None, running.stderr.read()
    assert sum(line.startswith("epoch 1") for line in lines) == 1
    assert any("2 processes; batch normalisation: each process its own statistics" in line for line in lines)
    children = subprocess.run(["pgrep", "-P", str(running.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    started = time.monotonic()
    _, err = running.communicate(timeout=60)
    assert running.returncode != 0
    assert time.monotonic() - started < 60
    assert "exitcode" in err
    state = trainer.load_state(folder / MODELS / "resume_state.pth")
    epochs = len(state["history"])
    state["conditions"]["EPOCHS"] = epochs + 1
    torch.save(state, folder / MODELS / "resume_state.pth")
    outcome = run(folder, TRAINER, **{**EXACT, "EPOCHS": epochs + 1, "PATIENCE": 300})
    assert outcome.status == 0, outcome.err
    assert f"Resuming after epoch {epochs}" in outcome.out


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_evaluation_writes_what_one_process_writes(judged, processes):
    table = judged / "test_data/test.csv"
    before = table.read_text()
    table.write_text(before + "nowhere.png,Original\n")
    constants = {"PRECISION": "float32", "WORKERS": 0}
    assert run(judged, EVALUATOR, **constants).status == 1
    expected = read_csv(table)
    summary = json.loads((judged / "test_data/aggregate_test_reports.json").read_text())
    table.write_text(before + "nowhere.png,Original\n")
    done = launch(judged, EVALUATOR, processes, **constants)
    assert re.search(r"exitcode *: 1\b", done.stderr), done.stderr
    found = read_csv(table)
    assert [list(row.items())[:3] for row in found] == [list(row.items())[:3] for row in expected]
    for one, other in zip(found, expected):
        assert one["deepfake_score"] == other["deepfake_score"] == "" or float(one["deepfake_score"]) == pytest.approx(
            float(other["deepfake_score"]), abs=1e-5
        )
    assert json.loads((judged / "test_data/aggregate_test_reports.json").read_text())[0]["eer"] == summary[0]["eer"]
    assert done.stdout.count("Predictions written") == 1


@pytest.mark.slow
def test_two_agents_on_one_machine_train_and_judge(tmp_path):
    folder = make_project(tmp_path / "agents")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for script, constants in ((TRAINER, EXACT), (EVALUATOR, {"PRECISION": "float32"})):
        copy_script(folder, script, **constants)
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
        command += ["--master-addr=127.0.0.1", "--master-port=29613"]
        agents = [
            subprocess.Popen(
                [*command, f"--node-rank={rank}", script],
                cwd=folder,
                env=environment,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in (0, 1)
        ]
        errors = [agent.communicate(timeout=200)[1] for agent in agents]
        assert [agent.returncode for agent in agents] == [0, 0], errors
    assert all(row["predicted_output"] for row in read_csv(folder / "test_data/test.csv"))


@pytest.mark.slow
def test_batches_too_small_for_the_team_are_refused(project):
    done = launch(project, TRAINER, 3, **{**QUICK, "BATCH_SIZE": 4})
    assert done.returncode != 0
    assert "BATCH_SIZE = 4 (allowed: at least 2 for each of 3 processes)" in done.stderr


def test_names_with_dollars_and_of_other_encodings_pass(judged):
    name = "cost$5_$6_\udce9__clean.png"
    shutil.copy(judged / "data/original/combined/o0__clean_1.png", judged / "data/cost$5_$6__clean.png")
    table = judged / "test_data/test.csv"
    table.write_text(table.read_text().rstrip("\n") + "\ncost$5_$6__clean.png,Deepfake\n")
    outcome = run_process(judged, EVALUATOR, env={"PYTHONIOENCODING": "ascii"}, WORKERS=0)
    assert outcome.status == 0, outcome.err
    shutil.copy(judged / "data/original/combined/o0__clean_1.png", os.fsencode(judged / "data/original" / name))
    outcome = run_process(judged, TRAINER, env={"PYTHONIOENCODING": "ascii"}, **QUICK)
    assert outcome.status == 0, outcome.err
