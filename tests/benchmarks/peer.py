"""The same nets and data in idiomatic PyTorch, eager or compiled, on a GPU if there is one.

    python -m tests.benchmarks.peer DIR [--epochs=10] [--batch_size=1024] [--compile]

Unpickles the faces of the official files of DIR into memory, trains the MLP by softmax, ranks val
after every epoch, saves a checkpoint, and prints one line of JSON. Other benchmarks time `Step`,
`make_scorer` and `rank`. Needs torch, and does not use vidjax.
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
from torch.utils.data import DataLoader

MMA_MODALITIES = ("face", "head", "body", "audio")
DIM = 512  # of features, and of the vectors of MMA
FRAME_STEP = 16  # padding is to a multiple of it, so that few shapes are compiled
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Frames(NamedTuple):
    """The frames of one modality of B clips, padded to T."""

    features: Tensor  # [B, T, D], float16 as stored; 0 on padding
    quality: Tensor  # [B, T] float32; 0 where the modality has none
    detection: Tensor  # [B, T] float32; 1 where the modality has none
    mask: Tensor  # [B, T] bool, True for real frames


class Batch(NamedTuple):
    frames: dict[str, Frames]
    labels: Tensor  # [B] int64, class columns


class Fused(NamedTuple):
    features: Tensor  # [B, N, D]
    mask: Tensor  # [B, N] bool, True where the clip has a frame


def make_batch(frames: Mapping[str, Sequence[Any]], labels: Any) -> Batch:
    made = {
        name: Frames(*(torch.from_numpy(array).to(DEVICE) for array in arrays))
        for name, arrays in frames.items()
    }
    return Batch(made, torch.as_tensor(labels, device=DEVICE).long())


# Fusion.


def keep_good(frames: Frames) -> Frames:
    """Returns the frames with a mask of the good ones; a clip that would lose all keeps them."""
    good = frames.mask & (frames.quality >= 25.0) & (frames.detection >= 0.7)
    return frames._replace(mask=torch.where(good.any(dim=1, keepdim=True), good, frames.mask))


def frame_weights(frames: Frames, weighting: str) -> Tensor:
    """Returns weights of frames [B, T] float32, 0 on padding and not all 0 in a clip with frames.

    They are `uniform`; `quality`, the product of quality and detection; or `graded`, this product
    times 0, .2, .3, .6 or 1 for a quality below 0, 20, 30, 40 or at least 40.
    """
    uniform = frames.mask.float()
    if weighting == "uniform":
        return uniform
    weights = frames.quality * frames.detection
    if weighting == "graded":
        grade = torch.ones_like(weights)
        for least, value in ((40.0, 0.6), (30.0, 0.3), (20.0, 0.2), (0.0, 0.0)):
            grade = torch.where(frames.quality < least, value, grade)
        weights = weights * grade
    weights = weights.clamp(min=0) * uniform
    return torch.where((weights > 0).any(dim=1, keepdim=True), weights, uniform)


def random_fusion(
    frames: Frames, *, num_draws: int = 1, probs: Sequence[float] = (0.2, 0.2, 0.2, 0.2, 0.2),
    replacement: bool = True, weighting: str = "uniform",
) -> Fused:  # fmt: skip
    """Returns `num_draws` vectors a clip, each the weighted mean of 1 to S frames at random.

    `probs` are S probabilities of fusing 1, 2, ... frames. Without `replacement` no frame comes
    twice in a vector, unless the clip has too few frames.
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


def mean_frame(frames: Frames, weighting: str = "uniform") -> Fused:
    """Returns the weighted mean of all frames of a clip, N = 1."""
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


# Nets: functions of modality -> Fused, with logits [B N, 1 + C] of N fused vectors of a clip.


def make_layer(in_dim: int, width: int, activation: nn.Module, batch_norm: bool) -> nn.Module:
    """Returns a linear layer, an activation, BatchNorm or not, dropout."""
    norm = nn.BatchNorm1d(width) if batch_norm else nn.Identity()
    return nn.Sequential(make_linear(in_dim, width), activation, norm, nn.Dropout(0.5))


