"""Nets that hear where somebody speaks, and turn speech into vectors; sound is 16 kHz, float32.

Voices of two people who speak at once, or over music, are not told apart.
"""

import functools

import numpy as np

from vidjax.errors import ArgumentError
from vidjax.extract import models
from vidjax.extract.cards import Card

RATE = 16_000  # samples a second
STEP = 512  # samples, 32 ms, of one probability of speech
CONTEXT = 64  # samples before these, which the net hears again
WINDOW = 25_600  # samples, 1.6 s, of one vector
FRAME, HOP, BANDS = 400, 160, 40  # samples of a frame, and between two; mel bands
LEAST_LEVEL = 10 ** (-30 / 20)  # root mean square that fainter windows are raised to


class VoiceActivity:
    """Tells where somebody speaks."""

    def __init__(self, card: Card, *, threads: int = 1):
        self.card, self.session = card, models.open_session(card, threads)

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        """Returns the probability of speech, float32 [ceil(N / STEP)], of samples [N], -1 to 1."""
        _check(samples, 1)
        count = -(-len(samples) // STEP)
        padded = np.zeros(CONTEXT + count * STEP, np.float32)
        padded[CONTEXT : CONTEXT + len(samples)] = samples
        found, state = np.zeros(count, np.float32), None
        for place in range(count):
            piece = padded[None, place * STEP : (place + 1) * STEP + CONTEXT]
            inputs = models.silero_inputs(self.card, piece, state)
            probability, state = models.ask(self.session, self.card, inputs).values()
            found[place] = probability[0, 0]
        return found


class VoiceEmbedder:
    """Turns windows of speech into vectors of `card.width` numbers, of unit length."""

    def __init__(self, card: Card, *, threads: int = 1):
        self.card, self.session = card, models.open_session(card, threads)

    def __call__(self, windows: np.ndarray) -> np.ndarray:
        """Returns vectors float32 [N, width] of windows of samples [N, WINDOW], -1 to 1."""
        _check(windows, 2)
        vectors = np.zeros((len(windows), self.card.width or 0), np.float32)
        for start in range(0, len(windows), models.BLOCK):
            block = windows[start : start + models.BLOCK]
            inputs = {self.card.input.name: mels(raise_level(block))}
            vectors[start : start + len(block)] = models.ask_vectors(
                self.session, self.card, inputs, len(block)
            )
        return vectors


def _check(samples: np.ndarray, axes: int) -> None:
    last = samples.shape[-1] if axes == 1 else WINDOW
    if samples.dtype != np.float32 or samples.ndim != axes or samples.shape[-1] != last:
        wanted = "[N]" if axes == 1 else f"[N, {WINDOW}]"
        raise ArgumentError(
            f"sound is float32 {wanted} of {RATE} Hz, not {samples.dtype} {list(samples.shape)}"
        )


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
