"""The README tells the truth: every setting, path, command and message that it names exists."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import EVALUATOR, MAKER, QUICK, ROOT, TRAINER, copy_script, run_process

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [README, *((ROOT / f"{name}/README.md").read_text(encoding="utf-8") for name in ("models", "data"))]
SCRIPTS = (TRAINER, EVALUATOR, MAKER)


def list_settings(script):
    """{name: default as written} of a script's settings block."""
    block = (ROOT / script).read_text(encoding="utf-8").split("# " + "-" * 96)[1]
    tree = ast.parse(block)
    return {node.targets[0].id: ast.unparse(node.value) for node in tree.body if isinstance(node, ast.Assign)}


def normalise(expression):
    return ast.unparse(ast.parse(expression))


def test_settings_in_tables_have_their_defaults():
    settings = [(name, normalise(value)) for script in SCRIPTS for name, value in list_settings(script).items()]
    rows = re.findall(r"^\| `([A-Z0-9_]{3,})` \| `([^`]+)` \|", "\n".join(PAGES), flags=re.MULTILINE)
    assert len(rows) > 8
    for name, default in rows:
        assert (name, normalise(default)) in settings


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_setting_is_one_line_with_its_meaning_behind_it(script):
    block = (ROOT / script).read_text(encoding="utf-8").split("# " + "-" * 96)[1]
    lines = [line for line in block.splitlines() if re.match(r"[A-Z0-9_]+ = ", line)]
    assert len(lines) == len(list_settings(script))
    unexplained = [line for line in lines if "  # " not in line]
    names = {line.split(" = ")[0] for line in unexplained}
    assert names <= {"BEST_MODEL_PATH", "FINAL_MODEL_PATH", "MODEL_PATH", "CSV_FILES", "EPOCHS", "SEED"}


def test_every_constant_named_anywhere_exists():
    modules = " ".join(path.read_text(encoding="utf-8") for path in (*ROOT.glob("*.py"), *ROOT.glob("*/*.py")))
    for page in PAGES:
        for name in set(re.findall(r"`([A-Z][A-Z_]{3,})(?: = [^`]*)?`", page)) - {"LICENSE"}:
            assert re.search(rf"^{name} = ", modules, flags=re.MULTILINE) or any(
                name in list_settings(script) for script in SCRIPTS
            ), name


def test_functions_and_files_named_under_change_the_code_exist():
    section = README.split("## Change the code")[1].split("\n## ")[0]
    rows = [line.split("|")[2] for line in section.splitlines() if line.startswith("| ") and "---" not in line][1:]
    assert len(rows) >= 8
    for row in rows:
        names = re.findall(r"`([^`]+)`", row)
        sources = [name for name in names if name.endswith(".py")]
        text = " ".join((ROOT / name).read_text(encoding="utf-8") for name in sources)
        for name in set(names) - set(sources):
            assert name in text, name


LAYERS = [  # each may import what stands below it, and what stands before it in its own row
    [TRAINER, EVALUATOR, MAKER],
    ["data/copies.py", "data/making.py", "models/lists.py"],
    ["models/checks.py", "models/figures.py", "models/report.py", "data/laundering.py", "data/pictures.py"],
    ["models/tables.py", "models/metrics.py", "models/pixel_cache.py", "models/dataset.py", "data/resynthesis.py"],
    ["models/images.py", "models/detector.py", "models/start.py", "models/gradients.py"],
    ["data/recordings.py"],
    ["data/containers.py"],
    ["models/script.py"],
    ["models/runtime.py"],
]


def test_arrows_between_modules_point_one_way():
    order = [name for layer in LAYERS[::-1] for name in layer]
    paths = {path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]}
    assert {path for path in paths if not path.startswith("tests/")} == {*order, "models/__init__.py"}
    modules = {re.sub(r"^data/", "", name).removesuffix(".py").replace("/", "."): name for name in order}
    for place, name in enumerate(order):
        for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
            found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                found = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            for module in set(found) & set(modules):
                assert order.index(modules[module]) < place, f"{name} imports {modules[module]}"


def test_every_module_has_a_line_in_the_table_and_a_file_of_tests():
    pages = {name: (ROOT / name / "README.md").read_text(encoding="utf-8") for name in ("models", "data")}
    for name in (name for layer in LAYERS for name in layer):
        folder, _, file = name.rpartition("/")
        assert not folder or f"`{file}`" in pages[folder], name
        assert (ROOT / "tests" / f"test_{file}").exists(), name


@pytest.mark.slow
def test_maker_does_not_import_torch():
    code = "import sys; sys.path.insert(0, 'data'); import make_spectrograms; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "False\n", done.stderr


def test_every_path_named_exists_or_is_written(trained):
    named = set(re.findall(r"`((?:data|models|test_data|tests)/[\w./-]*)`", README))
    written = {str(path.relative_to(trained)) for path in trained.rglob("*") if path.is_file()}
    written |= {"test_data/unknown.csv", "test_data/test_own.csv", "test_data/unknown_report.html"}
    written |= {f"data/audio/{kind}/" for kind in ("original", "deepfake", "unknown")}
    for path in named:
        assert (ROOT / path).exists() or path in written or (trained / path).exists(), path
    assert len(named) > 8
    assert len(README.splitlines()) <= 220
    assert all((ROOT / path).exists() for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README))


def test_commands_name_files_that_exist():
    commands = re.findall(r"^```bash\n(.+?)\n```", README, flags=re.MULTILINE | re.DOTALL)
    assert len(commands) >= 2
    for name in re.findall(r"(?<!/)\b([\w./]+\.(?:py|txt))\b", " ".join(commands)):
        assert (ROOT / name).exists(), name


def test_messages_under_troubleshooting_are_in_the_scripts():
    paths = [*SCRIPTS, *(path.relative_to(ROOT) for path in [*ROOT.glob("models/*.py"), *ROOT.glob("data/*.py")])]
    sources = " ".join((ROOT / path).read_text(encoding="utf-8") for path in paths)
    section = README.split("## Troubleshooting")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines()[4:] if line.startswith("|")]
    assert len(rows) > 10
    for row in rows:
        for message in re.findall(r"`([^`]+)`", row.split("|")[1]):
            for fragment in re.split(r"\(|\)|Device: cpu ", message):
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
    code = f"import sys; sys.dont_write_bytecode = True; sys.path[:0] = ['.', 'data']; import {path.stem}"
    (tmp_path / "importer.py").write_text(code)
    done = subprocess.run([sys.executable, "importer.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert {entry.name for entry in tmp_path.iterdir()} <= {path.name, "importer.py", "models", "data"}
    assert not list(tmp_path.rglob("*.pth"))


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
        assert ("takes no arguments (--epochs 3): edit" in done.stderr) == (status == 2)
        assert len(done.stderr.splitlines()) == (status == 2)
