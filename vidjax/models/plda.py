"""PLDA (probabilistic linear discriminant analysis), a model that is trained without gradients.

The model compares a clip with the training clips of each identity, and gives the log-likelihood
ratio of the identity against a stranger. The coefficients are computed from sums over the training
clips.
"""

import functools
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from msgspec import Meta

from vidjax.core import devices
from vidjax.core.batch import Array, ClipInfo, Frames, ModelOutput
from vidjax.models import plda_fit, two_covariance
from vidjax.models.base import Identifier, ModelState, Params, Share, TrainingClips
from vidjax.models.layers import real_frames, unit_vectors
from vidjax.models.plda_fit import combine_modalities, unit_mean
from vidjax.models.two_covariance import Settings
from vidjax.utils.errors import UserError

Scale = Annotated[float, Meta(gt=0)]


class PLDAIdentifier(Identifier):
    """Two-covariance PLDA: log-likelihood ratios, added over the modalities that a clip has.

    The vector of a clip starts as the mean of its frames, scaled to length 1. The mean of all
    clips, times `centred`, is subtracted. The result is scaled to length 1 again. Training passes
    over the clips twice. The first pass sums the vectors, for the mean. The second pass sums the
    centred vectors. `finalise_state` turns these sums into coefficients.

    Attributes:
      within, between, scale, unenrolled, stranger: see `Settings`. Each is a number, a tuple with
        a number for each member (net) of an ensemble, or None if `prepare` fits it.
      centred: see `Settings`. A number, or None if `prepare` computes it.

    Source: the two-covariance model, see `models.two_covariance`. Unit length: Garcia-Romero and
    Espy-Wilson 2011. The sum over modalities and its scale are not published.
    """

    modalities: Mapping[str, int]
    num_classes: int
    num_clips: int
    within: Share | tuple[Share, ...] | None = None
    between: Share | tuple[Share, ...] | None = None
    scale: Scale | tuple[Scale, ...] | None = None
    unenrolled: float | tuple[float, ...] | None = None
    stranger: float | tuple[float, ...] | None = None
    centred: Share | None = None
    logit_scale = 1.0  # pyright: ignore[reportAssignmentType]
    is_closed_form: ClassVar[bool] = True
    scores_unknown: ClassVar[bool] = True
    min_epochs: ClassVar[float] = 2.0  # the first for the centre, the second for the sums

    def settings(self, member: int = 0) -> Settings:
        """Returns the settings of PLDA for member number `member` of an ensemble.

        Raises UserError if a setting is None, as in a model that is not trained.
        """
        values = {name: getattr(self, name) for name in Settings._fields}
        if missing := [name for name, value in values.items() if value is None]:
            raise UserError(
                f"model 'plda' is not trained: it has no {', '.join(missing)}\ntrain the run again"
            )
        chosen = {n: x[member] if isinstance(x, tuple) else x for n, x in values.items()}
        return Settings(**chosen)

    def prepare(self, clips: TrainingClips) -> dict[str, float | tuple[float, ...]]:
        """Fits the settings of PLDA that are None, on held-out training clips.

        Returns name -> number, or name -> tuple with a number for each net of an ensemble.
        """
        given = {name: getattr(self, name) for name in Settings._fields}
        return plda_fit.fit_member_settings(given, clips)

    def gallery_settings(self) -> Settings:
        """Returns the PLDA settings of the first net of the ensemble, for galleries of people."""
        return self.settings()

    @nn.compact
    def __call__(
        self, frames: Mapping[str, Frames], clips: ClipInfo, *, train: bool
    ) -> ModelOutput:
        """Computes the logits [B, 1, 1 + C] and the embedding of B clips, see `ModelOutput`.

        The embedding has the centred vectors of all modalities side by side. Training only adds the
        clips to the collection `sums`, so the logits are 0. An evaluation computes the logits from
        the collection `solved`, the result of `finalise_state`.
        """
        real, _ = real_frames(frames, self.modalities, clips.mask)
        vectors = {name: unit_mean(frames) for name, frames in real.items()}
        if not train and self.has_variable("solved", "settings"):
            return self.score_vectors(vectors)
        share = 1.0 if self.centred is None else self.centred  # None if only shapes are needed
        update = train and not self.is_initializing()
        centred = self._add_up(vectors, clips, share, update=update)
        # The logits are 0, but the compiler must not see that: it would evaluate a constant loss.
        logits = jnp.broadcast_to(0 * centred[0][:, :1], (len(clips.index), self.num_classes))
        return ModelOutput(logits[:, None], jnp.concatenate(centred, axis=1))

    def _add_up(
        self, vectors: Mapping[str, Array], clips: ClipInfo, share: float, *, update: bool
    ) -> list[Array]:
        """Subtracts the mean of clips, times `share`, from vectors, and scales them to length 1.

        `vectors` is modality -> [B, D]. Returns [B, D] for each modality. The mean comes from the
        collection `sums`. If `update` is True, the B clips are added to `sums` first, see `_add`.
        """
        # A batch may contain clips of two passes, and a clip more than once.
        seen = self.variable("sums", "seen", jnp.zeros, (self.num_clips,), jnp.int32)
        turn = jnp.zeros(len(clips.index), jnp.int32)
        if update:
            assert clips.labels is not None
            turn = seen.value[clips.index] + _count_occurrences(clips.index, clips.mask)
            seen.value = seen.value.at[clips.index].add(clips.mask.astype(jnp.int32))
        centred = []
        for name, x in vectors.items():
            width, dtype = self.modalities[name], x.dtype
            zeros = {
                "centre": (width,), "num": (), "count": (self.num_classes,),
                "total": (self.num_classes, width), "scatter": (width, width),
            }  # fmt: skip
            part = self.variable(
                "sums", name, lambda z=zeros, d=dtype: {key: jnp.zeros(z[key], d) for key in z}
            )
            if update:
                part.value = _add(part.value, x, turn, clips, share)
            centred.append(_centre_vectors(x, _compute_mean(part.value, share)))
        return centred

    def score_vectors(self, vectors: Mapping[str, Array]) -> ModelOutput:
        """Computes the logits of B clips from their unit vectors, modality -> [B, D].

        The coefficients are in the collection `solved`, which `finalise_state` computes.
        """
        ratios, known, centred = [], [], []  # of each modality
        for name, x in vectors.items():
            solved = self.get_variable("solved", name)
            centred.append(_centre_vectors(x, solved["centre"]))  # [B, D]
            ratios.append(plda_fit.log_ratios(solved["space"], solved["enrolled"], centred[-1]))
            known.append(solved["enrolled"].known)
        logits = combine_modalities(
            jnp.stack(ratios),
            jnp.stack(known),
            jnp.stack([jnp.any(x != 0, axis=1) for x in centred]),
            self.get_variable("solved", "settings"),
        )
        return ModelOutput(logits[:, None], jnp.concatenate(centred, axis=1))

    def finalise_state(self, params: Params, model_state: ModelState) -> dict[str, Any]:
        """Computes the coefficients that score clips, from the sums over the training clips.

        Returns a collection `solved`. It contains `settings` and, for each modality, `centre`,
        `space` and `enrolled`. All arrays are [E, ...], for E members of an ensemble.
        """
        parts = devices.fetch({name: model_state["sums"][name] for name in self.modalities})
        solved = [
            self._finalise_member(jax.tree.map(lambda x, e=e: x[e], parts), self.settings(e))
            for e in range(len(jax.tree.leaves(parts)[0]))
        ]
        stack = functools.partial(_stack, jax.tree.leaves(parts)[0].dtype)
        return {"solved": jax.tree.map(stack, *solved)}

    def _finalise_member(self, sums: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
        solved = {}
        for name in self.modalities:
            count = sums[name]["count"]
            space = two_covariance.make_blank_space(self.modalities[name])
            if np.sum(count) > 0:
                space = two_covariance.fit(sums[name], settings)
            enrolled = two_covariance.enrol(space, count, sums[name]["total"])
            centre = _compute_mean(sums[name], settings.centred)
            solved[name] = {"centre": centre, "space": space, "enrolled": enrolled}
        return {**solved, "settings": settings}


def _add(
    part: Mapping[str, jax.Array], x: Array, turn: Array, clips: ClipInfo, share: float
) -> dict[str, jax.Array]:
    """Returns `part`, the sums of a modality, plus the vectors `x` [B, D] of B clips.

    `turn` [B] is the number of the pass, from 0 on. Pass 0 sums the vectors of all clips, for their
    mean. Pass 1 computes the vector minus `share` times the mean, scales the result to length 1,
    and adds it to the sums of known people. Later passes change nothing.
    """
    real = clips.mask & jnp.any(x != 0, axis=1)
    first = (real & (turn == 0)).astype(x.dtype)
    centre, num = part["centre"] + jnp.dot(first, x), part["num"] + jnp.sum(first)
    new = {**part, "centre": centre, "num": num}
    assert clips.labels is not None
    counted = real & (turn == 1) & (clips.labels > 0)
    # All first occurrences come before any second occurrence, so the centre is complete here.
    u = jnp.where(counted[:, None], _centre_vectors(x, _compute_mean(new, share)), 0.0)
    u = u.astype(x.dtype)
    labels = jnp.where(counted, clips.labels, 0)
    return new | {
        "count": part["count"].at[labels].add(counted.astype(x.dtype)),
        "total": part["total"].at[labels].add(u),
        "scatter": part["scatter"] + jnp.matmul(u.T, u, precision=jax.lax.Precision.HIGHEST),
    }


def _count_occurrences(index: Array, mask: Array) -> Array:
    """Counts, for each row of the batch, the rows above it with the same clip, [B] int32."""
    key = jnp.where(mask, index, -1)
    order = jnp.argsort(key, stable=True)
    ordered = key[order]
    place = jnp.arange(len(key)) - jnp.searchsorted(ordered, ordered, method="sort")
    return jnp.zeros(len(key), jnp.int32).at[order].set(place.astype(jnp.int32))


def _compute_mean(part: Mapping[str, Array], share: float | Array) -> Array:
    """Computes `share` times the mean of all clips, [D], from `part`, the sums of a modality."""
    return share * part["centre"] / jnp.maximum(part["num"], 1.0)


def _centre_vectors(x: Array, centre: Array) -> Array:
    """Computes unit vectors that point from the centre [D] to x [B, D]. Rows of zeros stay 0."""
    return jnp.where(jnp.any(x != 0, axis=1, keepdims=True), unit_vectors(x - centre), 0.0)


def _stack(dtype: np.dtype, *parts: Array | float) -> np.ndarray:
    """Stacks an array of each of E members to [E, ...]. Smaller arrays are padded with 0.

    Floats get the dtype `dtype`. The result is a numpy array, because JAX would compile several
    programs for each shape of array.
    """
    arrays = [np.asarray(part) for part in parts]
    # Only `Enrolled.curve` may differ in size.
    largest = np.max([x.shape for x in arrays], axis=0)
    stacked = np.stack([
        np.pad(x, [(0, lack) for lack in largest - x.shape]) if x.ndim else x for x in arrays
    ])  # fmt: skip
    return stacked.astype(dtype) if stacked.dtype.kind == "f" else stacked
