"""Python commands as forks of a process that has imported torch and fairseq, which takes seconds.

`call` is what such a fork does. `conftest.run` forks the test's own process. For shell scripts,
which start a dozen commands, `stand_ins` makes a folder with programs named as those of this
environment. Each asks a server for a fork, which gets its arguments, variables, folder, streams and
process group, passes signals on to the fork, and ends as the fork ends.
"""

import atexit
import contextlib
import functools
import importlib
import json
import logging
import multiprocessing.util
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from importlib.metadata import entry_points
from pathlib import Path

import torch

SCRIPTS = {
    script.name: script
    for script in entry_points(group="console_scripts")
    # hydra's own start-up looks at the main module
    if script.name.startswith(("fairseq-", "evomoe-")) and script.name != "fairseq-hydra-train"
}
"""Name of a console script -> its entry point."""

STAND_IN = """#!{python} -IS
import json, os, signal, socket, sys

name, words = os.path.basename(sys.argv[0]), sys.argv[1:]
env = dict(os.environ)
# what is read while modules are imported, and pytest, need a process of their own
if {imports!r} != {{k: env.get(k) for k in {imports!r}}} or words[:2] == ["-m", "pytest"]:
    real = {bin!r} + "/" + name
    os.execv(real, [real, *words])
asked = json.dumps([name, words, env, os.getcwd(), os.getpgrp()]).encode()
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
socket.send_fds(server, [b"%12d" % len(asked)], [0, 1, 2])
server.sendall(asked)
answers = server.makefile()
fork = int(answers.readline())
for number in signal.SIGTERM, signal.SIGINT, signal.SIGHUP:
    signal.signal(number, lambda number, frame: os.kill(fork, number))
status = int(answers.readline())
if status < 0:
    signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
sys.exit(status)
"""
IMPORTS = (
    *("PYTHONPATH", "PYTHONWARNINGS", "PYTHONHASHSEED", "LD_PRELOAD", "OMP_NUM_THREADS"),
    "TRITON_INTERPRET",
)
"""Variables that Python reads when it starts, or torch and Triton when they are imported. What this
package reads when it is imported is read in the fork, because the server does not import it."""


def call(name, words, cwd, env):
    """Be the process of a Python command: arguments, folder, variables, logging, exit status.

    The streams are in place already. This function does not return.
    """
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout, sys.stderr = (
        open(fd, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115
        for fd in (1, 2)
    )
    # at its end it leaves alone what the process that was forked would end, but its own workers
    atexit._clear()
    atexit.register(multiprocessing.util._exit_function)
    # fairseq's workers are forks as well
    workers = torch.multiprocessing
    workers.spawn = functools.partial(workers.start_processes, start_method="fork")
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    # what the process that was forked left behind, and what pytest put in place
    root = logging.getLogger()
    root.handlers.clear()
    root.setLevel(logging.WARNING)
    status = 1
    try:
        status = _script(SCRIPTS[name], words) if name in SCRIPTS else _python(words)
    except SystemExit as end:
        status = end.code
        if isinstance(status, str):
            print(status, file=sys.stderr)
            status = 1
        status = status or 0
    except KeyboardInterrupt:
        status = -signal.SIGINT
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            # a program may have closed it
            with contextlib.suppress(ValueError):
                stream.flush()
        if status < 0:
            signal.signal(-status, signal.SIG_DFL)
            os.kill(os.getpid(), -status)
        os._exit(status)


def _script(script, words):
    from fairseq import checkpoint_utils
    from fairseq.logging import metrics

    metrics.reset()
    vars(checkpoint_utils.save_checkpoint).pop("best", None)
    sys.argv = [str(Path(sys.executable).with_name(script.name)), *words]
    # fairseq's commands configure logging when they are imported
    importlib.reload(importlib.import_module(script.module))
    return script.load()() or 0


def _python(words):
    """What `python WORDS` does: a module, a program in the command or on standard input, a file."""
    while words and words[0] == "-u":
        words = words[1:]
    what = words[0] if words else "-"
    sys.argv = words
    if what == "-m":
        sys.path.insert(0, os.getcwd())
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif what in ("-c", "-"):
        sys.path.insert(0, "")
        sys.argv = [what, *words[2 if what == "-c" else 1 :]]
        text = words[1] if what == "-c" else sys.stdin.read()
        main = type(sys)("__main__")
        sys.modules["__main__"] = main
        exec(compile(text, f"<{what}>", "exec"), vars(main))
    elif what.startswith("-"):
        sys.exit(f"{__file__} knows no option {what}")
    else:
        sys.path.insert(0, str(Path(what).resolve().parent))
        runpy.run_path(what, run_name="__main__")
    return 0


@functools.cache
def stand_ins():
    """Folder whose `bin` has the programs of this environment, Python commands as stand-ins."""
    home = Path(tempfile.mkdtemp(prefix="evomoe-stand-ins-"))
    real, address = Path(sys.executable).parent, str(home / "socket")
    text = STAND_IN.format(
        python=os.path.realpath(sys.executable),
        imports={k: os.environ.get(k) for k in IMPORTS},
        bin=str(real),
        address=address,
    )
    (home / "bin").mkdir()
    for program in real.iterdir():
        place = home / "bin" / program.name
        if program.name in (*SCRIPTS, "python", "python3"):
            place.write_text(text)
            place.chmod(0o755)
        else:
            place.symlink_to(program)
    server = subprocess.Popen([sys.executable, __file__, address], stdout=subprocess.PIPE)
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    atexit.register(server.kill)
    assert server.stdout.readline() == b"ready\n"
    return home


def serve(address):
    """Answer stand-ins, each in a fork of its own, until this process is killed."""
    import fairseq.models  # noqa: F401

    torch.set_num_threads(1)
    sys.path.remove(str(Path(__file__).resolve().parent))
    # the kernel collects the forks
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    parent = os.getppid()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        listener.settimeout(5)
        print("ready", flush=True)
        while os.getppid() == parent:
            try:
                asker, _ = listener.accept()
            except TimeoutError:
                continue
            asker.settimeout(None)
            if os.fork() == 0:
                listener.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _answer(asker)
            asker.close()


def _answer(asker):
    """Start the command in a fork, tell its number, and tell how it ended."""
    length, streams, _, _ = socket.recv_fds(asker, 12, 3)
    asked = asker.recv(int(length), socket.MSG_WAITALL)
    name, words, env, cwd, group = json.loads(asked)
    child = os.fork()
    if child == 0:
        asker.close()
        for number, fd in enumerate(streams):
            os.dup2(fd, number)
            os.close(fd)
        # the group may have ended, or belong to another session
        with contextlib.suppress(OSError):
            os.setpgid(0, group)
        call(name, words, cwd, env)
    for fd in (0, 1, 2, *streams):
        os.close(fd)
    asker.sendall(b"%d\n" % child)
    ended = os.pidfd_open(child)
    ready, _, _ = select.select([asker, ended], [], [])
    if ended not in ready:
        # the stand-in was killed
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(OSError):
        asker.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
    os._exit(0)


if __name__ == "__main__":
    serve(sys.argv[1])
