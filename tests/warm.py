"""A Python that has imported the libraries already and forks for each request: a start of a command
costs milliseconds, not the seconds that `import torch` takes, and there are hundreds in the tests.
Modules of this repository are imported anew each time.

Reads requests as JSON lines {"script", "arguments", "processes", "cwd", "env", "stdout", "stderr",
"timeout"} and answers each with its exit code. processes: None, or so many as torchrun would start,
with what torchrun tells them; the first that fails ends all. (What torchrun itself does is tested with
torchrun, in test_survival.py.)
"""

import json
import os
import runpy
import signal
import socket
import sys

import numpy  # noqa: F401
import safetensors.torch  # noqa: F401
import tokenizers  # noqa: F401
import torch.distributed.checkpoint  # noqa: F401
import torch.distributed.fsdp  # noqa: F401
import tqdm  # noqa: F401

for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if not child:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()

# In the child, at the top level: it ends as any script does, by its last line, sys.exit or an exception.
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
for number, name in (1, "stdout"), (2, "stderr"):
    os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
os.chdir(request["cwd"])
os.environ.clear()
os.environ.update(request["env"])
if request["processes"]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    world = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": request["processes"],
        "TORCHELASTIC_RUN_ID": "none",
    }
    workers = set()
    for rank in range(request["processes"]):
        if worker := os.fork():
            workers.add(worker)
        else:
            os.environ.update(
                {key: str(value) for key, value in (world | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            )
            break
    else:
        failed = False
        while workers:
            worker, status = os.wait()
            workers.remove(worker)
            if status and not failed:
                failed = True
                for other in workers:
                    os.kill(other, signal.SIGTERM)
        sys.exit(failed)
signal.alarm(request["timeout"])
sys.argv = [request["script"], *request["arguments"]]
sys.path[0] = os.path.dirname(request["script"])
runpy.run_path(request["script"], run_name="__main__")
