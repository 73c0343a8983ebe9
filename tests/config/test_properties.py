"""Whatever a file says, it is read or refused; nothing else comes out, and what is read can be used."""

from __future__ import annotations

import json
import string

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_middleware import CacheManager, Router
from llm_middleware.caching.settings import SETTINGS
from llm_middleware.config import known, litellm, short_form
from llm_middleware.config.load import ConfigProblems, load_config
from llm_middleware.config.router import NAMES
from llm_middleware.keys.resolver import KeyResolver
from llm_middleware.stores.redis_settings import COMMON_NAMES

FEW = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        ["os.environ/A", "os.environ/GONE", "redis", "s3", "openai/gpt", "memory", "1", "true", "http://h"]
    ),
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.one_of(st.text(max_size=6), st.integers()), inner, max_size=3)
    ),
    max_leaves=6,
)
PARAMS = [
    "model",
    "api_key",
    "api_base",
    "rpm",
    "tags",
    "timeout",
    "extra_headers",
    "weight",
    "litellm_credential_name",
]
entries = st.lists(
    st.one_of(
        values,
        st.fixed_dictionaries(
            {"model_name": st.one_of(st.just("gpt"), values)},
            optional={
                "litellm_params": st.dictionaries(st.sampled_from(PARAMS), values, max_size=4),
                "model_info": values,
                "rpm": values,
            },
        ),
    ),
    max_size=3,
)


def section(*names: str) -> st.SearchStrategy[object]:
    return st.one_of(values, st.dictionaries(st.sampled_from(sorted(names)), values, max_size=6))


cache = section("type", *SETTINGS, *COMMON_NAMES, "s3_bucket_name")
router = section(*NAMES, "redis_db", "cache_kwargs")
keys = section("master_key", "store", "ttl", "share")
server = section("admin", "header_profile", "max_body_bytes", "show_content")
theirs = st.fixed_dictionaries(
    {},
    optional={
        "model_list": st.one_of(entries, values),
        "credential_list": values,
        "litellm_settings": st.one_of(
            section(*litellm._SETTINGS, *sorted(known.SETTINGS)[:5]),
            st.fixed_dictionaries({"cache": st.just(True), "cache_params": cache}),
        ),
        "router_settings": router,
        "general_settings": section(*litellm._GENERAL),
        "environment_variables": section("A", "REDIS_HOST", "REDIS_URL", "REDIS_PORT"),
        "keys": keys,
        "server": server,
        "include": st.one_of(st.integers(), st.lists(st.integers(), min_size=1)),
    },
)
ours = st.fixed_dictionaries(
    {},
    optional={
        "models": st.one_of(entries, values),
        "router": router,
        "cache": cache,
        "keys": keys,
        "server": server,
        "hooks": values,
    },
)


def read(source):
    try:
        return load_config(source, {"A": "7"})
    except ConfigProblems as exc:
        problems = exc.problems
    assert problems
    assert all(problem.message for problem in problems)
    assert len({problem.path for problem in problems}) == len(problems)
    return None


@FEW
@given(st.one_of(theirs, ours, st.dictionaries(st.text(max_size=5), values, max_size=4)))
def test_any_mapping_is_read_or_refused(data):
    config = read(data)
    if config is not None:
        Router(config.model_list, **{**config.router, "set_verbose": False})
        KeyResolver(**config.keys, master_key=config.master_key)
        if config.cache is not None:
            CacheManager(**config.cache)


@FEW
@given(ours)
def test_a_file_is_read_as_the_mapping_that_it_holds(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("yaml") / "config.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    before, after = read(data), read(path)
    assert (before is None) == (after is None)
    if before is not None and after is not None:
        for field in ("router", "cache", "model_list", "keys", "hooks"):  # NaN is not itself: compare texts
            one, other = (json.dumps(getattr(each, field), sort_keys=True) for each in (before, after))
            assert one == other


@FEW
@given(st.text(alphabet=string.printable, max_size=80))
def test_any_text_is_read_or_refused(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("text") / "config.yaml"
    path.write_text(text)
    read(path)


def test_section_names_are_those_of_one_form():
    assert not set(litellm.SECTIONS) & set(short_form.SECTIONS)
