#!/usr/bin/env bash
# Dual-mode supernet with self-pruning (Liu et al., SLT 2022): one set of weights, dense and full-context offline, sparse
# when it streams, pretrained with wav2vec 2.0. Stage 2: pretrain, on all audio without its text. Stage 3: supernet,
# finetuned from it. Stage 4: supernet_scratch, the same without pretraining; and the controls: offline and streaming,
# each a dense model of one mode; prune_after, streaming pruned when it was trained; dual_dense, two modes without masks.
# Stage 5: extracted, the stand-alone sparse model of supernet. Stage 6: every phase decoded in its modes; emission
# delays; speed; report. Stage 7: the dense model of one mode, supernet and extracted exported. --controls 1: also 70 %
# sparsity, blocks instead of units, and a quarter of the labels.
#
#   ./run.sh --recipe dual_mode [options]            from the top of the repository; ./run.sh --help lists the options
recipe=dual_mode
recipe_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
last_stage=7
source "$recipe_dir/../common.sh"

methods=greedy_search,modified_beam_search
parse_options "$@"
[ -z "$teacher_torchscript" ] || fail "recipe dual_mode has no teacher: leave --teacher-torchscript out"

# The first one says how stage 1 makes the features.
phases="offline streaming dual_dense pretrain supernet supernet_scratch prune_after extracted"
begins_with=([supernet]=pretrain [prune_after]=streaming [extracted]=supernet)
exported="streaming supernet extracted"
more=""
if [ "$controls" = 1 ]; then
  more="supernet_s70 prune_after_s70 supernet_block prune_after_block supernet_block_s70 prune_after_block_s70"
  more+=" supernet_quarter supernet_scratch_quarter"
  phases+=" $more"
  for phase in $more; do
    case $phase in
      supernet_scratch_*) ;;
      supernet_*) begins_with[$phase]=pretrain ;;
      prune_after_*) begins_with[$phase]=streaming ;;
    esac
  done
fi

# Pretraining hears all there is.
phase_arguments() {
  [ "$1" = pretrain ] || return 0
  arguments+=(--set "data.train_parts=$(parts_of train) $(parts_of unlabelled)")
}

extract() {
  require_trained "$1"
  if [ "$redo" = 1 ] && [ -d "$exp_root/$2" ]; then mv "$exp_root/$2" "$exp_root/$2.old-$(date +%Y%m%d-%H%M%S)"; fi
  run python local/compress.py --extract --exp-dir "$exp_root/$1" --use-averaged-model --output-dir "$exp_root/$2"
}

# The trained ones of the phases $@, and a line for each that says when its training ended.
trained_folders() {
  local phase
  folders=() made_from=""
  for phase in "$@"; do
    is_current "$phase" || continue
    folders+=("$exp_root/$phase")
    made_from+="$phase $(training_ended "$phase")"$'\n'
  done
}

# How much later than the offline model the streaming modes emit.
delay_stage() {
  local test
  is_current offline || return 0
  test=$(parts_of test)
  trained_folders $(tr ' ' '\n' <<<"$phases" | grep -vx -e pretrain -e offline)
  [ "${#folders[@]}" -gt 0 ] || return 0
  run_stage 6 "emission delays" "$exp_root/.done-delays" \
    "$(phase_fingerprint offline; training_ended offline; echo "$made_from")" \
    run python local/emission_delay.py --exp-dir "${folders[@]}" --reference-exp-dir "$exp_root/offline" \
    --use-averaged-model --test-parts "${test// /,}" --device "$device"
}

# What leaving weights out saves, on one thread: the dense model first, with which the others are compared.
speed_stage() {
  is_current streaming || return 0
  trained_folders streaming supernet extracted
  [ "${#folders[@]}" -gt 1 ] || return 0
  run_stage 6 "speed" "$exp_root/.done-speed" "$(echo "in TorchScript"; echo "$made_from")" \
    run python local/measure_speed.py --exp-dir "${folders[@]}" --use-averaged-model
}

start_recipe
data_stages
train_stage 2 pretrain
train_stage 3 supernet $(tr ' ' '\n' <<<"$more" | grep '^supernet_[^s]\|^supernet_s7' || true)
train_stage 4 supernet_scratch offline streaming prune_after dual_dense \
  $(tr ' ' '\n' <<<"$more" | grep '^supernet_scratch\|^prune_after' || true)
train_queued
run_stage 5 extracted "$exp_root/extracted/.done" "$(phase_fingerprint extracted; dependencies extracted)" \
  extract supernet extracted
if is_asked 6; then
  decode_stage
  delay_stage
  speed_stage
fi
run_stage 6 "report" "" "" stage_report
export_stage
