"""Start Python processes by fork from one that has imported torch: milliseconds each, where an import takes seconds.

A forked process is as one that a shell starts, but for the modules that are loaded: it has its own arguments,
environment, folder, session and output, and at its end its threads, what `atexit` was given and its own objects end as
an interpreter's do. What the interpreter then takes down besides, all modules, is left: on a loaded machine a short
process took 0.6 s for 4.2. CUDA is hidden from it, for a driver that was asked does not survive a fork.
"""

import array
import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path

import __main__

ROOT = Path(__file__).resolve().parents[2]
MODULES = (
    "matplotlib.figure",
    "pandas",  # by pyarrow's to_numpy
    "pyarrow.compute",
    "pyarrow.json",
    "safetensors.torch",
    "sosd_fast.checkpoints.analyze",
    "sosd_fast.runs.plot",
    "torch._dynamo",  # imported by the first optimizer
    "torch.distributed.checkpoint._fsspec_filesystem",  # by the first checkpoint
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.utils.data",
    "training.run",
)


def serve(descriptor: int):
    """Forks a process for each request, until nobody can ask any more; runs what it asks for in that."""
    for name in MODULES:
        with contextlib.suppress(ImportError):  # the extras are optional
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # or every process copies what is loaded, when it looks for garbage at its end
    with socket.socket(fileno=descriptor) as door:
        while True:
            request, descriptors, *_ = socket.recv_fds(door, 2**20, 3)
            if not request:
                return
            if not os.fork():
                break
            for each in descriptors:
                os.close(each)
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:  # those that have nothing left to tell
                    pass
    answer = socket.socket(fileno=descriptors[0])
    pid = os.fork()
    if pid:  # this one waits, so that the first one need not
        for each in (*descriptors[1:], 0, 1, 2):
            os.close(each)
        answer.sendall(array.array("i", [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])]).tobytes())
        os._exit(0)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which the background jobs of a shell ignore
    os.setsid()  # before it is known, and may be killed, by the name of its session
    answer.sendall(array.array("i", [os.getpid()]).tobytes())
    answer.close()
    end(status_of(functools.partial(become, **json.loads(request), streams=descriptors[1:])))


def become(script, arguments, environment, folder, streams):
    """Runs a script, or code, as the interpreter does."""
    for i, each in enumerate(streams, 1):
        os.dup2(each, i)
        os.close(each)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    path = Path(script) if "\n" not in script else None
    sys.argv = [script if path else "-c", *arguments]
    sys.path.insert(0, str(path.parent) if path else "")
    names = vars(__main__)
    names.clear()
    names.update(__name__="__main__", __builtins__=__builtins__, **({"__file__": script} if path else {}))
    exec(compile(path.read_text() if path else script, script if path else "<string>", "exec"), names)


def status_of(run) -> int:
    """The exit status of a function that returns or calls `sys.exit`; how others end is left to the interpreter."""
    try:
        run()
    except SystemExit as error:
        if not isinstance(error.code, int | None):
            raise
        return error.code or 0
    return 0


def end(status: int):
    """Ends this process as an interpreter does, but for the modules."""
    threading._shutdown()
    atexit._run_exitfuncs()
    names = vars(__main__)
    for name in names.keys() - {"__builtins__"}:
        del names[name]
    gc.collect()  # what is frozen is not looked through
    for stream in (sys.stdout, sys.stderr):
        if stream and not stream.closed:
            stream.flush()
    os._exit(status & 0xFF)


@functools.cache
def _door() -> socket.socket:
    """The line to the process that forks; it is started when first asked for, and ends with this one."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    subprocess.Popen(
        [sys.executable, "-c", f"import prepared; prepared.serve({theirs.fileno()})"],
        pass_fds=[theirs.fileno()],
        env={**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""},
        start_new_session=True,
    ).returncode = 0  # nobody waits for it
    theirs.close()
    atexit.register(ours.close)
    return ours


class Process:
    """A process that runs a script, or code where that has several lines.

    Args:
        script: a path, or code.
        arguments: what follows it on the command line.
        stdout: a file descriptor; by default a pipe, read by `self.stdout`.
        stderr: the same; by default where stdout goes.
        folder: to start in.
        environment: besides this process's own.
    """

    def __init__(self, script, *arguments, stdout=None, stderr=None, folder=ROOT, **environment):
        self.stdout, own = None, []
        if stdout is None:
            read, stdout = os.pipe()
            self.stdout = open(read)
            own = [stdout]
        self._answer, theirs = socket.socketpair()
        request = {"script": str(script), "arguments": list(map(str, arguments)), "folder": str(folder)}
        request["environment"] = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **environment}
        descriptors = [theirs.fileno(), stdout, stdout if stderr is None else stderr]
        socket.send_fds(_door(), [json.dumps(request).encode()], descriptors)
        theirs.close()
        for each in own:
            os.close(each)
        self.returncode = None
        self.pid = self._number()

    def _number(self) -> int:
        said = self._answer.recv(4, socket.MSG_WAITALL)
        if len(said) < 4:
            raise RuntimeError("the process that forks has ended; its own output says why")
        return array.array("i", said)[0]

    def wait(self, timeout: float | None = None) -> int:
        """Returns the exit status, or minus the signal that ended it."""
        if self.returncode is None:
            self._answer.settimeout(timeout)
            self.returncode = self._number()
            self._answer.close()
        return self.returncode

    def kill(self):
        """Ends it, and what it started in its session."""
        if self.returncode is None:
            os.killpg(self.pid, signal.SIGKILL)
            self.wait()


def _drain(descriptor: int, texts: list[str], i: int):
    with open(descriptor, errors="replace") as file:
        texts[i] = file.read()


def run(script, *arguments, timeout: float = 120, processes=None, **options) -> subprocess.CompletedProcess:
    """Runs a script, or code where that has several lines, in a process of its own.

    Args:
        script: a path, or code.
        arguments: what follows it on the command line.
        timeout: seconds until it is killed and TimeoutError raised.
        processes: the environments of several processes that run it together; by default one process. What each wrote
            to stdout and stderr follows what the one before it wrote, so that no line of one is cut by another's. The
            status is that of the first that failed.
        **options: as of `Process`.
    """
    started, readers, texts = [], [], [""] * (2 * len(processes or [{}]))
    try:
        for environment in processes or [{}]:
            pipes = [os.pipe(), os.pipe()]
            try:
                (_, stdout), (_, stderr) = pipes
                started.append(Process(script, *arguments, stdout=stdout, stderr=stderr, **options, **environment))
            finally:
                for read, write in pipes:
                    os.close(write)
                    readers.append(threading.Thread(target=_drain, args=(read, texts, len(readers))))
                    readers[-1].start()
        statuses = [process.wait(timeout) for process in started]
    finally:
        for process in started:
            process.kill()
        for reader in readers:
            reader.join()
    status = next(filter(None, statuses), 0)
    return subprocess.CompletedProcess(script, status, "".join(texts[::2]), "".join(texts[1::2]))


def run_ranks(count: int, script, *arguments, **options) -> subprocess.CompletedProcess:
    """Runs a script in several processes with the environment that torchrun sets, and a store as torchrun keeps it."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=120))
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    shared |= {"TORCHELASTIC_USE_AGENT_STORE": True}
    ranks = [{name: str(value) for name, value in {**shared, "RANK": i, "LOCAL_RANK": i}.items()} for i in range(count)]
    return run(script, *arguments, processes=ranks, **options)
