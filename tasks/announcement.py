"""What is said before a training run: what it will do, what it needs, and what speaks against it.

All of it is lines for people. Where one names options, `as_options` turns them, {option: value}, into words
of the command line, since how they are spelt is known there alone.
"""

from dataclasses import dataclass

import fsdp
from data import Batches
from hf import loaders, scaling
from tasks import plan

# A run that goes over its texts more often warns. Up to four times a text teaches nearly as much as a new one
# (Muennighoff et al. 2023).
MANY_PASSES = 4
CPU_FLOPS = 1e11  # operations a second of a few cores, roughly
H100_FLOPS = 0.4 * fsdp.PEAK_FLOPS["H100"]  # 29 to 56% were measured, see RESULTS.md
PARTS = ("weights", "gradients", "optimizer", "activations")  # of plan.Memory, on the device that computes


def of_run(args, base, config, as_options):
    """Return lines that say what a run makes of its model, and who will compute that.

    args: the completed options of train.py. base, config: the Config before and after the window was
    extended.
    """
    window = base.max_position_embeddings
    windows = f"window {window:,} -> {args.target_len:,}"
    if args.target_len == window:
        windows = f"the window of {window:,} tokens stays as it is"
    interpolation = f"{args.rope} by {args.factor:g}" if args.factor else args.rope
    if not scaling.interpolates(args.rope, args.factor):
        interpolation = "no interpolation"
    episodes = f", {args.retrieval:.0%} of the examples are episodes" if args.retrieval else ""
    method = f"{args.method}, {interpolation}{episodes}"
    lines = [f"{args.model}: {windows}, {method} (recipe {args.recipe})"]
    earlier = base.rope_scaling or {}
    if "factor" in earlier:
        together = "that stays"
        if args.factor and args.factor > 1:
            together = f"{interpolation} comes on top, {config.rope_scaling['factor']:g} in all"
        scaled = f"{earlier['rope_type']} by {earlier['factor']:g}"
        lines.append(f"the model is scaled already ({scaled}); {together}")
    remarks = []
    for what, mending in loaders.differences(config, args.target_len / window):
        remarks.append(what + (f" ({as_options(mending)} mends it)" if mending else ""))
    if remarks:
        lines.append(f"not every loader will compute this model: {'; '.join(remarks)}")
    if args.lora_rank:
        beside = f" and of {args.lora_train}" if args.lora_train else ""
        lines.append(f"LoRA of rank {args.lora_rank} on {args.lora_targets}{beside}")
    return lines


def of_gpus(needs, ways):
    """Return lines with the memory that each GPU needs, and the time, roughly.

    needs: the Needs of the run. ways: {number of GPUs: plan.Way}.
    """
    sizes = []
    for n, way in ways.items():
        sizes.append(f"{gib(plan.memory(needs.shape, way).total + plan.CUDA_CONTEXT)} on {n}")
    time = duration(needs.flops / H100_FLOPS)
    return [
        f"GPU memory by the number of GPUs: {', '.join(sizes)}",
        f"time on one H100, if it reaches 40% of its peak: {time}",
    ]


