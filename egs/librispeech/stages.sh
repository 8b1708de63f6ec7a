# What the recipes share, third part: the stages, and what each depends on. Sourced by common.sh, which says what a recipe
# has to set.

# --- What a stage depends on ---------------------------------------------------------------------------------------

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
# $1: phase. Trained anew, what it depends on makes it begin anew: dependencies belong to a training's fingerprint, too.
phase_fingerprint() {
  feature_fingerprint "$1"
  # Of this phase's settings only, without comments: a new phase beside it is no reason to train this one again.
  local base sets file
  select_sets "$1"
  base=$(sed -n 's/^base: *//p' "$conf_dir/$1.yaml")
  echo "phase=$1 set=${sets[*]-}" \
    "config=$(cat "$conf_dir/$1.yaml" ${base:+"$conf_dir/$base"} | sed 's/ *#.*//; /^$/d' | cksum)"
  file=$(config_value "$1" teacher.torchscript)
  [ -z "$file" ] || echo "$file $(cksum <"$file")"
}
# The phase that phase $1 learns from; nothing for a teacher that the user names with --set.
teacher_of() {
  if [ "$(config_value "$1" teacher.kind)" = exp_dir ] && [ -z "$(config_value "$1" teacher.exp_dir)" ]; then
    echo "${learns_from[$1]:-}"
  fi
}
# The phases that phase $1 begins with and learns from, which may be one.
parents() {
  local begin=${begins_with[$1]:-} teacher
  teacher=$(teacher_of "$1")
  if [ "$teacher" = "$begin" ]; then teacher=""; fi
  echo "$begin $teacher"
}
# A line for each of phase $1's parents and for whatever else the recipe says that it was made from.
dependencies() {
  local other
  for other in $(parents "$1"); do
    echo "$other $(training_ended "$other")"
  done
  if declare -F phase_inputs >/dev/null; then phase_inputs "$1"; fi
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
# Whether phase $1 is trained, and what it was made from is still what is there now, back to the first.
is_current() {
  local lines line other
  [ -e "$exp_root/$1/.done" ] || return 1
  for other in $(parents "$1"); do
    is_current "$other" || return 1
  done
  lines=$(dependencies "$1")
  while read -r line; do
    [ -z "$line" ] || grep -qxF "$line" "$exp_root/$1/.done" || return 1
  done <<<"$lines"
}

# --- Stages 0 and 1, the same in every recipe ----------------------------------------------------------------------

data_stages() {
  local first=${phases%% *}
  run_stage 0 "corpus and manifests" "$manifests_dir/.done" "$(data_fingerprint)" stage_data
  run_stage 1 "features and BPE" "$fbank_dir/.done-$vocab_size" "$(feature_fingerprint "$first")" \
    stage_features "$first"
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

# --- Stages 2 to 5: training ---------------------------------------------------------------------------------------

# Trains phase $1 from what it begins with and learns from.
train() {
  local phase=$1 parent begin=${begins_with[$1]:-} teacher arguments=()
  for parent in $(parents "$phase"); do require_trained "$parent"; done
  teacher=$(teacher_of "$phase")
  [ -z "$begin" ] || arguments+=(--set "init.exp_dir=$exp_root/$begin")
  [ -z "$teacher" ] || arguments+=(--set "teacher.exp_dir=$exp_root/$teacher")
  if declare -F phase_arguments >/dev/null; then phase_arguments "$phase"; fi
  if [ "${#arguments[@]}" = 0 ] && [ "$force" = 0 ]; then add_reusable "$phase"; fi
  train_phase "$phase" ${arguments[@]+"${arguments[@]}"}
}

# A teacher that another recipe has trained alike need not be trained again: train.py is told of every phase of the same
# name, corpus and scale whose data were made with the same options, and compares the configurations itself.
add_reusable() {
  local folder made_with
  [ "$(config_value "$1" teacher.kind)$(config_value "$1" init.exp_dir)" = none ] || return 0
  made_with=$(feature_fingerprint "$1")
  while read -r folder; do
    arguments+=(--reuse "$folder")
  done < <(made_elsewhere "$1" .done "$made_with")
}
# The folders of phases $1, a name or *, of other recipes, of this corpus and scale, whose mark $2 begins with the lines $3.
made_elsewhere() {
  local mark
  for mark in "${egs_dir#"$root"/}"/*/exp/"$corpus_name-$scale"/$1/"$2"; do
    [ -e "$mark" ] && [[ $mark != "$exp_root/"* && $(cat "$mark") == "$3"$'\n'* ]] || continue
    echo "${mark%/*}"
  done
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

# --- Stages 6 and 7 of most recipes --------------------------------------------------------------------------------

last_stages() {
  train_queued
  if is_asked 6; then decode_stage; fi
  run_stage 6 "report" "" "" stage_report
  export_stage
}

# --- Stage 6: decoding and report ----------------------------------------------------------------------------------

# Decodes what is trained, also when later stages have not run.
decode_stage() {
  local phase these done=0
  for phase in $phases; do
    [ "$(config_value "$phase" objective)" != wav2vec2 ] || continue # knows no text
    if ! is_current "$phase"; then
      [ ! -e "$exp_root/$phase/.done" ] ||
        log "Stage 6: $phase began with or learnt from what was made anew since: run its stage; not decoded"
      continue
    fi
    these=$methods
    if [ "$(config_value "$phase" model.las.enabled)" = True ]; then these+=,${first_pass}_las_rescore; fi
    these=$(possible_methods "$these" "$phase")
    run_stage 6 "decode $phase" "$exp_root/$phase/.done-decode" "$(decode_fingerprint "$phase" "$these")" \
      decode_phase "$phase" "$these"
    done=1
  done
  [ "$done" = 1 ] || fail "$exp_root holds no trained phase; run stage 2 first"
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

# Decodes the test parts with a phase, one of two modes in both. $1: phase; $2: methods, commas between them.
decode_phase() {
  local test tune args=()
  test=$(parts_of test)
  [ -n "$test" ] || fail "the corpus has no test part; name one with --test-parts and run stage 0 again"
  if [[ $2 == *_las_rescore* ]]; then
    tune=$(tune_part)
    args+=(--tune-part "$tune")
  fi
  args+=(--exp-dir "$exp_root/$1" --use-averaged-model --test-parts "${test// /,}" --device "$device")
  run python local/decode.py "${args[@]}" --decoding-method "$2"
  [ "$(config_value "$1" objective)" = dual_mode ] || return 0
  run python local/decode.py "${args[@]}" --decoding-method "${2%,streaming_greedy_search}" --chunk-size 0
}

# --- Stage 7: for the device ---------------------------------------------------------------------------------------

# Exports those of the phases `exported` that are trained, each through its gate, measures them beside each other and
# makes the report again. One whose gate is not passed fails the stage, but only when all else is done.
export_stage() {
  is_asked 7 || return 0
  local phase folder failed="" folders=() others=() made_from=""
  for phase in $exported; do
    [[ " $phases " == *" $phase "* ]] || continue
    if ! is_current "$phase"; then
      log "Stage 7: $phase is not trained, or was made from what was made anew since: not exported"
      continue
    fi
    # A folder that was written by hand may lack its gate, or its measurements.
    [ -e "$exp_root/$phase/export/gate.json" ] || rm -f "$exp_root/$phase/.done-export"
    # In a process of its own, so that its end is not the recipe's.
    export_beside "$phase" &
    running[$!]=$phase
    wait $! || failed+="${failed:+, }$phase"
    running=()
    [ -e "$exp_root/$phase/export/model.json" ] || continue
    [ -e "$exp_root/$phase/export/bench.json" ] || rm -f "$exp_root/.done-bench"
    folders+=("$exp_root/$phase/export")
    made_from+="$phase $(cksum <"$exp_root/$phase/export/model.json")"$'\n'
  done
  if [ "${#folders[@]}" -gt 0 ]; then
    mapfile -t others < <(exported_elsewhere)
    for folder in ${others[@]+"${others[@]}"}; do made_from+="$folder $(cksum <"$folder/model.json")"$'\n'; done
    [ "${#others[@]}" = 0 ] || [ -e "$exp_root/beside.json" ] || rm -f "$exp_root/.done-bench"
    run_stage 7 "bench" "$exp_root/.done-bench" "$(echo "$made_from")" bench_exported "${folders[@]}"
    run_stage 7 "report" "" "" stage_report
  elif [ -z "$failed" ]; then
    fail "there is nothing to export in $exp_root; run the stages before first"
  fi
  [ -z "$failed" ] || fail "stage 7: the export of $failed failed, or did not pass its gate; see above"
}
export_beside() {
  trap on_exit EXIT
  trap on_signal INT TERM HUP
  running=() current_stage=""
  run_stage 7 "export $1" "$exp_root/$1/.done-export" "$(phase_fingerprint "$1"; training_ended "$1")" export_phase "$1"
}
export_phase() {
  local test dev
  test=$(parts_of test) dev=$(tune_part)
  run python local/export.py --exp-dir "$exp_root/$1" --use-averaged-model --test-parts "${test// /,}" --dev-part "$dev"
}
# The model folders of other recipes' phases, of this corpus and scale, that passed their gates and were not trained anew
# since: they are measured in the same run. What such a phase was made from is that recipe's business.
exported_elsewhere() {
  local phase made_with
  made_with=$(data_fingerprint)
  while read -r phase; do
    case $phase in *.old-*) continue ;; esac # set aside by train.py
    [ -e "$phase/.done" ] && [ -e "$phase/export/model.json" ] || continue
    [[ $(cat "$phase/.done-export") == *$'\n'"$(sed -n '$p' "$phase/.done")"$'\n'* ]] || continue
    echo "$phase/export"
  done < <(made_elsewhere "*" .done-export "$made_with")
}
# Measures the model folders $@ and, beside them, the `others` of export_stage. What a smoke run measures is no result: a
# few turns do.
bench_exported() {
  local test args=()
  test=$(parts_of test)
  if [ "${#others[@]}" -gt 0 ]; then
    log "Stage 7: measured beside models of other recipes: ${others[*]}"
    args+=(--beside "${others[@]}" --beside-json "$exp_root/beside.json")
  else
    rm -f "$exp_root/beside.json"
  fi
  [ "$scale" != smoke ] || args+=(--turns 2 --audio-s 5 --stream-s 120 --streams 1)
  run python local/bench_export.py --export-dir "$@" --test-parts "${test// /,}" ${args[@]+"${args[@]}"}
}

# Makes the report of everything in exp_root and prints the results table. What a smoke run scores is no result.
stage_report() {
  local args=(--exp-dir "$exp_root")
  [ "$scale" != smoke ] || args+=(--results "$exp_root/RESULTS.md")
  run python local/report.py "${args[@]}"
}
