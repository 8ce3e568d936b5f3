"""Layers and checks that models share: dense layers, dropout, classifiers, NetVLAD."""

import functools
from collections.abc import Callable, Mapping
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from vidjax.core.batch import Array, Frames
from vidjax.utils.errors import UserError, check_choice


def real_frames(
    frames: Mapping[str, Frames], modalities: Mapping[str, int], batch_mask: Array
) -> tuple[dict[str, Frames], Array]:
    """Selects the modalities of a model, and masks the frames of padded rows of a batch.

    Args:
      frames: modality -> Frames [B, T].
      modalities: name -> feature width, the M modalities of the model.
      batch_mask: [B] bool, False for padded rows.

    Returns:
      Modality -> Frames [B, T], in the order of `modalities`; and [B, M] bool, True where the clip
        has a frame of the modality.

    Raises:
      ValueError: a modality is missing or has a different width.
    """
    # linen would ignore a missing modality.
    if missing := sorted(set(modalities) - set(frames)):
        raise ValueError(f"batch lacks modality {', '.join(missing)}; it has {', '.join(frames)}")
    for name, dim in modalities.items():
        if (width := frames[name].features.shape[-1]) != dim:
            raise ValueError(f"modality {name}: features have width {width}, the model needs {dim}")
    real = {
        name: frames[name]._replace(mask=frames[name].mask & batch_mask[:, None])
        for name in modalities
    }
    return real, jnp.stack([real[name].mask.any(axis=1) for name in modalities], axis=1)


def drop_modalities(rng: Array, present: Array, rate: float) -> Array:
    """Drops each modality in `present` [B, M] bool with probability `rate`. Returns [B, M] bool.

    If all modalities of a clip would be dropped, one of them, chosen at random, stays.
    """
    uniforms = jnp.where(present, jax.random.uniform(rng, present.shape, jnp.float32), -1.0)
    last = uniforms == jnp.max(uniforms, axis=1, keepdims=True)
    return present & ((uniforms >= rate) | last)


def choose_kept_modalities(model: nn.Module, present: Array, rate: float, *, train: bool) -> Array:
    """Returns which modalities of B clips a model uses, [B, M] bool.

    `present` [B, M] bool is True for the modalities that a clip has. In training, each of these
    modalities is dropped with probability `rate`, but at least one stays.
    """
    if not train or not rate:
        return present
    return drop_modalities(model.make_rng("modality_dropout"), present, rate)


def batch_norm(x: Array, mask: Array, *, train: bool, name: str = "norm") -> Array:
    """Applies BatchNorm in float32 or wider, as the submodule `name` of the calling module.

    `mask` is True for rows that count in the batch statistics, and has the leading axes of `x`. In
    training, the running statistics in the collection `batch_stats` change, so the collection must
    be mutable. If no row counts, the statistics do not change.
    """
    is_any = mask.any()
    counted = jnp.logical_or(mask, ~is_any)  # the mean of no row would be 0 / 0
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    norm = nn.BatchNorm(not train, momentum=0.9, dtype=dtype, param_dtype=dtype, name=name)
    before = dict(norm.variables.get("batch_stats", {})) if train else {}
    y = norm(x, mask=counted.reshape(counted.shape + (1,) * (x.ndim - counted.ndim)))
    for key, old in before.items():
        new = norm.get_variable("batch_stats", key)
        norm.put_variable("batch_stats", key, jnp.where(is_any, new, old))
    return y


