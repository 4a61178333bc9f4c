"""What `import lorikit` promises: exactly these names, each with its documentation."""

import inspect
import subprocess
import sys

import pytest

import lorikit

NAMES = ["LorikitError", "RunConfig", "__version__", "load_config"]


def test_the_public_names_are_exactly_these():
    assert list(lorikit.__all__) == NAMES
    assert dir(lorikit) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_importable_and_documented(name):
    value = getattr(lorikit, name)
    if name == "__version__":
        assert value.count(".") == 2
        return
    assert inspect.getdoc(value)
    if inspect.isfunction(value):
        hints = inspect.signature(value)
        assert hints.return_annotation is not inspect.Signature.empty
        assert all(p.annotation is not inspect.Parameter.empty for p in hints.parameters.values())


def test_an_unknown_name_is_an_attribute_error_that_names_it():
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        lorikit.trian  # noqa: B018


def test_importing_the_package_imports_none_of_its_parts():
    code = "import sys, lorikit; print([m for m in sys.modules if m.startswith('lorikit.') or m == 'torch'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
