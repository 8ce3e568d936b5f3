"""Defines the values that are stored with each frame, such as its number and its quality.

To store another value per frame, add a line to FRAME_FIELDS. To use it in a model, add it to
`vidjax.core.batch.Frames` and `Packed`, too.
"""

from typing import Literal, NamedTuple

import numpy as np

# The source of the quality of frames. `given` is the quality in the file, or the L2 norm of the
# feature if the file has no quality. `norm` is always the norm.
Quality = Literal["given", "norm"]
LARGEST = float(np.finfo(np.float32).max)  # models compute in float32


class FrameField(NamedTuple):
    """A value that is stored with each frame, in addition to its feature."""

    dtype: str
    missing: float | None  # the default; None stands for the position of the frame in its clip
    official: str  # the name of the value in the pickles of the iQIYI-VID dataset

    def default(self, num_frames: int) -> np.ndarray:
        """Returns the default values of `num_frames` frames."""
        if self.missing is None:
            return np.arange(num_frames, dtype=self.dtype)
        return np.full(num_frames, self.missing, self.dtype)


FRAME_FIELDS = {
    "number": FrameField("int32", None, official="frame"),  # never decreases within a clip
    "quality": FrameField("float32", 0.0, official="quality_score"),
    "detection": FrameField("float32", 1.0, official="det_score"),  # detection score
}
IGNORED = ("box",)  # may be given with each frame, but is not stored, because no model reads it
DTYPES = ("float16", "float32", "float64", "int8")  # of features
WEIGHTS = ("quality", "detection")  # frames may be weighted with these values