class Linear(nn.Module):
    """Computes x @ kernel + bias. Parameters, sums and gradients are float32 or wider."""

    features: int
    dtype: jnp.dtype = jnp.float32  # of the factors in the product
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer = nn.linear.default_kernel_init

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x [..., D] float to [..., K], float32 or wider, where K is `features`."""
        wide = jnp.promote_types(self.dtype, jnp.float32)
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), wide)
        # Only training has a dropout key.
        product = trained_matmul if self.has_rng("dropout") else matmul
        y: Array = product(x.reshape(-1, x.shape[-1]).astype(wide), kernel, self.dtype)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,), wide)
        return y.reshape(*x.shape[:-1], self.features)


def matmul(x: Array, kernel: Array, dtype: jnp.dtype) -> Array:
    """Computes x [B, D] @ kernel [D, K]. Multiplies in `dtype`, adds in the dtype of `x`.

    Both matrices have the same dtype, float32 or wider. `dtype` is the same or narrower.
    """
    return _contract(x.astype(dtype), kernel.astype(dtype), 0, x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def trained_matmul(x: Array, kernel: Array, dtype: jnp.dtype) -> Array:
    """Computes x [B, D] @ kernel [D, K] like `matmul`. The backward pass multiplies in `dtype`."""
    # Autodiff would multiply gradients in the wider dtype, which is slower on CPUs.
    return matmul(x, kernel, dtype)


def _forward(x: Array, kernel: Array, dtype: jnp.dtype) -> tuple[Array, tuple[Array, Array]]:
    return matmul(x, kernel, dtype), (x.astype(dtype), kernel.astype(dtype))


def _backward(
    dtype: jnp.dtype, residuals: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    x, kernel = residuals
    wide, gradient = gradient.dtype, gradient.astype(dtype)
    x_gradient = _contract(gradient, kernel, 1, wide)
    return x_gradient, _contract(transpose_in_memory(x), gradient, 0, wide)


trained_matmul.defvjp(_forward, _backward)


def _contract(left: Array, right: Array, axis: int, dtype: jnp.dtype) -> Array:
    """Multiplies two matrices. Sums over axis 1 of `left` and axis `axis` of `right`.

    The sums and the result have the dtype `dtype`.
    """
    # With right.T, XLA for CPUs would multiply bfloat16 numbers as float32.
    axes = (((1,), (axis,)), ((), ()))
    return lax.dot_general(left, right, axes, preferred_element_type=dtype)


def transpose_in_memory(x: Array) -> Array:
    """Returns the transpose of a matrix. On CPUs, makes a copy, for faster products."""

    def copy(x: Array) -> Array:
        return with_layout_constraint(x.T, Layout(major_to_minor=(0, 1)))

    # XLA for CPUs has no fast product that sums over the first axis of both operands.
    return lax.platform_dependent(x, cpu=copy, default=jnp.transpose)


class Dropout(nn.Module):
    """Sets randomly chosen inputs to 0, and scales up the other inputs.

    On a CPU, this layer is faster than `flax.linen.Dropout`, because it draws 8 random bits per
    input, or 16 if `rate` is not a multiple of 1/256. `rate` is rounded to a multiple of 2**-16.
    """

    rate: float

    @nn.compact
    def __call__(self, x: Array, *, deterministic: bool) -> Array:
        """Applies dropout (rng `dropout`) to x [..., D] float, unless `deterministic` is set."""
        if deterministic or not self.rate:
            return x
        bits = 8 if (self.rate * 256).is_integer() else 16
        dropped = round(self.rate * 2**bits)  # number of the 2**bits values that become 0
        kept = 1 - dropped / 2**bits
        if not kept:
            return jnp.zeros_like(x)
        *rows, width = x.shape
        words = (*rows, -(-width * bits // 32))  # each word of 32 bits contains several numbers
        drawn = jax.random.bits(self.make_rng("dropout"), words, jnp.uint32)
        narrow = jnp.uint8 if bits == 8 else jnp.uint16
        numbers = jax.lax.bitcast_convert_type(drawn, narrow).reshape(*rows, -1)[..., :width]
        return jnp.where(numbers >= dropped, x / kept, 0)


_SMALLEST_SQUARE = 1e-24


def unit_vectors(x: Array) -> Array:
    """Scales vectors to length 1. Vectors shorter than 1e-12 become 0.

    The result, [..., D], is float32 or wider. Gradients are finite, and 0 for a zero vector.
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    squares = jnp.sum(x * x, axis=-1, keepdims=True)
    # The derivative of rsqrt overflows for small squares for which rsqrt itself is finite.
    usable = squares > _SMALLEST_SQUARE
    return jnp.where(usable, x * jax.lax.rsqrt(jnp.where(usable, squares, 1.0)), 0.0)


