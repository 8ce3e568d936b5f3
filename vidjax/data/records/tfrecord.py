"""TFRecord files of messages `tf.train.Example`, written without TensorFlow; `reader` reads them.

TensorFlow takes longer to import than a shard to write, and 400 MB of memory: a pool of processes
would pay for both in each of them.

Source: the TFRecord format and the messages `Example`, `Features` and `Feature` of TensorFlow; the
wire format of protocol buffers; for the checksum, G. Castagnoli, S. Braeuer, M. Herrmann,
"Optimization of cyclic redundancy-check codes with 24 and 32 parity bits", 1993.
"""

import functools
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import BinaryIO, NamedTuple

import numpy as np

# Tags of the messages: (number of the field << 3) + 2, which is a length and as many bytes.
FIRST, SECOND, THIRD = b"\x0a", b"\x12", b"\x1a"
POLYNOMIAL = 0x82F63B78  # of CRC-32C, its bits reversed
ROW = 512  # bytes of a row in `crc32c`; many rows are summed at once
BATCH_BYTES = 4 << 20


def write(file: BinaryIO, examples: Iterable[bytes]) -> None:
    """Appends messages to a TFRecord file, some at once."""
    for batch in batches(examples):
        sizes = [struct.pack("<Q", len(example)) for example in batch]
        sums = [struct.pack("<I", crc) for crc in masked_sums([*sizes, *batch]).tolist()]
        of_sizes, of_examples = sums[: len(batch)], sums[len(batch) :]
        parts = zip(sizes, of_sizes, batch, of_examples, strict=True)
        file.write(b"".join([part for record in parts for part in record]))


def batches(examples: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Yields lists of messages of about BATCH_BYTES, as `crc32c` lays them out in whole rows."""
    batch, size = [], 0
    for example in examples:
        batch.append(example)
        size += -(-len(example) // ROW) * ROW
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode(values: Mapping[str, bytes | int]) -> bytes:
    """Returns a message `Example` of one value for each key, in the order of protocol buffers.

    Their library sorts keys where asked to write the same bytes always, and among two of which one
    begins with the other, the longer comes first.

    Args:
      values: key -> value; whole numbers are not negative.
    """
    parts = []
    for key in sorted(values, key=lambda key: f"{key}\U0010ffff"):
        value = values[key]
        kind, content = (FIRST, value) if isinstance(value, bytes) else (THIRD, _varint(value))
        parts += (_entry(key, kind, len(content)), content)
    features = b"".join(parts)
    return FIRST + _varint(len(features)) + features


@functools.lru_cache(1 << 14)  # most clips have as many frames as others
def _entry(key: str, kind: bytes, size: int) -> bytes:
    """Returns an entry of the map of features up to its value of `size` bytes."""
    message, rest = b"", size
    for tag in (FIRST, kind, SECOND):  # the value, the list that it is in, its feature
        message = tag + _varint(rest) + message
        rest = len(message) + size
    name = key.encode()
    message = FIRST + _varint(len(name)) + name + message
    return FIRST + _varint(len(message) + size) + message


def _varint(number: int) -> bytes:
    """Returns a whole number, 0 or more, in 7 bits a byte, the lowest first."""
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*found, number])


def masked_sums(messages: Sequence[bytes]) -> np.ndarray:
    """Returns the checksum of each message of 4 bytes or more as TFRecord files hold it, uint32."""
    crc = crc32c(messages)
    return (crc >> 15 | crc << 17) + np.uint32(0xA282EAD8)  # modulo 2**32


class _Tables(NamedTuple):
    """What a checksum, a whole number of 32 bits, becomes after bytes of zero.

    A checksum is linear: that of its upper and of its lower half, by exclusive or, make it up.

    Attributes:
      word: [65536] uint32, after two bytes, by its lower half; the upper one is shifted.
      low, high: [65536] uint32, after a row, by its lower and its upper half.
    """

    word: np.ndarray
    low: np.ndarray
    high: np.ndarray


@functools.cache
def _tables() -> _Tables:
    word = np.arange(1 << 16, dtype=np.uint32)
    for _ in range(16):
        word = word >> 1 ^ np.where(word & 1, np.uint32(POLYNOMIAL), np.uint32(0))
    low = np.arange(1 << 16, dtype=np.uint32)
    high = low << 16
    for _ in range(ROW // 2):
        low, high = (word[half & 0xFFFF] ^ half >> 16 for half in (low, high))
    return _Tables(word, low, high)


def crc32c(messages: Sequence[bytes]) -> np.ndarray:
    """Returns the CRC-32C of each message of 4 bytes or more, [N] uint32.

    Zeros before a message do not change a checksum that begins with 0. So messages are filled up
    to whole rows, the sums of all rows are computed at once, and then joined. To begin with
    0xFFFFFFFF instead is to invert the first four bytes.
    """
    tables = _tables()
    sizes = np.array([len(message) for message in messages])
    rows = -(-sizes // ROW)
    ends = np.cumsum(rows) * ROW
    content = np.zeros(int(ends[-1]), np.uint8)
    for message, size, end in zip(messages, sizes.tolist(), ends.tolist(), strict=True):
        content[end - size : end] = np.frombuffer(message, np.uint8)
    content[(ends - sizes)[:, None] + np.arange(4)] ^= 0xFF
    columns = np.ascontiguousarray(content.view("<u8").reshape(-1, ROW // 8).T)
    sums = np.zeros(columns.shape[1], np.uint32)
    for column in columns:
        for word in column.view("<u2").reshape(-1, 4).T:
            sums = tables.word[sums.astype(np.uint16) ^ word] ^ sums >> 16
    # The last rows of all messages stand in one column; before its first row, a message has zeros.
    place = np.arange(len(sums)) - np.repeat(np.cumsum(rows), rows) + rows.max()
    joined = np.zeros((int(rows.max()), len(messages)), np.uint32)
    joined[place, np.repeat(np.arange(len(messages)), rows)] = sums
    total = np.zeros(len(messages), np.uint32)
    for row in joined:
        total = tables.low[total & 0xFFFF] ^ tables.high[total >> 16] ^ row
    return ~total
