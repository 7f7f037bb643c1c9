#!/usr/bin/env bash
# WMT14 English-French: download, clean, sentencepiece, train, average, translate, score.
#
#   bash recipes/wmt14_en_fr/run.sh --model evomoe --size big
#
# 41 million pairs: 8 GB of archives, 20 GB of text, and 4 GB of memory for hashes during cleaning. Published
# BLEU on newstest2014, not measured here: Transformer base 38.1, big 41.8 (arXiv 1706.03762, tokenised).
# For several GPUs see recipes/wmt14_en_de/run.sh.
set -euo pipefail
CALLER=$PWD
cd "$(dirname "$0")/../.."
RECIPE=recipes/wmt14_en_fr
size=big updates=100000 average=10 experts=8 search="--beam 4 --lenpen 0.6 --max-tokens 8000"
. recipes/lib/corpus_recipe.sh