def make_linear(in_dim: int, width: int) -> nn.Linear:
    linear = nn.Linear(in_dim, width)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class MLP(nn.Module):
    """Quality fusion (4th place 2019), its main net: swish layers with dropout, a classifier."""

    def __init__(self, num_classes: int):
        super().__init__()
        pairs = ((DIM, 1024), (1024, 1024))
        self.layers = nn.Sequential(*(make_layer(*pair, nn.SiLU(), False) for pair in pairs))
        self.classifier = make_linear(1024, num_classes)

    def forward(self, fused: Mapping[str, Fused]) -> Tensor:
        return self.classifier(self.layers(fused["face"].features.flatten(0, 1)))


class ResidualDense(nn.Module):
    """Residual Dense Net (2nd place 2019): h1 = f1(x), h2 = h1 + f2(h1), h3 = h2 + f3(h2)."""

    def __init__(self, num_classes: int):
        super().__init__()
        widths = ((DIM, 4096), (4096, 4096), (4096, 4096))
        self.layers = nn.ModuleList(make_layer(*pair, nn.ReLU(), True) for pair in widths)
        self.classifier = make_linear(4096, num_classes)

    def forward(self, fused: Mapping[str, Fused]) -> Tensor:
        x = fused["face"].features.flatten(0, 1)
        for i, layer in enumerate(self.layers):
            x = x + layer(x) if i else layer(x)
        return self.classifier(x)


class MaskedBatchNorm(nn.BatchNorm1d):
    """BatchNorm over the real frames of [B, T, K]; nn.BatchNorm1d would count the others too."""

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
    """Means of the differences of frames from three learned cluster centres."""

    def __init__(self):
        super().__init__()
        self.assignment, self.norm = nn.Linear(DIM, 3, bias=False), MaskedBatchNorm(3)
        self.centers = nn.Parameter(torch.randn(3, DIM) * DIM**-0.5)

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        """Returns [B, K, D] of features [B, T, D] float32 with mask [B, T]."""
        scores = self.norm(self.assignment(features).float(), mask)  # [B, T, K]
        assignment = scores.softmax(dim=-1) * mask[..., None]
        weighted = torch.bmm(assignment.transpose(1, 2), features)  # [B, K, D]
        descriptors = weighted - assignment.sum(dim=1)[..., None] * self.centers
        return descriptors / mask.sum(dim=1).clamp(min=1)[:, None, None]


class MMA(nn.Module):
    """The iQIYI-VID paper's system: NetVLAD on the face, maps, attention, a classifier.

    The attention is O = X + gamma X Y, Y the softmax of the Gram matrix of W_f X over the vectors
    that exist. A clip that loses modalities in training never loses all.
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


def focal_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the sigmoid one-vs-rest focal loss [B] with gamma 2, summed over classes."""

    def negative(x: Tensor) -> Tensor:
        return x.sigmoid().pow(2.0) * F.softplus(x)

    at_label = logits.gather(1, labels[:, None])[:, 0]  # corrected there, without a one-hot array
    return negative(logits).sum(dim=1) + negative(-at_label) - negative(at_label)


# A recipe, a training step, and ranking.


class Recipe(NamedTuple):
    net: nn.Module  # a function of modality -> Fused
    fuse: Callable[[Mapping[str, Frames], bool], dict[str, Fused]]  # in training or not
    score: Callable[[Tensor], Tensor] = functools.partial(F.log_softmax, dim=-1)  # to rank by
    focal: bool = False  # whether the loss has a focal part


# Net -> modalities, options of the random fusion of faces in training, and the weighting of their
# mean in evaluation.
FUSION: dict[str, tuple[Sequence[str], dict[str, Any], str]] = {
    "mlp": (("face",), {"probs": (0.25, 0, 0.65, 0, 0.1), "weighting": "quality"}, "graded"),
    "residual": (
        ("face",), {"probs": (0.5, 0.125, 0.125, 0.125, 0.125), "replacement": False}, "quality",
    ),
    "mma": (MMA_MODALITIES, {"num_draws": 4, "weighting": "quality"}, "quality"),
}  # fmt: skip
NETS = {"mlp": MLP, "residual": ResidualDense, "mma": MMA}


