"""Compare two architectures on a text: which one should it be, on this machine?

Run it with a text of your own: python examples/compare_two_mixers.py corpus.txt
"""

import sys

import seqmix


def main(data="shakespeare", out="runs/two-mixers", **settings):
    """Trains both at equal parameters and tokens, measures them and recommends one."""
    comparison = seqmix.compare(
        data,
        "attention; gated_delta_net",
        budget="decode_ms<5@2048",
        out=out,
        **settings,
    )
    for summary in comparison.summaries:
        print(summary["candidate"], summary)
    print(comparison.recommendation["reason"])
    print(f"Report: {comparison.report}")
    return comparison


if __name__ == "__main__":
    main(*sys.argv[1:])
