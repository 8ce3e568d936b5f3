"""A dry run of training: refuses impossible configurations before any data are read.

Building the system and tracing its parameters takes a tenth of a second and no device.
"""

import math

import jax
import jax.numpy as jnp

from vidjax import ensemble
from vidjax.config import Config
from vidjax.data import sources
from vidjax.data.clips import Modality, select_modalities
from vidjax.errors import UserError
from vidjax.steps import state as state_lib
from vidjax.system import TaskSpec, make_system
from vidjax.training.plan import check_model

WIDTH = 512  # feature width of a modality whose files have not been read
CLIPS, STEPS = 64, 10  # sizes of the training
MOST_PARAMS = 10**10  # parameters of one member; more fit no device


def check(config: Config) -> None:
    """Refuses modalities that the data lack, and a model that cannot be built; uses no device."""
    check_model(config)
    known = sources.modalities(config.data) or dict.fromkeys(config.modalities, 0)
    known = {name: Modality(width or WIDTH, "float32") for name, width in known.items()}
    widths = select_modalities(config.modalities, known)
    spec = config.to_dict()
    members = ensemble.make_members(spec["ensemble"])[:1]
    spec["optim"]["total_decay"] = 0.0  # it asks for the sum of the schedule, on a device
    clusters = 1 if config.data.distractors == "noise" else None
    task = TaskSpec(widths, 2, clusters, CLIPS, STEPS, train_other=True)

    def init() -> state_lib.TrainState:
        system = make_system(spec, task)
        rngs = ensemble.make_rngs(members, config.seed)
        system.fuse(None, state_lib.blank_clip(widths), jnp.int32(0))  # as an evaluation does
        return state_lib.init_state(system, widths, rngs, jnp.zeros((1, CLIPS), jnp.int32))

    try:
        params = jax.eval_shape(init).params
    except ValueError as error:
        place = "" if "config." in str(error) else "config.model: "
        raise UserError(f"{place}{error}") from error
    except MemoryError:
        raise
    except Exception as error:  # a model of the user's own raises what it likes
        reason = (str(error) or "no reason given").splitlines()[0]
        raise UserError(
            f"the model '{spec['model'].get('name')}' cannot be built: "
            f"{type(error).__name__}: {reason}\n--debug shows where"
        ) from error
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    if count > MOST_PARAMS:
        raise UserError(
            f"the model '{spec['model'].get('name')}' has {count:,} parameters: choose smaller ones"
        )
