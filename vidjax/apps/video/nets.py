"""Nets that find faces and turn crops into vectors, in ONNX Runtime on the CPU.

What stands around a net is numpy: resizing, decoding of its outputs, and non-maximum suppression.
The points of a face are eyes, nose and corners of the mouth, each from left to right in the image.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vidjax.apps.video.cards import REMEDY, STRIDE, Card, Input
from vidjax.utils.errors import UserError, need

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

BLOCK = 32  # crops that a net takes at a time
LEAST_SCORE = 0.5
MOST_OVERLAP = 0.3  # of two boxes of one image, as intersection over union
MOST_CANDIDATES = 5000  # the best, of which overlapping ones are left out
FORMULA = 7919
STRIDES = (8, 16, 32)  # sides of the cells of YuNet and SCRFD, in pixels


class Faces(NamedTuple):
    """Detections of an image, the best first.

    boxes: [F, 4] float32, left, top, right and bottom in pixels; scores: [F] float32, 0 to 1;
    points: [F, 5, 2] float32, x and y in pixels.
    """

    boxes: np.ndarray
    scores: np.ndarray
    points: np.ndarray


class Detector:
    """Finds faces; `size` is the longer side in pixels that an image is shrunk to.

    A smaller image is not enlarged, and a card that fixes the size of the input decides instead.
    """

    def __init__(self, card: Card, size: int = 640):
        self.card, self.size = card, size
        self.session = open_session(card)

    def __call__(self, image: np.ndarray) -> Faces:
        """Returns the faces of an image, uint8 [H, W, 3] rgb, in pixels of that image."""
        height, width = self.card.input.size or (self.size, self.size)
        scale = min(height / image.shape[0], width / image.shape[1], 1.0)
        small = resize(image, _scaled(image.shape[0], scale), _scaled(image.shape[1], scale))
        padded = pad(small, *(self.card.input.size or ()))
        outputs = ask(
            self.session, self.card, {self.card.input.name: prepare(padded[None], self.card.input)}
        )
        try:
            faces = DECODERS[self.card.decoder](outputs, padded.shape[1])
        except (LookupError, ValueError) as error:
            raise _no_net(self.card, error) from error
        faces = suppress(faces, MOST_OVERLAP)
        ratio = np.array([image.shape[1] / small.shape[1], image.shape[0] / small.shape[0]])
        last = np.array([image.shape[1], image.shape[0]])
        boxes = np.clip(faces.boxes.reshape(-1, 2, 2) * ratio, 0, last).reshape(-1, 4)
        return Faces(
            boxes.astype(np.float32), faces.scores, (faces.points * ratio).astype(np.float32)
        )


class Embedder:
    """Turns crops, or windows of sound, into vectors of `card.width` numbers."""

    def __init__(
        self, card: Card, make_input: Callable[[np.ndarray, Input], np.ndarray] | None = None
    ):
        """Opens the net of a card; `make_input` returns its input, None for `prepare`."""
        self.card, self.session = card, open_session(card)
        self._make_input = make_input or prepare

    def __call__(self, given: np.ndarray) -> np.ndarray:
        """Returns vectors float32 [N, width], of crops uint8 [N, S, S, 3] rgb or of N windows.

        Raises:
          UserError: the net gives other vectors than its card says.
        """
        vectors = np.zeros((len(given), self.card.width or 0), np.float32)
        for start in range(0, len(given), BLOCK):
            block = self._make_input(given[start : start + BLOCK], self.card.input)
            (found, *_) = ask(self.session, self.card, {self.card.input.name: block}).values()
            if found.shape != (len(block), self.card.width):
                raise UserError(
                    f"'{self.card.path}': its net gives {list(found.shape)} for {len(block)} "
                    f"inputs, not vectors of {self.card.width} numbers\ncorrect the card's width"
                )
            vectors[start : start + len(block)] = found
        return vectors


def open_session(card: Card) -> "InferenceSession":
    """Returns a card's net, ready to run in one thread, after `check_test_vector`."""
    need(f"'{card.path}', a net,", "onnxruntime", extra="video")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors
    content = card.read_net()
    try:
        session = onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])
    except Exception as error:  # a damaged net raises whatever the runtime raises
        raise _no_net(card, error) from error
    check_test_vector(card, session)
    return session


