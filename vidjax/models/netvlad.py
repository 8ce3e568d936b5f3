"""NetVLAD as the iQIYI-VID paper adapts it."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vidjax.batch import Array


class NetVLAD(nn.Module):
    """Frame features to the sums of their differences from learned cluster centres.

    Attributes:
      num_clusters: K.
      reduce: `sum`, as published, for a fixed number of frames; `mean` divides by the number of
        real frames, so that the scale does not depend on it (ours).
      dtype: of the matrix products; sums and softmax are in float32 at least, as the parameters.

    Source: iQIYI-VID paper, section 5.2 and figure 4: a fully connected layer, BatchNorm, softmax
    over the clusters, and the VLAD core; no L2 norm. Ours: masks; the fully connected layer has no
    bias, as BatchNorm has one; BatchNorm momentum .9.
    """

    num_clusters: int
    reduce: str = "sum"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: Array, mask: Array, *, train: bool) -> tuple[Array, Array]:
        """Returns the descriptors V_k = sum_t a_k(x_t) (x_t - c_k), and the assignment a.

        Args:
          features: [B, T, D] float.
          mask: [B, T] bool, True for real frames; the others change nothing, statistics included.
          train: True to normalise by the statistics of the batch and update the running ones.

        Returns:
          [B, K, D] float32, 0 for a clip without frames; and [B, T, K] float32, the share of each
          cluster in a frame, 0 on padding.

        Raises:
          ValueError: for an unknown `reduce`.
        """
        if self.reduce not in ("sum", "mean"):
            raise ValueError(f"unknown NetVLAD reduce {self.reduce!r}; known are mean, sum")
        param_dtype = jnp.promote_types(self.dtype, jnp.float32)
        features = features.astype(self.dtype)
        scores = nn.Dense(
            self.num_clusters,
            use_bias=False,
            dtype=self.dtype,
            param_dtype=param_dtype,
            name="assignment",
        )(features)  # [B, T, K]
        # With no real frame at all the mean would be 0 / 0 and stay NaN in the running statistics.
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
