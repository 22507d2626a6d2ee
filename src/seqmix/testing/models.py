"""Laws of language models: whatever a layout is made of, it saves, pads, packs, continues and generates alike.

Models are tiny and their last norm is scaled up, which spreads the logits of an untrained model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from seqmix.core.numerics import assert_equal_within
from seqmix.core.state import load_state, save_state
from seqmix.mixers import MIXERS
from seqmix.mixers._mixer import undecayed
from seqmix.models.hf import SeqmixForCausalLM, StateCache, create

VOCABULARY, PAD = 40, 39
SIZES = {"width": 32, "heads": 2, "vocabulary": VOCABULARY}
HYBRIDS = (
    "2x[gated_linear_attention], attention",
    "mamba2/squared_relu, windowed_attention(window=4)/none",
    "gated_delta_net/mixture_of_experts, attention(key_heads=1)",
)
TOLERANCE = 5e-5

Law = Callable[[str], None]


def layouts() -> list[str]:
    """Two blocks of every causal mixer, and some hybrids."""
    return [f"2x{name}" for name in MIXERS if MIXERS.get(name).causal] + list(HYBRIDS)


def build(layout: str, *, seed: int = 0, **fields: object) -> SeqmixForCausalLM:
    """A tiny model in evaluation mode, the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = create(layout, **(SIZES | {"pad_token_id": PAD} | fields))
    with torch.no_grad():
        model.get_parameter("model.backbone.norm.weight").fill_(8.0)
    return model.eval()


