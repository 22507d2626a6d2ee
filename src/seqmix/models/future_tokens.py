"""A language model with a state vector per token, from which a small decoder writes the tokens that follow.

    s_t = encoder(x_1 ... x_t)      m_t = W s_t, read as P vectors      x_{t+1} ... x_{t+N} ~ decoder(m_t)

The encoder reads forward only. W widens s_t to a pseudo-sequence [P, D], and that is all that the decoder, by
cross-attention, knows of the text so far: it starts from a constant token. So s_t has to say what comes, not just which
token is next. Walker 2024 (arXiv:2410.18160).

Axes: B rows, T time, D width, P vectors of a pseudo-sequence, M states, N tokens ahead, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from seqmix.core.errors import RangeError
from seqmix.core.state import State
from seqmix.models import hf, seq2seq  # modules: importing transformers imports all kinds of models
from seqmix.models._hf_model import SeqmixConfig
from seqmix.models.backbone import ModelSpec


class FutureTokenModel(nn.Module):
    """An encoder-decoder whose encoder is causal and whose source is one state vector. Weights follow torch's seed.

    Args:
        encoder: the specification of the encoder, with causal mixers.
        blocks: of the decoder, each of causal attention, cross-attention and a channel mixer.
        pseudo: vectors P that a state becomes.

    Raises:
        RangeError: for no blocks or vectors. ConfigError: for an encoder that reads the future.
    """

    def __init__(self, encoder: ModelSpec, *, blocks: int = 1, pseudo: int = 4) -> None:
        super().__init__()
        if blocks < 1 or pseudo < 1:
            raise RangeError(f"blocks={blocks}, pseudo={pseudo}, wanted at least 1 of each.")
        hf.SeqmixForCausalLM(SeqmixConfig.from_spec(encoder))  # refuses mixers that read the future
        fields = ("width", "heads", "vocabulary", "channel", "norm")
        decoder = ModelSpec(
            layout="attention", depth=blocks, **{name: getattr(encoder, name) for name in fields}
        )
        self.pair = seq2seq.SeqmixForSeq2SeqLM.create(
            encoder, decoder, decoder_start_token_id=encoder.vocabulary - 1
        )
        self.pseudo = pseudo
        self.widen = nn.Linear(encoder.width, pseudo * encoder.width, bias=False)
        nn.init.normal_(self.widen.weight, std=encoder.width**-0.5)

    def read(self, ids: Tensor, state: State = None) -> tuple[Tensor, State]:
        """The states s [B, T, D] of tokens [B, T], and the encoder's own state after the last."""
        encoder = self.pair.encoder.model
        features, state = encoder.backbone(encoder.embedding(ids), state)
        return features, state

    def logits(self, states: Tensor, following: Tensor) -> Tensor:
        """Logits [M, N, V] of the tokens after states [M, D], where `following` [M, N - 1] are known."""
        memory = self.widen(states).unflatten(-1, (self.pseudo, -1))
        start = following.new_full((len(states), 1), self.pair.config.decoder_start_token_id)
        output = self.pair(
            encoder_outputs=BaseModelOutput(memory),
            decoder_input_ids=torch.cat([start, following], dim=1),
            use_cache=False,
        )
        logits: Tensor = output.logits
        return logits
