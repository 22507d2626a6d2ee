"""Data: what is read, split, tokenised and packed is exactly what was there."""

import gzip
import json
import struct
import subprocess
import sys
import zlib
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqmix.core.errors import DataError, MissingExtra, RangeError
from seqmix.data.corpora import CORPORA, austen, kernel_docs, king_james, shakespeare
from seqmix.data.text import Corpus, read_text, split_text
from seqmix.data.tokenizer import (
    EOS,
    PAD,
    byte_tokenizer,
    encode,
    load_tokenizer,
    save_tokenizer,
    special_id,
    token_bytes,
    tokenizer_from,
    train_bpe,
)

AWKWARD = "naïve café\r\n\t 漢字🙂 <eos><pad> does n't , . \u2028 \x01 e\u0301   end  \n\n"
SPACED = "one  two\n\n  three\n" * 50
PROSE = "".join(f"The {i}th line tells what the {i * i}th line will tell.\n" for i in range(400))


# --- reading


def test_file_is_one_document_with_its_line_ends(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_bytes(AWKWARD.encode())
    corpus = read_text(str(path))
    assert (corpus.name, corpus.documents) == ("notes", (AWKWARD,))
    assert corpus.characters == len(AWKWARD)
    assert corpus.bytes == len(AWKWARD.encode())


def test_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert read_text(tmp_path / "a.txt").documents == ("hello",)


def test_folder_is_one_document_per_text_file_by_path(tmp_path):
    files = {"b.txt": b"bee", "a/z.md": b"zed", ".hidden": b"no", "i.png": b"\0x"}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "empty.txt").touch()
    corpus = read_text(tmp_path)
    assert corpus.documents == ("zed", "bee")
    assert corpus.left_out == ("empty.txt", "i.png")


def test_fingerprint_depends_on_contents_and_boundaries_only():
    def fingerprint(*documents):
        return Corpus("x", documents).fingerprint

    assert fingerprint("ab", "c") == Corpus("y", ("ab", "c")).fingerprint
    assert len({fingerprint("ab", "c"), fingerprint("a", "bc"), fingerprint("abc")}) == 3


@pytest.mark.parametrize(
    ("content", "says"),
    [
        pytest.param(b"", "empty", id="empty"),
        pytest.param(b" \n\n ", "empty", id="blank"),
        pytest.param(b"ab\0cd", "binary: byte 2 is NUL", id="binary"),
        pytest.param(b"one\ntwo caf\xe9 x", r"byte 11 \(0xe9, line 2\).*iconv", id="latin1"),
        pytest.param(b"\xef\xbb\xbfone\n\xff", r"byte 7 \(0xff, line 2\)", id="marked_and_broken"),
        pytest.param("text".encode("utf-16"), "UTF-16.*iconv", id="utf16"),
    ],
)
def test_unusable_file_is_explained(tmp_path, content, says):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=says) as caught:
        read_text(path)
    assert str(path) in str(caught.value)


def test_missing_data_suggests_a_corpus():
    with pytest.raises(DataError, match="Did you mean the corpus shakespeare"):
        read_text("shakespear")
    with pytest.raises(DataError, match=r"no file, folder or corpus called 'nowhere/at\.all'"):
        read_text("nowhere/at.all")
    with pytest.raises(DataError, match="empty"):
        read_text("")


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b"], ids=["too_long", "nul"])
def test_impossible_path_is_a_data_error(name):
    with pytest.raises(DataError):
        read_text(name)


def test_folder_without_text_is_explained(tmp_path):
    with pytest.raises(DataError, match="no text files: no files"):
        read_text(tmp_path)
    (tmp_path / "x.bin").write_bytes(b"\0")
    with pytest.raises(DataError, match=r"only binary or empty files, such as x\.bin"):
        read_text(tmp_path)


def test_users_file_wins_over_a_corpus_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shakespeare").write_text("mine")
    assert read_text("shakespeare").documents == ("mine",)


def test_dataset_names_split_and_column(monkeypatch):
    asked = []

    class Rows:
        column_names = ("text", "body")

        def __getitem__(self, column):
            return {"text": ["a", " ", None], "body": ["b", "c"]}[column]

    def load_dataset(name, *, split):
        asked.append((name, split))
        if name == "gone":
            raise ConnectionError("no route")
        return Rows()

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert read_text("datasets:me/mine").documents == ("a",)
    assert read_text("datasets:me/mine:test:body").documents == ("b", "c")
    assert asked == [("me/mine", "train"), ("me/mine", "test")]
    with pytest.raises(DataError, match=r"no column 'title'\. It has text, body"):
        read_text("datasets:me/mine:train:title")
    with pytest.raises(DataError, match=r"no route.*network"):
        read_text("datasets:gone")
    with pytest.raises(DataError, match="does not parse"):
        read_text("datasets:a:b:c:d")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match="datasets"):
        read_text("datasets:me/mine")


