#!/usr/bin/env bash
# OpenWebText, the papers' pretraining text, for GPT and RoBERTa models.
#
#   bash recipes/openwebtext/run.sh --task lm --model evomoe     downloads it with Hugging Face's datasets
#   bash recipes/openwebtext/run.sh --task lm --data DIR         DIR/{train,valid,test}.txt, or a folder of
#                                                                documents that datasets can load
#
# 8 million documents, 40 GB of text, 9 billion pieces. Every 2000th document is used for validation, the
# one after it for the test. The size in the papers is `--size medium` (24 layers of width 1024, 16 experts
# in every second layer, 1.9 billion parameters, 30 GB with Adam's state in fp32). An update has 2048 pieces.
# Add `-- --update-freq 32` and 8 workers for the half million of a usual GPT.
# The first version of the EvoMoE paper reports that half the updates reach the loss of Switch, which was not
# measured here. The download itself is untested; the later steps are tested on documents of the same form.
set -euo pipefail
CALLER=$PWD
cd "$(dirname "$0")/../.."
RECIPE=recipes/openwebtext
vocab=50000 updates=300000 extras=hub,plots
fetch() {
    local text=$WORK/archives
    python recipes/steps/documents.py --dataset "${data:-Skylion007/openwebtext}" --out "$text" --every 2000
    sets=("$text/train.txt" "$text/valid.txt" "$text/test.txt")
}
. recipes/lib/language_recipe.sh
