"""Cuts aligned crops of faces out of pictures, and measures the quality of faces.

Coordinates are (x, y) in pixels, and (0, 0) is the centre of the top left pixel. A face has five
points: right eye, left eye, nose, right corner of the mouth, left corner. The right eye is on the
left of the picture.
"""

import io
import math

import numpy as np

MOST_SHRINK = 2.0  # if a crop is shrunk by a larger factor, squares of pixels are averaged first
# `cut_face` keeps up to FACE_DETAIL times the resolution of a crop. From the middle of the crop, it
# cuts FACE_REACH times the side of the crop in each direction, which is enough to turn the crop.
FACE_DETAIL, FACE_REACH = 3.0, 0.8
FULL_EYE_DISTANCE = 40.0  # in pixels; a larger distance between the eyes adds no quality
SQUARES = 37  # sharpness is measured after the crop is reduced to about 37 x 37 squares
HALF_SHARP = 1200.0  # the sharpness is 0.5 at this variance; grey levels are 0 to 255
# The next two lengths are in units of the distance between the eyes.
PROFILE_OFFSET = 0.5  # in a profile, the distance of the nose from the middle line of the face
EYE_RADIUS = 0.22  # the radius of the discs in which the brightness of eyes and cheeks is measured
THUMBNAIL_SIDE = 160  # largest side of a thumbnail in pixels
# Eyes count as covered below this share of the brightness of the cheeks. Bare eyes have 0.8 to 1.2.
DARK_EYES_RATIO = 0.6
GREY = np.array([0.299, 0.587, 0.114], np.float32)  # luma of ITU-R BT.601
# The EXIF orientations for which a picture is mirrored from left to right, and from top to bottom.
# Before that, rows and columns are exchanged for the orientations 5 to 8.
MIRRORED = (2, 3, 6, 7), (3, 4, 7, 8)


def turn_picture(rgb: np.ndarray, orientation: int) -> np.ndarray:
    """Turns a stored picture [H, W, 3] upright, by its EXIF orientation, 1 to 8."""
    rgb = rgb.swapaxes(0, 1) if orientation > 4 else rgb
    across, down = (-1 if orientation in mirrored else 1 for mirrored in MIRRORED)
    return np.ascontiguousarray(rgb[::down, ::across])


def turn_boxes(boxes: np.ndarray, orientation: int) -> np.ndarray:
    """Turns boxes [n, 4] from the stored picture to the upright picture, by EXIF orientation.

    A box is left, top, right and bottom, as fractions of the picture's width and height.
    """
    points = boxes.reshape(-1, 2, 2)
    if orientation > 4:
        points = points[..., ::-1]
    points = np.where([orientation in mirrored for mirrored in MIRRORED], 1 - points, points)
    return np.concatenate([points.min(1), points.max(1)], 1)


def turn_box(
    box: tuple[float, float, float, float], old: int, new: int
) -> tuple[float, float, float, float]:
    """Returns the box of a face after the orientation of its picture has changed.

    A box is left, top, width and height, as fractions of the upright picture. `old` and `new` are
    EXIF orientations of the same stored picture, 1 to 8. 6 and 8 turn in opposite directions. Each
    other orientation is its own inverse.
    """
    if old == new:
        return box
    left, top, width, height = box
    corners = np.array([left, top, left + width, top + height])
    stored = turn_boxes(corners, {6: 8, 8: 6}.get(old, old))
    left, top, right, bottom = turn_boxes(stored, new).clip(0, 1).round(6)[0].tolist()
    return left, top, round(right - left, 6), round(bottom - top, 6)


