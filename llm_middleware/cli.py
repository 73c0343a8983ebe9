"""The command ``llm-middleware``: ``config check FILE`` tells what a file of settings comes to, and
``semantic-eval FILE`` what the semantic cache would have done with questions of yours."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version

from .config.load import ConfigProblems, load_config
from .errors import ConfigError
from .semantic.command import add_semantic_eval

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with ``arguments`` (those of the process unless given). The exit status: 0, or 1 where
    there are problems, or 2 where an evaluation's input is wrong; argparse exits with 2 for arguments that it
    does not know."""
    given = _parser().parse_args(arguments)
    status: int = given.run(given)
    return status


def _check(given: argparse.Namespace) -> int:
    try:
        config = load_config(given.file)
    except ConfigProblems as exc:
        problems = [asdict(problem) for problem in exc.problems]
        return _tell(given, problems, [str(problem) for problem in exc.problems])
    except ConfigError as exc:  # PyYAML is missing
        return _tell(given, [{"path": "", "line": None, "message": exc.message, "file": None}], [exc.message])
    return _tell(given, [], [], config.ignored, config.notes)


def _tell(
    given: argparse.Namespace,
    problems: Sequence[object],
    lines: Sequence[str],
    ignored: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> int:
    if given.json:
        found = {"ok": not problems, "problems": problems, "ignored": ignored, "notes": notes}
        print(json.dumps(found, indent=2))
        return 1 if problems else 0
    for line in lines:
        print(line, file=sys.stderr)
    if not problems:
        print("ok")
    for title, texts in (("note", notes), ("ignored", ignored)):
        for text in texts:
            print(f"{title}: {text}")
    return 1 if problems else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llm-middleware", description="Looks after llm_middleware's settings and measures them."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    config = commands.add_parser("config", help="files of settings")
    actions = config.add_subparsers(title="actions", required=True, metavar="ACTION")
    check = actions.add_parser(
        "check", help="tell what is wrong with a file, what of it is ignored, and what to know"
    )
    check.add_argument("file", metavar="FILE", help="LiteLLM's config.yaml, or the short form")
    check.add_argument("--json", action="store_true", help="as JSON")
    check.set_defaults(run=_check)
    add_semantic_eval(commands)
    return parser


def _version() -> str:
    try:
        return version("llm-middleware")
    except PackageNotFoundError:  # run from its sources
        return "unknown"


if __name__ == "__main__":
    sys.exit(main())
