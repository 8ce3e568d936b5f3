"""The commands and examples of the READMEs run, links have targets, and named tests exist."""

import ast
import contextlib
import functools
import json
import os
import re
import runpy
import shlex
import shutil
import sqlite3
import subprocess
import sys
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest

import vidjax
from tests.benchmarks import scores, speed
from tests.helpers import docs, drawn_people, made_nets
from tests.helpers.cases import nightly_after_first
from tests.helpers.small_runs import CLOSED_FORM, LAYER, ROOT
from vidjax.cli import program, run_commands
from vidjax.core import losses, metrics
from vidjax.data import iqiyi_vid, synthetic
from vidjax.models import build_system
from vidjax.runs import config as config_lib

EXPERIMENTS, WHERE = "configs/experiments.md", "configs/where-is.md"
ARCHIVES = "vidjax/apps/video/ARCHIVES.md"
NAMES = (
    "README.md", "configs/README.md", "vidjax/data/README.md", "vidjax/evaluation/export/README.md",
    "vidjax/apps/video/README.md", ARCHIVES, "vidjax/apps/video/NETS.md",
    "vidjax/apps/gallery/README.md", "vidjax/runs/README.md", "vidjax/apps/serve/README.md",
    "tests/benchmarks/README.md", "tests/README.md", EXPERIMENTS, WHERE,
)  # fmt: skip
PAGES = {name: ROOT / name for name in NAMES}

MAINS = {
    "vidjax.main": program.main, "vidjax.data.iqiyi_vid": iqiyi_vid.main,
    "vidjax.data.synthetic": synthetic.main,
}  # fmt: skip
KNOWN_HOSTS = ("colab.research.google.com", "arxiv.org", "docs.ray.io")
NO_REPORT = "--config.eval.report=False"
SHORT = ("--config.num_epochs=0.3", NO_REPORT)
SMALL = ("--config.model.embed_dim=16", "--config.model.num_clusters=2")  # of published size
TINY = {"mma.py": (*SMALL, "--config.modalities=face,audio"), "quality_fusion.py": (LAYER,)}


def commands(pages=tuple(name for name in NAMES if name != EXPERIMENTS)):
    """Returns [module, *words] of the Python commands of pages, for each value of their loops."""
    every = []
    for page in pages:
        text = re.sub(
            r"for (\w+) in ([^;\n]*); do\n(.*?)done\n",
            lambda loop: "".join(loop[3].replace(f"${loop[1]}", x) for x in loop[2].split()),
            PAGES[page].read_text(),
            flags=re.DOTALL,
        )
        for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
            for command in re.split("\n|&&", block.replace("\\\n", " ")):
                words = shlex.split(command, comments=True)
                if words[:1] == ["vidjax"]:
                    words[:1] = ["python", "-m", "vidjax.main"]
                if words[:2] == ["python", "-m"] and words[2:] not in every:
                    every.append(words[2:])
    return every


@pytest.fixture
def one_device(tmp_path, monkeypatch):
    """Shows only one device, as most readers have, and makes an empty folder the current one."""
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: first)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def forget_own():
    """Returns a function that forgets the models, losses and metrics of a user's file."""
    with contextlib.ExitStack() as stack:

        def forget():
            stack.close()
            for table in (build_system.MODELS, losses.CLASSIFICATION, metrics.CLIP_METRICS):
                stack.enter_context(mock.patch.dict(table))

        forget()
        yield forget


def example(name, page="README.md"):
    return docs.snippet(page, name)


def write(name, kind="own", page="README.md"):
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text(example(f"{kind}: {name}", page))
    return name