def fit_similarity(points: np.ndarray, template: np.ndarray) -> np.ndarray:
    """Fits the rotation, scale and shift that map the points of each face to a template.

    Args:
      points: [N, P, 2], the points (x, y) of N faces in the picture.
      template: [P, 2], the places (x, y) of these points in a crop.

    Returns:
      [N, 2, 3] float64, a matrix M for each face. The point (x, y) of the picture is the point
      M (x, y, 1) of the crop. If all points of a face coincide, M only shifts them.

    Source: Umeyama 1991, "Least-squares estimation of transformation parameters between two point
    patterns", equations 40 to 42. In two dimensions without mirroring, they need no singular value
    decomposition.
    """
    points, template = np.asarray(points, np.float64), np.asarray(template, np.float64)
    middle, target = points.mean(1), template.mean(0)
    x, y = np.moveaxis(points - middle[:, None], -1, 0)
    u, v = (template - target).T
    spread = (x * x + y * y).sum(1)
    coincide = spread < 1e-12
    spread = np.where(coincide, 1.0, spread)
    cosine = np.where(coincide, 1.0, (x @ u + y @ v) / spread)
    sine = np.where(coincide, 0.0, (x @ v - y @ u) / spread)
    linear = np.stack([cosine, -sine, sine, cosine], 1).reshape(-1, 2, 2)
    shift = target - np.einsum("nij,nj->ni", linear, middle)
    return np.concatenate([linear, shift[..., None]], 2)


def warp_faces(rgb: np.ndarray, matrices: np.ndarray, size: int) -> np.ndarray:
    """Cuts N crops, uint8 [N, size, size, 3], out of a picture with linear interpolation.

    A crop is black where it lies outside the picture. Colours are rounded down. If a crop is shrunk
    by a factor above 2, squares of pixels are averaged first to avoid aliasing.

    Args:
      rgb: [H, W, 3] uint8, the picture.
      matrices: [N, 2, 3], the maps from the picture to the crops, see `fit_similarity`.
      size: the side of a crop in pixels.
    """
    from PIL import Image

    crops = np.zeros((len(matrices), size, size, 3), np.uint8)
    for crop, matrix in zip(crops, np.asarray(matrices, np.float64), strict=True):
        scale = np.sqrt(abs(np.linalg.det(matrix[:, :2])))
        if not np.isfinite(scale) or scale < 1e-6:
            continue
        corners = np.array([[0, 0], [0, size], [size, 0], [size, size]])
        factor = int(1.0 / scale) if scale * MOST_SHRINK < 1.0 else 1
        part, shift = _cut_region(rgb, unmap(matrix, corners), factor)
        if part.size:
            inverse = np.linalg.inv(matrix[:, :2]) / factor
            # The part gets a black border, and Pillow counts from the corner of the first pixel.
            moved = shift - inverse @ (matrix[:, 2] + 0.5) + 1.5
            numbers = np.column_stack([inverse, moved]).ravel().tolist()
            framed = Image.fromarray(np.pad(part, [(1, 2), (1, 2), (0, 0)]))
            affine, linear = Image.Transform.AFFINE, Image.Resampling.BILINEAR
            crop[:] = np.asarray(framed.transform((size, size), affine, numbers, linear))
    return crops


