"""Every configuration field with its default; how configurations are read, overridden, kept.

python -m vidjax.config                              # prints the fields as Markdown tables
python -m vidjax.config --write=configs/README.md    # writes them into a page
"""

import inspect
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from ml_collections import ConfigDict, config_dict

from vidjax import config_docs, config_files, config_rules, files, messages
from vidjax.config_files import SCALE_WORDS, choose_data, choose_one, one_modality, split_args
from vidjax.config_rules import HOLD_OUT
from vidjax.config_values import Config, ShortConfig, fields, override
from vidjax.errors import UserError
from vidjax.suggest import suggest

__all__ = [
    "HOLD_OUT",
    "SCALE_WORDS",
    "Config",
    "check",
    "choose_data",
    "choose_one",
    "default",
    "differences",
    "fields",
    "from_json",
    "load_file",
    "load_workdir",
    "one_modality",
    "override",
    "problems",
    "split_args",
    "suggest",
    "to_json",
]


def default() -> Config:
    """Returns a configuration with every field that every experiment has, at its default.

    The files in `configs/` start from this one and set `model`, `fusion` and what else differs.
    `model`, `fusion`, `loss` and `optim` are specifications, read by
    `models.identifier.make_identifier`, `fusion.make_fusion`, `losses.make_loss` and
    `optim.make_optimizer`.

    The comment above or beside a field is its documentation: `python -m vidjax.config` prints the
    comments as the tables of `configs/README.md`.
    """
    # whole: all fields can be read from top to bottom
    config = cast(Config, ShortConfig())
    config.seed = 0  # seed of parameters, random draws and the order of clips: 0 to 2**31 - 1
    config.batch_size = 128  # clips per training step, over all devices
    config.num_epochs = 1.0  # passes over the training clips; a fraction is allowed
    config.modalities = ("face",)  # modalities to use, in order, e.g. `face,head`
    # dtype of the computation: `float32`, `bfloat16`, or `float64` with `JAX_ENABLE_X64=1`.
    # Parameters are at least float32.
    config.dtype = "float32"
    # precision of matrix products in evaluation, on every backend: `highest` (float32) or another
    # value of `jax.default_matmul_precision`
    config.matmul_precision = "highest"
    # give bit-identical runs on a GPU, too, at some cost in speed; runs on a CPU always are
    config.deterministic = False
    # `pool`: the model takes all fused frames of a clip; `examples`: the model takes one fused
    # frame at a time, and evaluation combines the scores by `eval.reduce`
    config.after_fusion = "pool"
    # names of further transforms of a training batch, in order; empty: none
    config.transforms = ()
    # alpha of the Beta distribution that draws the shares of two mixed clips; 0: no mixup
    config.mixup = 0.0
    # training steps between two lines of `metrics.jsonl`; steps 1, 2, 5 and 10 have a line, too
    config.log_every_steps = 20
    # seconds between two checkpoints, beside the checkpoint of every evaluation
    config.checkpoint_every_seconds = 300.0

    config.data = ConfigDict()  # the clips, and how training reads them
    # dataset: made on the spot (`synthetic`), official files (`iqiyi_vid`) or features of your own
    # (`arrays`)
    config.data.name = "synthetic"
    config.data.dir = config_dict.placeholder(str)  # folder of official files, or of your features
    # folder of the converted records and of compiled programs; unset: `$VIDJAX_CACHE`, else
    # `~/.cache/vidjax`
    config.data.cache_dir = config_dict.placeholder(str)
    # size of the synthetic dataset: `small` (100 identities) or `standard` (1,000)
    config.data.size = "small"
    config.data.seed = 0  # seed of the synthetic dataset: another seed is another dataset
    # share of synthetic clips in which a third of the frames shows somebody else
    config.data.wrong_clips = 0.15
    # how strongly blur depends on the quality of synthetic frames, 0 to 4; 0: all frames are
    # blurred alike
    config.data.blur = 1.0
    config.data.label_noise = 0.0  # share of synthetic train clips labelled as somebody else
    # share of synthetic train clips that show nobody on the list, 0 to 0.9; in val it is 0.375
    config.data.train_distractors = 0.0
    # share of synthetic clips that lack face, head, body or audio, beyond what all sets lack
    config.data.missing_rate = 0.0
    config.data.train_splits = ("train",)  # splits to train on, e.g. `train,val`
    # frames whose feature holds a NaN or an infinity: `drop` leaves them out and counts them,
    # `error` refuses the file
    config.data.non_finite = "drop"
    # quality of the frames of your own features: `given`: the value in the file, or the L2 norm of
    # the feature for clips without one; `norm`: always the L2 norm of the feature
    config.data.quality = "given"
    # `resident`: all clips stay in device memory; `streaming`: clips are read from the records;
    # `auto`: resident if the clips take at most half of the free memory
    config.data.mode = "auto"
    config.data.max_frames = 64  # maximum number of frames that training reads from a clip
    # frames of a longer clip in training: a random `window`, or the best by `quality`
    config.data.crop = "window"
    # clips without an identity in training: `other` (class column 0), `leave_out`, or `noise`
    # (classes of their own, see the group `noise`)
    config.data.distractors = "other"
    # file of loss weights, `NAME.mp4 WEIGHT` on each line; a clip that is not named has weight 1
    config.data.weights = config_dict.placeholder(str)
    # exponent of class balancing: the loss of a clip is weighted by n ** -balance, where its class
    # has n clips, relative to the mean weight; 0: all clips are weighted alike
    config.data.balance = 0.0

    # the members of an ensemble: the product of all that varies
    config.ensemble = ConfigDict()
    # number of stratified folds, each left out by one member; 0: no folds, else 2 or more
    config.ensemble.folds = 0
    # number of bootstrap samples of every identity's clips, one per member; 0: none
    config.ensemble.bootstraps = 0
    # what a bootstrap sample draws from: each `identity` by itself, or `all` clips together, which
    # loses identities of few clips. With `ensemble.bootstraps`
    config.ensemble.resample = "identity"
    # number of members that each leave out another chunk of the features; 0: none
    config.ensemble.views = 0
    # number of equal chunks that a feature vector is cut into for `ensemble.views`, 2 or more
    config.ensemble.chunks = 16
    # least quality of the frames that a member is trained on, one value per member, e.g. `0,20,40`
    config.ensemble.min_quality = ()
    # clips without a frame of that quality: `keep` trains on all their frames, `drop` leaves them
    # out. With `ensemble.min_quality`
    config.ensemble.poor_clips = "keep"
    config.ensemble.seeds = 1  # number of members that differ in their random draws alone
    # numbers of the members to train here, from 0, e.g. `0,2`; empty: all
    config.ensemble.only = ()
    # `map`: members are trained one after another; `vmap`: together in one program; `auto`: `map`
    # on CPU, `vmap` elsewhere
    config.ensemble.mapping = "auto"

    # noise classes: clusters of distractors, and a mirror class of every identity for distractors
    # in no cluster. With `data.distractors=noise`
    config.noise = ConfigDict()
    config.noise.method = "dbscan"  # clustering of unit vectors: `dbscan` or `hdbscan`
    # Euclidean distance between unit vectors, 0 to 2, up to which two are neighbours
    config.noise.eps = 0.9
    config.noise.min_samples = 2  # vectors in a neighbourhood, itself included, that make a cluster
    config.noise.modality = "face"  # modality whose mean frames are clustered
    # epochs between two relabellings of the distractors in no cluster; 0: labels stay
    config.noise.relabel_every_epochs = 1.0
    # class of a distractor in no cluster for which the model predicts no identity: its own `label`,
    # or the `prediction` (a cluster or a mirror class)
    config.noise.keep = "label"
    # loss weight of distractors in no cluster: pairs (epoch, weight), linear between them
    config.noise.mirror_weight = ((0.0, 1.0),)
    # join short distractor clips and cut long ones in training. With `data.distractors` `noise` or
    # `other`
    config.noise.join = False

    config.eval = ConfigDict()  # evaluation and ranking
    # split to evaluate; it may be among `data.train_splits` only with folds or bootstrap samples
    config.eval.split = "val"
    config.eval.every_epochs = 0.0  # epochs between two evaluations; 0: one, after training
    config.eval.block_size = 256  # clips that a device scores at a time
    config.eval.scores = "log_softmax"  # scores that clips are ranked by
    # rank each clip only for this many identities, those with its highest scores; 0: for all
    config.eval.top_classes = 0
    # `mean` or `max` of the scores of a clip's examples. With `after_fusion=examples`
    config.eval.reduce = "mean"
    config.eval.members = True  # rank every member of an ensemble by itself, too
    config.eval.report = True  # write `analysis.npz` and `report.html` at the end
    # checkpoint that `--mode=evaluate` restores: `latest`, or `best` by MAP
    config.eval.checkpoint = "latest"

    # the network: `name` and the arguments of a model of `vidjax/models/identifier.py`
    config.model = ConfigDict()
    # modality -> `train` and `evaluate`: `name` and the arguments of a fusion of
    # `vidjax/fusion.py`. A modality that is not named keeps all its frames
    config.fusion = ConfigDict()

    config.loss = ConfigDict()  # the loss of the logits, and of the embeddings
    # first loss of the logits; its weight is 1 minus that of `loss.focal`, see `loss.schedule`
    config.loss.classification = "softmax"
    # second loss of the logits, weighted by `loss.schedule`: `binary`: the focal loss of each class
    # against the rest, summed over classes; `multiclass`: the focal loss of the softmax
    config.loss.focal = "binary"
    # focusing exponent of the focal loss, 0 or more; 0: cross-entropy
    config.loss.gamma = 2.0
    # weight of the loss `loss.focal`, 0 to 1: pairs (epoch, weight), linear between them
    config.loss.schedule = ((0.0, 0.0),)
    # margin of a cosine classifier in training, 0 to pi/2, in radians for `angular`; 0: none
    config.loss.margin = 0.0
    # kind of margin, used with losses that define none themselves. With `loss.margin` above 0
    config.loss.margin_type = "angular"
    config.loss.embedding = ""  # loss of the embeddings, beside that of the logits; empty: none
    # factor of the loss of the embeddings, 0 or more. With `loss.embedding`
    config.loss.embedding_weight = 1.0
    # share of the target that is spread over all classes in the softmax cross-entropy, from 0 to
    # below 1
    config.loss.label_smoothing = 0.0
    # share of the classes, above 0 to 1, that a training step compares its clips with: those of its
    # clips, and others drawn at random; 1: all classes
    config.loss.sampled_classes = 1.0

    config.optim = ConfigDict()  # the optimizer and its schedule
    config.optim.name = "adam"  # optimizer: `adam` or `sgd`
    config.optim.learning_rate = 1e-3  # learning rate at its peak
    # share of all training steps, 0 to 1, in which the learning rate rises to its peak
    config.optim.warmup = 0.1
    # learning rate at the start of the warm-up, relative to the peak, 0 to 1; 0: the peak divided
    # by the number of warm-up steps
    config.optim.warmup_scale = 0.0
    config.optim.decay = "cosine"  # learning rate after the warm-up: `cosine`, `steps`, `constant`
    # learning rate at the end, relative to the peak. With `optim.decay=cosine`
    config.optim.final_scale = 0.01
    # factor of the learning rate at every step of the stairs. With `optim.decay=steps`
    config.optim.decay_factor = 0.7
    # epochs between two steps of the stairs; a fraction is allowed. With `optim.decay=steps`
    config.optim.decay_every_epochs = 1.0
    # L2 penalty: this share of every weight matrix is added to its gradient
    config.optim.weight_decay = 0.0
    # decoupled weight decay over the whole run: without gradients a weight matrix would shrink by
    # exp(-total_decay)
    config.optim.total_decay = 0.0
    config.optim.momentum = 0.9  # momentum, 0 to 1. With `optim.name=sgd`
    # global norm that gradients are clipped to; 0: gradients are not clipped
    config.optim.clip_norm = 0.0

    # several runs as one ranking, by `--mode=evaluate --runs=A,B`
    config.join = ConfigDict()
    config.join.runs = ()  # folders of the runs; set by `--runs`
    config.join.weights = ()  # weight of each run, 0 or more, e.g. `2,1`; empty: equal weights
    # mean of the `probabilities` of the runs, or of their `logarithms`, which favours identities
    # that every run thinks possible
    config.join.mean = "probabilities"
    config.join.greedy = False  # choose the weights by MAP on `join.split`
    # split to choose weights on; each clip is scored by members that were not trained on it
    config.join.split = "train"

    config.mesh = ConfigDict()  # the devices
    # devices that share the classes: each holds its part of the classifier. The others share the
    # clips
    config.mesh.model = 1

    config.resume = ConfigDict()  # a run that goes on where an earlier process stopped
    # fields or groups that may differ from the values the run began with: `optim`, `loss`, `mixup`,
    # `num_epochs`, `log_every_steps` and `eval`, and the fields in them
    config.resume.allow = ()
    return config


