"""Every configuration field with its default; how configurations are read, overridden, kept."""

import ast
import copy
import difflib
import importlib.util
import json
import math
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_dict, config_flags

Config = Any  # a ConfigDict, whose fields no type checker can follow


def default() -> Config:
    """Returns a configuration with every field that every experiment has.

    The files in `configs/` start from this one and set `model`, `fusion` and what else differs.
    `model`, `fusion`, `loss` and `optim` are specifications, read by
    `models.identifier.make_identifier`, `fusion.make_fusion`, `losses.make_loss` and
    `optim.make_optimizer`.
    """
    config: Config = ConfigDict()
    config.seed = 0
    config.batch_size = 128  # clips a step, over all devices
    config.num_epochs = 1.0  # passes over the training clips; a fraction is allowed
    config.modalities = ("face",)
    config.dtype = "float32"  # of the computation; parameters stay float32
    config.matmul_precision = "highest"  # of evaluation, on every backend
    config.deterministic = False  # on a GPU, where runs else differ in the last bits
    config.after_fusion = "pool"  # the model takes all fused frames; or examples: one at a time
    config.transforms = ()  # further transforms of a training batch, by name: feature_noise
    config.mixup = 0.0  # alpha of the Beta distribution that mixes pairs of clips; 0: none
    config.log_every_steps = 20
    config.checkpoint_every_seconds = 300.0

    config.data = ConfigDict()
    config.data.name = "synthetic"  # or iqiyi_vid, arrays
    config.data.dir = config_dict.placeholder(str)  # folder of official files, or of arrays
    config.data.cache_dir = config_dict.placeholder(str)  # records; else $VIDJAX_CACHE
    config.data.size = "small"  # of the synthetic dataset; or standard
    config.data.seed = 0  # of the synthetic dataset and of the order of training records
    config.data.train_splits = ("train",)
    config.data.non_finite = "drop"  # frames with a NaN or an Inf in their feature; or error
    config.data.mode = "auto"  # resident: clips stay on the device; streaming; auto: if they fit
    config.data.max_frames = 64  # of a clip in training
    config.data.crop = "window"  # which ones of a longer clip; or quality
    config.data.distractors = "other"  # their column in training; or leave_out, noise
    config.data.weights = config_dict.placeholder(str)  # file of clip weights
    config.data.balance = 0.0  # clips of a class that has n of them weigh n ** -balance

    config.ensemble = ConfigDict()  # members: the product of all that varies
    config.ensemble.folds = 0  # every member leaves out one; 0: none
    config.ensemble.bootstraps = 0  # bootstrap samples; 0: none
    config.ensemble.views = 0  # members that leave out a chunk of the features; 0: none
    config.ensemble.chunks = 16  # of which a view leaves out one
    config.ensemble.min_quality = ()  # of the frames that a member is trained on
    config.ensemble.seeds = 1
    config.ensemble.only = ()  # numbers of the members to train here; all
    config.ensemble.mapping = "auto"  # map: members in turn; vmap: together; auto: map on CPU

    config.noise = ConfigDict()  # with data.distractors=noise
    config.noise.method = "dbscan"  # or hdbscan
    config.noise.eps = 0.9  # distance of neighbours, between unit vectors
    config.noise.min_samples = 2
    config.noise.modality = "face"  # what is clustered
    config.noise.relabel_every_epochs = 1.0
    config.noise.mirror_weight = ((0.0, 1.0),)  # (epoch, weight of unclustered noise)
    config.noise.join = False  # join short distractor clips, cut long ones

    config.eval = ConfigDict()
    config.eval.split = "val"
    config.eval.every_epochs = 0.0  # 0: once, after training
    config.eval.block_size = 256  # clips a device scores at a time
    config.eval.scores = "log_softmax"  # or log_sigmoid, logits
    config.eval.reduce = "mean"  # of a clip's examples; or max
    config.eval.members = True  # rank every member of an ensemble, too
    config.eval.report = True  # the command ends with analysis.npz and report.html
    config.eval.checkpoint = "latest"  # which one `--mode=evaluate` restores; or best

    config.model = ConfigDict()
    config.fusion = ConfigDict()  # modality -> {train: ..., evaluate: ...}; else all frames

    config.loss = ConfigDict()
    config.loss.classification = "softmax"  # loss of the logits beside the focal loss
    config.loss.focal = "binary"  # or multiclass
    config.loss.gamma = 2.0
    config.loss.schedule = ((0.0, 0.0),)  # (epoch, weight of focal); the rest is softmax
    config.loss.margin = 0.0  # margin of a cosine classifier, in radians
    config.loss.margin_type = "angular"  # kind of the margin
    config.loss.embedding = ""  # loss of the embeddings, e.g. triplet; empty for none
    config.loss.embedding_weight = 1.0  # its weight beside the loss of the logits
    config.loss.label_smoothing = 0.0  # of softmax

    config.optim = ConfigDict()
    config.optim.name = "adam"  # or sgd
    config.optim.learning_rate = 1e-3
    config.optim.warmup = 0.1  # share of all steps
    config.optim.warmup_scale = 0.0  # where the warm-up starts, relative to the peak
    config.optim.decay = "cosine"  # or steps, constant
    config.optim.final_scale = 0.01  # of cosine: learning rate at the end, relative to its peak
    config.optim.decay_factor = 0.7  # of steps
    config.optim.decay_every_epochs = 1.0  # of steps
    config.optim.weight_decay = 0.0  # added to the gradient
    config.optim.total_decay = 0.0  # log of what matrices shrink by over the whole run
    config.optim.momentum = 0.9  # of sgd
    config.optim.clip_norm = 0.0  # 0: gradients are not clipped

    config.join = ConfigDict()  # --mode=evaluate --runs=A,B
    config.join.runs = ()  # folders
    config.join.weights = ()  # of the runs; equal
    config.join.greedy = False  # choose weights on config.join.split
    config.join.split = "train"  # scored out of fold

    config.resume = ConfigDict()
    config.resume.allow = ()  # fields in which a run may go on otherwise than it began
    return config


