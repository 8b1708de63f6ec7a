#!/usr/bin/env bash
# Makes the project's Python environments. Needs bash, a Python and, for the source builds, a C++ compiler and make.
set -euo pipefail

usage() {
  cat <<'HELP'
usage: tools/setup.sh [--env k2|modern] [--python PATH] [--no-kaldifeat] [--retry-builds]

  --env k2         .venv: Python 3.10, torch 1.13.1, k2. Everything works in it. Takes about 70 s and 4 GB, then
                   as long again (once) to build kaldifeat.
  --env modern     .venv-modern: Python 3.11, torch 2.13, fast_rnnt. Everything but k2's lattices.
                   Without --env: the default that an earlier call chose (kept in .venv-default), or k2, unless no
                   Python 3.10 can be had or the GPU is newer than sm_86, the last one torch 1.13.1 has kernels for.
  --python PATH    make the environment with this interpreter instead of searching for one
  --no-kaldifeat   do not build kaldifeat; features then come from lhotse (equal within 1e-3). Later calls keep to it.
  --retry-builds   build from source what failed earlier or was left out

The versions are in tools/requirements-<env>.txt. Calling it again is cheap; after an interruption it mends what is
there. Built wheels are kept in ${XDG_CACHE_HOME:-~/.cache}/transducer_kd, so that the next clone need not build.
HELP
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
default_file=$root/.venv-default
env_name="" python_path="" kaldifeat=1 retry=0
while [ $# -gt 0 ]; do
  case $1 in
    --env=*) env_name=${1#*=} ;;
    --python=*) python_path=${1#*=} ;;
    --env) env_name=${2:-}; shift ;;
    --python) python_path=${2:-}; shift ;;
    --no-kaldifeat) kaldifeat=0 ;;
    --retry-builds) retry=1 ;;
    -h | --help) usage; exit 0 ;;
    *) echo "tools/setup.sh: unknown option $1; see tools/setup.sh --help" >&2; exit 2 ;;
  esac
  shift || { echo "tools/setup.sh: the last option needs a value" >&2; exit 2; }
done
case $env_name in
  "" | k2 | modern) ;;
  *) echo "tools/setup.sh: --env $env_name is not one of k2, modern" >&2; exit 2 ;;
esac
unset PYTHONPATH PYTHONHOME PIP_USER PIP_TARGET PIP_PREFIX
HOME=${HOME:-$root}

log() { printf '%s setup: %s\n' "$(date '+%F %T')" "$*" >&2; }
die() { log "ERROR: $*"; exit 1; }

# --- Where things are; what is wanted; whether it is there already -------------------------------------------------

