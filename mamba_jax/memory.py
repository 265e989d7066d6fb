"""``mamba-jax memory``: the memory that a run needs on a device, and a layout that fits."""

import argparse
import dataclasses
import functools
import json
import sys
from typing import Any, NoReturn

from mamba_jax.cli import train_arguments
from mamba_jax.cli.terminal import print_table
from mamba_jax.config import RunConfig, freeze, preset_config, presets
from mamba_jax.costs.devices import DEVICES, device_of_flag
from mamba_jax.errors import UserError, command
from mamba_jax.estimator.budget import GIB, Machine, of_device, this_machine, visible_cards

_STAND_IN = "RTX-4080"  # the card to plan for if there is none: 16 GB

_DESCRIPTION = """\
Plans a run as training would: microbatch × accumulation, remat policy and loss chunk, with the
bytes of each part. Takes the flags of `mamba-jax train` that say what to train (--model_size,
--training_preset, --config, --vram, --vram_safety_margin, --config.GROUP.FIELD=VALUE …) and:
"""
_EPILOG = """\
examples:
  mamba-jax memory --model_size hybrid-small-standard --vram 16gb
  mamba-jax memory --model_size large --device "A100 40GB" --seq_len 8192 --exact
  mamba-jax memory --table
"""

_CARDS = (
    *("RTX 3060", "RTX 3070", "RTX 3080", "RTX 3090", "RTX 4070 Ti", "RTX 4080", "RTX 4090"),
    *("A100 40GB", "A100 80GB", "H100"),
)


@command
def main(argv: list[str]) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="mamba-jax memory",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    names = (device.name for device in DEVICES)
    parser.add_argument("--device", metavar="NAME", help="plan for: " + ", ".join(names))
    parser.add_argument("--seq_len", metavar="N", help="tokens per window")
    parser.add_argument(
        "--exact",
        action="store_true",
        help="compile the step instead of using the formula (half a minute; see "
        "scripts/compilers.sh)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--table", action="store_true", help="print all sizes on ten common GPUs")
    parser.error = _refuse  # type: ignore[method-assign]
    own, rest = parser.parse_known_args(argv)
    if own.table:
        if own.device or own.exact or own.seq_len or rest:
            raise UserError("--table accepts only --json: it covers all sizes and GPUs")
        return _print_tables(own.json)
    config = train_arguments.read(rest).config
    if own.seq_len is not None:
        config = _with_length(config, own.seq_len)
    gives_vram = any(word.partition("=")[0] == "--vram" for word in rest)
    machine, note = _machine(own.device)
    if own.device and not gives_vram:
        config = dataclasses.replace(config, vram=dataclasses.replace(config.vram, auto=True))
    from mamba_jax.estimator import plan

    planned = plan(config, level="exact" if own.exact else "quick", machine=machine)
    if own.json:
        print(json.dumps(_record(planned), indent=2))
    else:
        print(f"{config.name}: {note}\n{planned.text()}")
    return 0


def _refuse(message: str) -> NoReturn:
    raise UserError(f"{message} (--help lists the flags)")


def _with_length(config: RunConfig, text: str) -> RunConfig:
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"--seq_len={text} must be a whole number of at least 1")
    model = dataclasses.replace(config.model, max_seq_len=int(text))
    return dataclasses.replace(config, model=model)


def _machine(name: str | None) -> tuple[Machine, str]:
    """Returns what to plan for, and a note about it."""
    if name is not None:
        device = device_of_flag(name)
        return of_device(device), f"computed for {device.name}, not measured"
    if visible_cards():
        return this_machine(), "computed for this machine, not measured"
    stand_in = Machine(_STAND_IN, "gpu")
    return stand_in, f"no GPU found: computed for {_STAND_IN}, not measured"