SIZES = ("iqiyi_vid", "few", "standard")  # words that every configuration knows


def choose_data(config: Config, words: Collection[str]) -> bool:
    """Sets the dataset that words ask for; returns whether values of the published size apply.

    Args:
      config: changed in place.
      words: `iqiyi_vid` for official files, with `few` for some thousand clips of them; `standard`
        for the larger synthetic dataset.

    Raises:
      ValueError: words that contradict each other.
    """
    if {"iqiyi_vid", "standard"} <= set(words):
        raise ValueError("config arguments: 'iqiyi_vid' and 'standard' are two datasets")
    if "few" in words and "iqiyi_vid" not in words:
        raise ValueError("config arguments: 'few' goes with 'iqiyi_vid'")
    if "iqiyi_vid" in words:
        config.data.name = "iqiyi_vid"
    if "standard" in words:
        config.data.size = "standard"
    return "iqiyi_vid" in words and "few" not in words


def split_args(args: str, known: Sequence[str]) -> tuple[set[str], tuple[str, ...]]:
    """Splits what follows the colon of `--config=FILE:ARG,ARG` into known words and modalities.

    Args:
      args: the text after the colon, e.g. `iqiyi_vid,face,head`.
      known: the words that the configuration understands.

    Returns:
      The known words that were given, and the others, in order: names of modalities.
    """
    words = [word.strip() for word in args.split(",") if word.strip()]
    given = {word for word in words if word in known}
    modalities = tuple(dict.fromkeys(word for word in words if word not in known))
    for word in modalities:
        close = difflib.get_close_matches(word, known, n=1, cutoff=0.7)
        if close:
            raise ValueError(f"unknown config argument '{word}': did you mean '{close[0]}'?")
    return given, modalities


