"""The people in a picture: their faces, heads and bodies, the scene, and crops of these.

A head or body is what a detector of its role finds around the face. Without one it is a box around
the face, the card's `around`: left, top, right and bottom in sides of the face, whose own box is
0, 0, 1, 1. Boxes are in pixels of the picture.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from vidjax.errors import UserError
from vidjax.extract import align
from vidjax.extract.cards import VOICES, Card, Role
from vidjax.extract.models import Detector, Embedder, resize
from vidjax.extract.voices import Listener

PARTS = ("face", "head", "body", "scene")


class Nets(NamedTuple):
    """Part -> the net that finds it, and the one that makes vectors of it; and those of voices."""

    detect: dict[str, Detector]
    embed: dict[str, Embedder]
    listen: Listener | None = None


class Figures(NamedTuple):
    """The people in a picture.

    boxes: [N, 4] of heads where these are detected, or else of faces; scores: [N] of faces, or else
    of heads; points: [N, 5, 2] of faces, NaN without a face; parts: part -> [N, 4] boxes, NaN for
    none.
    """

    boxes: np.ndarray
    scores: np.ndarray
    points: np.ndarray
    parts: dict[str, np.ndarray]

    def of(self, index: np.ndarray) -> "Figures":
        """Returns some of them."""
        parts = {part: boxes[index] for part, boxes in self.parts.items()}
        return Figures(self.boxes[index], self.scores[index], self.points[index], parts)


def load(cards: Mapping[Role, Card], size: int) -> Nets:
    """Returns the nets of cards; `size` is the longer side that pictures are shrunk to.

    Raises:
      UserError: a head or body can be embedded, and not be found.
    """
    detect, embed = {}, {}
    for part in PARTS:
        for role, card in cards.items():
            if role == f"{part}_detector":
                detect[part] = Detector(card, size)
            if role == f"{part}_embedder":
                embed[part] = Embedder(card)
    for part in sorted({"head", "body"} & embed.keys() - detect.keys()):
        if embed[part].card.around is None:
            raise UserError(
                f"'{embed[part].card.path}' does not say where a {part} is\n"
                f'give it "around": [LEFT, TOP, RIGHT, BOTTOM] in sides of a face, '
                f"or add a {part}_detector"
            )
    return Nets(detect, embed, Listener(cards) if cards.keys() >= {*VOICES} else None)


def find(nets: Nets, rgb: np.ndarray) -> Figures:
    """Returns the people in a picture uint8 [H, W, 3], the best first."""
    faces = heads = nets.detect["face"](rgb)
    boxes, scores, face = faces.boxes, faces.scores, np.arange(len(faces.boxes))
    if "head" in nets.detect:
        heads = nets.detect["head"](rgb)
        of_head = _inside(faces.boxes, heads.boxes)
        alone = np.setdiff1d(face, of_head)  # faces whose heads were not found
        boxes = np.concatenate([heads.boxes, faces.boxes[alone]])
        scores = np.concatenate([heads.scores, faces.scores[alone]])
        face = np.concatenate([of_head, alone])
        scores = np.where(face >= 0, np.append(faces.scores, 0.0)[face], scores)
    blank = np.full((1, 4), np.nan, np.float32)
    parts = {"face": np.concatenate([faces.boxes, blank])[face]}
    points = np.concatenate([faces.points, np.full((1, 5, 2), np.nan, np.float32)])[face]
    for part in [one for one in ("head", "body") if one in nets.embed]:
        if part not in nets.detect:
            parts[part] = _around(parts["face"], nets.embed[part].card.around)
            continue
        parts[part] = np.full((len(boxes), 4), np.nan, np.float32)
        if part == "head":
            parts[part][: len(heads.boxes)] = heads.boxes
            continue
        found = nets.detect[part](rgb)
        owner = _inside(boxes, found.boxes)
        parts[part][owner[owner >= 0]] = found.boxes[owner >= 0]
    if "scene" in nets.embed:
        parts["scene"] = np.tile([0.0, 0.0, rgb.shape[1], rgb.shape[0]], (len(boxes), 1))
    return Figures(boxes, scores, points, parts)


def crops(nets: Nets, part: str, figures: Figures, rgb: np.ndarray) -> list[np.ndarray | None]:
    """Returns each figure's crop of a part, uint8 [H, W, 3] as its net takes it, or None."""
    card = nets.embed[part].card
    height, width = card.input.size or (0, 0)
    found: list[np.ndarray | None] = [None] * len(figures.boxes)
    if part == "face":
        has = np.flatnonzero(~np.isnan(figures.parts["face"][:, 0]))
        turns = align.similarity(figures.points[has], np.array(card.template))
        for place, crop in zip(has.tolist(), align.warp(rgb, turns, height), strict=True):
            found[place] = crop
        return found
    if part == "scene":
        return [resize(rgb, height, width)] * len(figures.boxes)  # one in memory for all
    for place, box in enumerate(figures.parts[part]):
        if not np.isnan(box[0]):
            left, top = np.maximum(np.floor(box[:2]).astype(int), 0)
            right, bottom = np.ceil(box[2:]).astype(int)
            inside = rgb[top : max(bottom, 0), left : max(right, 0)]
            found[place] = resize(inside, height, width) if inside.size else None
    return found


def _around(faces: np.ndarray, around: tuple[float, float, float, float] | None) -> np.ndarray:
    """Returns boxes [N, 4] around faces [N, 4]."""
    sides = np.tile(faces[:, 2:] - faces[:, :2], 2)
    return np.tile(faces[:, :2], 2) + sides * np.array(around)


def _inside(small: np.ndarray, large: np.ndarray) -> np.ndarray:
    """Returns for each of the boxes [M, 4] the one of [N, 4] whose centre is in it; -1 for none.

    The smallest of the large boxes chooses first, the centre nearest to its middle line and top;
    each box is in one pair at most.
    """
    owner = np.full(len(large), -1)
    centres = (small[:, :2] + small[:, 2:]) / 2
    free = np.ones(len(small), bool)
    for place in np.argsort((large[:, 2:] - large[:, :2]).prod(1), kind="stable"):
        box = large[place]
        inside = free & ((centres >= box[:2]) & (centres <= box[2:])).all(1)
        if inside.any():
            top = np.array([(box[0] + box[2]) / 2, box[1]])
            distance = np.where(inside, np.abs(centres - top).sum(1), np.inf)
            owner[place] = distance.argmin()
            free[owner[place]] = False
    return owner
