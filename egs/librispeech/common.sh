# What the recipes share. Here: options, environment, places and configurations. This file sources runner.sh, which runs
# stages, and stages.sh, the stages themselves.
#
# A recipe's run.sh, from top to bottom:
#
#   recipe=NAME recipe_dir=ITS_FOLDER last_stage=7
#   source "$recipe_dir/../common.sh"
#   parse_options "$@"            sets a variable for each option, see value_options and switch_options
#   phases="teacher student"      what is trained, in order: each is conf/<scale>/<phase>.yaml and
#                                 exp/<corpus>-<scale>/<phase>/
#   begins_with=([student]=base)  whose weights a phase begins with (init.exp_dir); those without are left out
#   learns_from=([student]=teacher)    who teaches it (teacher.exp_dir)
#   methods=greedy_search,...     what the phases are decoded with, as far as the environment can. Streaming phases are
#                                 also decoded with streaming_greedy_search, those of two modes in both, those of
#                                 objective wav2vec2 not at all
#   first_pass=METHOD             only where phases have a LAS: of what method it rescores the hypotheses
#   start_recipe                  activates the environment, makes the folders, reads all configurations
#   data_stages                   stages 0 and 1
#   train_stage 2 teacher         queues those of these phases that are in `phases`; stages 3 to 5 likewise
#   train_queued                  trains them, those side by side that need not wait for each other; before any step
#                                 that uses them
#   exported="teacher student"    the phases that stage 7 exports
#   last_stages                   train_queued, then stage 6: decode_stage for what is trained, and the report, then
#                                 stage 7: export_stage (a recipe with steps of its own between them calls them itself)
#
# It may define two functions:
#
#   phase_arguments PHASE   adds to the array `arguments` what local/train.py is told besides, for example
#                           arguments+=(--set "data.pseudo_labels=$dir"). Called when PHASE is about to be trained; may
#                           call programs first, with `run PROGRAM ...`. The user's --set have the last word.
#   phase_inputs PHASE      prints a line for each thing that the training depends on besides the configuration and the
#                           phases it begins with and learns from, for example the hash of its pseudo-labels. When a
#                           line changes, the phase is trained anew, and it is not decoded before that.
#
# A step of its own that trains nothing, such as labelling, is a call of run_stage (runner.sh) between the others; its
# fingerprint should hold $(training_ended PHASE) of every phase that it uses, and feature_fingerprint. Of use there:
# $exp_root $conf_dir $fbank_dir $lang_dir $manifests_dir $device $nproc, config_value, parts_of, select_sets,
# require_trained. run.sh stays below 120 lines.
set -euo pipefail

egs_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$egs_dir/../.." && pwd)
declare -A begins_with=() learns_from=() config_values=()

# icefall's line: time (file:line:function) message
log() {
  echo "$(date '+%Y-%m-%d %H:%M:%S') (${BASH_SOURCE[1]##*/}:${BASH_LINENO[0]}:${FUNCNAME[1]}) $*" >&2
}

fail() {
  echo "$(date '+%Y-%m-%d %H:%M:%S') ERROR $*" >&2
  exit 1
}

# --- Options -------------------------------------------------------------------------------------------------------

# name=default. A name with a dash becomes a variable with an underscore. Switches may stand alone or take 0 or 1.
value_options="stage=0 stop-stage= corpus=synthetic corpus-dir= corpus-name= csv= kaldi-dir= manifest-dir=
  train-parts= dev-parts= test-parts= unlabelled-parts= bad-audio=error channel= text-norm=upper scale=
  vocab-size= bpe-model= teacher-torchscript= teacher-tokens= nproc=1 jobs= device=auto env=
  min-confidence="
switch_options="full-libri=0 resample=0 on-the-fly-feats=0 controls=0 force=0"