set_paths() {
  if [ "$env_name" = k2 ]; then venv=$root/.venv python_versions="3.10" need_mb=5500
  else venv=$root/.venv-modern python_versions="3.11 3.12 3.13" need_mb=3000
  fi
  pins=$root/tools/requirements-$env_name.txt
  python=$venv/bin/python
  # A change of the pins or of the way of installing them brings the environment up to date.
  wanted=$(cat "$pins" "$root/tools/setup.sh" "$root"/tools/cmake/*/* | cksum)
  builds=$(sed -n 's/^#build: //p' "$pins")
}

# State of a source build in this environment: built, failed, skipped or nothing. All are remembered: not every call
# should cost minutes.
build_state() { cat "$venv/.build-$1" 2>/dev/null || true; }

is_complete() {
  [ -x "$python" ] && [ "$(cat "$venv/.setup-stamp" 2>/dev/null)" = "$wanted" ] || return 1
  local build state
  for build in $builds; do
    state=$(build_state "$build")
    [ "$state" = built ] || { [ -n "$state" ] && [ "$retry" = 0 ]; } || return 1
  done
}

# --- Finding an interpreter ----------------------------------------------------------------------------------------

# Whether $1 runs, is Python $2, and can make an environment. pyenv's shims exist for versions they cannot run.
is_usable() {
  "$1" -c "import sys, venv, ensurepip; sys.exit('%d.%d' % sys.version_info[:2] != '$2')" >/dev/null 2>&1
}
has_headers() {
  "$1" -c "import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path('include'), 'Python.h')))" >/dev/null 2>&1
}

# uv, installed into .uv with pip where it is not on the PATH; prints its path.
find_uv() {
  local uv base
  for uv in uv "$HOME/.local/bin/uv" "$HOME/.cargo/bin/uv" "$root/.uv/bin/uv"; do
    if "$uv" --version >/dev/null 2>&1; then echo "$uv"; return; fi
  done
  for base in python3 python "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin/python3; do
    if "$base" -c "import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 8))" >/dev/null 2>&1; then
      "$base" -m venv "$root/.uv" >/dev/null 2>&1 && "$root/.uv/bin/python" -m pip install -q uv >/dev/null 2>&1 &&
        echo "$root/.uv/bin/uv"
      return
    fi
  done
}

# Prints an interpreter of version $1 (major.minor), or nothing: PATH, pyenv's versions, what uv has, what uv can get.
# One that has the C headers, which the source builds need, goes before one without.
find_python() {
  local version=$1 candidate first="" uv
  for candidate in "python$version" python3 python \
    "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python "$HOME/.pyenv/versions/$version".*/bin/python; do
    is_usable "$candidate" "$version" || continue
    if has_headers "$candidate"; then command -v "$candidate"; return; fi
    first=${first:-$(command -v "$candidate")}
  done
  if [ -n "$first" ]; then echo "$first"; return; fi
  uv=$(find_uv) || true
  [ -n "$uv" ] || return 0
  "$uv" python find "$version" >/dev/null 2>&1 || log "no Python $version here; trying 'uv python install $version'"
  "$uv" python find "$version" >/dev/null 2>&1 || timeout 300 "$uv" python install "$version" >/dev/null 2>&1 || true
  candidate=$("$uv" python find "$version" 2>/dev/null) || return 0
  if is_usable "$candidate" "$version"; then echo "$candidate"; fi
}

# --- Which environment is the default ------------------------------------------------------------------------------

# Compute capability of the newest GPU times ten, e.g. 86; 0 without one (or with a driver too old to say).
newest_gpu() {
  command -v nvidia-smi >/dev/null || { echo 0; return; }
  { nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null || true; } |
    awk -F. '/^[0-9]+\.[0-9]+/ { c = $1 * 10 + $2; if (c > m) m = c } END { print m + 0 }'
}

choose_default() {
  local gpu reason=""
  gpu=$(newest_gpu)
  if [ "$gpu" -gt 86 ]; then
    reason="the GPU here is sm_$gpu and the k2 environment's torch 1.13.1 has kernels up to sm_86"
  elif [ ! -x "$root/.venv/bin/python" ] && [ -z "$python_path" ] && [ -z "$(find_python 3.10)" ]; then
    reason="no Python 3.10 could be found (PATH, pyenv) or installed (uv), and k2's PyPI wheel needs it"
  fi
  if [ -z "$reason" ]; then env_name=k2; return; fi
  env_name=modern
  log "using the modern environment: $reason"
  log "missing there: k2, so no lattices: the fast_beam_search methods are left out; n-bests come from" \
    "modified_beam_search, and the pruned loss from fast_rnnt or from the project's own torch code"
}

print_k2_line() {
  "$python" - >&2 <<'PY' || true
import sys, torch
cuda = f"cuda{torch.version.cuda}" if torch.version.cuda else "cpu"
cp = "cp%d%d" % sys.version_info[:2]
print(f"""setup: to have k2's lattices in this environment, install the k2 wheel made for exactly this torch. k2's own
setup: documentation ("Installation", "From wheels") links its pages of wheels, one for CPU and one for CUDA; take the
setup: newest file named k2-<version>.dev<date>+{cuda}.torch{torch.__version__.split('+')[0]}-{cp}-{cp}-*.whl and then run
setup:   {sys.executable} -m pip install --no-deps <that file>
setup: (not `pip install k2`: PyPI has no build for this Python and torch)""")
PY
}

# --- Installing ----------------------------------------------------------------------------------------------------

check_disk() {
  local free
  free=$(df -Pk "$root" | awk 'NR == 2 { print int($4 / 1024) }')
  [ -x "$python" ] || [ "$free" -ge "$need_mb" ] ||
    die "the $env_name environment needs about $need_mb MB in $root and $free MB are free; free some and run again"
}

# Runs a command with its output in the setup log; shows the end of it when the command fails.
logged() {
  echo "+ $*" >>"$setup_log"
  "$@" >>"$setup_log" 2>&1 && return
  log "this failed (whole log: $setup_log):"
  tail -n 15 "$setup_log" | sed 's/^/    /' >&2
  return 1
}

make_venv() {
  local base=$python_path version
  # `.installing` is there while pip runs: packages may be half written then, and pip takes them for installed.
  if [ -e "$venv/.installing" ]; then
    log "an earlier call was interrupted: making $(basename "$venv") anew"
  elif "$python" -m pip --version >/dev/null 2>&1 && [ -z "$python_path" ]; then
    for version in $python_versions; do
      is_usable "$python" "$version" && return
    done
    log "$(basename "$venv") has another Python than $python_versions: making it anew"
  fi
  for version in $python_versions; do
    [ -n "$base" ] || base=$(find_python "$version")
  done
  [ -n "$base" ] || die "no Python $python_versions: not on the PATH, not in pyenv's versions, and uv could not" \
    "get one. Install one (for example 'pyenv install ${python_versions%% *}') or name it with --python"
  log "making $(basename "$venv") with $base"
  mkdir -p "$venv"
  "$base" -m venv --clear "$venv" || die "$base -m venv $venv failed; on Debian the package python3-venv is needed"
}

pip_install() { logged "$python" -m pip install --disable-pip-version-check --no-input "$@"; }
pip_failed() { die "pip could not install $1; mend what it says above and run tools/setup.sh --env $env_name again"; }

install_pins() {
  log "installing $(grep -c '==' "$pins") packages into $(basename "$venv") (a minute or two)"
  touch "$venv/.installing"
  rm -f "$venv/.setup-stamp"
  if ! pip_install -r "$pins"; then
    # What failed before anything was written, without network for example, leaves the environment as it was.
    grep -q '^Installing collected packages' "$setup_log" || rm -f "$venv/.installing"
    pip_failed "$pins"
  fi
  rm -f "$venv/.installing"
  sed -n 's/^#hashed: //p' "$pins" >"$venv/.hashed.txt"
  if [ -s "$venv/.hashed.txt" ]; then install_hashed; fi
}

# Packages of which the index has several files that look alike to pip. What is there may be the wrong one, or half of it.
install_hashed() {
  local name names again=()
  names=$(sed 's/==.*//' "$venv/.hashed.txt")
  for name in $names; do
    "$python" -c "import torch, $name" >/dev/null 2>&1 || again=(--force-reinstall)
  done
  pip_install --no-deps --require-hashes ${again[@]+"${again[@]}"} -r "$venv/.hashed.txt" || pip_failed "$names"
  for name in $names; do
    logged "$python" -c "import torch, $name" ||
      die "$name was installed but does not import here; tools/setup.sh --env modern makes an environment without it"
  done
}

# Builds $1 (name==version) from its source distribution unless the cache has its wheel, and installs it.
# The sdists' CMake files want to download pybind11 and to find CUDA; tools/cmake stands in for both.
build_from_source() {
  local build=$1 name=${1%%==*} facts wheels cache folder jobs std=14 args log_start=$SECONDS
  facts=$("$python" -c "import platform, sys, torch
print('py%d%d-torch%s-abi%d-%s-%s' % (*sys.version_info[:2], torch.__version__, torch._C._GLIBCXX_USE_CXX11_ABI,
                                      platform.system(), platform.machine()))") || return 1
  wheels=${XDG_CACHE_HOME:-$HOME/.cache}/transducer_kd/wheels
  mkdir -p "$wheels" 2>/dev/null && [ -w "$wheels" ] || wheels=$root/.setup-wheels
  cache=$wheels/${build/==/-}-$facts
  if ! compgen -G "$cache/*.whl" >/dev/null; then
    for tool in make "${CXX:-c++}"; do
      command -v "$tool" >/dev/null || { log "building $build needs $tool, which is not installed"; return 1; }
    done
    case $facts in *-torch1.*) ;; *) std=17 ;; esac
    jobs=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
    [ "$jobs" -le 8 ] || jobs=8
    args="-DCMAKE_BUILD_TYPE=Release -Dkaldifeat_BUILD_TESTS=OFF -DFT_BUILD_TESTS=OFF -DFT_WITH_CUDA=OFF"
    args+=" -DFETCHCONTENT_SOURCE_DIR_PYBIND11=$root/tools/cmake/pybind11 -DTorch_DIR=$root/tools/cmake/torch"
    args+=" -DCMAKE_CXX_STANDARD=$std -DPYTHON_EXECUTABLE=$python"
    # Several sources in one compilation: reading torch's headers takes the time (kaldifeat: 370 s of CPU, so 135 s).
    args+=" -DCMAKE_UNITY_BUILD=ON"
    log "building $build from source with $jobs jobs (a minute or two on two cores)"
    mkdir -p "$wheels"
    find "$wheels" -maxdepth 1 -name '.build.*' -mmin +600 -exec rm -rf {} +
    folder=$(mktemp -d "$wheels/.build.XXXXXX")
    # --no-build-isolation: against this environment's torch, with its cmake.
    PATH=$venv/bin:$PATH KALDIFEAT_CMAKE_ARGS=$args KALDIFEAT_MAKE_ARGS=-j$jobs \
      FT_CMAKE_ARGS=$args FT_MAKE_ARGS=-j$jobs \
      logged "$python" -m pip wheel --disable-pip-version-check --no-input --no-cache-dir --no-deps \
      --no-build-isolation --no-binary "$name" -w "$folder" "$build" || { rm -rf "$folder"; return 1; }
    # Into place in one step: another clone may be looking. It may also have been quicker.
    mv -T "$folder" "$cache" 2>/dev/null || rm -rf "$folder"
  fi
  touch "$venv/.installing"
  pip_install --no-index --no-deps --force-reinstall "$cache"/*.whl || return 1
  rm -f "$venv/.installing"
  if ! logged "$python" -c "import torch, $name"; then
    log "$name was built but does not import"
    rm -rf "$cache"
    return 1
  fi
  log "$build is there ($((SECONDS - log_start)) s)"
}

build_all() {
  local build state fallback
  for build in $builds; do
    state=$(build_state "$build")
    if [ "$state" != built ] && [ -n "$state" ] && [ "$retry" = 0 ]; then continue; fi
    if [ "$state" = built ] && "$python" -c "import torch, ${build%%==*}" >/dev/null 2>&1; then continue; fi
    if [[ $build == kaldifeat* && $kaldifeat = 0 ]]; then
      state=skipped
    elif build_from_source "$build"; then
      state=built
    else
      state=failed
      case $build in
        kaldifeat*) fallback="features come from lhotse, equal within 1e-3" ;;
        *) fallback="the pruned loss comes from the project's own torch code" ;;
      esac
      log "WARNING: $build could not be built. Going on without it: $fallback." \
        "To try again: tools/setup.sh --env $env_name --retry-builds"
    fi
    echo "$state" >"$venv/.build-$build"
  done
}

# --- Main ----------------------------------------------------------------------------------------------------------

[ -n "$env_name" ] || { [ -s "$default_file" ] && env_name=$(cat "$default_file"); } || true
if [ -n "$env_name" ]; then
  set_paths
  if is_complete; then exit 0; fi
fi
is_default_call=0
[ -n "$env_name" ] || { is_default_call=1; choose_default; set_paths; }

# One call at a time: the lock sits on the open file, so it outlives the little Python that takes it and goes when
# this shell and whatever it started are gone, also after kill -9.
any_python=""
for candidate in "$python_path" "$python" python3 python "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin/python3; do
  if "$candidate" -c "import fcntl" >/dev/null 2>&1; then any_python=$candidate; break; fi
done
[ -n "$any_python" ] || die "no Python at all was found on the PATH or in pyenv's versions; install Python 3.10"
exec 9>"$root/.setup-$env_name.lock"
"$any_python" -c "import fcntl, sys
try:
    fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    print('setup: another setup of this environment is running; waiting for it', file=sys.stderr)
    fcntl.flock(9, fcntl.LOCK_EX)"

start=$SECONDS
setup_log=$root/.setup-$env_name.log
if ! is_complete; then
  : >"$setup_log"
  check_disk
  make_venv
  if [ "$(cat "$venv/.setup-stamp" 2>/dev/null)" != "$wanted" ]; then install_pins; fi
  build_all
  echo "$wanted" >"$venv/.setup-stamp"
  log "$(basename "$venv") is ready ($((SECONDS - start)) s)"
  if [ "$env_name" = modern ]; then print_k2_line; fi
fi
if [ "$is_default_call" = 1 ]; then echo "$env_name" >"$default_file"; fi
