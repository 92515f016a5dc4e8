"""The one place that prints an error."""

import errno
import os
from pathlib import Path

import pytest

from fft.errors import one_line, run_cli


def test_a_path_that_cannot_be_used_is_told_and_is_no_traceback(capsys):
    with pytest.raises(SystemExit) as ended:
        run_cli(lambda: Path("x" * 300).stat().st_size)
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        f"error: {'x' * 300} cannot be used ({os.strerror(errno.ENAMETOOLONG)}): name another path, or mend it.\n"
    )


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), OSError(errno.EIO, "broken", "a")])
def test_what_is_of_no_path_or_of_the_machine_stays_as_it_is(error):
    def main():
        raise error

    with pytest.raises(OSError, match=error.strerror):
        run_cli(main)


def test_what_others_say_fits_into_a_line():
    assert one_line(ValueError("a \ufeff\n  b\x07.\n")) == r"a \ufeff b\x07"
