"""What libraries warn of at every start, and no user of the trainer can mend, is not printed."""

import logging
import warnings

#: What DeepSpeed says. The run itself says "kernels: attention cpu", and its optimizer is tested with ZeRO here.
_SAID = ("Setting accelerator to CPU", "You are using ZeRO with an untested optimizer")
#: What torch says to DeepSpeed, which calls these by their names before torch 2.13.
_RENAMED = r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"


def quiet_libraries() -> None:
    """To be called before DeepSpeed is imported, which speaks at once."""
    logging.getLogger("DeepSpeed").addFilter(_is_news)
    warnings.filterwarnings("ignore", message=_RENAMED, category=FutureWarning)


def _is_news(note: logging.LogRecord) -> bool:
    return not any(said in note.getMessage() for said in _SAID)
