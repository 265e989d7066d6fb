"""The table of tensors, both ways, against a file of Hugging Face's own."""

import dataclasses

import jax
import numpy as np
import pytest

from mamba_jax.errors import UserError
from mamba_jax.exporting import tensors
from tests.support import tiny
from tests.support.golden import CONFIG, as_params, golden_file  # noqa: F401
from tests.support.made import UNTIED, random_params


def assert_same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("variant", tiny.VARIANTS | tiny.PLANS)
def test_hybrids_there_and_back(variant):
    config = (tiny.VARIANTS | tiny.PLANS)[variant]
    params = random_params(config)
    assert_same(tensors.from_hf(tensors.to_hf(params, config, 64), config), params)


@pytest.mark.parametrize("tied", [True, False])
def test_there_and_back_is_the_identity(tied):
    config = dataclasses.replace(UNTIED, tie_embeddings=tied)
    params = random_params(config)
    assert_same(tensors.from_hf(tensors.to_hf(params, config, 257), config), params)


def test_the_tensors_of_transformers_itself(golden):
    prefix = "weight/"
    theirs = {n.removeprefix(prefix): golden[n] for n in golden.files if n.startswith(prefix)}
    params = tensors.from_hf(theirs, CONFIG)
    assert_same(params, as_params(golden, "weight"))
    assert_same(tensors.to_hf(params, CONFIG, 61), theirs)


def test_padding_stays_here_and_all_arrays_are_contiguous():
    table = tensors.to_hf(random_params(UNTIED), UNTIED, 250)
    assert table[tensors.EMBEDDING].shape == table[tensors.HEAD].shape == (250, 32)
    assert all(a.flags.c_contiguous and a.dtype == np.float32 for a in table.values())


def test_missing_surplus_and_misshapen_tensors_are_named():
    table = tensors.to_hf(random_params(UNTIED), UNTIED, 257)
    with pytest.raises(UserError, match=r"backbone\.layers\.7\.extra is not one"):
        tensors.from_hf(table | {"backbone.layers.7.extra": np.zeros(1)}, UNTIED)
    for name in ("backbone.layers.1.mixer.D", "backbone.layers.1.mixer.conv1d.weight"):
        with pytest.raises(UserError, match=f"{name} has shape .5, 2.; config.json requires"):
            tensors.from_hf(table | {name: np.zeros((5, 2))}, UNTIED)
    del table["backbone.layers.1.mixer.D"]
    with pytest.raises(UserError, match=r"backbone\.layers\.1\.mixer\.D is missing"):
        tensors.from_hf(table, UNTIED)