_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "linear": lambda x: x,
    "relu": jax.nn.relu,
    "sigmoid": jax.nn.sigmoid,
    "swish": jax.nn.silu,
}
KAIMING = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


class DenseLayer(nn.Module):
    """A linear layer, an activation, BatchNorm, and dropout.

    Attributes:
      activation: linear | relu | sigmoid | swish | prelu. PReLU has a single slope, at first 0.25
        as in PyTorch.
      norm_first: True for BatchNorm before the activation, False for BatchNorm after it.
      kernel_init: initialiser of the weights, by default Xavier-uniform. Biases start at 0.

    Source: the system "quality fusion" (4th place in the iQIYI challenge 2019). Its authors report
    that BatchNorm before the activation is worse. Our BatchNorm has momentum 0.9 and skips padding.
    """

    width: int
    activation: str = "relu"
    batch_norm: bool = True
    dropout_rate: float = 0.0
    norm_first: bool = False
    dtype: jnp.dtype = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()

    @nn.compact
    def __call__(self, x: Array, mask: Array, *, train: bool) -> Array:
        """Computes the output of the layer, [B, width] float32.

        `x` is [B, D] float. `mask` [B] bool is True for clips that count in the statistics of
        BatchNorm. If `train` is True, dropout (rng `dropout`) is applied and the statistics change.
        """
        check_choice("activation", self.activation, sorted([*_ACTIVATIONS, "prelu"]))
        param_dtype = jnp.promote_types(self.dtype, jnp.float32)
        x = Linear(self.width, dtype=self.dtype, kernel_init=self.kernel_init, name="dense")(x)
        if self.batch_norm and self.norm_first:
            x = batch_norm(x, mask, train=train)
        if self.activation == "prelu":
            slope = self.param("slope", nn.initializers.constant(0.25), (), param_dtype)
            x = jnp.where(x > 0, x, slope * x)
        else:
            x = _ACTIVATIONS[self.activation](x)
        if self.batch_norm and not self.norm_first:
            x = batch_norm(x, mask, train=train)
        return Dropout(self.dropout_rate)(x, deterministic=not train)


class ResidualBlock(nn.Module):
    """Two dense layers f with a shortcut: x + f(x).

    Each layer is Linear, BatchNorm, PReLU. Dropout follows the first layer.

    Attributes:
      hidden_dim: width of the first layer; 0 means twice the width of x. The second layer has the
        width of x.

    Source: DeepMEF (3rd place 2019), authors' code, with this block before each classifier.
    Weights start as in Kaiming (He et al. 2015), biases at 0. We added the masks. They exclude
    padded rows from the batch statistics.
    """

    hidden_dim: int = 0
    dropout_rate: float = 0.5
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, mask: Array, *, train: bool) -> Array:
        """Computes x + f(x), [B, D] float32, from x [B, D] float.

        `mask` [B] bool is True for clips that count in the statistics of BatchNorm. If `train` is
        True, dropout is applied and the statistics change.
        """
        hidden_dim = self.hidden_dim or 2 * x.shape[-1]
        make = functools.partial(DenseLayer, norm_first=True, dtype=self.dtype, kernel_init=KAIMING)
        hidden = make(hidden_dim, "prelu", True, self.dropout_rate, name="hidden")
        back = make(x.shape[-1], "prelu", name="back")
        return x + back(hidden(x, mask, train=train), mask, train=train)


def check_head(head: Literal["cosine", "linear"], logit_scale: float) -> None:
    """Raises UserError if `logit_scale` is not 1, although the classifier `head` is `linear`.

    Only the logits of a cosine classifier have a factor.
    """
    if head == "linear" and logit_scale != 1.0:
        raise UserError(
            f"config.model.logit_scale={logit_scale} has no effect with config.model.head=linear\n"
            "set --config.model.head=cosine, or leave logit_scale out"
        )


