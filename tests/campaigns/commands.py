"""Commands with mistakes, and commands that must succeed.

After a mistake, the exit code is 2, and an error of one to three lines names the remedy. A mistake
in words or values takes less than SECONDS of CPU time. No command prints a traceback.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.conftest import ROOT, execute
from tests.helpers import clip_files, made_runs

SECONDS = 2.0
TRAIN = "--config=knn --workdir=new"
OWN = "--config=mma:face --config.data.name=arrays --workdir=new --config.data.dir="
PROGRESS = ("making ", "converting ")
NO_GPU = {"JAX_PLATFORMS": "cuda"}


class Case(NamedTuple):
    """A command, what it must print, and its exit code."""

    words: str
    remedy: str  # a part of the output or of the error
    code: int = 2
    seconds: float = SECONDS  # limit of the CPU time
    env: Mapping[str, str] = {}


WORDS = [
    Case("", "--config=configs/mma.py"), Case("--config=", "--config= has no value"),
    Case(f"{TRAIN} --learning-rate=0.1", "--config.optim.learning_rate"),
    Case(f"{TRAIN} --quite", "--quiet"), Case(f"{TRAIN} --gpus=1", "CUDA_VISIBLE_DEVICES=0"),
    Case(f"{TRAIN} --xyzzy=1", "example: vidjax train"), Case(f"{TRAIN} stray", "no flag\nexample"),
    Case("mma", "--config=FILE"),
    Case("evaluate runs/mma", "example: vidjax evaluate --workdir=runs/mma"),
    Case("train mma", "--config=mma?"), Case("rank --workdir=run clips", "--input=clips?"),
    Case("export run new --format=onnx", "--to=new?"),
    Case("compare --workdir=out --runs=A, B", "--runs=A,B"), Case("predict", "vidjax rank"),
    Case("evalaute --workdir=run", "evaluate, which ranks a split"),
    Case("evaluate --workdir=run --out=o.tsv", "no flag --out"),
    Case("rank", "needs --workdir, --input, --out"),
    Case("--mode=evaluate --workdir=w --config.optim.learning_rate=0.1", "no effect"),
    *[Case(f"--mode=evaluate --workdir=w --config.{field}", "no effect")
      for field in ("data.max_frames=3", "data.mode=resident", "fusion.face.train.num_draws=2")],
    Case("--config=mma --config.data.name=arrays --config.data.dir=w --workdir=w",
         "is the folder of the data"),
    Case("gallery creat", "create"), Case("gallery list G stray", "'stray' has no flag\nexample"),
    Case("gallery enrol G --input=x --config.seed=1", "--config.data.FIELD"),
    Case("--mode=compare --workdir=new --runs=run,run --config.seed=1", "--config.eval.split"),
    Case("--mode=check --workdir=run --config=mma", "leave one of them out"),
    Case("serve --gallery=g --port=99999", "from 0 to 65,535"),
    Case("export run --to=x --format=onxn", "'onnx'"), Case("score gt.txt", "needs RANKING"),
    Case("who film.mp4", "needs --out, --models"),
    Case("extract none.mp4 --out=x --models=m --size=1", "32 to 8,192"),
    Case("extract none.mp4 --out=x --models=m --fps=nan", "a number above 0"),
    Case("convert dlib", "needs FILE, --out"), Case("forget", "--identity=NAME"),
    Case(f"{TRAIN} --coordinator=a:9", "also needs --num_processes"),
    *[Case(f"{TRAIN} --num_processes=2 --process_id=0 --coordinator={address}", "HOST:PORT")
      for address in ("a", ":9", "a:", "a:nine", "a:0", "a:65536")],
    Case("gallery remove G --identity=Ada --identity Bob", "--identity is given twice"),
    Case("serve --gallery=g --token-file=", "--token-file= has no value"),
    Case("report --workdir=~no-such-user/run", "write ~/"),
    Case("--config=knn --workdir=s3://bucket/run", "is an address"),
]  # fmt: skip
FIELDS = [
    Case(f"{TRAIN} --config.optimizer.learning_rate=1", "--config.optim.learning_rate"),
    Case(f"{TRAIN} --config.bacth_size=1", "--config.batch_size"),
    Case(f"{TRAIN} --config.seed", "--config.seed=..."),
    Case(f"{TRAIN} --config.seed=1 --config.batch_size=abc", "--config.batch_size=abc"),
    Case(f"{TRAIN} --config.batch_size=12.5", "whole number"),
    Case(f"{TRAIN} --config.modalities=5", "separated by commas"),
    Case(f"{TRAIN} --config.modalities={{[]:1}}", "choose from face"),
    Case("--config=mma:face,haed --workdir=new", "'head'"),
    Case("--config=mma --workdir=new --config.optim.name=adamw", "'adam'?"),
    Case("--config=quality_fusion --workdir=new --config.model.layers=((0,'swish',False,0.5),)",
         "Expected `int` >= 1"),
    Case("--config=mma --workdir=new --config.model.embed_dim=100000000", "reduce its sizes"),
    Case("--config=mma --workdir=new --config.transforms=5", "config.transforms='5' is unknown"),
    Case("--config=plda --workdir=new --config.model.scale=nan", "must be a number such as 1.0"),
    Case("--config=plda --workdir=new --config.model.scal=1",
         "did you mean --config.model.scale?\nto add an argument, set it in a copy"),
    Case("--config=plda --workdir=new --config.fusion.face.train.min_quality=20",
         "no field config.fusion.face.train.min_quality: to add an argument, set it in a copy"),
]  # fmt: skip
# Faulty configuration files: name -> content, and words of the error.
BEGIN = "from ml_collections import ConfigDict\nfrom vidjax.runs import config\n"
BEGIN += "\ndef get_config(args=''):\n"
MINE = {
    "empty.py": ("", "get_config"),
    "syntax.py": ("def get_config(args=''):\n    return (\n", "line 2: SyntaxError"),
    "null.py": ("\0", "null bytes"),
    "number.py": (f"{BEGIN}    return int('many')\n", "line 5: ValueError"),
    "field.py": (f"{BEGIN}    config.default().fusion.face.train = 1\n",
                 "line 5: AttributeError: there is no field 'face'"),
    "bare.py": (f"{BEGIN}    return ConfigDict({{'seed': 1}})\n", "config.default()"),
    "typed.py": (f"{BEGIN}    values = config.default().to_dict() | {{'batch_size': '8'}}\n"
                 "    return ConfigDict(values)\n", "config.batch_size"),
    "function.py": (f"{BEGIN}    values = config.default()\n    values.model.activation = max\n"
                    "    return values\n", "set its name"),
}  # fmt: skip
# These commands are run in the folder that `prepare_places` makes.
PLACES = [
    Case("--mode=report --workdir=.", "such as a, b"),
    Case("--mode=report --workdir=empty", "vidjax train --config=mma"),
    Case("--config=mma --workdir=a", "another workdir"),
    Case("--mode=evaluate --workdir=a --runs=b,a", "another folder"),
    Case("--mode=evaluate --workdir=a --config.join.weights=1,2", "no effect"),
    Case("compare --workdir=out --runs=a,a", "a run is named twice"),
    Case("compare --workdir=a --runs=a,b", "contains a run"),
    Case("compare --workdir=out --runs=a,b --config.eval.split=test",
         "vidjax evaluate --workdir=a --config.eval.split=test"),
    Case("--config=nowhere/mma.py", "'mma'"),
    Case("export nowhere --to=new/deep/folder --format=numpy", "is not a folder"),
    Case("--config=configs", "choose from cosine"),
    *[Case(f"--config=mine/{name}", remedy) for name, (_, remedy) in MINE.items()],
    Case("--config=mma:iqiyi_vid,face,head --workdir=new --config.data.dir=zip",
         "such as face_train.pickle"),
    Case("--config=mma:iqiyi_vid,face,head --workdir=new --config.data.dir=lfs", "Git LFS"),
    Case("--config=knn:iqiyi_vid,face --workdir=new --config.data.dir=official"
         " --config.data.cache_dir=file", "file'"),
    Case(f"{TRAIN} --config.data.dir=official", "--config.data.name=iqiyi_vid"),
    Case(f"{TRAIN} --config.data.dir=own", "--config.data.name=arrays"),
    Case(f"{OWN}own --config.eval.split=test", "train, val"),
    Case(f"{OWN}own", "labels.csv"),
    Case(f"{OWN}alone", "--config.ensemble.folds=5"),
    Case("--config=knn --workdir=own/train", "a folder of clips"),
    Case(f"{TRAIN} --config.data.weights=own", "correct the path"),
]  # fmt: skip
# These commands are run in new processes, in the folder that `prepare` makes.
FILES = [
    Case("--mode=evaluate --workdir=run --config.eval.split=tset", "test, train, val"),
    Case(TRAIN, "--config.data.cache_dir", env={"VIDJAX_CACHE": "/proc/none"}),
    Case(TRAIN, "unset JAX_PLATFORMS", env=NO_GPU),
    Case("--mode=check --config=knn", "unset JAX_PLATFORMS", env=NO_GPU),
]
WORKS = [
    Case("--version", "vidjax 0.", 0), Case("--mode=config --workdir=run", "run/config.json", 0),
    Case("--config=knn --workdir=run --config.eval.report=false --json", '"map":', 0),
    Case("--mode=report --workdir=run --json", '"report":', 0),
    Case("--mode=check --workdir=run --json", '"verdict": "all good"', 0),
    Case("--mode=evaluate --workdir=run --config.eval.split=test --quiet", "MAP@100", 0),
    Case("--config=knn --config.seed=1 --config.eval.report=0", "runs/knn_seed=1", 0),
]  # fmt: skip


def prepare_places(folder: Path) -> None:
    """Writes made-up runs, data and configuration files into a folder. Some are faulty."""
    values = {"1": 0.5, "2": 0.75}
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
    shutil.copytree(ROOT / "configs", folder / "configs", ignore=shutil.ignore_patterns("__*"))
    for name, (content, _) in MINE.items():
        (folder / "mine" / name).write_text(content)
    clip = {"face": np.arange(16.0).reshape(2, 8)}
    own = {split: {f"{split}_{i}": clip for i in "1234"} for split in ("train", "val")}
    clip_files.write_npz(folder / "own", own)
    clip_files.write_npz(folder / "alone", {"train": {"clip": clip}})


def prepare(folder: Path) -> None:
    """Calls `prepare_places`, and trains a run in the folder `run`."""
    prepare_places(folder)
    trained = run(folder, Case("--config=knn --workdir=run --config.eval.report=false", "", 0))
    assert not trained.returncode, trained.stderr


def run(folder: Path, case: Case) -> Any:
    env = {"JAX_PLATFORMS": "", "TQDM_DISABLE": "", "VIDJAX_CACHE": str(folder / "cache")}
    return execute(("-m", "vidjax.main", *case.words.split()), folder, **{**env, **case.env})


def list_faults(case: Case, code: int, output: str, errors: str, seconds: float = 0) -> list[str]:
    """Returns what is wrong: the differences between a case and the result of the command."""
    lines = [line for line in errors.splitlines() if not line.startswith(PROGRESS)]
    if "--json" in case.words.split() and not case.code:
        assert isinstance(json.loads(output), dict)
    faults = {
        f"exit code {code}, not {case.code}": code != case.code,
        "traceback": "Traceback" in errors,
        f"without '{case.remedy}'": case.remedy not in output + errors,
        f"{len(lines)} lines": case.code and not output and not 1 <= len(lines) <= 3,
        f"longer than {case.seconds:.0f} s": seconds > case.seconds,
    }
    return [fault for fault, is_present in faults.items() if is_present]
