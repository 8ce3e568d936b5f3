"""Decodes a photo with Pillow. The photo may be malicious.

Call this module only in a child process with limits, see `vidjax.utils.processes`.
"""

import contextlib
import io
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vidjax.apps.video import align, decode
from vidjax.utils import files
from vidjax.utils.errors import UserError, require_packages

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "JPEG2000", "GIF", "PPM", "AVIF"]
# The first bytes of a photo -> FFmpeg's decoder, and the bytes before and after its pixels.
PIXELS = {
    b"\xff\xd8\xff": ("mjpeg", b"\xff\xda", b"\xff\xd9"), b"\x89PNG": ("png", b"IDAT", b"IEND"),
}  # fmt: skip
HEIC = re.compile(rb"....ftyp(hei[cxms]|hev[cx]|mif1|msf1)", re.DOTALL)  # the first bytes
ORIENTATION = 0x112  # the EXIF tag


def read_photo(path: Path) -> np.ndarray | None:
    """Reads a photo, or the first picture of an animation. Returns None if it may be a film.

    The result is upright, uint8 [H, W, 3] in sRGB. Photos may be JPEG, PNG, WebP, BMP, TIFF,
    JPEG 2000, GIF, PPM, AVIF or HEIC. Large JPEG photos are reduced. Transparent parts are white.

    Raises:
      UserError: `path` is not a regular file, the photo is damaged or too large, or a package is
        not installed.
    """
    require_packages(f"'{path}', a video or photo,", "PIL", "av", extra="video")
    from PIL import Image, UnidentifiedImageError

    Image.MAX_IMAGE_PIXELS = None  # `_reduce` checks the size
    with files.open_input(path) as stored_file:
        file: io.RawIOBase | io.BytesIO = stored_file
        first = stored_file.read(12)
        formats = _choose_formats(path, first)
        for begin in PIXELS:
            if first.startswith(begin):
                file = _check_pixel_data(path, first + stored_file.read(), *PIXELS[begin])
        try:
            with Image.open(file, formats=formats) as photo:
                _reduce(path, photo)
                photo.load()
                turn = _read_orientation(photo)  # 1 if Pillow has turned the photo
                return align.turn_picture(np.asarray(_convert_to_srgb(photo)), turn)
        except UnidentifiedImageError:
            if formats is FORMATS:
                return None
            raise UserError(f"'{path}' is a damaged photo\ncopy the photo again") from None
        except (MemoryError, UserError):
            raise
        except Exception as error:  # the libraries raise many types of errors
            raise UserError(
                f"'{path}' is a damaged photo: {str(error)[:100]}\ncopy the photo again"
            ) from error


def read_orientation(path: Path) -> int:
    """Returns the EXIF orientation of a stored photo, 1 to 8.

    Returns 1 if the photo is damaged or has none.
    """
    require_packages(f"'{path}', a photo,", "PIL", extra="video")
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # no pixels are decoded
    with files.open_input(path) as file:
        formats = _choose_formats(path, file.read(12))
        file.seek(0)
        with contextlib.suppress(Exception), Image.open(file, formats=formats) as photo:
            stored = photo.info.get("original_orientation") or _read_orientation(photo)
            return stored if stored in range(1, 9) else 1
    return 1


def _choose_formats(path: Path, first: bytes) -> list[str]:
    """Returns Pillow's names of the formats that a photo may have. `first` are its first bytes."""
    if not HEIC.match(first):
        return FORMATS
    require_packages(f"'{path}', a photo in HEIC,", "pillow_heif", extra="video")
    import pillow_heif

    pillow_heif.register_heif_opener()
    return ["HEIF"]


def _check_pixel_data(
    path: Path, content: bytes, codec: str, begin: bytes, end: bytes
) -> io.BytesIO:
    """Checks the pixels in `content`, a JPEG or PNG photo; returns the photo as a binary file.

    If a JPEG photo lacks only its end marker, the marker is added. Raises UserError if the pixels
    are damaged, which Pillow would not report. A photo with more than `decode.MOST_PIXELS` pixels,
    or in a form that FFmpeg cannot decode, is not checked. The other arguments are a value of
    PIXELS.
    """
    import av
    from av.error import ExternalError, FFmpegError, InvalidDataError

    decoder = av.VideoCodecContext.create(codec, "r")
    assert isinstance(decoder, av.VideoCodecContext)
    decoder.options = {"max_pixels": str(decode.MOST_PIXELS)}
    if codec == "mjpeg":  # by default, FFmpeg fills damaged parts of a JPEG photo with grey
        decoder.options |= {"err_detect": "explode"}
    decoder.thread_count = 1
    problem, is_checked = "", True
    try:
        decoder.decode(av.Packet(content))
    except (ExternalError, InvalidDataError):
        problem = "its pixels cannot be decoded"
    except FFmpegError:
        is_checked = False
    if end not in content[content.rfind(begin) :]:
        if content.endswith(bytes(16)):  # the end of the file was not copied
            problem = problem or "its end is missing"
        elif is_checked and codec == "mjpeg":  # some programs leave out only the last mark
            content += end
    if problem:
        raise UserError(f"'{path}' is a damaged photo: {problem}\ncopy the photo again")
    return io.BytesIO(content)


def _reduce(path: Path, photo: "Image") -> None:
    """Makes Pillow shrink a photo with more than `decode.MOST_PIXELS` pixels while it is read.

    This works only for JPEG photos. Raises UserError if the photo stays above MOST_PIXELS.
    """
    sides = np.array(photo.size)
    factor = next((n for n in (1, 2, 4) if np.ceil(sides / n).prod() <= decode.MOST_PIXELS), 1)
    if factor > 1:
        photo.draft(None, (photo.width // factor, photo.height // factor))
    decode.check_pixels(path, *photo.size)


def _read_orientation(photo: "Image") -> int:
    """Returns the EXIF orientation of a photo, 1 to 8, or 1 if it is missing or wrong."""
    with contextlib.suppress(Exception):  # a photo with damaged metadata is still a photo
        turn = photo.getexif().get(ORIENTATION, 1)
        return turn if turn in range(1, 9) else 1
    return 1


def _convert_to_srgb(photo: "Image") -> "Image":
    """Converts a photo in any colours to sRGB. A colour profile that does not fit is ignored."""
    from PIL import Image, ImageCms

    profile = photo.info.get("icc_profile")
    if photo.mode.startswith("I"):  # 16 bits
        photo = Image.fromarray((np.asarray(photo).clip(0, 65_535) // 257).astype(np.uint8))
    if photo.has_transparency_data:
        photo = photo.convert("RGBA")
        photo = Image.alpha_composite(Image.new("RGBA", photo.size, "white"), photo)
    if photo.mode not in ("L", "RGB", "CMYK"):
        photo = photo.convert("RGB")
    if profile:
        with contextlib.suppress(ImageCms.PyCMSError, OSError):
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if "sRGB" not in ImageCms.getProfileDescription(source):
                srgb = ImageCms.createProfile("sRGB")
                photo = ImageCms.profileToProfile(photo, source, srgb, outputMode="RGB") or photo
    return photo.convert("RGB")
