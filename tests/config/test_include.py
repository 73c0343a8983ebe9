"""``include``: files that a file takes in."""

from __future__ import annotations

from llm_middleware.config.load import ConfigProblems, load_config
from tests.config.files import problems, written


def entry(name: str) -> dict:
    return {"model_name": name, "litellm_params": {"model": f"openai/{name}"}}


MODEL = "- {{model_name: {0}, litellm_params: {{model: openai/{0}}}}}\n"


def test_lists_are_added_to_and_settings_are_joined(tmp_path):
    (tmp_path / "parts").mkdir()
    written(tmp_path, "model_list:\n" + MODEL.format("c"), "parts/more.yaml")
    written(
        tmp_path,
        "include: [more.yaml]\nmodel_list:\n"
        + MODEL.format("b")
        + "router_settings: {num_retries: 5, timeout: 9}\n",
        "parts/models.yaml",
    )
    main = written(
        tmp_path,
        "include:\n  - parts/models.yaml\nmodel_list:\n"
        + MODEL.format("a")
        + "router_settings: {num_retries: 1, cooldown_time: 2}\n",
    )
    config = load_config(main, {})
    assert config.model_list == (entry("a"), entry("b"), entry("c"))
    assert config.router == {"num_retries": 5, "cooldown_time": 2, "timeout": 9}


def test_a_problem_is_told_in_the_file_where_it_is(tmp_path):
    other = written(tmp_path, "# more\nmodel_list:\n" + MODEL.format("b") + "  rmp: 5\n", "models.yaml")
    main = written(tmp_path, "include: models.yaml\nmodel_list:\n" + MODEL.format("a") + "cach: 1\n")
    found = problems(main)
    assert found[-1][0] == "include"
    other.write_text("# more\nmodel_list:\n- model_name: b\n  litellm_params: {model: openai/b}\n  rmp: 5\n")
    try:
        load_config(main, {})
    except ConfigProblems as exc:
        told = [(each.file, each.line, each.path) for each in exc.problems]
    assert told == [(str(main), 4, "cach"), (str(other), 5, "model_list[1].rmp")]


def test_a_circle_is_refused(tmp_path):
    written(tmp_path, "include: config.yaml\nmodel_list: []\n", "b.yaml")
    main = written(tmp_path, "include: b.yaml\n")
    assert [(path, message) for path, _, message in problems(main)] == [
        ("include", "config.yaml: includes itself")
    ]


def test_a_file_that_is_not_there_is_told_by_name(tmp_path):
    main = written(tmp_path, "model_list: []\ninclude:\n- gone.yaml\n")
    assert problems(main) == [("include[0]", 3, f"{tmp_path}/gone.yaml: there is no such file")]


def test_files_that_multiply_are_bounded(tmp_path):
    for level in range(9):
        written(tmp_path, f"include: [{', '.join([f'{level + 1}.yaml'] * 3)}]\n", f"{level}.yaml")
    written(tmp_path, "model_list: []\n", "9.yaml")
    assert problems(tmp_path / "0.yaml") == [("include", 1, "more than 100 files")]


def test_include_is_a_list_of_files():
    assert problems({"include": 5}) == [("include", None, "expected a list of files")]
