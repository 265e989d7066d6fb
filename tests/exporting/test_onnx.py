"""ONNX graphs in onnxruntime against the model in JAX, which takes the same rows token by token."""

import ast
import dataclasses
import functools
import itertools
import json
import pathlib
import runpy
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from mamba_jax import export
from mamba_jax.data.tokenizers.load import load_tokenizer
from mamba_jax.exporting import onnx_file, onnx_graph, onnx_model, tensors, verify
from mamba_jax.models import build
from tests.support import tiny
from tests.support.made import UNTIED, random_params, write_checkpoint
from tests.support.tiny_run import quick_compiles  # noqa: F401

onnx = pytest.importorskip("onnx", reason="needs onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")

ROOT = pathlib.Path(__file__).parents[2]
HYBRID = dataclasses.replace(tiny.HYBRID, vocab_size=257, tie_embeddings=False)
FAMILIES = {"mamba": UNTIED, "hybrid": HYBRID}
VARIANTS = FAMILIES | {
    "attention after the recursion": dataclasses.replace(
        HYBRID,
        recursion_reads_attention=False,
        attention_scales=(2,),
        fusion="sum",
        shared_gate=True,
    ),
    "no recursion": dataclasses.replace(
        HYBRID, recursion_depth=0, attention_scales=(3, 1), fusion="norm", tie_embeddings=True
    ),
    "plan": dataclasses.replace(
        HYBRID,
        plan="A,M,H",
        n_layers=3,
        attention_scales=(1, 2),
        attention_window=0,
        max_seq_len=12,
        fusion="residual_zero",
        eigenvalues="signed",
        gate="channel",
        pass_embedding=True,
    ),
}
BETWEEN = [
    pytest.param(model, id=name, marks=pytest.mark.exhaustive)
    for name, model in tiny.VARIANTS.items()
]
IDS = np.random.default_rng(0).integers(0, 64, (3, 29))
# Relative to the largest number. float32 sums in another order; the layers enlarge what rounding
# leaves (up to 1.2e-5 was seen).
TOLERANCE = 5e-5


class Graphs(NamedTuple):
    """Sessions by file name."""

    row: onnxruntime.InferenceSession
    step: onnxruntime.InferenceSession


def load(folder):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    names = (onnx_file.ROW, onnx_file.STEP)
    return Graphs(*(onnxruntime.InferenceSession(folder / name, options) for name in names))


def ask(session, ids_bt, cache=None):
    """Returns logits and the cache by name, without the prefix."""
    past = {f"past.{name}": x for name, x in (cache or {}).items()}
    values = session.run(None, {"input_ids": ids_bt, **past})
    found = dict(zip((one.name for one in session.get_outputs()), values, strict=True))
    return found.pop("logits"), {name.removeprefix("present."): x for name, x in found.items()}


@functools.cache
def params_of(model):
    """Parameters so large that a greedy text does not repeat one token."""
    enlarge = lambda path, leaf: np.float32(1.5) * leaf + np.float32(path[-1].key == "scale")
    return jax.tree_util.tree_map_with_path(enlarge, random_params(model, seed=1))


@functools.cache
def step_of(model):
    """Compiled once: the model in JAX, a token for each of three rows."""
    return jax.jit(
        lambda params, ids, cache: build.decode_step(params, model, ids, cache),
        compiler_options={"xla_backend_optimization_level": 0},  # sooner compiled
    )


@functools.cache
def truth(model):
    """Logits (b, t, v) of IDS, and the caches after each token, by the graphs' names."""
    params, cache = params_of(model), build.init_cache(model, len(IDS))
    logits, caches = [], []
    for t in range(IDS.shape[1]):
        logits_bv, cache = step_of(model)(params, jnp.asarray(IDS[:, t], jnp.int32), cache)
        logits.append(logits_bv)
        named = {
            f"{i}.{name}": np.asarray(array)
            for i, layer in enumerate(build.unstack_cache(cache, model)["layers"])
            for name, array in layer.items()
        }
        has_length = model.attends
        caches.append(named | ({"length": np.int64(cache["length"])} if has_length else {}))
    return np.stack(logits, axis=1), caches


