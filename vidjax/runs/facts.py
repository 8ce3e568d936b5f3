"""Defines facts about a training, such as the run whose weights the training started with.

Training writes each fact to `manifest.json` of every checkpoint and to `metrics.json`. The summary
of a run, the report and comparisons of runs describe the facts in `FACTS`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from msgspec import Struct

from vidjax.utils import messages
from vidjax.utils.json_files import Count, NotNaN, Text, Whole

# The pairs (step, num_epochs) of an extended run: from this step on, it had this `num_epochs`.
Epochs = list[tuple[Whole, float]]


def describe_epochs(epochs: Epochs) -> str:
    """Returns "5, 8 from step 15" if `config.num_epochs` changed from 5 to 8 at step 15."""
    (_, first), *later = epochs
    return f"{first:g}" + "".join(f", {number:g} from step {step:,}" for step, number in later)


class Source(Struct, kw_only=True):
    """The run from which another run took its first weights (`config.init_from`)."""

    run: Text  # its folder
    step: Whole
    sha256: Text  # of the digests of the files of its checkpoint
    arrays: Count  # number of loaded arrays
    identities: Count  # number of identities that it was trained on, too

    def describe(self) -> str:
        """Returns a text: folder and step of the run, numbers of loaded arrays and identities."""
        loaded = f"{messages.count(self.arrays, 'array')}, {self.identities:,} identities"
        return f"{self.run}, step {self.step:,}: {loaded}"


class EarlyStop(Struct, kw_only=True):
    """The best evaluation so far of a run whose training may end early (`config.early_stop`)."""

    metric: Text
    best: NotNaN
    step: Whole  # of the best evaluation
    waited: Count = 0  # number of evaluations since then
    stopped: bool = False  # True if training ended for this reason

    def describe(self) -> str:
        """Returns why the training ended early, or "" if it did not end early."""
        waited = messages.count(self.waited, "evaluation")
        reason = f"{self.metric} has not improved since step {self.step:,}, for {waited}"
        return reason if self.stopped else ""


class Fact(Struct, frozen=True, kw_only=True):
    """An entry of `metrics.json` about the training, such as `early_stop`, and how it is shown."""

    key: str  # of its entry in manifests and in `metrics.json`
    kind: Any  # the type of the value
    describe: Callable[[Any], str]  # value -> text, or "" if there is nothing to say
    # True: an evaluation keeps the entry of `metrics.json`. False: it writes the entry of the
    # checkpoint that is scored.
    is_kept: bool = True
    label: str  # of the row in the summary and in the report
    sentence: str = ""  # in a comparison, with `{run}` and `{text}`; "": comparisons skip the fact

    def read(self, values: Mapping[str, Any]) -> object:
        """Returns the value of the fact, or None if `values` do not contain the fact.

        `values` is the content of `manifest.json` or `metrics.json`.
        """
        value = values.get(self.key)
        return msgspec.convert(value, self.kind) if value else None

    def text(self, values: Mapping[str, Any]) -> str:
        """Returns a description of the fact, or "" if `values` do not contain the fact.

        `values` is the content of `manifest.json` or `metrics.json`.
        """
        value = self.read(values)
        return self.describe(value) if value else ""


EXTENDED = Fact(
    key="extended", kind=Epochs, describe=describe_epochs, is_kept=False, label="epochs",
    sentence="Extended: the number of epochs of {run} is {text}.",
)  # fmt: skip
INIT_FROM = Fact(key="init_from", kind=Source, describe=Source.describe, label="init_from")
EARLY_STOP = Fact(
    key="early_stop", kind=EarlyStop, describe=EarlyStop.describe, label="ended early"
)
FACTS = (EXTENDED, INIT_FROM, EARLY_STOP)  # in the order of `metrics.json`


class Entries(Struct, kw_only=True):
    """The entries of `manifest.json` and `metrics.json` that contain facts about the training."""

    extended: Epochs | None = None
    init_from: Source | None = None
    early_stop: EarlyStop | None = None


def read_facts(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns facts about a training, such as `early_stop` and `init_from`: key -> value.

    `values` is the content of `manifest.json` or `metrics.json`.
    """
    return {fact.key: value for fact in FACTS if (value := fact.read(values))}


def to_json(values: Mapping[str, Any], *, only: bool | None = None) -> dict[str, Any]:
    """Converts facts about a training to entries of `manifest.json` or `metrics.json`.

    `values` is key -> value, as `read_facts` returns. Keys that are not in `FACTS` are ignored. If
    `only` is True or False, converts only facts with this value of `Fact.is_kept`. Returns key ->
    JSON value.
    """
    chosen = (fact.key for fact in FACTS if values.get(fact.key) and only in (None, fact.is_kept))
    return {key: msgspec.to_builtins(values[key]) for key in chosen}
