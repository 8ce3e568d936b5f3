"""Runs neural nets that detect faces or compute embeddings, in ONNX Runtime on the CPU.

A face has five points: the eyes, the nose, and the corners of the mouth. The eyes and the corners
are ordered from left to right in the image. A card is a JSON file that describes a net.
"""

import contextlib
import os
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from vidjax.apps.cards import REMEDY, STRIDE, Card, Input
from vidjax.apps.video import align
from vidjax.apps.video.tracks import measure_overlaps
from vidjax.utils import processes
from vidjax.utils.errors import NetError, UserError, require_packages

BLOCK_CROPS = 32  # the largest number of crops in one call of a net
LEAST_SCORE = 0.5  # a detection with a higher score counts as a face
WEAK_SCORE = 0.2  # places with a higher score are searched in the frames before and after, too
MOST_OVERLAP = 0.3  # the largest intersection over union of two faces in an image
MOST_CANDIDATES = 5000  # only the best detections enter non-maximum suppression
# Around a known face, a square is searched whose sides are 2 * NEAR times the longer side of the
# face. It is shrunk until the longer side of the face has FACE_SHARE * `Detector.size` pixels.
NEAR, FACE_SHARE = 1.0, 0.1
# `Detector.find_points` searches a square picture with this side and distance between the eyes.
# A face counts as upright if it is turned by less than MOST_TURN, the tangent of 16 degrees.
UPRIGHT_SIDE, EYE_DISTANCE, MOST_TURN = 224, 84.0, 0.29  # pixels, pixels
CELL = 4  # the side of CenterFace's cells, in pixels
# ONNX Runtime's errors may name a line of its source, and the function there with its arguments.
NO_REASON = re.compile(
    r"\[\w+\] : \d+ : \w+ : |.* , Error |.* Status Message: |/\S+\.(?:cc|h):\d+ .*?\) "
)
OTHER_INPUTS = {"tensor(float16)": np.float16, "tensor(uint8)": np.uint8}
FORMULA_STEP = 7919  # see `make_formula_image`
# The errors of code that reads the outputs of a net, if the outputs have other shapes.
UNREADABLE = (LookupError, TypeError, ValueError)
STRIDES = (8, 16, 32)  # sides of the cells of YuNet and SCRFD, in pixels
MANY_STRIDES = (*STRIDES, 64, 128)  # of SCRFD with 15 outputs


class Faces(NamedTuple):
    """The faces that were detected in an image."""

    boxes: np.ndarray  # [F, 4] float32, left, top, right and bottom in pixels
    scores: np.ndarray  # [F] float32, 0 to 1
    points: np.ndarray  # [F, 5, 2] float32, x and y in pixels of eyes, nose and mouth corners

    def take(self, index: np.ndarray) -> "Faces":
        """Selects faces by indices or a mask."""
        return Faces(*(part[index] for part in self))

    def take_above(self, score: float) -> "Faces":
        """Returns the faces with scores above `score`."""
        return self.take(self.scores > score)


NO_FACES = Faces(*(np.zeros(shape, np.float32) for shape in ((0, 4), 0, (0, 5, 2))))


class Region(NamedTuple):
    """A rectangle of an image in pixels. A detector resizes the rectangle by `scale`, at most 1."""

    left: int
    top: int
    right: int
    bottom: int
    scale: float


