"""The nets of three configurations in PyTorch, on a GPU if possible. It does not import vidjax.

    python -m tests.benchmarks.peer FOLDER [--epochs=10] [--batch_size=1024] [--compile]

The script reads the faces of the official files in FOLDER, trains the MLP with the softmax
cross-entropy, and prints MAP after every epoch. Other benchmarks measure `Step` and `rank`.
"""

# pyright: reportMissingImports=false

import argparse
import collections
import functools
import math
import pickle
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

MMA_MODALITIES = ("face", "head", "body", "audio")
DIM = 512  # width of features, and of the vectors of MMA
FRAME_STEP = 16  # the padded length is a multiple of it, so that few shapes are compiled
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# The frames of B clips in a modality, padded to T frames: features [B, T, D] float16, quality and
# detection [B, T] float32, which are 0 and 1 if the modality lacks them, and the mask [B, T].
Frames = collections.namedtuple("Frames", "features quality detection mask")
# B clips: modality -> Frames, and the class of each clip [B] int64, which is 0 for a distractor.
Batch = collections.namedtuple("Batch", "frames labels")
# N vectors of each clip, each fused from several frames: features [B, N, D], and a mask [B, N],
# which is False if the clip has no frames.
Fused = collections.namedtuple("Fused", "features mask")
# A net; a function of modality -> Frames, and True in training, which returns modality -> Fused; a
# function from logits to the scores of the ranking; True if the focal loss is a part of the loss.
Recipe = collections.namedtuple("Recipe", "net fuse score focal")


def make_batch(frames: Mapping[str, Sequence[Any]], labels: Any) -> Batch:
    """Copies arrays to the device. `frames` are modality -> arrays in the order of `Frames`."""
    tensors = {
        name: Frames(*(torch.from_numpy(array).to(DEVICE) for array in arrays))
        for name, arrays in frames.items()
    }
    return Batch(tensors, torch.as_tensor(labels, device=DEVICE).long())


# Fusion of frames.


def mask_bad_frames(frames: Frames) -> Frames:
    """Masks frames of low quality or detection score, unless a clip has no other frames."""
    good = frames.mask & (frames.quality >= 25.0) & (frames.detection >= 0.7)
    return frames._replace(mask=torch.where(good.any(dim=1, keepdim=True), good, frames.mask))


def frame_weights(frames: Frames, weighting: str) -> Tensor:
    """Returns the weights [B, T] float32 of frames; padding has the weight 0.

    - 'uniform': The weights are equal. This is also so if all weights of a clip would be 0.
    - 'quality': A weight is the product of quality and detection score.
    - 'graded': The product is multiplied by 0, 0.2, 0.3 or 0.6 for a quality below 0, 20, 30 or 40.
    """
    uniform = frames.mask.float()
    if weighting == "uniform":
        return uniform
    weights = frames.quality * frames.detection
    if weighting == "graded":
        factors = torch.tensor([0.0, 0.2, 0.3, 0.6, 1.0], device=DEVICE)
        limits = torch.tensor([0.0, 20.0, 30.0, 40.0], device=DEVICE)
        weights = weights * factors[torch.bucketize(frames.quality, limits, right=True)]
    weights = weights.clamp(min=0) * uniform
    return torch.where((weights > 0).any(dim=1, keepdim=True), weights, uniform)