@dataclass(frozen=True)
class Needs:
    """What a run needs of texts, memory and disk.

    batch_size: examples in a step over all processes. checkpoints: how many are on the disk at the same time.
    of_recipe: tokens that the recipe gives a step, None where it does not decide.
    """

    shape: plan.Shape
    way: plan.Way
    steps: int
    batch_size: int
    batches: Batches
    checkpoints: int
    room: plan.Room
    of_recipe: int | None = None

    @property
    def step_tokens(self):
        """Tokens in a step."""
        return self.batch_size * self.way.train_len

    @property
    def tokens(self):
        """Tokens that the run trains on."""
        return self.steps * self.step_tokens

    @property
    def passes(self):
        """How often it reads its texts."""
        return self.tokens / self.batches.usable_tokens

    @property
    def whole(self):
        """The memory of a whole process, in bytes."""
        return plan.of_process(self.shape, self.way, self.room)

    @property
    def flops(self):
        """The operations of the run."""
        return self.tokens * self.shape.config.flops_per_token(self.batches.mean_window, frozen=self.is_part)

    @property
    def place(self):
        """Where a process computes, in words."""
        return "CPU" if self.room.on_cpu else "GPU"

    @property
    def is_part(self):
        """Whether only a part of the weights is trained."""
        return self.shape.trained < self.shape.parameters

    @property
    def checkpoint_bytes(self):
        """The size of a checkpoint: the trained weights and AdamW's two moments."""
        return 3 * self.way.param_bytes * self.shape.trained

    @property
    def model_bytes(self):
        """The size of the model that the run writes, in the dtype that it came in."""
        return {"float32": 4}.get(self.shape.config.dtype, 2) * self.shape.parameters

    @property
    def saving_bytes(self):
        """The host's memory that a process has in use while its copy of a checkpoint is written."""
        held = self.whole if self.room.on_cpu else plan.memory(self.shape, self.way).host
        return held + self.checkpoint_bytes / self.way.processes

    def lines(self):
        """Return what is needed, a line each for the run, its texts, memory and disk."""
        batches, need = self.batches, plan.memory(self.shape, self.way)
        n_used = len(batches.documents) - batches.n_too_short
        size = f"{self.batch_size} x {self.way.train_len:,} tokens"
        parts = {name: getattr(need, name) for name in PARTS} | {"the rest": self.whole - need.total}
        in_words = ", ".join(f"{name} {gib(n)}" for name, n in parts.items() if n)
        host = f", and {gib(need.host)} of the host's" if need.host and not self.room.on_cpu else ""
        trained = f", of which {self.shape.trained:,} are trained" if self.is_part else ""
        counted = ""
        if batches.counted_share < 1:
            share = f"{batches.counted_share:.1%} of the tokens are answers or plain text"
            counted = f"; {share}, and only these count"
        several = f", {self.checkpoints} of them at a time" if self.checkpoints > 1 else ""
        of_memory = f"{gib(self.whole)} of {gib(self.room.memory)} on this {self.place}{host}"
        return [
            f"plan: {self.steps:,} steps of {size} on {self.way.processes} process(es), {self.tokens:,} "
            f"tokens; {self.shape.parameters:,} parameters{trained}",
            f"texts: {batches.usable_tokens:,} tokens in {n_used:,} document(s), each read "
            f"{self.passes:,.2f} times; {batches.n_too_short:,} document(s) too short and left out{counted}",
            f"memory of a process: {of_memory}; at the peak {in_words}",
            f"disk: {gigabytes(self.model_bytes)} for the model, {gigabytes(self.checkpoint_bytes)} for a "
            f"checkpoint{several}; {gigabytes(self.room.disk)} free",
        ]

    def warnings(self, as_options):
        """Return what speaks against the run, a line each."""
        found = []
        n_used = len(self.batches.documents) - self.batches.n_too_short
        # Rounding to whole examples of each process alone makes less than half as many again.
        if self.of_recipe and self.step_tokens > 1.5 * self.of_recipe:
            n = self.way.processes
            found.append(
                f"a step has {self.step_tokens:,} tokens instead of the recipe's {self.of_recipe:,}, because "
                f"each of {n} process(es) takes an example: take shorter ones, or fewer steps"
            )
        if self.passes > MANY_PASSES:
            found.append(
                f"that is {self.passes:,.0f} passes over these texts, which will be learnt by heart: add more"
            )
        if self.batches.n_too_short > n_used:
            found.append(
                f"most documents are not longer than an example of {self.way.train_len:,} tokens: train on "
                "shorter ones, or put texts together that belong together"
            )
        if self.room.disk < self.model_bytes + self.checkpoints * self.checkpoint_bytes:
            found.append("the disk has too little room for that: free some, or take another one")
        seconds = self.flops / CPU_FLOPS
        if self.room.on_cpu and seconds > 86400:
            found.append(f"a CPU needs about {duration(seconds)} for this: take a GPU, or a smaller model")
        if self.whole > self.room.memory:
            found.append(f"the memory of this {self.place} is too small; {self.mending(as_options)}")
        elif self.saving_bytes > self.room.host:
            of_host = f"{gib(self.saving_bytes)} of the host's memory, which has {gib(self.room.host)} for it"
            remedy = f"take a larger one; {as_options({'save_minutes': 0})} writes none while it goes well"
            found.append(f"while it writes a checkpoint a process needs {of_host}: {remedy}")
        return found

    def mending(self, as_options):
        """Return in words what gives a run enough memory that does not have it."""
        other_machine = "take a larger machine" if self.room.on_cpu else "spread it over more GPUs"
        fitting = plan.way_that_fits(self.shape, self.way, self.room)
        if fitting is None:
            if self.is_part:
                return other_machine
            adapters = as_options({"lora_rank": 16})
            return f"no option that trains all weights mends that: try {adapters}, or {other_machine}"
        before, changed = options_of(self.way), {}
        for option, value in options_of(fitting).items():
            if value != before[option]:
                changed[option] = value
        need = gib(plan.of_process(self.shape, fitting, self.room))
        return f"{as_options(changed)} makes it {need}, or {other_machine}"


def options_of(way):
    """Return the options of train.py, {option: value}, with which a plan.Way saves memory."""
    return {
        "micro_batch_size": way.examples,
        "activation_checkpointing": way.activation_checkpointing,
        "param_dtype": {2: "bfloat16", 4: "float32"}[way.param_bytes],
        "cpu_offload": way.cpu_offload,
    }


# ---------------------------------------------------------------- sizes and times in words


def gib(n):
    """Return a number of bytes in words, in GiB, as memory is counted."""
    return f"{n / 2**30:,.1f} GiB" if n >= 2**30 / 10 else f"{n / 2**20:,.0f} MiB"


def gigabytes(n):
    """Return a number of bytes in words, in GB, as disks are counted."""
    return f"{n / 1e9:,.1f} GB" if n >= 1e8 else f"{n / 1e6:,.0f} MB"


def duration(seconds):
    """Return a time in words, with one unit, or two where the first is small: "3 hours and 20 minutes"."""
    units = (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1))
    for (name, unit), (smaller, part) in zip(units, units[1:]):
        if seconds >= unit:
            whole = _count(int(seconds // unit), name)
            rest = int(seconds % unit // part)
            return f"{whole} and {_count(rest, smaller)}" if rest and seconds < 10 * unit else whole
    return _count(max(1, round(seconds)), "second")


def _count(n, name):
    """Return a number with its noun."""
    return f"{n} {name}" if n == 1 else f"{n} {name}s"
