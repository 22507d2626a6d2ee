"""States on disk: a server that starts again goes on where it was, and takes nothing that is not its own."""

from __future__ import annotations

import re

import pytest
import torch

from seqmix.core.errors import CheckpointError
from seqmix.core.files import OutputError
from seqmix.core.state import leaves, load_state, read_note, save_state
from seqmix.generate import Sampling
from seqmix.serve.engine import Engine, Limits
from seqmix.serve.prefix_cache import PrefixCache
from seqmix.serve.reader import SeqmixReader
from seqmix.serve.request import Request
from seqmix.serve.state_folder import StateFolder, fingerprint
from seqmix.testing.models import build, draw

LAYOUTS = (
    "gated_linear_attention, attention",
    "mamba2, windowed_attention(window=4, sinks=2)/none",
)
MANY = 1 << 30


@pytest.fixture(scope="module", params=LAYOUTS)
def reader(request):
    return SeqmixReader(build(request.param))


@pytest.fixture(scope="module")
def hybrid():
    return SeqmixReader(build(LAYOUTS[0]))


def text(length, seed=0):
    return draw(1, length, seed)[0].tolist()


def folder_in(path, limit=MANY, model="f" * 64):
    return StateFolder(path, model, limit)


def ask(engine, prompt, new=5):
    told = []
    request = Request(prompt, told.append, new, Sampling(temperature=0))
    engine.submit(request)
    while engine.step():
        pass
    assert told[-1].finish == "length"
    return [event.token for event in told], request.reused


def files(path):
    return sorted(path.rglob("*.safetensors"))


def test_a_server_that_starts_again_reads_no_text_again(reader, tmp_path):
    limits = Limits(chunk=8)
    first, _ = ask(Engine(reader, limits, folder_in(tmp_path)), text(20))
    turn = [*text(20), *first, *text(3, 1)]
    engine = Engine(reader, limits, folder_in(tmp_path))
    again, reused = ask(engine, turn)
    assert again == ask(Engine(reader, Limits(cache=0)), turn)[0]
    assert reused == engine.cache.read_tokens == 24
    assert engine.cache.read_states == 4  # at 8, 16, 19 and 24
    assert engine.cache.saved.bytes == sum(path.stat().st_size for path in files(tmp_path))


def test_what_has_left_the_memory_comes_back_from_disk(hybrid, tmp_path):
    state = hybrid.read([text(12)], None)[1]
    once = PrefixCache(MANY)
    size = once.add(once.root, text(12), state).size
    cache = PrefixCache(2 * size, folder_in(tmp_path))
    for seed in range(4):
        cache.add(cache.root, text(12, seed), hybrid.read([text(12, seed)], None)[1])
    assert (len(cache.held), len(cache.saved)) == (2, 4)
    for seed in (*range(4), 0):
        node = cache.load(cache.find(text(12, seed)))
        wanted = hybrid.read([text(12, seed)], None)[1]
        for got, leaf in zip(leaves(node.state), leaves(wanted), strict=True):
            assert torch.equal(got, leaf)
        assert cache.held.bytes <= cache.limit
    assert cache.read_states == 5


