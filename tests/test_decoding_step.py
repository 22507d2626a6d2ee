"""Blocks in one compiled call: the same as their parts one after the other, wherever it takes their place."""

import copy
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

import pytest
import torch
from small_decoder import build, decode, tokens

from seqmix.compress._quantizers import four_bits
from seqmix.core.state import concatenate_rows, leaves
from seqmix.kernels import decoding, missing
from seqmix.layers.positions import turns_of_few
from seqmix.linears import replace_layer
from seqmix.linears.int4 import Int4
from seqmix.linears.int8 import Int8
from seqmix.models._decoding import MOST
from seqmix.models.hf import create
from seqmix.ops import record_forms
from seqmix.testing._memory import default_dtype, guarded_memory

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

LAYOUTS = {
    "plain": "2x[attention]",
    "grouped": "2x[attention(key_heads=2)]",
    "own_heads": "2x[attention(head_width=20, bias=true, output_bias=true, scale=0.3)]",
    "part_turns": "2x[attention(rotary=0.4, key_heads=3)]",
    "long_texts": "2x[attention(rope_factor=2.0, rope_original=8)]",
    "no_positions": "2x[attention(rope_base=none)]",
    "hybrid": "[mamba2, attention, attention, attention(window=8), attention]",
    "biases": "2x[attention / glu(bias=true)]",
    "no_channel": "2x[attention / none]",
    "many_heads_of_a_key": "2x[attention(heads=200, key_heads=1, head_width=2)]",
}


