#!/usr/bin/env bash
# Prints a Python that can build the environment, or says what is missing. PYTHON=… chooses one.
set -euo pipefail

fail() { echo "error: $*" >&2; exit 1; }

for compiler in gcc g++; do
    command -v "$compiler" >/dev/null ||
        fail "$compiler not found: generated code is compiled with it; on Debian: apt-get install gcc g++"
done

for python in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        command -v "$python"
        exit 0
    fi
done
fail "no Python 3.11 or later found (tried: ${PYTHON:-python3 python3.13 python3.12 python3.11}); set PYTHON=/path/to/python"
