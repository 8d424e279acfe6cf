"""Files are read record by record, and every mistake in them is named by file and line."""

import gzip
import json
import lzma

import pytest

from jaxgpt.data.records import Record, expand, file_hash, read_fields, read_jsonl, read_texts
from jaxgpt.errors import UserError


def write(path, *values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def test_records_know_their_file_and_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\n{"text": "two\\n\xe4\xb8\xad"}')
    assert list(read_jsonl(path)) == [
        Record(str(path), 1, {"text": "one"}),
        Record(str(path), 3, {"text": "two\n中"}),
    ]


@pytest.mark.parametrize(("suffix", "module"), [(".gz", gzip), (".xz", lzma)])
def test_packed_files_read_like_plain_ones(tmp_path, suffix, module):
    plain = write(tmp_path / "a.jsonl", {"text": "x"}, {"text": "y"})
    packed = tmp_path / f"a.jsonl{suffix}"
    packed.write_bytes(module.compress(plain.read_bytes()))
    assert list(read_texts(packed)) == list(read_texts(plain)) == ["x", "y"]
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(UserError, match="cannot be read after line"):
        list(read_texts(packed))


def test_zst_is_read_or_the_missing_package_is_named(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    try:
        import zstandard
    except ModuleNotFoundError:
        path.write_bytes(b"")
        with pytest.raises(UserError, match="pip install zstandard"):
            list(read_texts(path))
    else:
        path.write_bytes(zstandard.compress(b'{"text": "x"}\n'))
        assert list(read_texts(path)) == ["x"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', r"bad\.jsonl:2: not JSON: .* at column 1"),
        (b"[1]", r"bad\.jsonl:2: a list, expected an object"),
        (b"null", r"bad\.jsonl:2: null, expected an object"),
        (b'{"text": "\xff"}', r"bad\.jsonl:2: not UTF-8 at byte 10"),
        (b'{"txet": "a"}', r"bad\.jsonl:2: no key \"text\"; the record has \"txet\"\. Did you mean 'txet'"),
        (b'{"text": 3}', r"bad\.jsonl:2: \"text\" is a number, expected a string"),
        (b"[" * 100_000, r"bad\.jsonl:2: "),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(UserError, match=message):
        list(read_texts(path))


def test_patterns_expand_in_order_and_files_count_once(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        (tmp_path / name).write_text("")
    assert [p.name for p in expand([tmp_path / "c.txt", str(tmp_path / "*.jsonl"), tmp_path / "a.jsonl"])] == [
        "c.txt",
        "a.jsonl",
        "b.jsonl",
    ]


def test_missing_files_are_named_with_the_nearest(tmp_path):
    (tmp_path / "shakespeare.txt").write_text("")
    with pytest.raises(UserError, match=r"shakespear\.txt does not exist\. Did you mean 'shakespeare\.txt'"):
        expand(str(tmp_path / "shakespear.txt"))
    with pytest.raises(UserError, match=r"no file matches .*\*\.jsonl"):
        expand(str(tmp_path / "*.jsonl"))
    with pytest.raises(UserError, match="nor does the folder"):
        expand(str(tmp_path / "none" / "x.txt"))
    with pytest.raises(UserError, match="is a folder; name its files"):
        expand(tmp_path)
    (tmp_path / "x.csv").write_text("")
    with pytest.raises(UserError, match=r"x\.csv: text comes from"):
        list(read_texts(tmp_path / "x.csv"))


def test_a_text_file_is_one_document_with_its_line_ends(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\n\ntwo\n")
    assert list(read_texts(tmp_path / "a.txt")) == ["one\r\n\ntwo\n"]
    (tmp_path / "a.txt").write_bytes(b"ab\xff")
    with pytest.raises(UserError, match="not UTF-8 at byte 2"):
        list(read_texts(tmp_path / "a.txt"))


def test_fields_are_walked_without_roles(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "id": "no"},
        {"responses": ["x", "y"], "ranks": [1, 2]},
    )
    assert list(read_fields(path, ("messages", "responses"))) == ["q", "a", "x", "y"]
    with pytest.raises(UserError, match='no record has any of "mesages"'):
        list(read_fields(path, ("mesages",)))


def test_the_hash_is_of_contents_in_order(tmp_path):
    a, b = write(tmp_path / "a.jsonl", {"text": "1"}), write(tmp_path / "b.jsonl", {"text": "2"})
    before = file_hash([a, b])
    assert file_hash([b, a]) != before
    moved = a.rename(tmp_path / "moved.jsonl")
    assert file_hash([moved, b]) == before
    write(b, {"text": "3"})
    assert file_hash([moved, b]) != before


@pytest.mark.parametrize("space", ["", "\ufeff \n\t" + " " * 100])
def test_a_json_file_may_be_one_array(tmp_path, space):
    path = tmp_path / "a.json"
    path.write_text(space + json.dumps([{"text": "x"}, {"text": "y"}], indent=1))
    records = list(read_jsonl(path))
    assert [record.value["text"] for record in records] == list(read_texts(path)) == ["x", "y"]
    assert records[1].where == f"{path}[1]"
    packed = tmp_path / "a.json.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert list(read_texts(packed)) == ["x", "y"]
    write(path, {"text": "x"})
    assert list(read_texts(path)) == ["x"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"text": "a"},\n {"text": "b"}', r"a\.json:2: not JSON: .* at column"),
        ('[{"text": "a"}, 3]', r"a\.json\[1\]: a number, expected an object"),
        ('[{"text": "a"}, {"txet": "b"}]', r"a\.json\[1\]: no key \"text\""),
        ("[" * 100_000, r"a\.json"),
    ],
)
def test_a_bad_array_is_named_by_place(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=message):
        list(read_texts(tmp_path / "a.json"))
