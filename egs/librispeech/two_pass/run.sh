#!/usr/bin/env bash
# Two-pass end-to-end ASR compression (Dawalatabad et al., ASRU 2021): an RNN-T with a LAS second pass, made small in
# three stages of distillation. Stage 2: the teacher's transducer, then its LAS. Stage 3: the student's transducer learns
# from the teacher's lattice. Stage 4: the student's LAS learns from the teacher's, all else frozen. Stage 5: both passes
# of the student together. Stage 6: every phase decoded, rescored and reported. --controls 1: stages 3 to 5 once more
# without a teacher, for the same updates.
#
#   ./run.sh --stage 0 --stop-stage 6 [options]      from the top of the repository; ./run.sh --help lists the options
recipe=two_pass
recipe_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
last_stage=6
source "$recipe_dir/../common.sh"

first_pass=fast_beam_search_nbest
methods=greedy_search,modified_beam_search,fast_beam_search,$first_pass,${first_pass}_oracle
parse_options "$@"

# Trained phases, in order: each is conf/<scale>/<phase>.yaml and exp/<corpus>-<scale>/<phase>/.
phases="teacher teacher_las student student_las finetune"
if [ "$controls" = 1 ]; then phases+=" student_control student_las_control finetune_control"; fi
# Whose weights a phase begins with, and who teaches it.
declare -A begins_with=([teacher_las]=teacher [student_las]=student [finetune]=student_las
  [student_las_control]=student_control [finetune_control]=student_las_control)
declare -A learns_from=([student]=teacher [student_las]=teacher_las [finetune]=teacher_las)

activate_environment
prepare_paths
check_configs $phases

# $1: phase
train() {
  local from=${begins_with[$1]:-} teacher=${learns_from[$1]:-} args=()
  if [ -n "$from" ]; then
    require_trained "$from"
    args+=(--set "init.exp_dir=$exp_root/$from")
  fi
  # Somebody else's teacher, --set PHASE:teacher.kind=torchscript, has no folder here.
  if [ -n "$teacher" ] && [ "$(config_value "$1" teacher.kind)" = exp_dir ]; then
    require_trained "$teacher"
    args+=(--set "teacher.exp_dir=$exp_root/$teacher")
  fi
  train_phase "$1" ${args[@]+"${args[@]}"}
}

# run_stage for the phases $2... of stage $1, those of them that were asked for.
train_stage() {
  local number=$1 phase
  shift
  for phase in "$@"; do
    [[ " $phases " == *" $phase "* ]] || continue
    run_stage "$number" "$phase" "$exp_root/$phase/.done" \
      "$(phase_fingerprint "$phase" ${begins_with[$phase]:-} ${learns_from[$phase]:-})" train "$phase"
  done
}

# $1: phase
decode_methods() {
  local more=""
  if [ "$(config_value "$1" model.las.enabled)" = True ]; then more=,${first_pass}_las_rescore; fi
  echo "$methods$more"
}

run_stage 0 "corpus and manifests" "$manifests_dir/.done" "$(data_fingerprint)" stage_data
run_stage 1 "features and BPE" "$fbank_dir/.done-$vocab_size" "$(feature_fingerprint teacher)" stage_features teacher
train_stage 2 teacher teacher_las
train_stage 3 student student_control
train_stage 4 student_las student_las_control
train_stage 5 finetune finetune_control

# Whatever is trained is decoded, also when later stages have not run.
for phase in $phases; do
  if [ "$stop_stage" -lt 6 ] || [ ! -e "$exp_root/$phase/.done" ]; then continue; fi
  these=$(decode_methods "$phase")
  run_stage 6 "decode $phase" "$exp_root/$phase/.done-decode" "$(decode_fingerprint "$phase" "$these")" \
    decode_phase "$phase" "$these"
done
run_stage 6 "report" "" "" stage_report
