"""The names that a host may import."""

from __future__ import annotations

import subprocess
import sys

import pytest

from llm_middleware import semantic


@pytest.mark.parametrize("name", semantic.__all__)
def test_every_name_is_there(name):
    assert getattr(semantic, name).__name__ == name


def test_another_name_is_not():
    with pytest.raises(AttributeError, match="has no attribute 'Judg'"):
        semantic.Judg  # noqa: B018


def test_nothing_is_loaded_before_it_is_used():
    script = "import sys, llm_middleware.semantic; print({'numpy', 'redis', 'httpx'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