# Known option nearest to $1 by edit distance, if it is near at all.
nearest_option() {
  local known
  known=$(printf '%s\n' $value_options $switch_options recipe= set= help= | sed 's/=.*//')
  awk -v typed="$1" '
    function min3(a, b, c) { return a < b ? (a < c ? a : c) : (b < c ? b : c) }
    {
      n = length(typed); m = length($1)
      for (j = 0; j <= m; j++) d[0, j] = j
      for (i = 1; i <= n; i++) {
        d[i, 0] = i
        for (j = 1; j <= m; j++)
          d[i, j] = min3(d[i-1, j] + 1, d[i, j-1] + 1, d[i-1, j-1] + (substr(typed, i, 1) != substr($1, j, 1)))
      }
      if (best == "" || d[n, m] < least) { best = $1; least = d[n, m] }
    }
    END { if (least <= 3) print best }' <<<"$known"
}

# Sets a variable per option, and the array set_args from every --set.
parse_options() {
  local item name value given=" "
  set_args=()
  for item in $value_options $switch_options; do
    name=${item%%=*}
    printf -v "${name//-/_}" '%s' "${item#*=}"
  done
  while [ $# -gt 0 ]; do
    case $1 in
      -h | --help) exec "$root/run.sh" --help ;;
      --*) ;;
      *) fail "$1 is not an option; options start with --, and lists are quoted: --train-parts \"a b\"" ;;
    esac
    name=${1#--} value=""
    shift
    case $name in *=*) value=${name#*=} name=${name%%=*} ;; esac
    if [[ " $(echo $value_options) " == *" $name="* || $name = set ]]; then
      if [ -z "$value" ]; then
        [ $# -gt 0 ] && [[ $1 != --* ]] || fail "--$name needs a value; see ./run.sh --help"
        value=$1
        shift
      fi
    elif [[ " $(echo $switch_options) " == *" $name="* ]]; then
      if [ -z "$value" ]; then
        case ${1:-} in 0 | 1 | true | false) value=$1; shift ;; *) value=1 ;; esac
      fi
      case $value in
        1 | true) value=1 ;;
        0 | false) value=0 ;;
        *) fail "--$name takes 0 or 1, not $value" ;;
      esac
    else
      value=$(nearest_option "$name")
      fail "unknown option --$name${value:+; did you mean --$value?} (./run.sh --help lists them all)"
    fi
    given+="$name "
    if [ "$name" = set ]; then set_args+=(--set "$value"); else printf -v "${name//-/_}" '%s' "$value"; fi
  done
  check_options "$given"
}

# Refuses what cannot work before anything is started. $1: the names that were given.
check_options() {
  local given=$1 name sources=0 scales
  for name in stage stop_stage vocab_size nproc jobs channel; do
    [[ ${!name} =~ ^[0-9]*$ ]] || fail "--${name//_/-} must be a whole number, not ${!name}"
  done
  # The report ends a run; the export is asked for.
  stop_stage=${stop_stage:-$((stage > 6 ? stage : 6))}
  [ "$stage" -le "$stop_stage" ] || fail "--stage $stage is after --stop-stage $stop_stage: nothing to do"
  [ "$stop_stage" -le "$last_stage" ] || fail "stage $stop_stage is not there in recipe $recipe; its last is $last_stage"
  [ "$nproc" -ge 1 ] || fail "--nproc must be at least 1"
  [ "${jobs:-1}" -ge 1 ] || fail "--jobs must be at least 1"
  case $corpus in
    synthetic | mini_librispeech | librispeech) ;;
    *) fail "--corpus $corpus is not one of synthetic, mini_librispeech, librispeech; for your own data say" \
      "--corpus-dir, --manifest-dir, --csv or --kaldi-dir" ;;
  esac
  [ -z "$min_confidence" ] || [ "$recipe" = soft_hard ] || fail "--min-confidence is for recipe soft_hard, not $recipe"
  case $bad_audio in error | skip) ;; *) fail "--bad-audio takes error or skip, not $bad_audio" ;; esac
  case $text_norm in upper | none) ;; *) fail "--text-norm takes upper or none, not $text_norm" ;; esac
  case $env in "" | k2 | modern) ;; *) fail "--env $env is not one of k2, modern" ;; esac
  for name in corpus_dir csv kaldi_dir manifest_dir; do
    [ -z "${!name}" ] || sources=$((sources + 1))
  done
  [ "$sources" -le 1 ] || fail "give one of --corpus-dir, --csv, --kaldi-dir, --manifest-dir, not $sources of them"
  # Stages run in the top folder of the project, while paths are given from where the user is.
  corpus_dir=$(absolute "$corpus_dir") manifest_dir=$(absolute "$manifest_dir")
  for name in bpe_model teacher_torchscript teacher_tokens; do
    printf -v "$name" '%s' "$(absolute "${!name}")"
    [ -z "${!name}" ] || [ -f "${!name}" ] || fail "--${name//_/-} ${!name} is not there"
  done
  [ -z "$teacher_torchscript" ] || [ -n "$teacher_tokens" ] ||
    fail "--teacher-torchscript needs --teacher-tokens, the tokens.txt that the model was trained with"
  csv=$(absolute $csv) kaldi_dir=$(absolute $kaldi_dir)
  is_named_corpus=1
  if [ "$sources" = 1 ] && { [ -z "$corpus_dir" ] || [[ $given != *" corpus "* ]]; }; then
    is_named_corpus=0
    [[ $given != *" corpus "* ]] || fail "--corpus $corpus goes with no other source than --corpus-dir"
    [ -n "$corpus_name" ] || corpus_name=$(default_corpus_name)
  fi
  [ "$full_libri" = 0 ] || [ "$is_named_corpus $corpus" = "1 librispeech" ] ||
    fail "--full-libri 1 says which parts of --corpus librispeech to use; for other data name them with --train-parts"
  corpus_name=${corpus_name:-$corpus}
  [[ $corpus_name =~ ^[A-Za-z0-9_.-]+$ ]] || fail "--corpus-name $corpus_name: use letters, digits, '_', '.' and '-'"
  if [ -z "$scale" ]; then [ "$corpus_name" = synthetic ] && scale=mini || scale=small; fi
  scales=$(cd "$recipe_dir/conf" && echo *)
  [[ " $scales " == *" $scale "* ]] || fail "recipe $recipe has no scale $scale; it has: $scales"
  if [ -z "$vocab_size" ]; then
    case $scale in smoke) vocab_size=60 ;; mini) vocab_size=100 ;; *) vocab_size=500 ;; esac
  fi
}