def assert_close(found, wanted, name="logits"):
    atol = TOLERANCE * max(float(np.abs(wanted).max(initial=0)), 1)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=atol, err_msg=name)


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        assert_close(found[name], x, name)


@functools.cache
def table_of(model):
    return tensors.to_hf(params_of(model), model, model.vocab_size)


def write(folder, model):
    """Writes the graphs alone."""
    weights = onnx_graph.WeightsFile(folder / onnx_file.WEIGHTS)
    for name, one_token in ((onnx_file.ROW, False), (onnx_file.STEP, True)):
        graph = onnx_model.make(table_of(model), model, one_token=one_token)
        weights.save(graph, folder / name, "tiny")


@pytest.fixture(scope="module", params=FAMILIES.values(), ids=FAMILIES)
def exported(request, tmp_path_factory):
    """A checkpoint of each family, and the folder made of it."""
    run, out = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("made") / "out"
    write_checkpoint(run, request.param, params_of(request.param))
    arguments = ["--checkpoint", str(run), "--format", "onnx"]
    assert export.main([*arguments, "--out", str(out)]) == 0
    return request.param, out, arguments


# What does not depend on the family.
of_mamba = pytest.mark.parametrize("exported", [UNTIED], ids=["mamba"], indirect=True)


@pytest.mark.parametrize(
    "model", [*(pytest.param(model, id=name) for name, model in VARIANTS.items()), *BETWEEN]
)
def test_both_graphs_give_the_models_logits_and_caches(tmp_path, model):
    write(tmp_path, model)
    graphs = load(tmp_path)
    logits_btv, caches = truth(model)
    for t in (1, 2, 5, 12, 29):  # no block, an odd one, whole ones, keys beyond the window
        found, cache = ask(graphs.row, IDS[:, :t])
        assert_close(found, logits_btv[:, :t])
        assert_same(cache, caches[t - 1])
    found, cache = ask(graphs.row, IDS[1:2])
    assert_close(found, logits_btv[1:2])
    assert_same(cache, {name: x[1:2] for name, x in caches[-1].items()})
    _, cache = ask(graphs.row, IDS[:, :5])
    for t in range(5, 29):
        found, cache = ask(graphs.step, IDS[:, t : t + 1], cache)
        assert_close(found[:, 0], logits_btv[:, t])
        assert_same(cache, caches[t])


def test_rows_of_unequal_lengths_continue_in_one_batch_and_from_zeros(exported):
    model, folder, _ = exported
    graphs = load(folder)
    logits_btv, caches = truth(model)
    starts = (0, 7, 16)
    cache = {
        name: np.stack([np.zeros_like(x[i]) if t == 0 else caches[t - 1][name][i] for i, t in rows])
        for name, x in caches[0].items()
        for rows in [list(enumerate(starts))]
    }
    for more in range(13):
        ids = np.array([[IDS[i, t + more]] for i, t in enumerate(starts)])
        found, cache = ask(graphs.step, ids, cache)
        wanted = np.stack([logits_btv[i, t + more] for i, t in enumerate(starts)])
        assert_close(found[:, 0], wanted)


def greedy(model, params, n):
    """n tokens after each row of IDS, by JAX."""
    cache, chosen = build.init_cache(model, len(IDS)), []
    for t in range(IDS.shape[1] + n - 1):
        ids_b = IDS[:, t] if t < IDS.shape[1] else chosen[-1]
        logits_bv, cache = step_of(model)(params, jnp.asarray(ids_b, jnp.int32), cache)
        if t >= IDS.shape[1] - 1:
            second_b, first_b = np.sort(logits_bv)[:, -2:].T
            assert (first_b - second_b > 1e-3).all()  # or rounding may choose another
            chosen.append(np.asarray(logits_bv).argmax(-1))
    return np.stack(chosen, axis=1)


