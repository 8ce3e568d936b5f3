"""The best program: a cosine classifier and PLDA of each modality, joined by learned numbers.

    python -m vidjax.main --config=configs/joint.py

Arguments: the words of WORDS below, and names of modalities, the strongest first.
"""

from collections.abc import Iterator

from vidjax.runs import config as config_lib, config_words

WORDS = {
    **{name: config_words.SCALE_WORDS[name] for name in ("iqiyi_vid", "few", "standard")},
    "plda": "joins only PLDA of each modality, so no net is trained",
}


def get_config(args: str = "") -> config_lib.Config:
    """Returns the configuration for `args`, as in `--config=joint:ARG,ARG`."""
    words, modalities = config_words.split_args(args, WORDS)
    config = config_lib.default()
    full = config_words.choose_data(config, words)
    # The synthetic clips have scenes, too.
    default = ("face", "head", "body", "audio") + (() if "iqiyi_vid" in words else ("scene",))
    config.modalities = modalities or default
    config.data.train_splits = ("train", "val")
    config.ensemble.folds = 5
    if full:  # a fifth of the clips is enough to measure, and four fifths of the time are saved
        config.ensemble.only = (0,)
    config.join.systems = tuple(_name_systems(config.modalities, words, full=full))
    config.join.learned = True
    config.join.diffusion = True
    return config


def _name_systems(modalities: tuple[str, ...], words: set[str], *, full: bool) -> Iterator[str]:
    """Yields the configurations that are trained and joined, such as `plda:face`."""
    size = sorted(words - {"plda"}, reverse=True)
    # With many classes, the classifier of several modalities takes longer than it gains. Scenes
    # show few people, so the cosine of a scene does not help.
    people = [name for name in modalities if name != "scene"] or list(modalities)
    if "plda" not in words:
        yield "cosine:" + ",".join([*size, *people[:1]] if full else [*size, "ensemble", *people])
    for name in modalities:
        yield "plda:" + ",".join([*size, name])