def fuse_random_frames(
    frames: Frames, *, num_draws: int = 1, probs: Sequence[float] = (0.2, 0.2, 0.2, 0.2, 0.2),
    replacement: bool = True, weighting: str = "uniform",
) -> Fused:  # fmt: skip
    """Returns `num_draws` vectors of each clip. A vector is the weighted mean of random frames.

    `probs` has the probabilities of fusing 1, 2, ... S frames. If `replacement` is False, a frame
    is only repeated in a vector if the clip has too few frames.
    """
    num_slots, (num_clips, num_frames) = len(probs), frames.mask.shape
    rand = functools.partial(torch.rand, device=DEVICE)
    slots, draw = torch.arange(num_slots, device=DEVICE), rand(num_clips, num_draws, 1)
    more = [(draw >= sum(probs[:i]) / sum(probs)).long() for i in range(1, num_slots)]
    used = slots < 1 + sum(more)  # [B, N, S]
    if replacement:
        cdf = frames.mask.cumsum(dim=1, dtype=torch.float32)
        points = rand(num_clips, num_draws * num_slots) * cdf[:, -1:]
        index = torch.searchsorted(cdf, points, right=True).clamp(max=num_frames - 1)
    else:
        keys = rand(num_clips, num_draws, num_frames)
        keys = keys.masked_fill(~frames.mask[:, None], -1.0)
        order = keys.topk(min(num_slots, num_frames), dim=-1).indices
        turn = slots % frames.mask.sum(dim=1, keepdim=True).clamp(min=1, max=num_slots)  # [B, S]
        index = order.gather(2, turn[:, None].expand(-1, num_draws, -1)).flatten(1)
    weights = frame_weights(frames, weighting).gather(1, index).view_as(used) * used
    weights = torch.where(weights.sum(dim=-1, keepdim=True) > 0, weights, used.float())
    weights = weights / weights.sum(dim=-1, keepdim=True)
    exists = frames.mask.any(dim=1)[:, None].expand(-1, num_draws)
    first = torch.arange(num_clips, device=DEVICE)[:, None] * num_frames
    rows = (first + index).flatten()
    picked = frames.features.flatten(0, 1).index_select(0, rows).view(*used.shape, -1)
    weights = (weights * exists[..., None])[..., None]  # [B, N, S, 1]
    return Fused((weights * picked.float()).sum(dim=2), exists)


def fuse_all_frames(frames: Frames, weighting: str = "uniform") -> Fused:
    """Returns the weighted mean of all frames of each clip."""
    weights = frame_weights(frames, weighting)
    weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1e-12)
    features, num_clips = frames.features, len(weights)
    # In eager mode, pieces that fit into the cache are 8 times faster than all clips at once.
    step = num_clips if torch.compiler.is_compiling() else 64
    means = [
        torch.bmm(weights[i : i + step, None], features[i : i + step].float())
        for i in range(0, num_clips, step)
    ]
    return Fused(torch.cat(means), frames.mask.any(dim=1, keepdim=True))


# Nets: functions of modality -> Fused, which return logits [B N, 1 + C].


def make_linear(in_dim: int, width: int) -> nn.Linear:
    linear = nn.Linear(in_dim, width)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def make_layer(in_dim: int, width: int, activation: nn.Module, norm: nn.Module) -> nn.Module:
    return nn.Sequential(make_linear(in_dim, width), activation, norm, nn.Dropout(0.5))


class MLP(nn.Module):
    """The main net of `quality_fusion` (4th place 2019): two layers of 1024 units."""

    def __init__(self, num_classes: int):
        super().__init__()
        layers = (make_layer(in_dim, 1024, nn.SiLU(), nn.Identity()) for in_dim in (DIM, 1024))
        self.layers = nn.Sequential(*layers)
        self.classifier = make_linear(1024, num_classes)

    def forward(self, fused: Mapping[str, Fused]) -> Tensor:
        return self.classifier(self.layers(fused["face"].features.flatten(0, 1)))


class ResidualDense(nn.Module):
    """Residual Dense Net (2nd place 2019): h1 = f1(x), h2 = h1 + f2(h1), h3 = h2 + f3(h2)."""

    def __init__(self, num_classes: int):
        super().__init__()
        dims = (DIM, 4096, 4096)
        layers = (make_layer(in_dim, 4096, nn.ReLU(), nn.BatchNorm1d(4096)) for in_dim in dims)
        self.layers = nn.ModuleList(layers)
        self.classifier = make_linear(4096, num_classes)

    def forward(self, fused: Mapping[str, Fused]) -> Tensor:
        x = self.layers[0](fused["face"].features.flatten(0, 1))
        for layer in self.layers[1:]:
            x = x + layer(x)
        return self.classifier(x)


