"""Measures the page on which a user corrects names, in Chromium.

    python -m tests.benchmarks.review_page FOLDER [--axe=FILE]

The films and people are made up. FOLDER is for temporary files. The script is a user who names 20
unknown people of 34 films, and corrects the 5 % of the faces that are in wrong groups. An action is
a change that is sent: a typed name, or a click on a button. Clicks that select faces or open a page
are counted separately. With `--axe`, the script checks pages with axe-core, the file `axe.min.js`.
"""

import contextlib
import threading
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

from tests.benchmarks import common
from tests.helpers import made_shelf
from tests.helpers.browser import Browser
from vidjax.apps import web
from vidjax.apps.video import results, review

FEW: Any = {"people": 24, "films": 34, "known": 4, "faces": 18, "wrong": 0.07}
MANY: Any = {"people": 2000, "films": 300, "known": 200, "faces": 40}
# The time from an event until the page has been painted, in milliseconds.
REACT = """new Promise((done) => {{ const start = performance.now(); {action};
  requestAnimationFrame(() => setTimeout(() => done(performance.now() - start))); }})"""
SMALL_TARGETS = """[...document.querySelectorAll("a, button, summary, input:not([type=hidden])")]
  .filter((x) => x.checkVisibility() && !x.matches(".skip"))
  .map((x) => (x.type === "checkbox" ? x.parentElement : x).getBoundingClientRect())
  .filter((x) => x.width && Math.min(x.width, x.height) < 23.9).length"""
FACES = """(part) => [...part.querySelectorAll("a.face")].map((x) => x.href.split("frame/")[1])"""


@contextlib.contextmanager
def serve(shelf: Any):
    """Serves the page of a shelf in a thread; yields the review and the address."""
    decision = made_shelf.decide(shelf.out)
    results.write(shelf.out, decision)
    reviewed = review.Review(shelf.out, decision)
    with web.listen("127.0.0.1", 0) as listener:
        app = review.make_app(reviewed, "token")
        server = web.Server(app, web.Limits(), threading.Event())
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield reviewed, f"http://127.0.0.1:{listener.getsockname()[1]}/token/"
        finally:
            server.should_exit = True
            thread.join()


class User:
    """A user of the page, who sees which person each face shows."""

    def __init__(self, page: Browser, address: str, truth: dict[str, str]):
        self.page, self.address, self.truth = page, address, truth
        self.counts = Counter[str]()

    def open(self, query=""):
        self.page.open(f"{self.address}{query}")
        self.counts["pages opened"] += 1

    def finish(self, kind: str) -> str:
        """Waits for the answer to a change; returns its message."""
        self.counts[kind] += 1
        self.page.wait("(document.querySelector('#said')?.innerText ?? '') !== ''")
        return self.page.run("document.querySelector('#said').innerText")

    def name_unknown(self) -> None:
        """Types the name of every unknown person into the field that has the focus."""
        self.open()
        self.page.run("document.querySelector('.person [name=person]')?.focus()")
        while clips := self.page.run(
            f"(({FACES})(document.activeElement.closest('.person') ?? document.createElement('p')))"
        ):
            (name, _), *_ = Counter(self.truth[clip] for clip in clips).most_common(1)
            self.page.type(name)
            self.page.press("Enter")
            assert "Saved" in self.finish("names typed")

    def correct(self, person: str) -> None:
        """Selects the faces of `person` that show others, and types their names."""
        self.open(f"?person={person.replace(' ', '+')}")
        clips = self.page.run(f"({FACES})(document)")
        wrong = {clip: name for clip in clips if (name := self.truth.get(clip, person)) != person}
        for name in sorted({*wrong.values()}):
            for clip in (clip for clip in wrong if wrong[clip] == name):
                self.page.run(
                    f"document.querySelector('[type=checkbox][value$=\"{clip}\"]').click()"
                )
                self.counts["faces selected"] += 1
            self.page.run("document.querySelector('#selection [name=person]').focus()")
            self.page.type(name)
            self.page.press("Enter")
            assert "Saved" in self.finish("wrong faces corrected")


