"""sources: datasets by name, and what a new one needs."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.clip_files import random_clip, write_pickle, write_truth
from tests.helpers.datasets import load_dataset
from vidjax import files
from vidjax.data import sources, synthetic
from vidjax.data.cache import Digests
from vidjax.data.frame_fields import NonFinite, Unpacked
from vidjax.data.packing import Clip, pack
from vidjax.data.synthetic import SyntheticOptions
from vidjax.main import main


def test_load_names_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'imagenet'.* synthetic, iqiyi_vid"):
        load_dataset("imagenet", directory=None, cache_dir=tmp_path)
    with pytest.raises(ValueError, match=r"config\.data\.dir"):
        load_dataset("iqiyi_vid", directory=None, cache_dir=tmp_path)
    with pytest.raises(OSError, match="nowhere"):
        load_dataset("iqiyi_vid", directory=tmp_path / "nowhere", cache_dir=tmp_path)


def test_synthetic_data_are_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def write(out_dir: Path, *, size: str, seed: int, options: SyntheticOptions) -> None:
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
    folders = (tmp_path / "synthetic").glob("small-6-blur=2-*")
    assert sum(path.is_dir() for path in folders) == 1
    data = {"name": "synthetic", "size": "small", "seed": 6}  # as an earlier version wrote it
    assert sources.describe(data) == "synthetic, size small, seed 6"
    assert sources.describe({**data, "blur": 2.0}) == "synthetic, size small, seed 6, blur 2"
    assert {path.name for path in tmp_path.iterdir()} - {"digests"} == {"synthetic", "iqiyi_vid"}


class Numbered:
    """A dataset as somebody may add it: clips of as many frames as their number."""

    kind, place, title = "numbered", "nowhere", "numbered clips"

    def fingerprint(self) -> list[dict[str, Any]]:
        return [{"numbered": 1}]

    def file_of(self, modality: str, split: str) -> Path:
        return Path(split)

    def read(self, scratch: Path, non_finite: NonFinite) -> Unpacked:
        unpacked = {}
        for split, count in (("train", 6), ("val", 4)):
            clips = [
                Clip(f"{split}{i}", split, {"voice": np.full((i, 3), i, np.float32)})
                for i in range(count)
            ]
            unpacked[split] = [pack(clips, scratch / split, non_finite=non_finite)]
        return unpacked

    def truth(self, clips: Mapping[str, Collection[str]]) -> dict[str, dict[str, str]]:
        return {split: {name: name[-1] for name in names} for split, names in clips.items()}


def test_a_dataset_is_a_class_and_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def open_numbered(data: sources.Section, digests: Digests) -> Numbered:
        assert data["name"] == "numbered" and digests.cache_dir == tmp_path
        return Numbered()

    entries = {**sources.DATASETS, "numbered": open_numbered}
    monkeypatch.setattr(sources, "DATASETS", entries)
    check = ["--mode=check", "--config=configs/knn.py", "--config.data.name=numbered"]
    check += [f"--config.data.cache_dir={tmp_path}", "--config.modalities=voice"]
    check += ["--config.model.modality=voice"]
    assert main(check) == 0
    assert "not converted yet" in capsys.readouterr().out
    data = load_dataset("numbered", cache_dir=tmp_path)
    assert data.split("train").lengths["voice"].tolist() == [0, 1, 2, 3, 4, 5]
    assert data.split("val").labels.tolist() == [1, 2, 3, 4]
    assert main(check) == 0
    assert "train: 6 clips" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"config\.data\.name='other'.* arrays, numbered"):
        load_dataset("other", cache_dir=tmp_path)


def test_an_address_is_no_folder_and_a_path_has_no_way_back(tmp_path: Path) -> None:
    for text in ("s3://bucket/ok", "gs://a", "s3:/bucket"):
        with pytest.raises(ValueError, match="copy what it holds, or mount it"):
            files.local(text)
        with pytest.raises(ValueError, match="an address"):
            load_dataset("arrays", directory=text)
    (tmp_path / "a").mkdir()
    assert files.absolute(tmp_path / "a" / ".." / "b") == tmp_path.resolve() / "b"
