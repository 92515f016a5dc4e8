"""Sail's server as a process that ends with its driver, however that ends: ``python -m ...sail_server PORT DRIVER``."""

import os
import sys
import threading
import time

from pysail.cli import main as sail

#: Seconds between two looks at whether the driver is there.
_LOOKED_EVERY = 0.5


def main() -> None:
    """Serve Spark Connect on the loopback address until the process DRIVER, which started this one, is gone.

    A process that has lost its parent gets another. That is seen whatever has killed the driver, and holds for drivers
    that have forked: a pipe to them would stay open in their children.
    """
    port, driver = sys.argv[1:]

    def watch() -> None:
        while os.getppid() == int(driver):
            time.sleep(_LOOKED_EVERY)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    sys.argv = ["sail", "spark", "server", "--ip", "127.0.0.1", "--port", port]
    sail()


if __name__ == "__main__":
    main()
