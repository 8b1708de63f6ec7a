#!/usr/bin/env bash
# Comparison of soft and hard target RNN-T distillation (Hwang et al., ICASSP 2023) and noisy student training. Stage 2:
# an offline teacher and a small streaming student, on labelled speech. Stage 3: the teacher labels the unlabelled part,
# once for all arms. Stage 4: the arms, {hard, soft, both} for the streaming student and for one that begins with the
# teacher's weights (self), each beside the same student trained on labelled speech alone, for the same updates; the
# streaming one with several values of frame_shift. Stage 5: a second generation, labelled by the first. Stage 6: every
# phase decoded, its emission delay measured, the report. Stage 7: the teacher and two students exported.
#
#   ./run.sh --recipe soft_hard --stage 0 --stop-stage 6 [options]        ./run.sh --help lists the options
recipe=soft_hard
recipe_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
last_stage=7
source "$recipe_dir/../common.sh"

methods=greedy_search,modified_beam_search
parse_options "$@"
[ -z "$teacher_torchscript" ] || fail "recipe soft_hard trains the teacher itself, because some of its students" \
  "begin with its weights: leave --teacher-torchscript out"

streaming="supervised_streaming hard_streaming soft_streaming softhard_streaming"
shifts="soft_streaming_shift0 soft_streaming_shift4"
self="supervised_self hard_self soft_self softhard_self"
phases="teacher base_streaming $streaming $shifts $self hard_self2 soft_self2"
exported="teacher softhard_streaming hard_streaming"
# Who labels the speech that a phase learns from; with soft targets it is the teacher as well.
declare -A labelled_by=([hard_self2]=hard_self [soft_self2]=soft_self)
for phase in $phases; do
  case $phase in
    teacher | base_* | supervised_*) ;;
    *) labelled_by[$phase]=${labelled_by[$phase]:-teacher} ;;
  esac
  case $phase in soft*) learns_from[$phase]=${labelled_by[$phase]} ;; esac
  case $phase in
    base_*) ;;
    *_self*) begins_with[$phase]=teacher ;;
    *_streaming*) begins_with[$phase]=base_streaming ;;
  esac
done

# What is dropped of the labels: local/pseudo_label.py --help. At scale smoke no hypothesis is worth anything.
filters=(--min-confidence "${min_confidence:-0.9}")
[ "$scale" != smoke ] || filters=(--min-confidence 0 --min-token-rate 0 --max-token-rate 2 --max-repeats 1000)

# When the labels of phase $1 were complete; nothing where they are not, or not of what the phase is now.
labels_ended() {
  local mark=$exp_root/labels/$1/.done
  if [ -e "$mark" ] && is_current "$1" && grep -qxF "$(training_ended "$1")" "$mark"; then sed -n '$p' "$mark"; fi
}
# Hooks of the shared stages: a phase is trained on a set of labels, and anew when that was made anew.
phase_inputs() {
  local who=${labelled_by[$1]:-}
  [ -z "$who" ] || echo "labels of $who: $(labels_ended "$who")"
}
phase_arguments() {
  local who=${labelled_by[$1]:-}
  [ -z "$who" ] || arguments+=(--set "data.pseudo_labels=$exp_root/labels/$who")
}

# $1: stage, $2: the phase that labels the unlabelled parts, $3: how its soft targets are stored
label_stage() {
  local dir=$exp_root/labels/$2
  is_asked "$1" || return 0
  is_current "$2" || fail "$2 is not trained, or was made from what was made anew since: run its stage first"
  run_stage "$1" "labels of $2" "$dir/.done" "$(phase_fingerprint "$2"; training_ended "$2"; echo "$3 ${filters[*]}")" \
    label "$2" "$dir" "$3"
}
label() {
  # Labels of other weights or with other options are of no use here, but nothing is deleted.
  if [ "$redo" = 1 ] && [ -d "$2" ]; then mv "$2" "$2.old-$(date +%Y%m%d-%H%M%S)"; fi
  local launcher=(python)
  [ "$nproc" = 1 ] || launcher=(python -m torch.distributed.run --standalone --nproc_per_node "$nproc")
  run "${launcher[@]}" local/pseudo_label.py --exp-dir "$exp_root/$1" --use-averaged-model --parts "${unlabelled// /,}" \
    --output-dir "$2" --soft "$3" --device "$device" "${filters[@]}"
}

# How much later than the teacher each phase emits: one program for all.
delay_stage() {
  local phase test made_from="" folders=()
  test=$(parts_of test)
  for phase in ${phases#teacher }; do
    if ! is_current "$phase" || ! is_current teacher; then continue; fi
    folders+=("$exp_root/$phase")
    made_from+="$phase $(training_ended "$phase")"$'\n'
  done
  [ "${#folders[@]}" -gt 0 ] || return 0
  run_stage 6 "emission delays" "$exp_root/.done-delays" \
    "$(phase_fingerprint teacher; training_ended teacher; echo "$made_from")" \
    run python local/emission_delay.py --exp-dir "${folders[@]}" --reference-exp-dir "$exp_root/teacher" \
    --use-averaged-model --test-parts "${test// /,}" --device "$device"
}

start_recipe
data_stages
if [ "$stop_stage" -ge 3 ]; then
  unlabelled=$(parts_of unlabelled)
  [ -n "$unlabelled" ] || fail "the corpus has no unlabelled part, which the teacher could label; name one with" \
    "--unlabelled-parts and run stages 0 and 1 again: --corpus librispeech --unlabelled-parts train-clean-360"
fi
train_stage 2 teacher base_streaming
train_queued
label_stage 3 teacher float16
if is_asked 4 && [ -z "$(labels_ended teacher)" ]; then
  fail "the teacher's labels are not complete, or it was trained anew since: run stage 3 first"
fi
train_stage 4 $streaming $shifts $self
train_queued
label_stage 5 hard_self none
label_stage 5 soft_self float16
train_stage 5 hard_self2 soft_self2
train_queued
if is_asked 6; then
  decode_stage
  delay_stage
fi
run_stage 6 "report" "" "" stage_report
export_stage
