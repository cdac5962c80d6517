"""What a run writes and shows of each step: metrics.jsonl, TensorBoard's events, the progress line; and its validation loss."""
import json
import math
import os
import sys
from itertools import islice

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
        tqdm.write(f"step {line['step']}: " + ", ".join(f"{key} {value}" for key, value in shown.items()), file=sys.stderr)


class Validation:
    """Loss on the first windows of other texts, tokens and positions contiguous: what the model is for, not how it is trained."""

    def __init__(self, args, tokenizer, windows=16):
        lengths = errors.token_counts("--eval_lengths", args.eval_lengths or str(args.train_len))
        documents = data.prepare(args.eval_data, tokenizer, weights.cache_dir())
        long_enough = (documents[i] for i in np.argsort(-np.diff(documents.starts), kind="stable"))
        bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        rows = [np.array([*bos, *document[: lengths[-1] + 1]], dtype=np.int64) for document in islice(long_enough, windows)]
        if len(rows[0]) <= lengths[-1]:
            needed = f"windows of {lengths[-1]} need {lengths[-1] + 1 - len(bos)}"
            raise UserError(f"--eval_data: the longest document has {len(rows[0]) - len(bos)} tokens, {needed}; add longer texts")
        self.rows = {n: torch.from_numpy(np.stack([row[: n + 1] for row in rows if len(row) > n])) for n in lengths}

    @torch.no_grad()
    def __call__(self, model, device):
        """{length: nats a token}. Every process scores its share, and as many windows as the others: FSDP gathers weights together."""
        rank, world, result = dist.get_rank(), dist.get_world_size(), {}
        for n, rows in self.rows.items():
            total = torch.zeros(2, device=device, dtype=torch.float64)
            for i in range(rank, -(-len(rows) // world) * world, world):
                row = rows[min(i, len(rows) - 1)][None].to(device)
                loss = model(row[:, :-1], targets=row[:, 1:])
                if i < len(rows):
                    total += torch.stack((loss.double(), loss.new_tensor(n).double()))
            dist.all_reduce(total)
            result[n] = (total[0] / total[1]).item()
        return result
