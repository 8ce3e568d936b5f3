"""Verification: does a clip show a given person, and do two clips show the same person?"""

import json

import numpy as np
import pytest
from scipy import stats

from tests.helpers import clip_files, made_galleries, servers
from tests.helpers.made_galleries import make_clip, vectors_of
from tests.helpers.seen import refused
from vidjax.apps.gallery import backend as backend_lib, index, verification
from vidjax.apps.gallery.gallery import Gallery
from vidjax.apps.gallery.store import StoredClip
from vidjax.apps.gallery.verification import MAX_PAIRS, Match
from vidjax.models import two_covariance

parquet = pytest.importorskip("pyarrow.parquet")
MAKERS = (made_galleries.make, made_galleries.make_with_cards)
SHOWN = {
    f"q{n}": make_clip(700 + n, f"person {n % 6}", lacks=("", "face", "audio")[n % 3])
    for n in range(70)
}


@pytest.fixture(params=MAKERS, ids=("plda", "card"))
def people(request, tmp_path):
    return request.param(tmp_path / "g", made_galleries.make_clips(strangers=120))


def assert_equal(found, wanted):
    """Asserts that comparisons are equal to 1e-6."""
    assert found.keys() == wanted.keys()
    for key, match in found.items():
        for one, other in zip(flatten(match), flatten(wanted[key]), strict=True):
            assert one == pytest.approx(other, abs=1e-6), key


def flatten(match):
    """Returns all values of a comparison."""
    return [*match[:3], *match.evidence, *(match.best or ()), *(match.worst or ())]


def test_ratio_is_the_ratio_of_identify(people):
    """P(person) / P(stranger) = ratio x the prior odds of the person."""
    shown = vectors_of(people, SHOWN)
    matches = people.verify(shown, "person 3")
    new = two_covariance.compute_stranger_logit(people.backend.settings, len(people))
    nearest = people.index.nearest([*shown.parts.values()], len(people))
    for match, found in zip(matches.values(), nearest, strict=True):
        ratio = dict(found.best)["person 3"] - found.new + float(new)
        assert match.log_ratio == pytest.approx(ratio, abs=1e-6)
        assert match.probability == pytest.approx(1 / (1 + np.exp(-ratio)))
    found = people.identify(shown, threshold=1e-9)
    compared = {clip: x.evidence for clip, x in found.items() if x.identity == "person 3"}
    assert compared and compared == {clip: matches[clip].evidence for clip in compared}


def test_answers_are_equal_in_any_batch_and_order(people):
    whole = people.verify(vectors_of(people, SHOWN), "person 3")
    singly = {}
    for clip in reversed(SHOWN):
        singly |= people.verify(vectors_of(people, {clip: SHOWN[clip]}), "person 3")
    assert_equal({clip: singly[clip] for clip in whole}, whole)


def log_density(z, variance, covariance):
    """Returns the log density of the Gaussian pair `z` [2]."""
    matrix = np.array([[variance, covariance], [covariance, variance]])
    return -(z @ np.linalg.solve(matrix, z) + np.log(np.linalg.det(2 * np.pi * matrix))) / 2


def pair_oracle(gallery, one, other):
    """Returns the log ratio of two clips, from densities of Gaussians and of gamma variables."""
    backend, total = gallery.backend, 0.0
    parts = zip(backend.parts, *(backend.split(x.vector[None]) for x in (one, other)), strict=True)
    present = [(part, x, y) for part, x, y in parts if x.any() and y.any()]
    for part, x, y in present:
        a, b = (backend_lib.unit(part, v)[0] for v in (x, y))
        if part.space is None:
            d, square = part.distances, np.sum((a - b) ** 2)
            limits = (d.same, d.within), (d.different, d.within + d.between)
            logs = [stats.gamma.logpdf(square, n, scale=2 * v / n) for n, v in limits]
            ratio = logs[0] - logs[1]
        else:
            z = np.stack([(v - part.space.mean) @ part.space.transform for v in (a, b)], axis=1)
            logs = [
                sum(map(lambda at, psi: log_density(at, 1 + psi, c * psi), z, part.space.ratio))
                for c in (1, 0)
            ]  # fmt: skip
            ratio = backend.settings.scale * (logs[0] - logs[1])
        if part.may_be_offscreen and len(present) > 1:
            ratio = np.clip(ratio, -np.log(9), np.log(9))
        total += ratio
    return total