def test_shortcuts_are_part_of_it(part_by_part, compiled_calls):
    model = create("2x[attention]", width=60, heads=6, vocabulary=50, shortcuts=True).eval().model
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.15)
    ids, pieces = tokens(2, 100), (1, 9)
    got, _ = decode(model, ids, 80, pieces)
    assert len(compiled_calls) == 2 * 2 * (1 + len(pieces))
    wanted, _ = part_by_part(lambda: decode(model, ids, 80, pieces))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "kind", [Int8.of, lambda layer: Int4.of(layer, *four_bits(layer.weight, 20))]
)
def test_shortcuts_of_few_bits_are_part_of_it(kind, part_by_part, compiled_calls):
    model = create("2x[attention]", width=60, heads=6, vocabulary=50, shortcuts=True).eval().model
    for place in ("0.mixer", "1.channel"):
        place = f"backbone.blocks.{place}_shortcut"
        replace_layer(model, place, kind(model.get_submodule(place)))
    ids = tokens(2, 100)
    got, _ = decode(model, ids, 80, (1, 19))
    assert compiled_calls.number == 3
    wanted, _ = part_by_part(lambda: decode(model, ids, 80, (1, 19)))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_what_the_parts_compute(layout, part_by_part, compiled_calls):
    model, ids, pieces = build(LAYOUTS[layout]), tokens(3, 100), (1, 1, 3, 1, 20)
    got, after = decode(model, ids, 70, pieces)
    assert compiled_calls
    wanted, same = part_by_part(lambda: decode(model, ids, 70, pieces))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(leaves(after), leaves(same), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_blocks_that_follow_each_other_are_one_call(compiled_calls):
    found = []
    for layout in ("4x[attention]", "[attention, attention, mamba2, attention]"):
        compiled_calls.number = 0
        decode(build(layout), tokens(1, 81), 80, (1,))
        found.append(compiled_calls.number)
    # For the prompt and for the token after it: the channel of a block with another mixer is a call of its own.
    assert found == [2, 6]


def test_blocks_without_a_mixer_or_a_channel_are_in_the_call(part_by_part, compiled_calls):
    model, ids = build("[attention, none / glu, attention / none]"), tokens(2, 90)
    got, after = decode(model, ids, 80, (1, 9))
    assert compiled_calls == ["attention", "gate", "gate", "attention"] * 3
    assert compiled_calls.number == 3
    wanted, same = part_by_part(lambda: decode(model, ids, 80, (1, 9)))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert [state is None for state in after] == [state is None for state in same]


def test_the_stream_may_change_its_width():
    generator = torch.Generator().manual_seed(0)
    x, before = torch.randn(2, 3, 12, generator=generator), None
    halves = []
    for inputs, outputs in ((12, 20), (20, 20), (20, 8)):
        names = {"gate": (40, inputs), "up": (40, inputs), "output": (outputs, 40)}
        w = {k: torch.randn(*shape, generator=generator) for k, shape in names.items()}
        s = torch.randn(outputs, inputs, generator=generator)
        layers = [(w[name], None, None, None, 0) for name in names]
        shortcut = (s, None, None, None, 0)
        half = decoding.Half(torch.ones(inputs), 1e-6, layers[:2], layers[2], shortcut)
        halves.append((half, decoding.NO_MEMORY))
        before = x if before is None else before
        n = torch.nn.functional.rms_norm(before, (inputs,), eps=1e-6)
        y = torch.nn.functional.silu(n @ w["gate"].T) * (n @ w["up"].T)
        before = before @ s.T + y @ w["output"].T
    torch.testing.assert_close(decoding.decode(x, halves), before, rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match="norm does not fit"):
        decoding.decode(x, halves[1:])


@pytest.mark.parametrize("kind", ["int8", "int4", "bfloat16"])
def test_weights_of_few_bits_and_halves(kind, part_by_part, compiled_calls):
    model = build("2x[attention(key_heads=3)]")
    for name in ("mixer.query", "mixer.value", "mixer.output", "channel.gate", "channel.output"):
        place = f"backbone.blocks.1.{name}"
        layer = model.get_submodule(place)
        if kind == "int8":
            replace_layer(model, place, Int8.of(layer))
        if kind == "int4":
            replace_layer(model, place, Int4.of(layer, *four_bits(layer.weight, 20)))
    if kind == "bfloat16":
        model = model.bfloat16()
    ids, pieces = tokens(2, 100), (1, 9, 1)
    with record_forms() as forms:
        got, _ = decode(model, ids, 80, pieces)
    assert compiled_calls == ["attention", "gate"] * 2 * (1 + len(pieces))
    assert ("attention", "native") in forms
    for name in ("int8", "int4"):
        assert ((f"{name}_matmul", "native") in forms) == (kind == name)
    wanted, _ = part_by_part(lambda: decode(model, ids, 80, pieces))
    if kind != "bfloat16":
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
        return
    # Parts round what they give to each other, halves do not.
    exact, _ = decode(model.float(), ids, 80, pieces)
    assert (got - exact).norm() < (wanted - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("group", [16, 32, 48])
def test_four_bits_in_groups(group, compiled_calls):
    model = build("2x[attention(key_heads=3, bias=true)]", width=96)
    dense = copy.deepcopy(model)
    for name in ("mixer.query", "mixer.output", "channel.gate", "channel.up", "channel.output"):
        place = f"backbone.blocks.1.{name}"
        layer = model.get_submodule(place)
        if layer.in_features % group == 0:
            four = Int4.of(layer, *four_bits(layer.weight, group))
            replace_layer(model, place, four)
            replace_layer(dense, place, four.to_dense())
    ids = tokens(1, 100)
    for length in range(1, 10):
        compiled_calls.clear()
        with guarded_memory():
            got = decode(model, ids, 60, (length,))[0].clone()
        assert compiled_calls == ["attention", "gate"] * 2 * 2
        wanted = decode(dense, ids, 60, (length,))[0]
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_texts_of_several_lengths_go_on_together(compiled_calls):
    model, ids = build("2x[attention(key_heads=2)]"), tokens(2, 700)
    with torch.inference_mode():
        states = [model(ids[:1, :9])[1], model(ids[1:, :650])[1]]
        state, found = concatenate_rows(states), []
        for step in range(3):
            now = torch.stack([ids[0, 9 + step], ids[1, 650 + step]]).unsqueeze(1)
            logits, state = model(now, state)
            found.append(logits)
        found = torch.cat(found, dim=1)
        assert compiled_calls
        for row, first in ((0, 9), (1, 650)):
            wanted = model(ids[row : row + 1, : first + 3])[0][0, first:]
            torch.testing.assert_close(found[row], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["2x[attention]", "2x[attention(key_heads=1, rotary=0.4)]"])
def test_prompts_are_one_call_too(layout, part_by_part, compiled_calls):
    model, ids = build(layout), tokens(2, 490)
    # Of several blocks of queries, without and with keys before them.
    got, after = decode(model, ids, 200, (50, 240))
    assert compiled_calls.number == 3
    wanted, same = part_by_part(lambda: decode(model, ids, 200, (50, 240)))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(leaves(after), leaves(same), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_longer_prompts_go_part_by_part(compiled_calls):
    model, ids = build("attention"), tokens(1, MOST[torch.float32] + 1)
    decode(model, ids, MOST[torch.float32], (1,))
    assert compiled_calls.number == 2
    decode(model, ids, len(ids[0]), ())
    assert compiled_calls.number == 2


def test_prompts_of_several_lengths_go_on_together(compiled_calls):
    model, ids = build("2x[attention(key_heads=2)]"), tokens(2, 400)
    with torch.inference_mode():
        state = concatenate_rows([model(ids[:1, :9])[1], model(ids[1:, :250])[1]])
        compiled_calls.number = 0
        found, _ = model(torch.stack([ids[0, 9:159], ids[1, 250:]]), state)
        assert compiled_calls.number == 1
        for row, first in ((0, 9), (1, 250)):
            wanted = model(ids[row : row + 1, : first + 150])[0][0, first:]
            torch.testing.assert_close(found[row], wanted, rtol=1e-4, atol=1e-5)


def _packed(model, texts, state=None):
    """Logits of texts of several lengths, read packed, and the state after them."""
    bounds = torch.tensor([0, *accumulate(map(len, texts))], dtype=torch.int32)
    logits, state = model(torch.cat(texts).unsqueeze(0), state, cu_seqlens=bounds)
    return logits[0].split([len(text) for text in texts]), state


@pytest.mark.parametrize("layout", [*list(LAYOUTS)[:6], "hybrid"])
def test_packed_texts_are_one_call(layout, part_by_part, compiled_calls):
    model, ids = build(LAYOUTS[layout]), tokens(4, 300)
    lengths = [(3, 90, 1, 217), (70, 1, 2, 9), (1, 1, 1, 2)]
    with torch.inference_mode():
        read, state = [0] * 4, None
        for pieces in lengths:
            compiled_calls.number = 0
            texts = [row[a : a + n] for row, a, n in zip(ids, read, pieces, strict=True)]
            kept = [leaf.clone() for leaf in leaves(state)]
            got, after = _packed(model, texts, state)
            assert compiled_calls.number == (1 if layout != "hybrid" else 4)
            for leaf, before in zip(leaves(state), kept, strict=True):
                assert torch.equal(leaf, before)
            wanted, _ = part_by_part(lambda: _packed(model, texts, state))  # noqa: B023, it is called here
            for mine, theirs in zip(got, wanted, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
            read, state = [a + n for a, n in zip(read, pieces, strict=True)], after
        got, _ = model(
            torch.stack([row[a : a + 2] for row, a in zip(ids, read, strict=True)]), state
        )
        for row, place, logits in zip(ids, read, got, strict=True):
            wanted = model(row[None, : place + 2])[0][0, place:]
            torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)


def test_packed_texts_of_very_different_lengths_go_part_by_part(compiled_calls):
    model, ids = build("attention"), tokens(1, 100)
    with torch.inference_mode():
        _packed(model, [ids[0], *ids[0].split(1)[:20]])
        assert compiled_calls == ["gate"]
        _packed(model, [ids[0], *ids[0].split(30)[:3]])
        assert compiled_calls == ["gate", "attention", "gate"]


def test_another_default_device_is_no_matter(compiled_calls):
    model, ids = build("2x[attention]"), tokens(2, 40)
    texts = [ids[0, :30], ids[1, :12]]
    with torch.inference_mode():
        wanted, state = _packed(model, texts)
        number = compiled_calls.number
        with torch.device("meta"):
            got, after = model(
                torch.cat(texts).unsqueeze(0), cu_seqlens=torch.tensor([0, 30, 42], device="cpu")
            )
        assert compiled_calls.number == 2 * number
        torch.testing.assert_close(got[0], torch.cat(wanted), rtol=0, atol=0)
        for mine, theirs in zip(leaves(after), leaves(state), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_features_of_other_shapes_are_no_tokens():
    model = build("none / glu").backbone
    with torch.inference_mode():
        x = torch.randn(7, 3, 5, 60)
        wanted = model(x.flatten(0, 2).unsqueeze(0))[0].view_as(x)
        torch.testing.assert_close(model(x)[0], wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(x[0, 0])[0], wanted[0, 0], rtol=1e-4, atol=1e-5)


def test_a_packed_text_may_be_empty(compiled_calls):
    model, ids = build("2x[attention]"), tokens(3, 40)
    with torch.inference_mode():
        texts = [ids[0, :9], ids[1, :0], ids[2, :30]]
        got, state = _packed(model, texts)
        for mine, text in zip(got, texts, strict=True):
            if len(text):
                torch.testing.assert_close(mine, model(text[None])[0][0], rtol=1e-4, atol=1e-5)
        more, compiled_calls.number = [ids[0, 9:12], ids[1, :5], ids[2, 30:30]], 0
        got, _ = _packed(model, more, state)
        assert compiled_calls.number == 1
        torch.testing.assert_close(got[0], model(ids[:1, :12])[0][0, 9:], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got[1], model(ids[1:2, :5])[0][0], rtol=1e-4, atol=1e-5)


def test_packed_texts_write_nothing_beside_what_is_allocated():
    model, ids = build("2x[attention(key_heads=2)]"), tokens(3, 250)
    with torch.inference_mode():
        for pieces in ((200, 3, 9), (1, 1, 1)):
            texts = [row[:n] for row, n in zip(ids, pieces, strict=True)]
            wanted, state = _packed(model, texts)
            more = _packed(
                model, [row[n : n + 9] for row, n in zip(ids, pieces, strict=True)], state
            )[0]
            with guarded_memory():
                got, state = _packed(model, texts)
                again = _packed(
                    model, [row[n : n + 9] for row, n in zip(ids, pieces, strict=True)], state
                )[0]
                got, again = torch.cat(got).clone(), torch.cat(again).clone()
            torch.testing.assert_close(got, torch.cat(wanted), rtol=0, atol=0)
            torch.testing.assert_close(again, torch.cat(more), rtol=0, atol=0)


def test_a_state_stays_as_it_was():
    model, ids = build("attention"), tokens(1, 30)
    with torch.inference_mode():
        _, state = model(ids[:, :20])
        kept = [leaf.clone() for leaf in leaves(state)]
        first, _ = model(ids[:, 20:21], state)
        model(ids[:, 25:26], state)  # a fork, which must not write into the first one's keys
        again, after = model(ids[:, 20:21], state)
        torch.testing.assert_close(again, first, rtol=0, atol=0)
        for leaf, before in zip(leaves(state), kept, strict=True):
            torch.testing.assert_close(leaf, before, rtol=0, atol=0)
        wanted = model(ids[:, :22])[0][:, 21:]
        torch.testing.assert_close(model(ids[:, 21:22], after)[0], wanted, rtol=1e-4, atol=1e-5)


def test_many_keys_are_read_in_pieces_whose_number_of_threads_changes_no_bit(part_by_part):
    model, ids = build("2x[attention(key_heads=2)]"), tokens(1, 2000)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with torch.inference_mode():
                torch.set_num_threads(1)
                _, state = model(ids[:, :1999])
                torch.set_num_threads(threads)
                found.append(model(ids[:, 1999:], state)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    wanted = part_by_part(lambda: decode(model, ids, 1999, (1,)))[0][:, 1999:]
    torch.testing.assert_close(found[0], wanted, rtol=1e-4, atol=1e-5)


def test_a_prompt_is_the_same_with_any_number_of_threads():
    model, ids = build("2x[attention(key_heads=2)]"), tokens(1, 450)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(decode(model, ids, 150, (300,))[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_nan_of_one_text_stays_there():
    model, ids = build("attention"), tokens(2, 12)
    with torch.inference_mode():
        _, state = model(ids[:, :10])
        wanted, _ = model(ids[:, 10:11], state)
        for leaf in leaves(state):
            if leaf.ndim == 4:
                leaf[0, 3] = torch.nan
        got, _ = model(ids[:, 10:11], state)
    assert got[0].isnan().all()
    torch.testing.assert_close(got[1], wanted[1], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_written_beside_what_is_allocated(dtype):
    for layout in (
        "2x[attention]",
        "attention(head_width=20, key_heads=2, bias=true) / glu(bias=true)",
    ):
        for rows, length in ((1, 1), (3, 9), (1, 331)):
            model, ids = build(layout, dtype), tokens(rows, 70 + length)
            with torch.inference_mode():
                _, state = model(ids[:, :70])
                wanted = model(ids[:, 70:], state)[0]
                with guarded_memory():
                    got = model(ids[:, 70:], state)[0].clone()
            torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_a_state_of_other_rows_is_refused_and_left_as_it_was(compiled_calls):
    model, ids = build("attention"), tokens(3, 82)
    with torch.inference_mode():
        _, state = model(ids[:1, :80])
        wanted = model(ids[:1, 80:81], state)[0]
        compiled_calls.clear()
        with pytest.raises(RuntimeError, match="size"):
            model(ids[:, 80:81], state)
        assert "attention" not in compiled_calls
        torch.testing.assert_close(model(ids[:1, 80:81], state)[0], wanted, rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["2x[attention]", "attention(head_width=20, key_heads=2)"])
def test_what_there_is_room_for_behind_the_keys_is_neither_read_nor_written(layout):
    model, ids = build(layout), tokens(3, 90)
    with torch.inference_mode():
        _, state = model(ids[:, :80])
        _, state = model(ids[:, 80:81], state)
        wanted = model(ids[:, 81:84], state)[0]
        _, state = model(ids[:, :80])
        _, state = model(ids[:, 80:81], state)
        rooms = [part[name].room for part in state for name in ("keys", "values")]
        for room in rooms:
            assert room.shape[1] > 84
            room[:, 81:] = torch.nan
        got = model(ids[:, 81:84], state)[0]
        assert torch.equal(got, wanted)
        for room in rooms:
            assert not room[:, :84].isnan().any()
            assert room[:, 84:].isnan().all()


def _half(**other):
    layer = (torch.ones(8, 8), None, None, None, 0)
    given = {
        "norm": torch.ones(8),
        "eps": 1e-6,
        "read": [layer] * 3,
        "output": layer,
        "head_width": 4,
    }
    return decoding.Half(**given | other)


@pytest.mark.parametrize(
    "layer",
    [
        (torch.ones(8, 8, dtype=torch.uint8), None, None, None, 0),
        (torch.ones(8, 9)[:, :8], None, None, None, 0),
        (torch.ones(8, 4, dtype=torch.int8), torch.ones(8), None, torch.ones(8, 1).byte(), 8),
        (torch.ones(8, 4).byte(), torch.ones(8), None, torch.ones(16, 1).byte()[::2], 8),
        (torch.ones(8, 8), torch.ones(7), None, None, 0),
        (torch.ones(8, 8), None, torch.ones(8).double(), None, 0),
    ],
)
def test_layers_that_kernels_would_read_wrongly_are_refused(layer):
    with pytest.raises((ValueError, TypeError)):
        _half(output=layer)


def test_norms_and_memories_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="gaps"):
        _half(norm=torch.ones(16)[::2])
    x, keys = torch.ones(1, 1, 8), torch.ones(1, 6, 2, 4)
    for start in (-1, 6):
        with pytest.raises(ValueError, match="starts among"):
            decoding.decode(x, [(_half(), (keys, keys, 6, torch.tensor([start]), *[None] * 3))])
    with pytest.raises(ValueError, match="fewer keys"):
        decoding.decode(x, [(_half(), (keys, keys, 7, torch.tensor([0]), *[None] * 3))])
    for bounds in ([0], [1, 1], [0, 2], [0, 1, 1]):
        memory = (keys, keys, 6, torch.tensor([0]), None, None, torch.tensor(bounds))
        with pytest.raises(ValueError, match="bounds"):
            decoding.decode(x, [(_half(), memory)])
    with pytest.raises(ValueError, match="factor or bias"):
        decoding.linear_step(x, torch.ones(9, 8), torch.ones(8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_is_no_matter(dtype):
    model, ids = build("2x[attention]"), tokens(3, 82)
    replace_layer(model, "backbone.blocks.0.mixer.key", Int8.of(model.backbone.blocks[0].mixer.key))
    wanted = decode(model, ids, 80, (1, 1))[0]
    turns_of_few.cache_clear()
    with default_dtype(dtype):
        got = decode(model, ids, 80, (1, 1))[0]
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_two_threads_decode_with_one_model():
    model, ids = build("3x[attention(key_heads=2)]"), tokens(8, 120)
    wanted = [decode(model, row[None], 80, (1,) * 40)[0] for row in ids]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda row: decode(model, row[None], 80, (1,) * 40)[0], ids))
    for got, alone in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, alone, rtol=0, atol=0)
