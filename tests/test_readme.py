"""The README tells the truth: every setting, path, command and message that it names exists."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import EVALUATOR, MAKER, QUICK, ROOT, TRAINER, copy_script, run_process

README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = (TRAINER, EVALUATOR, MAKER)


def list_settings(script):
    """{name: default as written} of a script's settings block."""
    block = (ROOT / script).read_text(encoding="utf-8").split("# " + "-" * 96)[1]
    tree = ast.parse(block)
    return {node.targets[0].id: ast.unparse(node.value) for node in tree.body if isinstance(node, ast.Assign)}


def list_table(script):
    """{name: default as written} of the README's table for a script."""
    section = README.split(f"### {script}\n")[1].split("\n#")[0]
    table = {}
    for line in section.splitlines():
        if line.startswith("| `"):
            names, defaults = (re.findall(r"`([^`]+)`", cell) for cell in line.split("|")[1:3])
            table.update(zip(names, defaults))
    return table


def normalise(expression):
    return ast.unparse(ast.parse(expression))


@pytest.mark.parametrize("script", SCRIPTS)
def test_tables_name_every_setting_with_its_default(script):
    documented = {name: normalise(value) for name, value in list_table(script).items()}
    assert documented == {name: normalise(value) for name, value in list_settings(script).items()}


def test_every_constant_named_anywhere_exists():
    named = set(re.findall(r"`([A-Z][A-Z_]{3,})(?: = [^`]*)?`", README)) - {"LICENSE"}
    assert named <= {name for script in SCRIPTS for name in list_settings(script)}
    assert len(named) > 20


def test_every_path_named_exists_or_is_written(trained):
    named = set(re.findall(r"`((?:data|models|test_data|tests)/[\w./-]*)`", README))
    written = {str(path.relative_to(trained)) for path in trained.rglob("*") if path.is_file()}
    tables = ("scores.tsv", "key.tsv", "recordings.csv", "report.txt", "curves.png", "conditions.png", "mistakes.png")
    written |= {"test_data/test.png", "test_data/aggregate_test_reports.json", *(f"test_data/test_{t}" for t in tables)}
    written.add("models/experiments/resume_state.pth")  # while a run is unfinished: test_resume.py
    for path in named:
        assert (ROOT / path).exists() or path in written or (trained / path).exists(), path
    assert len(named) > 8
    assert all((ROOT / path).exists() for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README))


def test_commands_name_files_that_exist():
    commands = re.findall(r"^```bash\n(.+?)\n```", README, flags=re.MULTILINE | re.DOTALL)
    assert len(commands) >= 2
    for name in re.findall(r"(?<!/)\b([\w./]+\.(?:py|txt))\b", " ".join(commands)):
        assert (ROOT / name).exists(), name


def test_messages_under_troubleshooting_are_in_the_scripts():
    sources = " ".join((ROOT / script).read_text(encoding="utf-8") for script in SCRIPTS)
    section = README.split("## Troubleshooting")[1].split("\n## ")[0]
    for line in section.splitlines()[4:]:
        if line.startswith("|"):
            for message in re.findall(r"`([^`]+)`", line.split("|")[1]):
                for fragment in re.split(r"\(|\)|error: |: test.csv, row 7: …: |Device: cpu ", message):
                    assert fragment.strip() in sources, fragment


def test_top_level_holds_what_the_design_names():
    allowed = {"data", "models", "test_data", "tests", "README.md", "LICENSE", "requirements.txt", TRAINER, EVALUATOR}
    found = {path.name for path in ROOT.iterdir() if not path.name.startswith(".") and path.name != "__pycache__"}
    assert found <= allowed


def test_demo_images_fit_their_list():
    listed = {line.split(",")[0] for line in (ROOT / "test_data/test.csv").read_text().splitlines()[1:]}
    images = {str(path.relative_to(ROOT / "data")) for path in (ROOT / "data").glob("*/combined/*.png")}
    assert listed <= images
    held = {Path(path).name.partition("__")[0] for path in listed}
    for path in images - listed:
        assert Path(path).name.partition("__")[0] not in held
        assert not re.search(r"hibari|festival-clunits|armelle|core-sounds-it|beneath", path)
    assert sum((ROOT / "data" / path).stat().st_size for path in images) < 45e6


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_import_does_nothing(script, tmp_path):
    path = copy_script(tmp_path, script)
    code = f"import sys; sys.dont_write_bytecode = True; sys.path.insert(0, '.'); import {path.stem}"
    (tmp_path / "importer.py").write_text(code)
    done = subprocess.run([sys.executable, "importer.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert {entry.name for entry in tmp_path.iterdir()} == {path.name, "importer.py"}


@pytest.mark.slow
def test_both_scripts_run_from_another_folder(project, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    outcome = run_process(project, TRAINER, cwd=elsewhere, **{**QUICK, "WORKERS": 2})
    assert outcome.status == 0, outcome.err
    outcome = run_process(project, EVALUATOR, cwd=elsewhere)
    assert outcome.status == 0, outcome.err
    assert (project / "test_data/test_report.txt").exists()
    assert not list(elsewhere.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_other_arguments(script, tmp_path):
    for arguments, status in ((["--help"], 0), (["--epochs", "3"], 2)):
        command = [sys.executable, str(ROOT / script), *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == status
        assert ("In:" in done.stdout) == (status == 0)
        assert ("no arguments" in done.stderr) == (status == 2)
