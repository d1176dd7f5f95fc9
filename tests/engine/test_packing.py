"""Packing: every document once, in full, apart from the others, and with the loss it has alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.models import VOCAB, lora_model
from tests.support.parity import StayDouble, assert_same_results, run
from tests.support.twins import SMALL

import fuselora
from fuselora.engine import packing
from fuselora.engine.chat import IGNORE, Example, FeedbackExample, PreferenceExample
from fuselora.engine.data import load_data
from fuselora.engine.errors import UserError
from fuselora.engine.model import build_model
from fuselora.engine.output import open_output_dir
from fuselora.engine.trainer import Trainer

CPU = torch.device("cpu")
LENGTHS = (5, 9, 4, 7, 12, 3)


def pack_epoch(examples, capacity, **order):
    """The packs of one epoch."""
    rows = packing.pack_rows([packing.tokens_of(example) for example in examples], capacity, **order)
    return [packing.join(examples[i] for i in row) for row in rows]


def examples_of(lengths, seed=0):
    """Random tokens; about a third of each untrained. The first label is set, though nothing may predict it."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for n in lengths:
        ids = torch.randint(3, VOCAB, (n,), generator=generator)
        labels = ids.masked_fill(torch.rand(n, generator=generator) < 0.33, IGNORE)
        labels[0] = ids[0]
        made.append(Example(ids.tolist(), labels.tolist()))
    return made


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 30), max_size=60), st.integers(30, 50), st.integers(0, 3))
def test_every_document_once_in_rows_that_no_two_of_could_be_one(lengths, capacity, seed):
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist()
    rows = packing.best_fit(lengths, capacity, order)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    fills = sorted(sum(lengths[i] for i in row) for row in rows)
    assert all(fill <= capacity for fill in fills)
    assert len(fills) < 2 or fills[0] + fills[1] > capacity
    assert len(rows) == len(packing.best_fit(lengths, capacity))


def test_best_fit_takes_the_fullest_row_with_room():
    assert packing.best_fit([6, 7, 3, 4], 10) == [[1, 2], [0, 3]]
    with pytest.raises(ValueError, match=r"length: expected 1 to 10, got 11 at 1"):
        packing.best_fit([3, 11], 10)


def test_packing_is_a_function_of_seed_and_epoch():
    examples = examples_of([n % 7 + 1 for n in range(50)])
    first = pack_epoch(examples, 16, seed=1, epoch=0)
    assert first == pack_epoch(examples, 16, seed=1, epoch=0)
    others = [pack_epoch(examples, 16, seed=s, epoch=e) for s, e in ((1, 1), (2, 0))]
    assert others[0] != first != others[1] and {len(packs) for packs in others} == {len(first)}
    assert sum(pack.trained for pack in first) == sum(example.trained for example in examples)


@pytest.mark.parametrize("keys", [{}, {"packing": True}])
def test_rows_in_their_order(make_config, keys):
    units = packing.Units(examples_of([n % 7 + 1 for n in range(50)]), make_config(disable_shuffling=True, **keys))
    order = [units.of_epoch(epoch).order for epoch in (0, 1)]
    assert order[0] == order[1] == sorted(order[0])
    assert sorted(i for unit in order[0] for i in (unit if keys else [unit])) == list(range(50))
    assert all(unit == sorted(unit) for unit in order[0] if keys)


@pytest.mark.parametrize("keys", [{}, {"packing": True}, {"neat_packing": True}])
def test_units_of_an_epoch(make_config, keys):
    examples = examples_of([n % 7 + 1 for n in range(50)])
    units = packing.Units(examples, make_config(cutoff_len=16, **keys))
    epochs = [units.of_epoch(epoch) for epoch in (0, 1)]
    assert not keys or units.report == "packing: 50 examples in 13 rows of 16 tokens, 94.7% filled, kept apart"
    assert [len(epoch) for epoch in epochs] == [len(units)] * 2 and len(units) == (13 if keys else 50)
    assert list(epochs[0]) != list(epochs[1]) and list(units.of_epoch(0)) == list(epochs[0])
    assert epochs[0][2:4] == [epochs[0][2], epochs[0][3]] and epochs[0][-1] == list(epochs[0])[-1]
    assert {sum(unit.trained for unit in epoch) for epoch in epochs} == {sum(e.trained for e in examples)}


