"""Verification: does a clip show a given person, and do two clips show the same person?"""

import functools
import json
import shutil

import numpy as np
import pytest
import scipy

from tests.helpers import clip_files, made_galleries, made_nets, servers
from tests.helpers.embeddings import DIFFERENT, SAME, WIDTH, Population
from tests.helpers.made_galleries import make_clip, vectors_of
from tests.helpers.seen import refused
from vidjax.apps.cards import BackEnd
from vidjax.apps.gallery import backend as backend_lib, index, verification
from vidjax.apps.gallery.gallery import Gallery
from vidjax.apps.gallery.store import StoredClip, VectorOrigin
from vidjax.apps.gallery.verification import MAX_PAIRS, Match
from vidjax.models import two_covariance

parquet = pytest.importorskip("pyarrow.parquet")
MAKERS = (made_galleries.make, made_galleries.make_with_cards)
SHOWN = {
    f"q{n}": make_clip(700 + n, f"person {n % 6}", lacks=("", "face", "audio")[n % 3])
    for n in range(70)
}


@pytest.fixture(scope="module", params=MAKERS, ids=("plda", "card"))
def people(request, tmp_path_factory):
    """A gallery with 120 strangers, which no test changes."""
    folder = tmp_path_factory.mktemp("people") / "g"
    return request.param(folder, made_galleries.make_clips(strangers=120))


@pytest.fixture
def copied(people, tmp_path):
    """A copy of the gallery, for a test that changes it."""
    return Gallery(shutil.copytree(people.folder, tmp_path / "copied"))


def assert_equal(found, wanted):
    """Asserts that comparisons are equal to 1e-6."""
    assert found.keys() == wanted.keys()
    for key in found:
        pair = found[key], wanted[key]
        one, other = ([*x[:3], *x.evidence, *(x.best or ()), *(x.worst or ())] for x in pair)
        assert one == [pytest.approx(value, abs=1e-6) for value in other], key


def test_ratio_is_that_of_identify_in_any_batch_and_names_best_and_worst_clips(people):
    """P(person) / P(stranger) = ratio x the prior odds of the person."""
    shown = vectors_of(people, SHOWN)
    matches = people.verify(shown, "person 3")
    new = two_covariance.compute_stranger_logit(people.backend.settings, len(people))
    nearest = people.index.nearest([*shown.parts.values()], len(people))
    for match, found in zip(matches.values(), nearest, strict=True):
        ratio = dict(found.best)["person 3"] - found.new + float(new)
        assert match.log_ratio == pytest.approx(ratio, abs=1e-6)
        assert match.probability == pytest.approx(1 / (1 + np.exp(-ratio)))
    # The best and the worst clip of the person.
    clips = {name: people.clips[name] for name in people.people["person 3"]}
    pairs = people.compare(shown, vectors_of(people, clips))
    for clip, match in matches.items():
        ratios = {name: x.log_ratio for name in clips if (x := pairs[clip, name]).evidence}
        for found, choose in ((match.best, max), (match.worst, min)) if ratios else ():
            value, name = choose((value, name) for name, value in ratios.items())
            assert found == (name, pytest.approx(value))
    found = people.identify(shown, threshold=1e-9)
    compared = {clip: x.evidence for clip, x in found.items() if x.identity == "person 3"}
    assert compared and compared == {clip: matches[clip].evidence for clip in compared}
    for clip in [*SHOWN][::-7]:
        single = people.verify(vectors_of(people, {clip: SHOWN[clip]}), "person 3")
        assert_equal(single, {clip: matches[clip]})


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
            logs = [scipy.stats.gamma.logpdf(square, n, scale=2 * v / n) for n, v in limits]
            ratio = logs[0] - logs[1]
        else:
            z = np.stack([(v - part.space.mean) @ part.space.transform for v in (a, b)], axis=1)
            logs = [
                sum(scipy.stats.multivariate_normal.logpdf(at, cov=np.eye(2) + psi * of_one)
                    for at, psi in zip(z, part.space.ratio, strict=True))
                for of_one in (np.ones((2, 2)), np.eye(2))
            ]  # fmt: skip
            ratio = backend.settings.scale * (logs[0] - logs[1])
        if part.name == "audio" and part.distances and len(present) > 1:
            ratio = np.clip(ratio, -np.log(9), np.log(9))
        total += ratio
    return total


