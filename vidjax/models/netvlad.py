"""NetVLAD as adapted by the iQIYI-VID paper."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vidjax.batch import Array
from vidjax.errors import UserError
from vidjax.models.layers import Linear


class NetVLAD(nn.Module):
    """Pools frames into their summed differences from learned cluster centres.

    Attributes:
      num_clusters: number of clusters, K.
      reduce: `sum`, as published, for a fixed number of frames; `mean` (ours) divides by the number
        of real frames, so that the scale does not depend on it.
      dtype: dtype of the matrix products; parameters, sums and softmax are at least float32.

    Source: iQIYI-VID paper, section 5.2 and figure 4: a fully connected layer, BatchNorm, softmax
    over the clusters, and the VLAD core; no L2 normalisation. Ours: masks; the fully connected
    layer has no bias, since BatchNorm has one; BatchNorm momentum 0.9.
    """

    num_clusters: int
    reduce: str = "sum"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: Array, mask: Array, *, train: bool) -> tuple[Array, Array]:
        """Returns the descriptors V_k = sum_t a_k(x_t) (x_t - c_k), and the assignment a.

        Args:
          features: [B, T, D] float.
          mask: [B, T] bool, True for real frames; only these count in the batch statistics.
          train: True to normalise by the batch statistics and to update the running ones in
            `batch_stats`, which must be mutable.

        Returns:
          V, [B, K, D] float32, 0 for clips without frames; and a, [B, T, K] float32, the share of
          each cluster in a frame, 0 on padding.
        """
        if self.reduce not in ("sum", "mean"):
            raise UserError(f"unknown NetVLAD reduce {self.reduce!r}; choose from mean, sum")
        param_dtype = jnp.promote_types(self.dtype, jnp.float32)
        features = features.astype(self.dtype)
        scores = Linear(
            self.num_clusters,
            use_bias=False,
            dtype=self.dtype,
            name="assignment",
        )(features)  # [B, T, K]
        # Without any real frame the mean would be 0 / 0, and the running statistics would stay NaN.
        counted = jnp.logical_or(mask, ~mask.any())
        scores = nn.BatchNorm(
            use_running_average=not train,
            momentum=0.9,
            dtype=param_dtype,
            param_dtype=param_dtype,
            name="norm",
        )(scores, mask=counted[..., None])
        assignment = jax.nn.softmax(scores, axis=-1) * mask[..., None]  # [B, T, K]

        dim = features.shape[-1]
        centers = self.param(
            "centers",
            nn.initializers.normal(dim**-0.5),
            (self.num_clusters, dim),
            param_dtype,
        )
        weighted = jnp.einsum(
            "btk,btd->bkd",
            assignment.astype(self.dtype),
            features,
            preferred_element_type=param_dtype,
        )  # [B, K, D]
        descriptors = weighted - jnp.sum(assignment, axis=1)[..., None] * centers
        if self.reduce == "mean":
            count = jnp.maximum(jnp.sum(mask, axis=1), 1)
            descriptors = descriptors / count[:, None, None]
        return descriptors, assignment
