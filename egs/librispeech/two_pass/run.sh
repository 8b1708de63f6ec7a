#!/usr/bin/env bash
# Two-pass end-to-end ASR compression (Dawalatabad et al., ASRU 2021): an RNN-T with a LAS second pass, made small in
# three stages of distillation. Now: stages 0-2 and 6 with the teacher's RNN-T; the LAS and the three distillation
# stages are not there yet.
#
#   ./run.sh --stage 0 --stop-stage 6 [options]      from the top of the repository; ./run.sh --help lists the options
recipe=two_pass
recipe_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
last_stage=6
source "$recipe_dir/../common.sh"

# Trained phases, in order: each is conf/<scale>/<phase>.yaml and exp/<corpus>-<scale>/<phase>/.
phases="teacher"
methods=greedy_search,modified_beam_search,fast_beam_search,fast_beam_search_nbest,fast_beam_search_nbest_oracle

parse_options "$@"
activate_environment
prepare_paths
check_configs $phases

features() { stage_features teacher; }
teacher() { train_phase teacher; }

# The methods of a call share the encoder's run, so each phase is decoded in one.
decode() {
  for phase in $phases; do
    if [ ! -e "$exp_root/$phase/config.json" ]; then fail "$exp_root/$phase holds no model; run stage 2 first"; fi
    decode_phase "$phase" "$methods"
  done
}

run_stage 0 "corpus and manifests" "$manifests_dir/.done" "$(data_fingerprint)" stage_data
run_stage 1 "features and BPE" "$fbank_dir/.done-$vocab_size" "$(feature_fingerprint teacher)" features
run_stage 2 "teacher" "$exp_root/teacher/.done" "$(phase_fingerprint teacher)" teacher

for number in 3 4 5; do
  if [ "$number" -ge "$stage" ] && [ "$number" -le "$stop_stage" ]; then
    log "Stage $number: not there yet (distillation of the RNN-T, of the LAS, deep finetuning): nothing is done"
  fi
done

run_stage 6 "decode" "$exp_root/.done-decode" "$(decode_fingerprint "$phases" "$methods")" decode
run_stage 6 "report" "" "" stage_report