def test_two_clips_are_compared_as_by_an_oracle_in_either_order(people):
    few = dict([*SHOWN.items()][:8]) | {"none": StoredClip(None, np.zeros(8 + 5, np.float32))}
    (found,) = people.verify(vectors_of(people, {"none": few["none"]}), "person 3").values()
    assert found == Match(False, 0.0, 0.5, ())  # without a common modality
    shown, names = vectors_of(people, few), [*few]
    matches = people.compare(shown, shown)
    assert len(matches) == 81
    for (one, other), match in matches.items():
        if one != other:
            wanted = pair_oracle(people, few[one], few[other])
            assert match.log_ratio == pytest.approx(wanted, abs=1e-6), (one, other)
            likely = match.log_ratio >= people.match_rule().score
            assert match.accepted == (likely and bool(match.evidence))
    swapped = {(other, one): match for (one, other), match in matches.items()}
    assert_equal({key: swapped[key] for key in matches}, matches)
    pairs = people.compare(shown)
    assert [*pairs] == [(a, b) for n, a in enumerate(names) for b in names[n + 1 :]]
    assert_equal(pairs, {key: matches[key] for key in pairs})


def test_threshold_is_measured_on_strangers_or_follows_from_the_model(copied, monkeypatch):
    """Of 120 strangers, one may reach a threshold for 2 %: (1 + 1) / (120 + 1) is below 0.02."""
    strangers = {name: copied.clips[name] for name in copied.strangers}
    matches = copied.verify(vectors_of(copied, strangers), "person 3", fmr=0.02)
    rule = copied.match_rule("person 3", fmr=0.02)
    assert sum(match.accepted for match in matches.values()) == 1
    limit = rule.threshold
    assert (rule.by, *limit[2:]) == ("measured", 1, 120, 1)  # people, strangers, alarms
    assert limit.interval == pytest.approx(scipy.stats.beta(2, 119).ppf([0.025, 0.975]), rel=1e-6)
    assert copied.match_rule("person 3").fmr == 0.01
    pairs = copied.match_rule(fmr=0.02)
    assert (pairs.by, pairs.threshold.num_strangers) == ("measured", 60)
    assert copied.match_rule().by == "model"  # 1 % of pairs needs 198 strangers
    assert copied.match_rule().score == pytest.approx(np.log(100))
    # Rates and people of clients do not fill the memory.
    monkeypatch.setattr(index, "MOST_REMEMBERED", 5)
    first, again = ([copied.match_rule(x, fmr=0.02) for x in copied.people] for _ in range(2))
    assert first == again and len(copied.index._known) <= 5
    copied.remove(clip=copied.strangers[0])  # changes the measured threshold
    assert copied.match_rule("person 3", fmr=0.02).threshold.num_strangers == 119


CARD = backend_lib.make_card_backend(
    {"face": BackEnd(**made_nets.back_end(SAME, DIFFERENT, WIDTH))}
)
NETS = VectorOrigin("/models", "0" * 64, centred=True, cards={"face": "0" * 64})


def make_people(folder, made, strangers, order):
    """Makes a gallery of 20 people with 3 clips, and of clips of strangers named by `order`.

    `strangers` are the numbers of people and of clips. Returns the gallery, and log ratios of 1,000
    pairs of clips of two other people, and of 1,000 pairs of one person.
    """
    enrolled = made.photos(made.people(20), 3).astype(np.float32)
    clips = {f"p{i} {j}": StoredClip(f"p{i}", enrolled[i, j]) for i, j in np.ndindex(20, 3)}
    new = made.photos(made.people(strangers[0]), strangers[1]).astype(np.float32)
    clips |= {order.format(i, j): StoredClip(None, new[i, j]) for i, j in np.ndindex(strangers)}
    others = made.photos(made.people(1000), 2).astype(np.float32).swapaxes(0, 1)
    x, y = (CARD.summarise_clips([part]) for part in others)
    pairs = [CARD.compare(x, y.take(np.roll(np.arange(1000), n)))[0] for n in (1, 0)]
    return Gallery.of_clips(folder, NETS, CARD, clips), *pairs


