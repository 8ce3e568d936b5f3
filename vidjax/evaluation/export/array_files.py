"""Writes the arrays of a PLDA run or a gallery, and compares exported outputs with vidjax.

The export format `numpy`, and the format `safetensors` of a gallery, contain the arrays below. From
the vector of a clip in modality PART, `reader.py` computes a log-likelihood ratio for each person:

    z = (u - mean) @ transform, with u = vector - centre, scaled to unit length
    ratio = scale x PART/scale x (z @ linear.T + z^2 @ curve[kind].T + constant)

The logit of a person is the sum of the ratios of all PARTs. N is the number of people, in the order
of identities.json. E is the number of ensemble members. D is the length of the vectors of PART.

    PART/centre, PART/mean       [E, D]
    PART/transform               [E, D, D]
    PART/linear, PART/constant   [E, N, D] and [E, N]
    PART/curve                   [E, rows, D], people with the same number of clips share a row
    PART/kind                    [E, N] int32, the row of each person in `curve`
    scale                        [E], a factor of the ratios of all PARTs
    PART/scale                   [E], a factor of the ratios of PART
    PART/limit                   [E], if a clip has several PARTs, the ratio is cut to +-limit
    PART/known                   [E, N] int32, 0 for people whose ratio becomes `unenrolled`
    unenrolled                   [E]
    stranger                     [E], the logarithm of the prior odds of a stranger
    temperature                  [E], divides all logits, see `config.eval.temperature`

Arrays without a dtype are float32 or float64. A gallery that compares distances has other arrays,
see `apps.gallery.array_export`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from vidjax.evaluation.export import reader
from vidjax.utils import files
from vidjax.utils.errors import UserError

TOLERANCE = 1e-5  # largest allowed difference, relative to max(1, |value|)


def write_arrays(
    path: Path, arrays: dict[str, Any]
) -> Callable[[Mapping[str, np.ndarray]], np.ndarray]:
    """Writes arrays to a .npz or .safetensors file, and copies `reader.py` next to the file.

    Returns a function that scores Q clips with `reader.py` and the written arrays. The argument is
    modality -> vectors [Q, D]. The result has the log-probabilities of a stranger (column 0) and of
    N people, [Q, 1 + N].
    """
    if path.suffix == ".npz":
        np.savez(path, **arrays)
        written = files.read_npz(path, path.stat().st_size)
    else:
        from safetensors.numpy import load_file

        save_tensors(arrays, path)
        written = load_file(path)
    path.with_name("reader.py").write_bytes(Path(reader.__file__).read_bytes())
    return lambda vectors: reader.log_probabilities(written, vectors)


def save_tensors(arrays: dict[str, np.ndarray], path: Path) -> None:
    """Writes arrays to a .safetensors file."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    with files.disk_errors(path, SafetensorError):
        save_file(arrays, path)


def difference(outputs: Mapping[str, ArrayLike], expected: Mapping[str, np.ndarray]) -> float:
    """Returns the largest difference between outputs and expected outputs, both name -> array.

    For expected values above 1 in magnitude, the difference is relative. Otherwise, it is absolute.
    If shapes differ, an output is NaN, or an infinite value differs, returns inf.
    """
    worst = 0.0
    for name, output in outputs.items():
        value, target = np.asarray(output, np.float64), np.asarray(expected[name], np.float64)
        if value.shape != target.shape or np.isnan(value).any():
            return float("inf")
        finite = np.isfinite(target)
        if not np.array_equal(value[~finite], target[~finite]):
            return float("inf")
        gap = np.abs(value[finite] - target[finite])
        worst = max(worst, float(np.max(gap / np.maximum(1, np.abs(target[finite])), initial=0.0)))
    return worst


def check_tolerance(format_name: str, worst: float) -> None:
    """Raises UserError if `worst`, a result of `difference`, is NaN or too large."""
    if not worst <= TOLERANCE:
        raise UserError(
            f"--format={format_name}: nothing was exported, because the outputs differ from vidjax "
            f"by {worst:.1e}, more than {TOLERANCE:.0e}\nchoose another format"
        )
