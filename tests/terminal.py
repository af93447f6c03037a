"""Runs a command on a terminal of its own, which SIGUSR1 closes as a window is: python terminal.py COMMAND ...

What the command prints is dropped; the exit code is the command's.
"""

import os
import pty
import signal
import sys

command, terminal = pty.fork()
if command == 0:
    os.execvp(sys.argv[1], sys.argv[1:])
signal.signal(signal.SIGUSR1, lambda *_: os.close(terminal))
try:
    while os.read(terminal, 4096):
        pass
except OSError:  # closed here, or by the command's end
    pass
_, status = os.waitpid(command, 0)
sys.exit(os.waitstatus_to_exitcode(status))
