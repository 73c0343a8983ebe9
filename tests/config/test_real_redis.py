"""What a file says of Redis, against a real one: C121, and the file's own variables."""

from __future__ import annotations

from llm_middleware import CacheManager
from llm_middleware.config.load import load_config
from llm_middleware.keys.resolver import KeyResolver
from tests.services import redis_server
from tests.support import completion

BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
TEXT = """
environment_variables:
  REDIS_HOST: 127.0.0.1
  REDIS_PORT: {port}
  REDIS_PASSWORD: of-the-file
litellm_settings:
  cache: true
  cache_params: {{namespace: app}}
general_settings:
  master_key: sk-master
"""


def test_answers_and_keys_are_where_the_file_says(tmp_path, monkeypatch):
    """C121: the process's own environment names another Redis, which the file's settings win over."""
    monkeypatch.setenv("REDIS_HOST", "127.0.0.2")
    monkeypatch.setenv("REDIS_PORT", "1")
    path = tmp_path / "config.yaml"
    with redis_server("--requirepass", "of-the-file", password="of-the-file") as server:
        path.write_text(TEXT.format(port=server.port))
        config = load_config(path)
        assert config.notes == ("cache: true without a type: redis (REDIS_HOST)",)
        assert config.cache is not None
        with_cache = CacheManager(**config.cache, store_timeout=10)
        answer = with_cache.fetch(BODY, lambda body: completion("kept"))
        resolver = KeyResolver(**config.keys, master_key=config.master_key)
        made = resolver.generate()
        names = {str(name, "ascii") for name in server.ask("KEYS", "*")}
        with_cache.close()
        resolver.close()
    assert f"app:{answer.cache.key}" in names
    assert any(name.startswith("{app:keys:" + str(made["token"])) for name in names)
