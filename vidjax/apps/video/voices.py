"""Nets that hear where somebody speaks, and turn speech into vectors; sound is 16 kHz, float32.

Voices of two people who speak at once, or over music, are not told apart.
"""

import collections
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vidjax.apps.video import decode, nets
from vidjax.apps.video.cards import Card, Role

if TYPE_CHECKING:
    from vidjax.apps.video.features_folder import Track

RATE = decode.SOUND_RATE
STEP = 512  # samples, 32 ms, of one probability of speech
CONTEXT = 64  # samples before these, which the net hears again
WINDOW = 25_600  # samples, 1.6 s, of one vector
FRAME, HOP, BANDS = 400, 160, 40  # samples of a frame, and between two; mel bands
WINDOW_STEP = WINDOW // 2  # samples between the begins of two windows
SPEECH, LEAST_STEPS = 0.5, 25  # probability of speech, in so many steps (0.8 s) of a window
PIECE_WINDOWS = 74  # that are heard at once, 60 s
LEAST_LEVEL = 10 ** (-30 / 20)  # root mean square that fainter windows are raised to


def voice_embedder(card: Card) -> nets.Embedder:
    """Returns the net that turns windows of samples [N, WINDOW], -1 to 1, into unit vectors."""
    return nets.Embedder(card, lambda windows, _: mels(raise_level(windows)))


class Span(NamedTuple):
    """A piece of a film, in seconds, whose voice goes with a clip."""

    clip: str
    start_s: float
    end_s: float


class Voice(NamedTuple):
    """Windows of speech: `begin` [n] int, in samples; `vectors` [n, D]; `quality` [n], see below.

    The quality is the part of the window in which somebody speaks, 0.5 to 1.
    """

    begin: np.ndarray
    vectors: np.ndarray
    quality: np.ndarray


