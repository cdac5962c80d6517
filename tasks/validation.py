"""Measure the loss on other texts during training."""

import math

import numpy as np
import torch
import torch.distributed as dist

from hf.tokenizer import bos_ids
from storage.errors import InputError

MOST_DOCUMENTS = 16  # that are scored


class Validation:
    """Measures the loss on whole stretches of text, as the model is used: without chunks and skips.

    Windows of every length score the same tokens, with more and more of the text before them: the last ones
    of the longest window, which begins each document, as many as the shortest window has.
    """

    def __init__(self, lengths, documents, tokenizer):
        """Cut the windows. Raise InputError if no document fills the longest.

        lengths: of the windows, in tokens. documents: a data.Documents. The first MOST_DOCUMENTS that fill
        the longest window are taken.
        """
        bos = bos_ids(tokenizer)
        longest = max(lengths)
        needed = longest + 1 - len(bos)  # each window reads `length` tokens and predicts one more
        long_enough = [documents[i] for i in range(len(documents)) if len(documents[i]) >= needed]
        long_enough = long_enough[:MOST_DOCUMENTS]
        if not long_enough:
            has = np.diff(documents.starts).max()
            needs = f"validation windows of {longest} need {needed}"
            raise InputError(f"the longest validation document has {has} tokens, {needs}; add longer texts")
        self.scored = min(lengths)  # tokens of each window
        self.windows = {}  # {length: int64 (documents, length + 1)}
        for length in sorted(lengths):
            begin = longest - length  # all windows of a document end at the same token
            rows = [np.concatenate((bos, document[begin:needed])) for document in long_enough]
            self.windows[length] = torch.from_numpy(np.stack(rows).astype(np.int64))

    @torch.no_grad()
    def __call__(self, model, device):
        """Return {length: mean loss in nats a token}.

        All processes of the group call it together, and each scores its share of the windows.
        """
        rank, world = dist.get_rank(), dist.get_world_size()
        losses = {}
        for length, windows in self.windows.items():
            nats = torch.zeros((), device=device, dtype=torch.float64)
            for turn in range(math.ceil(len(windows) / world)):
                i = turn * world + rank
                # FSDP gathers weights in all processes together, so one that has no window left reads the
                # last one again.
                window = windows[min(i, len(windows) - 1)][None].to(device)
                loss = model(window[:, :-1], targets=window[:, -self.scored :])
                if i < len(windows):
                    nats += loss
            dist.all_reduce(nats)
            losses[length] = nats.item() / (len(windows) * self.scored)
        return losses
