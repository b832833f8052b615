#!/usr/bin/env bash
# Makes .venv and installs weft into it with all that its checks need, in the versions of constraints.txt.
# PYTHON names the interpreter; else the first of python3.11-3.13 and python3 that runs and is new enough.
set -euo pipefail
cd "$(dirname "$0")/.."

supported='import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'

if [[ ! -x .venv/bin/python ]]; then
    found=
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$candidate" -c "$supported" 2>/dev/null; then
            found=$candidate
            break
        fi
    done
    if [[ -z $found ]]; then
        echo "set-up: weft needs Python 3.11, 3.12 or 3.13 with the venv module; tried ${PYTHON:-python3 python3.13 python3.12 python3.11};" >&2
        echo "        here: $(python3 --version 2>&1 || true). Install one (Debian: apt install python3-venv), or say which: make PYTHON=/path/to/python3.12 …" >&2
        exit 1
    fi
    echo "set-up: .venv with $("$found" --version) (once; some minutes, mostly torch)"
    "$found" -m venv .venv
fi

.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
echo "set-up: done"
