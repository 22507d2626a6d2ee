"""Packing: every token counts exactly once, and every document keeps its own number."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqmix.core.errors import DataError, RangeError, ShapeError
from seqmix.data import (
    Corpus,
    WindowDataset,
    byte_tokenizer,
    cu_seqlens_from_segments,
    encode,
    language_modelling,
    pack,
    split_text,
    token_bytes,
)
from seqmix.data.packing import IGNORED

PROSE = "".join(f"The {i}th line tells what the {i * i}th line will tell.\n" for i in range(400))
SHORT = "naïve café\r\n漢字🙂"
EOS_ID, PAD_ID = 98, 99
DOCUMENTS = st.lists(st.lists(st.integers(0, 97), min_size=1, max_size=20), min_size=1, max_size=8)


def test_windows_by_hand():
    packed = pack([[1, 2, 3], [4]], 4, eos=EOS_ID, pad=PAD_ID)
    batch = packed.batch(range(packed.windows))
    assert batch["input_ids"].tolist() == [[1, 2, 3, 98], [98, 4, 98, 99]]
    assert batch["labels"].tolist() == [[-100, 2, 3, 98], [-100, -100, 98, -100]]
    assert batch["segments"].tolist() == [[0, 0, 0, 0], [0, 1, 1, 2]]
    assert cu_seqlens_from_segments(batch["segments"]).tolist() == [0, 4, 5, 7, 8]
    assert packed.scored_tokens == 4
    assert pack([[1, 2, 3], [4]], 4, eos=EOS_ID).windows == 1


@given(documents=DOCUMENTS, length=st.integers(2, 9), evaluation=st.booleans())
def test_every_token_with_a_predecessor_counts_exactly_once(documents, length, evaluation):
    total = sum(len(document) + 1 for document in documents)
    if not evaluation and total < length:
        with pytest.raises(DataError, match=f"{total} tokens and one window needs {length}"):
            pack(documents, length, eos=EOS_ID)
        return
    packed = pack(documents, length, eos=EOS_ID, pad=PAD_ID if evaluation else None)
    counted = []
    for row in range(packed.windows):
        window = {name: values[0].tolist() for name, values in packed.batch([row]).items()}
        for t, (token, label) in enumerate(zip(window["input_ids"], window["labels"], strict=True)):
            if label != IGNORED:
                assert label == token
                assert window["segments"][t] == window["segments"][t - 1]
                counted.append((window["input_ids"][t - 1], token))
    wanted = [
        pair
        for document in documents
        for pair in zip([*document], [*document[1:], EOS_ID], strict=True)
    ]
    assert packed.scored_tokens == len(counted)
    if evaluation:
        assert counted == wanted
    else:
        seen = packed.windows * (length - 1) + 1
        assert total - seen < length - 1  # no further window would fit
        begun = sum(start < seen for start in packed.starts.tolist())
        assert counted == wanted[: seen - begun]
        assert PAD_ID not in packed.batch(range(packed.windows))["input_ids"]


@given(documents=DOCUMENTS, length=st.integers(2, 9))
def test_segments_are_the_documents_of_a_row(documents, length):
    packed = pack(documents, length, eos=EOS_ID, pad=PAD_ID)
    batch = packed.batch(range(packed.windows))
    owner = [i for i, document in enumerate(documents) for _ in range(len(document) + 1)]
    for row, segments in enumerate(batch["segments"].tolist()):
        here = owner[row * (length - 1) : row * (length - 1) + length]
        here += [len(documents)] * (length - len(here))
        steps = [b > a for a, b in pairwise(here)]
        assert segments == [0, *np.cumsum(steps).tolist()]
    offsets = cu_seqlens_from_segments(batch["segments"])
    assert offsets.dtype == torch.int32
    assert offsets[0] == 0
    assert offsets[-1] == batch["segments"].numel()
    assert set(range(0, batch["segments"].numel(), length)) <= set(offsets.tolist())


def test_scored_bytes_are_the_bytes_of_the_text_but_for_first_tokens():
    made = byte_tokenizer()
    texts = [PROSE, SHORT]
    packed = pack(encode(made, texts), 64, eos=256, pad=257)
    first = 1  # one byte per document opens it and has nothing to be predicted from
    assert packed.scored_bytes(token_bytes(made)) == sum(len(t.encode()) - first for t in texts)
    assert packed.scored_tokens == packed.scored_bytes(token_bytes(made)) + len(texts)


def test_uniform_model_scores_the_logarithm_of_the_vocabulary():
    data = language_modelling(Corpus("c", (PROSE,)), length=50)
    logits = torch.zeros(data.vocabulary)
    nats = 0.0
    for window in data.validation:
        labels = window["labels"][1:]
        nats -= logits.log_softmax(0)[labels[labels != IGNORED]].sum().item()
    assert nats == pytest.approx(data.validation.packed.scored_tokens * math.log(258))
    held_out = split_text(data.corpus)[1]
    assert data.validation_bytes == held_out.bytes - 1
    bits_per_byte = nats / math.log(2) / data.validation_bytes
    assert bits_per_byte == pytest.approx(math.log2(258) * (1 + 1 / data.validation_bytes))


def test_window_dataset_works_with_a_loader():
    packed = pack([list(range(50))], 8, eos=EOS_ID)
    dataset = WindowDataset(packed)
    loader = torch.utils.data.DataLoader(dataset, batch_size=3)
    batches = list(loader)
    assert len(dataset) == 7
    assert torch.cat([batch["input_ids"] for batch in batches]).equal(
        packed.batch(range(7))["input_ids"]
    )
    assert all(value.dtype == torch.int64 for value in dataset[-1].values())
    with pytest.raises(IndexError):
        dataset[7]


def test_tokenizer_is_trained_on_the_training_part_only():
    corpus = Corpus("c", (PROSE, "qzqzqz " * 50))
    data = language_modelling(corpus, tokenizer="bpe:300", length=32, fraction=0.9)
    assert not any("qz" in token for token in data.tokenizer.get_vocab())


@pytest.mark.parametrize("length", [0, 1])
def test_window_needs_two_tokens(length):
    with pytest.raises(RangeError, match="at least 2"):
        pack([[1, 2]], length, eos=3)


@pytest.mark.parametrize("shape", [(3,), (0, 4), (1, 2, 3)])
def test_segments_of_another_shape_are_refused(shape):
    with pytest.raises(ShapeError, match="B, T"):
        cu_seqlens_from_segments(torch.zeros(shape, dtype=torch.int64))
