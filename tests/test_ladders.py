"""Every rung of the ladders changes one thing: two configurations are compared field by field."""

import functools
import re

from tests.benchmarks import ladders, scores
from tests.benchmarks.ladders import FACTORS, KNOBS, LADDERS, ROWS, TOGETHER
from vidjax import config as config_lib
from vidjax import config_io

RUNGS = [rung for rungs in LADDERS.values() for rung in rungs if rung.base]
# Fields that two systems must share to be compared as systems.
SHARED = ("modalities", "seed", "data.name", "data.seed", "data.train_splits", "ensemble")


@functools.cache
def fields(key):
    """Returns the fields of a row; of a net with a second one for poor clips, those of its main."""
    row = ROWS[key]
    spec = ":".join(filter(None, (f"{scores.CONFIGS}/{row.config}.py", row.arguments)))
    config = config_io.override(config_io.load_file(spec), row.overrides.split())
    values = dict(config_lib.fields(config))
    found = {**values, "read": {name for name in values if config_lib.is_read(name, values)}}
    for name, value in values.items():
        if name.startswith("model.main."):
            found[name.replace(".main.", ".")] = found.pop(name)
        elif name.startswith("fusion.") and name.endswith(".probs") and value[0] == sum(value):
            for option in ("probs", "max_frames", "weighting", "replacement"):  # of one frame
                found.pop(name.replace("probs", option), None)
            found[name.replace("probs", "max_frames")] = 1
        elif name.endswith((".min_quality", ".min_detection")) and value in (-1000, 0):
            found.pop(name)  # no bound
    return found


def factor(name, added):
    """Returns the factor of a field; `added` are modalities that one of the two rows lacks."""
    of_added = "modalities", "model.name", *(f"fusion.{one}." for one in added)
    second = r"model\.(other|main_|missing_scale|threshold|measure)"  # the net of the second
    if added and (name.startswith(of_added) or re.match(second, name)):
        return "modalities"
    named = (known for known, pattern in FACTORS.items() if re.fullmatch(pattern, name))
    return next(named, name)


def factors(rung):
    """Returns what the row of a rung has otherwise than its base."""
    new, base = ROWS[rung.key], ROWS[rung.base]
    if new.joined:
        joined = {*(base.joined or (rung.base,))}
        return {"joined"} if joined < {*new.joined} else {"joined", "others"}
    old, now = fields(rung.base), fields(rung.key)
    unread = {name for name in config_lib.FIELDS if name not in old["read"] | now["read"]}
    both = (old | now).keys() - unread - {"read"}
    changed = {name for name in both if old.get(name) != now.get(name)}
    if new.config != base.config:
        return {"system", *(name for name in changed if config_lib.within(name, SHARED))}
    added = {*old["modalities"]} ^ {*now["modalities"]}
    return {factor(name, added) for name in changed}


def pair(rung):
    """Returns the name of a comparison without the knob that is turned in both rows."""
    return re.sub(rf"_({'|'.join(KNOBS)})\b", "", scores.pair_name(rung))


def test_every_rung_is_one_factor_or_several_in_the_words_of_the_publication():
    several = {pair(rung): factors(rung) for rung in RUNGS if len(factors(rung)) != 1}
    assert several.keys() == TOGETHER.keys(), several


def test_two_factors_would_be_seen():
    rung = ladders.Rung("attention and NetVLAD", "mma", "mma_mean")
    assert factors(rung) == {"model.attention", "model.netvlad"}
    assert factors(rung._replace(key="deepmef")) > {"system"}


def test_a_reason_is_shown_or_not_known():
    reasons = {rung.why for rung in RUNGS if rung.why}
    assert not [why for why in reasons if "perhaps" in why or "likely" in why]
