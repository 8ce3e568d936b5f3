"""Mel spectra, speech detection and voice embeddings equal slow float64 oracles."""

import math

import numpy as np
import pytest

from tests.helpers.seen import refused
from vidjax.apps.video import cards, nets, voices
from vidjax.apps.video.features_folder import FilmTrack

pytest.importorskip("onnxruntime")
made_nets = pytest.importorskip("tests.helpers.made_nets")

# Numbers 0, 8, 16, ... of the third frame of librosa 0.11's `melspectrogram` of sin(i^2 / 3000).
LIBROSA = (0.0027344, 30.6711316, 0.0000065, 0.0, 0.0)


def noise(*shape):
    return np.random.default_rng(0).normal(0, 0.1, shape).astype(np.float32)


def test_mel_filters_are_triangles_of_equal_area():
    # Slaney's mel scale: 15 mels up to 1 kHz in equal steps, then 27 mels for each factor 6.4.
    top = 15 + 27 * math.log(8) / math.log(6.4)  # 8 kHz in mels
    mels = np.linspace(0, top, 42)  # 40 bands have 42 edges
    edges = [mel * 200 / 3 if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27) for mel in mels]
    assert edges[-1] == pytest.approx(8000)
    for band, row in enumerate(voices.make_mel_filters()):
        low, middle, high = edges[band : band + 3]
        for bin_, weight in enumerate(row):
            hz = 40 * bin_  # 16 kHz / 400 samples
            up, down = (hz - low) / (middle - low), (high - hz) / (high - middle)
            height = 2 / (high - low)  # so that the area is 1
            assert weight == pytest.approx(max(0, min(up, down)) * height, abs=1e-12)


def test_mels_equal_the_band_powers_of_frames_every_10_ms():
    samples = noise(1, 1600)
    mels = voices.make_mels(samples)
    assert mels.shape == (1, 10, 40) and mels.dtype == np.float32

    # A frame is a Hann window of 400 samples (25 ms) around every 160th sample (10 ms).
    i = np.arange(400)
    padded = np.pad(samples[0].astype(float), (200, 400))
    for frame in range(10):
        windowed = padded[frame * 160 + i] * (0.5 - 0.5 * np.cos(2 * np.pi * i / 400))
        turns = np.exp(-2j * np.pi * np.outer(np.arange(201), i) / 400)
        power = np.abs(turns @ windowed) ** 2
        np.testing.assert_allclose(mels[0, frame], voices.make_mel_filters() @ power, rtol=1e-5)

    mels = voices.make_mels(np.sin(np.arange(800) ** 2 / 3000)[None])[0, 2, ::8]
    np.testing.assert_allclose(mels, LIBROSA, rtol=1e-6, atol=1e-7)


def test_raise_level_amplifies_faint_windows_and_keeps_loud_windows():
    windows = noise(3, 1000) * np.array([[0.001], [10], [0]], np.float32)  # faint, loud, silent
    faint, *others = voices.raise_level(windows)
    level = np.sqrt((faint.astype(float) ** 2).mean())
    assert 20 * np.log10(level) == pytest.approx(-30, abs=1e-4)  # decibels, the least level
    np.testing.assert_array_equal(others, windows[1:])


def test_voice_embeddings_are_computed_from_the_mels(tmp_path):
    card = cards.read(made_nets.write(tmp_path, "voice", "voice_embedder"))
    embedder = voices.open_voice_embedder(card)
    windows = noise(nets.BLOCK_CROPS + 3, voices.WINDOW)  # two blocks
    wanted = voices.make_mels(windows).astype(float).mean(axis=1) @ made_nets.voice_weights()
    np.testing.assert_allclose(embedder(windows), wanted, rtol=1e-3, atol=1e-4)
    assert embedder(windows[:0]).shape == (0, made_nets.WIDTH)

    # The first 4 of the 5 numbers of the output for a test image with seed 7.
    numbers = nets.make_formula_image((160, 40), 7).astype(float)[:, :, 0] / 256
    wanted = (numbers.mean(axis=0) @ made_nets.voice_weights())[:4]
    answer = nets.answer_formula(card, nets.open_session(card), 7)
    np.testing.assert_allclose(answer, wanted, rtol=1e-4)

    # The card says that the output has 6 numbers.
    card = cards.read(made_nets.write(tmp_path, "voice", "voice_embedder", width=6))
    embedder = voices.open_voice_embedder(card)
    refused(lambda: embedder(noise(1, voices.WINDOW)), "voice.json", "width")


def test_part_of_a_film_as_long_as_a_window_is_heard_despite_rounding_errors():
    track = FilmTrack(clip="a", shot=0, start_s=3.2, end_s=4.8, seen=1)  # 4.8 - 3.2 < 1.6, a window
    assert len([*voices.find_solo_spans([track])]) == 1


@pytest.mark.parametrize("count", [0, 1, 512, 5000])
def test_speech_detector_carries_its_state_from_window_to_window(tmp_path, count):
    """The made net returns its state: the sum of the means of 64 old and 512 new samples."""
    made_nets.write(tmp_path, "speech", "voice_activity")
    made_nets.write(tmp_path, "voice", "voice_embedder")
    samples = noise(count) + np.float32(0.2)  # so that the state grows

    speech = voices.Listener(cards.load(tmp_path)).detect_speech(samples)

    padded, steps = np.pad(samples.astype(float), (64, 512)), math.ceil(count / 512)
    means = [padded[step * 512 : step * 512 + 576].sum() / 576 for step in range(steps)]  # 64 + 512
    np.testing.assert_allclose(speech, np.cumsum(means), rtol=1e-4)
