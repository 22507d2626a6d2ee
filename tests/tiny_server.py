"""A tiny model that is served, and a server on a thread: for the tests of what comes over HTTP."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

import torch
import uvicorn

from seqmix.data.text import Corpus
from seqmix.models.backbone import ModelSpec
from seqmix.serve.answers import Served
from seqmix.serve.engine import Engine, Limits
from seqmix.serve.reader import SeqmixReader
from seqmix.train.language import prepare

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
SPEC = ModelSpec(layout="gated_linear_attention, attention", width=32, heads=2)


def tiny_served():
    """A model of bytes and the engine that it is served from."""
    torch.manual_seed(0)
    model, words = prepare(SPEC, "bytes", Corpus("c", ("x",)), seed=0)
    with torch.no_grad():  # only printable letters, clearly apart
        model.model.backbone.norm.weight.fill_(8.0)
        model.model.embedding.weight[128:] = 0
    words.chat_template = TEMPLATE
    limits = Limits(rows=16, queue=64, context=200, chunk=16)
    return Served("tiny", Engine(SeqmixReader(model), limits), words)


@contextlib.contextmanager
def running(app):
    """The address of a server on a thread."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    thread.join()
    listening.close()
