"""The PyTorch program of an exported hybrid, in whatever release of transformers is installed."""

import dataclasses
import importlib.util
import json
import sys

import pytest

from mamba_jax import export
from mamba_jax.exporting import hf
from tests.support import tiny
from tests.support.made import random_params, write_checkpoint

torch = pytest.importorskip("torch", reason="needs torch")
transformers = pytest.importorskip("transformers", reason="needs transformers")

MODEL = dataclasses.replace(tiny.HYBRID, vocab_size=257, tie_embeddings=False)
GREEDY = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
NAMES = ("cache", "cache_params", "past_key_values")
CACHED = pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])


def exported(folder, model):
    write_checkpoint(folder, model, random_params(model))
    arguments = ["--checkpoint", str(folder), "--format", "hf", "--out", str(folder / "model")]
    assert export.main(arguments) == 0
    return folder / "model"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("hybrid"), MODEL)


def load(folder, **more):
    settings = {"dtype": torch.float32, "trust_remote_code": True}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **settings | more)


@pytest.fixture
def theirs(folder):
    return load(folder)


@pytest.fixture
def ids(seed=0):
    return torch.randint(0, 256, (2, 19), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def padded(ids):
    """A batch whose second row is a text of 8 tokens, padded on the left, and its mask."""
    batch, mask = ids.clone(), torch.ones_like(ids)
    batch[1, :11], mask[1, :11] = 256, 0
    return {"input_ids": batch, "attention_mask": mask}


def logits_of(model, input_ids, **more):
    with torch.no_grad():
        return model(input_ids, **more).logits


def assert_near(found, truth):
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_by_any_of_its_names(theirs, ids, name):
    first = theirs(ids[:, :7])
    assert first[name] is getattr(first, name) is first.cache
    rest = logits_of(theirs, ids[:, 7:], **{name: first.cache})
    assert_near(torch.cat([first.logits, rest], dim=1), logits_of(theirs, ids))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("whole", [True, False], ids=["whole text", "new tokens"])
def test_generate_continues_from_a_cache(theirs, ids, name, whole):
    given = ids if whole else ids[:, 7:]
    settings = GREEDY | {"attention_mask": torch.ones_like(ids)}
    found = theirs.generate(given, **settings, **{name: theirs(ids[:, :7]).cache})
    truth = theirs.generate(ids, **settings)
    assert found[:, given.shape[1] :].tolist() == truth[:, 19:].tolist()


@CACHED
@pytest.mark.parametrize("n_beams", [1, 4])
def test_a_padded_batch_generates_what_its_rows_do(theirs, padded, use_cache, n_beams):
    settings = GREEDY | {"num_beams": n_beams}
    both = theirs.generate(**padded, **settings, use_cache=use_cache)[:, 19:]
    for row, start in enumerate((0, 11)):
        alone = padded["input_ids"][row : row + 1, start:]
        # Recomputed at every step: no cache is used, and none is reordered.
        truth = theirs.generate(
            alone, attention_mask=torch.ones_like(alone), **settings, use_cache=False
        )
        assert both[row].tolist() == truth[0, alone.shape[1] :].tolist()


@CACHED
@pytest.mark.parametrize("n_beams", [1, 3])
def test_generate_from_embeddings(theirs, padded, use_cache, n_beams):
    embeds = theirs.get_input_embeddings()(padded["input_ids"])
    settings = GREEDY | {"num_beams": n_beams, "attention_mask": padded["attention_mask"]}
    found = theirs.generate(inputs_embeds=embeds, **settings, use_cache=use_cache)
    truth = theirs.generate(padded["input_ids"], **settings)
    assert found.tolist() == truth[:, 19:].tolist()


@pytest.mark.parametrize("place", [slice(0, 8), slice(5, 13), slice(11, 19)])
def test_padding_on_either_side_changes_nothing(theirs, ids, place):
    mask = torch.zeros_like(ids)
    mask[:, place] = 1
    truth = logits_of(theirs, ids[:, place])
    assert_near(logits_of(theirs, ids, attention_mask=mask)[:, place], truth)


def test_hidden_states_are_what_the_layers_give(theirs, ids, monkeypatch):
    monkeypatch.setattr(sys.modules[type(theirs).__module__], "CHUNK_TOKENS", 8)
    seen = [[] for _ in theirs.backbone.layers]
    for layer, into in zip(theirs.backbone.layers, seen, strict=True):
        layer.register_forward_hook(lambda module, given, gave, into=into: into.append(gave[0]))
    with torch.no_grad():
        found = theirs(ids, output_hidden_states=True)
    assert all(len(parts) == 3 for parts in seen)
    *between, last = (torch.cat(parts, dim=1) for parts in seen)
    truth = [theirs.get_input_embeddings()(ids), *between, theirs.backbone.norm_f(last)]
    for ours, theirs_ in zip(found.hidden_states, truth, strict=True):
        assert torch.equal(ours, theirs_)
    assert_near(theirs.lm_head(found.hidden_states[-1]), found.logits)
    assert theirs(ids).hidden_states is None


def test_generate_returns_hidden_states(theirs, ids):
    settings = {"output_hidden_states": True, "return_dict_in_generate": True}
    found = theirs.generate(ids, **GREEDY, **settings)
    shapes = [step[-1].shape for step in found.hidden_states]
    assert shapes == [(2, 19, 32)] + [(2, 1, 32)] * 11


def test_gradients_are_the_same_with_checkpointing(theirs, ids, monkeypatch):
    monkeypatch.setattr(sys.modules[type(theirs).__module__], "CHUNK_TOKENS", 8)
    theirs.train()
    n_calls = 0

    def count(*_):
        nonlocal n_calls
        n_calls += 1

    theirs.backbone.layers[0].register_forward_pre_hook(count)

    def gradients():
        theirs.zero_grad()
        theirs(ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in theirs.named_parameters()}

    truth, n_plain = gradients(), n_calls
    enable = getattr(
        theirs, "activation_checkpointing_enable", theirs.gradient_checkpointing_enable
    )
    enable()
    found = gradients()
    assert n_calls == 3 * n_plain  # once more forward, and again backward
    assert all(gradient.any() for gradient in truth.values())
    for name, gradient in truth.items():
        torch.testing.assert_close(found[name], gradient, msg=lambda text, name=name: name + text)


def test_the_loss_of_labels(theirs, ids):
    labels = ids.clone()
    labels[0, :9] = -100
    logits, wanted = logits_of(theirs, ids)[:, :-1], labels[:, 1:]
    lost = torch.nn.functional.cross_entropy(logits.transpose(1, 2), wanted, reduction="sum")
    assert_near(theirs(ids, labels=labels).loss, lost / 28)
    assert_near(theirs(ids, labels=labels, num_items_in_batch=70).loss, lost / 70)


def test_trainer_accumulates_and_evaluates(theirs, ids, tmp_path):
    pytest.importorskip("accelerate", reason="needs accelerate")
    rows = [{"input_ids": row, "labels": row} for row in (*ids, *ids.flip(1))]
    with torch.no_grad():
        truth = float(sum(theirs(row[None], labels=row[None]).loss for row in (*ids, *ids.flip(1))))
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        max_steps=1,
        learning_rate=0.0,
        logging_steps=1,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
    )
    trainer = transformers.Trainer(theirs, arguments, train_dataset=rows, eval_dataset=rows)
    assert trainer.train().training_loss == pytest.approx(truth / 4, rel=1e-4)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(truth / 4, rel=1e-4)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_saved_and_loaded_again_it_is_the_same(tmp_path, ids, tied):
    first = load(exported(tmp_path, dataclasses.replace(MODEL, tie_embeddings=tied)))
    truth = logits_of(first, ids)
    first.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert torch.equal(logits_of(again, ids), truth)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(logits_of(again, ids), truth)
    assert again.config.tie_word_embeddings is tied
    is_one = again.lm_head.weight is again.get_input_embeddings().weight
    assert is_one is tied


