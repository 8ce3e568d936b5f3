"""A trained run from Python: what it makes of new clips, as arrays in memory or as a dataset.

    from vidjax import predict

    run = predict.restore("runs/mma")
    run.rank({"clip_1": {"face": features}})  # identity -> [(clip, score), ...], best first

The numbers are those of `--mode=evaluate`, to the bit where the clips are those of the split: it is
the same program on the same blocks. Clips in memory need no TensorFlow.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vidjax import config as config_lib
from vidjax import devices, ensemble, ranking
from vidjax.batch import Batch
from vidjax.config import Config
from vidjax.data.clips import ClipSource
from vidjax.data.memory import MemoryClips
from vidjax.data.untrusted.packing import Clips
from vidjax.modes import evaluate
from vidjax.steps import eval_step as eval_step_lib
from vidjax.steps import scoring


class Predictor(NamedTuple):
    """A run with its weights, and functions of new clips.

    `clips` is clip -> modality -> features [T, D] or a dict of arrays, as of
    `vidjax.data.arrays.load`; or a `Dataset`, of which `split` says which
    (None for the split that the run evaluates). Clips in memory may lack modalities; one without a
    usable frame scores -inf. A clip is scored by the members that were not trained on it, which are
    known by the names of their clips, unless none is left of a run without folds.

    Attributes:
      workdir: the run's folder.
      step: optimiser steps of the checkpoint.
      manifest: its facts; every file of it matched its sha256 there.
      config: of the run.
      identities: [C] names of the columns.
      modalities: name -> feature width.
      params: the model's parameters, [E, ...].
      model_state: the model's other collections, [E, ...].
      training_sets: what the members are and were trained on.
      score_fn: gives one member's scores [B, C] of a batch on the devices.
      embed_fn: gives one member's embeddings [B, D] of it.
      mesh: the devices.
      scorer: what `vidjax.steps.scoring` knows the system by.
    """

    workdir: Path
    step: int
    manifest: Mapping[str, Any]
    config: Config
    identities: tuple[str, ...]
    modalities: Mapping[str, int]
    params: Any
    model_state: Any
    training_sets: ensemble.TrainingSets
    score_fn: eval_step_lib.EvalStep
    embed_fn: eval_step_lib.EvalStep
    mesh: Mesh
    scorer: scoring.Scorer

    def scores(self, clips: Clips | Any, *, split: str | None = None) -> np.ndarray:
        """Returns [N, C] float32, what clips are ranked by: a logarithm, unless the run says else.

        Args:
          clips: N of them; the rows are in the order of the dict, or of the split's names.
          split: of a dataset.

        Raises:
          ValueError: clips do not fit the run; names clip, modality and field.
        """
        data, split, places = self._read(clips, split)
        found = np.full((len(places), len(self.identities)), -np.inf, np.float32)
        for scores, clip_index, real in self._scored(data, split):
            rows = np.asarray(real)
            found[np.asarray(clip_index)[rows]] = np.asarray(scores)[rows]
        return found[places]

    def rank(
        self, clips: Clips | Any, *, split: str | None = None
    ) -> dict[str, list[tuple[str, float]]]:
        """Returns identity -> its best 100 clips with their scores, best first, ties by name.

        Args:
          clips: N of them.
          split: of a dataset.

        Raises:
          ValueError: clips do not fit the run; names clip, modality and field.
        """
        data, split, places = self._read(clips, split)
        ranked = ranking.Ranking(
            len(self.identities), rows=min(scoring.WINDOW_ROWS, max(len(places), 1))
        )
        for block in self._scored(data, split):
            ranked.add(block)
        top = ranked.finish()
        names = list(data.split(split).clips)
        if isinstance(data, MemoryClips):
            for name, place in zip(data.names, places.tolist(), strict=True):
                names[place] = name
        return {
            identity: [
                (names[clip], float(score))
                for clip, score in zip(clips_of.tolist(), scores.tolist(), strict=True)
                if clip != ranking.NO_CLIP
            ]
            for identity, clips_of, scores in zip(
                self.identities, np.asarray(top.index), np.asarray(top.scores), strict=True
            )
        }

    def embed(self, clips: Clips | Any, *, split: str | None = None) -> np.ndarray:
        """Returns [N, D] float32, a vector a clip: what the classifier of every member is given.

        That is a member's clip vector before its last layer (of `knn` the mean frame), of length 1;
        with several heads (of a fallback, main and other, each 0 where it has no say) or members
        they stand side by side, and the whole is of length 1 again. So a product of two rows is a
        cosine. Where frames are examples of their own, it is the mean over them. A clip without a
        usable frame is 0. Every member has its say, whatever it was trained on.

        Args:
          clips: N of them; the rows are in the order of the dict, or of the split's names.
          split: of a dataset.

        Raises:
          ValueError: clips do not fit the run, or its model has none of our classifiers.
        """
        data, split, places = self._read(clips, split)
        found: np.ndarray | None = None
        for blocks in self._windows(data, split):
            parts: list[list[np.ndarray]] = [[] for _ in blocks]
            for number, member in enumerate(self.training_sets.members):
                params, model_state = _take((self.params, self.model_state), number)
                for part, block in zip(parts, blocks, strict=True):
                    view = jnp.int32(member.view)
                    part.append(np.asarray(self.embed_fn(params, model_state, view, block)))
            for part, block in zip(parts, blocks, strict=True):
                rows = np.asarray(block.batch_mask)
                vectors = np.concatenate(part, axis=1)[rows]
                if found is None:
                    found = np.zeros((len(places), vectors.shape[1]), np.float32)
                norms = np.linalg.norm(vectors, axis=1, keepdims=True)
                unit = vectors / np.where(norms > 0, norms, 1.0)
                found[np.asarray(block.clip_index)[rows]] = unit
        assert found is not None
        return found[places]

    def _read(self, clips: Any, split: str | None) -> tuple[ClipSource, str, np.ndarray]:
        """Returns clips as evaluation reads them, their split, and the clip_index of each row."""
        if hasattr(clips, "eval_batches"):
            chosen: str = split or self.config.eval.split
            data = evaluate.fit_data(clips, chosen, self.modalities, self.identities)
            return data, chosen, np.arange(len(data.split(chosen).clips))
        data = MemoryClips(clips, self.modalities, self.identities)
        return data, "clips", data.places

    def _model(self, data: ClipSource) -> scoring.TrainedModel:
        return scoring.TrainedModel(
            str(self.workdir), self.scorer, self.params, self.model_state, self.training_sets, data
        )

    def _windows(self, data: ClipSource, split: str) -> Iterator[list[Batch]]:
        """Yields a few blocks of clips at a time, on the devices."""
        model, size = self._model(data), self.config.eval.block_size
        rows = 1 if len(self.training_sets.members) == 1 else scoring.WINDOW_ROWS
        for window in scoring.windows([model], split, size, self.mesh, rows):
            yield window[0]

    def _scored(self, data: ClipSource, split: str) -> Iterator[ranking.Block]:
        """Yields scores [B, C] with clip_index and which rows are clips that may be scored."""
        clips = data.split(split).clips
        entry = scoring.ModelScorer(self._model(data), clips, self.mesh)
        pool = entry.use.any(axis=0)
        if not pool.any():
            raise ValueError(
                f"{self.workdir}: all members were trained on every one of these clips"
            )
        pool = jnp.asarray(pool)
        for blocks in self._windows(data, split):
            for block, scores in zip(blocks, entry.score(blocks), strict=True):
                yield scores, block.clip_index, pool[block.clip_index] & block.batch_mask


_take = jax.jit(ensemble.take)


def restore(
    workdir: str | Path,
    *,
    step: Literal["latest", "best"] = "latest",
    num_devices: int | None = None,
) -> Predictor:
    """Returns a trained run, its weights checked against their digests.

    Where the wanted step is damaged it is the next good one, with a warning.

    Args:
      workdir: the run's folder.
      step: `latest`, or `best` by MAP.
      num_devices: how many devices to use; None for all. Scores do not depend on it.

    Raises:
      ValueError: no run in the folder, or one that joins others.
      CheckpointError: no usable checkpoint.
    """
    workdir = Path(workdir).expanduser().absolute()
    config = config_lib.load_workdir(workdir)
    if config.join.runs:
        raise ValueError(
            f"'{workdir}' joins other runs; restore one of them:\n{', '.join(config.join.runs)}"
        )
    config.eval.checkpoint = step
    mesh = devices.make_mesh(num_devices)
    run = evaluate.find_run(config, workdir)
    loaded = evaluate.load_run(run, config, workdir, mesh)
    return Predictor(
        workdir=workdir,
        step=run.manifest["step"],
        manifest=run.manifest,
        config=config,
        identities=run.identities,
        modalities=dict(run.sizes.modalities),
        params=loaded.params,
        model_state=loaded.model_state,
        training_sets=loaded.training_sets,
        score_fn=loaded.scorer.step,
        embed_fn=eval_step_lib.make_embed_step(loaded.scorer.system),
        mesh=mesh,
        scorer=loaded.scorer,
    )
