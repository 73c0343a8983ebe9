"""The files in the documentation are read without a problem."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llm_middleware.config.load import load_config
from tests.config.files import written

DOCS = Path(__file__).parents[2] / "docs" / "configuration.md"
BLOCKS = re.findall(r"```yaml\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
ENVIRON = dict.fromkeys(("AZURE_API_KEY", "CACHE_HOST", "MASTER_KEY", "OPENAI_API_KEY"), "value")


@pytest.mark.parametrize("place", range(2))
def test_an_example_is_read(tmp_path, place):
    config = load_config(written(tmp_path, BLOCKS[place]), ENVIRON)
    assert config.notes == ()
    assert config.ignored == ()
    assert config.cache is not None
    assert config.cache["type"] == "redis"
    assert config.master_key == "value"
    assert len(BLOCKS) == 2