def test_more_tokens_do_not_change_earlier_ones(theirs, ids):
    truth = logits_of(theirs, ids)
    theirs.resize_token_embeddings(300)
    assert theirs.config.vocab_size == 300
    found = logits_of(theirs, ids)
    assert found.shape == (2, 19, 300) and torch.equal(found[..., :257], truth)
    assert logits_of(theirs, torch.full((1, 3), 299)).isfinite().all()


@pytest.mark.parametrize("kept", [0, 1, 3, [2, 5]])
def test_logits_of_some_places_only(theirs, ids, kept):
    truth = logits_of(theirs, ids)
    index = torch.tensor(kept) if isinstance(kept, list) else slice(-kept if kept else None, None)
    given = index if isinstance(kept, list) else kept
    assert_near(logits_of(theirs, ids, logits_to_keep=given), truth[:, index])


def test_outputs_as_a_tuple(theirs, ids):
    logits, cache = theirs(ids, return_dict=False)
    assert_near(logits, logits_of(theirs, ids))
    assert type(cache).__name__ == "HybridMambaCache"
    theirs.config.use_cache = False
    assert len(theirs(ids, return_dict=False)) == 1


@pytest.mark.parametrize("bytes_held", ["all", "none"])
def test_weights_that_accelerate_places(folder, ids, tmp_path, bytes_held):
    pytest.importorskip("accelerate", reason="needs accelerate")
    place = "auto" if bytes_held == "all" else {"backbone": "disk", "lm_head": "cpu"}
    placed = load(folder, device_map=place, offload_folder=tmp_path)
    truth = load(folder)
    assert_near(logits_of(placed, ids), logits_of(truth, ids))
    found, wanted = (model.generate(ids, **GREEDY) for model in (placed, truth))
    assert found.tolist() == wanted.tolist()