# --- corpora


@pytest.mark.parametrize("name", CORPORA.names())
def test_corpus_is_read_or_says_how_to_get_it(name, tmp_path, monkeypatch):
    monkeypatch.setenv("SEQMIX_CACHE", str(tmp_path))
    asset = CORPORA.get(name)
    if asset.place.find() is None:
        with pytest.raises(DataError, match=r"Get it with:\n  (mkdir|pip)"):
            read_text(name)
    else:
        corpus = read_text(name.replace("_", "-"))
        assert corpus.name == name
        assert corpus.characters > 1_000_000
        assert "\0" not in corpus.documents[0]


def test_debian_corpus_is_found_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SEQMIX_CACHE", str(tmp_path))
    place = kernel_docs.CORPUS.place
    folder = tmp_path / "debian" / place.package / place.folder
    for name in ("b.rst.gz", "sub/a.rst.gz", "translations/zh_CN/b.rst.gz"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(gzip.compress(name.encode()))
    if place.find() == folder:  # where the real package is installed, that one wins
        assert read_text("kernel-docs").documents == ("b.rst.gz", "sub/a.rst.gz")
    assert kernel_docs.read(folder) == ["b.rst.gz", "sub/a.rst.gz"]


def test_austen_reads_serialised_strings_without_r(tmp_path):
    def novel(*lines):
        record = b"X\n" + struct.pack(">3i", 3, 262146, 197888) + struct.pack(">i", 5) + b"UTF-8"
        record += struct.pack(">ii", 16, len(lines))
        for line in lines:
            record += struct.pack(">ii", 0x40009, len(line.encode())) + line.encode()
        packed = zlib.compress(record)
        return struct.pack(">I", len(record)) + packed

    (tmp_path / "Rdata.rdb").write_bytes(novel("EMMA", "", "Emma—") + novel("END"))
    assert austen.read(tmp_path) == ["EMMA\n\nEmma—\n", "END\n"]


def test_king_james_reads_verses_without_markup_and_notes(tmp_path):
    verses = [b'<title>Genesis</title> <w lemma="a">In</w> the<note>or</note>', b"And &amp; God "]
    block = b"".join(verses)
    packed = zlib.compress(block)
    for testament in ("ot", "nt"):
        (tmp_path / f"{testament}.bzz").write_bytes(packed)
        (tmp_path / f"{testament}.bzs").write_bytes(struct.pack("<III", 0, len(packed), len(block)))
        index = struct.pack("<IIH", 0, 0, 0) + struct.pack("<IIH", 0, 0, len(verses[0]))
        index += struct.pack("<IIH", 0, len(verses[0]), len(verses[1]))
        (tmp_path / f"{testament}.bzv").write_bytes(index)
    assert king_james.read(tmp_path) == ["Genesis\nIn the\nAnd & God\n"] * 2


def test_shakespeare_leaves_out_the_second_spelling_of_a_play(tmp_path):
    for name in ("lear_gut.txt", "lear_gut_f.txt", "metadata.txt", "errors_gut.txt"):
        (tmp_path / name).write_text(name)
    assert shakespeare.read(tmp_path) == ["errors_gut.txt", "lear_gut.txt"]


# --- splitting


@given(
    st.lists(st.text(alphabet="ab \n", min_size=1, max_size=30), min_size=1, max_size=12),
    st.sampled_from([0.5, 0.9, (0.8, 0.1), (0.2, 0.2, 0.2)]),
)
def test_parts_are_contiguous_and_complete(documents, fraction):
    corpus = Corpus("c", tuple(documents))
    parts = 2 if isinstance(fraction, float) else len(fraction) + 1
    pieces = len(documents) if len(documents) > 1 else len(documents[0])
    if pieces < parts:
        with pytest.raises(DataError, match="too few for"):
            split_text(corpus, fraction)
        return
    split = split_text(corpus, fraction)
    assert len(split) == parts
    assert all(part.characters for part in split)
    assert "".join("".join(part.documents) for part in split) == "".join(documents)
    if len(documents) > 1:
        assert sum((part.documents for part in split), ()) == corpus.documents
    assert split == split_text(corpus, fraction)


def test_one_document_is_cut_at_a_line_end_near_the_share():
    train, validation = split_text(Corpus("c", (PROSE,)))
    assert train.documents[0].endswith("\n")
    assert train.characters == pytest.approx(0.9 * len(PROSE), abs=60)
    assert (train.name, validation.name) == ("c/train", "c/validation")


def test_text_without_near_line_ends_is_cut_between_characters():
    train, validation = split_text(Corpus("c", ("ab\n" + "x" * 997,)))
    assert (train.characters, validation.characters) == (900, 100)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, (), (0.5, 0.5)])
def test_shares_that_leave_nothing_are_refused(fraction):
    with pytest.raises(DataError, match="fraction"):
        split_text(Corpus("c", (PROSE,)), fraction)


