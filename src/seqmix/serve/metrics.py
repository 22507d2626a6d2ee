"""What `/metrics` says, in the text format of Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from seqmix.serve.answers import Served
from seqmix.serve.engine import Engine

METRICS: dict[str, tuple[str, str, Callable[[Engine], int]]] = {
    "requests_total": ("counter", "Requests taken in.", lambda e: e.counts.requests),
    "refused_total": (
        "counter",
        "Requests refused: the queue was full.",
        lambda e: e.counts.refused,
    ),
    "errors_total": ("counter", "Steps that failed.", lambda e: e.counts.errors),
    "steps_total": ("counter", "Steps of the engine.", lambda e: e.counts.steps),
    "prompt_tokens_total": ("counter", "Prompt tokens read.", lambda e: e.counts.prompt_tokens),
    "reused_tokens_total": (
        "counter",
        "Prompt tokens whose state was kept, so that they were not read.",
        lambda e: e.counts.reused_tokens,
    ),
    "answer_tokens_total": ("counter", "Tokens of answers.", lambda e: e.counts.answer_tokens),
    "waiting": ("gauge", "Requests that wait.", lambda e: e.num_waiting),
    "answers": ("gauge", "Answers under way.", lambda e: e.num_rows),
    "state_bytes": ("gauge", "Bytes of their states.", lambda e: e.state_bytes),
    "cache_bytes": ("gauge", "Bytes of kept states.", lambda e: e.cache.held.bytes),
    "cache_states": ("gauge", "Kept states.", lambda e: len(e.cache.held)),
    "disk_bytes": ("gauge", "Bytes of states on disk.", lambda e: e.cache.saved.bytes),
    "disk_states": ("gauge", "States on disk.", lambda e: len(e.cache.saved)),
    "disk_reads_total": ("counter", "States read from disk.", lambda e: e.cache.read_states),
    "disk_tokens_total": (
        "counter",
        "Tokens of texts whose state was read from disk.",
        lambda e: e.cache.read_tokens,
    ),
}


def exposition(models: Sequence[Served]) -> str:
    """All metrics of all models."""
    lines = []
    for name, (kind, text, value) in METRICS.items():
        lines += [f"# HELP seqmix_{name} {text}", f"# TYPE seqmix_{name} {kind}"]
        for served in models:
            label = served.name.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
            lines.append(f'seqmix_{name}{{model="{label}"}} {value(served.engine)}')
    return "\n".join(lines) + "\n"
