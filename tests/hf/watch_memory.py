"""Convert a checkpoint and print the most memory, in bytes, that the process had beyond what it began with.

    watch_memory.py SOURCE DEST [WINDOW]

Only memory of its own counts. Pages of mapped files do not, since the system can take them back.
"""

import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import hf.gguf_file  # noqa: E402, F401 (loaded before the count begins)
from hf import convert, writing  # noqa: E402


def own_memory():
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024


def watch():
    global most
    while not done.wait(0.001):
        most = max(most, own_memory())


writing.SHARD_BYTES = 12 * 2**20
source, dest = sys.argv[1:3]
window = int(sys.argv[3]) if sys.argv[3:] else None
before = most = own_memory()
done = threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
try:
    convert.convert(source, dest, window)
finally:
    done.set()
    watcher.join()
print(most - before)
