"""Steps by graph equal steps without: on CPU with a capture that only keeps the function, on CUDA for real."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fuselora.engine import step_graph
from fuselora.engine.step_graph import StepGraphs, refusal

PAD, IGNORE = 0, -100


def make_model(device):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=PAD,
    )
    return LlamaForCausalLM(config).to(device)


def batch(rows, length, seed, device):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 61, (rows, length), generator=generator)
    labels = ids.clone()
    labels[0, length // 2 :] = IGNORE
    return {"input_ids": ids.to(device), "labels": labels.to(device)}


def keep(fn):
    fn()
    grads = []

    def replay():
        fn()
        for p, g in grads:
            g.copy_(p.grad)
            p.grad = g

    grads += [(p, p.grad) for p in keep.model.parameters() if p.grad is not None]
    return replay


@pytest.mark.parametrize("shapes", [[(2, 9)], [(2, 9), (2, 150), (2, 9), (1, 128)]])
def test_equals_eager_steps(device, shapes):
    graphed, eager = make_model(device), make_model(device)
    keep.model = graphed
    graphs = StepGraphs(graphed) if device.type == "cuda" else StepGraphs(graphed, keep)
    for seed, (rows, length) in enumerate(shapes):
        data = batch(rows, length, seed, device)
        loss = graphs.forward_backward(data, 7, pad_id=PAD, ignore_index=IGNORE)
        expected = eager(**data, num_items_in_batch=7).loss
        expected.backward()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
        for (name, a), b in zip(graphed.named_parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
            a.grad = b.grad = None
    assert len(graphs.graphs) == len({(rows, -(-length // 128)) for rows, length in shapes})


def test_micro_batches_add_up(device):
    graphed, eager = make_model(device), make_model(device)
    keep.model = graphed
    graphs = StepGraphs(graphed) if device.type == "cuda" else StepGraphs(graphed, keep)
    for seed in range(3):
        data = batch(2, 20 + seed, seed, device)
        graphs.forward_backward(data, 50, pad_id=PAD, ignore_index=IGNORE)
        eager(**data, num_items_in_batch=50).loss.backward()
    for a, b in zip(graphed.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_only_a_few_shapes_are_kept(monkeypatch):
    monkeypatch.setattr(step_graph, "SHAPES", 2)
    model = make_model("cpu")
    keep.model = model
    graphs = StepGraphs(model, keep)
    for rows in (1, 2, 3):
        graphs.forward_backward(batch(rows, 8, 0, "cpu"), 9, pad_id=PAD, ignore_index=IGNORE)
    assert set(graphs.graphs) == {(2, 128), (3, 128)}


def test_what_cannot_be_captured_is_refused():
    cuda, model = torch.device("cuda"), nn.Linear(2, 2)
    assert refusal(model, cuda, 0.0, False) is None
    assert "on cpu" in refusal(model, torch.device("cpu"), 0.0, False)
    assert "lora_dropout is 0.1" in refusal(model, cuda, 0.1, False)
    assert "checkpointing" in refusal(model, cuda, 0.0, True)
    assert "dropout" in refusal(nn.Sequential(nn.Dropout(0.1)), cuda, 0.0, False)
