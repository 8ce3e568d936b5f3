"""The people in a picture: their faces, heads and bodies, the scene, and crops of these.

A head or body is what a detector of its role finds around the face. Without one it is a box around
the face, the card's `around`: left, top, right and bottom in sides of the face, whose box is
0, 0, 1, 1. Boxes are in pixels of the picture.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from vidjax.errors import UserError
from vidjax.extract import align, cards
from vidjax.extract.models import Detector, Embedder, resize
from vidjax.extract.voices import Listener


class Nets(NamedTuple):
    """Part -> the net that finds it, part -> the net that makes vectors of it; `listen` hears."""

    detect: dict[str, Detector]
    embed: dict[str, Embedder]
    listen: Listener | None = None


class Figures(NamedTuple):
    """The people in a picture; boxes and points of what is not found are NaN.

    boxes: [N, 4] of heads that a net finds, or else of faces; scores: [N] of faces, or else of
    heads; points: [N, 5, 2] of faces; parts: part -> boxes [N, 4].
    """

    boxes: np.ndarray
    scores: np.ndarray
    points: np.ndarray
    parts: dict[str, np.ndarray]

    def of(self, index: np.ndarray) -> "Figures":
        """Returns some of them."""
        parts = {part: boxes[index] for part, boxes in self.parts.items()}
        return Figures(self.boxes[index], self.scores[index], self.points[index], parts)


def load(known: Mapping[cards.Role, cards.Card], size: int) -> Nets:
    """Returns the nets of cards; `size` is the longer side that pictures are shrunk to.

    Raises:
      UserError: a head or body can be embedded, and not be found.
    """
    detect = {
        role.removesuffix("_detector"): Detector(card, size)
        for role, card in known.items() if card.decoder in cards.DETECTORS
    }  # fmt: skip
    embed = {part: Embedder(x) for part, x in cards.embedders(known).items() if part != "audio"}
    for part in [one for one in ("head", "body") if one in embed and one not in detect]:
        if embed[part].card.around is None:
            raise UserError(
                f"'{embed[part].card.path}' does not say where a {part} is\n"
                f'give it "around": [LEFT, TOP, RIGHT, BOTTOM] in sides of a face, '
                f"or add a {part}_detector"
            )
    return Nets(detect, embed, Listener(known) if known.keys() >= {*cards.VOICES} else None)


def find(nets: Nets, rgb: np.ndarray) -> Figures:
    """Returns the people in a picture uint8 [H, W, 3]: faces, the best first, then other heads."""
    faces = nets.detect["face"](rgb)
    boxes, scores, points = faces
    parts = {"face": boxes}
    if "head" in nets.detect:
        heads = nets.detect["head"](rgb)
        head = _pair(faces.boxes, heads.boxes)
        more = np.setdiff1d(np.arange(len(heads.boxes)), head)  # heads without a face
        face = np.append(np.arange(len(head)), np.full(len(more), -1))
        head = np.append(head, more)
        parts = {"face": _take(faces.boxes, face), "head": _take(heads.boxes, head)}
        boxes = np.where(head[:, None] < 0, parts["face"], parts["head"])
        scores, points = np.append(scores, heads.scores[more]), _take(points, face)
    for part, net in nets.embed.items():
        if part == "scene":
            parts[part] = np.tile([0.0, 0.0, rgb.shape[1], rgb.shape[0]], (len(boxes), 1))
        elif part == "body" and part in nets.detect:
            bodies = nets.detect[part](rgb).boxes
            parts[part] = _take(bodies, _pair(boxes, bodies))
        elif part not in parts:
            corner, sides = parts["face"][:, :2], parts["face"][:, 2:] - parts["face"][:, :2]
            parts[part] = np.tile(corner, 2) + np.tile(sides, 2) * np.array(net.card.around)
    return Figures(boxes, scores, points, parts)


def crops(card: cards.Card, part: str, figures: Figures, rgb: np.ndarray) -> dict[int, np.ndarray]:
    """Returns figure -> its crop of a part, uint8 [H, W, 3] as the card's net takes it."""
    height, width = card.input.size or (0, 0)
    has = np.flatnonzero(~np.isnan(figures.parts[part][:, 0]))
    if part == "face":
        turns = align.similarity(figures.points[has], np.array(card.template))
        return dict(zip(has.tolist(), align.warp(rgb, turns, height), strict=True))
    if part == "scene":
        return dict.fromkeys(has.tolist(), resize(rgb, height, width))  # one in memory for all
    boxes = figures.parts[part][has]
    edges = np.concatenate([np.floor(boxes[:, :2]), np.ceil(boxes[:, 2:])], 1).clip(0).astype(int)
    found = [rgb[top:bottom, left:right] for left, top, right, bottom in edges]
    cut = zip(has.tolist(), found, strict=True)
    return {place: resize(crop, height, width) for place, crop in cut if crop.size}


def _take(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Returns values[index], NaN where the index is -1."""
    return np.append(values, np.full_like(values, np.nan, shape=(1, *values.shape[1:])), 0)[index]


def _pair(small: np.ndarray, large: np.ndarray) -> np.ndarray:
    """Returns for each of the boxes [M, 4] one of [N, 4] that its centre is in; -1 for none.

    The smallest of the large boxes chooses first, the centre nearest to its middle line and top;
    each box is in one pair at most.
    """
    owner = np.full(len(small), -1)
    centres = (small[:, :2] + small[:, 2:]) / 2
    for place in np.argsort((large[:, 2:] - large[:, :2]).prod(1), kind="stable"):
        left, top, right, bottom = large[place]
        inside = (centres >= (left, top)) & (centres <= (right, bottom))
        free = np.flatnonzero((owner < 0) & inside.all(1))
        if len(free):
            distance = np.abs(centres[free] - ((left + right) / 2, top)).sum(1)
            owner[free[distance.argmin()]] = place
    return owner