def prose(page):
    """Returns the text of a page, or of the cells of a notebook, without blocks of code."""
    text = (ROOT / page).read_text()
    if str(page).endswith(".ipynb"):
        cells = json.loads(text)["cells"]
        text = "\n".join("".join(x["source"]) for x in cells if x["cell_type"] == "markdown")
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def test_every_link_of_the_pages_has_a_target():
    blob = "https://colab.research.google.com/github/vidjax/vidjax/blob/main/"
    for page in (*PAGES, *(f"colab/{x.name}" for x in (ROOT / "colab").glob("*.ipynb"))):
        text = prose(page)
        targets = re.findall(r"\]\(([^)]*)\)", text) + re.findall(r"<(https?:[^>]*)>", text)
        assert targets or page == "vidjax/runs/README.md", page  # the only page without a link
        for target in targets:
            if target.startswith(blob):  # a notebook has a link to itself
                assert target.removeprefix(blob) == page
            elif target.startswith("https://"):
                assert urllib.parse.urlsplit(target).netloc in KNOWN_HOSTS, (page, target)
            else:
                path, _, anchor = target.partition("#")
                to = (ROOT / page).parent / path if path else ROOT / page
                assert to.exists(), (page, target)
                headings = re.findall(r"^#+ (.*)$", prose(to) if anchor else "", re.MULTILINE)
                anchors = [re.sub(r"[^\w -]", "", x.lower()).replace(" ", "-") for x in headings]
                assert not anchor or anchors.count(anchor) == 1, (page, target)


def test_readme_is_short_and_each_page_of_the_site_is_in_its_menu(tmp_path):
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 220 and max(map(len, lines)) <= 100
    # The program fails if README lacks the section of a reader, or the reference a public name.
    runpy.run_path(str(ROOT / ".ci/docs/pages.py"))["main"](tmp_path)
    menu = re.findall(r": (\S+\.md)$", (ROOT / ".ci/docs/mkdocs.yml").read_text(), re.MULTILINE)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.md")} == {*menu}
    assert "\n## Your own features\n" in (tmp_path / "researchers.md").read_text()
    assert "](../researchers.md#systems)" in (tmp_path / "configs/README.md").read_text()
    assert "blob/main/vidjax/data/README.md" not in (tmp_path / "researchers.md").read_text()


def test_page_of_the_index_needs_no_checkout(tmp_path):
    file = tmp_path / "description.md"
    subprocess.run([sys.executable, ROOT / ".ci/docs/description.py", file], check=True)
    page = file.read_text()
    links = re.findall(r"\]\(([^)]*)\)", page)
    assert len(links) > 30 and all(link.startswith("https://") for link in links)
    assert f"/raw/v{vidjax.__version__}/colab/report.png" in "".join(links)
    assert "pip install 'vidjax[train]' && vidjax --config=mma\n" in page
    assert not re.search(r"git clone|pip install -e|'\.\[|configs/\w+\.py|<!--", page)


def find_used_names(program):
    """Yields the names of vidjax that a program uses, such as `vidjax.train`."""
    for node in ast.walk(ast.parse(re.sub(r"(?m)^(\s*)[%!].*", r"\1pass", program))):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name != "vidjax")
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "vidjax":
            yield ast.unparse(node)


