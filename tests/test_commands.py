"""What users type, commands and functions of `import vidjax`: results, remedies, exit codes."""

import copy
import errno
import json
import logging
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import vidjax
from tests.conftest import ROOT, execute
from tests.helpers import clip_files, made_runs, seen, servers
from tests.helpers.limits import slowness
from vidjax.apps.gallery.changes import NotEnrolledError
from vidjax.apps.gallery.gallery import Gallery
from vidjax.cli import program, run_commands
from vidjax.runs import config as config_lib, config_io, results as results_lib
from vidjax.runs.checkpoint import CheckpointError
from vidjax.runs.run_folder import RunFolder
from vidjax.runs.signals import Interrupted
from vidjax.utils import exit_codes, messages, terminal
from vidjax.utils.errors import DiskError

TRAIN, ARRAYS = "--config=knn --workdir=new", ("--config.data.name=arrays",)
OWN = "--config=knn:face --config.data.name=arrays --workdir=new --config.data.dir="
# Commands with mistakes -> a part of the error, mostly the remedy.
WORDS = {
    "revie": "did you mean 'review'", "review": "vidjax review names",
    f"{TRAIN} --learning-rate=0.1": "--config.optim.learning_rate",
    f"{TRAIN} --xyzzy=1": "example: vidjax train", f"{TRAIN} stray": "no flag\nexample",
    "mma": "--config=FILE", "rank": "needs --workdir, --input, --out",
    f"{TRAIN} seed=3": "write --config.seed=3", "train config=mma": "did you mean --config?",
    f"{TRAIN} quiet=1": "write --quiet", "rank --workdir=run clips": "needs --input",
    f"{TRAIN} --config.modalities=face\\ head": "write --config.modalities=face,head",
    "--config=mma --workdir=new --config.loss.classification=ArcFace": "loss.margin_type=angular",
    "compare --workdir=out --runs=A, B": "RUN RUN ... or --runs=A,B",
    "--config=mma --config.data.name=arrays --config.data.dir=w --workdir=w":
        "is the folder of the data",
    "review .": "name the folder that you gave as --out", "home": "vidjax who --help",
    "gallery G list": "vidjax gallery identify G --input=PATH",
    "check --gallery=g": "no flag --gallery: write --workdir=g", f"{TRAIN} --quite": "--quiet",
    "gallery enrol G --input=x --config.seed=1": "--config.data.FIELD",
    "--mode=compare --workdir=new --runs=run,run --config.seed=1": "--config.eval.split",
    "--mode=check --workdir=run --config=mma": "leave one of them out",
    "serve --gallery=g --port=99999": "from 0 to 65,535", "--config=": "--config= has no value",
    "export run --to=x --format=onxn": "onnx", "gallery --quiet": "needs COMMAND",
    "extract none.mp4 --out=x --models=m --fps=nan": "a number above 0",
    "forget": "--identity=NAME", f"{TRAIN} --coordinator=a:9": "also needs --num_processes",
    **{f"{TRAIN} --num_processes=2 --process_id=0 --coordinator={address}": "HOST:PORT"
       for address in ("a", ":9", "a:nine", "a:65536")},
    f"{TRAIN} --num_processes=2 --process_id=2 --coordinator=a:9": "must be from 0 to 1",
    f"{TRAIN} --num_processes=2 --process_id=0 --coordinator=a:9 --coordinator_timeout=nan":
        "give seconds",
    "gallery remove G --identity=Ada --identity Bob": "--identity is given twice",
    "report --workdir=~no-such-user/run": "write ~/",
    "--config=s3://bucket/mma.py --workdir=new": "is an address",
    "evaluate --workdir=new --runs=a,s3://b": "is an address", "gallery list ''": "has no value",
    "train --config=knn --workdir=file:///tmp/a%20b": "write '/tmp/a b'",
    "gallery create C:\\\\people --models=m": "in WSL, /mnt/c is the drive C",
    "who https://example.org/a.mp4 --out=o --models=m": "copy or mount",
    "extract x --out= --models=m": "--out= has no value: give a value\n",
    "extract x --out=o --models=m --fps=": "--fps= has no value: give a value, or leave it out",
    f"{TRAIN} --config.lr=1": "--config.optim.learning_rate?",
    f"{TRAIN} --config.seed": "--config.seed=...", "compare --runs=a+gs://b,a+c": "is an address",
    f"{TRAIN} --config.seed=1 --config.batch_size=abc": "--config.batch_size=abc",
    f"{TRAIN} --config.modalities=5": "separated by commas",
    "--config=mma --workdir=new --config.optim.name=adamw": "total_decay=1",
    "--config=quality_fusion --workdir=new --config.model.layers=((0,None,False,0.5),)":
        "Expected `int` >= 1",
    "--config=cosine:face --workdir=new --config.model.embed_dim=100000000": "reduce its sizes",
    "--config=mma --workdir=new --config.transforms=5": "config.transforms='5' is unknown",
    "--config=plda --workdir=new --config.model.scale=nan": "must be a number such as 1.0",
    "--config=plda --workdir=new --config.model.scal=1":
        "did you mean --config.model.scale?\nto add an argument, set it in a copy",
    "--config=plda --workdir=new --config.fusion.face.train.min_quality=20":
        "no field config.fusion.face.train.min_quality: to add an argument, set it in a copy",
}  # fmt: skip
# Faulty configuration files: name -> content, and words of the error.
BEGIN = "from ml_collections import ConfigDict\nfrom vidjax.runs import config\n"
BEGIN += "\ndef get_config(args=''):\n"
MINE = {
    "empty.py": ("", "get_config"),
    "syntax.py": ("def get_config(args=''):\n    return (\n", "line 2: SyntaxError"),
    "null.py": ("\0", "null bytes"),
    "field.py": (f"{BEGIN}    config.default().fusion.face.train = 1\n",
                 "line 5: AttributeError: there is no field 'face'"),
    "bare.py": (f"{BEGIN}    return ConfigDict({{'seed': 1}})\n", "config.default()"),
    "typed.py": (f"{BEGIN}    values = config.default().to_dict() | {{'batch_size': '8'}}\n"
                 "    return ConfigDict(values)\n", "config.batch_size"),
    "function.py": (f"{BEGIN}    values = config.default()\n    values.model.activation = max\n"
                    "    return values\n", "set its name"),
}  # fmt: skip
# Commands with mistakes that are run in the folder `places`.
PLACES = {
    "--mode=report --workdir=.": "such as a, b", "--config=mma --workdir=a": "another workdir",
    "--mode=report --workdir=empty": "vidjax train --config=mma",
    "--mode=evaluate --workdir=a --runs=b,a": "another folder",
    "--mode=evaluate --workdir=a --config.join.weights=1,2": "no effect",
    "compare --workdir=out --runs=a,a": "a run is named twice", f"{OWN}own": "labels.csv",
    "--mode=evaluate --workdir=out --runs=a,b,a/.": "a run is named twice",
    "compare --workdir=a --runs=a,b": "contains a run",
    "compare --workdir=out --runs=a,b --config.eval.split=test":
        "vidjax evaluate --workdir=a --config.eval.split=test",
    "--config=nowhere/mma.py": "'mma'", "--config=a": "did you mean 'a/config.json'?",
    "--config=own": "choose from cosine", "--config=a/config.json:face": "takes no arguments",
    "export nowhere --to=new/deep/folder --format=onnx": "is not a folder",
    **{f"--config=mine/{name}": remedy for name, (_, remedy) in MINE.items()},
    "--config=knn:iqiyi_vid,face --workdir=new --config.data.dir=zip": "such as face_train.pickle",
    "--config=knn:iqiyi_vid,face --workdir=new --config.data.dir=lfs": "Git LFS",
    "--config=knn:iqiyi_vid,face --workdir=new --config.data.dir=official "
    "--config.data.cache_dir=file": "file'",
    f"{TRAIN} --config.data.dir=official": "--config.data.name=iqiyi_vid",
    f"{OWN}own --config.eval.split=test": "train, val",
    f"{OWN}alone": "vidjax train ... --config.eval.split=train --config.ensemble.folds=5",
    "--config=knn --workdir=own/train": "a folder of clips",
    f"{TRAIN} --config.data.weights=own": "correct the path",
}  # fmt: skip


