"""The same nets and data in idiomatic PyTorch, eager or compiled, on the CPU.

    python -m tests.benchmarks.peer DIR [--epochs=10] [--batch_size=1024] [--compile]

Unpickles the faces of the official files of DIR into memory, trains the MLP, ranks val, saves a
checkpoint, and prints one line of JSON. Other benchmarks time `Step`, `make_scorer` and `rank`.
Needs torch, and does not use vidjax.
"""

# pyright: reportMissingImports=false

import argparse
import collections
import functools
import json
import math
import pickle
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

MMA_MODALITIES = ("face", "head", "body", "audio")
MAX_FRAMES = 64  # of a clip in training
FRAME_STEP = 16  # padding is to a multiple of it, so that few shapes are compiled


class Frames(NamedTuple):
    """The frames of one modality of B clips, padded to T."""

    features: Tensor  # [B, T, D], float16 as stored; 0 on padding
    quality: Tensor  # [B, T] float32; 0 where the modality has none
    detection: Tensor  # [B, T] float32; 1 where the modality has none
    mask: Tensor  # [B, T] bool, True for real frames


class Batch(NamedTuple):
    """Clips of one step: modality -> Frames, and labels [B] int64, class columns."""

    frames: dict[str, Frames]
    labels: Tensor


class Fused(NamedTuple):
    """Fused frames: features [B, T', D], and mask [B, T'] bool, True where the clip has any."""

    features: Tensor
    mask: Tensor


def make_batch(frames: Mapping[str, Sequence[Any]], labels: Any) -> Batch:
    """Returns numpy arrays, modality -> the fields of Frames, as a batch."""
    frames = {
        name: Frames(*(torch.from_numpy(np.array(x)) for x in arrays))
        for name, arrays in frames.items()
    }
    return Batch(frames, torch.from_numpy(np.array(labels)).long())


# Fusion.


def keep_good(frames: Frames) -> Frames:
    """Returns the frames with a mask of the good ones; a clip that would lose all keeps them."""
    good = frames.mask & (frames.quality >= 25.0) & (frames.detection >= 0.7)
    mask = torch.where(good.any(dim=1, keepdim=True), good, frames.mask)
    return frames._replace(mask=mask)


def frame_weights(frames: Frames, weighting: str) -> Tensor:
    """Returns weights of frames [B, T] float32, 0 on padding and not all 0 in a clip with frames.

    They are `uniform`; `quality`, the product of quality and detection; or `graded`, this product
    times 0, .2, .3, .6 or 1 for a quality below 0, 20, 30, 40 or at least 40.
    """
    uniform = frames.mask.float()
    if weighting == "uniform":
        return uniform
    quality = frames.quality
    weights = quality * frames.detection
    if weighting == "graded":
        grade = torch.ones_like(quality)
        for least, value in ((40.0, 0.6), (30.0, 0.3), (20.0, 0.2), (0.0, 0.0)):
            grade = torch.where(quality < least, value, grade)
        weights = weights * grade
    weights = weights.clamp(min=0) * uniform
    return torch.where((weights > 0).any(dim=1, keepdim=True), weights, uniform)


def take_frames(features: Tensor, index: Tensor) -> Tensor:
    """Returns features[b, index[b, j]]: of [B, T, D], at [B, T'], in the stored dtype."""
    num_clips, num_frames, dim = features.shape
    rows = (torch.arange(num_clips)[:, None] * num_frames + index).flatten()
    return features.flatten(0, 1).index_select(0, rows).view(*index.shape, dim)


