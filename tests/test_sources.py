"""Datasets are loaded by name; synthetic data are written once; addresses are refused."""

import functools

import numpy as np

from tests.helpers.clip_files import random_clip, write_pickle, write_truth
from tests.helpers.datasets import load_dataset
from tests.helpers.seen import refused
from vidjax.data import synthetic
from vidjax.utils import files


def test_load_errors_name_the_missing_setting_or_folder(tmp_path):
    refused(lambda: load_dataset("imagenet"), "'imagenet'", "synthetic, iqiyi_vid")
    refused(lambda: load_dataset("iqiyi_vid"), "config.data.dir")
    refused(lambda: load_dataset("iqiyi_vid", directory=tmp_path / "nowhere"), "nowhere")


def test_synthetic_data_are_written_once_per_setting(tmp_path, monkeypatch):
    written = []

    def write(out_dir, *, size, seed, options):
        written.append((size, seed, options.blur))
        write_pickle(out_dir, "face", "train", {"a": random_clip(np.random.default_rng(), 2, 4)})
        write_truth(out_dir, "train", {"a": "1"})

    monkeypatch.setattr(synthetic, "write", write)
    monkeypatch.setenv("VIDJAX_CACHE", str(tmp_path))

    for seed, blur in ((5, 1.0), (5, 1.0), (6, 1.0), (6, 2.0), (6, 2.0)):
        dataset = load_dataset("synthetic", seed=seed, blur=blur)
        assert dataset.split("train").clips == ("a",) and dataset.identities == ("1",)
        assert dataset.report["data"]["name"] == "synthetic" and not dataset.report["data"]["dir"]
    assert written == [("small", 5, 1.0), ("small", 6, 1.0), ("small", 6, 2.0)]


def test_urls_are_refused_as_folders_and_paths_are_normalised(tmp_path):
    for text in ("s3://bucket/ok", "gs://a", "s3:/bucket"):  # Path drops a slash
        refused(functools.partial(files.local, text), "copy or mount the files")
        refused(functools.partial(load_dataset, "arrays", directory=text), "an address")
    (tmp_path / "a").mkdir()
    assert files.absolute(tmp_path / "a" / ".." / "b") == tmp_path.resolve() / "b"
