#!/bin/sh
# The base preset (98M active parameters) trained on books on one GPU, and what came of it: bits a byte, samples, routing.
#
#   examples/books.sh books_train.txt books_val.txt runs/books [STEPS]
#
# A step is 32 x 1,024 tokens. The rate is constant but for its last fifth (WSD), so STEPS may be as many as there is
# time for; a run that was stopped goes on with: abyssal train --resume runs/books
set -e
train=$1 validation=$2 out=$3 steps=${4:-8000}
abyssal train base \
    data.source="$train" data.validation="$validation" \
    training.steps="$steps" training.batch_size=32 training.sequence_length=1024 training.accumulate=1 \
    optimizer.lr=1.0e-3 schedule.warmup=200 \
    validation.every=500 checkpoint.every=500 samples.every=2000 \
    'samples.prompts=["Once upon a time", "The future of artificial intelligence", "He was walking", "Music is a"]' \
    --out "$out"
abyssal eval "$out" --perplexity "$validation"
abyssal report "$out"
abyssal lens "$out" --text "$validation" --out "$out/lens.html"