def test_the_folder_stays_within_its_bytes_and_the_least_used_go_first(hybrid, tmp_path):
    def states(cache, *seeds):
        for seed in seeds:
            cache.add(cache.root, text(12, seed), hybrid.read([text(12, seed)], None)[1])

    states(PrefixCache(MANY, folder_in(tmp_path / "one")), 0)
    (only,) = files(tmp_path / "one")
    limit = 3 * only.stat().st_size + 500
    cache = PrefixCache(MANY, folder_in(tmp_path, limit))
    states(cache, 0, 1, 2)
    cache.find(text(12, 0))
    states(cache, 3)
    assert cache.saved.bytes <= limit
    later = PrefixCache(MANY, folder_in(tmp_path, limit))
    assert [later.find(text(12, seed)).length for seed in range(4)] == [12, 0, 12, 12]
    smaller = PrefixCache(MANY, folder_in(tmp_path, limit // 3 + 1))
    assert len(smaller.saved) == 1


def test_states_without_their_beginning_are_of_no_use(hybrid, tmp_path):
    engine = Engine(hybrid, Limits(chunk=8), folder_in(tmp_path))
    ask(engine, text(20))
    assert len(files(tmp_path)) == 4
    (first,) = (path for path in files(tmp_path) if read_note(path)["parent"] == "0")
    first.unlink()
    assert not len(PrefixCache(MANY, folder_in(tmp_path)).saved)
    assert not files(tmp_path)


def flipped(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", ["cut", "empty", "header", "numbers", "gone"])
def test_a_damaged_state_is_not_used(hybrid, tmp_path, harm):
    limits = Limits(chunk=8)
    wanted, _ = ask(Engine(hybrid, limits, folder_in(tmp_path)), text(20))
    path = next(path for path in files(tmp_path) if read_note(path)["parent"] == "8")
    running = None
    if harm == "gone":  # while the server runs
        running = Engine(hybrid, limits, folder_in(tmp_path))
        path.unlink()
    elif harm in ("cut", "empty"):
        path.write_bytes(path.read_bytes()[: 0 if harm == "empty" else -40])
    else:
        flipped(path, 20 if harm == "header" else -40)
    with pytest.warns(UserWarning, match="not used"):
        again = ask(running or Engine(hybrid, limits, folder_in(tmp_path)), text(20))
    assert again == (wanted, 8)
    assert ask(Engine(hybrid, limits, folder_in(tmp_path)), text(20))[1] == 19  # it was kept again


def test_what_is_no_state_of_the_model_is_left_alone(hybrid, tmp_path):
    folder = folder_in(tmp_path)
    ask(Engine(hybrid, Limits(), folder), text(9))
    mine = files(tmp_path)
    other = folder_in(tmp_path, model="f" * 16 + "0" * 48)  # the same folder by accident
    other.write(text(9), 0, hybrid.read([text(9)], None)[1])
    (theirs,) = set(files(tmp_path)) - set(mine)
    strangers = [
        folder.folder / "notes.txt",
        folder.folder / f"{'0' * 64}.safetensors",
        folder.folder / f"{'1' * 64}.safetensors",
    ]
    strangers[0].write_text("mine")
    strangers[1].symlink_to(mine[0])
    save_state([torch.zeros(1)], strangers[2])
    (folder.folder / f".{mine[0].name}.x").write_text("cut off")
    with pytest.warns(UserWarning, match="is not used") as warned:
        cache = PrefixCache(MANY, folder)
    assert len(warned) == 4
    assert len(cache.saved) == len(mine)
    assert sorted(folder.folder.iterdir()) == sorted([*mine, theirs, *strangers])


def test_a_full_disk_is_no_error(hybrid, tmp_path, monkeypatch):
    def full(*args, **options):
        raise OutputError("Cannot write: No space left on device.")

    monkeypatch.setattr("seqmix.serve.state_folder.save_state", full)
    engine = Engine(hybrid, Limits(), folder_in(tmp_path))
    with pytest.warns(UserWarning, match="No space left"):
        ask(engine, text(9))
    assert len(engine.cache.held) == 2
    assert ask(engine, text(9))[1] == 8


def test_names_come_from_no_text_and_nobody_else_may_look(hybrid, tmp_path):
    folder = folder_in(tmp_path)
    ask(Engine(hybrid, Limits(), folder), text(9))
    assert folder.folder.parent == tmp_path
    assert folder.folder.stat().st_mode & 0o077 == 0
    assert all(re.fullmatch(r"[0-9a-f]{64}\.safetensors", path.name) for path in files(tmp_path))


def test_the_fingerprint_is_that_of_all_weights_and_the_configuration(tmp_path):
    model = build(LAYOUTS[0])
    mark = fingerprint(model)
    model.save_pretrained(tmp_path)
    assert fingerprint(type(model).from_pretrained(tmp_path)) == mark
    with torch.no_grad():
        model.model.backbone.norm.weight[-1] += 1e-6
    assert fingerprint(model) != mark
    assert fingerprint(build(LAYOUTS[1])) != mark


def test_a_state_whose_description_is_damaged_is_refused(tmp_path):
    path = save_state([torch.zeros(3)], tmp_path / "state", note={"a": "b"})
    assert read_note(path) == {"a": "b"}
    path.write_bytes(path.read_bytes().replace(b"state.0", b"state.1", 1))
    with pytest.raises(CheckpointError, match="damaged"):
        load_state(path)
