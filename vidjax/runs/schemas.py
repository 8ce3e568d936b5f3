"""Defines the JSON files of a run: the meaning, the type and the range of each key.

Each class describes a JSON object. A key without a default is required. Unlisted keys are ignored,
so that later versions of vidjax can add keys. `utils.json_files` reads the files.
"""

import math
from typing import Annotated, Any

from msgspec import UNSET, Meta, Struct, UnsetType, field

from vidjax.runs.facts import Entries
from vidjax.utils.json_files import Count, NotNaN, Share, Size, Text, Whole

Scalar = Text | bool | int | float | None
# Index of an identity in `identities.json`, from 0. -1 means no identity.
Column = Annotated[int, Meta(ge=-1, lt=1 << 31)]


class Data(Struct, kw_only=True):
    """The dataset on which a run was evaluated."""

    name: Text | None = None
    dir: Text | None = None
    digest: Text | None = None  # sha256
    size: Scalar = None  # `data.size` of the configuration, for the synthetic dataset
    seed: Scalar = None  # `data.seed` of the configuration, for the synthetic dataset


class JoinedRun(Struct, kw_only=True):
    """A run in a blend. A blend joins the scores of several runs."""

    name: Text
    weight: NotNaN | None = None
    map: Share | None = None  # of this run, not of the blend


class SplitDigests(Struct, kw_only=True):
    """The number of clips of a split, and the digests of their names, features and labels."""

    clips: Count
    names: Text
    features: Text
    labels: Text | None = None
    modalities: list[Text] | None = None
    records: Text | None = None  # version of the records that `features` is the digest of


class DataDigests(Struct, kw_only=True):
    """The digests of the data of a run, which show whether the data have changed since training."""

    splits: dict[str, SplitDigests]
    weights: Text | None = None  # sha256 of the file `data.weights`


class Training(Entries, Struct, kw_only=True):
    """The entries of `metrics.json` that describe the training."""

    date: Text | None = None  # UTC: end of the training
    best_step: Whole | None = None  # step of the best evaluation during training
    best_map: Share | None = None
    num_params: Whole | None = None  # parameters of a member
    num_members: Whole | None = None
    train_clips_per_second: float | None = None  # median over the training steps
    train_seconds: float | None = None  # of the training steps since the last start or resume
    seconds: float | None = None  # of all starts and resumes of the run, evaluations included
    seed: Whole | None = None
    finished: bool | None = None
    command: Text | None = None
    trained_on: DataDigests | None = None
    versions: dict[str, Text] | None = None  # package -> version


class Copies(Struct, kw_only=True, omit_defaults=True):
    """Ranked clips with the same frames as a training clip, which may make MAP too high."""

    count: Count
    example: Text  # such as "'x' of val equals 'y' of train"
    map: Share | None = None  # of the other clips; None if they show no identity


class Metrics(Training, Struct, kw_only=True):
    """The results of a run on a split: the content of `metrics.json` or `metrics_<split>.json`."""

    data: Data | None = None
    num_clips: Whole | None = None  # ranked clips
    num_identities: Whole | None = None  # identities with a ranking
    num_distractors: Whole | None = None  # ranked clips without an identity
    num_ties: Whole | None = None  # ranked clips with the score of the clip before them
    num_nan_clips: Whole | None = None  # clips whose score is NaN; they are ranked last
    # Without ground truth, `map` and the metrics below are None.
    map: Share | None = None
    num_map_identities: Whole | None = None  # identities with a clip; MAP is their mean
    map_kind: Text | None = None  # the name of the split, `out_of_fold` or `in_sample`
    top1: Share | None = None  # share of labelled clips whose best identity is right
    eval_loss: NotNaN | None = None  # mean of minus the log-probability of the right identity
    auroc: Share | None = None  # how well the best scores separate known clips from distractors
    # Share of known clips that are missed or misnamed, if 1 % or 10 % of distractors get a name.
    fnir_1: Share | None = field(default=None, name="fnir_at_fpir_0.01")
    fnir_10: Share | None = field(default=None, name="fnir_at_fpir_0.1")
    threshold_1: NotNaN | None = field(default=None, name="threshold_at_fpir_0.01")
    copies: Copies | None = None
    threshold_10: NotNaN | None = field(default=None, name="threshold_at_fpir_0.1")
    # Fields that affect scores and that differ from `config.json`: field -> value.
    overrides: dict[str, Any] | None = None
    eval_date: Text | None = None  # UTC: a later evaluation
    eval_clips_per_second: float | None = None
    eval_seconds: float | None = None  # of a later evaluation, or of a blend
    step: Whole | None = None  # training steps before the evaluation
    waited_seconds: float | None = None  # time in which devices waited for a batch
    mode: Text | None = None  # `resident` or `streaming`
    members: list[dict[str, Scalar]] | None = None  # number, options, MAP
    runs: list[JoinedRun] | None = None  # the runs of a blend


