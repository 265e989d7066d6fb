"""The FLOPs and bytes of each size, and the share of its device's peaks that a run achieved."""

import argparse
import dataclasses
import json
import pathlib
import statistics
from typing import TYPE_CHECKING, Any

from mamba_jax.cli.terminal import print_table
from mamba_jax.config import RunConfig, freeze, preset_config, presets
from mamba_jax.costs.devices import DEVICES, device_of_flag
from mamba_jax.errors import UserError

if TYPE_CHECKING:
    from mamba_jax.costs.flops import Setting
    from mamba_jax.costs.roofline import Peaks
    from mamba_jax.costs.work import Part

_MICROBATCH = 8  # sequences, unless --batch says otherwise
HELP = """\
Per token, for a training step: FLOPs, special operations and bytes of each part of the model.

Model FLOPs are those of the matrix products in the forward pass and the gradient; hardware FLOPs
add what the backward pass recomputes (attention scores, layers under the remat policy). MFU is
model FLOPs per second divided by the device's peak; HFU is hardware FLOPs per second divided by it.
The floor is the shortest time that the device allows: for each part, the largest of FLOPs / peak
FLOPs, special operations / their peak, and bytes / memory bandwidth, summed over the parts. The
formulas are in mamba_jax/costs/flops.py.
"""


def add_arguments(flops: argparse.ArgumentParser) -> None:
    """Adds the flags of ``report flops``."""
    of = flops.add_mutually_exclusive_group()
    of.add_argument("--size", metavar="NAME|all", default="all", help="a size, or all (default)")
    of.add_argument(
        "--run", dest="folder", metavar="DIR", help="report what a training run achieved"
    )
    flops.add_argument("--seq_len", metavar="N", type=int, help="tokens per window")
    flops.add_argument("--batch", metavar="N", type=int, help="sequences per microbatch")
    flops.add_argument(
        "--dtype", choices=("bfloat16", "float32"), help="dtype of matmuls (default: as configured)"
    )
    flops.add_argument(
        "--remat", choices=("none", "dots", "full"), help="remat policy (default: as configured)"
    )
    flops.add_argument("--device", metavar="NAME", help="published peaks of: " + _device_names())
    flops.add_argument(
        "--measure", action="store_true", help="measure the peaks of this device instead"
    )
    flops.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _device_names() -> str:
    return ", ".join(device.name for device in DEVICES)


def print_flops(arguments: argparse.Namespace) -> int:
    """Prints the costs of sizes, or what a run achieved."""
    for flag in ("seq_len", "batch"):
        value = getattr(arguments, flag)
        if value is not None and value < 1:
            raise UserError(f"--{flag}={value} must be at least 1")
    if arguments.device and arguments.measure:
        raise UserError(f"--device={arguments.device} and --measure exclude each other; give one")
    if arguments.folder:
        for flag in ("seq_len", "batch", "dtype", "remat"):
            if getattr(arguments, flag) is not None:
                raise UserError(
                    f"--{flag} has no effect with --run: the run's own config determines it"
                )
        return _print_run(arguments)
    names = list(presets.SIZES) if arguments.size == "all" else [arguments.size]
    rows = [_size_cost(name, arguments) for name in names]
    if arguments.json:
        print(json.dumps(rows, indent=2))
    elif arguments.size == "all":
        _print_totals(rows)
    else:
        _print_parts(rows[0])
    return 0


def _peaks(arguments: argparse.Namespace, dtype: str, kind: str = "") -> "Peaks | None":
    """Returns the requested peaks, else the published ones of ``kind``; None: unknown."""
    from mamba_jax.costs import roofline

    if arguments.measure:
        here = roofline.device_kind()
        if kind and kind != here:
            raise UserError(
                f"--measure would measure {here}, but the run trained on {kind}: "
                "measure there, or give --device"
            )
        return roofline.measure(dtype)
    if not arguments.device:
        device = roofline.find_device(kind)
        return roofline.published(device, dtype) if device else None
    return roofline.published(device_of_flag(arguments.device), dtype)