# Absolute paths for a list of PATH or PART=PATH.
absolute() {
  local item part path out=""
  for item in "$@"; do
    path=${item#*=} part=${item%"${item#*=}"}
    case $path in "" | /*) ;; *) path=$PWD/$path ;; esac
    out+="${out:+ }$part$path"
  done
  echo "$out"
}

# The folder's name for people's own data: /speech/my-corpus -> my-corpus, train=/speech/cars/train.csv -> cars.
default_corpus_name() {
  local path=${corpus_dir:-${manifest_dir:-}} name
  if [ -z "$path" ]; then
    path=${csv:-$kaldi_dir}
    path=${path%% *}
    path=$(dirname "${path#*=}")
  fi
  name=$(basename "$(cd "$path" 2>/dev/null && pwd || echo "$path")")
  name=$(tr -c 'A-Za-z0-9_.\n-' '_' <<<"$name")
  echo "${name:-own}"
}

# --- Environment and places ----------------------------------------------------------------------------------------

activate_environment() {
  local venv had_stamp=0
  if [ -z "$env" ] && [ -s "$root/.venv-default" ]; then env=$(cat "$root/.venv-default"); fi
  if [ -z "$env" ]; then
    "$root/tools/setup.sh" || fail "there is no usable environment; see above, and ask: python3 tools/check_env.py"
    env=$(cat "$root/.venv-default")
  fi
  venv=$root/.venv
  [ "$env" = k2 ] || venv=$root/.venv-$env
  [ ! -s "$venv/.setup-stamp" ] || had_stamp=1
  "$root/tools/setup.sh" --env "$env" || { [ "$had_stamp" = 1 ] && log "going on with $venv as it is"; } ||
    fail "there is no usable environment; see above, and ask: python3 tools/check_env.py"
  export PATH=$venv/bin:$PATH VIRTUAL_ENV=$venv PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
  unset PYTHONHOME
  set_threads
  # torch 1.13.1's MKL takes its slow path on AMD without this.
  if grep -q AuthenticAMD /proc/cpuinfo 2>/dev/null; then export MKL_DEBUG_CPU_TYPE=5; fi
}

# Models of minutes have operations so small that two threads are hardly faster than one, and two processes are.
set_threads() {
  cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
  threads_are_given=$([ -n "${OMP_NUM_THREADS:-}" ] && echo 1 || echo 0)
  share_cores "$nproc"
  if [ -z "$jobs" ]; then
    case $scale in smoke | mini) jobs=$((cores / nproc > 1 ? 2 : 1)) ;; *) jobs=1 ;; esac
  fi
}

# Threads of each of $1 processes, unless the user has said how many.
share_cores() {
  [ "$threads_are_given" = 1 ] || export OMP_NUM_THREADS=$((cores / $1 > 0 ? cores / $1 : 1))
}

# data_dir: data/<data id>. The id is the corpus's name; the synthetic corpus has other speech at scale smoke, so there
# it is synthetic-smoke. exp_root: exp/<corpus>-<scale>.
prepare_paths() {
  local data_id=$corpus_name
  if [ "$data_id" = synthetic ] && [ "$scale" = smoke ]; then data_id=synthetic-smoke; fi
  cd "$root"
  data_dir=${egs_dir#"$root"/}/data/$data_id
  exp_root=${recipe_dir#"$root"/}/exp/$corpus_name-$scale
  conf_dir=${recipe_dir#"$root"/}/conf/$scale
  manifests_dir=$data_dir/manifests
  fbank_dir=$data_dir/fbank
  lang_dir=$data_dir/lang_bpe_$vocab_size
  mkdir -p "$data_dir" "$exp_root/log"
  log "recipe $recipe, corpus $corpus_name, scale $scale, environment $env: data in $data_dir, models in $exp_root"
}

# Fills `sets` with the --set options that concern phase $1: those without a phase, and its own, PHASE:KEY=VALUE.
select_sets() {
  local item
  sets=()
  for item in ${set_args[@]+"${set_args[@]}"}; do
    case ${item%%=*} in
      --set) ;;
      "$1":*) sets+=(--set "${item#*:}") ;;
      *:*) ;;
      *) sets+=(--set "$item") ;;
    esac
  done
}

# Reads the configurations of the phases $@ into config_values, so that a misspelt --set is an error before the first
# stage. One process for all of them, because starting one takes a while.
read_configs() {
  local phase item sets words=() text key value
  for item in ${set_args[@]+"${set_args[@]}"}; do
    case ${item%%=*} in *:*) [[ " $* " == *" ${item%%:*} "* ]] || fail "--set $item: no such phase; there are: $*" ;; esac
  done
  for phase in "$@"; do
    select_sets "$phase"
    words+=("$phase" "${#sets[@]}" ${sets[@]+"${sets[@]}"})
  done
  text=$(python - "$conf_dir" "${words[@]}" <<'PY'
import sys
from pathlib import Path
from transducer_kd.config import load_config, to_dict
from transducer_kd.log import run_main, setup_logging

def show(name, value):
    if isinstance(value, dict):
        for key in value:
            show(f"{name}.{key}", value[key])
    else:
        print(name, " ".join(str(value).split("\n")), sep="\t")

def main():
    words = iter(sys.argv[2:])
    for phase in words:
        sets = [next(words) for _ in range(int(next(words)))]
        show(phase, to_dict(load_config(Path(sys.argv[1], f"{phase}.yaml"), sets[1::2])))

setup_logging()
run_main(main)
PY
  )
  while IFS=$'\t' read -r key value; do config_values[$key]=$value; done <<<"$text"
}

# A value of a phase's configuration after the --set options: config_value teacher model.encoder.chunk_size
config_value() { echo "${config_values[$1.$2]}"; }

# Parts of the corpus for train, dev, test or unlabelled, as stage 0 found them.
parts_of() {
  [ -s "$manifests_dir/parts.json" ] || fail "$manifests_dir/parts.json is missing; run stage 0 first"
  python -c "import json, sys; print(*json.load(open(sys.argv[1]))[sys.argv[2]])" "$manifests_dir/parts.json" "$1"
}

# What every recipe does once it has said what it is.
start_recipe() {
  activate_environment
  prepare_paths
  read_configs $phases
}

source "$egs_dir/runner.sh"
source "$egs_dir/stages.sh"
