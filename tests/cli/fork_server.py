"""Runs `logra` commands in forked children, so that killing many of them costs no import each.

One JSON request a line on stdin: {"argv": [...], "file_size": bytes or null}. Answers on stdout: the child's process
id, then [exit code, stderr]. Nothing is computed in the parent, so a child starts its own threads.
"""

import json
import os
import resource
import signal
import sys
import tempfile

# What every command imports in the end, imported once.
import torch._dynamo  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401

import logra_kernels.integrations.causal_lm
import logra_kernels.run  # noqa: F401
from logra_kernels.cli.main import main


def run_child(request: dict, stderr: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.dup2(stderr, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if request["file_size"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size"],) * 2)
    try:
        code = main(request["argv"])
    except SystemExit as error:
        code = error.code
    sys.stderr.flush()
    # Exit handlers run as in any process: the store's own commit of what is left is one of them.
    sys.exit(code)


def serve() -> None:
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        with tempfile.TemporaryFile() as stderr:
            pid = os.fork()
            if pid == 0:
                run_child(request, stderr.fileno())
            print(pid, flush=True)
            _, status = os.waitpid(pid, 0)
            stderr.seek(0)
            answer = [os.waitstatus_to_exitcode(status), stderr.read().decode()]
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