def test_unsupported_arguments_are_errors(theirs, ids):
    mask = torch.ones_like(ids)
    cases = [
        ("output_attentions: this model", lambda: theirs(ids, output_attentions=True)),
        (
            "output_attentions: this model",
            lambda: theirs.generate(
                ids, output_attentions=True, return_dict_in_generate=True, max_new_tokens=2
            ),
        ),
        ("inputs_embeds: pass exactly one", lambda: theirs()),
        ("inputs_embeds: pass exactly one", lambda: theirs(ids, inputs_embeds=torch.zeros(1))),
        ("cache: it holds 2 rows, the inputs have 1", lambda: theirs(ids[:1], cache=once)),
        (
            "cache: this model takes one HybridMambaCache, not DynamicCache",
            lambda: theirs(ids, past_key_values=transformers.DynamicCache()),
        ),
        ("attention_mask: its shape is", lambda: theirs(ids, attention_mask=mask[:, 1:])),
        ("attention_mask: its shape is", lambda: theirs(ids, attention_mask=mask[:, None])),
        (
            "position_ids: this model counts",
            lambda: theirs(ids, position_ids=torch.arange(19).remainder(8)[None].expand(2, -1)),
        ),
        (
            "input_ids: 19 tokens do not continue the 19 in the cache",
            lambda: theirs.generate(ids, past_key_values=once, attention_mask=mask, **GREEDY),
        ),
    ]
    once = theirs(ids).cache
    for words, call in cases:
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(ValueError, match=r"(?i)stateful|crop|assisted"):
        theirs.generate(ids[:1], prompt_lookup_num_tokens=3, **GREEDY)
    theirs.config.output_attentions = True
    with pytest.raises(ValueError, match="output_attentions: this model"):
        theirs(ids)


def test_its_own_position_ids_are_accepted(theirs, padded):
    position = (padded["attention_mask"].cumsum(1) - 1).clamp(min=0)
    found = logits_of(theirs, **padded, position_ids=position)
    assert torch.equal(found, logits_of(theirs, **padded))


def test_an_older_transformers_is_refused_with_the_oldest_that_works(folder, monkeypatch):
    config = json.loads((folder / "config.json").read_text())
    assert config["transformers_version"] == "5.0.0"
    spec = importlib.util.spec_from_file_location("old_modeling", folder / hf.MODELING)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr("transformers.__version__", "4.57.6")
    with pytest.raises(ImportError, match=r"needs transformers 5\.0\.0 or newer: 4\.57\.6 is"):
        spec.loader.exec_module(module)
    for version in ("5.0.0", "5.24.0", "6.0.0.dev0"):
        monkeypatch.setattr("transformers.__version__", version)
        spec.loader.exec_module(module)
