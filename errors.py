"""A user's mistake is one line on stderr and exit code 2, never a stack trace."""
import errno
import os
import sys


class UserError(Exception):
    """What is wrong, where, and what to do, in one line. Raise it where a user's input comes in."""


def run(main):
    """Call `main()` and turn a UserError or a full disk into one line and exit code 2."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as error:
        message = str(error)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        message = f"the disk is full ({error.filename or 'while writing'}): free some space and run again; earlier files are whole"
    else:
        return
    if os.environ.get("RANK", "0") == "0":  # under torchrun every rank meets the same mistake: say it once
        print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
