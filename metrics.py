"""What a run writes and shows of each step: metrics.jsonl, TensorBoard's events, the progress line."""
import json
import math
import os
import sys

from tqdm import tqdm


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