class Listener:
    """Finds speech, and makes vectors of it."""

    def __init__(self, cards: Mapping[Role, Card]):
        self._hears = cards["voice_activity"]
        self._session = nets.open_session(self._hears)
        self._embeds = voice_embedder(cards["voice_embedder"])

    def __call__(self, samples: np.ndarray) -> Voice:
        """Returns the windows of samples [N], N >= WINDOW, that have enough speech."""
        speech = self.speech(samples) > SPEECH
        begin = np.arange(0, len(samples) - WINDOW + 1, WINDOW_STEP)
        steps = np.array([speech[at // STEP : (at + WINDOW) // STEP].sum() for at in begin])
        begin, steps = begin[steps >= LEAST_STEPS], steps[steps >= LEAST_STEPS]
        windows = np.lib.stride_tricks.sliding_window_view(samples, WINDOW)[begin]
        quality = (steps * STEP / WINDOW).astype(np.float32)
        return Voice(begin, self._embeds(np.ascontiguousarray(windows)), quality)

    def speech(self, samples: np.ndarray) -> np.ndarray:
        """Returns the probability of speech, float32 [ceil(N / STEP)], of samples [N], -1 to 1."""
        count = -(-len(samples) // STEP)
        padded = np.zeros(CONTEXT + count * STEP, np.float32)
        padded[CONTEXT : CONTEXT + len(samples)] = samples
        found, state = np.zeros(count, np.float32), None
        for place in range(count):
            piece = padded[None, place * STEP : (place + 1) * STEP + CONTEXT]
            inputs = nets.silero_inputs(self._hears, piece, state)
            probability, state = nets.ask(self._session, self._hears, inputs).values()
            found[place] = probability[0, 0]
        return found


def alone(tracks: "Iterable[Track]") -> Iterator[Span]:
    """Yields when exactly one track is seen, in order of time, in pieces of PIECE_WINDOWS.

    A person counts as seen from the first sighting of a track to the last, also without a face.
    """
    tracks = list(tracks)
    ends = [(seconds, n) for n, one in enumerate(tracks) for seconds in (one.start_s, one.end_s)]
    seen: set[int] = set()
    for (begin, number), (end, _) in itertools.pairwise(sorted(ends)):
        seen ^= {number}
        if len(seen) == 1:
            (only,) = seen
            yield from _pieces(tracks[only].clip, begin, end)


def _pieces(clip: str, begin: float, end: float) -> Iterator[Span]:
    """Yields a time in pieces of PIECE_WINDOWS whole windows; none where not even one fits in."""
    window, step = WINDOW / RATE, WINDOW_STEP / RATE
    count = int((end - begin - window) / step + 1e-6) + 1 if end - begin >= window else 0
    for first in range(0, count, PIECE_WINDOWS):
        last = min(first + PIECE_WINDOWS, count) - 1
        yield Span(clip, begin + first * step, begin + last * step + window)


def listen(
    sound: Iterable[tuple[float, np.ndarray]], spans: Iterable[Span]
) -> Iterator[tuple[Span, np.ndarray]]:
    """Yields the samples of each span, zeros where no sound is; spans without any are left out.

    `sound` are (seconds, samples) in order of time, with gaps; two spans are in memory at most.
    """
    waiting, heard = collections.deque(spans), collections.deque[tuple[Span, int, np.ndarray]]()
    for seconds, samples in sound:
        first = round(seconds * RATE)
        last = first + len(samples)
        while waiting and waiting[0].start_s * RATE < last:
            span = waiting.popleft()
            count = round((span.end_s - span.start_s) * RATE)
            if (begin := round(span.start_s * RATE)) + count > first:
                heard.append((span, begin, np.zeros(count, np.float32)))
        for _, begin, found in heard:
            low, high = max(first, begin), min(last, begin + len(found))
            if low < high:
                found[low - begin : high - begin] = samples[low - first : high - first]
        while heard and heard[0][1] + len(heard[0][2]) <= last:
            span, _, found = heard.popleft()
            yield span, found
        if not waiting and not heard:
            return
    for span, _, found in heard:
        yield span, found


def raise_level(windows: np.ndarray) -> np.ndarray:
    """Returns windows [N, T] whose root mean square is at least LEAST_LEVEL; silence stays."""
    level = np.sqrt(np.mean(np.square(windows, dtype=np.float64), axis=1, keepdims=True))
    gain = np.where(level > 0, np.maximum(LEAST_LEVEL / np.maximum(level, 1e-12), 1), 1)
    return (windows * gain).astype(np.float32)


def mels(windows: np.ndarray) -> np.ndarray:
    """Returns the power in mel bands, float32 [N, T / HOP, BANDS], of samples [N, T].

    Source:
      librosa's `melspectrogram` with frames of 25 ms about every 10 ms, a Hann window, and zeros
      beyond the ends; as Resemblyzer calls it, without a logarithm. Its last frame is dropped.
    """
    count = windows.shape[1] // HOP
    padded = np.pad(windows, [(0, 0), (FRAME // 2, FRAME // 2)])
    frames = np.lib.stride_tricks.sliding_window_view(padded, FRAME, axis=1)[:, ::HOP][:, :count]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(FRAME) / FRAME)
    power = np.abs(np.fft.rfft(frames * hann)) ** 2
    return (power @ filters().T).astype(np.float32)


@functools.cache
def filters() -> np.ndarray:
    """Returns the weights of frequencies in each mel band, float64 [BANDS, FRAME / 2 + 1].

    Source:
      Slaney, Auditory Toolbox, 1998: triangles of equal area, 66.7 Hz apart up to 1 kHz and a
      factor of 6.4 in 27 steps above.
    """
    knee, step = 15.0, np.log(6.4) / 27  # the mel of 1 kHz, and the logarithm of a step above

    def to_hz(mel: np.ndarray) -> np.ndarray:
        above = 1000 * np.exp(step * np.maximum(mel - knee, 0))
        return np.where(mel < knee, mel * (200 / 3), above)

    top = knee + np.log(RATE / 2 / 1000) / step
    edges = to_hz(np.linspace(0, top, BANDS + 2))
    frequencies = np.arange(FRAME // 2 + 1) * (RATE / FRAME)
    rising = (frequencies - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - frequencies) / np.diff(edges)[1:, None]
    triangles = np.maximum(0, np.minimum(rising, falling))
    return triangles * (2 / (edges[2:] - edges[:-2]))[:, None]
