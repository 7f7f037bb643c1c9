#!/usr/bin/env bash
# WikiText-103, or any text: causal (GPT) and masked (RoBERTa) language models, and fine-tuning.
#
#   bash recipes/wikitext103/run.sh --task lm --model evomoe              downloads WikiText-103
#   bash recipes/wikitext103/run.sh --task mlm --data DIR                 DIR/{train,valid,test}.txt
#   bash recipes/wikitext103/run.sh --task mlm --classes DIR --text "sentence1 sentence2"
#                                   then fine-tunes on DIR/{train,dev}.tsv in GLUE's format
#
# 103 million words. The published perplexity of fairseq's transformer_lm, not measured here, is 30.5 per
# word on the test set.
set -euo pipefail
CALLER=$PWD
cd "$(dirname "$0")/../.."
RECIPE=recipes/wikitext103
vocab=32000 updates=50000
fetch() {
    python recipes/steps/download.py "$RECIPE/corpus.toml" --out "$WORK/archives" ${data:+--mirror "$data"}
    sets=("$WORK/archives/wikitext-103-raw-v1.zip!wikitext-103-raw/wiki."{train,valid,test}.raw)
}
. recipes/lib/language_recipe.sh
