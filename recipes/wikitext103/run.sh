#!/usr/bin/env bash
# WikiText-103, or any text: causal (GPT) and masked (RoBERTa) language models, and fine-tuning.
#
#   bash recipes/wikitext103/run.sh --task lm --model evomoe              downloads WikiText-103
#   bash recipes/wikitext103/run.sh --task mlm --data DIR                 DIR/{train,valid,test}.txt
#   bash recipes/wikitext103/run.sh --task mlm --classes DIR --text "sentence1 sentence2"
#                                   then fine-tunes on DIR/{train,dev}.tsv, as GLUE has them
#
# 103 million words. Quoted, not measured here: fairseq's transformer_lm has perplexity 30.5 a word on
# the test set.
set -euo pipefail
cd "$(dirname "$0")/../.."
RECIPE=recipes/wikitext103
vocab=32000 updates=50000
fetch() {
    python recipes/download.py "$RECIPE/corpus.toml" --out "$WORK/archives" ${data:+--mirror "$data"}
    sets=("$WORK/archives/wikitext-103-raw-v1.zip!wikitext-103-raw/wiki."{train,valid,test}.raw)
}
. recipes/language_recipe.sh