def draw(rows: int, length: int, seed: int = 1) -> Tensor:
    """Random ids [rows, length], none of them the pad."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, PAD, (rows, length), generator=generator)


def close(got: Tensor, wanted: Tensor, what: str) -> None:
    """Raises unless the two are nearly equal."""
    assert_equal_within(got, wanted, what=what, tolerance=TOLERANCE)


@torch.no_grad()
def saving_and_loading_changes_nothing(layout: str) -> None:
    from transformers import AutoModelForCausalLM

    model, ids = build(layout), draw(2, 9)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        suffixes = {path.suffix for path in Path(folder).iterdir()}
        if suffixes != {".json", ".safetensors"}:
            raise AssertionError(f"saved as {suffixes}, wanted JSON and safetensors only")
        loaded = AutoModelForCausalLM.from_pretrained(folder)
    if not torch.equal(loaded(ids).logits, model(ids).logits):
        raise AssertionError("the loaded model gives other logits")
    if loaded.config.to_spec() != model.config.to_spec():
        raise AssertionError("the loaded specification differs")
    if loaded.model.head.weight is not loaded.model.embedding.weight:
        raise AssertionError("the loaded head is not tied")


@torch.no_grad()
def bfloat16_keeps_special_parameters(layout: str) -> None:
    model = build(layout)
    special = undecayed(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = SeqmixForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for name, parameter in loaded.named_parameters():
        wanted = torch.float32 if name in special else torch.bfloat16
        if parameter.dtype != wanted:
            raise AssertionError(f"{name} is {parameter.dtype}, wanted {wanted}")
        if name in special and not torch.equal(parameter, model.get_parameter(name)):
            raise AssertionError(f"{name} has changed")
    if not loaded(draw(2, 5)).logits.isfinite().all():
        raise AssertionError("logits in bfloat16 are not finite")


@torch.no_grad()
def greedy_generation_takes_the_likeliest_token(layout: str) -> None:
    model, ids = build(layout), draw(2, 5)
    generated = model.generate(ids, max_new_tokens=6, do_sample=False)
    for _ in range(6):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    _same(generated, ids, "generate and full forwards")


@torch.no_grad()
def pads_change_nothing(layout: str) -> None:
    model, ids = build(layout), draw(3, 8)
    for name, columns in _paddings().items():
        mask = torch.zeros(3, 8, dtype=torch.long)
        for row, kept in enumerate(columns):
            mask[row, kept] = 1
        padded = ids.masked_fill(mask == 0, PAD)
        logits = model(padded, attention_mask=mask).logits
        for row, kept in enumerate(columns):
            close(
                logits[row, kept], model(ids[row : row + 1, kept]).logits[0], f"pads {name}, {row}"
            )


@torch.no_grad()
def padded_batches_generate_like_single_texts(layout: str) -> None:
    model, ids = build(layout), draw(2, 7)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, :4] = 0
    padded = ids.masked_fill(mask == 0, PAD)
    options = {"max_new_tokens": 5, "do_sample": False}
    together = model.generate(padded, attention_mask=mask, **options)[:, 7:]
    for row, start in enumerate((0, 4)):
        single = ids[row : row + 1, start:]
        alone = model.generate(single, attention_mask=torch.ones_like(single), **options)
        _same(together[row : row + 1], alone[:, 7 - start :], f"row {row}")


@torch.no_grad()
def a_returned_cache_continues_the_text(layout: str) -> None:
    model, ids = build(layout), draw(2, 11)
    whole = model(ids).logits
    for cut in (1, 6, 10):
        cache = model(ids[:, :cut]).past_key_values
        close(model(ids[:, cut:], past_key_values=cache).logits, whole[:, cut:], f"cut at {cut}")
    cache = model(ids[:, :6]).past_key_values
    options = {"max_new_tokens": 4, "do_sample": False}
    _same(
        model.generate(ids, past_key_values=cache, **options),
        model.generate(ids, **options),
        "generate from a cache",
    )


@torch.no_grad()
def ragged_texts_continue_together(layout: str) -> None:
    """Pads before, between and after: what a row has read is what its mask says."""
    model, ids = build(layout), draw(2, 12)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, [0, 1, 7]] = 0
    mask[1, [4, 5, 6, 11]] = 0
    padded = ids.masked_fill(mask == 0, PAD)
    cache = model(padded[:, :6], attention_mask=mask[:, :6]).past_key_values
    logits = model(padded[:, 6:], attention_mask=mask, past_key_values=cache).logits
    for row in range(2):
        text = ids[row, mask[row].bool()][None]
        new = mask[row, 6:].bool()
        close(logits[row, new], model(text).logits[0, -int(new.sum()) :], f"row {row}")


def packed_loss_is_the_mean_over_texts(layout: str) -> None:
    model, texts = build(layout), [draw(1, n, seed=n) for n in (5, 1, 6)]
    total, count = torch.zeros(()), 0
    for text in texts:
        logits = model(text).logits[0, :-1]
        total = total + F.cross_entropy(logits, text[0, 1:], reduction="sum")
        count += len(logits)
    row = torch.cat(texts, dim=1)
    cu_seqlens = torch.tensor([0, 5, 6, 12], dtype=torch.int32)
    segments = torch.tensor([[0] * 5 + [1], [0] * 6])
    packed = model(row, labels=row, cu_seqlens=cu_seqlens)
    rows = row.view(2, 6)
    windows = model(rows, labels=rows, segments=segments)
    close(packed.loss, total / count, "cu_seqlens")
    close(windows.loss, total / count, "segments")
    halves = model(row, labels=row, cu_seqlens=cu_seqlens, num_items_in_batch=2 * count).loss
    close(halves, total / count / 2, "num_items_in_batch")
    mask = torch.ones(3, 6, dtype=torch.long)
    padded = torch.full((3, 6), PAD)
    for i, text in enumerate(texts):
        mask[i, : 6 - text.shape[1]] = 0
        padded[i, 6 - text.shape[1] :] = text[0]
    close(model(padded, labels=padded, attention_mask=mask).loss, total / count, "left pads")
    gradients = torch.autograd.grad(windows.loss, model.model.embedding.weight)[0]
    wanted = torch.autograd.grad(total / count, model.model.embedding.weight)[0]
    close(gradients, wanted, "gradients")


@torch.no_grad()
def states_are_values(layout: str) -> None:
    """Rows of a cache are forked, chosen and taken back; a saved state goes on where it was."""
    model, ids = build(layout), draw(2, 9)
    cache = model(ids[:, :5]).past_key_values
    kept, next_ids = cache.copy(), ids[:, 5:]
    wanted = model(next_ids, past_key_values=cache).logits
    forked = kept.copy()
    forked.batch_repeat_interleave(2)
    logits = model(next_ids.repeat_interleave(2, dim=0), past_key_values=forked).logits
    close(logits, wanted.repeat_interleave(2, dim=0), "forked")
    swapped = kept.copy()
    swapped.reorder_cache(torch.tensor([1, 0]))
    close(model(next_ids.flip(0), past_key_values=swapped).logits, wanted.flip(0), "reordered")
    chosen = kept.copy()
    chosen.batch_select_indices(torch.tensor([False, True]))
    close(model(next_ids[1:], past_key_values=chosen).logits, wanted[1:], "chosen")
    taken = kept.copy()
    taken.activate_past_recording()
    model(next_ids[:, :1], past_key_values=taken)
    model(draw(2, 3, seed=7), past_key_values=taken)
    taken.crop(-3)
    close(model(next_ids[:, 1:], past_key_values=taken).logits, wanted[:, 1:], "rolled back")
    with tempfile.TemporaryDirectory() as folder:
        loaded = StateCache(load_state(save_state(kept.state, Path(folder) / "state")), kept.length)
    close(model(next_ids, past_key_values=loaded).logits, wanted, "saved and loaded")
    close(model(next_ids, past_key_values=kept).logits, wanted, "the copy")


@torch.no_grad()
def beam_search_needs_no_cache(layout: str) -> None:
    model, ids = build(layout), draw(2, 5)
    options = {"max_new_tokens": 5, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    cached = model.generate(ids, use_cache=True, **options)
    _same(cached, model.generate(ids, use_cache=False, **options), "beams with and without a cache")


@torch.no_grad()
def sampling_needs_no_cache(layout: str) -> None:
    model, ids = build(layout), draw(2, 5)
    results = []
    for use_cache in (True, True, False):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            options = {"max_new_tokens": 8, "do_sample": True, "use_cache": use_cache}
            results.append(model.generate(ids, **options))
    _same(results[0], results[1], "the same seed twice")
    _same(results[0], results[2], "with and without a cache")


@torch.no_grad()
def assisted_generation_is_greedy_generation(layout: str) -> None:
    """Guessed tokens are checked together and taken back where they are wrong."""
    # A generated pad would be read as padding by the assistant's own `generate`.
    model, ids = build(layout, pad_token_id=None), draw(1, 4).repeat(1, 3)
    wanted = model.generate(ids, max_new_tokens=10, do_sample=False)
    guessed = model.generate(ids, max_new_tokens=10, do_sample=False, prompt_lookup_num_tokens=3)
    _same(guessed, wanted, "guesses from the prompt")
    assistant = build(layout, seed=1, pad_token_id=None)
    assisted = model.generate(ids, max_new_tokens=10, do_sample=False, assistant_model=assistant)
    _same(assisted, wanted, "guesses of another model")


LAWS: tuple[Law, ...] = (
    saving_and_loading_changes_nothing,
    bfloat16_keeps_special_parameters,
    greedy_generation_takes_the_likeliest_token,
    pads_change_nothing,
    padded_batches_generate_like_single_texts,
    a_returned_cache_continues_the_text,
    ragged_texts_continue_together,
    packed_loss_is_the_mean_over_texts,
    states_are_values,
)
# Laws of `generate` that take longer, and say little more about one mixer than about another.
GENERATION_LAWS: tuple[Law, ...] = (
    beam_search_needs_no_cache,
    sampling_needs_no_cache,
    assisted_generation_is_greedy_generation,
)


def check_model(layout: str) -> None:
    """Holds a layout to every law; raises AssertionError at the first that it breaks."""
    for law in (*LAWS, *GENERATION_LAWS):
        try:
            law(layout)
        except Exception as error:
            raise AssertionError(f"{layout} breaks {law.__name__}: {error}") from error


def _paddings() -> dict[str, list[list[int]]]:
    """The columns of three rows that are not pads."""
    every = list(range(8))
    return {
        "on the left": [every[3:], every, every[7:]],
        "on the right": [every[:5], every[:1], every],
        "anywhere": [[0, 2, 3, 7], every[1:6], [4]],
    }


def _same(got: Tensor, wanted: Tensor, what: str) -> None:
    if got.tolist() != wanted.tolist():
        raise AssertionError(f"{what} differ: {got.tolist()}, {wanted.tolist()}")
