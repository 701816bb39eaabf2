"""Triton kernels, each with the function that launches it; they know tensors, not modules, engines or files.

Triton comes with torch's CUDA wheels and is imported nowhere else. On a CPU its interpreter runs the same kernels, for
the tests (`TRITON_INTERPRET=1`): sizes and loop bounds are `tl.constexpr`, which it needs.
"""
