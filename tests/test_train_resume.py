"""Nothing is lost: interrupted runs go on, finished ones are kept, too little memory or disk loses nothing."""

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import MODELS, QUICK, ROOT, TRAINER, assert_refused, copy_script, make_image, read_csv, run
from torchvision.models import resnet

import train_deepfake_detector as trainer
from models import detector, runtime
from models.runtime import Compute

BEST, FINAL = "best_laundered_processed.pth", "final_laundered_processed.pth"
LONG = {**QUICK, "EPOCHS": 3}


def read_results(folder):
    """Weights of both checkpoints and the history without times."""
    states = [torch.load(folder / MODELS / name, weights_only=True)["state_dict"] for name in (BEST, FINAL)]
    history = [
        {key: value for key, value in row.items() if key != "seconds"}
        for row in read_csv(folder / MODELS / "history.csv")
    ]
    return states, history


def assert_equal(one, other):
    assert one[1] == other[1]
    for left, right in zip(one[0], other[0]):
        assert all(torch.equal(left[key], right[key]) for key in left)


def interrupt(folder, monkeypatch, epoch, **constants):
    """Run the trainer until it has saved the state of an epoch; then Ctrl-C."""
    fsync, wanted = os.fsync, folder / MODELS / "resume_state.pth"
    counted = []

    def press(descriptor):
        fsync(descriptor)
        if wanted.exists():
            counted.append(len(torch.load(wanted, weights_only=True)["history"]))
            if counted[-1] >= epoch:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", press)
        return run(folder, TRAINER, **{**LONG, **constants})


@pytest.fixture
def interrupted(project, monkeypatch):
    """A project whose training was interrupted in its second or third epoch."""
    outcome = interrupt(project, monkeypatch, 1)
    assert outcome.status == 130, outcome.err
    assert outcome.err == "stopped by Ctrl-C; run it again to resume after the last finished epoch (RESUME = True)\n"
    return project


def test_resumed_run_ends_as_an_uninterrupted_one(interrupted, project, tmp_path_factory):
    outcome = run(interrupted, TRAINER, **LONG)
    assert outcome.status == 0, outcome.err
    assert "Resuming after epoch 1" in outcome.out
    resumed = read_results(interrupted)
    assert run(interrupted, TRAINER, **LONG).status == 0
    assert_equal(resumed, read_results(interrupted))


def test_resumed_run_does_not_look_for_pretrained_weights_again(project, monkeypatch):
    weights = project / "start.pth"
    torch.save(resnet.resnet18(num_classes=2).state_dict(), weights)
    interrupt(project, monkeypatch, 1, PRETRAINED="start.pth")
    weights.unlink()
    outcome = run(project, TRAINER, **{**LONG, "PRETRAINED": "start.pth"})
    assert outcome.status == 0, outcome.err
    assert "Start: file start.pth" in outcome.out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"EPOCHS": 4}, "EPOCHS was 3, is 4"),
        ({"BATCH_SIZE": 4, "SEED": 1}, "BATCH_SIZE was 8, is 4; SEED was 0, is 1"),
    ],
)
def test_other_settings_stop_and_name_what_differs(interrupted, changes, words):
    before = {path: path.read_bytes() for path in (interrupted / MODELS).iterdir()}
    outcome = run(interrupted, TRAINER, **{**LONG, **changes})
    assert_refused(outcome, words)
    assert {path: path.read_bytes() for path in (interrupted / MODELS).iterdir()} == before


def test_another_list_of_images_stops(interrupted):
    make_image(interrupted / "data/original/combined/new__clean.png", 1, fake=False)
    outcome = run(interrupted, TRAINER, **LONG)
    assert (outcome.status, "the list of images was" in outcome.err) == (2, True)


def test_settings_that_do_not_shape_the_result_may_change(interrupted):
    outcome = run(interrupted, TRAINER, **{**LONG, "WORKERS": 2, "CACHE_GB": 0})
    assert (outcome.status, "Resuming after epoch 1" in outcome.out) == (0, True)


def test_without_resume_it_begins_afresh(interrupted):
    outcome = run(interrupted, TRAINER, **{**LONG, "RESUME": False, "EPOCHS": 1})
    assert outcome.status == 0, outcome.err
    assert "Resuming" not in outcome.out
    assert len(read_csv(interrupted / MODELS / "history.csv")) == 1
    assert (interrupted / MODELS / f"previous_{BEST}").exists()


