"""The compiled kernels (csrc/bindings.cpp). Not public: use rconv_fast.constraints.ops."""

from types import ModuleType

has_cuda: bool
has_openmp: bool
cuda_toolkit: str
"""Version of the CUDA compiler, "" without."""
cuda_architectures: str
"""Architectures compiled for, separated by spaces, "" without CUDA."""

cpu: ModuleType
cuda: ModuleType  # only where has_cuda
