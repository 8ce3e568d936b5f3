"""The README: its commands and examples run, and its tables name what exists and no more."""

import ast
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import urllib.parse
from pathlib import Path

import pytest

from vidjax import config as config_lib
from vidjax import main, ranking
from vidjax.data import iqiyi_vid, synthetic
from vidjax.run import workdir

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


MAINS = {
    "vidjax.main": main.main,
    "vidjax.ranking": ranking.main,
    "vidjax.data.iqiyi_vid": iqiyi_vid.main,
    "vidjax.data.synthetic": synthetic.main,
}
KNOWN_HOSTS = ("colab.research.google.com", "arxiv.org")
SHORT = ("--config.num_epochs=0.3", "--config.eval.report=False")
FEW = ("--config.ensemble.folds=2", "--config.ensemble.seeds=1")
SMALL = ("--config.model.embed_dim=16", "--config.model.num_clusters=2")  # of published size


def commands():
    """Returns the words of every `python -m vidjax...` that the README prints, in its order."""
    found = []
    for block in re.findall(r"```sh\n(.*?)```", README.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for command in line.split("#")[0].split("&&"):
                if (words := shlex.split(command))[:2] == ["python", "-m"]:
                    found.append(words[2:])
    return found


def example(name):
    """Returns the code block of the README below `<!-- NAME -->`."""
    pattern = rf"<!-- {re.escape(name)} -->\n```\w*\n(.*?)```\n"
    found = re.findall(pattern, README.read_text(), re.DOTALL)
    assert len(found) == 1, f"README.md: {len(found)} blocks of `<!-- {name} -->`"
    return found[0]


def with_line(source, block):
    """Returns `identifier.py` with the import and the line of the table where they belong."""
    imported, entry = block.rstrip("\n").split("\n")
    assert imported.startswith("from vidjax.models.")
    assert re.fullmatch(r'    "\w+": \w+,', entry)
    last = source.rindex("\nfrom vidjax.models.")
    source = source[:last] + "\n" + imported + source[last:]
    table = "_SYSTEMS: dict[str, Any] = {\n"
    assert source.count(table) == 1
    return source.replace(table, table + entry + "\n")


def links():
    """Returns (page, target) of every link in the README and in the cells of the notebooks."""
    pages = {"README.md": README.read_text()}
    for path in sorted((ROOT / "colab").glob("*.ipynb")):
        cells = json.loads(path.read_text())["cells"]
        text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] != "code")
        pages[f"colab/{path.name}"] = text
    found = []
    for page, text in pages.items():
        text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        targets = re.findall(r"\]\(([^)]*)\)", text) + re.findall(r"<(https?:[^>]*)>", text)
        found += [(page, target) for target in targets]
    return found


