"""The best program: a cosine classifier and PLDA of each modality, joined by learned numbers.

    python -m vidjax.main --config=configs/joint.py

Arguments: the words of WORDS below, and names of modalities, the strongest first.
"""

from vidjax.runs import config as config_lib, config_words

WORDS = {name: config_words.SCALE_WORDS[name] for name in ("iqiyi_vid", "few", "standard")}


def get_config(args: str = "") -> config_lib.Config:
    """Returns the configuration for `args`, as in `--config=joint:ARG,ARG`."""
    words, modalities = config_words.split_args(args, WORDS)
    config = config_lib.default()
    full = config_words.choose_data(config, words)
    modalities = modalities or ("face", "head", "body", "audio")
    config.modalities = modalities
    config.data.train_splits = ("train", "val")
    config.ensemble.folds = 2 if full else 5  # folds of large data cost more than they gain
    size = ",".join(sorted(words, reverse=True))
    together = ",".join(filter(None, [size, "" if full else "ensemble", *modalities]))
    each = tuple(f"plda:{','.join(filter(None, [size, name]))}" for name in modalities)
    config.join.systems = (f"cosine:{together}", *each)
    config.join.learned = True
    return config
