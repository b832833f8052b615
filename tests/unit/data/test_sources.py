"""Reading: every format, and a clear refusal for everything that is wrong with a file."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.data import load_examples
from weft.errors import DataError

ROW = {"prompt": "Frage: wie?", "completion": "So – 好。"}
LINE = '{"prompt": "a", "completion": "b"}\n'


def refused(source, **options) -> str:
    with pytest.raises(DataError) as caught:
        load_examples(source, **options)
    return str(caught.value)


def as_table(rows, delimiter: str) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def test_every_format_gives_the_same_examples(write, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [ROW, {"prompt": 'with "quotes", commas;\nand lines', "completion": "x"}]
    data = datasets.Dataset.from_list(rows)
    data.to_parquet(tmp_path / "a.parquet")
    data.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=data, other=data.select([0])).save_to_disk(tmp_path / "splits")
    lines = write("a.jsonl", rows)
    sources = {
        "path": lines, "text": str(lines), "ndjson": write("a.ndjson", rows), "lines in .json": write("b.json", rows),
        "list": write("a.json", json.dumps(rows, indent=2)), "list in .jsonl": write("listed.jsonl", json.dumps(rows)),
        "csv": write("a.csv", as_table(rows, ",")), "tsv": write("a.tsv", as_table(rows, "\t")),
        "semicolons": write("b.csv", as_table(rows, ";")), "tabs": write("c.csv", as_table(rows, "\t")),
        "gz": write("a.jsonl.gz", gzip.compress(lines.read_bytes())),
        "csv.gz": write("a.csv.gz", gzip.compress(as_table(rows, ",").encode())),
        "parquet": tmp_path / "a.parquet", "saved": tmp_path / "saved", "splits": tmp_path / "splits",
        "split": f"{tmp_path}/splits@train", "Dataset": data, "list of dicts": rows, "tuple": tuple(rows),
    }  # fmt: skip
    digest = load_examples(iter(rows)).digest
    for name, source in sources.items():
        found = load_examples(source)
        assert (found.digest, found.kind, len(found)) == (digest, "completion", 2), name
        assert len(load_examples(source, limit=1)) == 1, name
    assert len(load_examples(f"{tmp_path}/splits@other")) == 1
    assert "no split 'valid'; expected one of 'train', 'other'" in refused(f"{tmp_path}/splits@valid")
    assert "parted by semicolons" in load_examples(sources["semicolons"]).summary()
    assert "split 'train'" in load_examples(tmp_path / "splits").summary()


def test_byte_order_mark_crlf_blank_lines_and_separators_inside_of_strings(write):
    path = write("a.jsonl", b"\xef\xbb\xbf" + '{"text": "eins\u2028zwei"}\r\n\r\n  \n{"text": "drei"}'.encode())
    found = load_examples(path)
    assert [row["text"] for row in found] == ["eins\u2028zwei", "drei"]
    assert found.numbers == (1, 4)
    assert found.where(1) == f"{path}, line 4"
    cells = load_examples(write("a.csv", b"\xef\xbb\xbftext,label\r\ngood,1\r\n\r\nbad,0\r\n"))
    assert [dict(row) for row in cells] == [{"text": "good", "label": "1"}, {"text": "bad", "label": "0"}]
    assert cells.numbers == (2, 4)


def test_text_files_are_read_in_blocks(write):
    found = load_examples(write("a.txt", b" \r\n = Title = \r\n \t\r\none\r\ntwo\r\n\r\n\r\nthree"))
    assert [row["text"] for row in found] == [" = Title = ", "one\ntwo", "three"]
    assert found.where(2).endswith("block 3")
    assert "block" in found.summary()
    assert len(load_examples(write("a.txt", "one\n\ntwo\n\nthree"), limit=2)) == 2


def test_huge_lines_are_read(write):
    words = "a" * 3_000_000
    assert len(load_examples(write("a.jsonl", [{"text": words}]))[0]["text"]) == 3_000_000
    assert len(load_examples(write("a.csv", f"text\n{words}\n"))[0]["text"]) == 3_000_000


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "a", "completion": "b",}', "comma before the closing"),
        ("{'prompt': 'a'}", "double quotes"),
        ('{"prompt": None}', "null, true and false"),
        ('{"prompt": "a"} {"prompt": "b"}', "several objects"),
        ('{"prompt": "unfinished', "Unterminated string"),
        ("{", "spread over several"),
        ("# a comment", "no comments"),
        ('{"n": ' + "9" * 5000 + "}", "digits"),
        ("[" * 100_000, "line 2"),
    ],
)
def test_invalid_json_names_file_and_line_and_shows_its_beginning(write, line, said):
    message = refused(write("bad.jsonl", LINE + line + "\n"))
    assert "bad.jsonl, line 2: " in message
    assert said in message
    assert line[:10] in message.replace("\\'", "'")
    assert len(message) < 500


def test_the_beginning_of_a_huge_bad_line_is_short(write):
    message = refused(write("bad.jsonl", '{"text": "' + "x" * 1_000_000 + "\n"))
    assert "1,000,010 characters" in message
    assert len(message) < 400


@pytest.mark.parametrize("value", ["3", '"text"', "null", "true"])
def test_a_line_that_is_no_object(write, value):
    assert "line 2: expected an object" in refused(write("bad.jsonl", LINE + value))
    assert "row 1 of the list: expected an object" in refused(write("bad.json", f"[{value}]"))


def test_json_files_that_are_no_list_of_objects(write):
    assert "its 'data' is such a list" in refused(write("a.json", '{\n"version": 1,\n"data": [{"text": "a"}]\n}'))
    assert "invalid JSON" in refused(write("a.json", '{\n"data": [\n'))
    message = refused(write("a.json", '[{"text": "a"},\n{"text": "b"},\n]'))
    assert "a.json, line 3: invalid JSON" in message or "a.json, line 2: invalid JSON" in message
    assert "no rows" in refused(write("a.json", "[]"))
    assert "line 2: invalid JSON" in refused(write("a.json", "[\n"))
    assert "CR alone" in refused(write("a.jsonl", '{"text": "a"}\r{"text": "b"}\r'))


def test_wrong_encodings_name_line_byte_and_the_way_out(write):
    message = refused(write("a.jsonl", LINE.encode() + '{"text": "caf\xe9"}\n'.encode("latin-1")))
    assert "line 2: byte 14 (0xe9" in message
    assert "iconv -f WINDOWS-1252" in message
    assert "iconv -f GB18030" in refused(
        write("a.csv", "prompt,completion\n请问该病情需要到哪个科室就诊,好\n".encode("gb18030"))
    )
    assert "UTF-16" in refused(write("a.txt", "text".encode("utf-16")))
    assert "iconv" in refused(write("a.json", '[{"text": "caf\xe9"}]'.encode("latin-1")))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt", "a.parquet", "a.json", "a.jsonl.gz"])
def test_empty_files_and_lfs_pointers(write, name):
    assert "empty (0 bytes)" in refused(write(name, b""))
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n"
    assert "git lfs pull" in refused(write(name, pointer))


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", b"\n \n"), ("a.csv", b"text,label\n"), ("a.txt", b"\n \n\t"), ("a.csv", b"\n")]
)
def test_files_without_rows(write, name, content):
    assert "no rows in it" in refused(write(name, content))


def test_files_of_another_kind_than_their_name_says(write):
    assert "ends in .gz" in refused(write("a.jsonl", gzip.compress(b"{}")))
    assert "ends in .parquet" in refused(write("a.csv", b"PAR1rest"))
    assert "zip archive" in refused(write("a.json", b"PK\x03\x04rest"))
    assert "not a gzip file" in refused(write("a.jsonl.gz", b"{}"))
    assert "not a Parquet file" in refused(write("a.parquet", b"text\n"))
    assert "not a readable Parquet" in refused(write("b.parquet", b"PAR1 but no more"))
    assert "damaged or cut off" in refused(write("b.jsonl.gz", gzip.compress(LINE.encode() * 500)[:-30]))
    assert "no reader for a file that ends in '.xlsx'" in refused(write("a.xlsx", b"PK"))
    assert "gunzip" in refused(write("a.parquet.gz", gzip.compress(b"PAR1")))


def test_missing_files_and_folders(write, tmp_path):
    write("train.jsonl", LINE)
    message = refused(tmp_path / "trian.jsonl")
    assert "no such file" in message
    assert "Did you mean 'train.jsonl'?" in message
    assert f"only {str(tmp_path)!r} exists" in refused(str(tmp_path / "no" / "such" / "folder" / "train.jsonl"))
    assert "give one of its files: 'train.jsonl'" in refused(tmp_path)
    (tmp_path / "nothing").mkdir()
    assert "without data" in refused(tmp_path / "nothing")
    assert "no such file" in refused("valid.jsonl")
    assert "written 'org/name'" in refused("imdb")
    assert "empty text" in refused("  ")


def test_names_that_no_file_has(tmp_path):
    assert "not the name of a file" in refused('{"text": "a"}\n{"text": "b"}\n')
    assert "not the name of a file" in refused("a\0b")
    assert "can't be read: File name too long" in refused("a" * 5000)
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    assert "loop.jsonl" in refused(tmp_path / "loop.jsonl")


def test_files_that_may_not_be_read(write, monkeypatch):
    path = write("a.jsonl", LINE)

    def forbidden(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", forbidden)
    assert "a.jsonl: can't be read: Permission denied" in refused(path)


def test_csv_that_is_no_table(write):
    assert "line 3: 3 cells, but 2 columns" in refused(write("a.csv", "text,label\na,1\nb,c,2\n"))
    assert "line 2: 1 cells" in refused(write("a.csv", "text,label\na\n"))
    assert "same name: 'text'" in refused(write("a.csv", "text,text\na,b\n"))
    message = refused(write("a.csv", 'text,label\ngood,1\n"never closed,1\nmore,0\n'))
    assert "line 3:" in message
    multi = load_examples(write("b.csv", 'text,label\n"two\nlines",1\nnext,0\n'))
    assert multi.numbers == (2, 4)


def test_objects_that_are_no_rows():
    assert "row 2 of the list is a str" in refused([{"text": "a"}, "b"])
    assert "names of columns are text" in refused([{1: "a"}])
    assert "no reader for a dict" in refused({"text": ["a"]})
    assert "no reader for a int" in refused(3)
    assert "no rows" in refused([])
    assert "limit=0" in refused([{"text": "a"}], limit=0)


def test_data_frames_are_told_the_way_out():
    pandas = pytest.importorskip("pandas")
    assert "to_dict('records')" in refused(pandas.DataFrame({"text": ["a"]}))


def test_hub_data_sets_offline(monkeypatch):
    pytest.importorskip("datasets")
    for name in ("nobody/nothing", "nobody/nothing:config@train[:10%]"):
        message = refused(name)
        assert name in message
        assert "HF_HUB_OFFLINE" in message
    import datasets

    def unknown(*_, **__):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'x/y' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unknown)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.delenv("HF_DATASETS_OFFLINE")
    assert "not visible to you" in refused("x/y")

    def other(*_, **__):
        raise ValueError("BuilderConfig 'c' not found. Available: ['main']")

    monkeypatch.setattr(datasets, "load_dataset", other)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "x/y:c: can't be loaded: BuilderConfig 'c' not found" in refused("x/y:c")


def test_hub_data_sets_choose_a_split(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(name, config, split):
        asked.append((name, config, split))
        part = datasets.Dataset.from_list([{"text": "a", "label": 1}], features=datasets.Features(
            text=datasets.Value("string"), label=datasets.ClassLabel(names=["neg", "pos"])))  # fmt: skip
        return part if split else datasets.DatasetDict(train=part, test=part)

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = load_examples("org/set:small")
    assert (found.source, found.labels, found[0]["label"]) == ("org/set:small@train", ("neg", "pos"), "pos")
    assert load_examples("org/set@test[:10%]").source == "org/set@test[:10%]"
    assert asked == [("org/set", "small", None), ("org/set", None, "test[:10%]")]
    with pytest.raises(DataError, match="give one of them"):
        load_examples(load("a", None, None))


def test_iterable_and_formatted_data_sets(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([{"text": "a", "label": 0}, {"text": "b", "label": 1}])
    assert load_examples(data.to_iterable_dataset()).digest == load_examples(data).digest
    assert load_examples(data.with_format("numpy")).labels == ("0", "1")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)
COLUMNS = st.sampled_from(["prompt", "completion", "references", "messages", "tools", "text", "label", "x"])


@given(
    st.lists(st.dictionaries(COLUMNS, JSON, max_size=4), max_size=4),
    st.sampled_from([None, "chat", "completion", "classification", "text"]),
)
def test_rows_of_anything_are_read_or_refused(rows, kind):
    try:
        found = load_examples(rows, kind=kind)
    except DataError:
        return
    assert found.summary()
    assert len(found.digest) == 64


@given(
    st.binary(max_size=60),
    st.sampled_from([b"", b'{"text": "a"}\n', b"text,label\n", b"[", b"PAR1", b"\x1f\x8b\x08"]),
    st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".jsonl.gz"]),
)
def test_bytes_of_anything_are_read_or_refused(tmp_path_factory, content, start, ending):
    path = tmp_path_factory.mktemp("fuzz") / f"a{ending}"
    path.write_bytes(start + content)
    with contextlib.suppress(DataError):
        assert load_examples(path).digest