@pytest.mark.parametrize("order", ["day{1} {0:03}", "{0:03} day{1}", "{1}{0}"])
def test_pairs_of_strangers_do_not_depend_on_the_order_of_names(tmp_path, order):
    """Each of 99 strangers has two clips, so some pair in any order shows one stranger."""
    people, two, one = make_people(tmp_path / "g", Population(1), (99, 2), order)
    rule = people.match_rule()
    assert rule.by == "measured" and "look like one person" not in rule.about
    assert np.mean(two >= rule.score) < 0.04 and np.mean(one >= rule.score) > 0.8


def test_few_strangers_with_many_clips_are_reported(tmp_path):
    few, many = (
        make_people(tmp_path / f"{x}", Population(2), x, "{0} {1}")[0] for x in ((12, 17), (120, 1))
    )
    assert "pairs of strangers look like one person" in few.match_rule().about
    assert "only about 12 people" in few.match_rule("p0").about
    assert "about 1" not in many.match_rule("p0").about


def test_without_strangers_people_who_are_closer_than_the_card_says_need_a_higher_ratio(tmp_path):
    made, usual = Population(3), np.log(100)
    people, *_ = make_people(tmp_path / "g", made, (0, 1), "")
    assert people.match_rule().score == pytest.approx(usual)
    made.between /= 4
    people, two, one = make_people(tmp_path / "g4", made, (0, 1), "")
    rule = people.match_rule()
    assert rule.by == "model" and "as near each other as here" in rule.about
    assert np.mean(two >= usual) > 0.05
    assert np.mean(two >= rule.score) < 0.025 and np.mean(one >= rule.score) > 0.3


def test_one_answer_is_of_one_content_of_the_gallery(copied, monkeypatch):
    """Another process changes the gallery while a clip is compared."""
    shown, wanted = vectors_of(copied, SHOWN), copied.match_rule("person 3")
    misfits, other = copied.find_misfits("person 3"), Gallery(copied.folder)
    make_matches = verification.make_matches

    def change(*words):
        other.remove(clip=other.strangers)
        other.rename("person 3", "person 33")
        return make_matches(*words)

    monkeypatch.setattr(verification, "make_matches", change)
    done = copied.verify_person(shown, "person 3")
    assert (done.rule, done.misfits) == (wanted, misfits) and wanted.by == "measured"
    assert {x.accepted for x in done.matches.values()} == {True, False}
    refused(lambda: copied.match_rule("person 3"), "person 33")


def test_wrong_use_names_the_remedy(people):
    shown = vectors_of(people, SHOWN)
    for action, *words in (
        (lambda: people.verify(shown, "Person 3"), "did you mean 'person 3'", "gallery list"),
        (lambda: people.verify(shown, None), "the name of a person"),
        (lambda: people.verify(shown, "person 3", fmr=1.0), "above 0 and below 1"),
        (lambda: people.verify(shown, "person 3", fmr="1 %"), "a number, or None"),
        (lambda: people.verify(shown, "person 3", fmr=0.001), "999 usable clips of strangers",
         "has 120", "the lowest fmr is 0.0083", "enrol more strangers"),
        (lambda: people.compare(shown, fmr=0.001), "1,998", "0.016"),
        (lambda: people.compare(shown.only({"q1"})), "at least two clips"),
        (lambda: people.compare(shown, shown.only(())), "give at least one"),
    ):  # fmt: skip
        refused(action, *words)
    many = vectors_of(people, {f"q{n}": SHOWN["q0"] for n in range(MAX_PAIRS)})
    refused(lambda: people.compare(many), "give fewer clips")


