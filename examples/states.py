"""A state is a value: fork it, roll it back, save it. The same for attention and for recurrences."""

import tempfile
from pathlib import Path

import torch

from seqmix.core.state import History, fork, load_state, num_bytes, save_state
from seqmix.models.backbone import LanguageModel, ModelSpec


@torch.no_grad()
def main(layout="gated_delta_net, attention"):
    """Reads a text once, and goes on from it in several ways."""
    torch.manual_seed(0)
    model = LanguageModel(ModelSpec(layout=layout, width=64, heads=2)).eval()
    text = torch.tensor([list(b"The state after a text is all that a model remembers of it.")])
    _, state = model(text)
    print(f"After {text.shape[1]} tokens the state takes {num_bytes(state):,} bytes")

    # Two ways on from one text, without reading it twice: a row each.
    two_ways = torch.tensor([list(b" And"), list(b" But")])
    logits, _ = model(two_ways, fork(state, 2))
    print("Next bytes:", logits[:, -1].argmax(-1).tolist())

    # Try three tokens, take two of them back: what speculative decoding does.
    history = History(state, depth=4)
    for token in b" if":
        _, after = model(torch.tensor([[token]]), history.state)
        history.push(after)
    after_one = history.roll_back(2)
    wanted, _ = model(torch.tensor([[ord("x")]]), model(torch.tensor([[ord(" ")]]), state)[1])
    again, _ = model(torch.tensor([[ord("x")]]), after_one)
    assert torch.allclose(again, wanted, atol=1e-5)

    # Keep it for another day.
    with tempfile.TemporaryDirectory() as folder:
        loaded = load_state(save_state(state, Path(folder) / "state.safetensors"))
    assert torch.equal(model(two_ways[:1], loaded)[0], model(two_ways[:1], state)[0])
    return state


if __name__ == "__main__":
    main()