def test_pages_and_notebooks_use_only_public_names_of_python():
    programs = [code for page in PAGES.values() for code in
                re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)]  # fmt: skip
    for path in (ROOT / "colab").glob("*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        programs += ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    used = {name for program in programs for name in find_used_names(program)}
    used = {name for name in used if name.startswith("vidjax.")}
    contributing = (ROOT / ".github/CONTRIBUTING.md").read_text()
    section = contributing.partition("## Where things go")[2].partition("\n## ")[0]
    modules = [path[:-3].replace("/", ".") for path in re.findall(r"`(vidjax/\S+\.py)`", section)]
    modules += ["vidjax.main.main", "vidjax.data.tfds"]
    modules += [f"vidjax.{name}" for name in vidjax.__all__]
    assert not {x for x in used if not f"{x}.".startswith(tuple(f"{one}." for one in modules))}
    assert {"vidjax.name_people", "vidjax.Gallery"} <= used
    for name in vidjax.__all__:
        assert getattr(vidjax, name).__module__.startswith("vidjax.")


@pytest.mark.slow
def test_readme_example_of_a_system_runs(official_dir, say, one_device, forget_own):
    path = write("configs/mine.py", kind="example", page=EXPERIMENTS)
    own = f"--config={path}"

    def command(*words, workdir="--workdir=run", code=0):
        """Runs a command without the models of earlier commands; returns results or the error."""
        forget_own()
        error = say(*words, workdir, code=code)
        return error if code else json.loads(Path("run/metrics.json").read_text())

    small = ("batch_size=32", "num_epochs=20", "optim.learning_rate=0.01")
    words = [f"--config.{x}" for x in (*small, "eval.report=False", f"data.dir={official_dir}")]
    results = command(f"{own}:iqiyi_vid,face,head", *words)
    # The modalities have the widths 24 and 16. Each has a norm (scale and bias), a classifier of
    # 13 columns (12 identities and `other`) with a bias, and a weight.
    assert results["num_params"] == 2 * (24 + 16) + (24 + 16 + 2) * 13 + 2
    assert results["map"] > 0.8
    assert "--config=FILE" in command("--mode=evaluate", code=2)
    assert command("--mode=evaluate", own)["map"] == results["map"]
    command("--mode=rank", own, f"--input={official_dir}", "--config.eval.split=val", "--out=a.tsv")
    assert len(Path("a.tsv").read_text().splitlines()) > 100  # of 12 identities, each with 60 clips
    for verb, start, to in ("export", "run", "out"), ("import", "out", "copy"):
        copying = [verb, start, *(["--format=safetensors"] if verb == "export" else [])]
        assert "--config=FILE" in command(*copying, workdir=f"--to={to}", code=2)
        command(*copying, own, workdir=f"--to={to}")
    vidjax.load_config(path)  # defines the model, as Python code must do before `restore`
    assert len(vidjax.restore("run").identities) == 12


@pytest.mark.slow
@pytest.mark.usefixtures("no_figures")
def test_page_of_experiments_runs_as_it_is(tmp_path, monkeypatch, one_device, capsys, forget_own):
    monkeypatch.setenv("VIDJAX_CACHE", str(tmp_path / "cache"))
    tiny = synthetic.SIZES["small"]._replace(identities=20, mean_frames=4.0)
    monkeypatch.setitem(synthetic.SIZES, "small", tiny)
    short = "--config.modalities=face", "--config.num_epochs=2", "--config.eval.every_epochs=1"
    load_config = vidjax.load_config
    write("configs/mine.py", kind="example", page=EXPERIMENTS)
    for module, *words in commands([EXPERIMENTS]):
        words += short if words[0] == "train" else ()
        assert MAINS[module](words) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert "95 % interval" in printed and "runs/b1+runs/b2+runs/b3" in printed
    short = short[0], "--config.num_epochs=1", NO_REPORT
    monkeypatch.setattr(vidjax, "load_config", lambda *words: load_config(*words, *short))
    trackers = {name: mock.MagicMock() for name in ("wandb", "mlflow")}
    entered = trackers["wandb"].init.return_value.__enter__.return_value
    for name, log in (("wandb", entered.log), ("mlflow", trackers["mlflow"].log_metrics)):
        monkeypatch.setitem(sys.modules, name, trackers[name])
        runpy.run_path(write(f"{name}_run.py", page=EXPERIMENTS))
        lines = [*map(json.loads, Path(f"runs/{name}/metrics.jsonl").read_text().splitlines())]
        steps = [call.kwargs.get("step", call.args[-1]) for call in log.call_args_list]
        assert steps == [line["step"] for line in lines]
        tracked = [call.args[0] for call in log.call_args_list]
        assert all(tracked[i].items() <= line.items() for i, line in enumerate(lines))
        assert {"map", "top5", "train_loss"} <= {key for line in tracked for key in line}
    assert trackers["wandb"].init.call_args.kwargs["config"]["loss"]["classification"] == "poly"
    pytest.importorskip("pandas")
    runpy.run_path(write("plot.py", page=EXPERIMENTS))
    assert Path("map.png").stat().st_size > 9_000


def test_every_flag_and_command_on_the_page_where_is_x_is_known():
    page = PAGES[WHERE].read_text()
    words = [shlex.split(text) for text in re.findall(r"`((?:vidjax )?[^`]*)`", page)]
    rows = [[x for x in row if x.startswith("--config.") and "=" in x] for row in words]
    rows = [flags for flags in rows if flags and flags != ["--config.FIELD=VALUE"]]
    assert sum(map(len, rows)) > 30
    for flags in rows:
        config_lib.check(vidjax.load_config("cosine" if "margin" in str(flags) else "mma", *flags))
    calls = [row[1:] for row in words if row[:1] == ["vidjax"]]
    assert len(calls) > 9
    for call in calls:
        program.parse(call)


@pytest.mark.slow
@pytest.mark.usefixtures("no_figures")
@nightly_after_first("every", [False, True])
def test_every_readme_command_runs(tmp_path, monkeypatch, one_device, capsys, every):
    """Without `every`, the data are tiny, and nearest neighbours replace all nets but the first."""
    monkeypatch.setenv("VIDJAX_CACHE", str(tmp_path / "cache"))
    if not every:
        tiny = synthetic.SIZES["small"]._replace(identities=30, mean_frames=4.0)
        monkeypatch.setitem(synthetic.SIZES, "small", tiny)
    shutil.copytree(ROOT / "configs", "configs")
    synthetic.main(["PATH"])
    runpy.run_path(write("features.py"))
    runpy.run_path(write("titles.py", kind="text", page="vidjax/data/README.md"))
    Path("ada").mkdir()
    shutil.copy("features/val/val_7.npz", "ada/clip.npz")
    drawn_people.write_models(Path("models"))
    new = shutil.copytree("models", "new_models")
    made_nets.write(Path(new), "embed", back_end=made_nets.back_end(), **drawn_people.EMBED)
    Path("new_features").mkdir()
    for path in (*Path("features").rglob("*.npz"), Path("ada/clip.npz")):
        np.savez(f"new_features/{path.name}", face=np.ones((1, made_nets.WIDTH), np.float32))
    for film in ("holiday.mp4", "party.mkv"):
        drawn_people.write_film(Path(film), (2, 20, [("Ada", 20, 30)]), (2, 60, [("Eve", 80, 50)]))
    for path in ("friends/Ada/1.png", "photos/Ada/1.png", "photos_of_ada/1.png"):
        drawn_people.write_photo(Path(path), ("Ada", 40, 40))
    drawn_people.write_portraits(Path("portraits"))
    ours = [words for words in commands() if words[0].startswith("vidjax.")]
    compared = " ".join(word for module, *words in ours if words[0] == "compare" for word in words)
    for module, *words in ours:
        text = " ".join(words)
        # Other tests run these commands: test_extract_models.py, test_serve.py, test_forget.py.
        if {"convert", "serve", "backup"} & {*words}:
            continue
        if not every and re.search("folds|everything|few|runs/both|runs/measured|runs/best", text):
            continue  # long commands
        if module == "vidjax.main" and (words[0] == "train" or words[0].startswith("--config")):
            _, workdir = run_commands.read_train_settings(program.parse(words))
            if "--workdir=" not in text:  # the following flags would change the default
                words.append(f"--workdir={workdir}")
            if not every and Path("runs/mma").exists():
                words = [re.sub("deepmef.py|mma.py", "knn.py", word) for word in words]
                words = [word.replace("face,title", "title") for word in words]  # kNN uses one
                text = " ".join(words)
            if "joint" in text:  # the net of its other systems takes minutes
                words = [re.sub("joint.py:?", "joint.py:plda,", x).rstrip(",") for x in words]
                words.append(NO_REPORT)
                shutil.rmtree(workdir, ignore_errors=True)  # of other data
            else:
                words += (*CLOSED_FORM, NO_REPORT) if "plda" in text else SHORT
            if str(workdir) in compared:  # `compare` reads files of the report
                words.remove(NO_REPORT)
            small = {"mma.py:iqiyi_vid": SMALL} if every else TINY
            words += [word for spec, more in small.items() if spec in text for word in more]
            if "ensemble" in text or "trainval" in text:
                words.append("--config.ensemble.folds=2")
            words += ["--config.ensemble.seeds=1"] if "ensemble" in text else []
        elif words[0] == "evaluate":
            words.append(NO_REPORT)
        for word in words:
            if word.startswith("--labels="):  # as if a user wrote a name into the table
                table = Path(word.removeprefix("--labels="))
                table.write_text(table.read_text().replace("unknown 1", "Eve"))
        assert MAINS[module](words) in (0, None), (words, capsys.readouterr().err)
    trained = {"mma", "iqiyi", "own", *(("both", "best") if every else ())}
    assert {path.name for path in Path("runs").iterdir()} >= trained


@pytest.mark.slow
def test_every_benchmark_command_of_the_readmes_runs(tmp_path, monkeypatch):
    """Tables that are rebuilt from stored results do not change."""
    before, written = json.loads(scores.RESULTS.read_text()), speed.PAGE.read_text()
    pages = {name: Path(shutil.copy(page, tmp_path / name)) for name, page in scores.PAGES.items()}
    monkeypatch.setattr(scores, "PAGES", pages)
    monkeypatch.setattr(scores, "CONFIGS", shutil.copytree(scores.CONFIGS, tmp_path / "headers"))
    monkeypatch.setattr(scores, "RESULTS", Path(shutil.copy(scores.RESULTS, tmp_path)))
    monkeypatch.setattr(speed, "PAGE", Path(shutil.copy(speed.PAGE, tmp_path)))
    monkeypatch.chdir(tmp_path)
    for module, *words in commands():
        if module == "tests.benchmarks.scores":  # no system has the name `nothing`
            scores.main([*words, "--only=nothing" if "--time" in words else "--collect"])
        elif module == "tests.benchmarks.speed":
            speed.main([*words, "--collect"])
        else:
            assert module in MAINS
    after = json.loads(scores.RESULTS.read_text())
    assert after["rows"] == before["rows"] and after["rungs"] == before["rungs"]
    assert speed.PAGE.read_text() == written


@pytest.mark.slow
@nightly_after_first("spec", ["knn:face", "mma:face"])
def test_readme_example_of_own_features_runs(tmp_path, monkeypatch, capsys, one_device, spec):
    monkeypatch.setenv("VIDJAX_CACHE", str(tmp_path / "cache"))
    runpy.run_path(write("features.py"))
    load_config = functools.partial(vidjax.load_config, spec, NO_REPORT)
    monkeypatch.setattr(vidjax, "load_config", lambda _, *words: load_config(*words))
    with ThreadPoolExecutor() as pool:  # a program may train in any thread
        names = pool.submit(runpy.run_path, write("memory.py")).result()
    assert "config.batch_size" not in capsys.readouterr().err  # there is no hint
    assert names["scores"].shape == (1, 20) and len(names["vectors"]) == 1
    best = max(names["ranked"], key=lambda identity: names["ranked"][identity][0][1])
    assert len(names["ranked"]) == 20 and best == "person_7"  # the new clip is val_7


@pytest.mark.slow
def test_readme_query_finds_films_that_show_two_people_together(drawn):
    drawn.befriend("Ada", "Bob")
    # Two films and a photo show both people. One film is of another year.
    film, old, photo = drawn.film(), drawn.folder / "old.mkv", drawn.folder / "both.png"
    drawn_people.write_film(old, (2, 50, [("Ada", 10, 60), ("Bob", 90, 20)]))
    drawn_people.write_photo(photo, ("Ada", 16, 40), ("Bob", 80, 40))
    for path, year in ((old, 2023), (film, 2024), (photo, 2024)):
        os.utime(path, (0, datetime(year, 12, 31, 23, 59, tzinfo=UTC).timestamp()))
    drawn.who(film, old, photo)
    rows, database = drawn.rows(), sqlite3.connect(":memory:")  # for names.jsonl
    database.execute(f"CREATE TABLE names ({', '.join(map(json.dumps, rows[0]))})")
    marks = ", ".join("?" * len(rows[0]))
    cells = [[json.dumps(x) if isinstance(x, list) else x for x in row.values()] for row in rows]
    database.executemany(f"INSERT INTO names VALUES ({marks})", cells)  # noqa: S608
    query = example("query: together", ARCHIVES)
    seen = [*database.execute(query.replace("'names/names.jsonl'", "names"))]
    database.close()
    # The last shot of the film, from 3 to 4 seconds, shows both people.
    assert seen == [(str(photo.resolve()), 0.0, 0.0), (str(film.resolve()), 3.0, 4.0)]


def test_every_test_in_the_fault_table_exists():
    rows = re.findall(r"^\| (\d+) \|.*\| (.*) \|$", PAGES["tests/README.md"].read_text(), re.M)
    assert [int(number) for number, _ in rows] == list(range(1, 66))
    for number, cell in rows:
        tests = re.findall(r"`([^`]+)::(test_\w+)`", cell)
        assert tests and len(tests) == cell.count("::"), number
        for name, test in tests:
            assert f"def {test}(" in (ROOT / name).read_text(), (number, test)
