"""Rows of tables that other programs wrote, in the one form that the jobs work on."""

import pyarrow as pa
import pytest

from fft.data.arrow_lists import lists_to_bytes
from fft.errors import UserError
from spark_jobs.token_table.rows import doc_ids, token_lists

IDS = [[1, 2, 3], [], [4, 5], None]


def lists_of(**columns) -> dict[str, list]:
    batch = pa.RecordBatch.from_pydict({"input_ids": pa.array(IDS, pa.list_(pa.int64())), **columns})
    whole = {name: column.to_pylist() for name, column in token_lists(batch, "part.parquet").items()}
    halves = [token_lists(batch.slice(first, 2), "part.parquet") for first in (0, 2)]  # offsets that do not begin at 0
    assert whole == {name: [row for half in halves for row in half[name].to_pylist()] for name in whole}
    return whole


def refusal(function, **columns) -> str:
    with pytest.raises(UserError) as raised:
        function(**columns)
    assert str(raised.value).startswith("part.parquet: ")
    return str(raised.value)


def test_null_lists_are_empty_and_integers_of_any_width():
    assert lists_of() == {"input_ids": [[1, 2, 3], [], [4, 5], []]}
    labels = pa.array([[-100, 2, 3], None, [4, 5], []], pa.large_list(pa.int16()))
    assert lists_of(labels=labels)["labels"] == [[-100, 2, 3], [], [4, 5], []]


@pytest.mark.parametrize("kind", [pa.int8(), pa.int64(), pa.bool_()], ids=str)
def test_padding_is_left_out(kind):
    mask = pa.array([[0, 1, 1], [], [0, 0], None]).cast(pa.list_(kind))
    labels = pa.array([[7, 8, 9], [], [1, 2], []], pa.list_(pa.int32()))
    assert lists_of(attention_mask=mask, labels=labels) == {
        "input_ids": [[2, 3], [], [], []],
        "labels": [[8, 9], [], [], []],
    }
    ones = pa.array([[1, 1, 1], [], [1, 1], None]).cast(pa.list_(kind))
    assert lists_of(attention_mask=ones) == {"input_ids": [[1, 2, 3], [], [4, 5], []]}


def test_what_cannot_be_meant_is_refused():
    def column(rows):
        return pa.array(rows, pa.list_(pa.int64()))

    mask = [[0, 1, 1], [], [0, 0], None]
    assert "documents' perhaps: make cu_seqlens" in refusal(
        lists_of, attention_mask=column([[1, 1, 2], [], [1, 2], []])
    )
    assert "differ in length" in refusal(lists_of, attention_mask=column([[1, 1], [], [1, 1], []]))
    assert "differ in length" in refusal(lists_of, labels=column([[1, 1], [], [1, 1], []]))
    bounds = column([[0, 3], [0], [0, 2], [0]])
    for wrong in ([0, 2], [1, 3], [0, 2, 1, 3], [3], [0], [], None):
        assert "cu_seqlens must rise" in refusal(lists_of, cu_seqlens=column([wrong, [0], [0, 1, 2], None]))
    assert lists_of(cu_seqlens=column([[0, 1, 1, 3], [0], [0, 2], None]))["cu_seqlens"][0] == [0, 1, 1, 3]
    assert "packed rows have padding" in refusal(lists_of, attention_mask=column(mask), cu_seqlens=bounds)
    assert "no list of 32-bit integers" in refusal(lists_of, input_ids=column([[1 << 40], [], [], []]))
    assert "holds nulls inside of lists" in refusal(lists_of, labels=column([[1, None, 2], [], [1, 2], []]))


def names_of(column) -> list[list[str]]:
    ids = pa.array([[1], [2], [3]], pa.list_(pa.int32()))
    columns = {"input_ids": ids} if column is None else {"input_ids": ids, "doc_ids": column}
    return doc_ids(pa.RecordBatch.from_pydict(columns), lists_to_bytes(ids, ""), "part.parquet").to_pylist()


def test_ids_of_documents_are_lists_or_one_of_a_row():
    hashed = names_of(None)
    assert [len(name) for (name,) in hashed] == [16] * 3
    assert names_of(pa.array([["a"], ["b", "c"], ["d"]])) == [["a"], ["b", "c"], ["d"]]
    assert names_of(pa.array([[1], [2], [3]], pa.large_list(pa.int64()))) == [["1"], ["2"], ["3"]]
    assert names_of(pa.array(["a", None, "c"])) == [["a"], hashed[1], ["c"]]
    assert names_of(pa.array([7, 8, None], pa.int16())) == [["7"], ["8"], hashed[2]]
    assert names_of(pa.nulls(3)) == names_of(pa.nulls(3, pa.list_(pa.null()))) == hashed
    assert names_of(pa.array([["a"], [], ["b", None]])) == [["a"], hashed[1], ["b", *hashed[2]]]
    for column in (pa.array([1.5, 2.5, 3.5]), pa.array([[1.5]] * 3), pa.array([{"id": 1}] * 3)):
        assert "it must be a list of strings" in refusal(names_of, column=column)
    broken = pa.array([b"\xff", b"a", b"b"]).view(pa.string())
    for column in (broken, pa.ListArray.from_arrays([0, 1, 2, 3], broken)):
        assert "holds what is no UTF-8" in refusal(names_of, column=column)
