"""A driver of Spark that runs one job, or one piece of Python, after the other, in the folder where it was started:
``spark-submit driver.py ADDRESS``, or ``python driver.py ADDRESS`` with an engine of its own.

It connects to ADDRESS, a socket; each request is (name of a job or "", its flags or a text of Python) and is answered
by what went wrong, or nothing.
"""

import sys
import traceback
from multiprocessing.connection import Client

from spark_jobs import cli
from spark_jobs.runtime.session import get_session


def main() -> None:
    with Client(sys.argv[1]) as asker:
        while asked := asker.recv():
            asker.send(answer(*asked))


def answer(job: str, given: list[str] | str) -> str:
    try:
        if job:
            getattr(cli, f"run_{job}")(given)
        else:
            exec(compile(given, "the page", "exec"), {"spark": get_session("pages"), "__name__": "page"})
    except (Exception, SystemExit):
        return traceback.format_exc()
    return ""


if __name__ == "__main__":
    main()
