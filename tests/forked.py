"""Run a program on n ranks of this machine: python tests/forked.py N MODULE,MODULE... PROGRAM ARGUMENTS...

The ranks are forked from this process, which has imported the modules: torch is loaded once, where torchrun loads it
n + 1 times. A rank that fails takes the others with it; the status is 1 then.
"""

import importlib
import os
import runpy
import signal
import socket
import sys
import traceback


def rank_of(number: int, world: int, port: int, program: str) -> int:
    """Fork a rank; in the parent its process id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        ranks = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": world, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in ranks.items()} | {"MASTER_ADDR": "127.0.0.1"}
        sys.argv = sys.argv[3:]
        runpy.run_path(program, run_name="__main__")
        status = 0
    except BaseException:  # noqa: BLE001  whatever it was, the parent must not be run twice
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    world, program = int(sys.argv[1]), sys.argv[3]
    for name in sys.argv[2].split(","):
        importlib.import_module(name)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = {rank_of(number, world, port, program) for number in range(world)}
    failed = False
    while ranks:
        pid, status = os.wait()
        ranks.discard(pid)
        if status and not failed:
            failed = True
            for other in ranks:
                os.kill(other, signal.SIGKILL)
    sys.exit(failed)


if __name__ == "__main__":
    main()
