"""Blocks in one compiled call: the same as their parts one after the other, wherever it takes their place."""

import copy
import gc
import pickle
import weakref

import pytest
import torch

from seqmix.compress._quantizers import four_bits
from seqmix.core.state import concatenate_rows, leaves
from seqmix.kernels import decoding, missing
from seqmix.linears import replace_layer
from seqmix.linears.int4 import Int4
from seqmix.linears.int8 import Int8
from seqmix.models import _decoding
from seqmix.models.hf import create
from seqmix.ops import record_forms
from seqmix.testing._memory import guarded_memory

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
}


def build(layout, dtype=torch.float32, width=60):
    model = create(layout, width=width, heads=6, vocabulary=50).eval().model
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.15, generator=generator)
    return model.to(dtype)


@pytest.fixture
def without(monkeypatch):
    """Runs a function with every part of a block called on its own."""

    def run(function):
        with monkeypatch.context() as patch:
            patch.setattr(_decoding, "_is_few", lambda x, most: False)
            return function()

    return run


@pytest.fixture
def calls(monkeypatch):
    """The halves of blocks that compiled calls compute; the calls themselves are counted in `calls.number`."""

    class Seen(list):
        number = 0

    seen, real = Seen(), decoding.decode

    def counted(x, halves):
        seen.number += 1
        seen.extend("gate" if m is decoding.NO_MEMORY else "attention" for _, m in halves)
        return real(x, halves)

    monkeypatch.setattr(decoding, "decode", counted)
    return seen


def test_shortcuts_are_part_of_it(without, calls):
    model = create("2x[attention]", width=60, heads=6, vocabulary=50, shortcuts=True).eval().model
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.15)
    ids, pieces = tokens(2, 100), (1, 9)
    got, _ = decode(model, ids, 80, pieces)
    assert len(calls) == 2 * 2 * len(pieces)
    wanted, _ = without(lambda: decode(model, ids, 80, pieces))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def decode(model, ids, first, pieces):
    """Logits of all tokens, the first ones read at once and the others in pieces."""
    with torch.inference_mode():
        logits, state = model(ids[:, :first])
        found, place = [logits], first
        for length in pieces:
            logits, state = model(ids[:, place : place + length], state)
            found.append(logits)
            place += length
    return torch.cat(found, dim=1), state


