"""Residual Dense Net as in the article: `--config=configs/residual_dense.py:iqiyi_vid,published`.

Add `trainval` for the team's training clips. Values that are not listed here are in
`configs/residual_dense.py`. A comment after each value names its source, as there.
"""

from collections.abc import Collection

import numpy as np

from vidjax.runs.config import Config


def follow(config: Config, words: Collection[str]) -> None:
    """Changes a configuration of `configs/residual_dense.py` to the published values.

    `words` are the arguments of the file, such as `iqiyi_vid`.
    """
    main = config.modalities[0]
    config.num_epochs = 8.0  # paper
    # Ours: 64 clips, or 16 on few clips. A batch then has a few thousand (or hundred) frames.
    config.batch_size //= 8
    config.data.max_frames = 512  # paper: all frames
    config.transforms = ("by_example",)  # paper: frames are drawn, so long clips count more
    if "one" not in words:
        above = [float(np.nextafter(np.float32(q), np.float32(np.inf))) for q in (20, 40)]
        config.ensemble.min_quality = (-1000.0, *above)  # paper: > 20, > 40
        # Paper: a clip without a frame of this quality is not in the subset. If the main modality
        # is not the face, the subset has all frames of the clip, because official heads, bodies and
        # voices have no quality.
        config.ensemble.poor_clips = "drop" if main == "face" else "keep"
    config.eval.top_classes = 100  # paper

    # Paper: all original and merged frames in training; the best 70 % of them in the test.
    windows = {"name": "windows", "max_frames": 5}
    single = "single" in words
    config.fusion[main].train = {"name": "all"} if single else windows
    if not single and "fused" not in words:
        config.fusion[main].evaluate = {**windows, "kept_share": 0.7}

    config.optim.learning_rate = 1e-2  # paper
    config.optim.total_decay = 0.0  # not in the paper
    config.optim.decay_every_epochs = 1.0  # paper