class Manifest(Entries, Struct, kw_only=True):
    """The content of `manifest.json` in the folder of a checkpoint."""

    step: Whole
    files: dict[str, Text]  # name -> sha256
    arrays: dict[str, Text]  # name -> dtype[shape]
    data: DataDigests = field(default_factory=lambda: DataDigests(splits={}))
    map: Share = 0.0
    config: dict[str, Any] = {}  # the configuration of the run
    modalities: dict[str, Size] = {}  # name -> width
    num_identities: Size = 1
    num_clips: Size = 1
    total_steps: Size = 1  # of the whole training
    num_clusters: Count | None = None  # of noise classes; None: no noise classes
    train_other: bool = False  # True if distractors were trained on as class column 0
    mode: Text = ""  # `resident` or `streaming`
    group_size: Size | None = None  # members that trained together; None in old checkpoints
    evaluated: bool = False
    seconds: float = 0.0  # since the start of the training, without pauses
    # Attribute of the model -> value that `Identifier.prepare` computed before the training.
    settings: dict[str, NotNaN | list[NotNaN]] | None = None
    num_places: Size | None = None  # rows of the batches of an epoch; None: num_clips


class Join(Struct, kw_only=True):
    """The content of `join.json`: learned parameters that join the scores of R runs (a blend).

    The clips of `splits` are divided into P parts. Each field except `splits` has P + 1 entries.
    Entry p joins the scores of the clips of part p, and was learned from all other parts. The last
    entry joins the scores of clips of other splits, and was learned from all parts.
    """

    scale: list[list[NotNaN]]  # rows of R numbers, see `calibration.Calibration`
    offset: list[list[NotNaN]]
    trust: list[list[NotNaN]]
    stranger: list[NotNaN]
    splits: list[Text]  # the splits on whose clips the numbers were learned


class Line(Struct, kw_only=True):
    """A line of `metrics.jsonl` or `timing.jsonl`.

    A line about an evaluation has the additional key `split`. In `timing.jsonl`, the key `saved` is
    True if the step was saved as a checkpoint.
    """

    step: Whole
    epoch: float | None = None
    map: float | None = None


class DataReport(Struct, kw_only=True):
    """The content of `data_report.json`: numbers of clips, frames and labels of each split."""

    splits: dict[str, dict[str, Any]] = {}  # split -> key -> value


class Mistake(Struct, kw_only=True):
    """A clip whose highest score belongs to a person that the clip does not show."""

    clip: Text
    shows: Column = -1  # the person in the clip; -1: a distractor
    identity: Column = -1  # the person with the highest score
    score: float


Mistakes = list[Mistake]
Pair = tuple[Column, Column]  # the index of an identity or -1, and a number of clips


class WorstIdentity(Struct, kw_only=True):
    """An identity with a low average precision, and identities that it is confused with."""

    identity: Column
    ap: Share  # average precision
    clips: Whole  # number of clips of the identity
    # The pairs of the following lists are (another identity, number of clips).
    lost_to: list[Pair]  # clips that score highest for the other identity
    mixed_with: list[Pair]  # clips of the other identity in the first places


