#!/usr/bin/env bash
# Multi-stage progressive compression (Rathod et al., Interspeech 2022): a streaming conformer transducer made small in
# steps, each student the teacher of the next. Stage 2: the teacher. Stage 3: step1, step2 and step3, each begun with
# weights that local/compress.py selects from the step before, and distilled from it. Stages 4 and 5 are controls of
# step3, of its size and with as many updates as its three steps together, and are always trained. 4: scratch, without a
# teacher; oneshot, selected and distilled from the teacher at once. 5: noinit_step1, noinit_step2 and noinit, the same
# chain of teachers from fresh weights: what selection gives. Stage 6: every phase decoded in streaming mode; report.
# Stage 7: the teacher and step3 exported.
#
#   ./run.sh --recipe progressive [options]          from the top of the repository; ./run.sh --help lists the options
recipe=progressive
recipe_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
last_stage=7
source "$recipe_dir/../common.sh"

methods=greedy_search,modified_beam_search
parse_options "$@"
[ -z "$teacher_torchscript" ] || fail "recipe progressive cuts its students out of their teacher, so it trains the" \
  "teacher itself: leave --teacher-torchscript out"

phases="teacher step1 step2 step3 scratch oneshot noinit_step1 noinit_step2 noinit"
learns_from=([step1]=teacher [step2]=step1 [step3]=step2 [oneshot]=teacher
  [noinit_step1]=teacher [noinit_step2]=noinit_step1 [noinit]=noinit_step2)
exported="teacher step3"

# The folder of the phase that the weights of $1 are selected from; nothing where they are fresh, or named by the user.
selected_from() {
  local teacher
  case $1 in step* | oneshot) ;; *) return 0 ;; esac
  [ -z "$(config_value "$1" init.exp_dir)" ] || return 0
  teacher=$(config_value "$1" teacher.exp_dir)
  echo "${teacher:-$exp_root/${learns_from[$1]}}"
}
phase_inputs() {
  local from
  from=$(selected_from "$1")
  [ -z "$from" ] || echo "selected from $from $(sed -n '$p' "$from/.done" 2>/dev/null)"
}
phase_arguments() {
  local from sets
  from=$(selected_from "$1")
  [ -n "$from" ] || return 0
  [ "$from" != "$exp_root/${from##*/}" ] || require_trained "${from##*/}"
  select_sets "$1"
  run python local/compress.py --exp-dir "$from" --config "$conf_dir/$1.yaml" --output-dir "$exp_root/init/$1" \
    --set "corpus=$corpus_name" --set "data.lang_dir=$lang_dir" ${sets[@]+"${sets[@]}"}
  arguments+=(--set "init.exp_dir=$exp_root/init/$1" --set init.use_averaged_model=false)
}

start_recipe
data_stages
train_stage 2 teacher
train_stage 3 step1 step2 step3
train_stage 4 scratch oneshot
train_stage 5 noinit_step1 noinit_step2 noinit
last_stages
