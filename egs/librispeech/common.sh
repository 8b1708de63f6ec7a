# What the recipes share: log(), options, the stage runner and the environment. Sourced by <recipe>/run.sh, which has
# set `recipe` and `recipe_dir` and calls parse_options, activate_environment, prepare_paths and its stages.
set -euo pipefail

egs_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$egs_dir/../.." && pwd)

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
  vocab-size= bpe-model= teacher-torchscript= teacher-tokens= nproc=1 device=auto env="
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
  for name in stage stop_stage vocab_size nproc channel; do
    [[ ${!name} =~ ^[0-9]*$ ]] || fail "--${name//_/-} must be a whole number, not ${!name}"
  done
  stop_stage=${stop_stage:-$((stage > last_stage ? stage : last_stage))}
  [ "$stage" -le "$stop_stage" ] || fail "--stage $stage is after --stop-stage $stop_stage: nothing to do"
  [ "$stop_stage" -le "$last_stage" ] || fail "stage $stop_stage is not there in recipe $recipe; its last is $last_stage"
  [ "$nproc" -ge 1 ] || fail "--nproc must be at least 1"
  case $corpus in
    synthetic | mini_librispeech | librispeech) ;;
    *) fail "--corpus $corpus is not one of synthetic, mini_librispeech, librispeech; for your own data say" \
      "--corpus-dir, --manifest-dir, --csv or --kaldi-dir" ;;
  esac
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
  local cores
  cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores / nproc > 0 ? cores / nproc : 1))}
  # torch 1.13.1's MKL takes its slow path on AMD without this.
  if grep -q AuthenticAMD /proc/cpuinfo 2>/dev/null; then export MKL_DEBUG_CPU_TYPE=5; fi
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

# Reads every phase's configuration, so that a misspelt --set is an error before the first stage. $@: phases
check_configs() {
  local phase item
  for item in ${set_args[@]+"${set_args[@]}"}; do
    case ${item%%=*} in *:*) [[ " $* " == *" ${item%%:*} "* ]] || fail "--set $item: no such phase; there are: $*" ;; esac
  done
  for phase in "$@"; do
    config_value "$phase" phase >/dev/null
  done
}

# Parts of the corpus for train, dev, test or unlabelled, as stage 0 found them.
parts_of() {
  [ -s "$manifests_dir/parts.json" ] || fail "$manifests_dir/parts.json is missing; run stage 0 first"
  python -c "import json, sys; print(*json.load(open(sys.argv[1]))[sys.argv[2]])" "$manifests_dir/parts.json" "$1"
}

# A value of a phase's configuration after the --set options: config_value teacher model.encoder.chunk_size
config_value() {
  local sets
  select_sets "$1"
  python - "$conf_dir/$1.yaml" "$2" ${sets[@]+"${sets[@]}"} <<'PY'
import functools, sys
from pathlib import Path
from transducer_kd.config import load_config
from transducer_kd.log import run_main, setup_logging
setup_logging()
path, key, *sets = sys.argv[1:]
run_main(lambda: print(functools.reduce(getattr, key.split("."), load_config(Path(path), sets[1::2]))))
PY
}

# --- Stages --------------------------------------------------------------------------------------------------------

current_stage="" current_name="" stage_log="" child=""