class MaskedBatchNorm(nn.BatchNorm1d):
    """BatchNorm over the real frames of x [B, T, K]; `mask` [B, T] is False for padding."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        mean: Tensor = self.running_mean  # type: ignore[assignment]
        var: Tensor = self.running_var  # type: ignore[assignment]
        if self.training:
            real = mask[..., None].to(x.dtype)
            count = real.sum().clamp(min=1)
            mean = (x * real).sum(dim=(0, 1)) / count
            var = ((x - mean).square() * real).sum(dim=(0, 1)) / count
            with torch.no_grad():
                self.running_mean.lerp_(mean, 0.1)  # type: ignore[union-attr]
                self.running_var.lerp_(var, 0.1)  # type: ignore[union-attr]
        return (x - mean) * (torch.rsqrt(var + 1e-5) * self.weight) + self.bias


class NetVLAD(nn.Module):
    """Means of the differences between frames and three learned cluster centres."""

    def __init__(self):
        super().__init__()
        self.assignment, self.norm = nn.Linear(DIM, 3, bias=False), MaskedBatchNorm(3)
        self.centers = nn.Parameter(torch.randn(3, DIM) * DIM**-0.5)

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        """Returns [B, K, D] for features [B, T, D] float32 and mask [B, T]."""
        scores = self.norm(self.assignment(features).float(), mask)  # [B, T, K]
        assignment = scores.softmax(dim=-1) * mask[..., None]
        weighted = torch.bmm(assignment.transpose(1, 2), features)  # [B, K, D]
        descriptors = weighted - assignment.sum(dim=1)[..., None] * self.centers
        return descriptors / mask.sum(dim=1).clamp(min=1)[:, None, None]


class MMA(nn.Module):
    """The system of the iQIYI-VID paper: NetVLAD of the face, maps, attention, a classifier.

    The attention is O = X + gamma X Y. Y is the softmax of the Gram matrix of W_f X. In training,
    modalities are dropped at random, but never all modalities of a clip.
    """

    def __init__(self, num_classes: int):
        super().__init__()
        self.counts = {name: 3 if name == "face" else 1 for name in MMA_MODALITIES}
        self.netvlad = NetVLAD()
        maps = {name: nn.Linear(n * DIM, n * DIM) for name, n in self.counts.items()}
        norms = {name: nn.LayerNorm(DIM, eps=1e-6) for name in MMA_MODALITIES}
        self.maps, self.map_norms = nn.ModuleDict(maps), nn.ModuleDict(norms)
        self.w_f, self.dropout = nn.Linear(DIM, 64, bias=False), nn.Dropout(0.5)
        self.classifier = nn.Linear(sum(self.counts.values()) * DIM, num_classes)

    def forward(self, fused: Mapping[str, Fused]) -> Tensor:
        present = torch.stack([fused[name].mask.any(dim=1) for name in self.counts], dim=1)
        if self.training:
            draw = torch.rand(present.shape, device=DEVICE).masked_fill(~present, -1.0)
            present = present & ((draw >= 0.5) | (draw == draw.amax(dim=1, keepdim=True)))
        vectors, masks = [], []
        for i, (name, count) in enumerate(self.counts.items()):
            features, mask = fused[name]
            video = self.netvlad(features.float(), mask) if name == "face" else features.float()
            mapped = self.maps[name](video.flatten(1)).view(-1, count, DIM)
            exists = present[:, i, None]
            vectors.append(self.map_norms[name](mapped) * exists[..., None])
            masks.append(exists.expand(-1, count))
        x, mask = torch.cat(vectors, dim=1), torch.cat(masks, dim=1)  # [B, M, D], [B, M]
        f = self.w_f(x)
        z = torch.bmm(f, f.transpose(1, 2)).float()  # [B, M, M]
        pairs = mask[:, :, None] & mask[:, None, :]
        z = z.masked_fill(~pairs, torch.finfo(z.dtype).min)
        y = z.softmax(dim=1).masked_fill(~pairs, 0.0)
        x = x + 0.05 * torch.bmm(y.transpose(1, 2), x)
        return self.classifier(self.dropout(x.flatten(1)))


# Training and ranking.


# Net -> class, modalities, arguments of `fuse_random_frames` of faces in training, and the
# weighting of faces in the ranking.
NETS: dict[str, tuple[Callable[[int], nn.Module], Sequence[str], dict[str, Any], str]] = {
    "mlp": (MLP, ["face"], {"probs": (0.25, 0, 0.65, 0, 0.1), "weighting": "quality"}, "graded"),
    "residual": (
        ResidualDense, ["face"],
        {"probs": (0.5, 0.125, 0.125, 0.125, 0.125), "replacement": False}, "quality",
    ),
    "mma": (MMA, MMA_MODALITIES, {"num_draws": 4, "weighting": "quality"}, "quality"),
}  # fmt: skip


def make_recipe(name: str, num_classes: int) -> Recipe:
    make_net, modalities, options, weighting = NETS[name]
    is_mlp = name == "mlp"

    def fuse(frames: Mapping[str, Frames], train: bool) -> dict[str, Fused]:
        face = frames["face"]
        if train:
            fused = fuse_random_frames(mask_bad_frames(face) if is_mlp else face, **options)
        else:
            fused = fuse_all_frames(face, weighting)
        return {"face": fused} | {other: fuse_all_frames(frames[other]) for other in modalities[1:]}

    score = F.logsigmoid if is_mlp else functools.partial(F.log_softmax, dim=-1)
    return Recipe(make_net(num_classes).to(DEVICE), fuse, score, focal=is_mlp)


def compute_focal_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the sigmoid focal loss [B] with gamma 2, summed over the classes."""

    def negative_loss(x: Tensor) -> Tensor:
        return x.sigmoid().pow(2.0) * F.softplus(x)

    at_label = logits.gather(1, labels[:, None])[:, 0]
    # Every class counts as wrong at first. The class of the label is corrected.
    return negative_loss(logits).sum(dim=1) + negative_loss(-at_label) - negative_loss(at_label)


