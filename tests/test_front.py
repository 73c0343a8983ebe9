from __future__ import annotations

from llm_middleware import CacheManager
from tests.support import completion


def test_a_repeat_is_a_hit(front):
    client = front(lambda seen: completion(), cache=CacheManager())
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    assert client.post(body).cache == "miss"
    assert client.post(body).cache == "hit"
    assert client.host.calls == 1
