"""Detects speech, and computes embeddings of voices. Sound is float32 at 16 kHz.

If two people speak at once, or a person speaks over music, the voices are not separated.
"""

import collections
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vidjax.apps.cards import Card, Role
from vidjax.apps.video import decode, nets

if TYPE_CHECKING:
    from vidjax.apps.video.media import FaceTrack

RATE = decode.SOUND_RATE
STEP = 512  # samples (32 ms) for which the net computes a probability of speech
CONTEXT = 64  # samples before a step that are also part of the net's input
WINDOW = 25_600  # samples (1.6 s) of which an embedding is computed
FRAME, HOP, BANDS = 400, 160, 40  # samples of a frame, samples between two frames, mel bands
WINDOW_STEP = WINDOW // 2  # samples between the starts of two windows
SPEECH, LEAST_STEPS = 0.5, 25  # a window needs a probability above 0.5 in at least 25 steps (0.8 s)
PIECE_WINDOWS = 74  # windows that are processed at once (60 s)
LEAST_LEVEL = 10 ** (-30 / 20)  # the root mean square to which fainter windows are amplified


class VoiceEmbedder(nets.Embedder):
    """Computes embeddings of windows of sound. A window is 25600 samples, 1.6 s at 16 kHz."""

    def prepare(self, inputs: np.ndarray) -> np.ndarray:
        """Converts windows of sound, [N, 25600], to mel spectrograms, the input of the net."""
        return make_mels(raise_level(inputs))


class Span(NamedTuple):
    """A part of a film, in seconds. All speech in it is assigned to the person of `clip`."""

    clip: str
    start_s: float
    end_s: float


class Voice(NamedTuple):
    """The embeddings of n windows of sound that contain speech."""

    begin: np.ndarray  # [n], the start of each window in samples
    vectors: np.ndarray  # [n, D], the embeddings
    quality: np.ndarray  # [n], the share of each window that contains speech, 0.5 to 1