def test_an_example_longer_than_a_row_is_refused(make_config):
    with pytest.raises(UserError, match="cutoff_len: expected at least the 20 tokens of the longest example, with pac"):
        len(packing.Units(examples_of((5, 20)), make_config(cutoff_len=16, packing=True)))


def test_batch_layout():
    packs = [
        packing.join([Example([5, 6, 7], [5, IGNORE, 7]), Example([8, 9], [8, 9])]),
        packing.join([Example([4], [4])]),
    ]
    batch = packing.Collator(1, CPU, multiple_of=3)(packs)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 1], [4, 1, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[IGNORE, IGNORE, 7, IGNORE, 9, IGNORE], [IGNORE] * 6]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 0, 1]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5, 6, 7, 10, 12] and batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["cu_seq_lens_k"] is batch["cu_seq_lens_q"]
    assert (batch["max_length_q"], batch["max_length_k"]) == (3, 3) and "attention_mask" not in batch


def test_fill_changes_no_frequencies():
    """Dynamic NTK goes by the longest document of the batch; fill that is longer than any would count as one."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    model = lora_model("llama", rope_parameters=rope, max_position_embeddings=16, **SMALL)
    examples = examples_of((12, 12, 12, 4))
    alone = model(**packing.Collator(0, CPU)([packing.join(examples[3:])])).logits[0]
    filled = packing.Collator(0, CPU)([packing.join(examples[:3]), packing.join(examples[3:])])
    assert filled["position_ids"].max() == 11
    torch.testing.assert_close(model(**filled).logits[1, :4], alone, rtol=1e-5, atol=1e-5)


def test_borders_are_those_transformers_finds_in_the_positions():
    from transformers import DataCollatorWithFlattening

    examples = examples_of(LENGTHS)
    batch = packing.Collator(0, CPU, padding_free=True)(examples)
    rows = [{"input_ids": e.input_ids, "labels": e.labels} for e in examples]
    theirs = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(rows)
    assert set(theirs) == set(batch) - {"use_cache"}
    for name, value in theirs.items():
        assert torch.equal(torch.as_tensor(batch[name]), torch.as_tensor(value)), name


def layouts(examples):
    """The same examples: padded, in packs, in one row, and packs beside an example of its own."""
    packs = pack_epoch(examples, 16, seed=0, epoch=0)
    padded = packing.Collator(0, CPU)(examples)
    return padded, [
        packing.Collator(0, CPU)(packs),
        packing.Collator(0, CPU, padding_free=True)(examples),
        packing.Collator(0, CPU, multiple_of=8)([packing.join(examples[:3]), *examples[3:]]),
    ]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("patched", [False, True])
def test_loss_and_gradients_equal_those_of_padded_rows(family, attention, patched):
    examples = examples_of(LENGTHS)
    model = lora_model(family, torch.float64, attn_implementation=attention, **SMALL)
    model = fuselora.patch_model(model) if patched else model
    items = sum(example.trained for example in examples)
    padded, others = layouts(examples)
    with StayDouble():
        expected = run(model, {**padded, "num_items_in_batch": items})
        for batch in others:
            result = run(model, {**batch, "num_items_in_batch": items})
            result = type(result)(result.losses, expected.logits, result.grads)  # logits lie elsewhere in the batch
            assert_same_results(result, expected)


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_one_document_changes_no_bit_of_another(patched, attention):
    model = lora_model("mistral", attn_implementation=attention, **SMALL)
    model = fuselora.patch_model(model) if patched else model
    examples = examples_of((5, 9, 4))
    changed = [examples[0], examples_of((9,), seed=5)[0], examples[2]]
    logits = []
    for documents in (examples, changed):
        with torch.no_grad():
            logits.append(model(**packing.Collator(0, CPU)([packing.join(documents)])).logits[0])
    assert torch.equal(logits[0][:5], logits[1][:5]) and torch.equal(logits[0][14:], logits[1][14:])
    assert not torch.equal(logits[0][5:14], logits[1][5:14])


def test_a_gradient_reaches_its_own_document_only():
    model = fuselora.patch_model(lora_model("llama", **SMALL))
    batch = packing.Collator(0, CPU)([packing.join(examples_of((5, 9, 4)))])
    embeddings = model.get_input_embeddings()(batch.pop("input_ids")).detach().requires_grad_()
    model(inputs_embeds=embeddings, **batch).logits[0, 5:14].square().sum().backward()
    reached = embeddings.grad[0].abs().sum(-1) > 0
    assert reached.tolist() == [False] * 5 + [True] * 9 + [False] * 4


def test_both_answers_of_a_preference_share_a_row():
    chosen, rejected = Example([3, 4, 5], [IGNORE, 4, 5]), Example([3, 4], [IGNORE, 4])
    pack = packing.join([PreferenceExample(chosen, rejected), FeedbackExample(Example([6], [6]), desirable=True)])
    assert pack == packing.Pack([3, 4, 5, 3, 4, 6], [IGNORE, 4, 5, IGNORE, 4, IGNORE], (3, 2, 1))
    pairs = [PreferenceExample(*examples_of((n, m), seed=n)) for n, m in ((5, 3), (4, 4), (2, 6), (7, 1))]
    packs = pack_epoch(pairs, 16, seed=0, epoch=0)
    assert sorted(sum(pack.lengths) for pack in packs) == [16, 16] and {len(pack.lengths) for pack in packs} == {4}


def test_an_answer_changes_no_bit_of_the_other_nor_of_the_next_pair():
    model = fuselora.patch_model(lora_model("llama", torch.bfloat16, **SMALL))
    chosen, rejected, other = examples_of((6, 5, 7))
    logits = []
    for answer in (rejected, *examples_of((5,), seed=9)):
        pairs = [PreferenceExample(chosen, answer), FeedbackExample(other, desirable=False)]
        batch = packing.Collator(0, CPU)([packing.join(pairs)])
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        with torch.no_grad():
            logits.append(model(**batch).logits[0])
    assert torch.equal(logits[0][:6], logits[1][:6]) and torch.equal(logits[0][11:], logits[1][11:])
    assert not torch.equal(logits[0][6:11], logits[1][6:11])


@pytest.fixture
def make_trainer(make_config, tiny_base, tokenizer):
    def make(**keys):
        config = make_config(**{"cutoff_len": 64, "overwrite_output_dir": True, **keys})
        data = load_data(config, tokenizer)
        open_output_dir(config)
        return Trainer(
            build_model(str(tiny_base), config), data.train, data.held_out, config, pad_id=tokenizer.pad_token_id
        )

    return make


def test_training_curve_equals_that_of_padded_rows(make_trainer):
    """One step per epoch, so that every layout sees the same examples in each."""
    curves = {}
    for name, keys in {
        "padded": {"per_device_train_batch_size": 24},
        "packed": {"packing": True, "per_device_train_batch_size": 5, "gradient_accumulation_steps": 4},
        "neat": {"neat_packing": True, "padding_free": True, "per_device_train_batch_size": 24},
        "flat": {"padding_free": True, "per_device_train_batch_size": 7, "gradient_accumulation_steps": 4},
    }.items():
        trainer = make_trainer(max_steps=4, logging_steps=1, lora_target="q_proj,v_proj", **keys)
        assert trainer.steps_per_epoch == 1
        trainer.fit()
        curves[name] = torch.tensor([record["loss"] for record in trainer.log.records])
    assert curves["padded"][-1] < curves["padded"][0]
    for name, curve in curves.items():
        torch.testing.assert_close(curve, curves["padded"], rtol=2e-6, atol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_packed_run_resumes_exactly(make_trainer, tmp_path):
    keys = {"packing": True, "per_device_train_batch_size": 1, "max_steps": 9, "save_steps": 4, "logging_steps": 1}
    keys["lr_scheduler_type"] = "constant"
    whole = make_trainer(**keys, output_dir=str(tmp_path / "whole"))
    assert 3 <= whole.steps_per_epoch < 9, "the resumed part must cross into the next epoch's packing"
    whole.fit()
    make_trainer(**{**keys, "max_steps": 4}, output_dir=str(tmp_path / "cut")).fit()
    cut = make_trainer(
        **keys, output_dir=str(tmp_path / "cut"), resume_from_checkpoint=True, overwrite_output_dir=False
    )
    cut.resume()
    assert cut.step == 4
    cut.fit()
    for (name, one), (_, other) in zip(whole.model.named_parameters(), cut.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    changed = make_trainer(
        **{**keys, "packing": False},
        output_dir=str(tmp_path / "cut"),
        resume_from_checkpoint=True,
        overwrite_output_dir=False,
    )
    with pytest.raises(UserError, match="packing to = 64"):
        changed.resume()


def test_graphs_of_packed_rows_are_refused(make_config):
    with pytest.raises(UserError, match="cuda_graphs: expected false with neat_packing"):
        make_config(cuda_graphs=True, neat_packing=True)
