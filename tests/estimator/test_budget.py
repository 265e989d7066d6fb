"""What a run may use: the driver's figure, ``--vram``, the margin, and the limit passed to jax."""

import dataclasses
import os
import stat

import pytest

from mamba_jax.config import RunConfig, VramConfig, default_config, freeze
from mamba_jax.costs.devices import DEVICES, device_named
from mamba_jax.errors import UserError
from mamba_jax.estimator import budget as budgets
from mamba_jax.estimator.budget import GIB, MIB, Machine, budget

CARD = Machine("NVIDIA GeForce RTX 4080", "gpu", 1, 16_376 * MIB, source="the driver's figure")


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """Installs an nvidia-smi that prints the given rows, by index, in front of any real one."""
    for name in (budgets.FRACTION, "XLA_PYTHON_CLIENT_MEM_FRACTION", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "")

    def install(*rows: str) -> None:
        program = tmp_path / "nvidia-smi"
        cases = "".join(f"      {i}) echo '{row}';;\n" for i, row in enumerate(rows))
        program.write_text(
            "#!/bin/sh\n"
            'ids="' + " ".join(map(str, range(len(rows)))) + '"\n'
            'for word; do case $word in --id=*) ids=$(echo "${word#--id=}" | tr , " ");; esac; '
            "done\n"
            f"for id in $ids; do case $id in\n{cases}      *) exit 6;; esac; done\n"
        )
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    return install


def test_the_total_is_vram_but_never_more_than_the_device_has():
    vram = VramConfig(memory_gb=12.0, safety_margin_mb=1024)
    assert budget(vram, CARD).bytes == 11 * GIB
    assert budget(dataclasses.replace(vram, auto=True), CARD).bytes == (16_376 - 1024) * MIB
    assert budget(dataclasses.replace(vram, memory_gb=24.0), CARD).bytes == (16_376 - 1024) * MIB
    unknown = Machine("a card", "gpu")
    assert budget(dataclasses.replace(vram, auto=True), unknown).bytes == 11 * GIB
    # The allocator's limit applies where it is lower.
    pooled = dataclasses.replace(CARD, pool_bytes=8 * GIB)
    assert budget(vram, pooled).bytes == 8 * GIB
    assert "3.00 GiB that jax's allocator may not take" in budget(vram, pooled).text()


def test_a_cpus_devices_share_its_memory_and_a_small_machine_is_not_refused():
    eight = Machine("cpu", "cpu", 8, 20 * GIB)
    assert budget(VramConfig(), eight).bytes == 14 * GIB // 8
    assert budget(VramConfig(), Machine("cpu", "cpu", 1, 3 * GIB)).bytes == 1.5 * GIB


def test_a_margin_that_leaves_nothing_is_refused():
    with pytest.raises(UserError, match=r"safety_margin_mb=16376 leaves nothing of 15.99 GiB"):
        budget(VramConfig(auto=True, safety_margin_mb=16_376), CARD)
    config = default_config()
    config.vram.update(memory_gb=2.0, safety_margin_mb=2048)
    with pytest.raises(UserError, match=r"safety_margin_mb=2048 leaves nothing of .*=2 \(2048"):
        freeze(config)
    config.vram.auto = True  # then the device reports its memory
    assert freeze(config).vram.auto
    config.vram.update(safety_margin_mb=-1)
    with pytest.raises(UserError, match=r"safety_margin_mb=-1 must not be negative"):
        freeze(config)


def test_the_drivers_cards_are_those_that_the_run_will_see(driver, monkeypatch):
    driver("24564, 300", "16376, 1000", "8192, 10")
    total = lambda: [card.total_bytes // MIB for card in budgets.visible_cards()]
    assert total() == [24564, 16376, 8192]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert total() == [16376, 24564]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert total() == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "9")  # nvidia-smi fails
    assert total() == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    driver("[N/A], [N/A]")  # a card that shares the host's memory
    assert total() == []


def test_without_a_driver_there_are_no_cards(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert budgets.visible_cards() == []


@pytest.mark.parametrize(
    ("vram", "row", "expected"),
    [
        # Half of the margin, 1024 MiB, stays outside the pool.
        (VramConfig(auto=True), "16376, 300", (16_376 - 300 - 1_024) / 16_376),
        (VramConfig(memory_gb=8.0), "16376, 300", (8_192 - 1_024) / 16_376),
        # Another process holds most of the card.
        (VramConfig(auto=True), "16376, 12000", (16_376 - 12_000 - 1_024) / 16_376),
    ],
)
def test_jax_may_allocate_what_the_budget_needs(driver, vram, row, expected, monkeypatch):
    driver(row)
    monkeypatch.setenv(budgets.FRACTION, "")  # to be restored
    monkeypatch.delenv(budgets.FRACTION)
    budgets.set_client_fraction(vram)
    assert float(os.environ.pop(budgets.FRACTION)) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", [budgets.FRACTION, "XLA_PYTHON_CLIENT_MEM_FRACTION"])
def test_a_fraction_that_the_user_set_stays_the_only_one(driver, monkeypatch, name):
    driver("16376, 300")
    monkeypatch.setenv(name, "0.5")
    budgets.set_client_fraction(VramConfig(auto=True))
    set_ = {key: os.environ[key] for key in os.environ if key.endswith("CLIENT_MEM_FRACTION")}
    assert set_ == {name: "0.5"}


def test_without_cards_or_on_a_cpu_nothing_is_set(driver, monkeypatch):
    driver("16376, 300")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    budgets.set_client_fraction(VramConfig())
    assert budgets.FRACTION not in os.environ


def test_this_machine_is_a_cpu_with_memory():
    machine = budgets.this_machine()
    assert (machine.platform, machine.count, machine.is_here) == ("cpu", 8, True)
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < machine.total_bytes <= pages


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("RTX 4080", "RTX-4080"),
        ("rtx-4080", "RTX-4080"),
        ("4080", "RTX-4080"),
        ("NVIDIA GeForce RTX 4070 Ti", "RTX-4070-Ti"),
        ("RTX 4080 Super", "RTX-4080-SUPER"),
        ("A100 40GB", "A100-40GB"),
        ("A100", "A100-80GB"),
        ("H100", "H100-SXM"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("v5e", "TPU-v5e"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA L40", None),
        ("RTX", None),
        ("", None),
    ],
)
def test_a_device_by_the_names_that_people_give_it(asked, found):
    device = device_named(asked)
    assert (device and device.name) == found


def test_every_row_is_found_by_its_own_names():
    for device in DEVICES:
        assert all(device_named(name) == device for name in (device.name, *device.kinds))


def test_the_defaults_are_the_guides():
    vram = RunConfig().vram
    assert (vram.memory_gb, vram.auto, vram.safety_margin_mb) == (16.0, False, 2048)
    assert vram.microbatches(1) == [1, 2, 4, 8, 16, 32]
    assert dataclasses.replace(vram, effective_batch_size=24).microbatches(4) == [4, 8, 12, 24]
    assert dataclasses.replace(vram, effective_batch_size=6).microbatches(4) == []
