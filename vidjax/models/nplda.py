"""NPLDA: PLDA as layers, which start from the closed form and are trained on the training clips."""

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vidjax.batch import Array, ClipInfo, Frames, ModelOutput
from vidjax.models import inputs, two_covariance
from vidjax.models.base import Params
from vidjax.models.plda import PLDAIdentifier, RunningSums, Settings, add_up, combine, fit
from vidjax.models.two_covariance import Space


class NPLDAIdentifier(PLDAIdentifier):
    """PLDA of vectors x + x A, where the map A of each modality is learned, from 0 on.

    The first two passes over the clips add up the sums of PLDA, with a weight of 0 in the loss.
    Then the space of PLDA is computed once, into the collection `start`. From then on the model
    learns A: weight decay draws A towards 0, and so the model towards PLDA. The settings stay.

    A clip is compared with its own identity as if the clip had not been enrolled. If no other clip
    shows the identity, somebody new is the right answer.

    The fusion of training must draw nothing at random, since a clip is taken out of the sums again.

    Attributes:
      modality_dropout_rate: probability that a training clip is judged without one of its
        modalities; it keeps at least one.
      stranger_rate: probability that a training clip is judged as if no other one showed its
        identity.

    The others are those of PLDAIdentifier.

    Source: Ramoji et al. 2020, Neural PLDA modeling for end-to-end speaker verification: PLDA as
    layers that start from the closed form. Ours: a map of the vectors in place of all matrices of
    the score, so that learning does not depend on the basis of the space; cross-entropy over
    identities and somebody new in place of the cost of pairs; decay towards the closed form.
    """

    modality_dropout_rate: float = 0.0
    stranger_rate: float = 0.0
    title: ClassVar[str] = "model 'nplda'"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.stranger_rate <= 1:
            raise ValueError(
                f"{self.title}: stranger_rate={self.stranger_rate}: must be from 0 to 1"
            )

    @nn.compact
    def __call__(
        self, frames: Mapping[str, Frames], clips: ClipInfo, *, train: bool
    ) -> ModelOutput:
        """Returns logits [B, 1, 1 + C], and the centred unit vectors side by side as embedding.

        Arguments are those of `models.base.Identifier`. Evaluation reads the collection `solved`.
        Training changes the collections `sums` and `start`. If somebody new is the right answer for
        a clip, the columns of its label and of somebody new are exchanged, as a loss expects them.

        Raises:
          ValueError: A modality is missing or has another width.
        """
        vectors = self.unit_means(frames)
        maps = {
            name: self.param(f"{name}_map", nn.initializers.zeros, (x.shape[1],) * 2, x.dtype)
            for name, x in vectors.items()
        }
        if not train and self.has_variable("solved", "settings"):
            return self.compare(vectors)
        sums = RunningSums(self.modalities, self.num_classes, self.num_clips, name="sums")
        start = _Start(self.modalities, name="start")
        update = train and not self.is_initializing()
        centred = sums(vectors, clips, update=update)
        parts = {name: sums.get_variable("sums", name) for name in vectors}
        # A batch has all second occurrences that are left before any third one.
        times = jnp.where(clips.mask, sums.get_variable("sums", "seen")[clips.index], 0)
        settings = self.settings if update else None
        spaces, is_done = start(parts, jnp.max(times) > 2, settings)
        embedding = jnp.concatenate(centred, axis=1)
        if self.is_initializing():  # the settings need not be known yet
            logits = jnp.zeros((len(clips.index), self.num_classes), embedding.dtype)
            return ModelOutput(logits[:, None], embedding)
        present = jnp.stack([jnp.any(x != 0, axis=1) for x in centred])  # [M, B]
        present, hidden = self._draw(present, train=train)
        assert clips.labels is not None
        compared = [
            _compare(_adapt(spaces[name], maps[name]), parts[name], x, clips.labels, hidden)
            for name, x in zip(vectors, centred, strict=True)
        ]
        logits = _leave_out(compared, clips.labels, present, self.settings)
        weight = jnp.broadcast_to(is_done.astype(logits.dtype), (len(logits), 1))
        return ModelOutput(logits[:, None], embedding, train_weight=weight)

    def _draw(self, present: Array, *, train: bool) -> tuple[Array, Array]:
        """Draws by which modalities clips are judged, [M, B], and whose identity is hidden, [B]."""
        hidden = jnp.zeros(present.shape[1], bool)
        if train and self.modality_dropout_rate > 0:
            rng = self.make_rng("modality_dropout")
            present = inputs.drop_modalities(rng, present.T, self.modality_dropout_rate).T
        if train and self.stranger_rate > 0:
            rng = self.make_rng("dropout")
            hidden = jax.random.bernoulli(rng, self.stranger_rate, hidden.shape)
        return present, hidden

    def adapt(self, space: Space, params: Params, name: str) -> Space:
        """Returns the space after the map that was learned for a modality, in float64."""
        return _adapt(space, np.asarray(params[f"{name}_map"], np.float64))