def _size_cost(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    from mamba_jax.costs import roofline
    from mamba_jax.costs.flops import parts, setting_of

    run = _with_vocabulary(freeze(preset_config(name)))
    # A run would choose its microbatch for its device.
    run = dataclasses.replace(run, vram=dataclasses.replace(run.vram, batch_size=_MICROBATCH))
    on_cpu = arguments.measure and roofline.device_kind() == "cpu"
    setting = setting_of(run, devices=1, on_cpu=on_cpu)
    changes = {
        "seq_len": arguments.seq_len,
        "batch_size": arguments.batch,
        "dtype": arguments.dtype,
        "remat": arguments.remat,
    }
    given = {field: value for field, value in changes.items() if value is not None}
    setting = dataclasses.replace(setting, **given)
    peaks = _peaks(arguments, setting.dtype)
    return {"name": name} | _cost_record(parts(run.model, setting), setting, peaks)


def _with_vocabulary(run: RunConfig) -> RunConfig:
    from mamba_jax.data.tokenizers.load import load_tokenizer

    vocab_size = run.model.vocab_size or load_tokenizer(run.data.tokenizer).vocab_size
    return dataclasses.replace(run, model=dataclasses.replace(run.model, vocab_size=vocab_size))


def _cost_record(parts: "list[Part]", setting: "Setting", peaks: "Peaks | None") -> dict[str, Any]:
    """Returns the costs as plain JSON types; all amounts are per token."""
    from mamba_jax.costs.roofline import floor_secs

    def amounts(part: "Part") -> dict[str, float]:
        row = {
            "forward_flops": part.forward.matmul_flops,
            "training_flops": part.training.matmul_flops,
            "hardware_flops": part.hardware.matmul_flops,
            "elementwise_flops": part.hardware.elementwise_flops,
            "special_ops": part.hardware.special_ops,
            "weight_bytes": part.hardware.weight_bytes,
            "activation_bytes": part.hardware.activation_bytes,
        }
        return row | ({"floor_secs": peaks.secs(part.hardware)} if peaks else {})

    rows = {part.name: amounts(part) for part in parts}
    total = {key: sum(row[key] for row in rows.values()) for key in next(iter(rows.values()))}
    record: dict[str, Any] = {"setting": dataclasses.asdict(setting), "parts": rows, "total": total}
    if peaks:
        record["device"] = {"name": peaks.name, "origin": peaks.origin}
        record["floor_tokens_per_sec"] = setting.devices / floor_secs(
            (part.hardware for part in parts), peaks
        )
    return record


_COLUMNS = (  # heading, unit, key, size of the unit; all per token
    ("forward", "MFLOP", "forward_flops", 1e6),
    ("training", "MFLOP", "training_flops", 1e6),
    ("hardware", "MFLOP", "hardware_flops", 1e6),
    ("elementwise", "MFLOP", "elementwise_flops", 1e6),
    ("special", "Mop", "special_ops", 1e6),
    ("weights", "kB", "weight_bytes", 1e3),
    ("activations", "kB", "activation_bytes", 1e3),
    ("floor", "ns", "floor_secs", 1e-9),
)


def _print_costs(title: str, rows: list[tuple[str, dict[str, float]]]) -> None:
    shown = [column for column in _COLUMNS if column[2] in rows[0][1]]
    units = ["", *(unit for _, unit, _, _ in shown)]
    cells = [
        [name, *(f"{amounts[key] / size:,.2f}" for _, _, key, size in shown)]
        for name, amounts in rows
    ]
    header = [title, *(heading for heading, _, _, _ in shown)]
    print_table(header, [units, *cells], n_text_columns=1)


def _print_setting(record: dict[str, Any]) -> None:
    setting = record["setting"]
    print(
        f"per token of training: windows of {setting['seq_len']} tokens, microbatches of "
        f"{setting['batch_size']} × {setting['accumulation_steps']}, {setting['dtype']}, "
        f"remat {setting['remat']}"
    )
    if "device" in record:
        print(f"floor from the peaks of {record['device']['name']}, {record['device']['origin']}")


def _print_totals(rows: list[dict[str, Any]]) -> None:
    _print_setting(rows[0])
    _print_costs("name", [(row["name"], row["total"]) for row in rows])
    print("--size NAME shows the parts of one size")


def _print_parts(record: dict[str, Any]) -> None:
    print(record["name"])
    _print_setting(record)
    _print_costs("part", [*record["parts"].items(), ("total", record["total"])])
    if "device" in record:
        print(f"at most {record['floor_tokens_per_sec']:,.0f} tokens/s on one such device")


def _print_run(arguments: argparse.Namespace) -> int:
    from mamba_jax.checkpoints.folder import list_checkpoints, read_metadata
    from mamba_jax.costs.flops import parts, setting_of
    from mamba_jax.runs import metrics

    folder = pathlib.Path(arguments.folder)
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        raise UserError(
            f"--run={folder}: the folder holds no checkpoint; give the output_dir of a run"
        )
    run = read_metadata(checkpoints[0][1]).laid_out
    records = [r for r in metrics.read(folder / metrics.NAME) if "device_kind" in r]
    if not records:
        raise UserError(
            f"--run={folder}: its {metrics.NAME} has no tokens_per_sec; the run was too short "
            "(use a smaller training.log_steps) or of an older version"
        )
    kind, count = records[-1]["device_kind"], records[-1]["device_count"]
    rates = [
        r["tokens_per_sec"]
        for r in records
        if (r["device_kind"], r["device_count"]) == (kind, count)
    ]
    rate = statistics.median(rates)
    # JAX's CPU devices share one machine, which is measured as a whole.
    on_cpu = kind == "cpu"
    setting = setting_of(run, devices=1 if on_cpu else count, on_cpu=on_cpu)
    peaks = _peaks(arguments, setting.dtype, kind)
    record = _cost_record(parts(run.model, setting), setting, peaks)
    result = {
        "run": str(folder),
        "name": run.name,
        "device_kind": kind,
        "device_count": count,
        "tokens_per_sec": rate,
        "model_tflops_per_sec": rate * record["total"]["training_flops"] / 1e12,
    }
    if peaks:
        peak = setting.devices * peaks.matmul_flops_per_sec
        result |= {
            "peak_tflops_per_sec": peak / 1e12,
            "peak_of": f"{peaks.name}, {peaks.origin}",
            "mfu": rate * record["total"]["training_flops"] / peak,
            "hfu": rate * record["total"]["hardware_flops"] / peak,
            "share_of_floor": rate / record["floor_tokens_per_sec"],
        }
    if arguments.json:
        print(json.dumps(result | {"cost": record}, indent=2))
        return 0
    print(f"{run.name} ({folder})")
    _print_setting(record)
    print(f"{rate:,.0f} tokens/s on {count} × {kind} (median of {len(rates)} intervals)")
    print(f"{result['model_tflops_per_sec']:.4g} model TFLOP/s")
    if peaks:
        print(
            f"MFU {result['mfu']:.1%}, HFU {result['hfu']:.1%} of "
            f"{result['peak_tflops_per_sec']:.4g} TFLOP/s ({result['peak_of']})"
        )
        print(
            f"{result['share_of_floor']:.1%} of the {record['floor_tokens_per_sec']:,.0f} tokens/s "
            "that the floor allows"
        )
    else:
        print(
            f'costs/devices.py has no published peaks of "{kind}": add --measure on that machine, '
            "or --device NAME, for MFU and the share of the floor"
        )
    return 0