def random_fusion(
    frames: Frames,
    *,
    num_draws: int = 1,
    probs: Sequence[float] = (0.2, 0.2, 0.2, 0.2, 0.2),
    replacement: bool = True,
    weighting: str = "uniform",
) -> Fused:
    """Returns `num_draws` vectors a clip, each the weighted mean of 1 to S frames at random.

    `probs` are S probabilities of fusing 1, 2, ... frames. Without `replacement` no frame comes
    twice in a vector, unless the clip has too few frames.
    """
    num_slots = len(probs)
    num_clips, num_frames = frames.mask.shape
    slots = torch.arange(num_slots)
    draw = torch.rand(num_clips, num_draws, 1)
    thresholds = [sum(probs[:i]) / sum(probs) for i in range(1, num_slots)]
    more = [(draw >= threshold).long() for threshold in thresholds]
    used = slots < 1 + sum(more)  # [B, N, S]

    if replacement:
        cdf = frames.mask.cumsum(dim=1, dtype=torch.float32)
        points = torch.rand(num_clips, num_draws * num_slots) * cdf[:, -1:]
        index = torch.searchsorted(cdf, points, right=True).clamp(max=num_frames - 1)
    else:
        keys = torch.rand(num_clips, num_draws, num_frames)
        keys = keys.masked_fill(~frames.mask[:, None], -1.0)
        order = keys.topk(min(num_slots, num_frames), dim=-1).indices
        turn = slots % frames.mask.sum(dim=1, keepdim=True).clamp(min=1, max=num_slots)  # [B, S]
        index = order.gather(2, turn[:, None].expand(-1, num_draws, -1)).flatten(1)

    weights = frame_weights(frames, weighting).gather(1, index).view_as(used) * used
    weights = torch.where(weights.sum(dim=-1, keepdim=True) > 0, weights, used.float())
    weights = weights / weights.sum(dim=-1, keepdim=True)
    exists = frames.mask.any(dim=1)[:, None].expand(-1, num_draws)
    weights = weights * exists[..., None]
    picked = take_frames(frames.features, index).view(*used.shape, -1)  # [B, N, S, D]
    return Fused((weights[..., None] * picked.float()).sum(dim=2), exists)


def mean_frame(frames: Frames, weighting: str = "uniform") -> Fused:
    """Returns Fused [B, 1], float32: the weighted mean of all frames of a clip."""
    weights = frame_weights(frames, weighting)
    weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1e-12)
    features, num_clips = frames.features, len(weights)
    # Eager, 8 times faster than one product of all in float32, which leaves the cache.
    step = num_clips if torch.compiler.is_compiling() else 64
    means = [
        torch.bmm(weights[i : i + step, None], features[i : i + step].float())
        for i in range(0, num_clips, step)
    ]
    mean = torch.cat(means) if len(means) > 1 else means[0]  # [B, 1, D]
    return Fused(mean, frames.mask.any(dim=1, keepdim=True))


# Nets.


class DenseLayer(nn.Module):
    """A linear layer, an activation, BatchNorm or not, dropout."""

    def __init__(self, in_dim: int, width: int, activation: nn.Module, batch_norm: bool):
        super().__init__()
        self.dense = make_linear(in_dim, width)
        self.activation = activation
        self.norm = nn.BatchNorm1d(width) if batch_norm else nn.Identity()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.norm(self.activation(self.dense(x))))


def make_linear(in_dim: int, width: int) -> nn.Linear:
    linear = nn.Linear(in_dim, width)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class MLP(nn.Module):
    """Quality fusion (4th place 2019), its main net: swish layers with dropout, a classifier."""

    def __init__(self, dim: int, num_classes: int):
        super().__init__()
        pairs = ((dim, 1024), (1024, 1024))
        self.layers = nn.Sequential(*(DenseLayer(*pair, nn.SiLU(), False) for pair in pairs))
        self.classifier = make_linear(1024, num_classes)

    def forward(self, fused: Mapping[str, Fused]) -> Tensor:
        """Returns logits [B N, 1 + C] of N face vectors of every clip."""
        return self.classifier(self.layers(fused["face"].features.flatten(0, 1)))


class ResidualDense(nn.Module):
    """Residual Dense Net (2nd place 2019): h1 = f1(x), h2 = h1 + f2(h1), h3 = h2 + f3(h2)."""

    def __init__(self, dim: int, num_classes: int, width: int = 8192):
        super().__init__()
        layers = (DenseLayer(before, width, nn.ReLU(), True) for before in (dim, width, width))
        self.layers = nn.ModuleList(layers)
        self.classifier = make_linear(width, num_classes)

    def forward(self, fused: Mapping[str, Fused]) -> Tensor:
        """Returns logits [B N, 1 + C] of N face vectors of every clip."""
        x = fused["face"].features.flatten(0, 1)
        for i, layer in enumerate(self.layers):
            x = x + layer(x) if i else layer(x)
        return self.classifier(x)


