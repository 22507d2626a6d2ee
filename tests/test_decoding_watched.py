"""A model that is watched or changed while it decodes: no part is passed over, nothing old is read, nothing is kept."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.utils.prune
from small_decoder import build, decode, tokens
from torch.utils._python_dispatch import TorchDispatchMode

from seqmix.generate._reader import reader_of
from seqmix.kernels import missing
from seqmix.linears import replace_layer
from seqmix.linears.int8 import Int8
from seqmix.models import _halves
from seqmix.models._halves import KnownBlocks
from seqmix.models.backbone import Block
from seqmix.models.hf import create
from seqmix.serve.reader import SeqmixReader

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


def test_a_hook_of_a_block_is_called_and_the_others_are_one_call(compiled_calls):
    model, ids, seen = build("4x[attention]"), tokens(1, 81), []
    model.backbone.blocks[1].register_forward_hook(lambda *given: seen.append(given))
    decode(model, ids, 80, (1,))
    assert len(seen) == 2
    assert compiled_calls.number == 2 * (1 + 2 + 1)


def test_who_wants_to_see_the_parts_sees_them(compiled_calls):
    model, ids, seen = build("attention"), tokens(1, 82), []
    block = model.backbone.blocks[0]
    hooks = [
        part.register_forward_hook(lambda *given: seen.append(given))
        for part in (block.mixer.value, block.channel.up)
    ]
    decode(model, ids, 80, (1, 1))
    assert len(seen) == 2 * 3
    assert not compiled_calls
    for hook in hooks:
        hook.remove()
    decode(model, ids, 80, (1, 1))
    assert compiled_calls == ["attention", "gate"] * 3


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


def _a_shortcut(model):
    model.backbone.blocks[0].mixer_shortcut = torch.nn.Linear(60, 60, bias=False)


def _another_norm(model):
    model.backbone.blocks[0].channel_last_norm = torch.nn.RMSNorm(60)


def _a_pruned_norm(model):
    torch.nn.utils.prune.l1_unstructured(model.backbone.blocks[0].mixer_norm, "weight", 0.5)


def _no_parameter(model):
    layer = model.backbone.blocks[0].mixer.query
    weight = layer.weight.data * 2.0
    del layer.weight
    layer.weight = weight


CHANGES = (
    _other_values, _other_storage, _another_view, _other_parameter, _other_layer, _other_mixer, _other_epsilon,
    _another_function, _in_halves, _a_shortcut, _another_norm, _a_pruned_norm, _no_parameter,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_was_changed_between_two_tokens_is_read_as_it_is_now(change, part_by_part):
    model, ids = build("2x[attention(bias=true)]"), tokens(1, 82)
    with torch.inference_mode():
        _, state = model(ids[:, :80])
        before = model(ids[:, 80:81], state)[0]
        with torch.inference_mode(False), torch.no_grad():
            change(model)
        got = model(ids[:, 80:81], state)[0]
        wanted = part_by_part(lambda: model(ids[:, 80:81], state)[0])
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got, before, rtol=1e-4, atol=1e-5)


def _read(model, ids, state, known):
    backbone = model.backbone
    return backbone(model.embedding(ids), state, known=known)


def test_known_blocks_are_read_as_they_were_but_for_their_values(compiled_calls):
    model, ids = build("2x[attention(bias=true)]"), tokens(1, 82)
    layer, known = model.backbone.blocks[0].mixer.query, KnownBlocks()
    with torch.inference_mode():
        _, state = model(ids[:, :80])
        before = _read(model, ids[:, 80:81], state, None)[0]
        assert torch.equal(_read(model, ids[:, 80:81], state, known)[0], before)
        layer.weight.data.mul_(2.0)
        wanted = _read(model, ids[:, 80:81], state, None)[0]
        assert not torch.equal(wanted, before)
        assert torch.equal(_read(model, ids[:, 80:81], state, known)[0], wanted)
        _change_much(model)
        assert torch.equal(_read(model, ids[:, 80:81], state, known)[0], wanted)
        assert not torch.equal(_read(model, ids[:, 80:81], state, KnownBlocks())[0], wanted)
    assert compiled_calls


def _change_much(model):
    """Everything gets another tensor, and what was in the old one is nobody's any more."""
    for parameter in model.backbone.blocks.parameters():
        old, parameter.data = parameter.data, torch.full_like(parameter, 0.1)
        del old
    model.backbone.blocks[1].mixer_norm.eps = 10.0


