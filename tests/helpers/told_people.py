"""A model of what a person has said about faces: a person is a token, and a name is an attribute.

A step is a list of lines. Steps are replayed from first to last, so to undo a step, it is removed.
A face is a pair (picture, number of the face). The model knows no nets, no files and no paths.

    ("is", face, token)            the face shows the person
    ("not", face, token)           the face does not show the person
    ("apart", faces, rest, token)  the faces show a new unknown person, not the person of the others
    ("join", faces)                the faces show one unknown person
    ("ignore", face)               the face gets no name
    ("show", face)                 earlier lines `is` and `ignore` about the face do not count
    ("call", token, name)          the person has this name from now on
    ("merge", token, into)         two tokens are one person
    ("photo", picture, token)      the photo in a folder of the person shows the person
    ("gone", picture)              the photo was deleted
    ("forget", token)              nothing is known of the person any more
"""

import itertools


class Told:
    """What counts after all steps. `names` is token -> first name of the person."""

    def __init__(self, steps, names):
        self._into, self._names = dict[int, int](), dict(names)
        self.told, self.photos = dict[tuple, int](), dict[int, int]()
        self._denied = dict[tuple, set[int]]()
        self.ignored = set[tuple]()
        self.joined = list[set[tuple]]()
        self.apart = set[frozenset[tuple]]()
        for line in itertools.chain(*steps):
            getattr(self, f"_{line[0]}")(*line[1:])
        living = {self.find(x) for x in (*self.told.values(), *self.photos.values())}
        self.tokens = {self._names[token]: token for token in sorted(living)}  # name -> person
        self.is_clear = len(self.tokens) == len(living)  # no two people have one name

    def find(self, token):
        """Returns the token of the person into whom a person was merged."""
        while token in self._into:
            token = self._into[token]
        return token

    def name(self, face):
        """Returns the name that was told for a face, or None."""
        return self._names[self.find(self.told[face])] if face in self.told else None

    def list_denied(self, face):
        """Returns the present names of living people whom the face does not show."""
        tokens = {self.find(x) for x in self._denied.get(face, ())}
        return {name for name, token in self.tokens.items() if token in tokens}

    def _is(self, face, token):
        self._free(face)
        self.told[face] = token
        same = self.find(token)
        self._denied[face] = {x for x in self._denied.get(face, ()) if self.find(x) != same}

    def _free(self, face):
        """Takes a face out of groups of unknown faces, and forgets its name."""
        self.told.pop(face, None)
        self.ignored.discard(face)
        for group in self.joined:
            group.discard(face)
        self.apart = {pair for pair in self.apart if face not in pair}

    def _not(self, face, token):
        self._denied.setdefault(face, set()).add(token)
        if face in self.told and self.find(self.told[face]) == self.find(token):
            del self.told[face]

    def _apart(self, faces, rest, token):
        for face in faces:
            self._free(face)
            if token is not None:
                self._not(face, token)
        self.joined.append({*faces})
        self.apart |= {frozenset(pair) for pair in itertools.product(faces, rest)}

    def _join(self, faces):
        for face in faces:
            self.told.pop(face, None)
            self.ignored.discard(face)
        self.apart = {pair for pair in self.apart if not pair <= {*faces}}
        self.joined.append({*faces})

    def _ignore(self, face):
        self._free(face)
        self.ignored.add(face)

    def _show(self, face):
        self._free(face)

    def _call(self, token, name):
        self._names[self.find(token)] = name

    def _merge(self, token, into):
        one, other = self.find(token), self.find(into)
        if one != other:
            self._into[one] = other

    def _photo(self, picture, token):
        self.photos[picture] = token

    def _gone(self, picture):
        self.photos.pop(picture, None)

    def _forget(self, token):
        gone = self.find(token)
        self.told = {face: x for face, x in self.told.items() if self.find(x) != gone}
        self.photos = {picture: x for picture, x in self.photos.items() if self.find(x) != gone}


class People:
    """The steps so far, the names that must not be found any more, and the steps to undo."""

    def __init__(self):
        self._steps = list[list[tuple]]()
        self.undoable = list[list[tuple]]()  # steps of the page
        self._first = dict[int, str]()  # token -> first name, which no undo takes away
        self._ever = dict[int, set[str]]()  # token -> all names so far
        self.forgotten = set[int]()
        self.now = Told((), {})

    def say(self, lines, page=True):
        """Adds a step; a step of the page may be undone."""
        step = [*lines]
        self._steps.append(step)
        self.undoable += [step] * page
        self._replay()
        for line in step:
            if line[0] == "call":
                self._ever[self.now.find(line[1])].add(line[2])
            elif line[0] == "merge":
                self._ever[self.now.find(line[2])] |= self._ever[line[1]]

    def _replay(self):
        self.now = Told(self._steps, self._first)

    def person(self, name):
        """Returns the token of the person with a name, a new one if nobody has the name."""
        if name not in self.now.tokens:
            token = len(self._first)
            self._first[token], self._ever[token] = name, {name}
            return token
        return self.now.tokens[name]

    def undo(self):
        """Undoes the last step of the page. Returns False if two people would have one name."""
        steps = [x for x in self._steps if x is not self.undoable[-1]]
        if not Told(steps, self._first).is_clear:
            return False
        self.undoable.pop()
        self._steps = steps
        self._replay()
        return True

    def forget(self, token):
        """Forgets a person. Earlier steps cannot be undone any more."""
        self.forgotten |= {x for x in self._ever if self.now.find(x) == self.now.find(token)}
        self.say([("forget", token)], page=False)
        self.undoable.clear()

    @property
    def used(self):
        """All names that anybody has had."""
        return {name for names in self._ever.values() for name in names}

    def list_banned(self):
        """Returns the names that results must not contain, and those that the log must not."""
        gone = {name for token in self.forgotten for name in self._ever[token]}
        kept = {x for token in self._ever.keys() - self.forgotten for x in self._ever[token]}
        return self.used - self.now.tokens.keys(), gone - kept - self.now.tokens.keys()
