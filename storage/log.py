"""What a run writes and shows of each step: metrics.jsonl, TensorBoard's events, and the progress line."""

import json
import math
import os
import sys
from pathlib import Path

from tqdm import tqdm

from storage.errors import naming
from storage.files import write_json
from storage.processes import is_process_0

FINISHED = "finished.json"  # what a run writes last, once it has made all its steps


class Log:
    """The file metrics.jsonl of a run: a line for each step, a JSON object."""

    def __init__(self, out, first_step, tensorboard=False):
        """Open the file in the folder `out` and cut it back to its first `first_step` lines.

        The steps after them will be done again. tensorboard: also write events into out/tensorboard.
        """
        self.path = out / "metrics.jsonl"
        self.file = open(self.path, "a+b", buffering=0)  # each line is written at once
        self.file.seek(0)
        kept_bytes = sum(len(self.file.readline()) for _ in range(first_step))
        if self.file.seek(0, os.SEEK_END) > kept_bytes:
            self.file.truncate(kept_bytes)
        self.board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(out / "tensorboard", purge_step=first_step + 1)

    def write(self, line):
        """Write the figures of a step, a dict in which `step` is its number."""
        line = without_nan(line)
        with naming(self.path):
            self.file.write(json.dumps(line).encode() + b"\n")
        if self.board is None:
            return
        validation = {f"validation/{length}": nats for length, nats in line.get("validation", {}).items()}
        for key, value in (line | validation).items():
            if type(value) in (int, float) and key != "step":
                self.board.add_scalar(key, value, line["step"])
        self.board.flush()


def without_nan(value):
    """Return the value, or the dict of values, with None for every NaN and infinity: JSON knows neither."""
    if isinstance(value, dict):
        return {key: without_nan(v) for key, v in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def progress_bar(first_step, steps):
    """Return tqdm's bar over the steps from first_step on. Process 0 draws it, where there is a terminal."""
    disable = None if is_process_0() else True  # None: unless there is a terminal
    return tqdm(range(first_step, steps), initial=first_step, total=steps, disable=disable)


def show_progress(bar, line):
    """Show the figures of a step beside tqdm's bar, or without a terminal as about 20 lines in all.

    The first steps are among these: they tell soon that a run goes, and how fast.
    """
    shown = {
        "loss": f"{line['loss']:.3f}",
        "tok/s": f"{line['tokens_per_second']:,.0f}",
        "MFU": f"{line['mfu']:.0%}" if line["mfu"] else "-",
        "GiB": f"{line['peak_memory_gib']:.1f}",
    }
    bar.set_postfix(shown, refresh=False)
    if bar.disable and (line["step"] <= 2 or line["step"] % max(1, bar.total // 20) == 0):
        figures = ", ".join(f"{key} {value}" for key, value in shown.items())
        tqdm.write(f"step {line['step']} of {bar.total}: {figures}", file=sys.stderr)


def mark_finished(out, steps):
    """Write the file that says that the run in `out` made all its steps and wrote its model.

    The model alone does not tell: an interrupted run writes one too.
    """
    write_json(out / FINISHED, {"steps": steps})


def unmark_finished(out):
    """Remove that file, because the run in `out` goes on."""
    (out / FINISHED).unlink(missing_ok=True)


def is_finished(out):
    """Return whether the run in `out` made all its steps, and its model is there."""
    return (out / FINISHED).exists() and (out / "model").exists()


def half_trained_run(model):
    """Return the folder of the run whose half-trained model this folder is, None if it is no such model."""
    folder = Path(model) if Path(model).name else Path(model).absolute()  # "." has neither name nor parent
    out = folder.parent
    is_of_run = folder.name == "model" and (out / "args.json").is_file()
    return out if is_of_run and not (out / FINISHED).exists() else None
