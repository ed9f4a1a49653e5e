"""Writers of files that are killed at each of their changes of the file system."""

import os
import signal
import sys

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "fcntl.flock", "open")


def killed_at(number, function, events=CHANGES):
    """Call a function in a forked child that is killed before its ``number``-th change of the file system.

    Args:
        number: The number, from 1 on.
        function: The function.
        events: The changes that count, by their names as audit events; by default all.

    Returns:
        Whether the child was killed. Otherwise it has fewer changes, and the function has ended well.
    """
    child = os.fork()
    if child == 0:
        seen = []

        def audit(event, arguments):
            if event in events and (event != "open" or arguments[2] & (os.O_WRONLY | os.O_RDWR)):
                seen.append(event)
                if len(seen) == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        code = 1
        try:
            sys.addaudithook(audit)
            function()
            code = 0
        finally:
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0