def count_actions(folder: Path, page: Browser) -> None:
    """Prints how many actions name everybody, as a table."""
    shelf = made_shelf.make(folder / "few", **FEW)
    with serve(shelf) as (reviewed, address):
        before = who_is_who(reviewed)
        groups: dict[str, Counter[str]] = {}
        for clip, name in before.items():
            groups.setdefault(name, Counter())[shelf.truth[clip]] += 1
        unknown = [name for name in groups if name.startswith("unknown")]
        wrong = sum(count.total() - max(count.values()) for count in groups.values())
        user = User(page, address, shelf.truth)
        after = before
        while after != shelf.truth and user.counts.total() < 500:
            user.name_unknown()
            for person in sorted({*shelf.truth.values()}):
                user.correct(person)
            after = who_is_who(reviewed)
    right = sum(after[clip] == name for clip, name in shelf.truth.items())
    typed, corrected = user.counts["names typed"], user.counts["wrong faces corrected"]
    print_rows(
        ("people without a name, and groups of their faces", f"20, {len(unknown)}"),
        ("faces, and faces in wrong groups", f"{len(before)}, {wrong}"),
        (
            "right names before, and after",
            f"{sum(before[c] == n for c, n in shelf.truth.items())}, {right}",
        ),
        ("actions for each unknown person (at most 1.3)", f"{typed / 20:.2f}"),
        ("actions for each wrong face (at most 1)", f"{corrected / wrong:.2f}"),
        *((f"  {kind}", str(number)) for kind, number in user.counts.items()),
    )


def who_is_who(reviewed: review.Review) -> dict[str, str]:
    """Returns clip -> name on the page."""
    return {
        clip: x.identity or "ignored"
        for x in reviewed.done.decision.appearances for clip in x.clips
    }  # fmt: skip


def measure_speed(folder: Path, page: Browser) -> None:
    """Prints how long the page of many films takes to open and to react."""
    shelf = made_shelf.make(folder / "many", **MANY)
    with serve(shelf) as (_, address):
        for query in ("", "?person=unknown+7", "?film=film_003.mp4", "?find=ada+7"):
            seconds = median(page.open(f"{address}{query}") for _ in range(3))
            print_rows((f"opens {query or 'the overview'} (at most 2 s)", f"{seconds:.2f} s"))
        page.open(address)
        for name, action in {
            "selects a person": "document.querySelector('[type=checkbox]').click()",
            "selects a range of 100": "document.querySelectorAll('[type=checkbox]')[99]"
            ".dispatchEvent(new MouseEvent('click', { shiftKey: true, bubbles: true }))",
            "types a word into the search": "const x = document.querySelector('#find input');"
            "x.value = 'unknown 19'; x.dispatchEvent(new Event('input', { bubbles: true }))",
            "shows that a name is being saved": "document.querySelector('.person [name=person]')"
            ".value = 'Zoe'; document.querySelector('.person form button').click()",
        }.items():
            seconds = page.run(REACT.format(action=action)) / 1000
            print_rows((f"{name} (at most 0.1 s)", f"{seconds:.3f} s"))
        seconds = page.wait("(document.querySelector('#said')?.innerText ?? '').includes('Zoe')")
        print_rows(("shows the answer to a change", f"{seconds:.2f} s"))


