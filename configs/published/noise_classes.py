"""Noise classes as the author ran them: `--config=configs/noise_classes.py:iqiyi_vid,published`.

If the article does not describe a value, the value is from the author's code. A batch has 10,240
clips. With `few`, or with synthetic clips, there are not enough clips, and a batch has 256.

Values that are not listed here are in `configs/noise_classes.py`. A comment after each value names
its source, as there.
"""

from collections.abc import Collection

from vidjax.runs.config import Config

# Code: loss weights of the distractors in mirror classes, each for a tenth of the training.
STAIRS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6)


def follow(config: Config, words: Collection[str]) -> None:
    """Changes a configuration of `configs/noise_classes.py` to the published values.

    `words` are the arguments of the file, such as `iqiyi_vid`.
    """
    config.num_epochs = 200.0  # code
    config.data.max_frames = 4096  # code: all frames
    if "everything" not in words:
        config.ensemble.folds = 8  # README of the code; the default of the code is 10

    if config.data.distractors == "noise":
        config.noise.relabel_by = "train"  # code: predicts with the fusion of training
        config.noise.pieces = "random"  # code
        ends = [(20.0 * i, 20.0 * (i + 1), weight) for i, weight in enumerate(STAIRS)]
        config.noise.mirror_weight = tuple((end, weight) for *both, weight in ends for end in both)

    # Paper: weights by quality, without a formula; code: by squared quality, of all frames.
    fusion = config.fusion[config.modalities[0]]
    fusion.train.update(weighting="squared", min_quality=0.0, min_detection=0.0)  # code
    fusion.evaluate.update(weighting="squared", always_shorter=True)  # code

    config.loss.mean_over = "clips"  # code
    config.optim.warmup = 0.0  # code
    config.optim.decay = "constant"  # code
