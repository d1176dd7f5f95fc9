"""The built-in data and base model: made here, the same every time, held-out text kept apart."""

import pytest
import torch

from fuselora.engine import quickstart, stdlib_corpus
from fuselora.engine.config import Config, load_config
from fuselora.engine.errors import UserError
from fuselora.engine.model import resolve_base
from fuselora.engine.stdlib_corpus import Entry

RECIPE = quickstart.Recipe(
    vocab_size=300,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    sequence=32,
    batch=2,
    steps=3,
)


@pytest.fixture(scope="module")
def corpus():
    return stdlib_corpus.entries()


@pytest.fixture
def short_corpus(corpus, monkeypatch):
    monkeypatch.setattr(quickstart, "entries", lambda: corpus[:150])
    return corpus[:150]


def test_corpus_is_large_sorted_and_without_repeats(corpus):
    names, docs = [e.name for e in corpus], [e.doc for e in corpus]
    assert len(corpus) > 4000 and names == sorted(names)
    assert len(set(names)) == len(names) and len(set(docs)) == len(docs)
    assert {"json.dumps", "json", "heapq.heappush", "collections.OrderedDict"} <= set(names)
    assert not any(" at 0x" in e.signature for e in corpus)


def test_split_depends_on_the_name_alone(corpus):
    held_out = [e for e in corpus if e.held_out]
    assert 0.02 < len(held_out) / len(corpus) < 0.04
    assert all(Entry(e.name, "x", "", "x").held_out for e in held_out)


def test_pairs():
    function = Entry("heapq.heappush", "function", "(heap, item, /)", "Push item onto heap,\nkeeping order.\n\nMore.")
    assert function.pairs == [
        ("What does `heapq.heappush` do?", "Push item onto heap, keeping order."),
        ("Write the signature of `heapq.heappush`.", "heappush(heap, item, /)"),
    ]
    assert Entry("m.f", "function", "", "f(x) -> int").pairs == []
    assert Entry("m.C", "class", "(x)", "A class of things.").pairs == [
        ("What is the class `m.C` for?", "A class of things.")
    ]


def test_training_and_held_out_pairs_are_apart(corpus, monkeypatch):
    monkeypatch.setattr(quickstart, "entries", lambda: corpus)
    train, held_out = (quickstart.conversations(held_out=side) for side in (False, True))
    questions = [{c[0]["content"] for c in side} for side in (train, held_out)]
    assert len(train) > 5000 and len(held_out) > 100
    assert not questions[0] & questions[1]


def test_base_is_built_once(short_corpus, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = quickstart.base_model(str(tmp_path), RECIPE)
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]
    monkeypatch.setattr(quickstart, "_build", None)
    assert quickstart.base_model(str(tmp_path), RECIPE) == folder
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == model.config.vocab_size == 300
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id
    text = "os.path.join(a, *paths): naïve €"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_base_never_sees_held_out_text(short_corpus, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        quickstart, "_pretrain", lambda stream, tokenizer, recipe: seen.append(tokenizer.decode(stream))
    )
    with pytest.raises(AttributeError):  # nothing to save
        quickstart.base_model(str(tmp_path), RECIPE)
    held_out = [e for e in short_corpus if e.held_out]
    assert held_out and all(e.raw_text in seen[0] for e in short_corpus if not e.held_out)
    assert not any(e.raw_text in seen[0] for e in held_out)


def test_failed_build_leaves_nothing(short_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart, "_pretrain", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        quickstart.base_model(str(tmp_path), RECIPE)
    assert list(tmp_path.iterdir()) == []


def test_same_weights_whatever_the_caller_seeded(short_corpus, tmp_path):
    from safetensors.torch import load_file

    weights, threads = [], torch.get_num_threads()
    for seed in (1, 2):
        torch.manual_seed(seed)
        folder = quickstart.base_model(str(tmp_path / str(seed)), RECIPE)
        weights.append(load_file(folder / "model.safetensors"))
        assert torch.initial_seed() == seed and torch.get_num_threads() == threads
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)


def test_recipe_names_its_folder():
    assert RECIPE.key != quickstart.RECIPE.key and quickstart.Recipe().key == quickstart.RECIPE.key


def test_cache_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert quickstart.default_cache() == tmp_path / "fuselora"


def test_example_configurations_load():
    for name in ("quickstart", "lora_sft", "qlora"):
        load_config([f"examples/{name}.yaml"])


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    config = Config(
        model_name_or_path="quickstart", dataset="quickstart", output_dir="out", cache_dir=str(tmp_path / "file")
    )
    with pytest.raises(UserError, match="cache_dir: expected room and the right to write"):
        resolve_base(config)
