"""What Triton's interpreter lacks with NumPy 2: a loop's bound that was computed. To be imported before a kernel runs."""

from triton.runtime import interpreter

_patch_lang_tensor = interpreter._patch_lang_tensor


def _patched(tensor, scope):
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


interpreter._patch_lang_tensor = _patched
