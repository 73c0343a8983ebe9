"""The command ``llm-middleware``."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from llm_middleware.cli import main
from tests.config.files import FILES, SECRETS


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


def test_a_good_file_is_ok_with_its_notes(capsys):
    assert main(["config", "check", str(FILES / "proxy.yaml")]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines() == [
        "ok",
        "ignored: litellm_settings.success_callback[0]",
        "ignored: litellm_settings.service_callbacks",
        "ignored: litellm_settings.json_logs",
        "ignored: router_settings.debug_level",
        "ignored: general_settings.alerting",
        "ignored: general_settings.store_model_in_db",
        "ignored: guardrails",
    ]
    assert main(["config", "check", str(FILES / "default_off.yaml")]) == 0
    assert capsys.readouterr().out.splitlines() == ["ok", "note: cache: true without a type: memory"]


def test_a_bad_file_is_told_line_by_line(capsys):
    assert main(["config", "check", str(FILES / "broken.yaml")]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 17
    assert (
        lines[0]
        == f"{FILES}/broken.yaml:6: model_list[0].litellm_params.rpm: expected a whole number, not str"
    )
    assert "hunter2" not in err
    assert "sk-a-real" not in err


def test_json_has_the_same(capsys):
    assert main(["config", "check", "--json", str(FILES / "broken.yaml")]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["ok"], len(found["problems"]), found["ignored"], found["notes"]) == (False, 17, [], [])
    assert found["problems"][0] == {
        "path": "model_list[0].litellm_params.rpm",
        "line": 6,
        "message": "expected a whole number, not str",
        "file": str(FILES / "broken.yaml"),
    }
    assert main(["config", "check", "--json", str(FILES / "memory.yaml")]) == 0
    assert json.loads(capsys.readouterr().out) == {"ok": True, "problems": [], "ignored": [], "notes": []}


def test_it_runs_as_a_program():
    command = [sys.executable, "-m", "llm_middleware.cli"]
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("llm-middleware ")
    missing = subprocess.run(
        [*command, "config", "check", "gone.yaml"], capture_output=True, text=True, check=False
    )
    assert (missing.returncode, missing.stdout, missing.stderr) == (
        1,
        "",
        "gone.yaml: there is no such file\n",
    )
    assert subprocess.run(command, capture_output=True, check=False).returncode == 2


def test_reading_a_file_leaves_the_process_as_it_was():
    code = (
        "import os, logging\n"
        "from llm_middleware.config.load import load_config\n"
        "before = dict(os.environ)\n"
        f"load_config({str(FILES / 'proxy.yaml')!r})\n"
        f"load_config({str(FILES / 'redis_from_environment.yaml')!r})\n"
        "print(before == dict(os.environ), logging.getLogger('llm_middleware').level)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True 0\n"