def test_two_clips_are_compared_as_by_an_oracle_in_either_order(people):
    few = dict([*SHOWN.items()][:9])
    shown, names = vectors_of(people, few), [*few]
    matches = people.compare(shown, shown)
    assert len(matches) == 81
    for (one, other), match in matches.items():
        if one != other:
            wanted = pair_oracle(people, few[one], few[other])
            assert match.log_ratio == pytest.approx(wanted, abs=1e-6), (one, other)
            likely = match.log_ratio >= people.match_rule().log_ratio
            assert match.accepted == (likely and bool(match.evidence))
    swapped = {(other, one): match for (one, other), match in matches.items()}
    assert_equal({key: swapped[key] for key in matches}, matches)
    pairs = people.compare(shown)
    assert [*pairs] == [(a, b) for n, a in enumerate(names) for b in names[n + 1 :]]
    assert_equal(pairs, {key: matches[key] for key in pairs})


def test_best_and_worst_clips_of_the_person_are_named(people):
    shown = vectors_of(people, SHOWN)
    matches = people.verify(shown, "person 3")
    clips = {name: people.clips[name] for name in people.people["person 3"]}
    pairs = people.compare(shown, vectors_of(people, clips))
    for clip, match in matches.items():
        ratios = {name: x.log_ratio for name in clips if (x := pairs[clip, name]).evidence}
        if ratios:
            assert match.best is not None and match.worst is not None
            assert match.best[1] == pytest.approx(max(ratios.values()), abs=1e-6)
            assert match.worst[1] == pytest.approx(min(ratios.values()), abs=1e-6)
            assert ratios[match.best[0]] == pytest.approx(match.best[1], abs=1e-6)
            best, worst = ({"clip": x[0], "log_ratio": x[1]} for x in (match.best, match.worst))
            assert (match.to_dict()["best"], match.to_dict()["worst"]) == (best, worst)


def test_clip_without_a_common_modality_is_not_accepted(tmp_path):
    clips = {"a": make_clip(1, "Ada", lacks="audio")}
    for make in MAKERS:
        people = make(tmp_path / make.__name__, clips)
        voice, none = make_clip(2, "Ada", lacks="face"), StoredClip(None, 0 * clips["a"].vector)
        shown = vectors_of(people, {"voice": voice, "none": none})
        for match in people.verify(shown, "Ada").values():
            assert match == Match(False, 0.0, 0.5, ())
        assert people.compare(shown)["voice", "none"] == Match(False, 0.0, 0.5, ())


def test_threshold_is_measured_on_strangers_or_follows_from_the_model(people, tmp_path):
    """Of 120 strangers, one may reach a threshold for 2 %: (1 + 1) / (120 + 1) is below 0.02."""
    strangers = {name: people.clips[name] for name in people.strangers}
    matches = people.verify(vectors_of(people, strangers), "person 3", fmr=0.02)
    rule = people.match_rule("person 3", fmr=0.02)
    assert sum(match.accepted for match in matches.values()) == 1
    limit = rule.threshold
    assert (rule.by, limit.num_alarms, limit.num_strangers) == ("measured", 1, 120)
    low, high = limit.interval
    wanted = stats.beta(2, 119).ppf([0.025, 0.975])
    assert [low, high] == pytest.approx(wanted, rel=1e-6)
    assert people.match_rule("person 3").fmr == 0.01
    pairs = people.match_rule(fmr=0.02)
    assert (pairs.by, pairs.threshold.num_strangers) == ("measured", 60)
    assert people.match_rule().by == "model"  # 1 % of pairs needs 198 strangers
    assert people.match_rule().log_ratio == pytest.approx(np.log(100))
    people.remove(clip=people.strangers[0])  # changes the measured threshold
    assert people.match_rule("person 3", fmr=0.02).threshold.num_strangers == 119


