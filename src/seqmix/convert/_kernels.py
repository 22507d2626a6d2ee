"""The compiled kernels under one roof; the modules that they come from have the same names."""

from seqmix.kernels.delta_rule import delta_rule
from seqmix.kernels.selective_scan import selective_scan, selective_scan_update
from seqmix.kernels.short_convolution import short_convolution, short_convolution_update
from seqmix.kernels.state_space_dual import state_space_dual

__all__ = [
    "delta_rule",
    "selective_scan",
    "selective_scan_update",
    "short_convolution",
    "short_convolution_update",
    "state_space_dual",
]
