"""A Python that has imported the libraries already and forks for each request.

A command then starts in a tenth of a second instead of the seconds that importing PyTorch takes, and the
tests start many. Modules of this repository are imported anew each time.

It reads a request as a line of JSON with these keys, and answers with the list of the process ids that it
started:

    script       a path, or the name of a module as `python -m` takes it
    arguments    list of strings
    processes    None, or a number: so many as torchrun would start, with what torchrun tells them. The
                 first that fails ends all. (Tests of torchrun itself, in test_interruptions.py, start it.)
    cwd, env     folder and environment
    stdout, stderr, code    files for the output, and for the exit code once all processes have ended
    timeout      in seconds
"""

import gc
import json
import os
import runpy
import signal
import socket
import sys

import numpy  # noqa: F401
import safetensors.torch  # noqa: F401
import tokenizers  # noqa: F401
import torch.distributed.checkpoint.state_dict  # noqa: F401
import torch.distributed.fsdp  # noqa: F401
import tqdm  # noqa: F401

if sys.argv[1:] == ["cpu"]:  # with a GPU these initialise CUDA, which no forked process can use then
    import torch._dynamo.backends.debugging  # noqa: F401 (every optimizer imports torch._dynamo)
    import torch._inductor.pattern_matcher  # noqa: F401 (torch.compile imports it, whatever its backend)

# Garbage collection in a forked process would write to all objects, and so copy the memory that they share.
gc.collect()
gc.freeze()
keepers = []
for line in sys.stdin:
    request = json.loads(line)
    keeper = os.fork()
    if not keeper:
        break
    keepers = [other for other in keepers if os.waitpid(other, os.WNOHANG) == (0, 0)] + [keeper]
else:
    for keeper in keepers:
        os.waitpid(keeper, 0)
    sys.exit()

# In a keeper, which starts the processes of one request and waits for them.
environments = [{}]
if request["processes"]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    everywhere = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(request["processes"]),
        "LOCAL_WORLD_SIZE": str(request["processes"]),
        "TORCHELASTIC_RUN_ID": "none",
    }
    ranks = map(str, range(request["processes"]))
    environments = [everywhere | {"RANK": rank, "LOCAL_RANK": rank} for rank in ranks]
outputs = {}
for name in ("stdout", "stderr"):
    outputs[name] = os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
workers = []
for own_environment in environments:
    worker = os.fork()
    if not worker:
        break
    os.setpgid(worker, worker)  # a test that kills it kills what it started too, and not this keeper
    workers.append(worker)
else:
    print(json.dumps(workers), flush=True)
    code = 0
    while workers:
        worker, status = os.wait()
        workers.remove(worker)
        if status and not code:
            code = os.waitstatus_to_exitcode(status)
            for other in workers:
                os.kill(other, signal.SIGTERM)
    if code and request["processes"]:
        code = 1  # as torchrun's own
    with open(request["code"] + ".part", "w") as f:
        f.write(str(code))
    os.rename(request["code"] + ".part", request["code"])
    os._exit(0)

# In a worker, at the top level: it ends as any script does, by its last line, sys.exit or an exception.
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
os.dup2(outputs["stdout"], 1)
os.dup2(outputs["stderr"], 2)
os.chdir(request["cwd"])
os.environ.clear()
os.environ.update(request["env"] | own_environment)
signal.alarm(request["timeout"])
sys.argv = [request["script"], *request["arguments"]]
if request["script"].endswith(".py"):
    sys.path[0] = os.path.dirname(request["script"])
    runpy.run_path(request["script"], run_name="__main__")
else:
    sys.path[0] = request["root"]
    runpy.run_module(request["script"], run_name="__main__", alter_sys=True)