def test_rates_and_people_of_clients_do_not_fill_the_memory(people, monkeypatch):
    monkeypatch.setattr(index, "MOST_REMEMBERED", 5)
    names, rates = [*people.identities], np.linspace(0.02, 0.5, 30).tolist()
    first = [people.match_rule(name, fmr=rate) for name in names[:3] for rate in rates]
    for name in names:
        people.match_rule(name)
        assert len(people.index._known) <= 5
    assert [people.match_rule(name, fmr=rate) for name in names[:3] for rate in rates] == first


def test_one_answer_is_of_one_content_of_the_gallery(people, monkeypatch):
    """Another process changes the gallery while a clip is compared."""
    shown, wanted = vectors_of(people, SHOWN), people.match_rule("person 3")
    misfits, other = people.find_misfits("person 3"), Gallery(people.folder)
    make_matches = verification.make_matches

    def change(*words):
        other.remove(clip=other.strangers)
        other.rename("person 3", "person 33")
        return make_matches(*words)

    monkeypatch.setattr(verification, "make_matches", change)
    done = people.verify_person(shown, "person 3")
    assert (done.rule, done.misfits) == (wanted, misfits) and wanted.by == "measured"
    assert {x.accepted for x in done.matches.values()} == {True, False}
    refused(lambda: people.match_rule("person 3"), "person 33")


def test_wrong_use_names_the_remedy(people):
    shown = vectors_of(people, SHOWN)
    for action, *words in (
        (lambda: people.verify(shown, "Person 3"), "did you mean 'person 3'", "gallery list"),
        (lambda: people.verify(shown, None), "the name of a person"),
        (lambda: people.verify(shown, "person 3", fmr=1.0), "above 0 and below 1"),
        (lambda: people.verify(shown, "person 3", fmr="1 %"), "a number, or None"),
        (lambda: people.verify(shown, "person 3", fmr=0.001), "999 clips of strangers",
         "has 120", "the lowest is 0.0083", "enrol more strangers"),
        (lambda: people.compare(shown, fmr=0.001), "1,998", "0.016"),
        (lambda: people.compare(shown.only({"q1"})), "at least two clips"),
        (lambda: people.compare(shown, shown.only(())), "give at least one"),
    ):  # fmt: skip
        refused(action, *words)
    names = tuple(f"q{n}" for n in range(MAX_PAIRS))
    many = shown._replace(names=names, labels=(None,) * len(names))
    many = many._replace(parts={k: np.ones((len(names), x.shape[1]), np.float32) for k, x in
                                shown.parts.items()})  # fmt: skip
    refused(lambda: people.compare(many), "give fewer clips")


def test_misfits_have_the_median_ratio_of_the_other_clips(people):
    """A clip is not compared with itself. Some people have a clip of somebody else.

    With 9 clips, the median differs from the mean, and photos that fit are not named.
    """
    more = {f"more {n}": make_clip(40_000 + n, "person 3") for n in range(4)}
    made_galleries.add(people, more)
    for number in range(0, 6, 2):
        people.relabel(people.people[f"person {number}"][0], f"person {number + 1}")
    sizes = set()
    for name, clips in people.people.items():
        shown = vectors_of(people, {clip: people.clips[clip] for clip in clips})
        pairs = people.compare(shown, shown).items()
        wanted = {}
        for clip in clips:
            others = [x.log_ratio for pair, x in pairs if clip == pair[0] != pair[1] and x.evidence]
            if others and np.median(others) < 0:
                wanted[clip] = np.median(others)
                sizes.add(len(others))
        found = people.find_misfits(name)
        assert found == pytest.approx(wanted, abs=1e-6)
        assert [*found.values()] == sorted(found.values())
        if name == "person 3":
            assert len(clips) == 9 and [*found] == ["clip 20"]
    assert len(sizes) > 1


@pytest.fixture
def tell(say):
    """Returns a function that runs `vidjax gallery verify WORDS`."""
    return lambda *words, **more: say("gallery", "verify", *words, **more)


def frames(*numbers):
    """Returns clips of the persons 0, 1, ..., for files: clip -> modality -> features [T, D]."""
    return {f"q{n}": servers.make_frames(7000 + 10 * n, f"person {n}", 2) for n in numbers}