def _has_frames(frames: Mapping[str, Frames]) -> Tensor:
    """Returns [B] bool: True if the clip has a frame in some modality."""
    return torch.stack([one.mask.any(dim=1) for one in frames.values()]).any(dim=0)


class Step:
    """A training step: fusion, net, loss, gradients, and Adam. The parameters are float32."""

    def __init__(self, recipe: Recipe, *, compiled: bool, bfloat16: bool, rate: float = 1e-3):
        self.net = recipe.net.train()
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=rate, fused=True)

        def mean_loss(batch: Batch) -> Tensor:
            with torch.no_grad():
                fused = recipe.fuse(batch.frames, True)
            with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=bfloat16):
                logits = recipe.net(fused)
            repeats = len(logits) // len(batch.labels)  # vectors of a clip
            labels = batch.labels.repeat_interleave(repeats)
            losses = F.cross_entropy(logits.float(), labels, reduction="none")
            if recipe.focal:
                losses = 0.75 * compute_focal_loss(logits.float(), labels) + 0.25 * losses
            weight = _has_frames(batch.frames).repeat_interleave(repeats)
            return (losses * weight).sum() / weight.sum().clamp(min=1)

        self.mean_loss = torch.compile(mean_loss) if compiled else mean_loss

    def __call__(self, batch: Batch) -> Tensor:
        loss = self.mean_loss(batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def make_scorer(recipe: Recipe, *, compiled: bool, bfloat16: bool = False) -> Callable[..., Tensor]:
    """Returns a function: batch -> scores [B, C]. Clips without frames have the score -inf."""

    def compute_scores(batch: Batch) -> Tensor:
        fused = recipe.fuse(batch.frames, False)
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=bfloat16):
            logits = recipe.net(fused)
        scores = recipe.score(logits.float())[:, 1:]
        return scores.masked_fill(~_has_frames(batch.frames)[:, None], -torch.inf)

    return torch.compile(compute_scores) if compiled else compute_scores