# --- tokenisers


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def tokenizer(request):
    return (
        byte_tokenizer() if request.param == "bytes" else train_bpe([PROSE, SPACED], vocabulary=400)
    )


@given(text=st.text(max_size=60))
@settings(max_examples=60)
def test_any_text_comes_back_exactly(tokenizer, text):
    (ids,) = encode(tokenizer, [text])
    assert tokenizer.decode(ids.tolist(), skip_special_tokens=False) == text
    assert token_bytes(tokenizer)[ids].sum() == len(text.encode())


def test_special_tokens_in_a_text_are_text(tokenizer):
    (ids,) = encode(tokenizer, [AWKWARD])
    assert tokenizer.decode(ids.tolist()) == AWKWARD
    assert not {special_id(tokenizer, EOS), special_id(tokenizer, PAD)} & set(ids.tolist())


def test_special_tokens_are_the_last_ids(tokenizer):
    size = tokenizer.get_vocab_size()
    assert (special_id(tokenizer, EOS), special_id(tokenizer, PAD)) == (size - 2, size - 1)
    assert token_bytes(tokenizer)[-2:].tolist() == [0, 0]
    with pytest.raises(DataError, match="no <bos>"):
        special_id(tokenizer, "<bos>")


def test_byte_ids_are_byte_values():
    (ids,) = encode(byte_tokenizer(), [AWKWARD])
    assert ids.tolist() == list(AWKWARD.encode())


def test_pieces_of_a_long_document_give_the_same_ids(tokenizer, monkeypatch):
    text = SPACED + AWKWARD * 20
    whole = tokenizer.encode(text).ids
    for size in (1, 7, 100):
        monkeypatch.setattr("seqmix.data.tokenizer.PIECE", size)
        assert encode(tokenizer, [text])[0].tolist() == whole


def test_bpe_has_the_vocabulary_asked_for_and_is_shorter_than_bytes():
    bpe = train_bpe([PROSE], vocabulary=300)
    assert bpe.get_vocab_size() == 300
    assert len(bpe.encode(PROSE).ids) < 0.7 * len(PROSE)
    with pytest.raises(RangeError, match="at least 258"):
        train_bpe([PROSE], vocabulary=257)


def test_bpe_is_the_same_in_another_process(tmp_path):
    (tmp_path / "text.txt").write_text(PROSE)
    script = (
        "import sys; from seqmix.data.text import read_text; from seqmix.data.tokenizer import *;"
        "print(train_bpe(read_text(sys.argv[1]).documents, vocabulary=500).to_str())"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "text.txt")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout == train_bpe([PROSE], vocabulary=500).to_str() + "\n"


def test_saved_tokenizer_loads_here_and_in_transformers(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = save_tokenizer(tokenizer, tmp_path / "tokenizer")
    (ids,) = encode(tokenizer, [AWKWARD])
    assert encode(load_tokenizer(folder), [AWKWARD])[0].tolist() == ids.tolist()
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs(AWKWARD)["input_ids"] == ids.tolist()
    assert theirs.decode(ids) == AWKWARD
    assert (theirs.eos_token, theirs.pad_token, theirs.padding_side) == (EOS, PAD, "left")
    assert theirs.eos_token_id == special_id(tokenizer)
    assert len(theirs) == tokenizer.get_vocab_size()
    batch = theirs(["a", "abc def"], padding=True, return_tensors="pt")
    assert batch["input_ids"][0, 0] == theirs.pad_token_id


def test_tokenizer_from_names(tmp_path):
    corpus = Corpus("c", (PROSE,))
    assert tokenizer_from("bytes", corpus).get_vocab_size() == 258
    bpe = tokenizer_from("bpe:300", corpus)
    assert bpe.get_vocab_size() == 300
    save_tokenizer(bpe, tmp_path)
    assert tokenizer_from(tmp_path, corpus).to_str() == bpe.to_str()
    with pytest.raises(DataError, match="bpe:4096"):
        tokenizer_from("bpe", corpus)
    with pytest.raises(DataError, match="no tokeniser 'byte'"):
        tokenizer_from("byte", corpus)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no tokenizer\.json"):
        tokenizer_from(tmp_path / "empty", corpus)
    (tmp_path / "empty" / "tokenizer.json").write_text(json.dumps({"not": "one"}))
    with pytest.raises(DataError, match="is not a tokeniser"):
        load_tokenizer(tmp_path / "empty")


def test_bytes_of_a_token_need_a_byte_level_tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    with pytest.raises(DataError, match="byte-level"):
        token_bytes(words)
    assert encode(words, ["a"])[0].tolist() == [0]


def test_reading_data_imports_no_optional_package():
    script = (
        "import sys, seqmix.data.text, seqmix.data.tokenizer, seqmix.data.language_modelling;"
        "print({'transformers', 'datasets', 'tokenizers', 'optuna'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
