"""Reads ARGS of `--config=FILE:ARGS`: options, such as a dataset, and names of modalities."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from vidjax.runs import config_io
from vidjax.utils.errors import UserError, closest

# The arguments that every configuration file takes: word -> meaning.
SCALE_WORDS: Mapping[str, str] = {
    "iqiyi_vid": "the files of iQIYI-VID, and values for their full size",
    "few": "with `iqiyi_vid`: values for a few thousand clips",
    "standard": "the synthetic dataset with 1,000 identities instead of 100",
    "everything": "trains on all clips of train and val, and ranks test; there is no MAP if test "
    "has no ground truth",
}


def choose_data(config: Any, words: Collection[str]) -> bool:
    """Sets the dataset and the splits of `config` from the arguments in `--config=FILE:ARGS`.

    `words` are these arguments, such as `iqiyi_vid`. Words that do not concern the data are
    ignored. Returns True if the data are the whole dataset iQIYI-VID. Raises UserError if two words
    exclude each other.
    """
    if {"iqiyi_vid", "standard"} <= set(words):
        raise UserError("--config: 'iqiyi_vid' and 'standard' are two datasets: write only one")
    if "few" in words and "iqiyi_vid" not in words:
        raise UserError("--config: the argument 'few' needs 'iqiyi_vid': write iqiyi_vid,few")
    if {"everything", "trainval"} <= set(words):
        raise UserError(
            "--config: 'everything' and 'trainval' both train on val: write only one of them"
        )
    if "everything" in words:
        config.data.train_splits = ("train", "val")
        config.eval.split = "test"
    if "iqiyi_vid" in words:
        config.data.name = "iqiyi_vid"
    if "standard" in words:
        config.data.size = "standard"
    return "iqiyi_vid" in words and "few" not in words


def split_args(args: str, known: Collection[str]) -> tuple[set[str], tuple[str, ...]]:
    """Splits ARGS of `--config=FILE:ARGS` into words that the file knows and other words.

    Returns the words in `known`, and the other words, which are names of modalities. Raises
    UserError if a word comes twice or is probably misspelt.
    """
    words = [word.strip() for word in args.split(",") if word.strip()]
    options = {word for word in words if word in known}
    modalities = tuple(word for word in words if word not in known)
    for word in modalities:
        if ":" in word:
            commas = word.replace(":", ",")
            raise UserError(f"--config: '{word}': separate arguments by commas: write '{commas}'")
        if word == "published":  # looks like a modality, but is an argument of other files
            raise UserError(
                "--config: the file has no argument 'published': leave it out\n"
                f"its arguments are {', '.join(known)}, and names of modalities"
            )
        if words.count(word) > 1:
            raise UserError(f"--config: the argument '{word}' comes twice: write it once")
        if match := closest(word, known, cutoff=0.7):
            raise UserError(f"--config: the argument '{word}' is unknown: write '{match}'")
    return options, modalities


def choose_name(words: Collection[str], names: Collection[str], default: str) -> str:
    """Returns the item of `words` that is in `names`, or `default`. Two items raise UserError."""
    chosen = sorted({*names}.intersection(words))
    if len(chosen) > 1:
        quoted = " and ".join(f"'{name}'" for name in chosen)
        raise UserError(f"--config: {quoted} exclude each other: name only one")
    return chosen[0] if chosen else default


def choose_modality(modalities: tuple[str, ...], *, default: str) -> tuple[str, ...]:
    """Returns `modalities`, or (default,) if it is empty. Raises UserError if it has several."""
    if len(modalities) > 1:
        raise UserError(
            f"--config: this system uses only one of the modalities {', '.join(modalities)}\n"
            f"write one, or use a system for several: --config=plda:{','.join(modalities)}"
        )
    return modalities or (default,)


def follow_publication(file: str, config: Any, words: Collection[str]) -> None:
    """Sets the values of `config` that the publication about a system contains.

    `file` is the path of a configuration file, such as `configs/mma.py`, and `words` are its
    arguments. The values are in the function `follow` of `configs/published/mma.py`.
    """
    path = Path(file).parent / "published" / Path(file).name
    if not path.exists():
        raise UserError(f"--config=FILE:published needs '{path}': copy it from configs/published")
    config_io.execute(path).follow(config, words)
