#!/usr/bin/env bash
# Two-pass end-to-end ASR compression (Dawalatabad et al., ASRU 2021): a streaming RNN-T and a LAS second pass, made
# small in three stages of distillation. Stage 2: the teacher's transducer, then its LAS. Stage 3: the student's
# transducer learns from the teacher's lattice. Stage 4: the student's LAS learns from the teacher's, all else frozen.
# Stage 5: both passes of the student together. Stage 6: every phase decoded, rescored and reported. Stage 7: teacher
# and student exported. --controls 1: stages 3 to 5 once more without a teacher, for the same updates, and stage 5 of
# the distilled student without the teacher.
#
#   ./run.sh --stage 0 --stop-stage 6 [options]      from the top of the repository; ./run.sh --help lists the options
recipe=two_pass
recipe_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
last_stage=7
source "$recipe_dir/../common.sh"

first_pass=fast_beam_search_nbest
methods=greedy_search,modified_beam_search,fast_beam_search,$first_pass,${first_pass}_oracle
parse_options "$@"

# Trained phases, in order: each is conf/<scale>/<phase>.yaml and exp/<corpus>-<scale>/<phase>/.
phases="teacher teacher_las student student_las finetune"
# Somebody else's teacher has no LAS: the student's learns from the labels alone.
if [ -n "$teacher_torchscript" ]; then
  phases="student student_las finetune"
  foreign=(student_las:teacher.kind=none student_las:two_pass.las_kd_weight=0 finetune:two_pass.las_kd_weight=0)
  for phase in student finetune; do
    foreign+=("$phase:teacher.kind=torchscript" "$phase:teacher.torchscript=$teacher_torchscript")
    foreign+=("$phase:teacher.tokens=$teacher_tokens")
  done
  for item in "${foreign[@]}" ${set_args[@]+"${set_args[@]}"}; do
    if [ "$item" != --set ]; then all_sets+=(--set "$item"); fi
  done
  set_args=("${all_sets[@]}")
fi
if [ "$controls" = 1 ]; then phases+=" student_control student_las_control finetune_control finetune_nokd"; fi
# Whose weights a phase begins with, and who teaches it.
begins_with=([teacher_las]=teacher [student_las]=student [finetune]=student_las
  [student_las_control]=student_control [finetune_control]=student_las_control [finetune_nokd]=student_las)
learns_from=([student]=teacher [student_las]=teacher_las [finetune]=teacher_las)
exported="teacher_las finetune"

start_recipe
data_stages
if [ "$stop_stage" -ge 2 ]; then tune_part >/dev/null; fi
train_stage 2 teacher teacher_las
train_stage 3 student student_control
train_stage 4 student_las student_las_control
train_stage 5 finetune finetune_control finetune_nokd
last_stages