# run_stage NUMBER NAME MARK FINGERPRINT FUNCTION [ARGUMENT...]
# Calls FUNCTION unless MARK says that it ended well with this FINGERPRINT, which holds every option that matters. With
# another fingerprint the stage runs again, and FUNCTION finds redo=1, as with --force: earlier output is no use then.
# Without a MARK the stage always runs.
run_stage() {
  local mark=$3 start
  if [ "$1" -lt "$stage" ] || [ "$1" -gt "$stop_stage" ]; then return 0; fi
  redo=$force
  if [ -n "$mark" ] && [ -e "$mark" ]; then
    if [ "$(sed '$d' "$mark")" != "$4" ]; then
      log "Stage $1: $2: its options changed, so it runs again"
      redo=1
    elif [ "$force" = 0 ]; then
      log "Stage $1: $2: done already (--force runs it again)"
      return 0
    fi
  fi
  rm -f ${mark:+"$mark"}
  current_stage=$1 current_name=$2 stage_log=""
  start=$(date +%s.%N)
  # On a terminal the output stays there, because tqdm's bars need one; elsewhere it goes to a log file as well.
  if [ ! -t 2 ]; then
    stage_log=$exp_root/log/stage-$1-${2// /-}.log
    exec 3>&1 4>&2 > >(trap '' INT TERM HUP; exec tee "$stage_log") 2>&1
    tee_pid=$!
  fi
  log "Stage $1: $2"
  "${@:5}"
  log "Stage $1: done in $(elapsed_since "$start") s"
  end_stage_log
  if [ -n "$mark" ]; then
    printf '%s\nended %s\n' "$4" "$(date +%s.%N)" >"$mark.tmp"
    mv "$mark.tmp" "$mark"
  fi
  printf '{"stage": %d, "name": "%s", "seconds": %s}\n' "$1" "$2" "$(elapsed_since "$start")" >>"$exp_root/stages.jsonl"
  current_stage=""
}

elapsed_since() { awk -v a="$1" -v b="$(date +%s.%N)" 'BEGIN { printf "%.1f", b - a }'; }

# Gives the output back to where it went before the stage, and waits until tee has written all of it.
end_stage_log() {
  [ -n "$stage_log" ] || return 0
  exec >&3 2>&4 3>&- 4>&-
  wait "$tee_pid" || true
}

# Runs a program of the stage, shown first. In the background with wait, because bash handles a signal only after a
# foreground program has ended: a SIGTERM or Ctrl-C should reach the program, which then saves what it has.
run() {
  local status=0 shown="+" word
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./=:,+-]+$ ]] || word="'$word'"
    shown+=" $word"
  done
  echo "$shown" >&2
  "$@" </dev/null &
  child=$!
  wait "$child" || status=$?
  child=""
  return "$status"
}

# The second Ctrl-C does not wait. Worker processes that outlive the program they belong to are ended too.
on_signal() {
  local workers
  trap '' TERM HUP
  trap 'kill -KILL "$child" 2>/dev/null; exit 137' INT
  if [ -n "$child" ]; then
    workers=$(pgrep -P "$child" 2>/dev/null || true)
    kill -TERM "$child" 2>/dev/null || true
    wait "$child" || true
    [ -z "$workers" ] || kill -TERM $workers 2>/dev/null || true
  fi
  exit 143
}

on_exit() {
  local status=$?
  trap - EXIT
  [ "$status" -ne 0 ] && [ -n "$current_stage" ] || exit "$status"
  end_stage_log
  local what="failed"
  case $status in 130 | 143) what="was stopped" ;; esac
  local next="The same command goes on from here; --force starts the stage anew."
  [ "$force" = 0 ] || next="The same command without --force goes on from here; with it the stage starts anew."
  echo "$(date '+%Y-%m-%d %H:%M:%S') ERROR stage $current_stage ($current_name) $what (status $status)." \
    "${stage_log:+Its output is in $stage_log. }$next" >&2
  exit "$status"
}

trap on_exit EXIT
trap on_signal INT TERM HUP

# --- Stages 0 and 1, the same in every recipe ----------------------------------------------------------------------