def test_finished_run_is_kept_aside_and_never_given_up_for_an_unfinished_one(project, monkeypatch):
    assert run(project, TRAINER, **LONG).status == 0
    finished = (project / MODELS / FINAL).read_bytes()
    interrupt(project, monkeypatch, 1, SEED=1)
    names = {path.name for path in (project / MODELS).iterdir()}
    assert {f"previous_{name}" for name in (BEST, FINAL, "history.csv", "learning_curves.png")} <= names
    outcome = run(project, TRAINER, **{**LONG, "SEED": 2, "RESUME": False})
    assert outcome.status == 0, outcome.err
    assert (project / MODELS / f"previous_{FINAL}").read_bytes() == finished
    assert not list((project / MODELS).glob("*resume_state*"))


def test_damaged_state_stops_and_loses_nothing(interrupted):
    state = interrupted / MODELS / "resume_state.pth"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    before = {path: path.read_bytes() for path in (interrupted / MODELS).iterdir()}
    assert_refused(run(interrupted, TRAINER, **LONG), "the run cannot be resumed; RESUME = False starts over")
    assert {path: path.read_bytes() for path in (interrupted / MODELS).iterdir()} == before


def test_state_of_another_version_stops(interrupted):
    torch.save({"history": [], "run": {}}, interrupted / MODELS / "resume_state.pth")
    assert_refused(
        run(interrupted, TRAINER, **LONG), "is of another version of this script", "RESUME = False starts over"
    )


def test_missing_best_checkpoint_stops(interrupted):
    (interrupted / MODELS / BEST).unlink()
    outcome = run(interrupted, TRAINER, **LONG)
    assert_refused(outcome)
    assert "put it back, or start over: RESUME = False" in outcome.err


def refuse(monkeypatch, *names):
    """Let no file of these names be replaced or renamed."""
    replace = os.replace

    def check(source, target):
        if {Path(source).name, Path(target).name} & {*names}:
            raise PermissionError(13, "Permission denied", str(source), None, str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", check)
    monkeypatch.setattr(runtime, "RENAME_WAITS_S", (0,))


def test_history_and_picture_that_cannot_be_replaced_do_not_end_the_run(project):
    assert run(project, TRAINER, **{**LONG, "EPOCHS": 1}).status == 0
    names = ("history.csv", "learning_curves.png")
    with pytest.MonkeyPatch.context() as patch:
        refuse(patch, *names)
        outcome = run(project, TRAINER, **LONG)
    assert outcome.status == 1
    for name in names:
        assert f"left out: {project / MODELS / name} cannot be written: Permission denied (is it open" in outcome.err
        assert f"{project / MODELS / name} cannot be renamed to previous_{name}: Permission denied" in outcome.err
    assert detector.load_content(project / MODELS / FINAL)["epoch"] == 3
    again = run(project, TRAINER, **LONG)
    assert (again.status, again.err) == (0, "")
    assert "Resuming after epoch 3" in again.out and "\nepoch" not in again.out
    assert len(read_csv(project / MODELS / "history.csv")) == 3
    assert not (project / MODELS / "resume_state.pth").exists()


@pytest.mark.parametrize("name", [BEST, FINAL, "resume_state.pth"])
def test_checkpoint_that_cannot_be_replaced_stops_and_the_run_resumes(project, name):
    with pytest.MonkeyPatch.context() as patch:
        refuse(patch, name)
        outcome = run(project, TRAINER, **LONG)
    assert_refused(outcome, f"{project / MODELS / name} cannot be written: Permission denied (is it open")
    files = {path.name for path in (project / MODELS).iterdir()}
    assert files == {BEST: set(), FINAL: {BEST, "history.csv", "resume_state.pth"}}.get(name, {BEST})
    outcome = run(project, TRAINER, **LONG)
    assert outcome.status == 0, outcome.err
    assert ("Resuming after epoch 3" in outcome.out) == (name == FINAL)
    assert len(read_csv(project / MODELS / "history.csv")) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status", "name"), [(signal.SIGTERM, 143, "SIGTERM"), (signal.SIGINT, 130, "Ctrl-C")]
)
def test_signals_end_with_a_line_that_says_how_to_go_on(project, number, status, name):
    target = copy_script(project, TRAINER, **{**QUICK, "EPOCHS": 1000, "PATIENCE": 1000})
    running = subprocess.Popen(
        [sys.executable, str(target)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )
    try:
        for _ in range(3):
            while not running.stdout.readline().startswith("epoch"):
                assert running.poll() is None
        running.send_signal(number)
        _, err = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == status
    assert err == f"stopped by {name}; run it again to resume after the last finished epoch (RESUME = True)\n"
    assert torch.load(project / MODELS / "resume_state.pth", weights_only=True)["history"]


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
]


