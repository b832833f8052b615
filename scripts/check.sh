#!/usr/bin/env bash
# Everything that CI checks, here as there. Arguments go to pytest: scripts/check.sh tests/unit/core -k bank
# All checks run, also after a failure; the exit status says whether one failed.
set -uo pipefail
cd "$(dirname "$0")/.."

export ONEDNN_MAX_CPU_ISA="${ONEDNN_MAX_CPU_ISA:-AVX512_CORE_BF16}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # one thread a test process: two processes on two cores
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

failed=()
check() {
    local name=$1
    shift
    echo "== $name"
    "$@" || failed+=("$name")
}

check "style: ruff check" ruff check .
check "style: ruff format" ruff format --check --quiet .
check "types: mypy" mypy
check "layers: import-linter" lint-imports --no-logo --no-cache
check "tests: pytest" python -m pytest --numprocesses "${WEFT_TEST_PROCESSES:-2}" --dist worksteal --quiet "$@"

if ((${#failed[@]})); then
    printf 'FAILED: %s\n' "${failed[@]}"
    exit 1
fi
echo "all checks passed"