def load_file(spec: str) -> Config:
    """Returns the configuration that an experiment's file describes.

    Args:
      spec: `FILE[:ARG,...]`, see `config_files.load_file`.

    Raises:
      ValueError: there is no such file, or a mistake in it.
    """
    config = config_files.load_file(spec)
    for problem in config_rules.misfits(dict(fields(config)), dict(fields(default()))):
        raise UserError(
            f"--config: '{spec}' {problem}\n"
            "begin get_config with config = vidjax.config.default(), and change that"
        )
    return config


def check(config: Config, *, fresh: bool = True) -> None:
    """Refuses values that no training can use, before there are data.

    Args:
      config: the configuration of a training.
      fresh: True for a training that starts, where a value that nothing reads is refused, too;
        False where a run goes on, whose configuration may be of an earlier version.

    Raises:
      ValueError: the first of the `problems`.
    """
    for problem in problems(config, fresh=fresh):
        raise UserError(problem)


def problems(config: Config, *, fresh: bool = True) -> Iterator[str]:
    """Yields an error message for every value that `check` refuses, with the same arguments."""
    values = dict(fields(config))
    yield from config_rules.out_of_range(values)
    yield from config_rules.untrainable(values)
    if fresh:
        yield from config_rules.unread(values, dict(fields(default())))


