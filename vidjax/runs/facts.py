"""Defines the facts about a training, such as the run whose weights it started with.

Training writes each fact to the manifests of checkpoints and to `metrics.json`. The summary, the
report and comparisons describe the facts in `FACTS`.
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
    """Returns the epochs of an extended run, such as `5, 8 from step 15`."""
    (_, first), *later = epochs
    return f"{first:g}" + "".join(f", {number:g} from step {step:,}" for step, number in later)


class Source(Struct, kw_only=True):
    """The run whose weights a training started with."""

    run: Text  # its folder
    step: Whole
    sha256: Text  # of the digests of the files of its checkpoint
    arrays: Count  # number of loaded arrays
    identities: Count  # number of identities that it was trained on, too

    def describe(self) -> str:
        """Returns the folder and the step of the run, and what was loaded."""
        loaded = f"{messages.count(self.arrays, 'array')}, {self.identities:,} identities"
        return f"{self.run}, step {self.step:,}: {loaded}"


class EarlyStop(Struct, kw_only=True):
    """The best evaluation so far of a run with `early_stop.patience`."""

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
    """A fact about a training, and how it is described."""

    key: str  # of its entry in manifests and in `metrics.json`
    kind: Any  # the type of the value
    describe: Callable[[Any], str]  # value -> text, or "" if there is nothing to say
    # True: an evaluation keeps the entry of `metrics.json`. False: it writes the entry of the
    # checkpoint that is scored.
    is_kept: bool = True
    label: str  # of the row in the summary and in the report
    sentence: str = ""  # in a comparison, with `{run}` and `{text}`; "": comparisons skip the fact

    def read(self, values: Mapping[str, Any]) -> object:
        """Returns the value of the fact in a manifest or in `metrics.json`, or None."""
        value = values.get(self.key)
        return msgspec.convert(value, self.kind) if value else None

    def text(self, values: Mapping[str, Any]) -> str:
        """Describes the fact in a manifest or in `metrics.json`. Without the fact, returns ""."""
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
    """The entries of the facts in a manifest or in `metrics.json`."""

    extended: Epochs | None = None
    init_from: Source | None = None
    early_stop: EarlyStop | None = None


def read_facts(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns key -> value of the facts in a manifest or in `metrics.json`."""
    return {fact.key: value for fact in FACTS if (value := fact.read(values))}


def to_json(values: Mapping[str, Any], *, only: bool | None = None) -> dict[str, Any]:
    """Returns entries for a manifest or `metrics.json`: key -> JSON value.

    `values` are the result of `read_facts`, or other entries. If `only` is given, only facts with
    this value of `is_kept` are returned.
    """
    chosen = (fact.key for fact in FACTS if values.get(fact.key) and only in (None, fact.is_kept))
    return {key: msgspec.to_builtins(values[key]) for key in chosen}


def list_rows(values: Mapping[str, Any]) -> dict[str, str]:
    """Returns label -> text of the facts in `metrics.json`."""
    return {fact.label: text for fact in FACTS if (text := fact.text(values))}


def list_sentences(run: str, values: Mapping[str, Any]) -> list[str]:
    """Returns sentences about the facts of a run, for the text that compares runs."""
    texts = ((fact.sentence, fact.text(values)) for fact in FACTS if fact.sentence)
    return [sentence.format(run=run, text=text) for sentence, text in texts if text]
