"""Importing and calling functions that the config names."""

import pytest

from dreplica.config.imports import call_function, import_function
from dreplica.errors import UsageError


def test_import_function_returns_it() -> None:
    assert import_function("model.factory", "os.path:join") is __import__("os").path.join


@pytest.mark.parametrize(
    ("path", "code", "text"),
    [
        ("join", "invalid-value", "model.factory: expected package.module:function, got 'join'."),
        ("..x:f", "invalid-value", "got '..x:f'."),
        ("os.path:", "invalid-value", "got 'os.path:'."),
        ("no_such.module:f", "unknown-module", "model.factory: no module named 'no_such' for 'no_such.module:f'."),
        ("os.path:jion", "unknown-name", "module os.path has no function 'jion'. Did you mean 'join'?"),
        ("os:sep", "unknown-name", "module os has no function 'sep'."),
    ],
)
def test_import_function_refuses(path: str, code: str, text: str) -> None:
    with pytest.raises(UsageError) as caught:
        import_function("model.factory", path)
    assert caught.value.code == code
    assert text in str(caught.value)


def test_call_function_passes_arguments() -> None:
    assert call_function("model.factory", "os.path:join", "a", "b") == "a/b"
    assert call_function("model.factory", "math:hypot", 3, 4) == 5  # written in C, and without a signature


def test_call_function_refuses_wrong_signature() -> None:
    with pytest.raises(
        UsageError, match=r"^model\.factory: 'os\.path:join' cannot be called with \(num_classes=\): "
    ) as caught:
        call_function("model.factory", "os.path:join", num_classes=3)
    assert caught.value.code == "wrong-signature"