def test_known_blocks_are_known_by_the_dtype_of_what_they_read(compiled_calls):
    model, ids, known = build("2x[attention]"), tokens(1, 82), KnownBlocks()
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        compiled_calls.clear()
        with torch.inference_mode():
            _, state = model(ids[:, :80])
            for _ in range(2):
                got = _read(model, ids[:, 80:81], state, known)[0]
            wanted = _read(model, ids[:, 80:81], state, None)[0]
        assert compiled_calls.count("attention") == 2 * 4
        assert torch.equal(got, wanted)


def test_known_blocks_that_kernels_do_not_compute_are_called(compiled_calls):
    model, ids, known = (
        build("[attention, gated_linear_attention, attention]"),
        tokens(1, 90),
        KnownBlocks(),
    )
    whole = model(ids)[0]
    with torch.inference_mode():
        features, state = _read(model, ids[:, :80], None, known)
        found = [features]
        for place in range(80, 90):
            features, state = _read(model, ids[:, place : place + 1], state, known)
            found.append(features)
        logits = model.logits(torch.cat(found, dim=1))
    torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-5)
    assert compiled_calls.count("attention") == 2 * 11


@pytest.mark.parametrize("of", [SeqmixReader, reader_of])
def test_readers_look_at_blocks_once(of, monkeypatch):
    model, looked, real = (
        create("2x[attention]", width=60, heads=6, vocabulary=50),
        [],
        _halves.halves_of,
    )
    monkeypatch.setattr(_halves, "halves_of", lambda *given: looked.append(given) or real(*given))
    reader, ids = of(model.eval()), tokens(1, 20)
    with torch.inference_mode():
        given = ids.tolist() if of is SeqmixReader else ids
        state = reader.read(given, None)[-1]
        for _ in range(3):
            given = [[1]] if of is SeqmixReader else torch.tensor([[1]])
            state = reader.read(given, state)[-1]
    assert len(looked) == 2


def test_what_stands_in_the_way_of_kernels_may_go_away(compiled_calls):
    model, ids, known = build("2x[attention]"), tokens(1, 82), KnownBlocks()
    hook = model.backbone.blocks[0].register_forward_hook(lambda *given: None)
    with torch.inference_mode():
        _, state = _read(model, ids[:, :80], None, known)
        _read(model, ids[:, 80:81], state, known)
        hook.remove()
        compiled_calls.clear()
        before = compiled_calls.number
        _read(model, ids[:, 80:81], state, known)
    assert compiled_calls.number == before + 1
    assert compiled_calls == ["attention", "gate"] * 2


def test_a_model_that_decoded_can_be_copied_stored_and_forgotten():
    model, ids = build("2x[attention]"), tokens(1, 82)
    wanted = decode(model, ids, 80, (1, 1))[0]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(decode(other, ids, 80, (1, 1))[0], wanted, rtol=0, atol=0)
    parts = model.backbone.blocks[0].mixer
    exchanged = weakref.ref(parts.key.weight)
    replace_layer(model, "backbone.blocks.0.mixer.key", Int8.of(parts.key))
    assert exchanged() is None
    parts.value.register_forward_hook(lambda *given, held=model: None)
    kept, known = weakref.ref(parts.query.weight), KnownBlocks()
    with torch.inference_mode():
        state = _read(model, ids[:, :80], None, known)[1]
        _read(model, ids[:, 80:81], state, known)
    del model, parts, known
    gc.collect()
    assert kept() is None