def _record(planned: Any) -> dict[str, Any]:
    config = planned.config
    return {
        "name": config.name,
        "device": planned.machine.kind,
        "devices": planned.machine.count,
        "budget_bytes": planned.budget.bytes,
        "total_bytes": planned.budget.total_bytes,
        "margin_bytes": planned.budget.margin_bytes,
        "needs_bytes": planned.needs_bytes,
        "fits": planned.fits,
        "level": planned.level,
        "measured": False,
        "parts_bytes": planned.breakdown.parts,
        "batch_size": config.vram.batch_size,
        "gradient_accumulation_steps": config.vram.accumulation_steps,
        "effective_batch_size": config.vram.effective_batch_size,
        "seq_len": config.model.max_seq_len,
        "remat": config.model.remat,
        "loss_chunk_tokens": config.training.loss_chunk_tokens,
        "notes": list(planned.notes),
    }


def _print_tables(as_json: bool) -> int:
    """Prints what each size needs, and its layout on each card."""
    sizes = {name: _size(name) for name in presets.SIZES}
    layouts = {card: {name: _on_card(name, card) for name in sizes} for card in _CARDS}
    if as_json:
        print(json.dumps({"measured": False, "sizes": sizes, "cards": layouts}, indent=2))
        return 0
    print(
        "Computed, not measured: windows of 2048 tokens, an effective batch of 32, bfloat16.\n\n"
        "Memory of each size in GiB: the least that a step needs (one sequence per microbatch,\n"
        "full remat), and what the layout chosen for an RTX 4080 needs.\n"
    )
    rows = []
    for name, figures in sizes.items():
        chosen = layouts["RTX 4080"][name]
        rows.append(
            [
                name,
                f"{figures['parameters'] / 1e6:,.0f}M",
                f"{figures['least_bytes'] / GIB:.1f}",
                f"{chosen['needs_bytes'] / GIB:.1f}" if chosen else "does not fit",
                _layout_text(chosen),
            ]
        )
    header = ["size", "parameters", "least", "RTX 4080", "microbatch, remat"]
    print_table(header, rows, n_text_columns=1)
    print(
        "\nMicrobatch of each size on each GPU, out of 32; n: no remat, d: dots, f: full; -: does\n"
        "not fit.\n"
    )
    rows = [[name, *(_short(layouts[card][name]) for card in _CARDS)] for name in sizes]
    print_table(["size", *_CARDS], rows, n_text_columns=1)
    return 0


@functools.cache
def _size(name: str) -> dict[str, Any]:
    from mamba_jax.costs.parameters import parameter_count
    from mamba_jax.estimator.choose import smallest_bytes

    config = _run_of(name)
    return {
        "parameters": parameter_count(config.model).total,
        "least_bytes": smallest_bytes(config, of_device(device_of_flag(_STAND_IN))),
    }


@functools.cache
def _on_card(name: str, card: str) -> dict[str, Any] | None:
    """Returns the layout chosen for a size on a card; None: it does not fit."""
    from mamba_jax.estimator import plan

    machine = of_device(device_of_flag(card))
    try:
        planned = plan(_run_of(name), machine=machine)
    except UserError:
        return None
    kept = ("batch_size", "gradient_accumulation_steps", "remat", "needs_bytes", "budget_bytes")
    record = _record(planned)
    return {key: record[key] for key in kept}


def _run_of(name: str) -> RunConfig:
    from mamba_jax.data.tokenizers.load import load_tokenizer, with_vocabulary

    config = freeze(preset_config(name))
    config = dataclasses.replace(config, vram=dataclasses.replace(config.vram, auto=True))
    return with_vocabulary(config, load_tokenizer(config.data.tokenizer))


def _layout_text(chosen: dict[str, Any] | None) -> str:
    if chosen is None:
        return "-"
    return f"{chosen['batch_size']} × {chosen['gradient_accumulation_steps']}, {chosen['remat']}"


def _short(chosen: dict[str, Any] | None) -> str:
    return "-" if chosen is None else f"{chosen['batch_size']}{chosen['remat'][0]}"


if __name__ == "__main__":
    sys.exit(main())
