"""Quality fusion as in the code: `--config=configs/quality_fusion.py:iqiyi_vid,trainval,published`.

Values that are not listed here are in `configs/quality_fusion.py`. A comment after each value names
its source, as there.
"""

from collections.abc import Collection

from vidjax.runs.config import Config


def follow(config: Config, words: Collection[str]) -> None:
    """Changes a configuration of `configs/quality_fusion.py` to the published values.

    `words` are the arguments of the file, such as `iqiyi_vid`.
    """
    config.batch_size = 512  # code
    config.num_epochs = 200.0  # slides: best near 200
    config.data.max_frames = 4096  # code: draws from all faces of a clip
    config.data.whole_epochs = True  # code: its loader keeps the short last batch
    if "raw" not in words:
        config.fusion.face.train.poor_clips = "drop"  # code: a clip of which no face passes

    # Code: the last stage begins in its epoch 100, counted from 1.
    config.loss.schedule = ((0.0, 0.75), (24.0, 0.75), (24.0, 1.0), (99.0, 1.0), (99.0, 0.98))
    # Code: 2e-5 for nine epochs, then 1.5e-4, halved every 50.
    config.optim.learning_rate = 1.5e-4
    config.optim.warmup = config.optim.warmup_scale = 0.0
    config.optim.decay = "piecewise"
    halved = [(9.0 + 50 * i + end, 0.5**i) for i in range(4) for end in (0, 50)]
    config.optim.points = ((0.0, 2 / 15), (9.0, 2 / 15), *halved)
    config.optim.restart_epoch = 9.0  # code: another Adam after nine epochs