def tokens(rows, length):
    return torch.randint(50, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_what_the_parts_compute(layout, without, calls):
    model, ids, pieces = build(LAYOUTS[layout]), tokens(3, 100), (1, 1, 3, 1, 20)
    got, after = decode(model, ids, 70, pieces)
    assert calls
    wanted, same = without(lambda: decode(model, ids, 70, pieces))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(leaves(after), leaves(same), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_blocks_that_follow_each_other_are_one_call(calls):
    found = {}
    for layout in ("4x[attention]", "[attention, attention, mamba2, attention]"):
        calls.number = 0
        decode(build(layout), tokens(1, 81), 80, (1,))
        found[layout] = calls.number
    assert list(found.values()) == [
        1,
        3,
    ]  # of the other two mixers' blocks the channel is a call of its own


def test_blocks_without_a_mixer_or_a_channel_are_in_the_call(without, calls):
    model, ids = build("[attention, none / glu, attention / none]"), tokens(2, 90)
    got, after = decode(model, ids, 80, (1, 9))
    assert calls == ["attention", "gate", "gate", "attention"] * 2
    assert calls.number == 2
    wanted, same = without(lambda: decode(model, ids, 80, (1, 9)))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert [state is None for state in after] == [state is None for state in same]


def test_a_hook_of_a_block_is_called_and_the_others_are_one_call(calls):
    model, ids, seen = build("4x[attention]"), tokens(1, 81), []
    model.backbone.blocks[1].register_forward_hook(lambda *given: seen.append(given))
    decode(model, ids, 80, (1,))
    assert len(seen) == 2
    assert calls.number == 1 + 2 + 1


def test_the_stream_may_change_its_width():
    generator = torch.Generator().manual_seed(0)
    x, before = torch.randn(2, 3, 12, generator=generator), None
    halves = []
    for inputs, outputs in ((12, 20), (20, 20), (20, 8)):
        names = {"gate": (40, inputs), "up": (40, inputs), "output": (outputs, 40)}
        w = {k: torch.randn(*shape, generator=generator) for k, shape in names.items()}
        s = torch.randn(outputs, inputs, generator=generator)
        layers = [(w[name], None, None, None, 0) for name in names]
        half = decoding.gated_half(torch.ones(inputs), 1e-6, layers, (s, None, None, None, 0))
        halves.append((half, decoding.NO_MEMORY))
        before = x if before is None else before
        n = torch.nn.functional.rms_norm(before, (inputs,), eps=1e-6)
        y = torch.nn.functional.silu(n @ w["gate"].T) * (n @ w["up"].T)
        before = before @ s.T + y @ w["output"].T
    del w, s, layers, half  # what a half is of lives as long as it
    torch.testing.assert_close(decoding.decode(x, halves), before, rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match="norm does not fit"):
        decoding.decode(x, halves[1:])


@pytest.mark.parametrize("kind", ["int8", "int4", "bfloat16"])
def test_weights_of_few_bits_and_halves(kind, without, calls):
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
    assert calls.count("attention") == 2 * len(pieces)
    prompts = 2 if kind == "bfloat16" else 0  # whose channel mixers are computed so too
    assert calls.count("gate") == 2 * len(pieces) + prompts
    assert ("attention", "native") in forms
    for name in ("int8", "int4"):
        assert ((f"{name}_matmul", "native") in forms) == (kind == name)
    wanted, _ = without(lambda: decode(model, ids, 80, pieces))
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if kind != "bfloat16" else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(got, wanted, **tolerance)


def test_texts_of_several_lengths_go_on_together(calls):
    model, ids = build("2x[attention(key_heads=2)]"), tokens(2, 700)
    with torch.inference_mode():
        states = [model(ids[:1, :9])[1], model(ids[1:, :650])[1]]
        state, found = concatenate_rows(states), []
        for step in range(3):
            now = torch.stack([ids[0, 9 + step], ids[1, 650 + step]]).unsqueeze(1)
            logits, state = model(now, state)
            found.append(logits)
        found = torch.cat(found, dim=1)
        assert calls
        for row, first in ((0, 9), (1, 650)):
            wanted = model(ids[row : row + 1, : first + 3])[0][0, first:]
            torch.testing.assert_close(found[row], wanted, rtol=1e-4, atol=1e-5)


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


def test_many_keys_are_read_in_pieces_whose_number_of_threads_changes_no_bit(without):
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
    wanted = without(lambda: decode(model, ids, 1999, (1,)))[0][:, 1999:]
    torch.testing.assert_close(found[0], wanted, rtol=1e-4, atol=1e-5)


def test_who_wants_to_see_the_parts_sees_them(calls):
    model, ids, seen = build("attention"), tokens(1, 82), []
    block = model.backbone.blocks[0]
    hooks = [
        part.register_forward_hook(lambda *given: seen.append(given))
        for part in (block.mixer.value, block.channel.up)
    ]
    decode(model, ids, 80, (1, 1))
    assert len(seen) == 2 * 3
    assert not calls
    for hook in hooks:
        hook.remove()
    decode(model, ids, 80, (1, 1))
    assert calls == ["attention", "gate"] * 2


def _other_values(model):
    layer = model.backbone.blocks[0].mixer.query
    layer.weight.data.mul_(2.0)


def _other_storage(model):
    layer = model.backbone.blocks[0].channel.gate
    layer.weight.data = layer.weight.data * 2.0


def _another_view(model):
    layer = model.backbone.blocks[0].mixer.output
    layer.weight.data = layer.weight.data.T


def _other_parameter(model):
    norm = model.backbone.blocks[0].channel_norm
    norm.weight = torch.nn.Parameter(norm.weight.data * 2.0)


def _other_layer(model):
    layer = model.backbone.blocks[0].mixer.key
    replace_layer(model, "backbone.blocks.0.mixer.key", Int8.of(layer))


def _other_mixer(model):
    model.backbone.blocks[0].mixer = build("[attention, attention]").backbone.blocks[1].mixer


def _other_epsilon(model):
    model.backbone.blocks[0].mixer_norm.eps = 10.0


def _another_function(model):
    layer = model.backbone.blocks[0].mixer.value
    layer.forward = lambda x: torch.zeros(*x.shape[:2], layer.out_features)


def _in_halves(model):
    model.to(torch.bfloat16).to(torch.float32)


CHANGES = (
    _other_values, _other_storage, _another_view, _other_parameter, _other_layer, _other_mixer, _other_epsilon,
    _another_function, _in_halves,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_was_changed_between_two_tokens_is_read_as_it_is_now(change, without):
    model, ids = build("2x[attention(bias=true)]"), tokens(1, 82)
    with torch.inference_mode():
        _, state = model(ids[:, :80])
        before = model(ids[:, 80:81], state)[0]
        with torch.inference_mode(False), torch.no_grad():
            change(model)
        got = model(ids[:, 80:81], state)[0]
        wanted = without(lambda: model(ids[:, 80:81], state)[0])
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got, before, rtol=1e-4, atol=1e-5)


def test_a_model_that_decoded_can_be_copied_stored_and_forgotten():
    model, ids = build("2x[attention]"), tokens(1, 82)
    wanted = decode(model, ids, 80, (1, 1))[0]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(decode(other, ids, 80, (1, 1))[0], wanted, rtol=0, atol=0)
    block = weakref.ref(model.backbone.blocks[0])
    weight = weakref.ref(model.backbone.blocks[0].mixer.key.weight)
    del model
    gc.collect()
    assert block() is None
    assert weight() is None


def test_gradients_and_tracers_go_through_the_parts(calls):
    model, ids = build("attention"), tokens(1, 12)
    _, state = model(ids[:, :10])
    logits, _ = model(ids[:, 10:], state)
    logits.sum().backward()
    assert model.backbone.blocks[0].mixer.key.weight.grad is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(ids[:, 10:], model(ids[:, :10])[1])
    assert not calls


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
        for rows, length in ((1, 1), (3, 9)):
            model, ids = build(layout, dtype), tokens(rows, 80)
            with torch.inference_mode():
                _, state = model(ids[:, :70])
                wanted = model(ids[:, 70 : 70 + length], state)[0]
                with guarded_memory():
                    got = model(ids[:, 70 : 70 + length], state)[0].clone()
            torch.testing.assert_close(got, wanted, rtol=0, atol=0)


class Wrapped(torch.Tensor):
    """A weight that is stored in another way than it looks, as quantised ones of torchao are."""


def test_weights_that_only_look_like_tensors_are_left_to_pytorch(calls):
    model, ids = build("attention"), tokens(1, 82)
    block = model.backbone.blocks[0]
    for layer in (block.mixer.key, block.channel.gate):
        layer.weight = torch.nn.Parameter(layer.weight.data.as_subclass(Wrapped))
    decode(model, ids, 80, (1, 1))
    assert not calls


def test_a_state_of_other_rows_is_refused_and_left_as_it_was(calls):
    model, ids = build("attention"), tokens(3, 82)
    with torch.inference_mode():
        _, state = model(ids[:1, :80])
        wanted = model(ids[:1, 80:81], state)[0]
        calls.clear()
        with pytest.raises(RuntimeError, match="size"):
            model(ids[:, 80:81], state)
        assert "attention" not in calls
        torch.testing.assert_close(model(ids[:1, 80:81], state)[0], wanted, rtol=0, atol=0)
