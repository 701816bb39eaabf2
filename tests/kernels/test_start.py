"""What Triton does before its first kernel."""

from triton.runtime.cache import triton_key

from cosyq.kernels.start import hash_compiler


def test_triton_has_hashed_itself_when_the_thread_is_done():
    triton_key.cache_clear()
    hash_compiler().join(60)
    assert triton_key.cache_info().currsize == 1
