"""What of an input is understood: kinds of files, columns of a token table. docs/inputs.md explains these lists.

All else is refused by name, or counted and told in the job's summary. The keys of a record are in
:mod:`fft.text.records` and :mod:`fft.text.messages`.
"""

#: How documents lie in a file, by the end of its name.
KINDS = {
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
}
#: May follow the end of a file of JSON lines or of text.
COMPRESSIONS = (".gz", ".zst", ".bz2")

#: What lies in the folder of a table whose files are not all of its newest version: what makes it one, and its name.
LOGS = {"_delta_log": "Delta", ".hoodie": "Hudi"}
#: An Iceberg table has files of this folder and end of name.
ICEBERG = ("metadata", ".metadata.json")

#: Columns of a token table that are read; all are lists of integers.
LISTS = ("input_ids", "labels", "cu_seqlens")
#: The column of documents' ids: a list a row or, where a row is a document, a string or an integer.
DOC_IDS = "doc_ids"
#: The column that says with 0 which tokens are padding.
MASK = "attention_mask"

_TRAINED = "make labels of it, -100 where a token is not trained on, and drop it"
_BOUNDS = "make cu_seqlens of it, the documents' boundaries, and drop it"
#: Columns that say of tokens what only the columns above may say, and what to do about them.
REFUSED = {
    **dict.fromkeys(
        ("loss_mask", "completion_mask", "assistant_mask", "assistant_masks", "prompt_mask", "label_mask"), _TRAINED
    ),
    **dict.fromkeys(("position_ids", "seq_lengths", "seq_lens", "document_ids", "segment_ids"), _BOUNDS),
    **dict.fromkeys(("images", "pixel_values"), "this release reads no images"),
}


def unread_columns(names: list[str] | tuple[str, ...], read: tuple[str, ...] = (*LISTS, DOC_IDS, MASK)) -> list[str]:
    """Of a table's columns those that nothing here reads."""
    return [name for name in names if name not in read]
