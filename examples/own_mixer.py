"""A mixer of your own: write it, hold it to every law, and train it inside the one backbone.

Put the class into src/seqmix/mixers/NAME.py with `MIXER = TokenShift`, and it is in every command.
"""

import torch
import torch.nn.functional as F
from torch import nn

from seqmix.mixers import Mixer
from seqmix.models.backbone import LanguageModel, ModelSpec
from seqmix.ops.short_convolution import short_convolution
from seqmix.testing.mixers import check_mixer


class TokenShift(Mixer):
    """y_t = W_o (m * W_i x_t + (1 - m) * W_i x_{t-1}), m = sigmoid(w) per channel: two tokens, state [B, 1, D]."""

    def __init__(self, config):
        super().__init__(config)
        self.input = nn.Linear(config.width, config.width, bias=False)
        self.mix = nn.Parameter(torch.randn(config.width))
        self.output = nn.Linear(config.width, config.width, bias=False)

    def initial_state(self, batch, like):
        """Zeros [B, 1, D]."""
        return like.new_zeros(batch, 1, self.config.width).float()

    def forward(self, x, state=None, *, cu_seqlens=None):
        """x [B, T, D] to y [B, T, D] and the last token's projection."""
        share = torch.sigmoid(self.mix)
        y, state = short_convolution(
            self.input(x),
            torch.stack([1 - share, share], dim=1),
            initial_state=state,
            output_final_state=True,
            cu_seqlens=cu_seqlens,
        )
        return self.output(y), state


def main(steps=200):
    """Learns to repeat the token before, which is all that this mixer can do."""
    check_mixer(TokenShift)
    torch.manual_seed(0)
    model = LanguageModel(ModelSpec(layout="short_convolution", width=32, vocabulary=16))
    model.backbone.blocks[0].mixer = TokenShift(TokenShift.Config(width=32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        ids = torch.randint(16, (16, 20))
        loss = F.cross_entropy(model(ids)[0][:, 1:].flatten(0, 1), ids[:, :-1].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"loss after {steps} steps: {loss.item():.3f}")
    return loss.item()


if __name__ == "__main__":
    main()
