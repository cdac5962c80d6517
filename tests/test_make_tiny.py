"""assets/make_tiny.py: its training takes windows of its own and of texts in halves."""

import importlib.util
from argparse import Namespace

import numpy as np
import torch
from conftest import ROOT

import data


class Seen(torch.nn.Module):
    """Stands in for the decoder and keeps what it is called with."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.calls = []

    def forward(self, tokens, targets):
        self.calls.append((tokens, targets))
        return self.weight * targets.numel()


class Counting(data.Documents):
    """A document of the tokens 1000, 1001, … for data.Batches."""

    def __init__(self):
        self.starts, self.tokens, self.masked = np.array([0, 500]), np.arange(1000, 1500), None


def test_a_step_has_windows_of_both_kinds_and_the_tokens_that_follow():
    spec = importlib.util.spec_from_file_location("make_tiny", ROOT / "assets" / "make_tiny.py")
    make_tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_tiny)
    model, pool = Seen(), np.arange(90, dtype=np.uint16).reshape(10, 9)
    batches = data.Batches(Counting(), 0, method="pi", train_len=8, target_len=8)
    make_tiny.train(model, pool, batches, Namespace(lr=1e-3, batch_size=6, steps=2), "cpu")
    assert len(model.calls) == 2
    for tokens, targets in model.calls:
        assert tokens.shape == (6, 8) and torch.equal(targets, tokens + 1)
        assert (tokens[:3] < 90).all() and (tokens[3:] >= 1000).all()
