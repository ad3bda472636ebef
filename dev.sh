#!/usr/bin/env bash
# The one command of this repository: sets up a virtual environment where there is none, then does what it is told.
#   ./dev.sh demo [ARGS]      read the Python language reference into a memory and show that it knows it
#   ./dev.sh locas ARGS       the command line
#   ./dev.sh test [ARGS]      lint, types, every test, build; pytest gets ARGS, e.g. -n 0: all in one process
#   ./dev.sh fast [ARGS]      unit tests only
#   ./dev.sh lint             formatting, lint, types
# LOCAS_VENV says where the environment is (default: .venv here), PYTHON which Python makes it.
set -euo pipefail
cd "$(dirname "$0")"
venv="${LOCAS_VENV:-.venv}"
python="$venv/bin/python"
parallel=(-n auto --dist worksteal)  # tests/conftest.py says how many workers

# setup EXTRA: the package with its dependencies and those of an optional extra (pyproject.toml).
setup() {
    local stamp="$venv/.locas-stamp-${1:-base}" done
    for done in "$stamp" "$venv/.locas-stamp-dev"; do
        if [[ -x "$python" && -f "$done" && ! constraints.txt -nt "$done" && ! pyproject.toml -nt "$done" ]]; then
            return
        fi
    done
    echo "setting up $venv ..." >&2
    "${PYTHON:-python3}" -m venv "$venv"
    "$python" -m pip install --quiet --upgrade-strategy only-if-needed -c constraints.txt -e ".${1:+[$1]}" >&2
    touch "$stamp"
}

lint() {
    "$python" -m ruff format --check src tests recipes
    "$python" -m ruff check src tests recipes
    "$python" -m mypy
}

build() {
    local out
    out="$(mktemp -d)"
    "$python" -m build --no-isolation --outdir "$out" . >/dev/null
    ls -l "$out"
    rm -r "$out"
}

task="${1:-help}"
[[ $# -gt 0 ]] && shift
case "$task" in
    demo) setup ""; exec "$venv/bin/locas" demo "$@" ;;
    locas) setup eval; exec "$venv/bin/locas" "$@" ;;
    fast) setup dev; exec "$python" -m pytest "${parallel[@]}" tests/unit "$@" ;;
    lint) setup dev; lint ;;
    test) setup dev; lint; "$python" -m pytest "${parallel[@]}" "$@"; build ;;
    *) sed -n '2,8s/^# \{0,1\}//p' "$0"; [[ "$task" == help ]] || exit 2 ;;
esac