def assert_refused(command, words, remedy, seconds):
    """Asserts that a command ends with an error, in at most `seconds` of CPU time."""
    began = time.process_time()
    done = command(*shlex.split(words))
    assert (time.process_time() - began) / slowness() < seconds
    error = [line for line in done.err.splitlines() if not line.startswith("converting ")]
    assert done.out == "" and done._replace(err="\n".join([*error, ""])).refused(remedy), done


@pytest.mark.parametrize("words", WORDS)
def test_error_of_a_wrong_word_or_field_names_the_remedy(words, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VIDJAX_CACHE", str(tmp_path / "cache"))
    assert_refused(command, words, WORDS[words], seconds=2)
    assert not list(tmp_path.iterdir())  # nothing is written


def test_home_in_a_path_is_expanded():
    words = program.parse(["rank", "--workdir=~/run", "--input=~/a.tsv", "--out=b"])
    assert (words.workdir, words.input) == (Path.home() / "run", Path.home() / "a.tsv")


@pytest.mark.parametrize("name", config_lib.PATHS)
def test_fields_that_are_paths_refuse_addresses(name):
    config = config_io.override(config_lib.default(), [f"--config.{name}=s3://b/x"])
    seen.refused(lambda: config_lib.check(config), f"config.{name}", "copy or mount")


@pytest.mark.parametrize("call", [
    vidjax.Gallery, vidjax.restore, vidjax.evaluate, vidjax.load_data, vidjax.load_config,
    vidjax.list_tables, lambda path: vidjax.Gallery.of_models("new", path),
    lambda path: vidjax.compare([path, "run"]),
    lambda path: vidjax.name_people(path, None, "out", "models"),
    lambda path: vidjax.name_people("film.mp4", None, path, "models"),
])  # fmt: skip
def test_functions_refuse_addresses(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen.refused(lambda: call("s3://b/x"), "s3:", "is an address")
    assert not [*tmp_path.iterdir()]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A folder with made-up runs, data and configuration files. Some are faulty."""
    folder, values = tmp_path_factory.mktemp("places"), {"1": 0.5, "2": 0.75}
    made_runs.write(folder / "a", values, "--config.seed=3")
    made_runs.write(folder / "b", values)
    for name in ("empty", "zip", "official", "mine"):
        (folder / name).mkdir()
    for name in ("zip/face_train.zip", "file"):
        (folder / name).touch()
    clip_files.write_learnable(folder / "official")
    shutil.copytree(folder / "official", folder / "lfs")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
    (folder / "lfs" / "face_train.pickle").write_text(pointer)
    for name, (content, _) in MINE.items():
        (folder / "mine" / name).write_text(content)
    clip = {"face": np.arange(16.0).reshape(2, 8)}
    own = {"train": {f"train_{i}": clip for i in "1234"}}
    own["val"] = {f"val_{i}": {"face": clip["face"] + 1} for i in "1234"}
    clip_files.write_npz(folder / "own", own)
    clip_files.write_npz(folder / "alone", {"train": {"clip": clip}})
    return folder


@pytest.mark.usefixtures("read_here")
@pytest.mark.parametrize("words", PLACES)
def test_error_about_a_file_names_the_remedy(words, places, monkeypatch, command):
    monkeypatch.chdir(places)
    monkeypatch.setenv("VIDJAX_CACHE", str(places / "cache"))
    monkeypatch.setattr(config_io, "own_files", [])  # a run with own code traces a training step
    before = seen.contents(places, but={"cache", "__pycache__"})
    assert_refused(command, words, PLACES[words], seconds=60)  # may convert data
    assert seen.contents(places, but={"cache", "__pycache__"}) == before
    assert not (places / "cache/synthetic").exists()  # a mistake is found before clips are made


IMPORTS = """
import sys
def absent(*names): assert not {*names} & sys.modules.keys(), names
for system, remedy in (("win32", "WSL"), ("darwin", "virtual machine"), ("linux", "")):
    sys.platform = system
    try:
        import vidjax
    except ImportError as error:
        assert remedy and "needs Linux" in str(error) and remedy in str(error)
    else:
        assert system == "linux"
assert set(vidjax.__all__) <= set(dir(vidjax))
absent("jax", "numpy", "tensorflow", "flax")
vidjax.load_config  # may import NumPy
absent("jax", "tensorflow", "flax")
from vidjax.cli.program import main
assert main(["--config=mma", "--config.model.name=mmma"]) == 2
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
absent("tensorflow", "tensorflow_datasets", "pyarrow")
from vidjax.core import devices
try:
    devices.make_mesh()
except ValueError as error:
    assert "unset JAX_PLATFORMS" in str(error)
"""


@pytest.mark.slow
def test_import_is_quick_and_a_wrong_command_fails_before_a_device_starts(tmp_path, python):
    """With JAX_PLATFORMS=cuda, the start of a device fails on a machine without a GPU."""
    python(IMPORTS, cwd=tmp_path, VIDJAX_CACHE=str(tmp_path), JAX_PLATFORMS="cuda")
    assert not list(tmp_path.iterdir())


def test_run_folder_is_named_after_its_overrides():
    def suffix(*words, without=()):
        overrides = [f"--config.{word}" for word in words]
        config = config_io.override(config_lib.default(), overrides)
        return config_io.folder_suffix(config, overrides, without)

    assert suffix() == "" and suffix("seed=2", "batch_size=64", "seed=1") == "_batch_size=64_seed=1"
    assert suffix("optim.learning_rate=1e-2") == suffix("optim.learning_rate=0.01")
    assert suffix("modalities=face,head") == "_modalities=face+head"
    assert suffix("seed=1", "data.dir=/x", without=("data.dir",)) == "_seed=1"
    # A run is found again with fields that do not change its results, such as remedies.
    words = ("seed=1", "eval.block_size=8", "data.mode=streaming", "log_every_steps=5")
    assert suffix(*words, without=config_lib.UNNAMED) == "_seed=1"
    # Other characters are replaced and long names are cut, but the names stay different.
    odd = ["../../up", "a b;'\"$(c)", "long" * 99, "long" * 98, "ü"]
    names = {suffix(f"eval.split={name}") for name in odd}
    assert len(names) == len(odd) and max(map(len, names)) <= config_io.MAX_SUFFIX_LENGTH
    assert all(re.fullmatch(r"[\w=.-]+", name) for name in names)
    words = program.parse(["train", "--config=mma: face, head"])
    assert str(run_commands.read_train_settings(words)[1]) == "runs/mma-face-head"


def test_printed_configuration_lists_the_origin_of_each_value_and_the_problems(command):
    words = ["--mode=config", "--config=mma:face", "--config.seed=3"]
    lines = [line.split(maxsplit=3) for line in command(*words).out.splitlines()]
    rows = {field: columns for field, *columns in lines}  # field -> value, default, origin
    assert rows["seed"] == ["3", "0", "command line"]
    assert rows["batch_size"] == ["128", "128", "default"]
    assert rows["num_epochs"] == ["30.0", "1.0", "mma:face"]
    done = command(*words, "--json", "--config.checkpoint_every_seconds=inf")
    fields = json.loads(done.out)["fields"]
    assert fields["seed"] == {"value": 3, "default": 0, "from": "command line"}
    assert fields["checkpoint_every_seconds"]["value"] == "inf"
    words += ["--config.optim.learning_rate=-1", "--config.seed=-1", "--config.loss.gamma=3"]
    done = command(*words)
    assert done.code == 2 and "command line" in done.out
    assert done.err.count("vidjax: config.") == 3 and "optim.learning_rate=-1.0" in done.err
    assert len(json.loads(command(*words, "--json").out)["problems"]) == 3


# 2: the user has a remedy. 3: no good checkpoint. 143: 128 + SIGTERM. 1: a fault of vidjax.
@pytest.mark.parametrize(("error", "code"), [
    (DiskError("cannot write 'x'"), 2), (MemoryError(), 2),
    (OSError(errno.ENOSPC, "No space left on device"), 2),
    (FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"), 2),
    (RuntimeError("Could not determine home directory."), 2),
    (RuntimeError("This version of jaxlib was built using AVX instructions, which"), 2),
    (OSError(errno.ESTALE, "Stale file handle"), 2),  # of an open file on a network disk
    (OSError(errno.EINVAL, "Invalid argument", "/usb/A: B"), 2),  # on a disk of Windows
    (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), 2),
    (ModuleNotFoundError("no", name="pyarrow"), 2),
    (CheckpointError("none"), 3), (Interrupted(signal.SIGTERM, step=3), 143),
    (jax.errors.JaxRuntimeError("INTERNAL: nobody knows"), 1), (ValueError("no such axis"), 1),
    (FileNotFoundError(errno.ENOENT, "No such file or directory"), 1),  # it has no path
    (ModuleNotFoundError("no", name="vidjax.nothing"), 1),
])  # fmt: skip
def test_exit_codes_separate_user_errors_from_faults_of_vidjax(capsys, error, code):
    def command():
        raise error

    assert exit_codes.run_to_exit_code(command, ["--json"]) == code
    captured = capsys.readouterr()
    assert ("Traceback" in captured.err) == (code == 1)
    if code != 1:
        assert 1 <= len(captured.err.splitlines()) <= 3
    if exit_codes.is_out_of_memory(error):  # a remedy for training, and another for evaluation
        of_training, of_evaluation = captured.err.splitlines()[1:]
        assert of_training.startswith("to train") and "--config.data.mode" in of_training
        assert "--config.eval.block_size" in of_evaluation and "batch" not in of_evaluation
    assert json.loads(captured.out)["error"].strip()
    exit_codes.run_to_exit_code(command, ["--debug"])
    assert "Traceback" in capsys.readouterr().err


def test_control_characters_are_escaped_before_they_reach_the_terminal(capsys, tmp_path):
    escaped = r"x\x1b]0;title\x07\x9b2J\u202egnp.\r\u2028y"
    hostile = escaped.encode().decode("unicode_escape")
    messages.print_text(f"{hostile}\n\tAda علي")
    messages.print_problem(hostile)
    exit_codes.run_to_exit_code(lambda: {}[hostile], [])  # a KeyError with this text
    out, err = capsys.readouterr()
    assert out == f"{escaped}\n\tAda علي\n" and err.startswith(f"vidjax: {escaped}\n")
    assert not set("\x1b\x07\x9b\u202e\r") & set(err)
    exit_codes.run_to_exit_code((tmp_path / "gone").read_text, [])
    assert f"'{tmp_path}/gone': No such file" in capsys.readouterr().err  # first the path


@pytest.mark.slow
def test_commands_survive_closed_standard_streams():
    for stream, mode, code in (
        ("2>&-", "zzz", 2), (">&- 2>&-", "config", 0), ("<&-", "config", 0),
        ("2>&1 | head -1", "config", 0), ("2>/dev/full", "zzz", 2),
    ):  # fmt: skip
        command = f"set -o pipefail; {sys.executable} -m vidjax.main --mode={mode} {stream}"
        words = ["/bin/bash", "-c", command]
        done = subprocess.run(words, capture_output=True, text=True, timeout=100)
        assert done.returncode == code, done
        assert "Traceback" not in done.stdout + done.stderr


def test_ctrl_c_during_the_first_imports_stops_without_a_traceback():
    code = (
        "import sys\nfrom vidjax import main\nclass Stop:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'vidjax.cli':\n            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Stop())\nmain.run()\n"
    )
    done = execute(("-c", code), ROOT)
    assert (done.returncode, done.stderr) == (130, "vidjax: stopped\n")


def test_message_to_a_closed_pipe_or_a_full_disk_does_not_end_a_run(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.delenv(terminal.QUIET, raising=False)
    for lost in (writer, "/dev/full"):
        with open(lost, "w") as stream:
            monkeypatch.setattr(sys, "stderr", stream)
            for text in ("train: compiling", "step 1"):  # the first cannot be written
                terminal.say(text)
    # In a block of `hide_progress`, messages are hidden. A process without jax has them, too.
    monkeypatch.delitem(sys.modules, "jax")
    before = (log := logging.getLogger("vidjax")).level
    with terminal.hide_progress():
        assert terminal.is_quiet() and log.level == logging.WARNING != before
    assert not terminal.is_quiet() and log.level == before


# Command -> files of the user at its places. In the second table, an earlier result is replaced.
NEW_FILES = {
    "rank --workdir=run --input=clips --out=o.tsv": "o.tsv",
    "embed --workdir=run --input=day --out=d": "d/1.parquet",
    "gallery identify g --input=clips --out=o.csv": "o.csv",
    "gallery identify g --input=day --out=d": "d/1.parquet",
    "gallery verify g --input=clips --with=clips --out=o.jsonl": "o.jsonl",
    "gallery group g --input=clips --out=o.tsv": "o.tsv",
    "gallery rank g --input=clips --out=o.parquet": "o.parquet",
    "gallery create d --run=run": "d/notes.txt",
    "export run --to=d --format=safetensors": "d/notes.txt",
    "import run --to=d": "d/notes.txt",
    "train --workdir=d --config=knn": "d/config.json",
}
REPLACED_FILES = {
    "convert own net.onnx --like=arcface --out=d": "d/net.json d/net.onnx",
    "convert own net.onnx --like=arcface --out=.": "net.json",
    "compare --runs=run,again --workdir=d": "d/comparison.json d/comparison.html d/comparison.tex",
    "extract group.png --models=models --out=d": "d/extract.json d/group.npz d/videos",
    "who group.png --models=models --out=d": "d/names.html d/features d/gallery",
}


@pytest.mark.slow
def test_no_command_replaces_a_user_file(drawn, nearest_run, data, command, monkeypatch, read_here):
    from tests.helpers import family_nets

    monkeypatch.chdir(drawn.folder)
    drawn.group()
    shutil.copytree(nearest_run, "run")
    report = "--config.eval.report=True"  # `compare` reads its analysis
    assert command("evaluate", "--workdir=run", report).code == 0
    shutil.copytree("run", "again")
    Gallery.create("g", nearest_run, data)
    clips = {"a": {"face": np.random.default_rng(0).normal(size=(2, 24)).astype(np.float32)}}
    for folder in ("clips", "day", "d"):
        Path(folder).mkdir()
    np.savez("clips/a.npz", **clips["a"])  # pyright: ignore[reportArgumentType]
    clip_files.write_parquet(Path("day/1.parquet"), clips)
    Path("net.onnx").write_bytes(family_nets.embedder())
    for typed, mine in (NEW_FILES | REPLACED_FILES).items():
        for path in map(Path, mine.split()):
            path.write_text("mine")
            assert command(*shlex.split(typed)).refused(path.parts[0]), typed
            assert path.read_text() == "mine", typed
            path.unlink()
    for typed in REPLACED_FILES:
        assert [command(*shlex.split(typed)).code for _ in range(2)] == [0, 0], typed
        shutil.rmtree("d", ignore_errors=True)


def test_errors_pass_from_one_process_to_another():
    """An error that cannot be unpickled would end a pool of processes, or let it wait forever."""
    for error in (NotEnrolledError("clip", "clp", {"clip"}), Interrupted(15, 7), DiskError("full")):
        for received in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
            assert type(received) is type(error) and str(received) == str(error)
            assert received.exit_code == error.exit_code


UNTYPED: Any = vidjax  # tests give arguments of wrong types


def refused(message, function, *arguments, **options):
    """Asserts that a function raises an error of 1 to 3 lines, without the flag --workdir."""
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        function(*arguments, **options)
    assert str(caught.value).count("\n") <= 2 and "--workdir" not in str(caught.value)


def test_results_contain_average_precisions_and_user_defined_metrics(tmp_path):
    values = {"Ada": 0.25, "Zoë": 0.75, "Bo": 1.0}
    folder = RunFolder(made_runs.write(tmp_path / "run", values, results={"my_metric": 0.5}))
    results = results_lib.Results.from_values(folder.metrics(), "val", folder.paths())
    assert results.average_precisions() == values and results.map == pytest.approx(2 / 3)
    assert results.to_dict() == folder.metrics() and results.to_dict()["my_metric"] == 0.5
    assert "map=0.66" in repr(results) and "map_kind='val'" in repr(results)


def test_functions_describe_the_expected_arguments(official_dir, nearest_run, tmp_path):
    load_config, load, train = UNTYPED.load_config, UNTYPED.load_data, UNTYPED.train
    restore, compare = UNTYPED.restore, UNTYPED.compare
    clips, labels = {"val": {"a": {"face": np.ones((1, 4), np.float32)}}}, {"a": "Ada"}
    refused(r"\{'seed': 1\}.*--config\.FIELD=VALUE", load_config, "mma", {"seed": 1})
    refused(r"such as '--config\.seed=1'", load_config, "mma", "config.seed=1")
    refused("load_config: spec must be a name .* not None", load_config, None)
    # A configuration has its own folders and options. Official files have their own labels.
    (config, misspelt, unknown), new = (load_config("knn") for _ in range(3)), tmp_path / "new"
    refused("load_data: source must be a folder, .* not list", load, [clips])
    refused(r"set config\.data\.cache_dir", load, config, cache_dir=tmp_path)
    refused(r"set config\.data\.quality", load, config, quality="norm")
    refused(r"config\.data\.dir", load, config, labels)
    refused("leave `quality` out", load, official_dir, quality="norm")
    refused(r"train_gt\.txt", load, official_dir, labels)
    refused("'.*new' does not exist", load, new)
    refused("labels must be a dict", load, clips, [1])
    made = load(clips, labels)
    assert repr(made) == "<data 'arrays': val 1 clips; face 4; 1 identities>"
    misspelt.optim.learn_rate, unknown.model.name = 1, "nope"
    refused("train: config must be a configuration", train, str(new), config, made)
    refused("train: workdir must be the path of a folder", train, config, made, new)
    refused("train: log must be a function", train, config, new, made, log="wandb")
    refused("data must be the result of vidjax.load_data", train, config, new, str(new))
    refused(r"learn_rate .*optim\.learning_rate", train, misspelt, new, made)
    refused("model.name='nope'.* knn", train, unknown, new, made)
    refused("data must be the result of vidjax.load_data", UNTYPED.evaluate, tmp_path, clips)
    refused("restore: workdir must be the path", restore, config)
    run = restore(nearest_run, num_devices=1)
    refused("clips must be a dict .* not str", run.rank, str(new))
    refused("identify: k must be a number", run.identify, clips["val"], "2")
    refused("identify: threshold must be a score", run.identify, clips["val"], threshold="0.5")
    refused(f"no run in '{new}'", restore, new)
    measured = load_config("knn", *ARRAYS, "--config.data.quality=norm")
    refused(r"load_data\(\.\.\., quality='norm'\)", train, measured, new, made)
    unlabelled = load({"train": clips["val"], "val": {"b": {"face": np.full((1, 4), 2.0)}}})
    refused(r"load_data\(clips, labels=", train, load_config("knn:face", *ARRAYS), new, unlabelled)
    refused("lists must be a table of pyarrow, not list", UNTYPED.join_rankings, [])
    assert not new.exists()
    for runs in ([new, None], [[new], [None]], [new, 5], [new, tmp_path.stat()]):  # a tuple
        refused("compare: run must be the path of a run's folder", compare, runs)
    refused("compare: out must be the path of a folder", compare, [new, new], out=5)


def test_galleries_describe_the_expected_arguments(places, tmp_path):
    new, run, gallery = tmp_path / "new", places / "a", UNTYPED.Gallery
    remedy = f"vidjax gallery create NEW_FOLDER --run={run}"
    refused(remedy, gallery.create, run, new)  # the arguments are swapped
    refused("folder must be the path", gallery.create, None, run)
    refused("run must be a run, or the path", gallery.create, new, 5)
    refused("models must be the path", gallery.of_models, new, None)
    assert not new.exists()
    enrol, clips = servers.make_gallery(new).enrol, {"c": {"face": np.ones((1, 8), np.float32)}}
    refused(r"no clip is called 'd'(.|\n)*clip is 'c'", enrol, clips, {"d": "Ada"})


def test_compare_prints_what_differs_and_leaves_out_folders_that_do_not_fit(tmp_path, command):
    """The first folder is empty. The second folder and the last folder are of other datasets."""
    names, values = ("empty", "first", "a", "b", "c", "last"), {"1": 0.5, "2": 0.75}
    (tmp_path / "empty").mkdir()
    made_runs.write(tmp_path / "first", {"3": 0.5, "4": 0.75})
    for name in "abc":
        made_runs.write(tmp_path / name, values, *["--config.seed=3"] * (name == "c"))
    made_runs.write(tmp_path / "last", values, num_clips=5)
    folders = [str(tmp_path / name) for name in names]
    with pytest.warns(UserWarning, match="a folder is left out: ") as warned:
        done = command("compare", *folders)
    assert done.code == 0, done
    lines = [line.split() for line in done.out.splitlines()]
    assert lines[-2] == ["field", "a", "b", "c"] and lines[-1] == ["seed", "0", "0", "3"]
    assert [line[:2] for line in lines[2:5]] == [[folder, "0.6250"] for folder in folders[2:5]]
    first, *others = [str(one.message) for one in warned]
    assert f"no run in '{folders[0]}': it has no config.json" in first
    assert [text.count(folders[2]) for text in others] == [1, 1]
    assert "too few runs" in command("compare", folders[1]).err


def test_compare_fits_a_terminal_and_shortens_long_names(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    long = [f"runs/quality_fusion_seed={n}_optim.learning_rate=0.001" for n in range(2)]
    for name in ("runs/a1", "runs/b1", *long):
        made_runs.write(Path(name), {"1": 0.5, "2": 0.75})
    assert [line.split()[0] for line in command("compare", *long).out.splitlines()[2:4]] == long
    monkeypatch.setattr(messages, "measure_width", lambda: 80)
    for folders, shown in (
        (["runs/a1", "runs/b1"], ["runs/a1  ", "runs/b1  "]), (long, ["seed=0  ", "seed=1  "]),
        (["runs/a1", long[0]], ["run 1  ", "run 2  ", f"run 2: {long[0]}\n"]),  # with a legend
    ):  # fmt: skip
        out = command("compare", *folders).out
        assert max(map(len, out.splitlines())) <= 80
        assert all(f"\n  {name}" in out for name in shown), out


def test_results_are_wrapped_only_for_a_terminal(capsys, monkeypatch):
    clips = [("clip", "most probable"), ("a.s000.t00", "Ada > 99.99 %, Bob < 0.01 %, " * 4)]
    facts = {"num_clips": 1234, "clips_per_second": 0.25, "listed": [1], "path": Path("x" * 90)}
    result = messages.Result(facts, {"named if": "the probability is high, " * 9}, clips)
    messages.print_result(result, "identify", as_json=False)
    wide = capsys.readouterr().out
    assert len(wide.splitlines()) == 7 and max(map(len, wide.splitlines())) > 200
    monkeypatch.setattr(messages, "measure_width", lambda: 80)
    messages.print_result(result, "identify", as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines if "xxx" not in line) <= 80
    assert any("x" * 90 in line for line in lines)  # a word stays whole, so that it can be copied
    assert " ".join(wide.split()) == " ".join(" ".join(lines).split())
    assert lines[1].startswith("  a.s000.t00  Ada") and lines[2].startswith(" " * 14)
    assert "  clips       1,234" in lines and "  clips/s     0.25" in lines
    messages.print_result(result, "identify", as_json=True)
    assert json.loads(capsys.readouterr().out) == {"mode": "identify", **facts, "path": "x" * 90}


def test_the_time_left_is_estimated_without_the_start_of_a_program(monkeypatch, capsys):
    """The first photo also loads the nets, which takes longer than all photos."""
    now = 0.0
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    bar = terminal.Progress(120, unit="photo", label="photos")
    for seconds in (300.0, 15.0, 15.0):
        now += seconds
        bar.advance(5)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" left")[0].rpartition(" ")[-1] for line in lines[1:]] == [
        "5:30",
        "5:15",
    ]
    assert lines[0] == "photos: 5 of 120 photos"