def to_json(config: Config) -> str:
    """Returns a configuration as JSON text."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


# Options of earlier versions -> the value that was without effect.
RETIRED = {
    "model": {"whitened": 0.0, "calibrated": []},
    "join": {"calibrate": False, "scale": 1.0, "offset": 0.0},
}


def from_json(text: str | bytes) -> Config:
    """Returns the configuration that `to_json` wrote, with tuples and unset fields as they were.

    Raises:
      ValueError: it is no JSON, or a value has another type than its field.
    """
    config, values = default(), files.parse_json(text)
    if not isinstance(values, dict):
        raise UserError("it is not a JSON object")
    for section, options in RETIRED.items():
        group = values.get(section)
        for name, without in options.items():
            if isinstance(group, dict) and group.get(name) == without:
                del group[name]
    try:
        with config.unlocked():
            config.update(_with_tuples(values))
    except (TypeError, AttributeError, KeyError) as error:
        raise UserError(" ".join(str(error).split())[:300]) from error
    return config


def _with_tuples(value: Any) -> Any:
    """Returns a value of JSON with its lists as tuples."""
    if isinstance(value, dict):
        return {key: _with_tuples(item) for key, item in value.items()}
    return tuple(_with_tuples(item) for item in value) if isinstance(value, list) else value


def load_workdir(workdir: Path) -> Config:
    """Returns the configuration of the run in a folder, which may be a stranger's.

    It names no cache: programs of a stranger's would run in this process.

    Raises:
      ValueError: there is none, or it is damaged.
    """
    path = workdir / "config.json"
    try:
        content = files.read_bytes(path, files.CONFIG_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"no run in '{workdir}' (no config.json)") from None
    try:
        config = from_json(content)
    except ValueError as error:
        raise UserError(f"'{path}' is damaged: {error}") from error
    config.data.cache_dir = None
    return config


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Returns field -> (old value, new value) for every field that differs and is read.

    A field that neither of the two configurations reads makes no difference.
    """
    before, after = dict(fields(old)), dict(fields(new))
    return {
        name: (before.get(name), after.get(name))
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
        and (config_rules.is_read(name, before) or config_rules.is_read(name, after))
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the fields and the arguments as Markdown tables, or writes them into a page."""
    words = list(sys.argv[1:] if argv is None else argv)

    def command() -> int:
        parser = messages.Parser(prog="python -m vidjax.config", description=main.__doc__)
        parser.add_argument("--write", type=Path, metavar="PAGE", help="e.g. configs/README.md")
        path = parser.parse_args(words).write
        page = path.read_text(encoding="utf-8") if path else None
        for name, content in documentation().items():
            if page is None:
                messages.say(content)
            else:
                page = config_docs.replace_section(page, name, content)
        if page is not None:
            path.write_text(page, encoding="utf-8")
        return 0

    return messages.guarded(command, words)


def documentation() -> Mapping[str, str]:
    """Returns section of `configs/README.md` -> its Markdown: `arguments`, `fields` and `names`."""
    known = config_docs.known_names()
    files = sorted(config_files.shipped_folder().glob("*.py"))
    words = {file.name: getattr(config_files.load_module(file), "WORDS", {}) for file in files}
    return {
        "arguments": config_docs.argument_table(SCALE_WORDS, words),
        "fields": config_docs.field_tables(
            inspect.getsource(default), dict(fields(default())), known
        ),
        "names": config_docs.name_tables(known),
    }


if __name__ == "__main__":
    messages.run(main)