class MaskedBatchNorm(nn.Module):
    """BatchNorm over the real frames of [B, T, K]; nn.BatchNorm1d would count the others too."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        mean: Tensor = self.running_mean  # type: ignore[assignment]
        var: Tensor = self.running_var  # type: ignore[assignment]
        if self.training:
            real = mask[..., None].to(x.dtype)
            count = real.sum().clamp(min=1)
            mean = (x * real).sum(dim=(0, 1)) / count
            var = ((x - mean).square() * real).sum(dim=(0, 1)) / count
            with torch.no_grad():
                self.running_mean.lerp_(mean, 0.1)  # type: ignore[operator]
                self.running_var.lerp_(var, 0.1)  # type: ignore[operator]
        return (x - mean) * (torch.rsqrt(var + 1e-5) * self.weight) + self.bias


class NetVLAD(nn.Module):
    """Means of the differences of frames from learned cluster centres."""

    def __init__(self, dim: int, num_clusters: int):
        super().__init__()
        self.assignment = nn.Linear(dim, num_clusters, bias=False)
        self.norm = MaskedBatchNorm(num_clusters)
        self.centers = nn.Parameter(torch.randn(num_clusters, dim) * dim**-0.5)

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        """Returns [B, K, D] of features [B, T, D] float32 with mask [B, T]."""
        scores = self.norm(self.assignment(features).float(), mask)  # [B, T, K]
        assignment = scores.softmax(dim=-1) * mask[..., None]
        weighted = torch.bmm(assignment.transpose(1, 2), features)  # [B, K, D]
        descriptors = weighted - assignment.sum(dim=1)[..., None] * self.centers
        return descriptors / mask.sum(dim=1).clamp(min=1)[:, None, None]


class MultimodalAttention(nn.Module):
    """O = X + gamma X Y, Y the softmax of the Gram matrix of W_f X over the vectors that exist."""

    def __init__(self, embed_dim: int):
        super().__init__()
        self.w_f = nn.Linear(embed_dim, 64, bias=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Returns [B, M, D] of vectors x [B, M, D] with mask [B, M]."""
        f = self.w_f(x)
        z = torch.bmm(f, f.transpose(1, 2)).float()  # [B, M, M]
        pairs = mask[:, :, None] & mask[:, None, :]
        z = z.masked_fill(~pairs, torch.finfo(z.dtype).min)
        y = z.softmax(dim=1).masked_fill(~pairs, 0.0)
        return x + 0.05 * torch.bmm(y.transpose(1, 2), x)


class MMA(nn.Module):
    """The iQIYI-VID paper's system: NetVLAD on the face, maps, attention, a classifier.

    A clip that loses modalities in training never loses all.
    """

    def __init__(self, dims: Mapping[str, int], num_classes: int, embed_dim: int = 512):
        super().__init__()
        self.counts = {name: 3 if name == "face" else 1 for name in dims}
        self.embed_dim = embed_dim
        self.netvlad = NetVLAD(dims["face"], 3)
        widths = {**dims, "face": 3 * dims["face"]}
        self.maps = nn.ModuleDict(
            {name: nn.Linear(widths[name], n * embed_dim) for name, n in self.counts.items()}
        )
        norms = {name: nn.LayerNorm(embed_dim, eps=1e-6) for name in dims}
        self.map_norms = nn.ModuleDict(norms)
        self.attention = MultimodalAttention(embed_dim)
        self.dropout = nn.Dropout(0.5)
        self.classifier = nn.Linear(sum(self.counts.values()) * embed_dim, num_classes)

    def forward(self, fused: Mapping[str, Fused]) -> Tensor:
        """Returns logits [B, 1 + C]; a modality except the face has one fused frame."""
        present = torch.stack([fused[name].mask.any(dim=1) for name in self.counts], dim=1)
        if self.training:
            present = self._drop(present)
        vectors, masks = [], []
        for i, (name, count) in enumerate(self.counts.items()):
            features, mask = fused[name]
            video = self.netvlad(features.float(), mask) if name == "face" else features.float()
            mapped = self.maps[name](video.flatten(1)).view(-1, count, self.embed_dim)
            exists = present[:, i, None]
            vectors.append(self.map_norms[name](mapped) * exists[..., None])
            masks.append(exists.expand(-1, count))
        x = torch.cat(vectors, dim=1)  # [B, M', D]
        x = self.attention(x, torch.cat(masks, dim=1))
        return self.classifier(self.dropout(x.flatten(1)))

    def _drop(self, present: Tensor) -> Tensor:
        draw = torch.rand(present.shape).masked_fill(~present, -1.0)
        last = draw == draw.amax(dim=1, keepdim=True)
        return present & ((draw >= 0.5) | last)