def test_misfits_are_the_clips_that_do_not_fit_the_person_without_them(copied):
    """The same ratio is computed from all other clips as one group. Two clips are both listed."""
    for number in range(0, 6, 2):
        copied.relabel(copied.people[f"person {number}"][0], f"person {number + 1}")
    found = {name: copied.find_misfits(name) for name in copied.people}
    assert any(found.values())
    for name, clips in copied.people.items():
        assert [*found[name].values()] == sorted(found[name].values())
        for row, clip in enumerate(clips if len(clips) > 1 else ()):
            x, rest = (
                copied.backend.split(np.stack([copied.clips[n].vector for n in part]))
                for part in ([clip], [*clips[:row], *clips[row + 1 :]])
            )
            sums = [(z.any(axis=1).sum(keepdims=True), z.sum(axis=0, keepdims=True))
                    for z in copied.backend.whiten(rest)]  # fmt: skip
            group = copied.backend.summarise(sums)
            one = copied.backend.summarise_clips(x)
            (ratio,), shared = copied.backend.compare(one, group)
            listed = shared.any() and ratio < -np.log(10)
            assert found[name].get(clip) == (pytest.approx(ratio, abs=1e-6) if listed else None)


def as_row(answer):
    """Returns an answer in JSON as a row of a table."""
    row = {key: value for key, value in answer.items() if key not in ("best", "worst", "evidence")}
    for name in ("best", "worst"):
        found = answer[name] or {"clip": None, "log_ratio": None}
        row |= {name: found["clip"], f"{name}_log_ratio": found["log_ratio"]}
    return row


def test_command_prints_and_writes_the_answers_of_python(say, tmp_path):
    clips = made_galleries.make_clips(strangers=99)
    clips["wrong"] = make_clip(9000, "nobody")._replace(identity="person 3")
    people = made_galleries.make_with_cards(tmp_path / "g", clips)
    for name, numbers in (("a", (3, 4)), ("b", (3, 5)), ("one", (1,))):
        shown = {f"q{n}": servers.make_frames(7000 + 10 * n, f"person {n}", 2) for n in numbers}
        clip_files.write_npz(tmp_path, {name: shown})
    given, pairs = f"--input={tmp_path}/a", [("q3", "q3"), ("q3", "q5"), ("q4", "q3"), ("q4", "q5")]
    wanted = people.verify(people.load(tmp_path / "a"), "person 3")
    compared = people.compare(people.load(tmp_path / "a"), people.load(tmp_path / "b"))
    assert [*compared] == pairs and wanted["q3"].accepted and not wanted["q4"].accepted
    tell, words = functools.partial(say, "gallery", "verify"), ("--identity=person 3", "--fmr=0.01")
    of_person = [{"clip": x, "identity": "person 3", **y.to_dict()} for x, y in wanted.items()]
    of_pairs = [{"clip": a, "other": b, **y.to_dict()} for (a, b), y in compared.items()]
    for name, flags, rows in (
        ("identity", words, of_person), ("other", [f"--with={tmp_path}/b"], of_pairs),
    ):  # fmt: skip
        tell(tmp_path / "g", given, *flags, f"--out={tmp_path}/{name}.parquet")
        written = parquet.read_table(tmp_path / f"{name}.parquet").to_pylist()
        assert written == [*map(as_row, rows)]
        assert tell(tmp_path / "g", given, *flags, "--json")["answers"] == rows
    tell(tmp_path / "g", given, *words, f"--out={tmp_path}/identity.jsonl")
    assert [*map(json.loads, (tmp_path / "identity.jsonl").read_text().splitlines())] == of_person
    found, printed = (tell(tmp_path / "g", given, *words, *more) for more in (["--json"], []))
    assert "wrong: unlike the other clips of the person" in printed
    assert [*found["misfits"]] == ["wrong"] and found["answers"][0]["worst"]["clip"] == "wrong"
    assert "yes" in printed and "accepted    1" in printed, printed
    assert "measured on 99 comparisons, of which 0 reach it" in printed
    assert "log ratio is 4.60517 or more" in tell(tmp_path / "g", given)  # the two clips of --input
    for flags, word in (
        ((given, "--identity=person 3", "--fmr=1%"), "write 0.01"),
        ((given, "--identity=person 3", f"--with={tmp_path}/b"), "cannot be used together"),
        ((f"--input={tmp_path}/one",), "--with=PATH"),
        ((given, f"--with={tmp_path}/none"), "none"),
        ((given, *words, f"--out={tmp_path}/identity.jsonl"), "exists and is not overwritten"),
    ):
        assert word in tell(tmp_path / "g", *flags, code=2)