def test_links_lead_somewhere():
    found = links()
    assert len(found) > 8
    headings = re.findall(r"^#+ (.*)$", README.read_text(), re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", name.lower()).replace(" ", "-") for name in headings}
    blob = "https://colab.research.google.com/github/vidjax/vidjax/blob/main/"
    for page, target in found:
        if target.startswith("#"):
            assert target[1:] in anchors, (page, target)
        elif target.startswith(blob):  # the notebook itself
            assert target.removeprefix(blob) == page
        elif target.startswith("https://"):
            assert urllib.parse.urlsplit(target).netloc in KNOWN_HOSTS, (page, target)
        else:
            assert ((ROOT / page).parent / target).exists(), (page, target)


@pytest.mark.slow
def test_a_system_of_ones_own(official_dir, cache_dir, tmp_path):
    tree = tmp_path / "tree"
    for name in ("vidjax", "configs"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("configs/mine.py", "vidjax/models/mine.py"):
        assert not (tree / name).exists()
        (tree / name).write_text(example(f"example: {name}"))
    table = tree / "vidjax" / "models" / "identifier.py"
    table.write_text(with_line(table.read_text(), example("example: line")))

    workdir = tmp_path / "run"
    env = {
        **os.environ,
        "XLA_FLAGS": "",
        "VIDJAX_CACHE": str(cache_dir),
        "PYTHONPATH": str(tree),
    }

    def command(*words):
        command = [sys.executable, "-m", "vidjax.main", *words, f"--workdir={workdir}"]
        done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads((workdir / "metrics.json").read_text())

    results = command(
        "--config=configs/mine.py:iqiyi_vid,face,head,audio",
        f"--config.data.dir={official_dir}",
        "--config.batch_size=32",
        "--config.num_epochs=20",
        "--config.optim.learning_rate=0.01",
        "--config.ensemble.folds=2",
    )
    # A classifier with its bias a modality, 13 columns, and the three weights.
    assert results["num_params"] == (24 + 16 + 8 + 3) * 13 + 3
    assert results["map"] > 0.8
    assert command("--mode=evaluate")["map"] == results["map"]


@pytest.mark.slow
def test_every_command_runs(cache_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "configs", "configs")
    synthetic.main(["PATH"])
    runpy.run_path(write("features.py"))
    found = commands()
    assert len(found) > 12
    for module, *words in found:
        if words == ["--config=configs/mine.py"]:
            continue  # below
        if "--mode=" not in " ".join(words) and module == "vidjax.main":
            words += SHORT + (SMALL if "mma.py:iqiyi_vid" in words[0] else ())
            if "ensemble" in " ".join(words):
                words += FEW
        assert MAINS[module](words) in (0, None), (words, capsys.readouterr().err)
    assert {path.name for path in Path("runs").iterdir()} >= {"mma", "iqiyi", "own", "both", "best"}


def write(name):
    """Writes a program of the section on own features and returns its path."""
    Path(name).write_text(example(f"own: {name}"))
    return name


@pytest.mark.slow
def test_own_features_from_the_shell_and_from_python(cache_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "configs", "configs")
    runpy.run_path(write("features.py"))
    words = shlex.split(example("own: train").replace("\\\n", " "))[3:]
    assert main.main([*words, "--config.eval.report=False"]) == 0
    assert json.loads(Path("runs/own/metrics.json").read_text())["map"] > 0.5
    found = runpy.run_path(write("memory.py"))
    assert len(found["ranked"]) == 20 and found["scores"].shape == (1, 20)
    best = max(found["ranked"], key=lambda identity: found["ranked"][identity][0][1])
    assert best == "person_7"
    assert found["vectors"].shape[0] == 1


def fault_table():
    """Returns number of a fault -> the tests that the README's table names for it."""
    assert "\n## Faults\n" in README.read_text(), "README.md has no section '## Faults'"
    section = README.read_text().split("\n## Faults\n")[1].split("\n## ")[0]
    found = {}
    for line in section.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not cells or not cells[0][:1].isdigit():
            continue
        assert len(cells) == 4, f"{line}: wanted | # | fault | behaviour | test |"
        for part in cells[0].split(","):
            first, _, last = part.strip().partition("-")
            for number in range(int(first), int(last or first) + 1):
                assert number not in found, f"fault {number} has two rows"
                found[number] = re.findall(r"`([^`]+)`", cells[3])
    return found


def test_readme_has_a_row_for_every_fault():
    assert sorted(fault_table()) == [*range(1, 40), 41, 42]


def test_the_tests_of_the_fault_table_exist():
    for number, tests in fault_table().items():
        assert tests, f"fault {number} names no test"
        for test in tests:
            name, _, function = test.partition("::")
            assert (ROOT / name).is_file(), f"fault {number}: no file {name}"
            tree = ast.parse((ROOT / name).read_text())
            there = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
            assert function in there, f"fault {number}: no test {test}"
            assert function.startswith("test_"), test


def table(heading):
    """Returns the first cells of the table under a heading of the README, without backticks."""
    section = README.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    return [word for row in rows for word in re.findall(r"`([^`]+)`", row)]


def test_readme_lists_every_field_and_no_other():
    fields = {name for name, _ in config_lib.fields(config_lib.default())}
    assert {name.removeprefix("config.") for name in table("Fields")} == fields


def test_readme_lists_every_flag_and_no_other():
    source = (ROOT / "vidjax" / "main.py").read_text()
    flags = set(re.findall(r'add_argument\(\s*"(--[\w.]+)', source))
    named = [word for word in table("Flags") if word.startswith("--")]  # not the arguments
    assert {re.split(r"[=\[]", flag)[0] for flag in named} == flags


@pytest.mark.slow
def test_readme_lists_the_files_of_a_workdir(official_dir, cache_dir, tmp_path):
    from tests.helpers.small_runs import shrunk
    from vidjax.data.records import pipeline
    from vidjax.modes import train

    # Of all experiments, the one that leaves most.
    config = shrunk("--config.num_epochs=2", spec="configs/noise_classes.py:iqiyi_vid")
    data = pipeline.load("iqiyi_vid", directory=str(official_dir), cache_dir=str(cache_dir))
    with workdir.lock(tmp_path):
        train.train(config, tmp_path, data, num_devices=1, analyse=True)
    written = {re.sub(r"tfevents\..*", "tfevents.*", p.name) for p in tmp_path.iterdir()}
    named = {name.split("/")[0] for name in table("Files of a workdir")}
    assert written == {name for name in named if "_SPLIT" not in name}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.name)
def test_configurations_show_their_command(path):
    doc = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert f"python -m vidjax.main --config=configs/{path.name}" in doc
    assert f"configs/{path.name}" in README.read_text()
