"""Rows of token tables as a page of HTML that needs nothing else."""

import html
from collections.abc import Sequence

from fft.text.shown import Decoder, ShownDocument, shown_tokens, texts

_STYLE = """:root{color-scheme:light dark}
body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em}
h1,h2,p,td{overflow-wrap:anywhere}h1{font-size:1.5em;line-height:1.2}
h2{font-size:1em;color:#5c6b7a;border-top:1px solid;padding-top:.6em}pre{white-space:pre-wrap;overflow-wrap:anywhere}
mark{background:#bfe3c0;color:#10240f}table{border-collapse:collapse}td{padding:0 1em 0 0;white-space:pre-wrap}"""


def as_page(title: str, documents: Sequence[ShownDocument], decoder: Decoder, ids: bool, summary: str = "") -> str:
    """A page of HTML that needs nothing else; what is trained is marked. A ``summary`` of the table stands on top."""
    parts = [f"<h1>{html.escape(title)}</h1>", f"<p>{html.escape(summary)}</p><p>Marked is what is trained on.</p>"]
    for document in documents:
        parts.append(f"<h2>{html.escape(document.heading)}</h2>")
        if ids:
            rows = "".join(
                f"<tr><td>{document.begin + place}<td>{token}<td>{_marked(repr(text), trained)}"
                for place, token, trained, text in shown_tokens(document, decoder)
            )
            parts.append(f"<table>{rows}</table>")
        else:
            parts.append(f"<pre dir=auto>{''.join(_marked(*piece) for piece in texts(document, decoder))}</pre>")
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    )
    return f"<!doctype html><html lang=en>{head}<style>{_STYLE}</style>{''.join(parts)}</html>\n"


def _marked(text: str, trained: bool) -> str:
    return f"<mark>{html.escape(text)}</mark>" if trained else html.escape(text)