def use_keyboard(folder: Path, page: Browser) -> None:
    """Uses each part of the page with keys only. Raises AssertionError if a key has no effect."""
    shelf = made_shelf.make(folder / "keys", people=9, films=4, known=2, faces=9)
    with serve(shelf) as (_, address):
        user = User(page, address, shelf.truth)

        def reach(selector):
            for _ in range(400):
                if page.run(f"document.activeElement.matches({selector!r})"):
                    return
                page.press("Tab")
            raise AssertionError(f"Tab does not reach {selector}")

        def done(word):
            text = user.finish("actions by keys")
            assert word in text, text

        page.open(address)
        reach(".person [name=person]")
        page.type("Gus")
        page.press("Enter")
        done("is Gus")
        reach(".said button")
        page.press("Enter")
        done("Undone")
        reach("[type=checkbox]")
        page.press(" ")
        page.press("ArrowRight")
        page.press("ArrowRight")
        page.press(" ", shift=True)
        assert page.run("document.querySelector('#count').innerText") == "3 people selected"
        page.press("Escape")
        assert not page.run("document.querySelectorAll(':checked').length")
        page.press(" ")
        page.press("ArrowLeft")
        page.press(" ")
        reach("#selection [value=join]")
        page.press("Enter")
        done("unknown")
        reach("[type=checkbox]")
        page.press("Enter")
        reach("#selection [value=ignore]")
        page.press("Enter")
        done("ignored")
        # After the last box of the page, the focus goes back to another person.
        page.run("[...document.querySelectorAll('.person [type=checkbox]')].at(-1).focus()")
        page.press("Enter")
        reach("#selection [value=ignore]")
        page.press("Enter")
        done("ignored")
        assert page.run("document.activeElement.matches('.person [name=person]')")
        reach(".person h3 a")
        page.press("Enter")
        page.wait("!!document.querySelector('.grid')")
        reach(".grid a.face")
        page.press("Enter")
        assert page.run("document.querySelector('#large').open")
        before = page.run("document.querySelector('#large img').src")
        page.press("ArrowRight")
        assert page.run("document.querySelector('#large img').src") != before
        page.press("Escape")
        assert not page.run("document.querySelector('#large').open")
        reach(".grid [type=checkbox]")
        page.press(" ")
        reach("#selection [value=apart]")
        page.press("Enter")
        done("not unknown")
        # Enter confirms a question.
        page.open(f"{address}?person=Ada")
        reach(".person [name=person]")
        page.type("Bob")
        page.press("Enter")
        page.wait("document.activeElement.innerText === 'I am sure: it is Bob'", 5)
        page.press("Enter")
        done("Ada is Bob")
    print_rows(("keyboard only", f"all, {user.counts.total()} changes"))


def check_pages(folder: Path, page: Browser, axe: str) -> None:
    """Prints faults of pages at two widths and in two colours, which must all be 0."""
    shelf = made_shelf.make(folder / "pages", **{**FEW, "films": 6})
    script = Path(axe).read_text() if axe else ""
    rules = "axe.run({ resultTypes: ['violations'] }).then((x) => x.violations.map((y) => y.id))"
    with serve(shelf) as (_, address):
        for width in (1280, 390):
            for dark in (False, True):
                page.resize(width, dark=dark)
                faults = Counter[str]()
                for place in (address, f"{address}?person=unknown+1", f"{address}?person=Ada",
                              f"{address}?film=film_003.mp4", f"{address}play/0?t=1",
                              (shelf.out / "names.html").resolve().as_uri()):  # fmt: skip
                    page.open(place)
                    page.run("document.querySelector('[type=checkbox]')?.click()")
                    wide = page.run("document.documentElement.scrollWidth > innerWidth")
                    faults["sideways scroll"] += wide
                    faults["targets below 24 px"] += page.run(SMALL_TARGETS)
                    if script:
                        page.run(f"{script}; 0")
                        faults["violations of axe-core"] += len(found := page.run(rules))
                        common.print_text(" ".join(found)) if found else None
                colours = "dark" if dark else "light"
                words = ", ".join(f"{name} {number}" for name, number in faults.items())
                print_rows((f"{width} px, {colours}", words))
    page.resize(1280)


def print_rows(*rows: tuple[str, str]) -> None:
    for name, value in rows:
        common.print_text(f"| {name} | {value} |")


def main() -> None:
    args = common.parse(__doc__, folder=Path, axe="")
    with Browser(args.folder / "browser") as page:
        page.resize(1280)
        use_keyboard(args.folder, page)
        count_actions(args.folder, page)
        check_pages(args.folder, page, args.axe)
        measure_speed(args.folder, page)


if __name__ == "__main__":
    main()