def make_recipe(name: str, num_classes: int) -> Recipe:
    modalities, draw, weighting = FUSION[name]

    def fuse(frames: Mapping[str, Frames], train: bool) -> dict[str, Fused]:
        face = keep_good(frames["face"]) if train and name == "mlp" else frames["face"]
        fused = random_fusion(face, **draw) if train else mean_frame(face, weighting)
        return {"face": fused, **{other: mean_frame(frames[other]) for other in modalities[1:]}}

    recipe = Recipe(NETS[name](num_classes).to(DEVICE), fuse)
    return recipe._replace(score=F.logsigmoid, focal=True) if name == "mlp" else recipe


def _autocast(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=dtype != torch.float32)


def _seen(frames: Mapping[str, Frames]) -> Tensor:
    return torch.stack([one.mask.any(dim=1) for one in frames.values()]).any(dim=0)


class Step:
    """One training step: fusion, net, loss, backward, fused Adam; parameters are float32.

    Fusion, net and loss are compiled as one function if `compile`.
    """

    def __init__(
        self, recipe: Recipe, *, compile: bool, dtype: torch.dtype = torch.float32,
        learning_rate: float = 1e-3,
    ):  # fmt: skip
        self.net = recipe.net.train()
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=learning_rate, fused=True)

        def mean_loss(batch: Batch) -> Tensor:
            with torch.no_grad():
                fused = recipe.fuse(batch.frames, True)
            with _autocast(dtype):
                logits = recipe.net(fused)
            repeats = len(logits) // len(batch.labels)  # examples of a clip
            labels = batch.labels.repeat_interleave(repeats)
            losses = F.cross_entropy(logits.float(), labels, reduction="none")
            if recipe.focal:
                losses = 0.75 * focal_loss(logits.float(), labels) + 0.25 * losses
            seen = _seen(batch.frames).repeat_interleave(repeats)
            return (losses * seen).sum() / seen.sum().clamp(min=1)

        self.mean_loss = torch.compile(mean_loss) if compile else mean_loss

    def __call__(self, batch: Batch) -> Tensor:
        loss = self.mean_loss(batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def make_scorer(
    recipe: Recipe, *, compile: bool, dtype: torch.dtype = torch.float32
) -> Callable[[Batch], Tensor]:
    """Returns a function of a batch that gives scores [B, C] of identities, -inf where unseen."""

    def scores(batch: Batch) -> Tensor:
        fused = recipe.fuse(batch.frames, False)
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


# The official files in memory.


def load_clips(directory: Path, split: str) -> dict[str, tuple[np.ndarray, ...]]:
    """Returns clip name -> features [T, D], qualities [T] and detections [T] of its faces."""
    content = pickle.loads((directory / f"face_{split}.pickle").read_bytes(), encoding="bytes")
    clips = {}
    for key, frames in content.items():
        if len(frames):
            features = np.stack([frame[-1] for frame in frames])
            detection, quality = np.array([frame[2:4] for frame in frames], np.float32).T
            clips[key.decode().removesuffix(".mp4")] = (features, quality, detection)
    return clips


def load_truth(directory: Path, split: str) -> dict[str, int]:
    """Returns clip name -> identity, of `train_gt.txt` or of the inverted `val_gt.txt`."""
    labels = {}
    for line in (directory / f"{split}_gt.txt").read_text().splitlines():
        first, *rest = line.split()
        pairs = [(first, rest[0])] if split == "train" else [(name, first) for name in rest]
        labels.update((name.removesuffix(".mp4"), int(identity)) for name, identity in pairs)
    return labels


def collate(examples: Sequence[tuple[Sequence[np.ndarray], int]]) -> Batch:
    """Returns clips and their class columns as a batch, padded to a multiple of FRAME_STEP."""
    clips, labels = zip(*examples, strict=True)
    lengths = np.array([len(features) for features, _, _ in clips])
    longest = math.ceil(lengths.max() / FRAME_STEP) * FRAME_STEP
    arrays = [np.zeros((len(clips), longest, *x.shape[1:]), x.dtype) for x in clips[0]]
    for i, clip in enumerate(clips):
        for array, values in zip(arrays, clip, strict=True):
            array[i, : lengths[i]] = values
    return make_batch({"face": [*arrays, np.arange(longest) < lengths[:, None]]}, labels)


def load(directory: Path, split: str, columns: Mapping[int, int], batch_size: int) -> DataLoader:
    """Returns batches: of train, shuffled and of one size; of others, by length and all.

    `columns` are identity -> class column, from 1; clips of no column have 0, but not of train.
    """
    train, truth = split == "train", load_truth(directory, split)
    clips = sorted(load_clips(directory, split).items())
    examples: Any = [(clip, columns.get(truth.get(name, -1), 0)) for name, clip in clips]
    if train:
        examples = [(clip, column) for clip, column in examples if column]
    else:  # by length, so that blocks have little padding
        examples.sort(key=lambda example: len(example[0][0]))
    options: dict[str, Any] = {"shuffle": train, "drop_last": train, "collate_fn": collate}
    return DataLoader(examples, batch_size=min(batch_size, len(examples)), **options)


def fit(args: argparse.Namespace) -> dict[str, Any]:
    """Trains the MLP on official files, saves a checkpoint and returns the MAP@100 on val."""
    identities = sorted(set(load_truth(args.directory, "train").values()))
    columns = {identity: 1 + i for i, identity in enumerate(identities)}
    loader, blocks = (
        load(args.directory, split, columns, args.batch_size) for split in ("train", "val")
    )
    torch.manual_seed(0)
    recipe = make_recipe("mlp", 1 + len(columns))._replace(focal=False)
    options = {"compile": args.compile, "dtype": torch.bfloat16 if args.bfloat16 else torch.float32}
    step = Step(recipe, learning_rate=args.learning_rate, **options)
    score, num_steps = make_scorer(recipe, **options), args.epochs * len(loader)
    warmup = max(1, math.ceil(0.1 * num_steps))

    def scale(done: int) -> float:  # a linear warm-up of a tenth, then a cosine to 0.01
        share = min(1.0, (done - warmup) / max(1, num_steps - warmup))
        cosine = 0.01 + 0.99 * (1 + math.cos(math.pi * share)) / 2
        return (done + 1) / warmup if done < warmup else cosine

    schedule = torch.optim.lr_scheduler.LambdaLR(step.optimizer, scale)
    positives = collections.Counter(load_truth(args.directory, "val").values())
    labels = np.array([label for _, label in blocks.dataset])

    def evaluate() -> float:
        """Returns MAP over all identities of val; the AP of one without a column is 0."""
        best, rows = (x.cpu().numpy() for x in rank(score, blocks))
        recipe.net.train()  # scoring left it in evaluation
        hits = (labels[rows] == np.arange(1, 1 + len(rows))[:, None]) & np.isfinite(best)
        total = (np.cumsum(hits, axis=1) / np.arange(1, 1 + hits.shape[1]) * hits).sum(axis=1)
        known = positives.keys() & columns.keys()
        found = sum(total[columns[identity] - 1] / positives[identity] for identity in known)
        return float(found) / len(positives)

    loss = torch.zeros(())
    for epoch in range(1, args.epochs + 1):
        for batch in loader:
            loss = step(batch)
            schedule.step()
        if epoch < args.epochs:
            sys.stdout.write(f"step {epoch * len(loader)}: map {evaluate():.4f}\n")
            sys.stdout.flush()
    result = {"map": evaluate(), "loss": loss.item(), "steps": num_steps}
    with tempfile.TemporaryDirectory() as folder:
        state = {"net": step.net.state_dict(), "optimizer": step.optimizer.state_dict()}
        torch.save({**state, "step": num_steps}, Path(folder) / "checkpoint.pt")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="of official files")
    for name, value in {"epochs": 10, "batch_size": 1024, "learning_rate": 1e-3}.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    for name in ("compile", "bfloat16"):
        parser.add_argument(f"--{name}", action="store_true")
    sys.stdout.write(json.dumps(fit(parser.parse_args())) + "\n")


if __name__ == "__main__":
    main()
