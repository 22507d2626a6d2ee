"""Pack documents of different lengths into rows, and show that nothing leaks from one into the next."""

import torch

from seqmix.data.packing import cu_seqlens_from_segments, pack
from seqmix.models.backbone import LanguageModel, ModelSpec

END = 256


@torch.no_grad()
def main(layout="mamba2, attention"):
    """The logits of a packed document equal those of the document alone."""
    torch.manual_seed(0)
    documents = [list(b"A short one."), list(b"One that is a little longer."), list(b"The last.")]
    packed = pack(documents, length=40, eos=END, pad=END)
    rows = packed.batch(range(packed.windows))
    print(
        f"{packed.windows} rows of {packed.length} tokens; {packed.scored_tokens} tokens are predicted"
    )

    model = LanguageModel(ModelSpec(layout=layout, width=64, heads=2)).eval()
    bounds = cu_seqlens_from_segments(rows["segments"])
    print("Texts begin at", bounds.tolist())
    together, _ = model(rows["input_ids"].reshape(1, -1), cu_seqlens=bounds)

    first, second = documents[0] + [END], documents[1]
    alone, _ = model(torch.tensor([second[: packed.length - len(first)]]))
    inside = together[:, len(first) : packed.length]
    difference = (inside[:, : alone.shape[1]] - alone).abs().max()
    print(f"Largest difference to the document alone: {difference:.1e}")
    return float(difference)


if __name__ == "__main__":
    main()
