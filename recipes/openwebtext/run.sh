#!/usr/bin/env bash
# OpenWebText, the pretraining text of the papers: GPT and RoBERTa.
#
#   bash recipes/openwebtext/run.sh --task lm --model evomoe     downloads it with Hugging Face's datasets
#   bash recipes/openwebtext/run.sh --task lm --data DIR         DIR/{train,valid,test}.txt, or a folder of
#                                                                documents that datasets can load
#
# 8 million documents, 40 GB of text, 9 billion pieces; every 2000th document is for validation, the one
# after it for the test. The papers' size is `--size medium` (24 layers of width 1024, 16 experts in every
# second: 1.9 billion parameters, 30 GB with Adam's state in fp32). An update has 2048 pieces; add
# `-- --update-freq 32` or workers for the half million of a usual GPT.
# Quoted, not measured here: the first version of the EvoMoE paper reports half the updates to the loss of
# Switch. The download itself is untested; what follows it is tested on documents of the same form.
set -euo pipefail
cd "$(dirname "$0")/../.."
RECIPE=recipes/openwebtext
vocab=50000 updates=300000 extras=hub,plots
fetch() {
    local text=$WORK/archives
    python recipes/documents.py --dataset "${data:-Skylion007/openwebtext}" --out "$text" --every 2000
    sets=("$text/train.txt" "$text/valid.txt" "$text/test.txt")
}
. recipes/language_recipe.sh
