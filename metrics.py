"""What a run writes and shows of each step: metrics.jsonl, TensorBoard's events, the progress line; and its validation loss."""
import json
import math
import os
import sys

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import errors
import weights
from errors import UserError


class Log:
    def __init__(self, out, first, tensorboard=False):
        """metrics.jsonl in a folder `out`, cut back to the first `first` lines: the steps after them will be done again. tensorboard: write
        events into out/tensorboard too."""
        self.file, self.board = open(out / "metrics.jsonl", "a+b", buffering=0), None  # a line a step reaches the disk at once
        self.file.seek(0)
        kept = sum(len(self.file.readline()) for _ in range(first))
        if self.file.seek(0, os.SEEK_END) > kept:
            self.file.truncate(kept)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(out / "tensorboard", purge_step=first + 1)

    def write(self, line):
        """A dict of a step's figures."""
        line = without_nan(line)
        self.file.write(json.dumps(line).encode() + b"\n")
        if self.board:
            for key, value in (line | {f"validation/{n}": v for n, v in line.get("validation", {}).items()}).items():
                if type(value) in (int, float) and key != "step":
                    self.board.add_scalar(key, value, line["step"])
            self.board.flush()


def without_nan(value):
    """JSON knows no NaN: null."""
    if isinstance(value, dict):
        return {key: without_nan(v) for key, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show_progress(bar, line):
    """The figures of a line of metrics.jsonl beside tqdm's bar; where there is no terminal, a line of text now and then."""
    mfu = f"{line['mfu']:.0%}" if line["mfu"] else "-"
    shown = {"loss": f"{line['loss']:.3f}", "tok/s": f"{line['tokens_per_second']:,.0f}", "MFU": mfu, "GiB": f"{line['peak_memory_gib']:.1f}"}
    bar.set_postfix(shown, refresh=False)
    if bar.disable and line["step"] % max(1, bar.total // 20) == 0:
        tqdm.write(f"step {line['step']} of {bar.total}: " + ", ".join(f"{key} {value}" for key, value in shown.items()), file=sys.stderr)


class Validation:
    """Loss on other texts, tokens and positions contiguous: what the model is for, not how it is trained. At every length of the same tokens, with
    more and more of the text before them: the last ones of the longest window, which begins each document, as many as the shortest has."""

    def __init__(self, args, tokenizer, documents=16):
        lengths = errors.token_counts("--eval_lengths", args.eval_lengths or str(args.train_len))
        texts = data.prepare(args.eval_data, tokenizer, weights.cache_dir())
        bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        needed = lengths[-1] + 1 - len(bos)
        rows = [d[:needed] for d in texts if len(d) >= needed][:documents]
        if not rows:
            longest = np.diff(texts.starts).max()
            raise UserError(f"--eval_data: the longest document has {longest} tokens, windows of {lengths[-1]} need {needed}; add longer texts")
        self.scored = lengths[0]
        self.rows = {
            n: torch.from_numpy(np.stack([np.concatenate((bos, row[len(bos) - n - 1 :])) for row in rows]).astype(np.int64)) for n in lengths
        }

    @torch.no_grad()
    def __call__(self, model, device):
        """{length: nats a token}. Every process scores its share, and as many windows as the others: FSDP gathers weights together."""
        rank, world, result = dist.get_rank(), dist.get_world_size(), {}
        for n, rows in self.rows.items():
            nats = torch.zeros((), device=device, dtype=torch.float64)
            for i in range(rank, -(-len(rows) // world) * world, world):
                row = rows[min(i, len(rows) - 1)][None].to(device)
                loss = model(row[:, :-1], targets=row[:, -self.scored :])
                if i < len(rows):
                    nats += loss
            dist.all_reduce(nats)
            result[n] = nats.item() / (len(rows) * self.scored)
        return result
