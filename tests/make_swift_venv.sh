#!/usr/bin/env bash
# OpenStack Swift in an environment of its own (.venv/swift, or the directory named): it brings eventlet, which
# must stay out of the tests' process. Does nothing where it is already there. Prints the directory.
set -euo pipefail
swift="swift==2.38.3"
root="$(cd "$(dirname "$0")/.." && pwd)"
directory="${1:-$root/.venv/swift}"
base="${PYTHON:-$root/.venv/bin/python}"
mkdir -p "$(dirname "$directory")"
exec 9>"$directory.lock"
flock 9
if [[ "$(cat "$directory/installed" 2>/dev/null)" != "$swift" ]]; then
  rm -rf "$directory"
  "$base" -m venv "$directory" >&2
  "$directory/bin/python" -m pip install --quiet "$swift" >&2
  echo "$swift" >"$directory/installed"
fi
echo "$directory"