# Losses.


def focal_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the sigmoid one-vs-rest focal loss [B] with gamma 2, summed over classes.

    The negative term of all classes is corrected at the label, without a one-hot array.
    """

    def negative(x: Tensor) -> Tensor:
        return x.sigmoid().pow(2.0) * F.softplus(x)

    select_at_label = logits.gather(1, labels[:, None])  # [B, 1]
    corrected = negative(-select_at_label) - negative(select_at_label)
    return negative(logits).sum(dim=1) + corrected[:, 0]


def mixed_loss(logits: Tensor, labels: Tensor, focal_weight: Tensor | float | None) -> Tensor:
    """Returns w x focal + (1 - w) x softmax cross-entropy, [B]; only the softmax for None."""
    softmax = F.cross_entropy(logits, labels, reduction="none")
    if focal_weight is None:
        return softmax
    return focal_weight * focal_loss(logits, labels) + (1 - focal_weight) * softmax


# A recipe, a training step, and ranking.


class Recipe(NamedTuple):
    """A net and what goes with it."""

    net: nn.Module  # a function of modality -> Fused
    fuse_train: Callable[[Mapping[str, Frames]], dict[str, Fused]]
    fuse_eval: Callable[[Mapping[str, Frames]], dict[str, Fused]]
    score: Callable[[Tensor], Tensor] = functools.partial(F.log_softmax, dim=-1)  # to rank by
    focal: bool = False  # whether the loss has a focal part


# Net -> options of the random fusion in training, and the weighting of the mean in evaluation.
FUSION: dict[str, tuple[dict[str, Any], str]] = {
    "mlp": ({"num_draws": 1, "probs": (0.25, 0, 0.65, 0, 0.1), "weighting": "quality"}, "graded"),
    "residual": (
        {"num_draws": 2, "probs": (0.5, 0.125, 0.125, 0.125, 0.125), "replacement": False},
        "quality",
    ),
    "mma": ({"num_draws": 4, "weighting": "quality"}, "quality"),
}


def make_recipe(
    net_name: str,
    *,
    num_classes: int,
    dims: Mapping[str, int] | None = None,
    width: int = 8192,
    num_draws: int | None = None,
) -> Recipe:
    """Returns one of the three systems, `mlp`, `residual` or `mma`, with 1 + C classes.

    `dims` are modality -> feature width, 512 by default. `width` is of `residual`. `num_draws` are
    random fusions of a clip in a step, by default 1, 2 and 4.
    """
    dims = dims or dict.fromkeys(MMA_MODALITIES if net_name == "mma" else ("face",), 512)
    draw, weighting = FUSION[net_name]
    if num_draws:
        draw = {**draw, "num_draws": num_draws}

    def fuse(frames: Mapping[str, Frames], train: bool) -> dict[str, Fused]:
        face = frames["face"]
        if train and net_name == "mlp":
            face = keep_good(face)
        fused = random_fusion(face, **draw) if train else mean_frame(face, weighting)
        others = {name: mean_frame(frames[name]) for name in dims if name != "face"}
        return {"face": fused, **others}

    nets = {
        "mlp": lambda: MLP(dims["face"], num_classes),
        "residual": lambda: ResidualDense(dims["face"], num_classes, width),
        "mma": lambda: MMA(dims, num_classes),
    }
    recipe = Recipe(nets[net_name](), lambda x: fuse(x, True), lambda x: fuse(x, False))
    return recipe._replace(score=F.logsigmoid, focal=True) if net_name == "mlp" else recipe


def _autocast(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float32)


def _seen(frames: Mapping[str, Frames]) -> Tensor:
    return torch.stack([one.mask.any(dim=1) for one in frames.values()]).any(dim=0)


class Step:
    """One training step: fusion, net, loss, backward, fused Adam."""

    def __init__(
        self,
        recipe: Recipe,
        *,
        compile: bool = False,
        dtype: torch.dtype = torch.float32,
        learning_rate: float = 1e-3,
    ):
        """Compiles fusion, net and loss as one function if `compile`; parameters are float32."""
        self.net = recipe.net.train()
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=learning_rate, fused=True)
        # A tensor, so that another weight compiles nothing again.
        self.focal_weight = torch.tensor(0.75) if recipe.focal else None

        def mean_loss(batch: Batch, focal_weight: Tensor | None) -> Tensor:
            with torch.no_grad():
                fused = recipe.fuse_train(batch.frames)
            with _autocast(dtype):
                logits = recipe.net(fused)
            repeats = len(logits) // len(batch.labels)  # examples of a clip
            labels = batch.labels.repeat_interleave(repeats)
            losses = mixed_loss(logits.float(), labels, focal_weight)
            seen = _seen(batch.frames).repeat_interleave(repeats)
            return (losses * seen).sum() / seen.sum().clamp(min=1)

        self.mean_loss = torch.compile(mean_loss) if compile else mean_loss

    def set_focal(self, weight: float) -> None:
        """Changes the weight of the focal loss."""
        if self.focal_weight is not None:
            self.focal_weight.fill_(weight)

    def __call__(self, batch: Batch) -> Tensor:
        """Returns the loss of a batch, on the device, after which the parameters are changed."""
        loss = self.mean_loss(batch, self.focal_weight)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def make_scorer(
    recipe: Recipe, *, compile: bool = False, dtype: torch.dtype = torch.float32
) -> Callable[[Batch], Tensor]:
    """Returns a function of a batch that gives scores [B, C] of identities, -inf where unseen."""

    def scores(batch: Batch) -> Tensor:
        fused = recipe.fuse_eval(batch.frames)
        with _autocast(dtype):
            logits = recipe.net(fused)
        scores = recipe.score(logits.float())[:, 1:]
        return scores.masked_fill(~_seen(batch.frames)[:, None], -torch.inf)

    compiled = torch.compile(scores) if compile else scores

    def score(batch: Batch) -> Tensor:
        recipe.net.eval()
        with torch.inference_mode():
            return compiled(batch)

    return score


def rank(score: Callable[[Batch], Tensor], blocks: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """Returns the best 100 clips of every identity, best first: scores and rows, both [C, 100].

    `blocks` are the clips in the order of their rows. Places that no clip takes have -inf.
    """
    start, best, rows = 0, None, None
    with torch.inference_mode():
        for batch in blocks:
            scores = score(batch).T  # [C, B]
            index = torch.arange(start, start + scores.shape[1])
            start += scores.shape[1]
            index = index.expand(len(scores), -1)
            if best is not None and rows is not None:
                scores, index = torch.cat([best, scores], dim=1), torch.cat([rows, index], dim=1)
            best, place = scores.topk(min(100, scores.shape[1]), dim=1)
            rows = index.gather(1, place)
    if best is None or rows is None:
        raise ValueError("no clips to rank")
    return best, rows


def mean_average_precision(
    rows: np.ndarray,
    scores: np.ndarray,
    labels: np.ndarray,
    truth: Mapping[str, int],
    columns: Mapping[int, int],
) -> float:
    """Returns MAP over all identities of `truth`, clip -> identity.

    `rows` and `scores` are results of `rank`; `labels` [N] are class columns, 0 for others;
    `columns` are identity -> class column, from 1. The AP of an identity without a column is 0.
    """
    hits = (labels[rows] == np.arange(1, 1 + len(rows))[:, None]) & np.isfinite(scores)
    precision = np.cumsum(hits, axis=1) / np.arange(1, 1 + hits.shape[1])
    total = (precision * hits).sum(axis=1)
    positives = collections.Counter(truth.values())
    known = [identity for identity in positives if identity in columns]
    found = sum(total[columns[identity] - 1] / positives[identity] for identity in known)
    return float(found) / len(positives)


# The official files in memory.


class Clip(NamedTuple):
    """The faces of one clip: features [T, D], quality [T], detection [T]."""

    features: np.ndarray
    quality: np.ndarray
    detection: np.ndarray


def load_clips(directory: Path, split: str) -> dict[str, Clip]:
    """Returns clip name -> Clip, of clips with a face, unpickled from an official file."""
    content = pickle.loads((directory / f"face_{split}.pickle").read_bytes(), encoding="bytes")
    clips = {}
    for key, frames in content.items():
        if len(frames):
            name = key.decode() if isinstance(key, bytes) else key
            features = np.stack([frame[-1] for frame in frames])
            detection, quality = np.array([frame[2:4] for frame in frames], np.float32).T
            clips[name.removesuffix(".mp4")] = Clip(features, quality, detection)
    return clips


def load_truth(directory: Path, split: str) -> dict[str, int]:
    """Returns clip name -> identity, of `train_gt.txt` or of the inverted `val_gt.txt`."""
    labels = {}
    for line in (directory / f"{split}_gt.txt").read_text().splitlines():
        first, *rest = line.split()
        pairs = [(first, rest[0])] if split == "train" else [(name, first) for name in rest]
        labels.update((name.removesuffix(".mp4"), int(identity)) for name, identity in pairs)
    return labels


class ClipDataset(Dataset):
    """The clips of one split in memory, as arrays per clip.

    In training, clips with a label, and a random part of a longer clip; in evaluation all clips by
    length, so that blocks have little padding. `labels` are class columns, 0 for others.
    """

    def __init__(self, directory: Path, split: str, columns: Mapping[int, int], *, train: bool):
        """Loads the files; `columns` are identity -> class column, from 1."""
        clips, truth = load_clips(directory, split), load_truth(directory, split)
        names = sorted(clips)
        if train:
            names = [name for name in names if truth.get(name) in columns]
        else:
            names.sort(key=lambda name: len(clips[name].features))
        self.train = train
        self.labels = np.array([columns.get(truth.get(n, -1), 0) for n in names], np.int64)
        self.clips = [clips[name] for name in names]

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, row: int) -> tuple[Clip, int]:
        clip = self.clips[row]
        if self.train and len(clip.features) > MAX_FRAMES:
            start = int(torch.randint(len(clip.features) - MAX_FRAMES + 1, ()))
            clip = Clip(*(x[start : start + MAX_FRAMES] for x in clip))
        return clip, int(self.labels[row])

    def collate(self, examples: Sequence[tuple[Clip, int]]) -> Batch:
        """Returns clips as a batch, padded to a multiple of FRAME_STEP."""
        lengths = [len(clip.features) for clip, _ in examples]
        longest = math.ceil(max(lengths) / FRAME_STEP) * FRAME_STEP
        first = self.clips[0].features
        features = np.zeros((len(examples), longest, first.shape[1]), first.dtype)
        quality, detection = np.zeros((2, len(examples), longest), np.float32)
        for i, (clip, _) in enumerate(examples):
            features[i, : lengths[i]] = clip.features
            quality[i, : lengths[i]] = clip.quality
            detection[i, : lengths[i]] = clip.detection
        mask = np.arange(longest) < np.array(lengths)[:, None]
        arrays = (features, quality, detection, mask)
        frames = Frames(*(torch.from_numpy(x) for x in arrays))
        return Batch({"face": frames}, torch.tensor([label for _, label in examples]))


def make_loader(dataset: ClipDataset, batch_size: int) -> DataLoader:
    """Returns batches: in training, shuffled and of one size; in evaluation, in order and all."""
    options: dict[str, Any] = {"shuffle": dataset.train, "drop_last": dataset.train}
    size = min(batch_size, len(dataset))
    return DataLoader(dataset, batch_size=size, collate_fn=dataset.collate, **options)


# The whole run.


def learning_rate_scale(step: int, num_steps: int) -> float:
    """Returns the factor of the peak rate: a linear warm-up of a tenth, then a cosine to 0.01."""
    warmup_steps = max(1, math.ceil(0.1 * num_steps))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    share = min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))
    return 0.01 + 0.99 * (1 + math.cos(math.pi * share)) / 2


def focal_share(share: float) -> float:
    """Returns the weight of the focal loss at a share of the run, as published of 200 epochs."""
    return 0.75 if share < 0.12 else 1.0 if share < 0.5 else 0.98


def fit(
    directory: Path,
    *,
    epochs: int = 10,
    batch_size: int = 1024,
    compile: bool = False,
    dtype: torch.dtype = torch.float32,
    learning_rate: float = 1e-3,
    each_epoch: bool = False,
    softmax: bool = False,
) -> dict[str, Any]:
    """Trains the MLP on official files, saves a checkpoint and returns the MAP@100 on val.

    With `each_epoch` the MAP is written after every epoch. `softmax` leaves out the focal loss.
    """
    identities = sorted(set(load_truth(directory, "train").values()))
    columns = {identity: 1 + i for i, identity in enumerate(identities)}
    train = ClipDataset(directory, "train", columns, train=True)
    val = ClipDataset(directory, "val", columns, train=False)
    torch.manual_seed(0)
    dims = {"face": train.clips[0].features.shape[1]}
    recipe = make_recipe("mlp", num_classes=1 + len(columns), dims=dims)
    recipe = recipe._replace(focal=recipe.focal and not softmax)
    step = Step(recipe, compile=compile, dtype=dtype, learning_rate=learning_rate)
    loader, blocks = make_loader(train, batch_size), make_loader(val, batch_size)
    num_steps = epochs * len(loader)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        step.optimizer, lambda done: learning_rate_scale(done, num_steps)
    )
    score = make_scorer(recipe, compile=compile, dtype=dtype)

    def evaluate() -> float:
        best, rows = rank(score, blocks)
        recipe.net.train()  # scoring left it in evaluation
        truth = load_truth(directory, "val")
        return mean_average_precision(rows.numpy(), best.numpy(), val.labels, truth, columns)

    number, loss = 0, torch.zeros(())
    for batch in (batch for _ in range(epochs) for batch in loader):
        step.set_focal(focal_share(number / num_steps))
        loss = step(batch)
        schedule.step()
        number += 1
        if each_epoch and number % len(loader) == 0 and number < num_steps:
            sys.stdout.write(f"step {number}: map {evaluate():.4f}\n")
            sys.stdout.flush()
    result = {"map": evaluate(), "loss": loss.item(), "steps": number}
    with tempfile.TemporaryDirectory() as folder:
        state = {"net": step.net.state_dict(), "optimizer": step.optimizer.state_dict()}
        torch.save({**state, "step": number}, Path(folder) / "checkpoint.pt")
    return result


def main() -> None:
    """Prints the result of a whole run as one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path, help="of official files")
    for name, value in {"epochs": 10, "batch_size": 1024, "learning_rate": 1e-3}.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    for name in ("compile", "bfloat16", "each_epoch", "softmax"):
        parser.add_argument(f"--{name}", action="store_true")
    words = vars(parser.parse_args())
    words["dtype"] = torch.bfloat16 if words.pop("bfloat16") else torch.float32
    result = fit(words.pop("directory"), **words)
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
