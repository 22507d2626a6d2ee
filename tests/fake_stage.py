"""Stands in for a stage of a trial: plausible results at once, or what the layout stands for.

`retention` has a NaN loss, `hgrn2` is killed by signal 9, `delta_net` crashes, `s4d` finds the data unusable;
`hyena` says through the pipe FAKE_STAGE_PIPE that it runs and then waits, as long as that pipe exists.
Every start is noted in the file FAKE_STAGE_LOG.
"""

import json
import os
import signal
import sys
from pathlib import Path

stage, folder = sys.argv[1], Path(sys.argv[2])
job = json.loads((folder / "trial.json").read_text())
layout, seed = job["spec"]["layout"], job["training"]["seed"]
with open(os.environ["FAKE_STAGE_LOG"], "a") as log:
    log.write(f"{stage} {layout} {seed}\n")

pipe = Path(os.environ.get("FAKE_STAGE_PIPE", "/nowhere"))
if layout == "hyena" and pipe.exists():
    pipe.write_text(str(os.getpid()))
    sys.stdin.buffer.read()  # ends with the parent
    sys.exit(1)
if layout == "hgrn2":
    os.kill(os.getpid(), signal.SIGKILL)
if layout == "delta_net":
    sys.exit("the kernel is missing")

speed = 1 + len(layout) % 5  # any figure that differs between layouts
quartiles = {"low": 0.9, "high": 1.2, "repeats": 3}
contexts = [str(context) for context in job["contexts"]]
memory = {"baseline_mb": 200.0, "peak_mb": 200.0 + 10 * speed, "memory_mb": 10.0 * speed}
bits = 2.0 + speed / 10 + seed / 1000


def figures(median, predicted):
    return {"median": median, "predicted": predicted} | quartiles


def curve():
    steps = range(1, 11)
    return [{"step": i, "tokens": 100 * i, "seconds": i / 10, "loss": 1 + 4 / i} for i in steps]


results = {
    "train": {
        "quality": {"bits_per_byte": bits, "perplexity": 2**bits, "loss": bits * 0.693},
        "training": {"steps": 10, "tokens": 1000, "seconds": 1.0, "history": curve()},
        "forms": [["linear_attention", "chunked"]],
        "memory": memory,
    },
    "serve": {
        "prefill_tokens_s": {c: figures(9000.0 / speed, 1e4) for c in contexts},
        "decode_ms": {c: figures(float(speed), 0.5) for c in contexts},
        "state_bytes": {c: {"measured": 100 * int(c), "predicted": 99 * int(c)} for c in contexts},
        "train_tokens_s": figures(5000.0 / speed, 6e3),
        "forms": {
            "prefill": [["linear_attention", "chunked"]],
            "decode": [["linear_attention", "recurrent"]],
        },
        "memory": memory,
        "parameters": 1000 * speed,
    },
}
errors = {
    "retention": {"kind": "NumericalError", "reason": "The loss at step 7 is nan.", "step": 7},
    "s4d": {"kind": "DataError", "reason": "The data is unusable."},
}
result = {"error": errors[layout]} if layout in errors else results[stage]
(folder / f"{stage}.json").write_text(json.dumps(result))