def test_greedy_text_is_the_same(exported):
    model, folder, _ = exported
    graphs = load(folder)
    wanted = greedy(model, params_of(model), 64)
    assert len(np.unique(wanted)) > 60  # or else the same token again and again would do
    logits, cache = ask(graphs.row, IDS)
    chosen = [logits[:, -1:].argmax(-1)]
    while len(chosen) < 64:
        logits, cache = ask(graphs.step, chosen[-1], cache)
        chosen.append(logits.argmax(-1))
    np.testing.assert_array_equal(np.concatenate(chosen, axis=1), wanted)


def test_loops_are_real_and_axes_free(exported):
    model, folder, _ = exported
    # A loop over the tokens in each layer, and one over the recursion's steps.
    loops = {"mamba": (2, 0), "hybrid": (4, 2)}[model.family]
    for name, count in zip((onnx_file.ROW, onnx_file.STEP), loops, strict=True):
        onnx.checker.check_model(folder / name, full_check=True)
        read = onnx.load(folder / name, load_external_data=False)
        assert [node.op_type for node in read.graph.node].count("Scan") == count
        axes = lambda value: [
            axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim
        ]
        ids, logits = read.graph.input[0], read.graph.output[0]
        length = "sequence" if name == onnx_file.ROW else 1
        assert (ids.name, axes(ids)) == ("input_ids", ["batch", length])
        assert (logits.name, axes(logits)) == ("logits", ["batch", length, 257])
        assert {axes(value)[0] for value in read.graph.output} == {"batch"}


@pytest.mark.parametrize("model", [UNTIED, VARIANTS["no recursion"]], ids=["untied", "tied"])
def test_one_file_holds_each_weight_once(tmp_path, model):
    write(tmp_path, model)
    places = {}
    for name in (onnx_file.ROW, onnx_file.STEP):
        assert (tmp_path / name).stat().st_size < 60_000
        for tensor in onnx.load(tmp_path / name, load_external_data=False).graph.initializer:
            if tensor.external_data:
                place = {pair.key: pair.value for pair in tensor.external_data}
                assert place["location"] == onnx_file.WEIGHTS
                assert places.setdefault(tensor.name, place) == place
    ends = sorted((int(p["offset"]), int(p["offset"]) + int(p["length"])) for p in places.values())
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(ends))
    assert (tmp_path / onnx_file.WEIGHTS).stat().st_size == ends[-1][1]
    assert sum(end - begin for begin, end in ends) == sum(
        x.nbytes for x in table_of(model).values()
    )


def test_the_other_files_of_the_folder(exported):
    _, folder, _ = exported
    graphs = {onnx_file.ROW, onnx_file.STEP, onnx_file.WEIGHTS}
    others = {"config.json", "tokenizer.json", "tokenizer_config.json", "README.md"}
    assert {file.name for file in folder.iterdir()} == {*graphs, *others, onnx_file.EXAMPLE}
    config = json.loads((folder / "config.json").read_text())
    assert config["eos_token_id"] == 256 and "auto_map" not in config
    card = (folder / "README.md").read_text()
    assert "library_name: onnx" in card and "custom_code" not in card
    assert all(name in card for name in (*graphs, onnx_file.EXAMPLE))


def test_the_example_generates_the_models_text(exported):
    model, folder, _ = exported
    source = (folder / onnx_file.EXAMPLE).read_text()
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import)]
    imported = {alias.name for node in imports for alias in node.names}
    standard = {"argparse", "json", "pathlib"}
    assert imported == {"numpy", "onnxruntime", "tokenizers"} | standard
    assert len(source.splitlines()) <= 70
    tokenizer = load_tokenizer("bytes")
    prompt, params = "The history", params_of(model)
    read, cache = [tokenizer.eot_id, *tokenizer.encode(prompt)], build.init_cache(model, 3)
    for t in range(len(read) + 19):
        ids_b = jnp.full(3, read[t], jnp.int32)  # the three rows that are compiled already
        logits_bv, cache = step_of(model)(params, ids_b, cache)
        if t >= len(read) - 1:
            read.append(int(logits_bv[0].argmax()))
    done = subprocess.run(
        [sys.executable, folder / onnx_file.EXAMPLE, prompt, "--max_tokens", "20"],
        capture_output=True,
        check=True,
    )
    assert done.stdout.decode() == prompt + tokenizer.decode(read[-20:]) + "\n"