class Net:
    """A net that runs in ONNX Runtime on a single thread, and its card, a JSON file."""

    def __init__(self, card: Card, content: bytes | None = None):
        """Opens a net, which its card, a JSON file, describes.

        If `content`, the bytes of the net, is given, these bytes are used without a test.
        Otherwise, the file of the net is read and tested.

        Raises UserError if the net is damaged, or if its sha256, or its output for a test input,
        differs from the card.
        """
        given = card.read_net() if content is None else content
        require_packages(f"'{card.path}', a net,", "onnxruntime", extra="video")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors
        # Without this entry, weights below 1e-38 make some processors six times slower. It changes
        # the arithmetic of the whole process, so only a child process that runs nets has it.
        in_child = os.environ.get(processes.CHILD, "0")
        options.add_session_config_entry("session.set_denormal_as_zero", in_child)
        self.card = card
        with self.blame((Exception,)):  # a damaged net may raise any error
            self.session = onnxruntime.InferenceSession(given, options, ["CPUExecutionProvider"])
        if content is None:
            self._test()

    @property
    def takes_many(self) -> bool:
        """Whether the net accepts several crops at once."""
        return self.session.get_inputs()[0].shape[:1] != [1]

    @contextlib.contextmanager
    def blame(self, kinds: tuple[type[Exception], ...] = UNREADABLE) -> Iterator[None]:
        """Turns errors in a `with` block into NetErrors, which say that the net is not usable.

        `kinds` are the types of the errors. For the default, see UNREADABLE.
        """
        try:
            yield
        except kinds as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            reason, path = NO_REASON.sub("", reason), self.card.path
            reason = textwrap.shorten(reason, 120, placeholder=" ...")
            raise NetError(
                f"'{path.with_name(self.card.file)}' is not the net that '{path.name}' describes "
                f"({reason})\n{REMEDY}"
            ) from error

    def _test(self) -> None:
        """Raises NetError if the output for a test input differs from the expected output."""
        test = self.card.test
        gap = float(np.abs(self.answer_formula(test.seed) - np.array(test.output)).max())
        if not gap <= test.tolerance:  # NaN, too
            raise NetError(
                f"the output of the net differs from the test output in '{self.card.path}' by "
                f"{gap:.1e}, more than the tolerance {test.tolerance:.0e}\n"
                f"correct `colour`, `mean` and `scale` in this file, or {REMEDY}"
            )

    def answer_formula(self, seed: int) -> np.ndarray:
        """Runs the net on a test input; returns four numbers, float64 [4], of its last output.

        The output is flattened. The numbers are at 1/8, 3/8, 5/8 and 7/8 of its length. `seed`
        determines the input, see `make_formula_inputs`.
        """
        outputs = self.ask(make_formula_inputs(self.card, seed))
        with self.blame():  # the other outputs are probabilities near 0 or 1: they hide errors
            output = [*outputs.values()][-1].ravel()
            if len(output) < 4:
                raise ValueError("the last output of the net has fewer than 4 numbers")
            return output[len(output) // 8 :: len(output) // 4][:4].astype(np.float64)

    def ask(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs the net; returns its outputs by name, float32.

        Raises NetError if the net refuses `inputs`, or an output is not an array of numbers.
        """
        kinds = {x.name: OTHER_INPUTS.get(x.type) for x in self.session.get_inputs()}
        given = {name: np.asarray(x, kinds.get(name)) for name, x in inputs.items()}
        with self.blame((Exception,)):  # ONNX Runtime raises many types of errors
            names = [output.name for output in self.session.get_outputs()]
            answers = [np.asarray(answer, np.float32) for answer in self.session.run(names, given)]
        return dict(zip(names, answers, strict=True))


class Detector(Net):
    """Detects faces in images with a net. The card of the net, a JSON file, describes the net.

    Large images are shrunk until their longer side has `size` pixels. If the net has an input of
    fixed size, images are shrunk until they fit into this input.
    """

    def __init__(self, card: Card, size: int = 640):
        super().__init__(card)
        self.size = size

    def __call__(self, image: np.ndarray) -> Faces:
        """Returns the faces in `image`, uint8 [H, W, 3] RGB. Boxes and points are in its pixels."""
        return self.search(image).take_above(LEAST_SCORE)

    def search(self, image: np.ndarray, near: np.ndarray | None = None) -> Faces:
        """Returns the detections in an image, also uncertain ones with scores from 0.2 to 0.5.

        `image` is uint8 [H, W, 3] RGB. `near` [N, 4] are the boxes of faces in another frame. If
        `near` is given, only the surroundings of these boxes are searched. If a search of the whole
        image is less work, or the net has an input of fixed size, `near` is ignored.
        """
        height, width = image.shape[:2]
        most = self.card.input.size or (self.size, self.size)
        scale = min(most[0] / height, most[1] / width, 1.0)
        regions = [Region(0, 0, width, height, scale)]
        if near is not None and not self.card.input.size:
            parts = choose_regions(near, width, height, scale, FACE_SHARE * self.size)
            pixels = sum((x.right - x.left) * (x.bottom - x.top) * x.scale**2 for x in parts)
            regions = parts if pixels < height * width * scale**2 else regions
        faces = [self._search_region(image, region) for region in regions]
        return suppress_overlaps(_join(faces)) if faces else NO_FACES

    def find_points(self, face: np.ndarray, points: np.ndarray, template: np.ndarray) -> np.ndarray:
        """Finds the points of a face again, where the face is large and upright; returns [5, 2].

        YuNet's points are less exact if the face is small or turned. At an angle of 28 degrees, the
        mean cosine of SFace's vectors of the turned and the upright face is 0.62 to 0.78. With the
        new points, it is 0.84 to 0.90. If the face is upright, the mean of both is more exact.

        Args:
          face: uint8 [H, W, 3], a picture that contains the face.
          points: [5, 2], the points of the face in this picture, as they were detected.
          template: [5, 2], the places of the points of an upright face, in any unit.
        """
        if self.card.decoder != "yunet":
            return points
        upright = (template - template.mean(0)) / np.linalg.norm(template[1] - template[0])
        upright = upright * EYE_DISTANCE + UPRIGHT_SIDE / 2
        matrices = align.fit_similarity(points[None], upright)
        found = self.search(align.warp_faces(face, matrices, UPRIGHT_SIDE)[0]).points
        gaps = np.abs(found - upright).mean((1, 2))
        if not len(gaps) or gaps.min() > EYE_DISTANCE / 2:  # another face
            return points
        new = align.unmap(matrices[0], found[gaps.argmin()])
        (turned,) = align.fit_similarity(new[None], upright)
        return (points + new) / 2 if abs(turned[1, 0]) < MOST_TURN * turned[0, 0] else new

    def _search_region(self, image: np.ndarray, region: Region) -> Faces:
        """Returns the detections in a region of an image, in pixels of the image.

        Detections that the region cuts off, or whose points are no numbers, are left out.
        """
        part = image[region.top : region.bottom, region.left : region.right]
        small = resize(part, *(max(1, round(side * region.scale)) for side in part.shape[:2]))
        padded = pad(small, *(self.card.input.size or ()))
        given = {self.card.input.name: prepare_images(padded[None], self.card.input)}
        outputs = self.ask(given)
        with self.blame():
            faces = DECODERS[self.card.decoder](outputs, padded.shape[1])
        # Overlaps are removed first: a second, worse box of a cut face may lie inside the border.
        faces = suppress_overlaps(faces)
        low, high = np.array([region[:2], region[2:4]])
        ratio = np.array([part.shape[1] / small.shape[1], part.shape[0] / small.shape[0]])
        last = np.array([image.shape[1], image.shape[0]])
        boxes = faces.boxes.reshape(-1, 2, 2) * ratio + low
        inside = ((boxes[:, 0] > low) | (low == 0)) & ((boxes[:, 1] < high) | (high == last))
        boxes = np.clip(boxes, 0, last).reshape(-1, 4).astype(np.float32)
        points = (faces.points * ratio + low).astype(np.float32)
        known = inside.all(1) & np.isfinite(points).all((1, 2))
        return Faces(boxes, faces.scores, points).take(known)


class Embedder(Net):
    """Computes embeddings of faces with a net. The card, a JSON file, describes the net."""

    def prepare(self, inputs: np.ndarray) -> np.ndarray:
        """Converts crops, uint8 [N, H, W, 3] RGB, to the input of the net."""
        return prepare_images(inputs, self.card.input)

    def __call__(self, inputs: np.ndarray) -> np.ndarray:
        """Returns embeddings, float32 [N, D], of N crops or of N windows of sound.

        Crops are uint8 [N, H, W, 3] RGB. Windows are samples [N, T] from -1 to 1. Raises UserError
        if D differs from `width` in the JSON file of the net.
        """
        size = BLOCK_CROPS if self.takes_many else 1
        vectors = np.zeros((len(inputs), self.card.width or 0), np.float32)
        for start in range(0, len(inputs), size):
            block = self.prepare(inputs[start : start + size])
            (output, *_) = self.ask({self.card.input.name: block}).values()
            if output.shape != (len(block), self.card.width):
                raise UserError(
                    f"the output of the net has the shape {list(output.shape)}, but the shape by "
                    f"`width` in '{self.card.path}' is {[len(block), self.card.width]}\n"
                    "correct `width` in this file"
                )
            vectors[start : start + len(block)] = output
        return vectors


def make_formula_inputs(
    card: Card, seed: int, free_size: tuple[int, int] = (256, 256)
) -> dict[str, np.ndarray]:
    """Returns test inputs for a net: name of the input -> image or sound, made from `seed`.

    `free_size` is the height and width of the image for a net that takes images of any size.
    """
    if card.input.layout == "mels":
        numbers = make_formula_image((160, 40), seed)[:, :, 0]
        return {card.input.name: numbers[None] / np.float32(256)}
    if card.input.layout == "samples":
        numbers = make_formula_image((24, 8), seed).reshape(1, -1)
        return make_silero_inputs(card, numbers / np.float32(128) - 1)
    image = make_formula_image(card.input.size or free_size, seed)
    return {card.input.name: prepare_images(image[None], card.input)}


def make_silero_inputs(
    card: Card, samples: np.ndarray, state: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Returns the inputs of Silero's net for speech, by name.

    `samples` [1, 64 + 512] are the last 64 samples of the previous call, and 512 new samples.
    `state` is an output of the previous call, or None for the first call.
    """
    state = np.zeros((2, 1, 128), np.float32) if state is None else state
    return {card.input.name: samples, "state": state, "sr": np.array(16_000, np.int64)}


def make_formula_image(size: tuple[int, int], seed: int) -> np.ndarray:
    """Returns a test image, uint8 [*size, 3]. Row by row, value i is (7919 i + seed) mod 256."""
    height, width = size
    numbers = (np.arange(height * width * 3) * FORMULA_STEP + seed) % 256
    return numbers.astype(np.uint8).reshape(height, width, 3)


def prepare_images(images: np.ndarray, form: Input) -> np.ndarray:
    """Converts images, uint8 [N, H, W, 3] RGB, to the float32 input that a net's card describes."""
    if form.colour == "bgr":
        images = images[..., ::-1]
    mean, scale = np.array(form.mean, np.float32), np.array(form.scale, np.float32)
    if form.layout == "NCHW":
        images = images.transpose(0, 3, 1, 2)
        mean, scale = mean[:, None, None], scale[:, None, None]
    # Computing in place is ten times faster than with temporary arrays of another memory order.
    x = images.astype(np.float32, order="C")
    x -= mean
    x *= scale
    return x


def pad(image: np.ndarray, height: int = 0, width: int = 0) -> np.ndarray:
    """Pads an image [H, W, 3] at the right and the bottom with black to `height` x `width` pixels.

    A `height` or `width` of 0 means the next multiple of 32.
    """
    down = height - image.shape[0] if height else -image.shape[0] % STRIDE
    right = width - image.shape[1] if width else -image.shape[1] % STRIDE
    return np.pad(image, [(0, down), (0, right), (0, 0)])


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes an image [H, W, 3] with a linear filter; returns uint8 [height, width, 3].

    If the image is shrunk by a factor of 2 or more, blocks of pixels are averaged first.
    """
    from PIL import Image

    linear = Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(image).resize((width, height), linear, reducing_gap=1.0))


def choose_regions(
    boxes: np.ndarray, width: int, height: int, most_scale: float, side: float
) -> list[Region]:
    """Returns regions of an image that do not overlap. Each face, with a margin, is in a region.

    `boxes` [N, 4] are the faces, and `width` and `height` the size of the image, in pixels. At the
    scale of a region, the longer side of the smallest face in this region has `side` pixels. A
    scale above `most_scale` is reduced to `most_scale`.
    """
    sides = np.maximum(boxes[:, 2:] - boxes[:, :2], 1.0).max(1, keepdims=True)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    squares = np.concatenate([centres - NEAR * sides, centres + NEAR * sides], 1)
    scales = np.minimum(most_scale, side / sides[:, 0])
    regions: list[Region] = []
    for square, scale in zip(squares, scales.tolist(), strict=True):
        new = _fit_region(square.tolist(), scale, width, height)
        while near := [other for other in regions if _overlap(other, new)]:
            regions = [other for other in regions if other not in near]
            left, top, right, bottom, scales_near = zip(new, *near, strict=True)
            square = [min(left), min(top), max(right), max(bottom)]
            new = _fit_region(square, max(scales_near), width, height)
        regions.append(new)
    return regions


def _fit_region(square: list[float], scale: float, width: int, height: int) -> Region:
    """Extends `square` until each side, multiplied by `scale`, is a multiple of STRIDE pixels.

    `square` is left, top, right and bottom in pixels. If the region would cross the border of the
    image, which has `width` x `height` pixels, it is cut off there.
    """
    cell, stride = CELL / scale, STRIDE / scale
    # A detector divides the shrunk image into cells of 4 x 4 pixels. If the region begins at the
    # corner of a cell, the detections are nearly the same as in the whole image.
    left, top = (max(0, int(at // cell * cell)) for at in square[:2])
    # The sides of the shrunk region are multiples of 32 pixels, except at the border of the image.
    right = left - (left - square[2]) // stride * stride
    bottom = top - (top - square[3]) // stride * stride
    return Region(left, top, min(int(right), width), min(int(bottom), height), scale)


def _overlap(first: Region, second: Region) -> bool:
    across = first.left < second.right and second.left < first.right
    return across and first.top < second.bottom and second.top < first.bottom


def suppress_overlaps(faces: Faces) -> Faces:
    """Removes faces that overlap a face with a higher score; returns the rest by falling score.

    This is greedy non-maximum suppression. The intersection over union of two remaining faces is
    at most MOST_OVERLAP.
    """
    order = np.argsort(-faces.scores, kind="stable")[:MOST_CANDIDATES]
    boxes, kept = faces.boxes.astype(np.float64), []
    while len(order):
        best, order = order[:1], order[1:]
        kept.append(best)
        order = order[measure_overlaps(boxes[best], boxes[order])[0] <= MOST_OVERLAP]
    return faces.take(np.concatenate(kept) if kept else order)


def decode_centerface(outputs: Mapping[str, np.ndarray], width: int) -> Faces:
    """Returns the faces in the outputs of CenterFace, unsorted and in pixels of the input.

    `width` is not used. `outputs` contains these arrays, in this order:
      heatmap: [1, 1, h, w], the probability of a face's centre in each cell of 4 x 4 pixels.
      scale: [1, 2, h, w], the logarithm of a face's height and width in cells.
      offset: [1, 2, h, w], y and x from the middle of the cell to the face's centre, in cells.
      landmarks: [1, 10, h, w], y and x of five points from the top left corner of the face, as
        fractions of the face's height and width.

    Source:
      Xu et al., CenterFace: Joint Face Detection and Alignment Using Face as Point, 2020, and
      its published decoder. Unlike the decoder, we do not move the points of a face whose top left
      corner is outside the image.
    """
    del width
    (heatmap,), scale, offset, landmarks = (output[0] for output in outputs.values())
    rows, columns = np.nonzero(heatmap > WEAK_SCORE)
    size = 4 * np.exp(scale[::-1, rows, columns]).T  # width, height
    cell = np.stack([columns, rows], axis=1) + 0.5
    corner = 4 * (cell + offset[::-1, rows, columns].T) - size / 2
    points = landmarks[:, rows, columns].reshape(5, 2, -1)[:, ::-1].transpose(2, 0, 1)
    boxes = np.concatenate([corner, corner + size], axis=1)
    return Faces(boxes, heatmap[rows, columns], corner[:, None] + points * size[:, None])


def decode_yunet(outputs: Mapping[str, np.ndarray], width: int) -> Faces:
    """Returns the faces in the outputs of YuNet, in pixels of the input.

    The input is `width` pixels wide. The net divides the input into cells with sides of S = 8,
    16 and 32 pixels. For each S, there are n cells, row by row, and these outputs:
      cls_S: [1, n, 1], the probability that a cell shows a face.
      obj_S: [1, n, 1], the predicted overlap of the cell's box with the face.
      bbox_S: [1, n, 4], x and y of the centre from the cell's corner, in cells, and the logarithms
        of width and height in cells.
      kps_S: [1, n, 10], x and y of five points from the cell's corner, in cells.

    Source:
      Wu et al., YuNet: A Tiny Millisecond-level Face Detector, 2023, decoded as in OpenCV's
      FaceDetectorYN.
    """
    parts = []
    for stride in STRIDES:
        classes, objects, boxes, points = (
            outputs[f"{kind}_{stride}"][0] for kind in ("cls", "obj", "bbox", "kps")
        )
        scores = np.sqrt(np.clip(classes[:, 0], 0, 1) * np.clip(objects[:, 0], 0, 1))
        chosen = np.flatnonzero(scores > WEAK_SCORE)
        corner = _locate_cells(chosen, width // stride)
        centre = (corner + boxes[chosen, :2]) * stride
        half = np.exp(boxes[chosen, 2:]) * (stride / 2)
        points = (corner[:, None] + points[chosen].reshape(-1, 5, 2)) * stride
        box = np.concatenate([centre - half, centre + half], axis=1)
        parts.append(Faces(box, scores[chosen], points))
    return _join(parts)


def decode_scrfd(outputs: Mapping[str, np.ndarray], width: int) -> Faces:
    """Returns the faces in the outputs of SCRFD, in pixels of the input.

    The input is `width` pixels wide. It is divided into n cells of S x S pixels, row by row. A net
    with 9 outputs has S = 8, 16 and 32, and A = 2 anchors for each cell. A net with 15 outputs has
    S = 8, 16, 32, 64 and 128, and A = 1. `outputs` are the scores for each S, then the boxes for
    each S, and then the points for each S:
      scores: [A n, 1], the probability of a face.
      boxes: [A n, 4], the distances from the cell's top left corner to the left, top, right and
        bottom side of the box, in cells.
      points: [A n, 10], x and y of five points from the top left corner of the cell, in cells.

    Source:
      Guo et al., Sample and Computation Redistribution for Efficient Face Detection, 2021, and its
      published decoder, scrfd.py.
    """
    flat = [output.reshape(-1, output.shape[-1]) for output in outputs.values()]
    strides, anchors = (MANY_STRIDES, 1) if len(flat) == 3 * len(MANY_STRIDES) else (STRIDES, 2)
    parts = []
    for place, stride in enumerate(strides):
        scores, boxes, points = flat[place :: len(strides)]
        chosen = np.flatnonzero(scores[:, 0] > WEAK_SCORE)
        corner = _locate_cells(chosen // anchors, width // stride) * stride
        distance = boxes[chosen] * stride
        box = np.concatenate([corner - distance[:, :2], corner + distance[:, 2:]], axis=1)
        points = corner[:, None] + points[chosen].reshape(-1, 5, 2) * stride
        parts.append(Faces(box, scores[chosen, 0], points))
    return _join(parts)


def _locate_cells(cells: np.ndarray, width: int) -> np.ndarray:
    """Returns the column and row of each cell, float32 [n, 2], from its number in `cells` [n].

    Cells are numbered row by row. Each row has `width` cells.
    """
    return np.stack([cells % width, cells // width], axis=1).astype(np.float32)


def _join(parts: list[Faces]) -> Faces:
    return Faces(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


# The functions that decode the outputs of detectors, by `decoder` in the card. Their arguments are
# the outputs by name, and the width of the input.
DECODERS: Mapping[str, Callable[[Mapping[str, np.ndarray], int], Faces]] = {
    "centerface": decode_centerface,
    "yunet": decode_yunet,
    "scrfd": decode_scrfd,
}