class Listener:
    """Detects speech with one net, and computes embeddings of voices with another net."""

    def __init__(self, cards: Mapping[Role, Card]):
        self._hears = nets.Net(cards["voice_activity"])
        self._embeds = VoiceEmbedder(cards["voice_embedder"])

    def __call__(self, samples: np.ndarray) -> Voice:
        """Returns embeddings of those windows of 1.6 seconds of which half or more is speech.

        `samples` are float32 [N] at 16 kHz. N must be at least 25,600.
        """
        speech = self.detect_speech(samples) > SPEECH
        begin = np.arange(0, len(samples) - WINDOW + 1, WINDOW_STEP)
        steps = np.array([speech[at // STEP : (at + WINDOW) // STEP].sum() for at in begin])
        begin, steps = begin[steps >= LEAST_STEPS], steps[steps >= LEAST_STEPS]
        windows = np.lib.stride_tricks.sliding_window_view(samples, WINDOW)[begin]
        quality = (steps * STEP / WINDOW).astype(np.float32)
        return Voice(begin, self._embeds(np.ascontiguousarray(windows)), quality)

    def detect_speech(self, samples: np.ndarray) -> np.ndarray:
        """Returns the probability of speech in each step of 512 samples, float32 [n]."""
        count = -(-len(samples) // STEP)
        padded = np.zeros(CONTEXT + count * STEP, np.float32)
        padded[CONTEXT : CONTEXT + len(samples)] = samples
        probabilities, state = np.zeros(count, np.float32), None
        for step in range(count):
            piece = padded[None, step * STEP : (step + 1) * STEP + CONTEXT]
            inputs = nets.make_silero_inputs(self._hears.card, piece, state)
            outputs = self._hears.ask(inputs)
            with self._hears.blame():
                probability, state = outputs.values()
                probabilities[step] = probability[0, 0]
        return probabilities


def find_solo_spans(tracks: "Sequence[FaceTrack]") -> Iterator[Span]:
    """Yields the parts of a film during which only one person is visible, in order of time.

    Parts shorter than 1.6 seconds are left out. Long parts are split into pieces of 60 seconds that
    overlap by 0.8 seconds. A person counts as visible from the start to the end of the track.
    """
    ends = [(time_s, n) for n, x in enumerate(tracks) for time_s in (x.start_s, x.end_s)]
    seen: set[int] = set()
    for (begin, number), (end, _) in itertools.pairwise(sorted(ends)):
        seen ^= {number}
        if len(seen) == 1:
            (number,) = seen
            yield from _split_span(tracks[number].clip, begin, end)


def _split_span(clip: str, begin: float, end: float) -> Iterator[Span]:
    """Splits the part of a film from `begin` to `end` seconds into spans of up to 60 seconds."""
    window, step = WINDOW / RATE, WINDOW_STEP / RATE
    count = int((end - begin - window) / step + 1 + 1e-6)  # 1e-6 is for rounding errors of times
    for first in range(0, count, PIECE_WINDOWS):
        last = min(first + PIECE_WINDOWS, count) - 1
        yield Span(clip, begin + first * step, begin + last * step + window)


def cut_spans(
    sound: Iterable[tuple[float, np.ndarray]], spans: Iterable[Span]
) -> Iterator[tuple[Span, np.ndarray]]:
    """Yields each span of a film with its samples. Spans without sound are left out.

    `sound` contains blocks (start in seconds, float32 samples [n] at 16 kHz). Blocks and `spans`
    are in order of time. Gaps between blocks are filled with zeros.
    """
    waiting = collections.deque(spans)
    open_spans = collections.deque[tuple[Span, int, np.ndarray]]()
    for seconds, samples in sound:
        first = round(seconds * RATE)
        last = first + len(samples)
        while waiting and waiting[0].start_s * RATE < last:
            span = waiting.popleft()
            count = round((span.end_s - span.start_s) * RATE)
            if (begin := round(span.start_s * RATE)) + count > first:
                open_spans.append((span, begin, np.zeros(count, np.float32)))
        for _, begin, output in open_spans:
            low, high = max(first, begin), min(last, begin + len(output))
            if low < high:
                output[low - begin : high - begin] = samples[low - first : high - first]
        while open_spans and open_spans[0][1] + len(open_spans[0][2]) <= last:
            span, _, output = open_spans.popleft()
            yield span, output
        if not waiting and not open_spans:
            return
    for span, _, output in open_spans:
        yield span, output


def raise_level(windows: np.ndarray) -> np.ndarray:
    """Amplifies faint windows of sound [N, T] to a level of -30 dB full scale, except silence."""
    level = np.sqrt(np.mean(np.square(windows, dtype=np.float64), axis=1, keepdims=True))
    gain = np.maximum(LEAST_LEVEL / np.maximum(level, 1e-12), 1)
    return (windows * gain).astype(np.float32)


def make_mels(windows: np.ndarray) -> np.ndarray:
    """Returns mel spectrograms, float32 [N, T / 160, 40], of windows of samples [N, T].

    Frames of 25 ms begin every 10 ms, and have a Hann window. Beyond the ends, samples are zero.
    No logarithm is taken.

    Source: librosa's `melspectrogram`, as Resemblyzer calls it, without the last frame.
    """
    count = windows.shape[1] // HOP
    padded = np.pad(windows, [(0, 0), (FRAME // 2, FRAME // 2)])
    frames = np.lib.stride_tricks.sliding_window_view(padded, FRAME, axis=1)[:, ::HOP][:, :count]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(FRAME) / FRAME)
    power = np.abs(np.fft.rfft(frames * hann)) ** 2
    return (power @ make_mel_filters().T).astype(np.float32)


@functools.cache
def make_mel_filters() -> np.ndarray:
    """Returns the weight of each frequency in each mel band, float64 [40, 201].

    The bands are triangles of equal area. Up to 1 kHz, each mel adds 66.7 Hz to the frequency.
    Above 1 kHz, 27 mels multiply the frequency by 6.4. Source: Slaney, Auditory Toolbox, 1998.
    """
    knee, step = 15.0, np.log(6.4) / 27  # 1 kHz in mels, and the logarithm of a step above it

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
