"""DeepMEF as the team ran it: `--config=configs/deepmef.py:iqiyi_vid,face,scene,published`.

If the article does not describe a value, or if the article contradicts the team's code, the value
is from the code. Add `views` for the team's eleven nets, and `trainval` for the team's training
clips. A batch has 4096 clips. With `few`, or with synthetic clips, there are not enough clips, and
a batch has 128.

Values that are not listed here are in `configs/deepmef.py`. A comment after each value names its
source, as there.
"""

import math
from collections.abc import Collection

from vidjax.runs.config import Config

# Code, scripts/main.sh: the chunk that each of the eleven nets omits, out of 16; for the scene, 32.
VIEWS = (0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 15)
SCENE_VIEWS = (1, 2, 3, 4, 6, 8, 10, 11, 12, 14, 15)


def follow(config: Config, words: Collection[str]) -> None:
    """Changes a configuration of `configs/deepmef.py` to the values of the team.

    `words` are the arguments of the file, such as `iqiyi_vid`. If the face is not among the
    modalities, there is only the net of the scene. If the face is the only modality, there is no
    net of the scene.
    """
    config.num_epochs = 100.0  # code
    config.data.max_frames = 4096  # code: draws from all frames
    config.data.whole_epochs = True  # code: its loader keeps the short last batch

    has_face = "face" in config.modalities
    if "views" in words:
        config.ensemble.views = config.ensemble.chunks = 16 if has_face else 32  # code
        config.ensemble.only = VIEWS if has_face else SCENE_VIEWS  # code

    if has_face:
        face = config.model.get("main", config.model)
        face.channel_attention = "danet" if "danet" in words else "channels"  # paper; code
        face.channel_norm = "danet" not in words  # code
        face.rms_norm = False  # code
        face.num_frames = 40  # code
        face.layer_form = "published"  # code
        face.modality_dropout_rate = 0.0  # paper
        if "views" not in words:  # with `views`, a net has a sixteenth fewer features
            # Code: the layers of the scene have a quarter and a sixteenth of its 2048 features, and
            # the layer of the face has twice its 514 values (512 features, quality and detection).
            # Paper: 128 for the scene.
            face.branch_dims = (512, 128)
            face.hidden_dim = 1028
    if config.modalities != ("face",):
        scene = config.model.get("other", config.model)
        del scene.layers
        scene.backbone = "block"  # code
        scene.dropout_rate = 0.5  # code

    sample = {"name": "sample", "num_frames": 40, "order": "random", "replacement": True}  # code
    config.fusion.face = {"train": sample, "evaluate": sample}
    single = {"name": "sample", "num_frames": 1}  # paper
    for name in set(config.modalities) - {"face"}:
        config.fusion[name] = {"train": single, "evaluate": single}

    config.loss.focal = "batch"  # code
    config.loss.mean_over = "branches"  # code: a mean for each net
    config.optim.learning_rate = 0.1  # code
    config.optim.weight_decay = 1e-5  # code
    config.optim.total_decay = 0.0  # not in the code
    config.optim.decay_all = True  # code
    config.optim.decay = "piecewise"  # code: CosineAnnealingLR, one rate for each epoch
    factors = [(1 + math.cos(math.pi * epoch / 100)) / 2 for epoch in range(100)]
    config.optim.points = tuple((i + end, x) for i, x in enumerate(factors) for end in (0, 1))
    config.eval.temperature = 30.0  # code: the logits of the test are cosines without a factor