def test_other_blocks_are_called_as_they_are(compiled_calls):
    class Louder(Block):
        def forward(self, x, state=None, **others):
            x, state = super().forward(x, state, **others)
            return 2 * x, state

    class Around(torch.nn.Module):
        def __init__(self, mixer):
            super().__init__()
            self.mixer = mixer

        def forward(self, x, state=None, **others):
            return self.mixer(x, state)

    ids = tokens(1, 90)
    for kind in (Louder, Around):
        model = build("3x[attention]")
        if kind is Louder:
            model.backbone.blocks[1].__class__ = Louder
        else:
            model.backbone.blocks[1] = Around(model.backbone.blocks[1].mixer)
        whole = model(ids)[0]
        torch.testing.assert_close(decode(model, ids, 80, (1, 9))[0], whole, rtol=1e-4, atol=1e-5)


def test_a_compiled_block_is_called(compiled_calls):
    model, ids, seen = build("3x[attention]"), tokens(1, 90), []
    block = model.backbone.blocks[0]

    def compiled(*inputs, **options):
        seen.append(inputs)
        return block._call_impl(*inputs, **options)

    block._compiled_call_impl = compiled
    decode(model, ids, 88, (1, 1))
    assert len(seen) == 3
    assert compiled_calls


def test_who_watches_every_module_sees_them_all(compiled_calls):
    model, ids, seen = build("3x[attention]"), tokens(1, 90), []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *given: seen.append(given))
    try:
        decode(model, ids, 88, (1,))
        alone = len(seen)
        decode(model, ids, 88, (1,))
    finally:
        handle.remove()
    assert not compiled_calls
    assert len(seen) == 2 * alone


def test_what_kernels_do_not_read_is_no_matter(part_by_part, compiled_calls):
    model, ids = build("2x[attention(bias=true)]"), tokens(1, 82)
    block = model.backbone.blocks[0]
    block.mixer.register_buffer("seen", torch.ones(3, dtype=torch.bool))
    layer = Int8.of(block.mixer.query)
    layer.bias = layer.bias.double()
    layer.scale = layer.scale.half()
    replace_layer(model, "backbone.blocks.0.mixer.query", layer)
    got = decode(model, ids, 80, (1, 1))[0]
    assert compiled_calls
    wanted = part_by_part(lambda: decode(model, ids, 80, (1, 1)))[0]
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_weights_in_dtypes_that_kernels_do_not_read_are_left_to_pytorch(dtype):
    mixer = build("attention").backbone.blocks[0].mixer
    assert _halves._layers(mixer, "query") is not None
    mixer.query.to(dtype)
    assert _halves._layers(mixer, "query") is None


class Seen(TorchDispatchMode):
    """Who wants to see every operator."""

    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += 1
        return function(*args, **(kwargs or {}))


def test_gradients_and_tracers_go_through_the_parts(compiled_calls):
    model, ids = build("attention"), tokens(1, 12)
    _, state = model(ids[:, :10])
    logits, _ = model(ids[:, 10:], state)
    logits.sum().backward()
    assert model.backbone.blocks[0].mixer.key.weight.grad is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(ids[:, 10:], model(ids[:, :10])[1])
    with torch.no_grad(), Seen() as seen:
        model(ids[:, 10:], state)
    assert seen.number > 20
    assert not compiled_calls


class Wrapped(torch.Tensor):
    """A weight that is stored in another way than it looks, as quantised ones of torchao are."""


def test_weights_that_only_look_like_tensors_are_left_to_pytorch(compiled_calls):
    model, ids = build("attention"), tokens(1, 82)
    block = model.backbone.blocks[0]
    for layer in (block.mixer.key, block.channel.gate):
        layer.weight = torch.nn.Parameter(layer.weight.data.as_subclass(Wrapped))
    decode(model, ids, 80, (1, 1))
    assert not compiled_calls
