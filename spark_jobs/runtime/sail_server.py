"""Sail's server as a process that ends with its driver, however that ends: ``python -m ...sail_server DRIVER``."""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping

from fft.redaction import OF_STORES, is_secret_name

#: Seconds between two looks at whether the driver is there.
_LOOKED_EVERY = 0.5
#: Seconds; one is usual.
_STARTS_WITHIN = 60
#: ``PR_SET_PDEATHSIG`` of Linux: the signal that the system sends when the thread that started a process is gone.
_ON_PARENTS_DEATH = 1
#: How names begin of what Python, its libraries, engines and file systems find in an environment.
_PASSED_ON = (
    *("PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_", "TZ", "TMPDIR", "TEMP", "TMP", "XDG_", "VIRTUAL_ENV", "CONDA_"),
    *("LD_", "DYLD_", "PYTHON", "COVERAGE", "OMP_", "MKL_", "OPENBLAS_", "NUMEXPR_", "RAYON_", "MALLOC_", "RUST_"),
    *("SAIL_", "SPARK_", "PYSPARK_", "JAVA_HOME", "FFT_", "HF_", "TRANSFORMERS_", "TOKENIZERS_", "TORCH", "PYTORCH_"),
    *("VLLM_", "CUDA_", "NVIDIA_", "ASCEND_", "SSL_CERT_", "CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "HTTP_PROXY"),
    *("HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "all_proxy", "no_proxy"),
)


class SailServer:
    """A server in a process of its own, which ends with this one.

    (Inside this process its threads would outlive the interpreter, which then aborts.) It says its port through a pipe
    that it alone holds, so nobody else can have taken that before.
    """

    def __init__(self, root: str) -> None:
        """Start one whose workers find this package in ``root``. Raises :class:`OSError` if it does not say a port."""
        ours, theirs = socket.socketpair()
        environment = trimmed(os.environ) | {"RUST_LOG": os.environ.get("RUST_LOG", "error")}  # it is raised as well
        environment["PYTHONPATH"] = os.pathsep.join(path for path in (root, environment.get("PYTHONPATH")) if path)
        # -P: a module of the folder where the job happens to run is nobody's
        command = [sys.executable, "-P", "-m", "spark_jobs.runtime.sail_server", str(os.getpid()), str(theirs.fileno())]
        if threading.current_thread() is threading.main_thread():  # the system means threads, and others end before
            command.append("--end_with_thread")
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with theirs:
            self._process = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()], **quiet)
        with ours:
            ours.settimeout(_STARTS_WITHIN)
            try:
                self.port = int(ours.recv(16))
            except (OSError, ValueError) as error:
                self.stop()
                raise OSError(f"Sail did not start within {_STARTS_WITHIN} s") from error

    def stop(self) -> None:
        """End it."""
        self._process.kill()


def trimmed(environment: Mapping[str, str]) -> dict[str, str]:
    """What of an environment tasks need: whoever reaches the server can read it. Secrets that are no store's stay out:
    tasks read and write there.

    >>> trimmed({"HOME": "/home/me", "OPENAI_API_KEY": "k", "HF_TOKEN": "t", "AWS_SECRET_ACCESS_KEY": "s"})
    {'HOME': '/home/me', 'AWS_SECRET_ACCESS_KEY': 's'}
    """
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(OF_STORES) or (name.startswith(_PASSED_ON) and not is_secret_name(name))
    }


def main() -> None:
    """Serve Spark Connect on the loopback address until the process DRIVER, which started this one, is gone.

    A process that has lost its parent gets another. That is seen whatever has killed the driver, and holds for drivers
    that have forked: a pipe to them would stay open in their children. The system is asked to see it, too: it needs
    no turn of an interpreter that may be busy.
    """
    driver, pipe, *end_with_thread = sys.argv[1:]
    if end_with_thread:
        with contextlib.suppress(OSError, AttributeError):  # not Linux
            ctypes.CDLL(None).prctl(_ON_PARENTS_DEATH, signal.SIGKILL, 0, 0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    from pysail.spark import SparkConnectServer

    server = SparkConnectServer("127.0.0.1", 0)
    server.start(background=True)
    address = server.listening_address
    with socket.socket(fileno=int(pipe)) as told:
        told.sendall(b"" if address is None else str(address[1]).encode())
    while os.getppid() == int(driver):
        time.sleep(_LOOKED_EVERY)
    os._exit(1)


if __name__ == "__main__":
    main()