# Everything that decides what a stage makes; each contains those before it.
data_fingerprint() {
  local name
  for name in corpus_name corpus is_named_corpus full_libri corpus_dir csv kaldi_dir manifest_dir train_parts dev_parts \
    test_parts unlabelled_parts bad_audio resample; do
    echo "$name=${!name}"
  done
  # Options that came later count only where they differ from their default: older marks stay good.
  [ -z "$channel" ] || echo "channel=$channel"
  [ "$text_norm" = upper ] || echo "text_norm=$text_norm"
  [ "$corpus" != synthetic ] || echo "synthetic=$([ "$scale" = smoke ] && echo smoke || echo mini)"
}
feature_fingerprint() {
  data_fingerprint
  echo "vocab_size=$vocab_size on_the_fly_feats=$on_the_fly_feats speed_perturb=$(config_value "$1" data.speed_perturb)"
  [ -z "$bpe_model" ] || echo "bpe_model=$bpe_model $(cksum <"$bpe_model")"
}
# $1: phase; then those whose weights it begins with or learns from: trained anew, they make it begin anew.
phase_fingerprint() {
  feature_fingerprint "$1"
  # Of this phase's settings only, without comments: a new phase beside it is no reason to train this one again.
  local base sets other file
  select_sets "$1"
  base=$(sed -n 's/^base: *//p' "$conf_dir/$1.yaml")
  echo "phase=$1 set=${sets[*]-}" \
    "config=$(cat "$conf_dir/$1.yaml" ${base:+"$conf_dir/$base"} | sed 's/ *#.*//; /^$/d' | cksum)"
  file=$(config_value "$1" teacher.torchscript)
  [ -z "$file" ] || echo "$file $(cksum <"$file")"
  for other in "${@:2}"; do
    echo "$other $(training_ended "$other")"
  done
}
# When a phase's training ended; nothing where it has not.
training_ended() {
  if [ -e "$exp_root/$1/.done" ]; then sed -n '$p' "$exp_root/$1/.done"; fi
}
# $1: phase, $2: methods. A phase that was trained anew is decoded anew, also with the same options.
decode_fingerprint() {
  echo "methods=$2"
  phase_fingerprint "$1"
  training_ended "$1"
}
# Whether phase $1 is trained, and those it began with and learnt from, $2..., are still the ones that are there now.
is_current() {
  local parent
  [ -e "$exp_root/$1/.done" ] || return 1
  for parent in "${@:2}"; do
    grep -qxF "$parent $(training_ended "$parent")" "$exp_root/$1/.done" || return 1
  done
}

# What prepare_manifests.py is told about the parts and the checks; lists are split on purpose.
stage_data() {
  local args=(--output-dir "$manifests_dir" --bad-audio "$bad_audio" --text-norm "$text_norm") name
  for name in train_parts dev_parts test_parts unlabelled_parts csv kaldi_dir; do
    [ -z "${!name}" ] || args+=("--${name//_/-}" ${!name})
  done
  [ -z "$corpus_dir" ] || args+=(--corpus-dir "$corpus_dir")
  [ -z "$manifest_dir" ] || args+=(--manifest-dir "$manifest_dir")
  [ "$resample" = 0 ] || args+=(--resample)
  [ -z "$channel" ] || args+=(--channel "$channel")
  if [ "$is_named_corpus" = 1 ]; then
    args+=(--corpus "$corpus" --full-libri "$full_libri")
    if [ "$corpus" = synthetic ] && [ -z "$corpus_dir" ]; then
      local spoken=mini
      [ "$scale" != smoke ] || spoken=smoke
      run python local/make_synthetic_corpus.py --output-dir "$data_dir/download/LibriSpeech" --scale "$spoken"
      args+=(--corpus-dir "$data_dir/download/LibriSpeech")
    elif [ -z "$corpus_dir" ]; then
      args+=(--download-dir "$data_dir/download")
    fi
  fi
  run python local/prepare_manifests.py "${args[@]}"
}

# $1: the phase whose configuration says whether to perturb the speed
stage_features() {
  local args=(--manifests-dir "$manifests_dir" --fbank-dir "$fbank_dir" --bad-audio "$bad_audio") train
  train=$(parts_of train)
  [ -n "$train" ] || fail "the corpus has no training part; name one with --train-parts and run stage 0 again"
  if [ "$on_the_fly_feats" = 1 ]; then
    args+=(--on-the-fly-feats)
  elif [ "$(config_value "$1" data.speed_perturb)" = True ]; then
    args+=(--speed-perturb-parts $train)
  fi
  run python local/compute_fbank.py "${args[@]}"
  run python local/prepare_lang.py --manifests-dir "$manifests_dir" --parts $train --lang-dir "$lang_dir" \
    --vocab-size "$vocab_size" --text-norm "$text_norm" ${bpe_model:+--bpe-model "$bpe_model"}
}

