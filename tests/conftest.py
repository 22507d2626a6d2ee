"""Every test: fixed seeds, no network beyond this machine, one thread per xdist worker."""

import ipaddress
import os
import random
import socket

import numpy as np
import pytest
import torch

from seqmix.kernels import decoding
from seqmix.models import _decoding


def pytest_configure():
    if os.environ.get("PYTEST_XDIST_WORKER"):
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start, too


@pytest.fixture(autouse=True)
def _same_seed():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    connect = socket.socket.connect

    def connect_here_only(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_here(address[0]):
            raise AssertionError(f"a test reached for the network: {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_here_only)


def _is_here(host):
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@pytest.fixture
def part_by_part(monkeypatch):
    """Runs a function with every part of a block called on its own."""

    def run(function):
        with monkeypatch.context() as patch:
            patch.setattr(_decoding, "_is_few", lambda x: False)
            return function()

    return run


@pytest.fixture
def compiled_calls(monkeypatch):
    """The halves of blocks that compiled calls compute; the calls themselves are counted in `number`."""

    class Seen(list):
        number = 0

    seen, real = Seen(), decoding.decode

    def counted(x, halves):
        seen.number += 1
        seen.extend("gate" if m is decoding.NO_MEMORY else "attention" for _, m in halves)
        return real(x, halves)

    monkeypatch.setattr(decoding, "decode", counted)
    return seen
