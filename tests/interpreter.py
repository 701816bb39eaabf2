"""What Triton's interpreter lacks with NumPy 2, and what it does for nothing. To be imported before a kernel runs."""

from dataclasses import replace

import triton.language as tl
from triton.runtime import interpreter

_patch_lang, _patch_lang_tensor = interpreter._patch_lang, interpreter._patch_lang_tensor


def _patched(tensor, scope):
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())  # a loop's bound that was computed
    # Shapes are tuples, and each would get a type that only a compiler asks for.
    scope.set_attr(tl.core, "_type_for_tuple_values", lambda values, fields=None: None)


def _once(fn):
    """The language is replaced for a launch, and would be again for every function that a kernel calls."""
    langs = [lang for lang in (tl, tl.core) if lang in fn.__globals__.values()]
    if any(tl.core.is_builtin(lang.load) for lang in langs):
        return _patch_lang(fn)
    return interpreter._LangPatchScope()


interpreter._patch_lang_tensor, interpreter._patch_lang = _patched, _once
# Integers would be added twice, for an assertion that the interpreter then leaves out.
interpreter.interpreter_builder.options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