require_trained() {
  [ -e "$exp_root/$1/.done" ] || fail "$exp_root/$1 is not trained; run its stage first (./run.sh --help)"
}

# Trains one phase: conf/<scale>/<phase>.yaml -> exp/<corpus>-<scale>/<phase>/. More arguments go to train.py, before
# the user's --set, which have the last word.
train_phase() {
  local phase=$1 dev train launcher=(python)
  shift
  train=$(parts_of train) dev=$(parts_of dev)
  [ -n "$dev" ] || fail "the corpus has no part to validate on; name one with --dev-parts and run stage 0 again"
  [ "$nproc" = 1 ] || launcher=(python -m torch.distributed.run --standalone --nproc_per_node "$nproc")
  local args=(--config "$conf_dir/$phase.yaml" --exp-dir "$exp_root/$phase" --device "$device"
    --set "corpus=$corpus_name" --set "data.fbank_dir=$fbank_dir" --set "data.lang_dir=$lang_dir"
    --set "data.train_parts=$train" --set "data.valid_part=${dev%% *}")
  [ "$on_the_fly_feats" = 0 ] || args+=(--set data.on_the_fly_feats=true)
  # A run with other options cannot be continued; train.py moves it aside, nothing is deleted.
  if [ "$redo" = 1 ] && [ -d "$exp_root/$phase" ]; then args+=(--restart); fi
  local sets
  select_sets "$phase"
  run "${launcher[@]}" local/train.py "${args[@]}" "$@" ${sets[@]+"${sets[@]}"}
}

# The part that the second pass is tuned on: the first one to validate on that is not to test on as well.
tune_part() {
  local part test
  test=" $(parts_of test) "
  for part in $(parts_of dev); do
    if [[ $test != *" $part "* ]]; then echo "$part"; return 0; fi
  done
  fail "the second pass has to be tuned on speech that it is not tested on: name a part with --dev-parts that is not" \
    "among --test-parts, and run stage 0 again"
}

# The methods $1, commas between them, that this environment and phase $2 can do.
possible_methods() {
  local methods=$1
  if [[ $methods == *fast_beam* ]] && ! python -c "import k2" >/dev/null 2>&1; then
    methods=${methods/fast_beam_search_nbest_las_rescore/modified_beam_search_las_rescore}
    methods=$(tr ',' '\n' <<<"$methods" | grep -v '^fast_beam' | paste -sd, -)
    log "no k2 in this environment: leaving out the fast_beam_search methods (python3 tools/check_env.py says more)"
  fi
  if [ "$(config_value "$2" model.encoder.chunk_size)" != 0 ]; then methods+=,streaming_greedy_search; fi
  echo "$methods"
}

# Decodes the test parts with a phase. $1: phase; $2: methods, commas between them.
decode_phase() {
  local test tune args=()
  test=$(parts_of test)
  [ -n "$test" ] || fail "the corpus has no test part; name one with --test-parts and run stage 0 again"
  if [[ $2 == *_las_rescore* ]]; then
    tune=$(tune_part)
    args+=(--tune-part "$tune")
  fi
  run python local/decode.py --exp-dir "$exp_root/$1" --use-averaged-model --decoding-method "$2" \
    --test-parts "${test// /,}" --device "$device" ${args[@]+"${args[@]}"}
}

# Makes the report of everything in exp_root and prints the results table. What a smoke run scores is no result.
stage_report() {
  local args=(--exp-dir "$exp_root")
  [ "$scale" != smoke ] || args+=(--results "$exp_root/RESULTS.md")
  run python local/report.py "${args[@]}"
}