def limit_batch(monkeypatch, limit, error=OUT_OF_MEMORY[0]):
    """Let a network run out of memory on more than `limit` images."""
    forward = resnet.ResNet.forward

    def run_out(self, images):
        if len(images) > limit:
            raise error
        return forward(self, images)

    monkeypatch.setattr(resnet.ResNet, "forward", run_out)


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_too_little_memory_halves_the_parts_and_says_so_once(project, monkeypatch, error):
    limit_batch(monkeypatch, 3, error)
    outcome = run(project, TRAINER, **LONG)
    assert outcome.status == 0, outcome.err
    assert outcome.out.count("Out of memory: computing batches in parts from now on") == 1
    assert len(read_csv(project / MODELS / "history.csv")) == 3


def test_a_single_image_too_large_for_the_memory_is_a_clear_error(project, monkeypatch):
    limit_batch(monkeypatch, 0)
    outcome = run(project, TRAINER, **QUICK)
    assert (outcome.status, len(outcome.err.splitlines())) == (2, 1)
    assert "out of memory: lower BATCH_SIZE or IMAGE_SIZE" in outcome.err


START = trainer.Start("random", 0.1)


def sum_losses(logits, labels, images):
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / images


def test_parts_have_the_gradients_of_the_whole_batch(project):
    torch.manual_seed(0)
    compute, settings = Compute(torch.device("cpu"), torch.float32), {"LEARNING_RATE": 0.1, "WEIGHT_DECAY": 0}
    run = trainer.Run(
        detector.make_network().eval(), 1, compute, None, {"settings": settings}, trainer.Start("random", 0.1)
    )
    images, labels = torch.rand(8, 3, 64, 64), torch.tensor([0, 1, 1, 1, 0, 1, 1, 1])
    expected = torch.nn.functional.cross_entropy(run.model(images), labels)
    expected.backward()
    gradient = run.model.fc.weight.grad.clone()
    for run.parts in (1, 3, 8):
        loss_fn = partial(sum_losses, images=len(images))
        total = trainer.add_gradients(run, run.model, images, loss_fn, labels)
        assert torch.allclose(total, expected, atol=1e-6)
        assert torch.allclose(run.model.fc.weight.grad, gradient, atol=1e-6)


def test_loss_that_is_no_number_stops_and_names_the_step(project, monkeypatch):
    forward, calls = resnet.ResNet.forward, []

    def go_astray(self, images):
        calls.append(self.training)
        output = forward(self, images)
        return output * float("nan") if self.training and sum(calls) == 9 else output

    monkeypatch.setattr(resnet.ResNet, "forward", go_astray)
    outcome = run(project, TRAINER, **LONG)  # 5 steps an epoch
    assert_refused(outcome, "the loss of step 4 of this epoch is not finite", "lower LEARNING_RATE")
    assert detector.load_content(project / MODELS / BEST)["epoch"] == 1


@pytest.mark.slow
def test_full_disk_loses_nothing_and_after_room_was_made_it_goes_on(project):
    code = (
        "import resource, signal, runpy; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (90_000_000, 90_000_000)); "
        "import sys; sys.argv = ['train']; runpy.run_path('train_deepfake_detector.py', run_name='__main__')"
    )
    copy_script(project, TRAINER, **LONG)
    done = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr  # the checkpoint fits, the state of three times its size does not
    assert len(done.stderr.splitlines()) == 1
    assert "File too large" in done.stderr
    assert detector.load_content(project / MODELS / BEST)["epoch"] == 1
    assert not list(project.rglob(".*.tmp"))
    assert run(project, TRAINER, **LONG).status == 0


@pytest.mark.slow
def test_chaos_in_a_round():
    command = [sys.executable, str(ROOT / "tests/benchmarks/chaos.py"), "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ", 0 faults" in done.stdout


def test_paths_among_the_hold_out_lists_leave_a_checkpoint_that_loads(project):
    assert run(project, TRAINER, **{**QUICK, "HOLDOUT_CSVS": [Path("test_data/test.csv")]}).status == 0
    assert detector.load_content(project / MODELS / FINAL)["settings"]["HOLDOUT_CSVS"] == ["test_data/test.csv"]
