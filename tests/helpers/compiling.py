"""Fixtures of all tests that decide how JAX compiles programs, and how long it keeps them."""

import contextlib
import gc
import os
from collections.abc import Iterator
from typing import Any

import jax
import pytest
from jax._src import compiler

from tests.helpers import limits
from vidjax.runs import config_io, programs

# Programs run one after the other, so that they do not need memory at the same time.
jax.config.update("jax_cpu_enable_async_dispatch", False)
MAX_RESIDENT = [2 << 30]  # above this memory in bytes, `forget_programs` clears JAX's programs


@pytest.fixture(scope="session", autouse=True)
def compile_cache(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> None:
    """All processes and later runs share compiled programs. `--cache-clear` deletes them."""
    kept = getattr(pytestconfig, "cache", None)  # none with -p no:cacheprovider
    programs.cache_programs(kept.mkdir("xla") if kept else tmp_path_factory.mktemp("xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@pytest.fixture(scope="module", autouse=True)
def forget_programs() -> Iterator[None]:
    """Removes compiled programs from the memory after a module if the process is too large.

    Also forgets that configuration files were executed. Otherwise, later modules would be slower.
    """
    yield
    config_io.own_files.clear()
    if limits.held_by(os.getpid()) > MAX_RESIDENT[0]:
        jax.clear_caches()
        gc.collect()
        # The process may keep freed memory, so the limit is always above the present memory.
        MAX_RESIDENT[0] = max(MAX_RESIDENT[0], limits.held_by(os.getpid()) + (1 << 29))


# Options of XLA for quick compilation.
QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}


@pytest.fixture(scope="session", autouse=True)
def compile_quickly() -> Iterator[None]:
    """Compiles the programs of this process, but not of its children, without optimisation."""
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_traceback_in_locations_limit", 0)
    get_compile_options = compiler.get_compile_options
    quick = []
    for option, value in QUICK.items():
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # XLA does not know the option
            jax.jit(abs).lower(1.0).compile(compiler_options={option: value})
            quick.append((option, value))

    def quickly(*args: Any, **kwargs: Any) -> Any:
        options = get_compile_options(*args, **kwargs)
        if jax.config.values["jax_disable_most_optimizations"]:
            options.env_option_overrides += quick
        return options

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "get_compile_options", quickly)
        yield


@pytest.fixture(autouse=True)
def compile_as_commands_do(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests with the mark `optimized` compile their programs as commands do."""
    optimized = request.node.get_closest_marker("optimized") is not None
    jax.config.update("jax_disable_most_optimizations", not optimized)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
