"""The functions of `import vidjax`: what the README's ten lines use, from end to end."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import vidjax
from tests.helpers import made_runs, servers
from vidjax.runs import results as results_lib
from vidjax.runs.run_folder import RunFolder

UNTYPED: Any = vidjax  # tests give arguments of wrong types


def refused(message, function, *arguments, **options):
    """Asserts that a function raises an error of 1 to 3 lines, without the flag --workdir."""
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        function(*arguments, **options)
    assert str(caught.value).count("\n") <= 2 and "--workdir" not in str(caught.value)


@pytest.fixture(scope="module")
def clips():
    """Split -> clip -> modality -> features. There are 6 train and 3 val clips of each person."""
    rng = np.random.default_rng(0)
    people = rng.standard_normal((4, 16))

    def make(i):
        return {"face": (people[i % 4] + 0.3 * rng.standard_normal((2, 16))).astype(np.float32)}

    counts = {"train": 24, "val": 12}
    return {split: {f"{split}_{i}": make(i) for i in range(n)} for split, n in counts.items()}


@pytest.fixture(scope="module")
def labels(clips):
    return {name: f"person_{i % 4}" for split in clips.values() for i, name in enumerate(split)}


@pytest.fixture(scope="module")
def made(clips, labels, cache_dir):
    return vidjax.load_data(clips, labels, cache_dir=cache_dir)


@pytest.mark.slow
def test_arrays_are_loaded_trained_evaluated_and_ranked(clips, made, tmp_path):
    words = "--config.data.name=arrays", "--config.batch_size=8", "--config.eval.report=False"
    config = vidjax.load_config("knn", *words)
    folder = tmp_path / "run"
    assert repr(made) == "<data 'arrays': train 24 clips, val 12 clips; face 16; 4 identities>"

    with ThreadPoolExecutor() as pool:  # a program may train in any thread
        results = pool.submit(vidjax.train, config, folder, made, num_devices=1).result()
    assert results.map == pytest.approx(1.0)  # the four people differ much
    assert results.to_dict() == json.loads(results.paths.metrics.read_text())
    assert "map=1.0, map_kind='val'" in repr(results)
    # A second call returns the results of the finished run.
    assert vidjax.train(config, folder, made, num_devices=1).map == results.map

    tested = vidjax.evaluate(folder, made, split="train", num_devices=1)
    assert tested.to_dict() == json.loads(tested.paths.metrics.read_text())
    assert tested.map_kind == "in_sample"
    assert tested.paths.ranking == folder / "ranking_train.txt" and tested.paths.ranking.exists()

    run = UNTYPED.restore(folder, num_devices=1)
    new = {"person 2": clips["val"]["val_2"], "person 3": clips["val"]["val_3"]}
    assert [clip for clip, _ in run.rank(new)["person_2"]] == ["person 2", "person 3"]
    refused("clips must be a dict .* not str", run.rank, str(folder))
    refused("data must be the result of vidjax.load_data", UNTYPED.evaluate, folder, clips)
    refused("identify: k must be a number", run.identify, new, "2")
    refused("identify: threshold must be a score", run.identify, new, threshold="0.5")


def test_results_contain_average_precisions_and_user_defined_metrics(tmp_path):
    values = {"Ada": 0.25, "Zoë": 0.75, "Bo": 1.0}
    folder = RunFolder(made_runs.write(tmp_path / "run", values, results={"my_metric": 0.5}))
    results = results_lib.Results.from_values(folder.metrics(), "val", folder.paths())
    assert results.average_precisions() == values and results.map == pytest.approx(2 / 3)
    assert results.to_dict() == folder.metrics() and results.to_dict()["my_metric"] == 0.5


def test_import_vidjax_needs_linux_and_imports_neither_jax_nor_numpy_nor_tensorflow(python):
    python(
        "import sys, vidjax\n"
        "assert set(vidjax.__all__) <= set(dir(vidjax))\n"
        "assert not {'jax', 'numpy', 'tensorflow', 'flax'} & set(sys.modules)\n"
        "vidjax.load_config  # may import NumPy\n"
        "assert not {'jax', 'tensorflow', 'flax'} & set(sys.modules)\n"
    )
    python(
        "import pytest, sys\nsys.platform = 'win32'\n"
        "with pytest.raises(ImportError, match='needs Linux.*WSL'):\n    import vidjax\n"
    )


def test_functions_describe_the_expected_arguments(clips, labels, made, official_dir, tmp_path):
    load_config, load, train = UNTYPED.load_config, UNTYPED.load_data, UNTYPED.train
    restore, compare = UNTYPED.restore, UNTYPED.compare
    refused(r"\{'seed': 1\}.*--config\.FIELD=VALUE", load_config, "mma", {"seed": 1})
    refused(r"such as '--config\.seed=1'", load_config, "mma", "config.seed=1")
    refused("load_config: spec must be a name .* not None", load_config, None)

    # A configuration has its own folders and options. Official files have their own labels.
    config, misspelt, new = load_config("knn"), load_config("knn"), tmp_path / "new"
    refused("load_data: source must be a folder, .* not list", load, [clips])
    refused(r"set config\.data\.cache_dir", load, config, cache_dir=tmp_path)
    refused(r"set config\.data\.quality", load, config, quality="norm")
    refused(r"config\.data\.dir", load, config, labels)
    refused("leave `quality` out", load, official_dir, quality="norm")
    refused(r"train_gt\.txt", load, official_dir, labels)
    refused("'.*new' does not exist", load, new)
    refused("labels must be a dict", load, clips, [1])

    misspelt.optim.learn_rate = 1
    refused("train: config must be a configuration", train, str(new), config, made)
    refused("train: workdir must be the path of a folder", train, config, made, new)
    refused("data must be the result of vidjax.load_data", train, config, new, str(new))
    refused(r"learn_rate .*optim\.learning_rate", train, misspelt, new, made)
    refused("restore: workdir must be the path", restore, config)
    refused(f"no run in '{new}'", restore, new)
    measured = load_config("knn", "--config.data.name=arrays", "--config.data.quality=norm")
    refused(r"load_data\(\.\.\., quality='norm'\)", train, measured, new, made)
    assert not new.exists()

    for runs in ([new, None], [[new], [None]], [new, 5], [new, tmp_path.stat()]):
        refused("compare: run must be the path of a run's folder", compare, runs)
    refused("compare: out must be the path of a folder", compare, [new, new], out=5)


def test_galleries_describe_the_expected_arguments(nearest_run, tmp_path):
    new, gallery = tmp_path / "new", UNTYPED.Gallery
    remedy = f"vidjax gallery create NEW_FOLDER --run={nearest_run}"
    refused(remedy, gallery.create, nearest_run, new)
    refused("folder must be the path", gallery.create, None, nearest_run)
    refused("run must be a run, or the path", gallery.create, new, 5)
    refused("data must be the result", gallery.create, new, nearest_run, {})
    refused("models must be the path", gallery.of_models, new, None)
    assert not new.exists()
    enrol, clips = servers.make_gallery(new).enrol, {"c": {"face": np.ones((1, 8), np.float32)}}
    refused(r"no clip is called 'd'(.|\n)*clip is 'c'", enrol, clips, {"d": "Ada"})