def as_rows(matches, second):
    """Returns comparisons as rows of a table. `second` is the second column, and its values."""
    for (key, match), other in zip(matches.items(), second[1], strict=True):
        fits = {"best": match.best, "worst": match.worst}
        row = {"clip": key if isinstance(key, str) else key[0], second[0]: other}
        row |= dict(zip(("accepted", "log_ratio", "probability"), match, strict=False))
        for name, found in fits.items():
            row |= {name: found and found[0], f"{name}_log_ratio": found and found[1]}
        yield row


def test_command_prints_and_writes_the_answers_of_python(tell, tmp_path):
    people = made_galleries.make_with_cards(
        tmp_path / "g", made_galleries.make_clips(strangers=120)
    )
    for name, numbers in (("a", (3, 4)), ("b", (3, 5)), ("one", (1,))):
        clip_files.write_npz(tmp_path, {name: frames(*numbers)})
    given, pairs = f"--input={tmp_path}/a", [("q3", "q3"), ("q3", "q5"), ("q4", "q3"), ("q4", "q5")]
    wanted = people.verify(people.load(tmp_path / "a"), "person 3")
    compared = people.compare(people.load(tmp_path / "a"), people.load(tmp_path / "b"))
    assert [*compared] == pairs and wanted["q3"].accepted and not wanted["q4"].accepted
    words = ("--identity=person 3", "--fmr=0.01")
    for flags, matches, second in (
        (words, wanted, ("identity", ["person 3"] * 2)),
        ([f"--with={tmp_path}/b"], compared, ("other", [pair[1] for pair in pairs])),
    ):
        rows, out = [*as_rows(matches, second)], tmp_path / f"{second[0]}.parquet"
        tell(tmp_path / "g", given, *flags, f"--out={out}")
        assert parquet.read_table(out).to_pylist() == rows
        assert tell(tmp_path / "g", given, *flags, "--json")["answers"] == [
            {"clip": row["clip"], second[0]: row[second[0]], **match.to_dict()}
            for row, match in zip(rows, matches.values(), strict=True)
        ]
    tell(tmp_path / "g", given, *words, f"--out={tmp_path}/identity.jsonl")
    lines = map(json.loads, (tmp_path / "identity.jsonl").read_text().splitlines())
    assert [*lines] == tell(tmp_path / "g", given, *words, "--json")["answers"]
    printed = tell(tmp_path / "g", given, *words)
    assert "yes" in printed and "accepted    1" in printed, printed
    assert "measured on 120 comparisons, of which 0 reach it" in printed
    assert "log ratio is 4.60517 or more" in tell(tmp_path / "g", given)  # the two clips of --input
    for flags, word in (
        ((given, "--identity=Person 3"), "did you mean 'person 3'"),
        ((given, "--identity=person 3", "--fmr=1%"), "write 0.01"),
        ((given, "--identity=person 3", "--fmr=0.001"), "the lowest is 0.0083"),
        ((given, "--identity=person 3", f"--with={tmp_path}/b"), "cannot be used together"),
        ((f"--input={tmp_path}/one",), "--with=PATH"),
        ((given, f"--with={tmp_path}/none"), "none"),
        ((given, *words, f"--out={tmp_path}/identity.jsonl"), "exists and is not overwritten"),
    ):
        assert word in tell(tmp_path / "g", *flags, code=2)


def test_command_names_clips_that_do_not_fit(tell, tmp_path):
    clips = made_galleries.make_clips(strangers=0)
    clips["wrong"] = make_clip(9000, "nobody")._replace(identity="person 3")
    made_galleries.make_with_cards(tmp_path / "g", clips)
    clip_files.write_npz(tmp_path, {"a": frames(3)})
    words = (tmp_path / "g", f"--input={tmp_path}/a", "--identity=person 3")
    assert "wrong: unlike most other clips of the person" in tell(*words)
    found = tell(*words, "--json")
    assert [*found["misfits"]] == ["wrong"] and found["rule"]["by"] == "model"
    assert found["answers"][0]["worst"]["clip"] == "wrong"
