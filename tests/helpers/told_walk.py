"""Random actions of a user on a `Home`, and what its results must show after each of them."""

import json
import random
import shutil
import unicodedata

from tests.helpers import made_media
from tests.helpers.told_people import People

# No name contains another name, nor a word that results contain anyway.
NAMES = (
    "Adalind", "Borislav", "Cordula", "Zo\u00eb Quast", "Dietmar", "Eleonore", "Fridolin",
    "Gundula", "Hildegard", "Ignatius", "Jolanthe", "Kunibert", "Leopoldine", "Malwine",
    "Norgard", "Ottokar", "Pankraz", "Roswitha", "Sieglinde", "Thusnelda", "Ulfried", "Veronika",
    "Waldtraut", "Xaver", "Yngvild", "Zacharias",
)  # fmt: skip
ROUNDS = 15
# Action -> how often it is drawn.
ACTIONS = {
    "name_face": 6, "name_person": 5, "rename": 5, "merge": 3, "exchange": 2, "join": 3,
    "deny": 3, "apart": 3, "ignore": 2, "show": 2, "undo": 5, "forget": 3, "rename_folder": 3,
    "add_photo": 3, "delete_photo": 2, "forget_missing": 1, "copy_photo": 1, "copy_film": 2,
    "edit_title": 2, "take_away": 2, "bring_back": 3, "new_film": 2, "replace_film": 2,
    "who": 2, "save": 1, "reopen": 1,
}  # fmt: skip


class Wrong(AssertionError):
    """The results differ from the model: a kind of fault, and what is wrong."""

    def __init__(self, kind, about):
        super().__init__(f"{kind}: {about}")
        self.kind = kind


def begin(home):
    """Makes the films and photos of the first call, and calls `vidjax who`."""
    made_media.write(home.films / "film-0.mp4", 0, [(0, 1), (2, 2), (3, 3)])
    made_media.write(home.films / "film-1.mp4", 1, [(1, 4), (2, 5), (4, 6)])
    made_media.write(home.films / "shot-2.jpg", 2, [(0, 7), (3, 8)])
    made_media.write(home.people / NAMES[0] / "x-100.jpg", 100, [(0, 9)])
    made_media.write(home.people / NAMES[1] / "x-101.jpg", 101, [(1, 10)])
    home.who()


