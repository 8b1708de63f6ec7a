#!/usr/bin/env bash
# Runs a recipe: ./run.sh [--recipe two_pass] [options]. Every option is forwarded to egs/librispeech/<recipe>/run.sh.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
recipes=$(cd "$root/egs/librispeech" && for f in */run.sh; do echo "${f%/run.sh}"; done | paste -sd' ' -)

# Each recipe with what its run.sh says of itself, up to the year of its source.
describe_recipes() {
  local name
  for name in $recipes; do
    printf '  %-12s %s\n' "$name" "$(sed -n '2{s/^# //;s/\([0-9])\).*/\1/;p}' "$root/egs/librispeech/$name/run.sh")"
  done
}

usage() {
  cat <<HELP
usage: ./run.sh [--recipe NAME] [options]

  ./run.sh                                                    everything, on speech it makes itself (<50 min, 2 cores)
  ./run.sh --scale smoke                                      the same with tiny models, to see that all is there
  ./run.sh --controls 1                                       also the students without a teacher (50 min)
  ./run.sh --recipe progressive                               another recipe
  ./run.sh --stage 2 --stop-stage 2 --set optim.lr=1e-3       one stage, with another setting
  ./run.sh --stage 7                                          teacher and student for sherpa-onnx, float and int8
  ./run.sh --corpus mini_librispeech                          5 h of real speech, downloaded
  ./run.sh --corpus librispeech --full-libri 1 --scale full --nproc 8
  ./run.sh --corpus-dir /speech/own --train-parts "a b" --dev-parts c --test-parts "d e"
  ./run.sh --csv "train=train.csv dev=dev.csv test=test.csv" --corpus-name cars --vocab-size 300

Recipes (default: two_pass)
$(describe_recipes)

Stages, the same in every recipe
  0  corpus and manifests      2    teacher                         6  decode and report
  1  features and BPE          3-5  the recipe's own phases         7  export for the device
  --stage N --stop-stage M     from N (default 0) to M (default: 6; 7 has to be asked for)
  --force                      run the stages again though they are done; an earlier training is moved aside
  A stage that ended well with the same options is skipped. One that was interrupted goes on where it was.

Corpus, one of
  --corpus synthetic           espeak-ng speaks device commands in noisy rooms (default)
  --corpus mini_librispeech    5 h; downloaded unless it is there
  --corpus librispeech         100 h, or 960 h with --full-libri 1; downloaded unless it is there
  --corpus-dir DIR             a folder in LibriSpeech layout; with --corpus librispeech, an unpacked copy of it
  --csv "PART=FILE ..."        tables with the columns path,text,speaker[,id]
  --kaldi-dir "PART=DIR ..."   Kaldi data directories
  --manifest-dir DIR           lhotse manifests: recordings_<part>.jsonl.gz and supervisions_<part>.jsonl.gz
and about it
  --corpus-name NAME           names its folders (default: from the corpus or the folder). Data go to
                               egs/librispeech/data/<name>, models to egs/librispeech/<recipe>/exp/<name>-<scale>;
                               only the synthetic corpus has data of its own for scale smoke: data/synthetic-smoke
  --train-parts "A B"  --dev-parts "C"  --test-parts "D E"  --unlabelled-parts "F"
                               (default: those of the corpus, or guessed from their names)
  --bad-audio error|skip       a faulty utterance stops stage 0 or 1 (default), or is left out and listed
  --resample                   accept audio that is not 16 kHz
  --channel N                  take channel N (from 0) of audio that has several
  --text-norm upper|none       transcripts in capitals without punctuation, as LibriSpeech's (default), or as they are
  --on-the-fly-feats           compute features while training instead of storing them

Model and training
  --scale smoke|mini|small|full    the folder of egs/librispeech/<recipe>/conf (default: mini for the synthetic corpus,
                               small for others): seconds; minutes; about 10 h of speech; 960 h on GPUs
  --vocab-size N               BPE pieces (default: smoke 60, mini 100, small and full 500)
  --bpe-model FILE             a BPE model trained elsewhere, such as a teacher's (with its --vocab-size)
  --teacher-torchscript FILE --teacher-tokens FILE
                               two_pass: distil from somebody else's model, train no teacher (README.md)
  --min-confidence P           soft_hard: labels with a lower P(hypothesis)^(1/tokens) are dropped (default 0.9)
  --set SECTION.KEY=VALUE      change a setting of all phases; may be repeated; transducer_kd/config.py has them all
  --set PHASE:SECTION.KEY=VALUE    of one phase, such as student:distill.weight=5
  --nproc N                    training processes, one per GPU (torchrun; default 1)
  --jobs N                     phases trained side by side where none waits for the other (default: 2 at scales smoke
                               and mini, where two processes of one thread are faster than one of two; else 1)
  --device auto|cpu|cuda|cuda:N    (default auto: the GPU where there is one)
  --controls                   two_pass: also train the students without a teacher. dual_mode: also other sparsities
                               and groups, and a quarter of the labels. The others always train all controls

Environment
  --env k2|modern              .venv or .venv-modern; tools/setup.sh makes it when it is missing
                               (default: the one tools/setup.sh chose, see its --help)
  OMP_NUM_THREADS              CPU threads of one process (default: all cores, shared among --nproc and --jobs)
HELP
}

recipe=two_pass
arguments=()
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --recipe=*) recipe=${1#*=} ;;
    --recipe) recipe=${2:-}; shift ;;
    *) arguments+=("$1") ;;
  esac
  shift || { echo "ERROR --recipe needs a name: $recipes" >&2; exit 1; }
done
if [[ " $recipes " != *" $recipe "* ]]; then
  echo "ERROR there is no recipe '$recipe'; there are: $recipes" >&2
  exit 1
fi
exec "$root/egs/librispeech/$recipe/run.sh" ${arguments[@]+"${arguments[@]}"}
