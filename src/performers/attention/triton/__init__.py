"""The ``triton`` backend: fused kernels for NVIDIA GPUs."""
