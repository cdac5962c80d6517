"""A user's mistake is one line on stderr and exit code 2, never a stack trace."""
import errno
import os
import sys
import time

import torch


class UserError(Exception):
    """What is wrong, where, and what to do, in one line. Raise it where a user's input comes in."""


def run(main):
    """Call `main()` and turn a UserError, a file that cannot be used or full memory into one line and exit code 2."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as error:
        caught, message = error, str(error)
    except OSError as error:
        caught = error
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"the disk is full ({error.filename or 'while writing'}): free some space and run again; earlier files are whole"
        elif error.filename:
            message = f"{error.filename}: {error.strerror}; check the path and its permissions"
        else:
            raise
    except MemoryError as error:
        caught, message = error, "this machine's memory is full: lower the lengths or the batch, or take a larger machine"
    except torch.OutOfMemoryError as error:
        caught = error
        message = "the GPU's memory is full: training, lower --micro_batch_size or add --activation_checkpointing full; evaluating, lower --lengths"
    else:
        return
    everywhere = isinstance(caught, UserError)  # under torchrun every process meets the same mistake: say it once a machine
    if os.environ.get("LOCAL_RANK", "0") == "0" or not everywhere:
        print(f"error: {message}", file=sys.stderr)
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        time.sleep(10)  # torchrun ends all processes when the first one ends: that shall be the one that says it
    sys.exit(2)