@of_mamba
def test_the_example_reads_chats_and_keeps_typed_tokens(exported, monkeypatch, capsys):
    _, folder, _ = exported
    real = tokenizers.Tokenizer

    class Scripted:
        """Encodes as the library does, records the ids, and decodes every answer to one text."""

        def __init__(self, path):
            self._real = real.from_file(path)

        from_file = classmethod(lambda cls, path: cls(path))

        def encode(self, text):
            self._real.encode_special_tokens = self.encode_special_tokens
            print(self._real.encode(text).ids)
            return self._real.encode(text)

        def decode(self, ids):
            return " Yes.\n\nuser: And"[: 4 * len(ids)]

    monkeypatch.setattr(tokenizers, "Tokenizer", Scripted)
    example = str(folder / onnx_file.EXAMPLE)
    monkeypatch.setattr(sys, "argv", [example, "a <|endoftext|>", "--chat"])
    runpy.run_path(example)
    ours = load_tokenizer("bytes")
    ids = [ours.eot_id, *ours.encode("user: a <|endoftext|>\n\nassistant:").tolist()]
    assert capsys.readouterr().out == f"{ids}\nYes.\n"


@of_mamba
def test_verify_reports_the_largest_difference(exported, tmp_path, capsys, monkeypatch):
    _, _, arguments = exported
    monkeypatch.setattr(verify, "PROMPTS", ())  # each length is compiled; one spells the separator
    assert export.main([*arguments, "--out", str(tmp_path / "out"), "--verify"]) == 0
    assert "64 of 64 greedy tokens" in capsys.readouterr().err
    right = onnx_model.make
    for broken in (False, True):  # the graph of a row, or of a token

        def make(table, model, *, one_token, broken=broken):
            off = {"norm_eps": 0.1} if one_token == broken else {}
            return right(table, dataclasses.replace(model, **off), one_token=one_token)

        monkeypatch.setattr(onnx_model, "make", make)
        assert export.main([*arguments, "--out", str(tmp_path / "wrong"), "--verify"]) == 2
        assert "verification failed: logits differ" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_other_dtypes_are_refused(tmp_path, capsys, dtype):
    arguments = ["--checkpoint", "nowhere", "--format", "onnx", "--out", str(tmp_path / "out")]
    assert export.main([*arguments, "--dtype", dtype]) == 2
    assert f"--dtype {dtype} is not one of f32 for --format onnx" in capsys.readouterr().err


@of_mamba
@pytest.mark.parametrize("missing", ["onnx", "onnxruntime"])
def test_a_missing_library_names_its_extra(exported, tmp_path, capsys, monkeypatch, missing):
    _, _, arguments = exported
    monkeypatch.setitem(sys.modules, missing, None)
    assert export.main([*arguments, "--out", str(tmp_path / "out"), "--verify"]) == 2
    told = capsys.readouterr().err
    assert f"{missing} is missing" in told and "mamba_jax[onnx]" in told
    assert not list(tmp_path.iterdir())


@of_mamba
def test_the_guides_script(exported, tmp_path, monkeypatch):
    _, _, arguments = exported
    monkeypatch.chdir(tmp_path)
    main = runpy.run_path(str(ROOT / "launch" / "export_to_onnx.py"))["main"]
    assert main(["--checkpoint", arguments[1]]) == 0
    assert main(["--checkpoint", arguments[1], "--out", "mine"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{pathlib.Path(arguments[1]).name}-onnx",
        "mine",
    }
    assert (tmp_path / "mine" / onnx_file.STEP).is_file()
