#!/bin/bash
# Make the runs behind the figures: train, score on test text, keep table and log in studies/results.
#
#     make smollm2 gemma speeches
#     bash studies/runs.sh                      # those not in studies/results: delete a run there to make it anew
#     bash studies/runs.sh smollm2/fw-12-24     # those whose names begin so
#     LIST=1 bash studies/runs.sh               # names and commands
#     MAX_STEPS=2 bash studies/runs.sh tiny     # a trial in runs/trial, on 512 tokens, which is not kept
#     bash studies/runs.sh gpu                  # made only when named
#
# A run that was stopped goes on where it stopped. made.txt beside each table has date, commit, minutes and machine. The
# minutes below are for training and scoring on one core of an AMD EPYC (Zen 4), with another run on the other core.
set -e
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export PYTHONPATH=studies/forks:.
python=${PYTHON:-.venv/bin/python}
wanted=$1

# record NAME FUNCTION ARGUMENTS...: call FUNCTION, which fills the folder $out, and keep its tables and its log.
record() {
  local name=$1
  local out=runs/$1
  local results=studies/results/$1
  local function=$2
  shift 2
  if [[ $LIST ]]; then
    echo $name "$@"
    return
  fi
  if [[ $name == gpu* && $wanted != gpu* ]]; then
    return
  fi
  if [[ $name != $wanted* || -e $results/table-${texts##* }.json ]]; then
    return
  fi
  if [[ $MAX_STEPS ]]; then
    out=runs/trial/$name
    tokens=512
  fi
  local begin=$SECONDS
  local commit=$(git describe --always --dirty --exclude '*')
  $function "$@"
  if [[ $MAX_STEPS ]]; then
    return
  fi
  {
    echo "date: $(date -u +%F)"
    echo "commit: $commit"
    echo "minutes: $(((SECONDS - begin) / 60)), $OMP_NUM_THREADS threads"
    echo "machine: $(lscpu | sed -n 's/^Model name: *//p')" $(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null)
    $python -m pip list --format freeze 2>/dev/null | grep -E '^(torch|transformers|datasets)='
  } >> $out/made.txt
  mkdir -p $results
  find $out -name 'table-*.json' -o -name log.jsonl -o -name made.txt | xargs cp -t $results
}

train() {
  $python $keep "$@" ${MAX_STEPS:+--max-steps $MAX_STEPS} --out $out --resume
  for text in $texts; do
    if [[ ! -e $out/table-$text.json ]]; then
      $python eval_kl.py $out --data $text --tokens $tokens --no-baselines --json $out/table-$text.json
    fi
  done
}

frontier() {
  $python studies/frontier.py $out "$@"
}

# texts: what to score, $tokens tokens of each. keep: a script that wraps the training script, or nothing.
run() {
  record $1 train "${@:2}"
}

# SmolLM2-135M on code and English, 2,000 steps of 2,048 tokens, most informative first. A run keeps the teacher's
# states for later ones of its seed, 28 GB in runs/states; the first of each span and seed takes about 30 minutes more.
smollm2="--teacher smollm2 --data stdlib speeches --seq-len 256 --compile --save-every 1000"
keep="studies/forks/keep_states.py runs/states 12 18 24"
texts="stdlib speeches"
tokens=16384
run smollm2/fw-12-18-seed-0 train_fw.py $smollm2 --start 12 --end 18  # 54 minutes
run smollm2/regression-12-18-seed-0 train_fw.py $smollm2 --start 12 --end 18 --solver euler --k 1  # 31 minutes
run smollm2/fm-12-18-seed-0 train_fm.py $smollm2 --start 12 --end 18  # 29 minutes
run smollm2/fw-12-24-seed-0 train_fw.py $smollm2 --start 12 --end 24  # 55 minutes
run smollm2/regression-12-24-seed-0 train_fw.py $smollm2 --start 12 --end 24 --solver euler --k 1  # 38 minutes
record smollm2/rivals frontier --teacher smollm2 --data $texts --start 12 --end 18 24  # 100 minutes
run smollm2/fm-12-24-seed-0 train_fm.py $smollm2 --start 12 --end 24  # 32 minutes
run smollm2/fw-12-24-logits-half-seed-0 train_fw.py $smollm2 --start 12 --end 24 --logit-weight 1 --max-steps 1000  # 2 hours, beside two to three other jobs
run smollm2/fw-12-24-half-seed-0 train_fw.py $smollm2 --start 12 --end 24 --max-steps 1000  # 42 minutes, beside two other jobs
run smollm2/regression-12-24-long-seed-0 train_fw.py $smollm2 --start 12 --end 24 --solver euler --k 1 --max-steps 3000  # 51 minutes
run smollm2/linear-start-12-24-seed-0 studies/forks/train_linear_start.py $smollm2 --start 12 --end 24  # 59 minutes
run smollm2/fw-12-24-logits-seed-0 train_fw.py $smollm2 --start 12 --end 24 --logit-weight 1
run smollm2/regression-12-24-logits-seed-0 train_fw.py $smollm2 --start 12 --end 24 --solver euler --k 1 --logit-weight 1
run smollm2/fw-12-18-equal-seed-0 train_fw.py $smollm2 --start 12 --end 18 --times equal
run smollm2/fw-12-24-equal-seed-0 train_fw.py $smollm2 --start 12 --end 24 --times equal  # 52 minutes
run smollm2/fw-12-24-seed-1 train_fw.py $smollm2 --start 12 --end 24 --seed 1  # 88 minutes
run smollm2/regression-12-24-seed-1 train_fw.py $smollm2 --start 12 --end 24 --solver euler --k 1 --seed 1  # 29 minutes
run smollm2/fw-12-18-seed-1 train_fw.py $smollm2 --start 12 --end 18 --seed 1  # 50 minutes
run smollm2/regression-12-18-seed-1 train_fw.py $smollm2 --start 12 --end 18 --solver euler --k 1 --seed 1  # 36 minutes
run smollm2/fm-12-18-seed-1 train_fm.py $smollm2 --start 12 --end 18 --seed 1
run smollm2/fw-12-24-seed-2 train_fw.py $smollm2 --start 12 --end 24 --seed 2
run smollm2/fw-12-18-seed-2 train_fw.py $smollm2 --start 12 --end 18 --seed 2

# The included teacher, 2,000 steps of 2,048 tokens of code.
keep=""
texts="stdlib"
tiny="--teacher tiny_teacher --compile"
record tiny/rivals frontier --start 6 --end 12 18  # 4 minutes
for seed in 0 1 2; do
  run tiny/fm-6-12-seed-$seed train_fm.py $tiny --start 6 --end 12 --seed $seed  # 4 minutes
  run tiny/regression-6-12-seed-$seed train_fw.py $tiny --start 6 --end 12 --solver euler --k 1 --seed $seed  # 4 minutes
  run tiny/fw-6-18-seed-$seed train_fw.py $tiny --start 6 --end 18 --seed $seed  # 8 minutes
  run tiny/fw-6-18-equal-seed-$seed train_fw.py $tiny --start 6 --end 18 --times equal --seed $seed  # 8 minutes
  run tiny/regression-6-18-seed-$seed train_fw.py $tiny --start 6 --end 18 --solver euler --k 1 --seed $seed  # 5 minutes
  run tiny/fm-6-18-seed-$seed train_fm.py $tiny --start 6 --end 18 --seed $seed  # 5 minutes
done
run tiny/regression-6-18-long-seed-0 train_fw.py $tiny --start 6 --end 18 --solver euler --k 1 --max-steps 3500  # 9 minutes

# Gemma-3-270M on code and English, 1,000 steps (make gemma). Its vocabulary of 262,144 makes scoring the larger part,
# 30 minutes a run, and needs 8 GB of memory. States kept: 10 GB a span.
texts="stdlib speeches"
tokens=8192
gemma="--teacher gemma --data stdlib speeches --seq-len 256 --compile --max-steps 1000 --save-every 1000"
keep="studies/forks/keep_states.py runs/gemma-states 6 12"
run gemma/regression-6-12-seed-0 studies/forks/train_gemma3.py $gemma --start 6 --end 12 --solver euler --k 1  # 57 minutes
run gemma/fw-6-12-seed-0 studies/forks/train_gemma3.py $gemma --start 6 --end 12  # 66 minutes, beside two other jobs
run gemma/fm-6-12-seed-0 studies/forks/train_gemma3.py $gemma --start 6 --end 12 --method fm  # 31 minutes, its two texts scored at once
run gemma/regression-6-12-plain-seed-0 studies/forks/train_gemma3.py $gemma --start 6 --end 12 --solver euler --k 1 --channel-power 0  # 42 minutes
record gemma/rivals frontier --teacher gemma --data $texts --start 6 --end 12 --tokens $tokens  # 125 minutes
run gemma/linear-start-6-12-seed-0 studies/forks/train_gemma3_linear_start.py $gemma --start 6 --end 12
keep="studies/forks/keep_states.py runs/gemma-states 5 15"
run gemma/fw-5-15-seed-0 studies/forks/train_gemma3.py $gemma --start 5 --end 15  # 74 minutes
run gemma/regression-5-15-seed-0 studies/forks/train_gemma3.py $gemma --start 5 --end 15 --solver euler --k 1  # 36 minutes

# On a GPU: SmolLM2-135M, 5,000 steps of 8,192 tokens, ten times as much text, several epochs. Not yet run.
keep=""
texts="stdlib speeches"
tokens=16384
gpu="--teacher smollm2 --data stdlib speeches --seq-len 256 --batch-size 32 --max-steps 5000 --compile --save-every 500"
run gpu/fw-12-24-seed-0 train_fw.py $gpu --start 12 --end 24
run gpu/regression-12-24-seed-0 train_fw.py $gpu --start 12 --end 24 --solver euler --k 1
run gpu/fw-12-24-logits-seed-0 train_fw.py $gpu --start 12 --end 24 --logit-weight 1