class Classifier(nn.Module):
    """Dropout and a linear layer. Parameters and logits are float32 or wider."""

    num_classes: int
    dropout_rate: float = 0.0
    dtype: jnp.dtype = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.linear.default_kernel_init

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        """Computes the logits, [B, num_classes] float32, from x [B, D] float.

        If `train` is True, dropout (rng `dropout`) is applied to x.
        """
        x = Dropout(self.dropout_rate)(x, deterministic=not train)
        return Linear(self.num_classes, self.dtype, kernel_init=self.kernel_init, name="logits")(x)


class CosineClassifier(nn.Module):
    """Computes scaled cosines between the input and a learned direction of each class.

    The loss adds the margin of ArcFace, not this layer.

    Attributes:
      scale: factor on the cosines, the s of ArcFace.
      dropout_rate: dropout rate of the unit vectors. Dropout leads to cosines above 1. Only
        `losses.cosine_margin` allows such cosines.

    Source: Deng et al., ArcFace, equation 2. The dropout is not in the paper.
    """

    num_classes: int
    scale: float
    dropout_rate: float = 0.0

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Computes the logits, [B, num_classes] float32, from x [B, D] float.

        Without dropout, logits lie between -`scale` and `scale`. The logits of a zero vector are 0.
        If `train` is True, dropout (rng `dropout`) is applied to the unit vectors of x.
        """
        unit = Dropout(self.dropout_rate)(unit_vectors(x), deterministic=not train)
        init = nn.initializers.xavier_uniform()
        kernel = self.param("kernel", init, (x.shape[-1], self.num_classes), unit.dtype)
        directions = unit_vectors(kernel.T)  # [1 + C, D]
        # Angles near 0 and pi need products at full precision.
        return self.scale * jnp.einsum("bd,cd->bc", unit, directions, precision="highest")


class NetVLAD(nn.Module):
    """Pools frames into their summed differences from learned cluster centres.

    Attributes:
      num_clusters: number of clusters, K.
      reduce: `sum`, as published, adds the frames. `mean` (not in the paper) divides the sum by the
        number of real frames.
      batch_norm: True, as published, for BatchNorm after the linear map of the frames. Without it,
        this map has a bias.

    Source: iQIYI-VID paper, section 5.2 and figure 4: a fully connected layer, BatchNorm, softmax
    over the clusters, and the VLAD core, without the L2 norms of the original NetVLAD. The masks
    and a BatchNorm momentum of 0.9 are not in the paper.
    """

    num_clusters: int
    reduce: Literal["mean", "sum"] = "sum"
    batch_norm: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: Array, mask: Array, *, train: bool) -> Array:
        """Computes K descriptors of each clip, [B, K, D] float32, from features [B, T, D] float.

        Descriptor k is the sum of a_k(x_t) (x_t - c_k) over the frames x_t, where c_k is a learned
        centre and a is the softmax of a linear map of the frame. If a clip has no frames, its
        descriptors are 0. For `mask` [B, T] bool and `train`, see `batch_norm`.
        """
        param_dtype = jnp.promote_types(self.dtype, jnp.float32)
        features = features.astype(self.dtype)
        has_bias = not self.batch_norm  # BatchNorm has a bias
        scores = Linear(self.num_clusters, self.dtype, has_bias, name="assignment")(features)
        if self.batch_norm:
            scores = batch_norm(scores, mask, train=train)
        assignment = jax.nn.softmax(scores, axis=-1) * mask[..., None]  # [B, T, K]

        dim = features.shape[-1]
        init = nn.initializers.normal(dim**-0.5)
        centers = self.param("centers", init, (self.num_clusters, dim), param_dtype)
        share = assignment.astype(self.dtype)
        summed = jnp.einsum("btk,btd->bkd", share, features, preferred_element_type=param_dtype)
        descriptors = summed - jnp.sum(assignment, axis=1)[..., None] * centers  # [B, K, D]
        if self.reduce == "mean":
            count = jnp.maximum(jnp.sum(mask, axis=1), 1)
            descriptors = descriptors / count[:, None, None]
        return descriptors