def cut_face(
    rgb: np.ndarray, points: np.ndarray, template: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Cuts the surroundings of a face out of a picture, so that the face can be aligned later.

    `points` [5, 2] are the points of the face in the picture. `template` and `size` belong to the
    later crop, see `fit_similarity` and `warp_faces`. Returns the part of the picture, and the
    points [5, 2] in this part. If the face is much larger than in the crop, the part is shrunk.
    """
    (matrix,) = fit_similarity(points[None], template)
    corners = size / 2 + FACE_REACH * size * np.array([[-1, -1], [-1, 1], [1, -1], [1, 1]])
    scale = max(np.sqrt(np.linalg.det(matrix[:, :2])), 1e-3)
    factor = math.ceil(1 / (FACE_DETAIL * scale))
    part, shift = _cut_region(rgb, unmap(matrix, corners), factor)
    return part.copy(), points / factor + shift


def unmap(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Maps `points` [P, 2] of a crop to the picture, with the `matrix` [2, 3] of the crop."""
    return (points - matrix[:, 2]) @ np.linalg.inv(matrix[:, :2]).T


def _cut_region(rgb: np.ndarray, places: np.ndarray, factor: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts out the part of a picture around `places` [P, 2], and shrinks the part by `factor`.

    Returns the shrunk part, and [2] x and y of the picture's point (0, 0) in it.
    """
    from PIL import Image

    # Squares are counted from the corner of the picture, so that all crops have the same squares.
    last = -(-np.array(rgb.shape[1::-1]) // factor)
    left, top = np.clip(np.floor(places.min(0) / factor) - 1, 0, last).astype(int).tolist()
    right, bottom = np.clip(np.ceil(places.max(0) / factor) + 2, 0, last).astype(int).tolist()
    part = rgb[top * factor : bottom * factor, left * factor : right * factor]
    if factor > 1 and part.size:
        part = np.asarray(Image.fromarray(part).reduce(factor))
    return part, -(factor - 1) / 2 / factor - np.array([left, top])


def encode_thumbnail(crop: np.ndarray) -> bytes:
    """Returns a PNG file of a crop [S, S, 3] uint8, shrunk to sides of at most 160 pixels."""
    from PIL import Image

    png = io.BytesIO()
    Image.fromarray(crop).reduce(-(-len(crop) // THUMBNAIL_SIDE)).save(png, "PNG", compress_level=4)
    return png.getvalue()


def measure_quality(
    scores: np.ndarray, points: np.ndarray, crops: np.ndarray, inside: np.ndarray | float = 1.0
) -> np.ndarray:
    """Returns the quality of each face for recognition, float32 [N], 0 to 1.

    The quality is the product of score, size, sharpness and frontality, and is lower for faces that
    the border of the picture cuts off. We have not measured how well this product predicts errors
    of recognition.

    Args:
      scores: [N], the scores of the detector, 0 to 1.
      points: [N, 5, 2], the five points of each face in the picture.
      crops: [N, S, S, 3] uint8, the crops of `warp_faces`.
      inside: [N], the share of each crop that is inside the picture, see `measure_inside`.
    """
    quality = np.clip(scores, 0, 1) * measure_size(points) * measure_sharpness(crops)
    # If much of a crop is missing, two people look alike. The mean cosine of dlib's vectors is 0.88
    # for 14 whole faces, the same without the upper 20 %, 0.90 without 30 %, and 0.94 without half.
    whole = 1 / (1 + ((1 - inside) / 0.2) ** 6)
    return (quality * measure_frontality(points) * whole).astype(np.float32)


def measure_inside(
    points: np.ndarray, template: np.ndarray, size: int, shape: tuple[int, ...]
) -> np.ndarray:
    """Returns the share of each crop that is inside the picture, float64 [N].

    Args:
      points: [N, 5, 2], the five points (x, y) of N faces in the picture.
      template: [5, 2], the places (x, y) of these points in a crop, see `fit_similarity`.
      size: the side of a crop in pixels.
      shape: the shape of the picture, [H, W, ...], in pixels.
    """
    matrices = fit_similarity(points, template)
    across = np.linspace(0, size - 1, 16)
    gap = np.stack(np.meshgrid(across, across), -1).reshape(-1, 2) - matrices[:, None, :, 2]
    # A crop is turned and scaled. So its inverse is its transpose, divided by the squared scale.
    scale = np.maximum(np.abs(np.linalg.det(matrices[:, :, :2])), 1e-12)
    places = gap @ matrices[:, :, :2] / scale[:, None, None]
    end = np.array([shape[1], shape[0]]) - 0.5  # the edges of the last pixels
    return np.all((places >= -0.5) & (places <= end), 2).mean(1)


def measure_clarity(quality: float, clear_quality: float | None) -> float:
    """Returns the clarity of a face, from 0 (small or blurred) to 1 (clear).

    Embeddings of small or blurred faces are alike even if they show two people. We assume that the
    expected squared distance between the embeddings of two people is proportional to the clarity of
    the clearer face. The clarity is the square root of `quality` / `clear_quality`, but at most 1.
    If `clear_quality` is None, the clarity is 1. For `quality`, see `measure_quality`.
    """
    # We measured films of photos that were shrunk, blurred and compressed. For two people, the mean
    # cosine of dlib's vectors grows from 0.86 at a quality above 0.3 to 0.91 below 0.01. For one
    # person, it stays at 0.96. The square root is our choice.
    return 1.0 if clear_quality is None else min(1.0, quality / clear_quality) ** 0.5


def measure_size(points: np.ndarray) -> np.ndarray:
    """Returns the size of each face, [N], 0 to 1: the distance between the eyes / 40 pixels.

    The size is at most 1. `points` [N, 5, 2] are the five points (x, y) of each face in pixels.
    """
    return np.minimum(1.0, _measure_eye_distance(points) / FULL_EYE_DISTANCE)


def measure_sharpness(crops: np.ndarray) -> np.ndarray:
    """Returns the sharpness of each crop, [N], 0 to 1. `crops` are uint8 [N, S, S, 3].

    Each crop is converted to grey and shrunk to about 37 x 37 pixels. The sharpness is
    v / (v + 1200). Here v is the variance of the crop's Laplacian, minus the estimated noise.
    """
    grey = crops.astype(np.float32) @ GREY
    step = max(2, grey.shape[1] // SQUARES)
    # The noise is estimated in squares of half the side, because faces have little detail at this
    # size. The estimate is scaled down, because the mean of a larger square contains less noise.
    part = step // 2
    variance = _measure_detail(grey, step) - _measure_detail(grey, part) * (part / step) ** 2
    variance = np.maximum(variance, 0.0)
    return variance / (variance + HALF_SHARP)


def _measure_detail(grey: np.ndarray, step: int) -> np.ndarray:
    """Returns how much detail images `grey` [N, S, S] have after they are shrunk by `step`: [N].

    The detail of an image is the variance of its Laplacian.
    """
    side = grey.shape[1] // step
    squares = grey[:, : side * step, : side * step].reshape(-1, side, step, side, step)
    means = squares.mean((2, 4))
    around = means[:, :-2, 1:-1] + means[:, 2:, 1:-1] + means[:, 1:-1, :-2] + means[:, 1:-1, 2:]
    return (around - 4.0 * means[:, 1:-1, 1:-1]).var((1, 2))


def measure_frontality(points: np.ndarray) -> np.ndarray:
    """Returns how much each face looks into the camera, [N], from 0 (profile) to 1 (frontal).

    The result is 1 if the nose is on the line from the middle of the eyes to the middle of the
    mouth. The result falls linearly with the distance of the nose from this line. If this distance
    is half the distance between the eyes, the result is 0. A tilt of the head does not change the
    result. `points` [N, 5, 2] are the five points of each face.
    """
    points = np.asarray(points, np.float64)
    eyes, mouth = points[:, :2].mean(1), points[:, 3:].mean(1)
    line, nose = mouth - eyes, points[:, 2] - eyes
    length = np.maximum(np.hypot(*line.T), 1e-6)
    off = np.abs(line[:, 0] * nose[:, 1] - line[:, 1] * nose[:, 0]) / length
    most = PROFILE_OFFSET * np.maximum(_measure_eye_distance(points), 1e-6)
    return np.clip(1.0 - off / most, 0.0, 1.0)


def find_upside_down(points: np.ndarray) -> np.ndarray:
    """Returns whether each face is upside down, bool [N].

    A face that lies on its side does not count. `points` [N, 5, 2] are the five points of each
    face.
    """
    points = np.asarray(points, np.float64)
    across, down = (points[:, 3:].mean(1) - points[:, :2].mean(1)).T
    return down < -np.abs(across)


def has_dark_eyes(crops: np.ndarray, template: np.ndarray) -> np.ndarray:
    """Returns whether both eyes are much darker than the cheeks, as with sunglasses: bool [N].

    Each eye is compared with the cheek below. The brightest pixels around a bare eye, which are
    skin or the white of the eye, are about as bright as the cheek.

    Args:
      crops: [N, S, S, 3] uint8, the crops of `warp_faces`.
      template: [5, 2], the places (x, y) of the five points of a face in a crop.
    """
    grey, template = crops.astype(np.float32) @ GREY, np.asarray(template, np.float64)
    eyes, mouth = template[:2], template[3:]
    radius = EYE_RADIUS * _measure_eye_distance(template[None])[0]
    y, x = np.mgrid[: grey.shape[1], : grey.shape[2]]

    def measure_level(middle: np.ndarray, percent: float) -> np.ndarray:
        disc = np.hypot(x - middle[0], y - middle[1]) <= radius
        return np.percentile(grey[:, disc], percent, axis=1)

    sides = [
        measure_level(eye, 80) < DARK_EYES_RATIO * measure_level((eye + corner) / 2, 50)
        for eye, corner in zip(eyes, mouth, strict=True)
    ]
    return np.logical_and(*sides)


def _measure_eye_distance(points: np.ndarray) -> np.ndarray:
    """Returns the distance between the eyes of each face in pixels, [N]."""
    return np.hypot(*(points[:, 1] - points[:, 0]).astype(np.float64).T)
