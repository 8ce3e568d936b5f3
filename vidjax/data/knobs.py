"""The knobs of the synthetic dataset: what a set can be given more or less of."""

from typing import NamedTuple

from vidjax.errors import UserError


class Knobs(NamedTuple):
    """What a set holds more or less of than the calibrated one, whose values are the defaults.

    Every knob but `train_distractors` leaves all that it does not name as it was, to the bit, so
    that a run on a set with it and one without are two halves of an experiment.

    Attributes:
      wrong_clips: share of clips in which a third of the frames, in one run, show somebody else, at
        20 less quality. No publication gives a rate. The iQIYI-VID paper keeps clips in which more
        than 30 % of the frames hold one head, or one that is far larger than the others
        (section 3.2); so up to 70 % may hold several people.
      blur: how far blur follows quality: the noise of a frame is exp(blur (78 - quality) / 50). At
        0 all frames are blurred alike. By nearest neighbours on the small set, W(x) beats the mean
        face by 0.002, 0.005, 0.009 and 0.021 of MAP at 0, 1, 1.5 and 2; quality fusion (4th place
        2019) reports gains of 0.01 and 0.02 by weighting and by filtering frames.
      label_noise: share of train clips whose ground truth names somebody else. The iQIYI-VID paper
        reports 0.002 at most, by checks of its own (section 3.4).
      train_distractors: share of train clips that show nobody on the list. The official train split
        has none; val, on which the teams of 2018 and 2019 trained, has 0.375.
      missing_rate: share of clips that lack face, head, body or audio, each for itself, beyond the
        0.02, 0.02, 0.05 and 0.15 that all sets have. No publication gives a rate; the small real
        set of our tests lacks 0.1 of the faces and of the voices.
    """

    wrong_clips: float = 0.15
    blur: float = 1.0
    label_noise: float = 0.0
    train_distractors: float = 0.0
    missing_rate: float = 0.0


DEFAULT_KNOBS = Knobs()


def check_knobs(knobs: Knobs) -> None:
    """Raises ValueError for a knob out of its range."""
    for name, value in knobs._asdict().items():
        largest = {"blur": 4.0, "train_distractors": 0.9}.get(name, 1.0)
        if not 0 <= value <= largest:
            raise UserError(f"config.data.{name}={value}: must lie between 0 and {largest:g}")
