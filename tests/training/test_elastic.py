"""An out-of-memory error makes the microbatch smaller and does not change the training."""

import dataclasses

import jax
import numpy as np
import pytest

from mamba_jax.errors import UserError
from mamba_jax.training import elastic
from mamba_jax.training.elastic import ElasticStep, OutOfMemory, smaller
from mamba_jax.training.state import init_state
from mamba_jax.training.step import make_train_step
from tests.support.tiny_run import (
    EOT,
    one_device,
    quick_compiles,  # noqa: F401
    run_config,
    to_host,
    windows,
)

FULL = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 123456789 bytes."
CONFIG = run_config(batch=8, microbatch=8)


@pytest.fixture
def small_device(monkeypatch):
    """Makes every step of a microbatch above 2 fail as a full device does."""

    def make(lose_state: bool, message: str = FULL) -> None:
        def limited(config, mesh, eot_id):
            if config.vram.batch_size <= 2:
                return make_train_step(config, mesh, eot_id)

            def step(state, batch):
                if lose_state:
                    jax.tree.map(lambda leaf: leaf.delete(), state)
                raise jax.errors.JaxRuntimeError(message)

            return step

        monkeypatch.setattr(elastic, "make_train_step", limited)

    return make


def losses(step, count=3):
    state, found = init_state(CONFIG, one_device()), []
    for i in range(count):
        state, metrics = step(state, windows(8, seed=i))
        found.append(float(metrics["loss"]))
    return found, to_host(state["params"])


def test_the_microbatch_is_halved_until_it_fits_and_the_run_is_the_same(small_device):
    mesh, logged = one_device(), []
    whole, params_of_whole = losses(make_train_step(CONFIG, mesh, EOT))
    quarters = run_config(batch=8, microbatch=2)
    small, params_of_small = losses(make_train_step(quarters, mesh, EOT))
    small_device(lose_state=False)
    step = ElasticStep(CONFIG, mesh, EOT, logged.append)
    found, params = losses(step)
    assert step.config.vram.batch_size == 2 and step.config.vram.accumulation_steps == 4
    assert found == small  # it is that program, on the state and the batch that failed
    jax.tree.map(np.testing.assert_array_equal, params, params_of_small)
    np.testing.assert_allclose(found, whole, rtol=1e-5)
    scale = lambda leaf: np.abs(leaf).max()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3 * scale(b)),
        params,
        params_of_whole,
    )
    assert (
        len(logged) == 2 and "with 2 × 4 (before 4 × 2; the effective batch stays 8)" in logged[1]
    )


def test_a_lost_state_is_reported_with_the_smaller_microbatch(small_device):
    small_device(lose_state=True)
    step = ElasticStep(CONFIG, one_device(), EOT, lambda _: None)
    with pytest.raises(OutOfMemory) as caught:
        step(init_state(CONFIG, one_device()), windows(8))
    assert caught.value.config.vram.batch_size == 4
    assert caught.value.config.vram.effective_batch_size == 8


def test_a_late_error_is_reported_too():
    step = ElasticStep(CONFIG, one_device(), EOT, lambda _: None)
    with pytest.raises(OutOfMemory) as caught, step.guard():
        raise jax.errors.JaxRuntimeError(FULL)
    assert caught.value.config.vram.batch_size == 4


def test_other_errors_pass(small_device):
    small_device(lose_state=False, message="INTERNAL: the device fell off the bus")
    step = ElasticStep(CONFIG, one_device(), EOT, lambda _: None)
    state = init_state(CONFIG, one_device())
    with pytest.raises(jax.errors.JaxRuntimeError, match="fell off"):
        step(state, windows(8))
    with pytest.raises(jax.errors.JaxRuntimeError, match="NCCL"), step.guard():
        raise jax.errors.JaxRuntimeError("INTERNAL: NCCL")
    assert step.config == CONFIG


@pytest.mark.parametrize(
    ("whole", "size", "devices", "then"),
    [(32, 8, 1, 4), (12, 6, 1, 3), (12, 3, 1, 1), (24, 24, 4, 12), (24, 8, 4, 4), (9, 9, 1, 3)],
)
def test_the_next_smaller_microbatch_makes_up_the_batch_exactly(whole, size, devices, then):
    vram = dataclasses.replace(CONFIG.vram, effective_batch_size=whole, batch_size=size)
    after = smaller(dataclasses.replace(CONFIG, vram=vram), devices).vram
    assert (after.batch_size, after.batch_size * after.accumulation_steps) == (then, whole)


def test_the_smallest_microbatch_cannot_be_halved():
    with pytest.raises(UserError, match=r"batch_size=4, which is the smallest: .*--model_size"):
        smaller(run_config(batch=8, microbatch=4), devices=4)


def test_what_cannot_fit_is_detected_before_the_state_is_donated(monkeypatch):
    mesh, logged = one_device(), []
    half = make_train_step(run_config(batch=8, microbatch=4), mesh, EOT)
    state = init_state(CONFIG, mesh)
    analysis = half.lower(state, windows(8)).compile().memory_analysis()
    monkeypatch.setattr(elastic, "free_bytes", lambda _: analysis.temp_size_in_bytes + 1000)
    step = ElasticStep(CONFIG, mesh, EOT, logged.append)
    state, _ = step(state, windows(8))
    assert step.config.vram.batch_size == 4 and len(logged) == 1
    assert int(state["step"]) == 1
    monkeypatch.setattr(elastic, "free_bytes", lambda _: 10)
    smallest = run_config(batch=2, microbatch=1)
    with pytest.raises(UserError, match="smallest"):
        ElasticStep(smallest, mesh, EOT, logged.append)(state, windows(2))
    assert not state["step"].is_deleted()


def test_free_memory_is_that_of_the_fullest_device():
    class Device:
        def __init__(self, *stats):
            self.stats = stats

        def memory_stats(self):
            return dict(zip(("bytes_limit", "bytes_in_use"), self.stats, strict=False)) or None

    assert elastic.free_bytes([Device(100, 20), Device(100, 70)]) == 30
    assert elastic.free_bytes([Device(100, 20), Device()]) is None
    assert elastic.free_bytes([Device(100)]) is None