def _adapt(space: Space, change: Array) -> Space:
    """Returns the coordinates of vectors x + x A, from those of x.

    Args:
      space: the coordinates.
      change: [D, D] float, A; it leaves the mean in place.
    """
    return space._replace(transform=space.transform + change @ space.transform)


class _Compared(NamedTuple):
    """The clips of a batch in one modality, as PLDA compares them.

    Attributes:
      ratios: [B, K] float, log-likelihood ratios.
      known: [K] bool, False for classes without a clip.
      own: [B] float, ratios with the own class without the clip.
      others: [B] bool, True if another clip of the own class has the modality.
    """

    ratios: Array
    known: Array
    own: Array
    others: Array


def _compare(
    space: Space, part: Mapping[str, Array], x: Array, labels: Array, hidden: Array
) -> _Compared:
    """Compares centred vectors x [B, D] with all classes, and with the own one without the clip."""
    enrolled = two_covariance.enrol_each(space, part["count"], part["total"])
    present = jnp.any(x != 0, axis=1)
    others = (part["count"][labels] - present > 0.5) & ~hidden
    count = jnp.where(others, part["count"][labels] - present, 0.0)
    total = jnp.where(others[:, None], part["total"][labels] - x, 0.0)
    own = two_covariance.enrol_each(space, count, total)
    return _Compared(
        two_covariance.log_ratios(space, enrolled, x),
        enrolled.known,
        two_covariance.log_ratios_of_pairs(space, own, x),
        others,
    )


def _leave_out(
    compared: list[_Compared], labels: Array, judged: Array, settings: Settings
) -> Array:
    """Returns logits [B, K] of clips that are left out of their own classes.

    Args:
      compared: the clips in each of the M modalities.
      labels: [B] int32, class columns.
      judged: [M, B] bool, the modalities by which a clip is judged.
      settings: the settings.
    """
    ratios, known, own, others = (jnp.stack(part) for part in zip(*compared, strict=True))
    logits = jnp.asarray(combine(ratios, known, judged, settings))
    rows = jnp.arange(len(labels))
    at_label = add_up(own, others, judged, settings)
    is_new = ~jnp.any(others, axis=0) & (labels > 0)
    # A clip of somebody new has its two columns exchanged; column 0 comes last, for labels of 0.
    logits = logits.at[rows, labels].set(jnp.where(is_new, settings.stranger, at_label))
    return logits.at[:, 0].set(jnp.where(is_new, at_label, settings.stranger))


class _Start(nn.Module):
    """The spaces of the closed form, in the collection `start`; computed once.

    Attributes:
      modalities: name -> feature width.
    """

    modalities: Mapping[str, int]

    @nn.compact
    def __call__(
        self,
        parts: Mapping[str, Mapping[str, Array]],
        is_complete: Array,
        settings: Settings | None,
    ) -> tuple[dict[str, Space], Array]:
        """Returns the spaces, 0 before they are computed, and [] bool, True once they are.

        Args:
          parts: modality -> its sums.
          is_complete: [] bool, True if the sums hold all clips.
          settings: of the fit, to compute the spaces once the sums are complete; None to leave
            them as they are.
        """
        blank = {}
        for name, width in self.modalities.items():
            dtype = parts[name]["total"].dtype
            shapes = ((width,), (width, width), (width,))
            blank[name] = Space(*(jnp.zeros(shape, dtype) for shape in shapes))
        spaces = self.variable("start", "spaces", lambda: blank)
        is_done = self.variable("start", "is_done", jnp.zeros, (), bool)
        if settings is not None:

            def solve(_: object) -> tuple[dict[str, Space], jax.Array]:
                with jax.default_matmul_precision("highest"):
                    found = {name: _fit_or_blank(parts[name], settings) for name in blank}
                return found, jnp.ones((), bool)

            # A loop of one turn or none: under vmap, `cond` would compute both sides at every step.
            spaces.value, is_done.value = jax.lax.while_loop(
                lambda carry: is_complete & ~carry[1], solve, (spaces.value, is_done.value)
            )
        return spaces.value, is_done.value


def _fit_or_blank(part: Mapping[str, Array], settings: Settings) -> Space:
    """Returns the space of one modality, 0 if no clip has it."""
    has_clips = jnp.sum(part["count"]) > 0
    return jax.tree.map(lambda x: jnp.where(has_clips, x, 0.0), fit(part, settings, jnp))
