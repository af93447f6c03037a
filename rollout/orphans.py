"""vLLM's engine ends with its server, although the system does not end it with that."""

import os
import threading
import time
from collections.abc import Mapping
from contextlib import suppress

import psutil

SERVER_PID = "SPIN_SERVER_PID"  # in the environment of a server's processes
POLL_SECONDS = 1.0


def end_engine_with_server(environment: Mapping[str, str]) -> None:
    """Kills this process's parent, vLLM's engine, once the server that started the engine is gone.

    verl ties the process that holds the model to its parent. Where that is the engine, nothing ties the engine to the
    server: of a server that was killed it would go on, and keep the device from the next run.
    """
    server, engine = environment.get(SERVER_PID), os.getppid()
    if server is None or int(server) in (engine, os.getpid()):  # the model lies in the engine or in the server itself
        return
    try:
        watched = psutil.Process(int(server)), psutil.Process(engine)
        if watched[1].ppid() != int(server):  # this process was inherited, by who is no engine
            return
    except psutil.NoSuchProcess:
        return  # the end is under way
    threading.Thread(target=_kill_after, args=watched, name="end-engine-with-server", daemon=True).start()


def _kill_after(server: psutil.Process, engine: psutil.Process) -> None:
    while server.is_running():
        time.sleep(POLL_SECONDS)
    with suppress(psutil.NoSuchProcess):
        engine.kill()