def load_file(spec: str) -> Config:
    """Returns the configuration that `FILE` or `FILE:ARG,ARG` describes.

    Args:
      spec: path of a Python file with a function `get_config(args: str)`, and its arguments.

    Raises:
      ValueError: no such file, or no `get_config` in it.
    """
    name, _, args = spec.partition(":")
    path = Path(name)
    if not path.is_file():
        folder = path if path.is_dir() else path.parent
        near = sorted(str(folder / p.name) for p in folder.glob("*.py")) if folder.is_dir() else []
        close = difflib.get_close_matches(str(path), near, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"there: {', '.join(near) or 'nothing'}"
        raise ValueError(f"--config: no such file '{name}'\n{hint}")
    module_spec = importlib.util.spec_from_file_location(f"vidjax_config_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise ValueError(f"--config: '{name}' is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(f"--config: '{name}' has no function get_config")
    return module.get_config(args)


def fields(config: Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted name, value) of every leaf of a configuration."""
    for key in config:
        value = config.get_ref(key).get() if config.get_type(key) is not ConfigDict else config[key]
        if isinstance(value, ConfigDict):
            yield from fields(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def override(config: Config, overrides: Sequence[str]) -> Config:
    """Returns a copy of a configuration with `--config.a.b=value` applied to it.

    Args:
      config: the configuration; its values fix the types.
      overrides: command-line words, each beginning with `--config.`; a tuple may be written
        `face,head` or as a Python tuple.

    Raises:
      ValueError: a field that does not exist, or a value of another type.
    """
    config = copy.deepcopy(config)  # ConfigDict(config) would share its nested fields
    known = dict(fields(config))
    words = {}  # the last one of a field counts; tuples would be strung together
    for word in overrides:
        name, equals, value = word.removeprefix("--config.").partition("=")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.5) or [
                key for key in known if key.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]
            ]
            hint = f": did you mean --config.{close[0]}?" if close else ""
            raise ValueError(f"no field config.{name}{hint}")
        if not equals:
            raise ValueError(f"--config.{name} needs a value: --config.{name}=...")
        if isinstance(known[name], tuple):
            items = _as_tuple(value)
            kind = type(known[name][0]) if known[name] else None
            if kind is str and not all(isinstance(item, str) for item in items):
                raise ValueError(f"config.{name}={value}: wants names such as {known[name][0]}")
            value = repr(items)
        words[name] = f"--config.{name}={value}"
    values = flags.FlagValues()
    argv = ["vidjax", *words.values()]
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    try:
        values(argv)
    except (flags.Error, ValueError, TypeError) as error:
        said = str(error).splitlines()[0]
        for name, word in words.items():
            if "invalid literal" in said and word.split("=", 1)[1] in said:
                said = f"{word}: wants a number such as {known[name]}"
        raise ValueError(said) from error
    changed = values["config"].value
    for name, value in fields(changed):
        if isinstance(value, float) and math.isnan(value):
            raise ValueError(f"config.{name}=nan: wants a number")
    return changed


def _as_tuple(text: str) -> tuple[Any, ...]:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = tuple(word.strip() for word in text.split(",") if word.strip())
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def to_json(config: Config) -> str:
    """Returns a configuration as JSON text."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def from_json(text: str) -> Config:
    """Returns the configuration that `to_json` wrote, with tuples and unset fields as they were."""
    config = default()
    with config.unlocked():
        config.update(_tuples(json.loads(text)))
    return config


def load_workdir(workdir: Path) -> Config:
    """Returns the configuration of the run in a folder.

    Raises:
      ValueError: there is none, or it is damaged.
    """
    path = workdir / "config.json"
    if not path.is_file():
        raise ValueError(f"--workdir: no run in '{workdir}' (no config.json)")
    try:
        return from_json(path.read_text())
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"'{path}' is damaged: {error}") from error


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Returns field -> (old value, new value) for every field that differs."""
    before, after = dict(fields(old)), dict(fields(new))
    return {
        name: (before.get(name), after.get(name))
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    }
