"""Scores clips with the arrays of an exported PLDA run or gallery. It needs only numpy."""

import numpy as np


def log_probabilities(arrays, vectors):
    """Computes the logarithms of the probabilities that Q clips show each of N people.

    Args:
      arrays: name -> array, as np.load or safetensors.numpy.load_file reads the exported file.
      vectors: modality -> [Q, D], the vectors of the clips. If a clip lacks a modality, its vector
        is 0.

    Returns:
      [Q, 1 + N]. Column 0 belongs to a stranger, and column 1 + n to identity n.
    """
    logs, lack, members = -np.inf, 0, len(arrays["scale"])  # lack: 1 - probability
    parts = [name[:-7] for name in arrays if name.endswith("/centre")]
    for member in range(members):
        get = {name: np.asarray(arrays[name][member], np.float64) for name in arrays}
        known = np.stack([get[f"{part}/known"] for part in parts]).any(axis=0)
        logits = np.zeros((len(vectors[parts[0]]), known.size))
        seen = sum(np.any(vectors[part] != 0, axis=1).astype(int) for part in parts)
        for part in parts:
            has_part = np.any(vectors[part] != 0, axis=1)[:, None]
            # A power of 2 scales vectors without rounding: the squares of tiny numbers would be 0.
            exponent = np.frexp(np.abs(vectors[part]).max(axis=1, keepdims=True))[1]
            u = (vectors[part] - get[f"{part}/centre"]) * np.ldexp(1.0, -exponent)
            u = u / np.maximum(np.linalg.norm(u, axis=1, keepdims=True), 1e-12)
            values = {key.split("/")[1]: x for key, x in get.items() if key.startswith(f"{part}/")}
            x = u - values["mean"]
            if "card" in values:
                ratio = _compute_distance_ratios(values, x)
            else:
                z = x @ values["transform"]
                squares = (z**2 @ values["curve"].T)[:, values["kind"].astype(int)]
                ratio = z @ values["linear"].T + squares + values["constant"]
                ratio = get["scale"] * values["scale"] * ratio
            limit = np.where(seen > 1, values["limit"], np.inf)[:, None]
            ratio = np.clip(ratio, -limit, limit)
            ratio = np.where(values["known"] > 0, ratio, get["unenrolled"])
            logits += np.where(has_part, ratio, 0)
        stranger = get["stranger"] + np.log(max(known.sum(), 1))
        logits = np.where(known, logits, -np.inf)
        logits = np.insert(logits, 0, stranger, axis=1) / get["temperature"]
        logits[seen == 0] = np.where(np.arange(1 + known.size) == 0, 0, -np.inf)
        best = np.arange(1 + known.size) == logits.argmax(axis=1)[:, None]
        logits -= logits.max(axis=1, keepdims=True)
        shares = np.exp(logits)  # relative to the best column
        rest = np.where(best, 0, shares).sum(axis=1, keepdims=True)
        logs = np.logaddexp(logs, logits - np.log1p(rest))
        lack = lack + np.where(best, rest, 1 + rest - shares) / (1 + rest) / members
    # If the probability is near 1, its logarithm is more exact when computed from `lack`.
    return np.where(lack < 0.5, np.log1p(-np.minimum(lack, 0.5)), logs - np.log(members))


def _compute_distance_ratios(values, x):
    """Returns the log-likelihood ratios [Q, N] of Q clips and N people, from distances.

    `values` are the exported arrays of a modality. `x` [Q, D] are the vectors of the clips, scaled
    to length 1, minus the mean of all people.
    """
    same, different, least, constant, slope = values["card"]
    radius = np.sum(x * x, axis=1)[:, None]
    across = x @ values["linear"].T - (x @ values["mean"])[:, None]
    square = np.maximum(radius - 2 * values["share"] * across + values["radius"], least)
    ratio = same * np.log(same / values["variance"]) + (same - different) * np.log(square)
    return ratio - same * square / values["variance"] - constant + slope * radius