class Walk:
    """One sequence of actions. `script` lists the actions so far, for readers."""

    def __init__(self, home, seed):
        self.home, self._rng, self.script = home, random.Random(seed), list[str]()
        self._people, self._next = People(), 200
        self._faces = dict[int, list[int]]()  # picture -> the true person of each face
        self._kept = set[int]()  # the pictures of films and photos that were read
        # True person -> true persons whom a user has ever joined, as numbers of groups.
        self._group = {person: person for person in range(100)}
        self._owner = dict[int, int]()  # number of an unknown person -> true person
        home.open()
        for path in (*home.films.iterdir(), *home.people.rglob("*.jpg")):
            self._note(path)
        self._read(people=True)
        self._check()

    def run(self):
        for _ in range(ROUNDS):
            self.step()

    def step(self):
        """Makes one random action, and compares the results with the model."""
        while True:
            name = self._rng.choices([*ACTIONS], [*ACTIONS.values()])[0]
            before = len(self.script)
            getattr(self, f"_do_{name}")()
            if len(self.script) > before:
                break
        self._check()

    # What the user sees.

    def _say(self, text):
        self.script.append(text)

    def _choose(self, values):
        return self._rng.choice(sorted(values))

    def _maybe(self, share):
        return self._rng.random() < share

    @property
    def _named(self):
        """The names on the page."""
        return self._people.now.tokens.keys() & self.home.known()

    @property
    def _unknown(self):
        """Unknown person -> faces."""
        found = dict[str, set]()
        for face, labels in self.home.shown().items():
            for label in labels:
                if label and label.startswith("unknown "):
                    found.setdefault(label, set()).add(face)
        return found

    def _new_name(self):
        taken = {*self._people.now.tokens} | self._folders()
        taken = {x.casefold() for x in taken}
        old = {x for x in self._people.used if x.casefold() not in taken}
        if old and self._maybe(0.25):
            return self._choose(old)
        used = {x.casefold() for x in self._people.used}
        return next(x for x in NAMES if x.casefold() not in taken | used)

    def _any_name(self, person=None):
        """Returns a new name, or the name of somebody, preferably of the true person."""
        now = self._people.now
        if person is not None and self._maybe(0.6):
            for face in sorted(now.told):
                if self._faces[face[0]][face[1]] == person:
                    return str(now.name(face))
            for picture, token in now.photos.items():
                if self._faces[picture][0] == person:
                    return next(x for x, y in now.tokens.items() if y == now.find(token))
        return self._choose(now.tokens) if now.tokens and self._maybe(0.3) else self._new_name()

    # Actions on the page.

    def _do_name_face(self):
        face = self._choose(self.home.shown())
        name = self._any_name(self._faces[face[0]][face[1]])
        self._say(f"name the face {face} {name!r}")
        self.home.change("name", [self.home.key(face)], self._type(name))
        self._people.say([("is", face, self._people.person(name))])

    def _do_name_person(self):
        if found := self._unknown:
            label = self._choose(found)
            face = min(found[label])
            name = self._any_name(self._faces[face[0]][face[1]])
            self._say(f"name {label} {name!r}")
            self.home.change("name", [label], self._type(name))
            token = self._people.person(name)
            self._people.say([("is", face, token) for face in sorted(found[label])])

    def _type(self, name):
        """Returns a name as some keyboards write it."""
        return unicodedata.normalize("NFD", name) if self._maybe(0.3) else name

    def _do_rename(self):
        if named := self._named:
            old, new = self._choose(named), self._new_name()
            self._say(f"rename {old!r} to {new!r}")
            self._rename(old, new)

    def _rename(self, old, new):
        self.home.change("name", [old], self._type(new))
        self._people.say([("call", self._people.now.tokens[old], new)])

    def _do_merge(self):
        if len(named := self._named) > 1:
            old = self._choose(named)
            new = self._choose(named - {old})
            self._say(f"rename {old!r} to {new!r}, who exists: they are one person")
            self.home.change("name", [old], self._type(new))
            tokens = self._people.now.tokens
            self._people.say([("merge", tokens[old], tokens[new])])

    def _do_exchange(self):
        if len(named := self._named) > 1:
            one = self._choose(named)
            two, other = self._choose(named - {one}), self._new_name()
            self._say(f"exchange the names {one!r} and {two!r}, by way of {other!r}")
            self._rename(one, other)
            self._rename(two, one)
            self._rename(other, two)

    def _do_join(self):
        if len(found := self._unknown) > 1:
            one = self._choose(found)
            two = self._choose(found.keys() - {one})
            self._say(f"join {one} and {two}")
            self.home.change("join", [one, two])
            faces = sorted(found[one] | found[two])
            self._people.say([("join", faces)])
            self._unite(faces)

    def _unite(self, faces):
        groups = {self._group[self._faces[x][n]] for x, n in faces}
        new = min(groups)
        self._group = {x: new if y in groups else y for x, y in self._group.items()}

    def _do_deny(self):
        if named := self._named:
            face, name = self._choose(self.home.shown()), self._choose(named)
            self._say(f"the face {face} is not {name!r}")
            self.home.change("deny", [self.home.key(face)], name)
            self._people.say([("not", face, self._people.now.tokens[name])])

    def _do_apart(self):
        shown = self.home.shown()
        label = self._choose({x for labels in shown.values() for x in labels if x})
        faces = sorted(face for face, labels in shown.items() if label in labels)
        token = self._people.now.tokens.get(label)
        chosen = self._rng.sample(faces, self._rng.randint(1, len(faces)))
        rest = [x for x in faces if x not in chosen]
        if token is not None or rest:
            self._say(f"the faces {chosen} are not {label!r}")
            self.home.change("apart", [self.home.key(x) for x in chosen])
            self._people.say([("apart", chosen, () if token is not None else rest, token)])
            self._unite(chosen)

    def _do_ignore(self):
        found, shown = self._unknown, self.home.shown()
        if found and self._maybe(0.5):
            label = self._choose(found)
            self._say(f"ignore {label}")
            self.home.change("ignore", [label])
            self._people.say([("ignore", face) for face in sorted(found[label])])
        else:
            face = self._choose(shown)
            self._say(f"ignore the face {face}")
            self.home.change("ignore", [self.home.key(face)])
            self._people.say([("ignore", face)])

    def _do_show(self):
        if faces := self._people.now.ignored & self.home.shown().keys():
            face = self._choose(faces)
            self._say(f"show the face {face} again")
            self.home.change("show", [self.home.key(face)])
            self._people.say([("show", face)])

    def _do_undo(self):
        if self._people.undoable and self._people.undo():
            self._say("undo the last change of the page")
            self.home.undo()

    def _do_forget(self):
        if named := self._named:
            name = self._choose(named)
            token, place = self._people.now.tokens[name], ""
            folders = self._folders_of(token)
            if len(self._folders() - folders) and self._maybe(0.5):
                for folder in folders:
                    shutil.rmtree(self.home.people / folder)
                place = ", after her photos were deleted"
            button = self._maybe(0.5)
            self._say(f"forget {name!r} with {'the button' if button else 'vidjax forget'}{place}")
            (self.home.forget if button else self.home.forget_elsewhere)(name)
            self._people.forget(token)
            if button:
                self._check_files()
            else:
                self._who(people=bool(place))

    def _do_reopen(self):
        self._say("open the page again")
        self._people.undoable.clear()
        self.home.save()
        self.home.open()

    def _do_save(self):
        self._say("the page writes the results")
        self.home.save()
        self._check_files()

    # Actions on photos of people.

    def _folders(self):
        return {unicodedata.normalize("NFC", x.name) for x in self.home.people.iterdir()}

    def _list_photos(self):
        """Returns picture -> the files that show it."""
        found = dict[int, list]()
        for path in sorted(self.home.people.rglob("*.jpg")):
            found.setdefault(self._note(path), []).append(path)
        return found

    def _folders_of(self, token):
        photos, now = self._list_photos(), self._people.now
        mine = {x for x, of in now.photos.items() if now.find(of) == now.find(token)}
        return {path.parent.name for x in mine for path in photos.get(x, ())}

    def _note(self, path):
        content = json.loads(path.read_bytes())
        self._faces[content["picture"]] = [x["person"] for x in content["faces"]]
        return content["picture"]

    def _do_rename_folder(self):
        photos, now = self._list_photos(), self._people.now
        folder = self._choose(self._folders())
        pictures = {x for x, paths in photos.items() if paths[0].parent.name == folder}
        tokens = {now.find(now.photos[x]) for x in pictures & now.photos.keys()}
        if pictures - now.photos.keys() or len(tokens) != 1:
            return
        (token,) = tokens
        name = next(x for x, y in now.tokens.items() if y == token)
        if len(self._folders_of(token)) > 1:
            return  # it is not clear what the new name is about
        if name != folder:
            new = name  # any other name would contradict what was said on the page
        elif self._maybe(0.3):
            new = folder.lower() if folder != folder.lower() else folder.title()
        else:
            new = self._any_name()
        folders = {x.casefold() for x in self._folders() - {folder}}
        if (
            new.casefold() in folders
            or new == folder
            or new.casefold() in {x.casefold() for x in now.tokens.keys() - {new, name}}
        ):
            return
        self._say(f"rename the folder {folder!r} to {new!r}")
        (self.home.people / folder).rename(self.home.people / new)
        if new in now.tokens and now.tokens[new] != token:
            other = now.tokens[new]
            self._people.say([("merge", token, other), ("call", other, new)], page=False)
        else:
            self._people.say([("call", token, new)], page=False)
        self._who()

    def _do_add_photo(self):
        photos, now, person = self._list_photos(), self._people.now, None
        if self._maybe(0.5):
            folder = self._choose(self._folders())
            inside = [x for x, paths in photos.items() if paths[0].parent.name == folder]
            person = self._faces[inside[0]][0] if inside else None
        else:
            folder = self._any_name()
            if folder.casefold() in {x.casefold() for x in self._folders() - {folder}}:
                return
            token = now.tokens.get(folder)
            for x, n in sorted(now.told):
                if now.find(now.told[x, n]) == token:
                    person = self._faces[x][n]
        picture, person = self._next, self._rng.randrange(8) if person is None else person
        self._next += 1
        self._say(f"add the photo {folder}/x-{picture}.jpg of the true person {person}")
        path = self.home.people / folder / f"x-{picture}.jpg"
        made_media.write(path, picture, [(person, picture)])
        self._note(path)
        self._who()

    def _choose_photo(self):
        """Returns a photo that can be deleted while vidjax knows others, or None."""
        photos = {x: y for x, y in self._list_photos().items() if x in self._people.now.photos}
        if len(photos) > 1:
            return self._choose(path for paths in photos.values() for path in paths)
        return None

    def _delete(self, path):
        path.unlink()
        if not any(path.parent.iterdir()) and self._maybe(0.7):
            path.parent.rmdir()

    def _do_delete_photo(self):
        if path := self._choose_photo():
            self._say(f"delete the photo {path.relative_to(self.home.people)}")
            self._delete(path)
            self._who()

    def _do_forget_missing(self):
        path, now = self._choose_photo(), self._people.now
        if path and len([*path.parent.iterdir()]) == 1:
            token = now.find(now.photos[self._note(path)])
            if len(self._folders_of(token)) == 1:
                name = next(x for x, y in now.tokens.items() if y == token)
                self._say(f"delete the last photo of {name!r}, and forget her: --forget-missing")
                shutil.rmtree(path.parent)
                self._people.forget(token)
                self._who(forget_missing=True)

    def _do_copy_photo(self):
        path = self._choose_photo()
        place = path.with_name(f"{path.stem} (1).jpg") if path else None
        if path and place and not place.exists():
            self._say(f"copy the photo {path.relative_to(self.home.people)} to {place.name}")
            shutil.copy2(path, place)
            self._who()

    # Actions on films, and on photos like films.

    def _films(self):
        return [x for x in sorted(self.home.films.iterdir()) if x.is_file()]

    def _do_copy_film(self):
        path = self._choose(self._films())
        place = path.with_name(f"{path.stem} (1){path.suffix}")
        if not place.exists():
            self._say(f"copy {path.name} to {place.name}")
            shutil.copy2(path, place)
            self._who_perhaps()

    def _do_edit_title(self):
        path = self._choose(self._films())
        content = json.loads(path.read_bytes())
        content["title"] += "new "
        self._say(f"edit the title of {path.name}")
        path.write_text(json.dumps(content))
        self._who_perhaps()

    def _do_take_away(self):
        if len(films := self._films()) > 1:
            path = self._choose(films)
            if not (self.home.away / path.name).exists():
                self._say(f"take {path.name} away")
                shutil.move(path, self.home.away / path.name)
                self._who_perhaps()

    def _do_bring_back(self):
        away = [*self.home.away.iterdir()]
        if away:
            path = self._choose(away)
            place = self.home.films / path.name
            while place.exists():
                place = place.with_name(f"{place.stem}-b{place.suffix}")
            self._say(f"bring {path.name} back as {place.name}")
            shutil.move(path, place)
            self._who_perhaps()

    def _do_new_film(self):
        ending = self._rng.choice((".mp4", ".jpg"))
        path = self.home.films / f"{'film' if ending == '.mp4' else 'shot'}-{self._next}{ending}"
        self._make_film(path, f"add {path.name}")
        self._who_perhaps()

    def _make_film(self, path, words):
        picture, count = self._next, self._rng.randint(1, 3)
        self._next += 1
        stranger = 1 + max(x for of in self._faces.values() for x in of)
        people = self._rng.sample(range(min(8, stranger)), count)
        people = [*people[1:], stranger] if self._maybe(0.6) and stranger < 100 else people
        self._say(f"{words}, picture {picture} of the true persons {people}")
        made_media.write(path, picture, [(x, 10 * picture + n) for n, x in enumerate(people)])
        self._note(path)

    def _do_replace_film(self):
        path = self._choose(self._films())
        if self._maybe(0.5) and not (self.home.away / path.name).exists():
            shutil.move(path, self.home.away / path.name)
        self._make_film(path, f"another film takes the place of {path.name}")
        self._who_perhaps()

    def _do_who(self):
        self._who(people=self._maybe(0.6))

    def _who_perhaps(self):
        if self._maybe(0.6):
            self._who(people=self._maybe(0.7))

    def _who(self, people=True, forget_missing=False):
        self._say("vidjax who" + " --people" * people + " --forget-missing" * forget_missing)
        self.home.who(people, forget_missing)
        self._read(people)
        self._check_files()

    def _read(self, people):
        """Notes which films and photos a call of `vidjax who` has read."""
        self._kept |= {self._note(path) for path in self.home.films.iterdir()}
        if not people:
            return
        photos, now = self._list_photos(), self._people.now
        gone = now.photos.keys() - photos.keys()
        if gone and photos.keys() & now.photos.keys():
            lost = {now.find(now.photos[x]) for x in gone}
            self._people.say([("gone", x) for x in sorted(gone)], page=False)
            for token in lost - {*self._people.now.tokens.values()}:
                self._people.forget(token)  # as `who` says
        for picture, paths in photos.items():
            now, folder = self._people.now, unicodedata.normalize("NFC", paths[0].parent.name)
            if picture not in now.photos:
                beside = [x for x, of in photos.items() if of[0].parent.name == folder]
                known = [now.photos[x] for x in beside if x in now.photos]
                token = known[0] if known else self._people.person(folder)
                self._people.say([("photo", picture, token)], page=False)

    # What the results must show.

    def _check(self):
        shown, now = self.home.shown(), self._people.now
        for face, labels in shown.items():
            for label in labels:
                is_unknown = label is None or label.startswith("unknown ")
                if not is_unknown and label not in now.tokens:
                    raise Wrong("dead name", f"{face} is {label!r}, but nobody has this name")
        for face in now.told:
            if face[0] in self._kept and shown.get(face) != {now.name(face)}:
                raise Wrong("told", f"{face} is {now.name(face)!r}, not {shown.get(face)}")
        for face in now.ignored & shown.keys():
            if shown[face] != {None}:
                raise Wrong("ignored", f"{face} is ignored, not {shown[face]}")
        for face in shown.keys() - now.told.keys() - now.ignored:
            if wrong := shown[face] & now.list_denied(face):
                raise Wrong("denied", f"{face} is certainly not {wrong}")
        self._check_unknown(shown)

    def _check_unknown(self, shown):
        for group in self._people.now.joined:
            labels = {y for x in group for y in shown.get(x, ()) if y and y.startswith("unknown ")}
            if len(labels) > 1:
                raise Wrong("joined", f"{sorted(group)} are one person, not {sorted(labels)}")
        for pair in self._people.now.apart:
            one, two = (shown.get(x, set()) for x in sorted(pair))
            if {x for x in one & two if x and x.startswith("unknown ")}:
                raise Wrong("apart", f"{sorted(pair)} are two people, not {one & two}")
        for face, labels in sorted(shown.items()):
            for label in labels:
                if label and label.startswith("unknown "):
                    person = self._faces[face[0]][face[1]]
                    number = int(label.rpartition(" ")[2])
                    other = self._owner.setdefault(number, person)
                    if self._group[other] != self._group[person]:
                        about = f"{face} shows the true person {person}, not {other} as before"
                        raise Wrong("number", f"{label}: {about}")

    def _check_files(self):
        """Compares the written results with the model and the page."""
        self._check()
        names, now = self.home.labels(), self._people.now
        if names[0] != names[1]:
            raise Wrong("stale", f"names.jsonl has {names[0]}, and the page {names[1]}")
        table, subtitles, gallery = self.home.written()
        rows = [x for x in self.home.rows() if x["identity"]]
        if table != {x["identity"] for x in rows}:
            raise Wrong("stale", f"names.tsv has the names {table}")
        known = [x for x in rows if not x["identity"].startswith("unknown ")]
        if subtitles != {x["identity"] for x in known if x["end"] > x["start"]}:
            raise Wrong("stale", f"subtitles have the names {subtitles}")
        if gallery - now.tokens.keys():
            raise Wrong("dead name", f"gallery has {gallery - now.tokens.keys()}, names of nobody")
        banned, of_log = self._people.list_banned()
        for place, name in self.home.search(banned, of_log, self._folders()):
            raise Wrong("trace", f"{place} contains {name!r}")