def rank(score: Callable[[Batch], Tensor], blocks: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """Returns the scores and the numbers of the best 100 clips of C identities, both [C, 100]."""
    start, best, rows = 0, torch.zeros(1, 0), torch.zeros(1, 0, dtype=torch.int64)
    with torch.inference_mode():
        for batch in blocks:
            scores = score(batch).T  # [C, B]
            index = torch.arange(start, start + scores.shape[1], device=DEVICE)
            index = index.expand(len(scores), -1)
            if start:
                scores, index = torch.cat([best, scores], dim=1), torch.cat([rows, index], dim=1)
            best, place = scores.topk(min(100, scores.shape[1]), dim=1)
            rows, start = index.gather(1, place), start + len(batch.labels)
    return best, rows


# Official files.


def load_truth(folder: Path, split: str) -> dict[str, int]:
    """Returns clip -> identity. A line of train is `clip identity`; of val, `identity clip ...`."""
    labels = {}
    for line in (folder / f"{split}_gt.txt").read_text().splitlines():
        first, *rest = line.split()
        pairs = [(first, rest[0])] if split == "train" else [(name, first) for name in rest]
        labels.update((name.removesuffix(".mp4"), int(identity)) for name, identity in pairs)
    return labels


def collate(examples: Sequence[tuple[Sequence[np.ndarray], int]]) -> Batch:
    """Returns a batch of clips and their classes, padded to a multiple of FRAME_STEP frames."""
    clips, labels = zip(*examples, strict=True)
    lengths = np.array([len(features) for features, _, _ in clips])
    longest = math.ceil(lengths.max() / FRAME_STEP) * FRAME_STEP
    arrays = [np.zeros((len(clips), longest, *x.shape[1:]), x.dtype) for x in clips[0]]
    for i, clip in enumerate(clips):
        for array, values in zip(arrays, clip, strict=True):
            array[i, : lengths[i]] = values
    return make_batch({"face": [*arrays, np.arange(longest) < lengths[:, None]]}, labels)


def load(folder: Path, split: str, columns: Mapping[int, int], batch_size: int) -> DataLoader:
    """Returns the batches of a split. `columns` are identity -> class, from 1.

    Batches of train are shuffled, equally large, and without distractors. Other splits are complete
    and sorted by length. Their distractors have the class 0.
    """
    train, truth = split == "train", load_truth(folder, split)
    content = pickle.loads((folder / f"face_{split}.pickle").read_bytes(), encoding="bytes")
    examples: Any = []
    for name, frames in sorted(content.items()):
        column = columns.get(truth.get(name.decode().removesuffix(".mp4"), -1), 0)
        if frames and (column or not train):
            features = np.stack([frame[-1] for frame in frames])
            detection, quality = np.array([frame[2:4] for frame in frames], np.float32).T
            examples.append(((features, quality, detection), column))
    if not train:
        examples.sort(key=lambda example: len(example[0][0]))
    options: dict[str, Any] = {"shuffle": train, "drop_last": train, "collate_fn": collate}
    return DataLoader(examples, batch_size=min(batch_size, len(examples)), **options)


def train_mlp(args: argparse.Namespace) -> None:
    identities = sorted(set(load_truth(args.folder, "train").values()))
    columns = {identity: 1 + i for i, identity in enumerate(identities)}
    loader, blocks = (
        load(args.folder, split, columns, args.batch_size) for split in ("train", "val")
    )
    torch.manual_seed(0)
    recipe = make_recipe("mlp", 1 + len(columns))._replace(focal=False)
    options = {"compiled": args.compile, "bfloat16": args.bfloat16}
    step, scorer = Step(recipe, rate=args.learning_rate, **options), make_scorer(recipe, **options)
    num_steps = args.epochs * len(loader)
    warmup = max(1, math.ceil(0.1 * num_steps))

    def rate(done: int) -> float:
        """Returns the factor of the learning rate after `done` steps: it rises to 1, then falls."""
        share = min(1.0, (done - warmup) / max(1, num_steps - warmup))
        cosine = 0.01 + 0.99 * (1 + math.cos(math.pi * share)) / 2
        return (done + 1) / warmup if done < warmup else cosine

    schedule = torch.optim.lr_scheduler.LambdaLR(step.optimizer, rate)
    positives = collections.Counter(load_truth(args.folder, "val").values())
    labels = np.array([label for _, label in blocks.dataset])

    def compute_map() -> float:
        """Returns MAP@100 on val. The AP of identities without a training clip is 0."""
        recipe.net.eval()
        best, rows = (x.cpu().numpy() for x in rank(scorer, blocks))
        recipe.net.train()
        hits = (labels[rows] == np.arange(1, 1 + len(rows))[:, None]) & np.isfinite(best)
        total = (np.cumsum(hits, axis=1) / np.arange(1, 1 + hits.shape[1]) * hits).sum(axis=1)
        known = positives.keys() & columns.keys()
        ap = [total[columns[identity] - 1] / positives[identity] for identity in known]
        return float(sum(ap)) / len(positives)

    for epoch in range(1, args.epochs + 1):
        for batch in loader:
            step(batch)
            schedule.step()
        score = compute_map()
        if epoch == args.epochs:
            states = [step.net.state_dict(), step.optimizer.state_dict(), num_steps]
            with tempfile.TemporaryFile() as file:
                torch.save(states, file)
        sys.stdout.write(f"step {epoch * len(loader)}: map {score:.4f}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the folder of the official files")
    for name, value in {"epochs": 10, "batch_size": 1024, "learning_rate": 1e-3}.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    for name in ("compile", "bfloat16"):
        parser.add_argument(f"--{name}", action="store_true")
    train_mlp(parser.parse_args())
