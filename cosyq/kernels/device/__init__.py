"""What runs on the GPU, in Triton. The modules of `cosyq.kernels` launch it; see `cosyq.kernels.launch`.

Every kernel that is launched is named `*_kernel`. Its module is imported only where it has to be compiled (or
interpreted): Triton takes a third of a second to import, and reads the source of every function.
"""
