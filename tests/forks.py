"""The command line in processes of its own, without paying each time for the imports.

`python tests/forks.py` imports what `locas` needs and nothing more, then forks: every line of JSON on its standard
input is answered by one line. {"args", "in", "out", "err"} (names of files) starts `locas ARGS` and is answered by its
process id; {"wait": pid} by its exit status, or null while it runs. `processes.Forks` is the other side.
"""

import json
import os
import sys
import traceback
from typing import Any

import torch
import transformers.models.llama.modeling_llama  # noqa: F401 - the built-in backbone's, else imported in every fork
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

import locas.cli

FILES = ((0, "in", os.O_RDONLY), (1, "out", os.O_WRONLY), (2, "err", os.O_WRONLY))


def run(request: dict[str, Any]) -> None:
    """What the fork does; it never returns."""
    status = 1
    try:
        for number, name, how in FILES:
            os.dup2(os.open(request[name], how), number)
        sys.stdin = open(0)  # noqa: SIM115 - the old one may have read ahead
        sys.argv = ["locas", *request["args"]]
        # Renews torch's thread pool, which a fork breaks, before the threads that load weights race to do it.
        torch.set_num_threads(1)
        status = locas.cli.main()
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def waited(pid: int) -> int | None:
    """The exit status of a process, negative where a signal ended it; None while it runs."""
    found, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def main() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = waited(request["wait"])
        elif (answer := os.fork()) == 0:
            run(request)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
