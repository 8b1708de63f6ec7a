#!/usr/bin/env bash
# ruff, then pytest in both environments, which are made where they are missing. Arguments go to pytest:
#   tools/test.sh                          everything
#   tools/test.sh tests/models -k chunk    some tests, in both environments
#   TEST_ENVS=modern tools/test.sh         one environment
# Fails when any of them fails. The last line is pytest's closing line, that of a failed run if there is one.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
envs=${TEST_ENVS:-k2 modern}

# Processes rather than threads: the tests' tensors are too small for two threads to help.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# torch 1.13.1's MKL takes its slow path on AMD without this.
if grep -q AuthenticAMD /proc/cpuinfo 2>/dev/null; then export MKL_DEBUG_CPU_TYPE=5; fi
arguments=("$@")
if [ $# -eq 0 ]; then
  cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
  arguments=(-n "$((cores < 8 ? cores : 8))" --dist loadfile --durations=10 -rs)
fi

output=$(mktemp)
trap 'rm -f "$output"' EXIT
is_linted=0 status=0 failed_line=""
for env in $envs; do
  # The modern environment is tested without kaldifeat unless it is there: the fallback to lhotse needs testing too,
  # and the build takes minutes.
  without=()
  [ "$env" = k2 ] || without=(--no-kaldifeat)
  venv=.venv
  [ "$env" = k2 ] || venv=.venv-$env
  if ! tools/setup.sh --env "$env" ${without[@]+"${without[@]}"}; then
    status=1 failed_line="the $env environment could not be made: its tests did not run"
    continue
  fi
  if [ "$is_linted" = 0 ]; then
    "$venv/bin/python" -m ruff check . && "$venv/bin/python" -m ruff format --check . || exit 1
    is_linted=1
  fi
  echo "== $env: $("$venv/bin/python" -c "import platform, torch; print('Python', platform.python_version(), 'torch', torch.__version__)")"
  if ! "$venv/bin/python" -m pytest "${arguments[@]}" 2>&1 | tee "$output"; then
    status=1 failed_line="$env: $(tail -n 1 "$output")"
  fi
done
if [ "$status" -ne 0 ]; then echo "$failed_line"; fi
exit "$status"
