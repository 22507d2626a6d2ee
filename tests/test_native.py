"""Which kernels are loaded, what the package says without them, and what PyTorch may do with them."""

import os
import subprocess
import sys

import pytest
import torch

from seqmix.kernels import ISA, describe
from seqmix.ops import diagonal_scan

needs_kernels = pytest.mark.skipif(ISA is None, reason="the kernels are not built or switched off")


def python(script, **environment):
    kept = {n: v for n, v in os.environ.items() if n not in ("SEQMIX_NATIVE", "SEQMIX_ISA")}
    command = [sys.executable, "-c", script]
    return subprocess.run(command, capture_output=True, text=True, env={**kept, **environment})


WHICH = """
import torch
from seqmix.kernels import ISA
from seqmix.ops import diagonal_scan, record_forms
with record_forms() as ran:
    diagonal_scan(torch.ones(1, 8, 3), -torch.ones(1, 8, 3))
print(ISA, ran)
"""


@needs_kernels
@pytest.mark.parametrize("name", describe()["built for"])
def test_an_instruction_set_can_be_chosen(name):
    done = python(WHICH, SEQMIX_ISA=name)
    if name in describe()["the processor has"]:
        assert done.stdout == f"{name} {{('diagonal_scan', 'native')}}\n", done.stderr
    else:
        assert "this processor has" in done.stderr


def test_an_unknown_instruction_set_is_an_error():
    assert "SEQMIX_ISA='v9', wanted one that is built here" in python(WHICH, SEQMIX_ISA="v9").stderr


def test_kernels_can_be_left_out_without_a_word():
    done = python(WHICH, SEQMIX_NATIVE="0")
    assert done.stdout == "None {('diagonal_scan', 'chunked')}\n"
    assert done.stderr == ""


WITHOUT = """
import sys
sys.modules["seqmix.kernels._processor"] = None  # as if never built
import pkgutil
every = pkgutil.iter_modules
pkgutil.iter_modules = lambda *where: (m for m in every(*where) if not m.name.startswith("_native_"))
"""


def test_their_absence_is_said_once():
    done = python(WITHOUT + WHICH)
    assert done.stdout == "None {('diagonal_scan', 'chunked')}\n", done.stderr
    assert done.stderr.count("seqmix runs slower forms: the compiled kernels were not built") == 1
    assert "SEQMIX_NATIVE=1, but" in python(WITHOUT + WHICH, SEQMIX_NATIVE="1").stderr


FORK = """
import os, torch
from seqmix.ops import diagonal_scan
torch.set_num_threads(2)
x = torch.ones(4, 32, 64)
diagonal_scan(x, -x)
child = os.fork()
if child == 0:
    diagonal_scan(x, -x)
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@needs_kernels
def test_a_forked_process_does_not_wait_for_threads_it_has_not():
    script = f"import signal; signal.alarm(60)\n{FORK}"
    assert python(script).stdout == "0\n"


@needs_kernels
def test_one_openmp_library_serves_pytorch_and_us():
    assert describe()["OpenMP is PyTorch's"]


@needs_kernels
def test_a_second_gradient_is_refused():
    x = torch.randn(1, 8, 3, requires_grad=True)
    a = (-torch.rand(1, 8, 3)).requires_grad_()
    h, _ = diagonal_scan(x, a, form="native")
    (first,) = torch.autograd.grad(h.square().sum(), a, create_graph=True)
    with pytest.raises(NotImplementedError, match="form='definition'"):
        first.sum().backward()


@needs_kernels
@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"
)  # torch's own
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_kernel_compiles_into_one_graph(backend):
    x = torch.randn(1, 40, 8, requires_grad=True)
    a = -torch.rand(1, 40, 8)

    def compute(x):
        return diagonal_scan(x, a)[0] * 2

    compiled = torch.compile(compute, fullgraph=True, backend=backend)
    gradients = [torch.autograd.grad(run(x).square().sum(), x)[0] for run in (compiled, compute)]
    torch.testing.assert_close(*gradients)