def _no_net(card: Card, error: Exception) -> UserError:
    reason = (str(error) or type(error).__name__).splitlines()[0][:200]
    return UserError(
        f"'{card.path.with_name(card.file)}' does not run as its card says ({reason})\n{REMEDY}"
    )


def check_test_vector(card: Card, session: "InferenceSession") -> None:
    """Raises UserError unless a net answers to an image made by a formula as its card says."""
    found = answer_to_formula(card, session, card.test.seed)
    gap = float(np.abs(found - np.array(card.test.output)).max())
    if not gap <= card.test.tolerance:  # NaN, too
        raise UserError(
            f"'{card.path}': its net answers otherwise than the card's test ({gap:.1e} off, "
            f"{card.test.tolerance:.0e} allowed)\n"
            f"colour, mean or scale of the input are wrong, or onnxruntime is: {REMEDY}"
        )


def answer_to_formula(card: Card, session: "InferenceSession", seed: int) -> np.ndarray:
    """Returns four numbers, float64, that a net answers to the image of `formula_image`.

    They lie 1, 3, 5 and 7 eighths into its last output, whose numbers are never near 0 or 1 alone:
    the points of faces, a vector, or the state of a net that hears.
    """
    output = [*ask(session, card, formula_inputs(card, seed)).values()][-1].ravel()
    return output[len(output) // 8 :: len(output) // 4][:4].astype(np.float64)


def formula_inputs(card: Card, seed: int) -> dict[str, np.ndarray]:
    """Returns name -> input of a net: the image of `formula_image`, or sound of its numbers."""
    if card.input.layout == "mels":
        numbers = formula_image((160, 40), seed)[:, :, 0]
        return {card.input.name: numbers[None] / np.float32(256)}
    if card.input.layout == "samples":
        numbers = formula_image((24, 8), seed).reshape(1, -1)
        return silero_inputs(card, numbers / np.float32(128) - 1)
    image = formula_image(card.input.size or (256, 256), seed)
    return {card.input.name: prepare(image[None], card.input)}


def silero_inputs(
    card: Card, samples: np.ndarray, state: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Returns the inputs of Silero's net: samples [1, 64 + 512] and the state that it gave last."""
    state = np.zeros((2, 1, 128), np.float32) if state is None else state
    return {card.input.name: samples, "state": state, "sr": np.array(16_000, np.int64)}


def formula_image(size: tuple[int, int], seed: int) -> np.ndarray:
    """Returns uint8 [H, W, 3] whose number i, row by row, is (7919 i + seed) mod 256."""
    height, width = size
    numbers = (np.arange(height * width * 3) * FORMULA + seed) % 256
    return numbers.astype(np.uint8).reshape(height, width, 3)


def ask(
    session: "InferenceSession", card: Card, inputs: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Returns name -> output of a net for its inputs by name."""
    try:
        names = [output.name for output in session.get_outputs()]
        answers = session.run(names, dict(inputs))
    except Exception as error:  # another input than the card says
        raise _no_net(card, error) from error
    return {name: np.asarray(answer) for name, answer in zip(names, answers, strict=True)}


def prepare(images: np.ndarray, wanted: Input) -> np.ndarray:
    """Returns uint8 images [N, H, W, 3] rgb as the float32 input of a net."""
    if wanted.colour == "bgr":
        images = images[..., ::-1]
    x = (images - np.array(wanted.mean, np.float32)) * np.array(wanted.scale, np.float32)
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2) if wanted.layout == "NCHW" else x)


def _scaled(length: int, scale: float) -> int:
    return max(1, round(length * scale))


def pad(image: np.ndarray, height: int = 0, width: int = 0) -> np.ndarray:
    """Returns [H, W, 3] with black at the right and bottom, to a size or multiples of STRIDE."""
    sides = (height or -image.shape[0] % STRIDE + image.shape[0],
             width or -image.shape[1] % STRIDE + image.shape[1])  # fmt: skip
    padded = np.zeros((*sides, 3), image.dtype)
    padded[: image.shape[0], : image.shape[1]] = image
    return padded


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Returns uint8 [height, width, 3], interpolated linearly between the centres of pixels.

    An image that shrinks by 2 or more is averaged over whole blocks of pixels first, since
    interpolation alone would skip pixels.
    """
    step = min(image.shape[0] // height, image.shape[1] // width)
    if step > 1:
        image = _block_means(image, step)
    for axis, length in enumerate((height, width)):
        if image.shape[axis] != length:
            image = _interpolate(image, length, axis)
    return image if image.dtype == np.uint8 else np.round(image).astype(np.uint8)


def _block_means(image: np.ndarray, step: int) -> np.ndarray:
    """Returns float32 means of blocks of step x step pixels; leaves out an incomplete last one."""
    height, width = (side // step * step for side in image.shape[:2])
    total = np.zeros((height // step, width // step, 3), np.float32)
    for row in range(step):
        for column in range(step):
            total += image[row:height:step, column:width:step]
    return total / (step * step)


def _interpolate(image: np.ndarray, length: int, axis: int) -> np.ndarray:
    """Returns a float32 image with `length` rows (axis 0) or columns (1), edges repeated."""
    at = (np.arange(length) + 0.5) * (image.shape[axis] / length) - 0.5
    at = np.clip(at, 0, image.shape[axis] - 1)
    low = np.minimum(at.astype(int), max(image.shape[axis] - 2, 0))
    share = (at - low).astype(np.float32).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
    first = image.take(low, axis).astype(np.float32)
    last = image.take(np.minimum(low + 1, image.shape[axis] - 1), axis)
    return first + share * (last - first)


def suppress(faces: Faces, most_overlap: float) -> Faces:
    """Returns faces by falling score, without those that overlap a better one.

    Source: greedy non-maximum suppression; overlap is intersection over union, `most_overlap` is
    still allowed.
    """
    order = np.argsort(-faces.scores, kind="stable")[:MOST_CANDIDATES]
    boxes, kept = faces.boxes[order].astype(np.float64), []
    area = np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 0), axis=1)
    left = np.arange(len(order))
    while len(left):
        best, left = left[0], left[1:]
        kept.append(best)
        low = np.maximum(boxes[left, :2], boxes[best, :2])
        high = np.minimum(boxes[left, 2:], boxes[best, 2:])
        both = np.prod(np.maximum(high - low, 0), axis=1)
        left = left[both <= most_overlap * (area[left] + area[best] - both)]
    chosen = order[np.array(kept, int)]
    return Faces(*(part[chosen] for part in faces))


def decode_centerface(outputs: Mapping[str, np.ndarray], width: int) -> Faces:
    """Returns the faces of CenterFace's outputs, in pixels of its input, unsorted.

    The outputs, in this order:
      heatmap: [1, 1, h, w], probability of a face's centre in each cell of 4 x 4 pixels.
      scale: [1, 2, h, w], logarithm of a face's height and width in cells.
      offset: [1, 2, h, w], y and x of the centre within its cell, from its middle, in cells.
      landmarks: [1, 10, h, w], y and x of five points in heights and widths, from the top left
        corner.

    Source:
      Xu et al., CenterFace: Joint Face Detection and Alignment Using Face as Point, 2020, and
      its published decoder. There a corner beyond the image is moved to its edge before points are
      added to it; here the points of a face that the edge cuts stay in place.
    """
    del width
    (heatmap,), scale, offset, landmarks = (output[0] for output in outputs.values())
    rows, columns = np.nonzero(heatmap > LEAST_SCORE)
    size = 4 * np.exp(scale[::-1, rows, columns]).T  # width, height
    cell = np.stack([columns, rows], axis=1) + 0.5
    corner = 4 * (cell + offset[::-1, rows, columns].T) - size / 2
    points = landmarks[:, rows, columns].reshape(5, 2, -1)[:, ::-1].transpose(2, 0, 1)
    return Faces(
        np.concatenate([corner, corner + size], axis=1),
        heatmap[rows, columns],
        corner[:, None] + points * size[:, None],
    )


def decode_yunet(outputs: Mapping[str, np.ndarray], width: int) -> Faces:
    """Returns the faces that YuNet finds, in pixels of its input, `width` pixels wide.

    The outputs of each of STRIDES, the side of a cell in pixels, for n cells row by row:
      cls_S: [1, n, 1], probability that a cell shows a face.
      obj_S: [1, n, 1], predicted overlap of the cell's box with the face.
      bbox_S: [1, n, 4], x and y of the centre from the cell's corner, in cells, and the logarithms
        of width and height in cells.
      kps_S: [1, n, 10], x and y of five points from the cell's corner, in cells.

    Source:
      Wu et al., YuNet: A Tiny Millisecond-level Face Detector, 2023; the decoding is that of
      OpenCV's FaceDetectorYN.
    """
    parts = []
    for stride in STRIDES:
        classes, objects, boxes, points = (
            outputs[f"{kind}_{stride}"][0] for kind in ("cls", "obj", "bbox", "kps")
        )
        scores = np.sqrt(np.clip(classes[:, 0], 0, 1) * np.clip(objects[:, 0], 0, 1))
        chosen = np.flatnonzero(scores > LEAST_SCORE)
        corner = _corners(chosen, width // stride)
        centre = (corner + boxes[chosen, :2]) * stride
        half = np.exp(boxes[chosen, 2:]) * (stride / 2)
        points = (corner[:, None] + points[chosen].reshape(-1, 5, 2)) * stride
        box = np.concatenate([centre - half, centre + half], axis=1)
        parts.append(Faces(box, scores[chosen], points))
    return _join(parts)


def decode_scrfd(outputs: Mapping[str, np.ndarray], width: int) -> Faces:
    """Returns the faces that SCRFD finds, in pixels of its input, `width` pixels wide.

    The outputs, first scores, then boxes, then points, each for STRIDES; for two anchors in each of
    n cells, row by row:
      scores: [2 n, 1], probability of a face.
      boxes: [2 n, 4], distances from the cell's corner to the box's left, top, right and bottom
        side, in cells.
      points: [2 n, 10], x and y of five points from the cell's corner, in cells.

    Source:
      Guo et al., Sample and Computation Redistribution for Efficient Face Detection, 2021, and its
      published decoder.
    """
    flat = [output.reshape(-1, output.shape[-1]) for output in outputs.values()]
    parts = []
    for place, stride in enumerate(STRIDES):
        scores, boxes, points = flat[place :: len(STRIDES)]
        chosen = np.flatnonzero(scores[:, 0] > LEAST_SCORE)
        corner = _corners(chosen // 2, width // stride) * stride
        distance = boxes[chosen] * stride
        box = np.concatenate([corner - distance[:, :2], corner + distance[:, 2:]], axis=1)
        points = corner[:, None] + points[chosen].reshape(-1, 5, 2) * stride
        parts.append(Faces(box, scores[chosen, 0], points))
    return _join(parts)


def _corners(cells: np.ndarray, width: int) -> np.ndarray:
    """Returns the column and row, float32 [n, 2], of cells in rows of `width`."""
    return np.stack([cells % width, cells // width], axis=1).astype(np.float32)


def _join(parts: list[Faces]) -> Faces:
    return Faces(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


# Decoder of a card -> function of a net's outputs by name and the width of its input.
DECODERS: Mapping[str, Callable[[Mapping[str, np.ndarray], int], Faces]] = {
    "centerface": decode_centerface,
    "yunet": decode_yunet,
    "scrfd": decode_scrfd,
}
