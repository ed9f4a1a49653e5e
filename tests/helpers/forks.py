"""Functions that run in a fork of this process."""

import os
import sys
import traceback


def forked(function, *arguments):
    """Call a function in a child process and return its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            function(*arguments)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
