"""What notebooks need, on Databricks and elsewhere: parameters, pages, and the wheel."""

import os
from html import escape
from typing import Any


def parameter(name: str, default: object) -> str:
    """A parameter of the notebook: a widget's value on Databricks; elsewhere ``FFT_NOTEBOOK_<NAME>`` of the
    environment, or the ``default``."""
    widgets = getattr(_in_notebook("dbutils"), "widgets", None)
    if widgets is not None:
        widgets.text(name, str(default))
        return widgets.get(name)
    return os.environ.get(f"FFT_NOTEBOOK_{name.upper()}", str(default))


def show(page: str, height: int = 600) -> None:
    """Show a page of HTML below the cell, apart from the notebook's own styles."""
    from IPython.display import display

    frame = f'<iframe srcdoc="{escape(page)}" style="width: 100%; height: {height}px; border: 0"></iframe>'
    display({"text/html": frame, "text/plain": "a page of HTML"}, raw=True)


def _in_notebook(name: str) -> Any:
    """A global of the notebook, where this runs in one."""
    try:
        from IPython import get_ipython
    except ImportError:
        return None
    shell = get_ipython()
    return None if shell is None else shell.user_ns.get(name)
