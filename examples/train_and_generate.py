"""Train a small hybrid on a text, evaluate it, and let it write.

About two minutes on two cores. The model is a Hugging Face model: the folder also opens with
AutoModelForCausalLM.from_pretrained after `import seqmix`.
"""

import sys

import seqmix
from seqmix.models.backbone import ModelSpec


def main(data="shakespeare", out="runs/hybrid", steps=300, length=256):
    """Three recurrent blocks for each block of attention."""
    spec = ModelSpec(layout="3x[gated_delta_net], attention", width=128, heads=4)
    trained = seqmix.train(spec, data, out=out, steps=steps, length=length)
    print(f"{trained.steps} steps, {trained.tokens_per_second:.0f} tokens per second")
    print(f"{trained.evaluation['bits_per_byte']:.3f} bits per byte on text that was held back")
    print("Operators ran as:", trained.forms)
    text = seqmix.generate(str(out), "ROMEO.", new_tokens=100, temperature=0.8)
    print(text)
    return text


if __name__ == "__main__":
    main(*sys.argv[1:])
