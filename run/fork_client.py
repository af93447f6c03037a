"""What Ray starts in place of Python for a worker: asks fork_server.py for one, with the command, and ends.

    python -I -S fork_client.py SOCKET SCRIPT [ARGUMENT ...]

Starts in a hundredth of a second, as it needs nothing but the standard library.
"""

import json
import os
import resource
import socket
import sys

PRIORITY = "/proc/self/oom_score_adj"  # Ray raises it, so that the system ends workers first when memory runs out


def main() -> None:
    path, *command = sys.argv[1:]
    with open(PRIORITY) as priority:
        request = {
            "command": command,
            "environment": dict(os.environ),
            "folder": os.getcwd(),
            "open_files": resource.getrlimit(resource.RLIMIT_NOFILE),
            "ended_first": int(priority.read()),
        }
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.connect(path)
            socket.send_fds(server, [b"."], [0, 1, 2])  # a worker writes where Ray has its own output go
            server.sendall(json.dumps(request).encode())
            server.shutdown(socket.SHUT_WR)
            if server.recv(1):
                return
    except OSError as error:
        sys.exit(f"the process that workers are forked from cannot be asked: {error}")
    sys.exit("the process that workers are forked from has ended")


if __name__ == "__main__":
    main()
