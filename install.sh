#!/usr/bin/env bash
# Set up everything that seqaware needs in a virtual environment, .venv, beside this file.
#
#   bash install.sh && source .venv/bin/activate
#
# Running it again is quick: nothing is done unless pyproject.toml, constraints.txt or this file have changed.
#
#   PYTHON=/path/to/python3.11   the Python to use (3.11 or 3.12); otherwise the first that is found
#   TORCH_INDEX_URL=URL          where to take torch from; https://download.pytorch.org/whl/cpu spares a machine
#                                without a GPU the CUDA libraries, some 3 GB
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

VENV=.venv
STAMP=$VENV/.seqaware-installed

say() { printf 'install: %s\n' "$*"; }
fail() {
    printf 'install: error: %s\n' "$1" >&2
    shift
    for line in "$@"; do printf 'install:        %s\n' "$line" >&2; done
    exit 2
}

# Present and able to run: a shim without a Python behind it is no Python.
is_usable_python() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1
}

find_python() {
    if [[ -n ${PYTHON:-} ]]; then
        is_usable_python "$PYTHON" || fail "PYTHON=$PYTHON is not a Python 3.11 or 3.12 that runs"
        printf '%s' "$PYTHON"
        return
    fi
    local candidate
    for candidate in python3.11 python3.12 python3 python; do
        if is_usable_python "$candidate"; then
            printf '%s' "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or 3.12 was found" "install one, or name it: PYTHON=/path/to/python3.11 bash install.sh"
}

check_tools() {
    command -v git >/dev/null || fail "git was not found" "Debian and Ubuntu: apt-get install git"
    # DeepSpeed compiles its CPU operators on first use.
    command -v "${CXX:-g++}" >/dev/null || command -v c++ >/dev/null ||
        fail "no C++ compiler was found" "Debian and Ubuntu: apt-get install g++   Fedora: dnf install gcc-c++"
}

# Names and contents: what the installed state depends on. $1: a Python.
state() {
    "$1" - pyproject.toml constraints.txt install.sh <<'PY'
import hashlib, pathlib, sys
digest = hashlib.sha256(sys.version.encode())
for name in sys.argv[1:]:
    digest.update(name.encode() + b"\0" + pathlib.Path(name).read_bytes() + b"\0")
# An editable install points at this folder; a moved or copied one is not installed.
digest.update(str(pathlib.Path.cwd()).encode())
print(digest.hexdigest())
PY
}

make_venv() {
    local python=$1
    say "creating $VENV with $("$python" --version) ($python)"
    "$python" -m venv "$VENV" || fail "$python could not create a virtual environment" \
        "Debian and Ubuntu: apt-get install python3-venv"
}

# pip would do it one file after the other, a third of the whole time. Some packages carry a file that is broken on purpose.
compile_packages() {
    "$VENV/bin/python" -m compileall -qq -j 0 "$VENV"/lib/python3*/site-packages || true
}

check_tools
if [[ ! -x $VENV/bin/python ]]; then
    python=$(find_python)
    make_venv "$python"
elif ! is_usable_python "$VENV/bin/python"; then
    fail "$VENV is there but does not hold a Python 3.11 or 3.12" "remove it and run this again"
fi
if [[ -f $STAMP && $(cat "$STAMP") == "$(state "$VENV/bin/python")" ]]; then
    say "$VENV is up to date"
    exit 0
fi

pip=("$VENV/bin/python" -m pip --disable-pip-version-check)
"${pip[@]}" --version >/dev/null 2>&1 || "$VENV/bin/python" -m ensurepip >/dev/null ||
    fail "$VENV has no pip and ensurepip is missing" "Debian and Ubuntu: apt-get install python3-venv, then remove $VENV"
# torch first: DeepSpeed looks for it while it is being built. Nothing is compiled ahead of time.
export DS_BUILD_OPS=0
say "installing torch (pinned by constraints.txt)"
"${pip[@]}" install --quiet --no-compile -c constraints.txt ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} torch
say "installing seqaware and what it needs (pinned by constraints.txt)"
"${pip[@]}" install --quiet --no-compile -c constraints.txt -e ".[dev,gguf]"
compile_packages
state "$VENV/bin/python" >"$STAMP"
say "done; now: source $VENV/bin/activate"
