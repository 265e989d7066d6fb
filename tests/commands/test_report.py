"""The size report against the tables and against counts made by hand."""

import functools
import json

import pytest

from mamba_jax import report
from mamba_jax.checkpoints.folder import Metadata, write_metadata
from mamba_jax.config import freeze, preset_config, presets
from mamba_jax.costs import roofline
from mamba_jax.runs.metrics import History

KEYS = [
    "name", "family", "d_model", "n_layers", "depth", "nominal", "parameters", "non_embedding",
]  # fmt: skip


@pytest.fixture(scope="module")
def rows():
    return {name: report.preset_row(name) for name in presets.SIZES}


def test_json_holds_every_size(rows, capsys):
    assert report.main(["presets", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == list(rows.values())
    assert len(printed) == 18
    for row in printed:
        assert list(row) == KEYS
        size = presets.SIZES[row["name"]]
        assert [row[key] for key in KEYS[:6]] == [getattr(size, key) for key in KEYS[:6]]


def test_table_holds_every_size(rows, capsys):
    assert report.main(["presets"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == KEYS
    for line, row in zip(lines, rows.values(), strict=True):
        cells = [f"{x:,}" if isinstance(x, int) else x for x in row.values()]
        assert line.split() == cells
    assert len({len(line) for line in lines}) == 1  # aligned


@pytest.mark.parametrize(
    "name", [name for name, size in presets.SIZES.items() if size.family == "mamba"]
)
def test_mamba_counts_by_hand(name, rows):
    d, layers = presets.SIZES[name].d_model, presets.SIZES[name].n_layers
    e, n, k, r = 2 * d, 16, 4, -(-d // 16)
    layer = (
        d  # norm
        + d * 2 * e  # in_proj
        + (k + 1) * e  # conv1d
        + e * (r + 2 * n)  # x_proj
        + (r + 1) * e  # dt_proj
        + e * n  # A_log
        + e  # D
        + e * d  # out_proj
    )
    assert rows[name]["non_embedding"] == layers * layer + d
    assert rows[name]["parameters"] == layers * layer + d + 50304 * d  # 50,257 ids, padded


def test_hybrids_cost_more_than_their_mamba(rows):
    for name, row in rows.items():
        if row["family"] == "hybrid":
            d, layers = row["d_model"], row["n_layers"]
            mixers = layers * (6 * d * d + d)  # in_proj, out_proj and norm alone
            assert row["non_embedding"] > mixers, name
            assert row["parameters"] - row["non_embedding"] == 50304 * d, name


# --- flops ----------------------------------------------------------------------------------------


def flops_json(capsys, *flags):
    assert report.main(["flops", "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out)


def test_flops_of_all_sizes(capsys):
    rows = flops_json(capsys)
    assert [row["name"] for row in rows] == list(presets.SIZES)
    for row in rows:
        hybrid = presets.SIZES[row["name"]].family == "hybrid"
        assert ("recursion" in row["parts"]) == hybrid == ("scores, scale 4" in row["parts"])
        total = row["total"]
        assert total["training_flops"] == 3 * total["forward_flops"] < total["hardware_flops"]
        assert total["weight_bytes"] == sum(part["weight_bytes"] for part in row["parts"].values())
        assert "floor_secs" not in total  # no device was named
    assert report.main(["flops"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert "windows of 2048 tokens" in header and "bfloat16" in header
    assert not any("floor" in line for line in lines)
    assert any(line.split()[:2] == ["small", "49.99"] for line in lines)  # as worked out by hand


def test_flops_of_one_size_with_a_floor(capsys):
    (row,) = flops_json(
        capsys, "--size=small", "--device=h200", "--seq_len=512", "--batch=2", "--remat=none"
    )
    assert row["setting"]["seq_len"] == 512 and row["setting"]["batch_size"] == 2
    assert row["device"] == {"name": "H200", "origin": "vendor-published"}
    in_proj = row["parts"]["in_proj"]
    # 6 layers, d 384: 3 × 2 × 4 d² FLOPs. Bytes: forward u, xz; backward u, du, dxz, each of 2;
    # weights read twice in 2 bytes and their gradient written in 4, for 1,024 tokens.
    flops = 6 * 3 * 2 * 4 * 384**2
    moved = 6 * (2 * (3 * 384 + 2 * 4 * 384) + (2 + 2 + 4) * 4 * 384**2 / 1024)
    assert in_proj["training_flops"] == in_proj["hardware_flops"] == flops
    assert in_proj["weight_bytes"] + in_proj["activation_bytes"] == pytest.approx(moved)
    assert in_proj["floor_secs"] == pytest.approx(max(flops / 989.4e12, moved / 4.8e12))
    assert row["floor_tokens_per_sec"] == pytest.approx(1 / row["total"]["floor_secs"])
    assert report.main(["flops", "--size=small", "--device=TPU-v5e"]) == 0
    printed = capsys.readouterr().out
    assert "peaks of TPU-v5e, vendor-published" in printed and "tokens/s" in printed


def test_flops_fit_on_a_terminal(capsys):
    assert report.main(["flops", "--device=H200"]) == 0
    assert report.main(["flops", "--device=H200", "--size=hybrid-large"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 110


def test_measured_peaks_are_those_of_one_measurement(capsys, monkeypatch):
    calls = []

    def measure(dtype):
        calls.append(dtype)
        return roofline.Peaks("cpu", "measured here", 1e10, 1e9, 1e8, 1e9)

    monkeypatch.setattr(roofline, "measure", functools.cache(measure))
    rows = flops_json(capsys, "--measure")
    # On a CPU "auto" is what training there would choose.
    settings = {(row["setting"]["dtype"], row["setting"]["remat"]) for row in rows}
    assert settings == {("float32", "dots")} and calls == ["float32"]


def finished_run(folder, kind="NVIDIA H200", count=2, rates=(5e5, 4e5, 1e3)):
    """A run's folder as training leaves it: a checkpoint's config and the recorded rates."""
    config = preset_config("small")
    config.model.vocab_size = 50257
    checkpoint = folder / "final"
    checkpoint.mkdir(parents=True)
    layout = {"vram": {"batch_size": 8}}  # that was chosen for its device
    write_metadata(checkpoint, Metadata(freeze(config), 3, 96, "fingerprint", layout=layout))
    history = History(folder, 0)
    history.append(step=1, loss=3.0)
    for step, rate in enumerate(rates, 1):
        history.append(step=step, tokens_per_sec=rate, device_kind=kind, device_count=count)
    history.close()
    return folder


def test_flops_of_a_run(capsys, tmp_path):
    folder = finished_run(tmp_path / "run")
    result = flops_json(capsys, f"--run={folder}")
    (row,) = flops_json(capsys, "--size=small")
    # The median rate, against the peak of both cards.
    model = 4e5 * row["total"]["training_flops"]
    assert result["tokens_per_sec"] == 4e5
    assert result["model_tflops_per_sec"] == pytest.approx(model / 1e12)
    assert result["mfu"] == pytest.approx(model / (2 * 989.4e12))
    assert result["hfu"] == pytest.approx(4e5 * row["total"]["hardware_flops"] / (2 * 989.4e12))
    assert result["share_of_floor"] == pytest.approx(
        4e5 * result["cost"]["total"]["floor_secs"] / 2
    )
    assert report.main(["flops", f"--run={folder}"]) == 0
    printed = capsys.readouterr().out
    assert f"MFU {result['mfu']:.1%}" in printed and "H200, vendor-published" in printed


def test_flops_of_a_run_on_a_device_without_published_peaks(capsys, tmp_path):
    folder = finished_run(tmp_path / "run", kind="cpu", count=8)
    result = flops_json(capsys, f"--run={folder}")
    assert "mfu" not in result
    assert report.main(["flops", f"--run={folder}"]) == 0
    printed = capsys.readouterr().out
    assert "--measure" in printed and "MFU " not in printed.split("for MFU")[0]
    measured = flops_json(capsys, f"--run={folder}", "--measure")
    assert measured["peak_of"] == "cpu, measured here" and measured["mfu"] > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--size=smal"], 'unknown model size "smal"; did you mean "small"?'),
        (["--seq_len=0"], "--seq_len=0 must be at least 1"),
        (["--batch=-2"], "--batch=-2 must be at least 1"),
        (["--device=H20"], 'unknown --device "H20"; did you mean "H200"?'),
        (["--device=H200", "--measure"], "exclude each other"),
        (["--run=nowhere"], "--run=nowhere: the folder holds no checkpoint"),
        (["--run=nowhere", "--dtype=float32"], "--dtype has no effect with --run"),
    ],
)
def test_flops_mistakes_are_one_line(flags, message, capsys):
    assert report.main(["flops", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_run_is_not_compared_with_another_machine(tmp_path, capsys):
    folder = finished_run(tmp_path / "run")  # of H200s
    assert report.main(["flops", f"--run={folder}", "--measure"]) == 2
    error = capsys.readouterr().err
    assert "--measure would measure cpu, but the run trained on NVIDIA H200" in error


@pytest.mark.parametrize("damage", [b"\xff\xfe\x00", b"5\n", b"{}\n", b'{"step": 4, "tok'])
def test_flops_of_a_run_with_damaged_metrics(damage, tmp_path, capsys):
    folder = finished_run(tmp_path / "run")
    metrics = folder / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes() + damage)
    assert flops_json(capsys, f"--run={folder}")["tokens_per_sec"] == 4e5  # of what is whole
    metrics.write_bytes(damage)
    assert report.main(["flops", f"--run={folder}"]) == 2
    assert "has no tokens_per_sec" in capsys.readouterr().err


def test_flops_of_a_run_without_rates(tmp_path, capsys):
    folder = finished_run(tmp_path / "run", rates=())
    assert report.main(["flops", f"--run={folder}"]) == 2
    assert "has no tokens_per_sec" in capsys.readouterr().err
