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

    The longest window begins with its document, and all windows of a document end at the same token. Each
    scores its last tokens, as many as the shortest window has. So all lengths score the same tokens, and a
    longer window only sees more of the text before them.
    """

    def __init__(self, lengths, documents, tokenizer):
        """Cut the windows. Raise InputError if no document fills the longest.

        lengths: of the windows, in tokens. documents: a data.Documents. The first MOST_DOCUMENTS that fill
        the longest window, and have tokens at its end that count, are taken.
        """
        bos = bos_ids(tokenizer)
        longest = max(lengths)
        needed = longest + 1 - len(bos)  # each window reads `length` tokens and predicts one more
        self.scored = min(lengths)  # tokens of each window
        lengths_of_documents = np.diff(documents.starts)
        if lengths_of_documents.max() < needed:
            has = lengths_of_documents.max()
            needs = f"validation windows of {longest} need {needed}"
            raise InputError(f"the longest validation document has {has} tokens, {needs}; add longer texts")
        chosen, weights = [], []
        for i in np.flatnonzero(lengths_of_documents >= needed):
            token_weights = documents.token_weights(i, needed - self.scored, needed)
            if token_weights.any():
                chosen.append(documents[i])
                weights.append(token_weights)
            if len(chosen) == MOST_DOCUMENTS:
                break
        if not chosen:
            where = f"tokens {needed - self.scored} to {needed} of any validation document"
            raise InputError(f"no answers among {where}, and only answers count; add texts or count all")
        self.token_weights = torch.from_numpy(np.stack(weights))  # float32 (documents, scored)
        self.windows = {}  # {length: int64 (documents, length + 1)}
        for length in sorted(lengths):
            begin = longest - length  # all windows of a document end at the same token
            rows = [np.concatenate((bos, document[begin:needed])) for document in chosen]
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
                row = min(i, len(windows) - 1)
                window, token_weights = (x[row][None].to(device) for x in (windows, self.token_weights))
                targets = window[:, -self.scored :]
                loss = model(window[:, :-1], targets=targets, token_weights=token_weights)
                if i < len(windows):
                    nats += loss
            dist.all_reduce(nats)
            losses[length] = nats.item() / self.token_weights.sum(dtype=torch.float64).item()
        return losses
