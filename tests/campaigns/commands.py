"""Commands with mistakes -> a part of the error, mostly the remedy."""

import shutil
from pathlib import Path

import numpy as np

from tests.conftest import ROOT
from tests.helpers import clip_files, made_runs

TRAIN = "--config=knn --workdir=new"
OWN = "--config=mma:face --config.data.name=arrays --workdir=new --config.data.dir="
WORDS = {
    "": "--config=configs/mma.py", "--config=": "--config= has no value",
    f"{TRAIN} --learning-rate=0.1": "--config.optim.learning_rate",
    f"{TRAIN} --quite": "--quiet", f"{TRAIN} --gpus=1": "CUDA_VISIBLE_DEVICES=0",
    f"{TRAIN} --xyzzy=1": "example: vidjax train", f"{TRAIN} stray": "no flag\nexample",
    "mma": "--config=FILE", "train mma": "--config=mma?",
    "rank --workdir=run clips": "--input=clips?", "export run new --format=onnx": "--to=new?",
    "compare --workdir=out --runs=A, B": "--runs=A,B", "predict": "vidjax rank",
    "evalaute --workdir=run": "evaluate, which ranks a split",
    "evaluate --workdir=run --out=o.tsv": "no flag --out",
    "rank": "needs --workdir, --input, --out",
    **{f"--mode=evaluate --workdir=w --config.{field}": "no effect" for field in (
        "optim.learning_rate=0.1", "data.max_frames=3", "data.mode=resident",
        "fusion.face.train.num_draws=2",
    )},
    "--config=mma --config.data.name=arrays --config.data.dir=w --workdir=w":
        "is the folder of the data",
    "gallery creat": "create", "gallery list G stray": "'stray' has no flag\nexample",
    "gallery enrol G --input=x --config.seed=1": "--config.data.FIELD",
    "--mode=compare --workdir=new --runs=run,run --config.seed=1": "--config.eval.split",
    "--mode=check --workdir=run --config=mma": "leave one of them out",
    "serve --gallery=g --port=99999": "from 0 to 65,535",
    "export run --to=x --format=onxn": "'onnx'", "score gt.txt": "needs RANKING",
    "who film.mp4": "needs --out, --models",
    "extract none.mp4 --out=x --models=m --size=1": "32 to 8,192",
    "extract none.mp4 --out=x --models=m --fps=nan": "a number above 0",
    "convert dlib": "needs FILE, --out", "forget": "--identity=NAME",
    f"{TRAIN} --coordinator=a:9": "also needs --num_processes",
    **{f"{TRAIN} --num_processes=2 --process_id=0 --coordinator={address}": "HOST:PORT"
       for address in ("a", ":9", "a:", "a:nine", "a:0", "a:65536")},
    "gallery remove G --identity=Ada --identity Bob": "--identity is given twice",
    "report --workdir=~no-such-user/run": "write ~/",
    "--config=knn --workdir=s3://bucket/run": "is an address",
    f"{TRAIN} --config.optimizer.learning_rate=1": "--config.optim.learning_rate",
    f"{TRAIN} --config.bacth_size=1": "--config.batch_size",
    f"{TRAIN} --config.seed": "--config.seed=...",
    f"{TRAIN} --config.seed=1 --config.batch_size=abc": "--config.batch_size=abc",
    f"{TRAIN} --config.batch_size=12.5": "whole number",
    f"{TRAIN} --config.modalities=5": "separated by commas",
    f"{TRAIN} --config.modalities={{[]:1}}": "choose from face",
    "--config=mma:face,haed --workdir=new": "'head'",
    "--config=mma --workdir=new --config.optim.name=adamw": "'adam'?",
    "--config=quality_fusion --workdir=new --config.model.layers=((0,'swish',False,0.5),)":
        "Expected `int` >= 1",
    "--config=mma --workdir=new --config.model.embed_dim=100000000": "reduce its sizes",
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
PLACES = {
    "--mode=report --workdir=.": "such as a, b",
    "--mode=report --workdir=empty": "vidjax train --config=mma",
    "--config=mma --workdir=a": "another workdir",
    "--mode=evaluate --workdir=a --runs=b,a": "another folder",
    "--mode=evaluate --workdir=a --config.join.weights=1,2": "no effect",
    "compare --workdir=out --runs=a,a": "a run is named twice",
    "compare --workdir=a --runs=a,b": "contains a run",
    "compare --workdir=out --runs=a,b --config.eval.split=test":
        "vidjax evaluate --workdir=a --config.eval.split=test",
    "--config=nowhere/mma.py": "'mma'",
    "export nowhere --to=new/deep/folder --format=numpy": "is not a folder",
    "--config=configs": "choose from cosine",
    **{f"--config=mine/{name}": remedy for name, (_, remedy) in MINE.items()},
    "--config=mma:iqiyi_vid,face,head --workdir=new --config.data.dir=zip":
        "such as face_train.pickle",
    "--config=mma:iqiyi_vid,face,head --workdir=new --config.data.dir=lfs": "Git LFS",
    "--config=knn:iqiyi_vid,face --workdir=new --config.data.dir=official "
    "--config.data.cache_dir=file": "file'",
    f"{TRAIN} --config.data.dir=official": "--config.data.name=iqiyi_vid",
    f"{TRAIN} --config.data.dir=own": "--config.data.name=arrays",
    f"{OWN}own --config.eval.split=test": "train, val",
    f"{OWN}own": "labels.csv",
    f"{OWN}alone": "--config.ensemble.folds=5",
    "--config=knn --workdir=own/train": "a folder of clips",
    f"{TRAIN} --config.data.weights=own": "correct the path",
}  # fmt: skip


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