class ConfusedPair(Struct, kw_only=True):
    """Two identities whose clips are confused."""

    first: Column
    second: Column
    # The clips of `first` that score highest for `second`, and the reverse.
    counts: tuple[Count, Count]


class Suspects(Struct, kw_only=True):
    """The clips whose labels are suspected to be wrong, and the change in MAP without them."""

    sure: Share  # the best identity of a suspected clip has at least this probability
    above: Count  # at least this number of identities scores above the label
    count: Count  # suspected clips
    clips: Mistakes  # the suspected clips with the highest scores
    identities: Count  # identities that keep a clip; the following values are means over them
    gain: float
    low: float  # this and `high`: the 95 % interval
    high: float


class Stratum(Struct, kw_only=True):
    """A group of identities or clips, and its MAP."""

    label: Text
    map: Share
    low: float | None = None  # this and `high`: the 95 % interval; None for few identities
    high: float | None = None
    identities: Whole | None = None
    clips: Whole | None = None


class Strata(Struct, kw_only=True):
    """Groups of identities or clips, such as groups of clips of similar quality, and their MAP."""

    by: Text  # what distinguishes the groups
    rows: list[Stratum]


class WrongClips(Struct, kw_only=True):
    """The mistakes with the highest scores, in two lists: clips of unknown and of known people."""

    distractors: Mistakes | None = None
    known: Mistakes | None = None


class Rate(Struct, kw_only=True, omit_defaults=True):
    """A threshold for identification, and the rates of errors at this threshold."""

    rate: Share  # largest allowed share of distractors that get a name
    fewest: Count  # with fewer distractors, no threshold can be measured
    threshold: NotNaN | None = None
    fpir: Share = 0.0  # share of distractors that get a name
    fnir: Share = 0.0  # share of clips of known people that get no name or a wrong name
    fpir_low: Share = 0.0  # this and `fpir_high`: the 95 % interval
    fpir_high: Share = 0.0
    fnir_low: Share = 0.0  # this and `fnir_high`: the 95 % interval
    fnir_high: Share = 0.0


class OpenSet(Struct, kw_only=True):
    """How often clips of known and of unknown people get a name, at several thresholds."""

    num_identities: Whole  # identities that each clip is compared with
    num_known: Whole  # clips of known people
    num_people: Whole  # known people with a clip
    num_strange: Whole  # distractors
    resamples: Whole  # bootstrap samples behind the intervals
    rates: list[Rate]


class Analysis(Struct, kw_only=True, omit_defaults=True):
    """The entry `facts` of `analysis.npz`, a JSON object. All other entries are arrays.

    The arrays, which are not fields of this class, are:

    - `ap`: the average precision of each identity, over `positives` clips.
    - `train_clips`: the number of training clips of each identity.
    - `score_known`, `score_strange`: histograms of the best scores of clips of known and of unknown
      people, with the bins `score_edges`.
    - `fpir`, `fnir`: false positive and false negative identification rate at each threshold.
    - `attention`: [i, j] is how much vector j attends to vector i on average; `vectors`: the names.
    - `calibration`: [bins, 3], the number of clips, mean confidence, and share of right answers.
    """

    split: Text | None = None
    lead: Text | None = None  # the modality whose quality and length divide the clips into strata
    modalities: list[Text] | None = None
    logs: bool | None = None  # True if scores are logarithms of probabilities
    vectors: list[Text] | None = None  # rows of `attention`
    num_others: Whole | None = None  # identities of the ground truth that are unknown to the run
    worst: list[WorstIdentity] | None = None
    wrong_clips: WrongClips | None = None
    pairs: list[ConfusedPair] | None = None  # None in old analyses
    # `top1` and `auroc` -> the ends of the 95 % interval.
    intervals: dict[str, tuple[Share, Share]] = {}
    fewest_identities: Whole | None = None  # a stratum of fewer identities has no interval
    strata: list[Strata] | None = None
    suspects: Suspects | None = None  # None if scores are no probabilities, or MAP is in sample
    open_set: OpenSet | UnsetType | None = UNSET  # None without distractors; unset without MAP
    calibration_error: float = math.nan  # expected calibration error
